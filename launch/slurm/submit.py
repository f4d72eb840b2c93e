"""Submit a training to SLURM.

    python launch/slurm/submit.py configs/vqvae_imagenet128.yaml --nodes 2 --time 24:00:00 data.root=/data/imagenet
    python launch/slurm/submit.py … --sweep optimizer.lr=1e-4,3e-4,1e-3     a job array, one run directory each
    python launch/slurm/submit.py … --evaluate                              then launch/evaluate.py, once all are done
    python launch/slurm/submit.py … --option partition=gpu --option account=x     other options of sbatch

Run it from the project's root, which all nodes must see. It checks the settings first, then the request with
`sbatch --test-only`. Exit code 2 if either is wrong.
"""

import argparse
import sys

from vaescale import arguments, process


def parse() -> argparse.Namespace:
    parser = arguments.command(__doc__)
    parser.add_argument("config")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--accelerators", type=int, default=8, help="accelerators per node, one rank each (default: 8)")
    parser.add_argument("--cpu", action="store_true", help="the ranks use no accelerators")
    parser.add_argument("--cpus-per-task", type=int, default=8, help="CPUs of each rank, for its loader (default: 8)")
    parser.add_argument(
        "--time", required=True, help="time limit of one attempt; the job requeues itself until the run has finished"
    )
    parser.add_argument("--sweep", metavar="KEY=A,B,C", help="a job array, one value each")
    parser.add_argument("--evaluate", action="store_true", help="evaluate the run once it has finished")
    parser.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="for sbatch, as --NAME=VALUE"
    )
    parser.add_argument("--print", action="store_true", help="print the commands and submit nothing")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return arguments.parse(parser)


if __name__ == "__main__":  # before the other imports, which take seconds
    process.forgive_output()
    given = parse()

import re
import shlex
import subprocess
from itertools import chain
from pathlib import Path

from vaescale import settings
from vaescale.config import ConfigError

TRAIN = "launch/slurm/train.sbatch"
BETWEEN = r",(?![^\[{]*[\]}])"  # the values of a sweep; a comma within a list is the list's


def main(given: argparse.Namespace) -> int:
    try:
        runs = trainings(given)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    command = train_command(given, runs)
    if given.print:
        print(shlex.join(command))
        return 0
    tested = subprocess.run([*command[:1], "--test-only", *command[1:]], capture_output=True, text=True)
    if tested.returncode:
        print(f"error: SLURM rejects this job: {tested.stderr.strip()}", file=sys.stderr)
        return 2
    job = submitted(command)
    print(f"job {job}: {given.nodes} node(s) × {given.accelerators} rank(s), {tested.stderr.strip()}")
    follow(job, list(runs))
    if given.evaluate:
        after = submitted(evaluate_command(given, job, list(runs)))
        print(f"job {after}: launch/evaluate.py, when job {job} has finished")
    return 0


def trainings(given: argparse.Namespace) -> dict[str, list[str]]:
    """Returns run directory → the overrides of this run alone. Raises ConfigError for settings that cannot work."""
    world = given.nodes * given.accelerators
    config = settings.load(given.config, given.overrides)
    if not given.sweep:
        settings.check(config, world)
        return {config.run: []}
    key, _, values = given.sweep.partition("=")
    own = {}
    for value in re.split(BETWEEN, values):
        run = f"{config.run}/{key}={value}"
        own[run] = [f"{key}={value}", f"run={run}"]
        settings.check(settings.load(given.config, [*given.overrides, *own[run]]), world)
    return own


def options(given: argparse.Namespace, log: str) -> list[str]:
    return [f"--output={log}", *(f"--{option}" for option in given.option)]


def train_command(given: argparse.Namespace, runs: dict[str, list[str]]) -> list[str]:
    sweep = [own for own in runs.values() if own]
    command = ["sbatch", "--parsable", f"--nodes={given.nodes}", f"--time={given.time}"]
    command += [f"--ntasks-per-node={given.accelerators}", f"--cpus-per-task={given.cpus_per_task}"]
    command += [] if given.cpu else [f"--gpus-per-node={given.accelerators}"]
    command += [f"--array=0-{len(sweep) - 1}"] if sweep else []
    command += options(given, "slurm-%A_%a.log" if sweep else "slurm-%j.log")
    return [*command, TRAIN, "--config", given.config, *given.overrides, *chain(*sweep)]


def evaluate_command(given: argparse.Namespace, job: str, runs: list[str]) -> list[str]:
    evaluate = shlex.join([sys.executable, "launch/evaluate.py", "--run", *runs])
    command = ["sbatch", "--parsable", f"--dependency=afterok:{job}", "--kill-on-invalid-dep=yes", "--ntasks=1"]
    command += [f"--time={given.time}", f"--cpus-per-task={given.cpus_per_task}"]
    command += [] if given.cpu else ["--gpus-per-node=1"]
    return [*command, *options(given, "slurm-%j.log"), f"--wrap={evaluate}"]


def submitted(command: list[str]) -> str:
    """The job's number."""
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout.strip().split(";")[0]


def follow(job: str, runs: list[str]) -> None:
    common = runs[0] if len(runs) == 1 else str(Path(runs[0]).parent)
    one = shlex.quote(common) if len(runs) == 1 else f"{shlex.quote(common)}/…"
    curves = f"{common}/tensorboard" if len(runs) == 1 else common
    print(f"  state    squeue --job {job}        cat {one}/run_status.json")
    print(f"  log      tail -F slurm-{job}{'' if len(runs) == 1 else '_*'}.log")
    print(f"  curves   tensorboard --logdir {shlex.quote(curves)}")
    print(f"  stop     touch {one}/STOP, or scancel {job}: it saves first; to continue, submit it again")


if __name__ == "__main__":
    sys.exit(main(given))
