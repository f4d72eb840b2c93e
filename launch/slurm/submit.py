"""Submit a training to SLURM.

    python launch/slurm/submit.py configs/vqvae_imagenet128.yaml --nodes 2 --time 24:00:00 data.root=/data/imagenet
    python launch/slurm/submit.py … --sweep optimizer.lr=1e-4,3e-4,1e-3     a job array, a run directory for each
    python launch/slurm/submit.py … --evaluate                              then launch/evaluate.py, when all is done
    python launch/slurm/submit.py … --option partition=gpu --option account=x     whatever else sbatch takes

From the project's root, which all nodes must see. The settings are checked first, then the request, by
`sbatch --test-only`. Exit code 2 if either is wrong.
"""

import argparse
import re
import shlex
import subprocess
import sys
from itertools import chain
from pathlib import Path

from vaescale import process, settings
from vaescale.config import ConfigError

TRAIN = "launch/slurm/train.sbatch"
BETWEEN = r",(?![^\[{]*[\]}])"  # the values of a sweep; a comma within a list is the list's


def main() -> int:
    process.forgive_output()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--accelerators", type=int, default=8, help="a node, one rank each (default: 8)")
    parser.add_argument("--cpu", action="store_true", help="the ranks use no accelerators")
    parser.add_argument("--cpus-per-task", type=int, default=8, help="of a rank, for its loader (default: 8)")
    parser.add_argument("--time", required=True, help="of one life; the job requeues itself until the run has finished")
    parser.add_argument("--sweep", metavar="KEY=A,B,C", help="a job array, one value each")
    parser.add_argument("--evaluate", action="store_true", help="evaluate the run once it has finished")
    parser.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="for sbatch, as --NAME=VALUE"
    )
    parser.add_argument("--print", action="store_true", help="print the commands and submit nothing")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_intermixed_args()
    try:
        runs = trainings(arguments)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    command = train_command(arguments, runs)
    if arguments.print:
        print(shlex.join(command))
        return 0
    tested = subprocess.run([*command[:1], "--test-only", *command[1:]], capture_output=True, text=True)
    if tested.returncode:
        print(f"error: SLURM does not take this: {tested.stderr.strip()}", file=sys.stderr)
        return 2
    job = submitted(command)
    print(f"job {job}: {arguments.nodes} node(s) × {arguments.accelerators} rank(s), {tested.stderr.strip()}")
    follow(job, list(runs))
    if arguments.evaluate:
        after = submitted(evaluate_command(arguments, job, list(runs)))
        print(f"job {after}: launch/evaluate.py, when job {job} has finished")
    return 0


def trainings(arguments: argparse.Namespace) -> dict[str, list[str]]:
    """Run directory → the overrides that this one has alone. Raises ConfigError for settings that cannot work."""
    world = arguments.nodes * arguments.accelerators
    config = settings.load(arguments.config, arguments.overrides)
    if not arguments.sweep:
        settings.check(config, world)
        return {config.run: []}
    key, _, values = arguments.sweep.partition("=")
    own = {}
    for value in re.split(BETWEEN, values):
        run = f"{config.run}/{key}={value}"
        own[run] = [f"{key}={value}", f"run={run}"]
        settings.check(settings.load(arguments.config, [*arguments.overrides, *own[run]]), world)
    return own


def options(arguments: argparse.Namespace, log: str) -> list[str]:
    return [f"--output={log}", *(f"--{option}" for option in arguments.option)]


def train_command(arguments: argparse.Namespace, runs: dict[str, list[str]]) -> list[str]:
    sweep = [own for own in runs.values() if own]
    command = ["sbatch", "--parsable", f"--nodes={arguments.nodes}", f"--time={arguments.time}"]
    command += [f"--ntasks-per-node={arguments.accelerators}", f"--cpus-per-task={arguments.cpus_per_task}"]
    command += [] if arguments.cpu else [f"--gpus-per-node={arguments.accelerators}"]
    command += [f"--array=0-{len(sweep) - 1}"] if sweep else []
    command += options(arguments, "slurm-%A_%a.log" if sweep else "slurm-%j.log")
    return [*command, TRAIN, "--config", arguments.config, *arguments.overrides, *chain(*sweep)]


def evaluate_command(arguments: argparse.Namespace, job: str, runs: list[str]) -> list[str]:
    evaluate = shlex.join([sys.executable, "launch/evaluate.py", "--run", *runs])
    command = ["sbatch", "--parsable", f"--dependency=afterok:{job}", "--kill-on-invalid-dep=yes", "--ntasks=1"]
    command += [f"--time={arguments.time}", f"--cpus-per-task={arguments.cpus_per_task}"]
    command += [] if arguments.cpu else ["--gpus-per-node=1"]
    return [*command, *options(arguments, "slurm-%j.log"), f"--wrap={evaluate}"]


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
    print(f"  stop     touch {one}/STOP, or scancel {job}: it saves first; to go on, submit it again")


if __name__ == "__main__":
    sys.exit(main())
