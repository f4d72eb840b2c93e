"""Check that everything is ready for a long job, or diagnose a run.

    python launch/doctor.py --config configs/quickstart.yaml [key=value …]
    torchrun --nproc-per-node 8 launch/doctor.py --config …      launched as the job will be
    python launch/doctor.py --run runs/quickstart                the state of a run, and what is wrong with it

Each line says ok, warn or FAIL, what was found, and what to do. Exit code 1 if a line says FAIL.
"""

import argparse
import sys
from pathlib import Path

from vaescale import arguments, process


def parse() -> argparse.Namespace:
    parser = arguments.command(__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config")
    what.add_argument("--run", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return arguments.parse(parser)


if __name__ == "__main__":  # before the other imports, which take seconds
    process.forgive_output()
    given = parse()

from collections.abc import Iterable

from vaescale import distributed, settings
from vaescale.advice import postmortem, preflight
from vaescale.advice.preflight import FAIL, OK, Finding
from vaescale.config import ConfigError


def main(given: argparse.Namespace) -> int:
    if given.run:
        return report(postmortem.diagnose(given.run))
    try:
        return before(given.config, given.overrides)
    except distributed.Misplaced as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def before(path: str, overrides: list[str]) -> int:
    _, _, world = distributed.place()
    try:
        config = settings.load(path, overrides)
        settings.check(config, world)
    except ConfigError as error:
        return report([Finding(FAIL, str(error))])
    failed = report(preflight.alone(config, world))
    distributed.init()
    if ranks := distributed.where(bool(failed)):
        whose = f" on rank {', '.join(map(str, ranks))}" if world > 1 else ""
        return report([Finding(FAIL, f"no trial step: first fix what failed above{whose}")])
    return report(preflight.together(config))


def report(findings: Iterable[Finding]) -> int:
    """Prints the findings as they come; ranks other than 0 leave out those that are ok. Returns 1 if one is FAIL."""
    rank, _, _ = distributed.place()
    worst = 0
    for finding in findings:
        if rank == 0 or finding.level != OK:
            print(f"rank {rank}: {finding}" if rank else finding, flush=True)
        worst = max(worst, int(finding.level == FAIL))
    return worst


if __name__ == "__main__":
    code = main(given)
    distributed.leave(code, together=code == 0)
