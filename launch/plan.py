"""Estimate what a training costs on N nodes of G accelerators each.

    python launch/plan.py --config configs/vqvae_imagenet128.yaml --nodes 4 --accelerators 8 --step-time 0.11 \\
        --inside 200 --between 50 [key=value …]

--step-time: seconds per step on one accelerator with its share of the batch: train with global_batch=SHARE and read
perf/seconds_per_step while data/wait_share is small. --inside, --between: GB/s, the busbw of nccl-tests, or the
topology line of a training's log. A table follows with every cost that grows with the number of ranks, its formula and
its assumption; --ranks 8,64,1024 prints it for these numbers of ranks, each with the same share of the batch. The
formulas are in vaescale/advice/plan.py.
"""

import argparse
import sys

from vaescale import arguments


def worlds(text: str) -> list[int]:
    found = text.split(",")
    if not all(one.isdecimal() and int(one) for one in found):
        raise argparse.ArgumentTypeError(f"{text!r} are not numbers of ranks, such as 8,64,1024")
    return list(map(int, found))


def parse() -> argparse.Namespace:
    parser = arguments.command(__doc__)
    parser.add_argument("--config", required=True)
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--accelerators", type=int, default=8, help="accelerators per node (default: 8)")
    parser.add_argument("--step-time", type=float, required=True, help="seconds per step")
    parser.add_argument("--inside", type=float, required=True, help="GB/s through each accelerator, within a node")
    parser.add_argument("--between", type=float, default=12.5, help="GB/s into a node (default: 12.5, 100 Gbit/s)")
    parser.add_argument(
        "--jitter",
        type=float,
        default=0.02,
        help="standard deviation of step times, as a share (default: 0.02, assumed)",
    )
    parser.add_argument(
        "--latency", type=float, default=0.0, help="ms per step, however small the sums are (default: 0)"
    )
    parser.add_argument(
        "--exposed",
        type=float,
        default=1.0,
        help="share of the gradients' sums at ZeRO 0 that does not overlap with the backward pass (default: 1)",
    )
    parser.add_argument("--ranks", type=worlds, help="numbers of ranks of the table, such as 8,64,1024")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    given = arguments.parse(parser)
    node = given.accelerators
    for world in given.ranks or []:
        if world > node and world % node:
            lower = world // node * node
            parser.error(
                f"argument --ranks: {world} ranks do not fill nodes of {node} accelerators: use {lower} or "
                f"{lower + node} ranks, or set --accelerators"
            )
    return given


if __name__ == "__main__":
    given = parse()  # before the other imports, which take seconds

from vaescale import settings
from vaescale.advice.plan import Cluster, plan, table
from vaescale.config import ConfigError


def main(given: argparse.Namespace) -> int:
    cluster = Cluster(
        given.nodes,
        given.accelerators,
        1e9 * given.inside,
        1e9 * given.between,
        given.jitter,
        given.latency / 1000,
        given.exposed,
    )
    try:
        config = settings.load(given.config, given.overrides)
        lines = plan(config, cluster, given.step_time)
        lines += ["", *table(config, cluster, given.step_time, given.ranks or [cluster.world])]
        print("\n".join(lines))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(given))
