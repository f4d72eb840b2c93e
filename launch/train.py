"""Train a model.

    deepspeed launch/train.py --config configs/quickstart.yaml [key=value …]
    deepspeed --num_accelerators 2 launch/train.py --config …
    torchrun --nproc-per-node 2 launch/train.py --config …
    python launch/train.py --config …                       one process

Run the same command again to resume. To stop with a checkpoint, send SIGTERM, SIGUSR1, SIGHUP or SIGINT (^C) to any
rank, or `touch RUN/STOP`. Before the first step there is nothing to save, and these signals end the process at once. A
second ^C ends it at once, too, and loses the steps since the last checkpoint.

Exit codes: 0 finished; 2 wrong settings, missing data, a run directory that another training uses, or files of the run
that cannot be read or written; 3 too many steps were skipped, or weights are not finite; 4 a step did not end, see
RUN/stacks; 75 stopped, run the command again; 93 failed repeatedly at the same step, do not requeue; 130 ended at once
by ^C; 1 any other error. run_status.json in the run directory has the same code and the reason. Not every launcher
returns the code of its ranks; `python launch/run.py deepspeed launch/train.py …` does.
"""

import argparse
import sys

from vaescale import arguments, process

if __name__ == "__main__":  # before the other imports, which take seconds
    process.start()
    given = arguments.parse(arguments.training(__doc__))

import traceback
from pathlib import Path

from vaescale import distributed, plugins, settings
from vaescale.config import ConfigError
from vaescale.data import DataError
from vaescale.lifecycle.checkpoint import CheckpointError, Unreadable
from vaescale.lifecycle.lock import Lock
from vaescale.lifecycle.status import PREEMPTED_CODE, Diverged, NoProgress, Status
from vaescale.lifecycle.watch import STACKS

FORESEEN = (ConfigError, DataError, CheckpointError, Diverged, distributed.Unjoined)


def main(given: argparse.Namespace) -> int:
    try:
        rank, local_rank, world = distributed.place()  # first of all: whatever else is wrong is said by rank
        plugins.load(given.plugin)
        config = settings.load(given.config, given.overrides)
        mistake = wrong(config, rank, world)
        # Imported only now, so that a typo is answered before DeepSpeed's import or a process group cost time.
        if given.dry_run:
            from vaescale.advice.dry_run import dry_run

            if mistake:
                raise ConfigError(mistake)
            if rank == 0:
                print(dry_run(config, world))
            return 0
        from vaescale.advice import preflight
        from vaescale.training.trainer import Trainer

        shared = preflight.shared_memory(config, world, preflight.ranks_here(world))
        if local_rank == 0 and shared.level != preflight.OK:
            print(shared, flush=True)
        status = Status(Path(config.run), rank)
        with Lock(Path(config.run), given.take_over) as lock:
            with status.recording(lambda: status.read().get("step", 0)):
                if world > 1:
                    distributed.init(config.hang_timeout, Path(config.run) / STACKS)
                    if mistake := distributed.tell(mistake):
                        raise ConfigError(mistake)
                trainer = Trainer(config, lock)
            return PREEMPTED_CODE if trainer.train() else 0
    except distributed.Misplaced as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except NoProgress as error:
        if not isinstance(error.__cause__, FORESEEN):
            traceback.print_exception(error.__cause__)
        say(error)
        return error.exit_code
    except FORESEEN as error:
        if distributed.place().rank == 0 or isinstance(
            error, DataError | Unreadable | distributed.Unjoined
        ):  # the same on all ranks
            say(error)
        return error.exit_code


def wrong(config: settings.Config, rank: int, world: int) -> str:
    """Checks the settings. Returns what rank 0 finds wrong with the model's shapes, which takes it seconds that the
    other ranks spend on imports. Raises ConfigError for what all ranks find, and for everything in a single process."""
    settings.micro_batch(config, world)
    if rank == 0:
        try:
            settings.check(config, world)
        except ConfigError as error:
            if world == 1:
                raise
            return str(error)
    return ""


def say(error: Exception) -> None:
    rank, _, world = distributed.place()
    print(f"error: {f'rank {rank}: ' if world > 1 else ''}{error}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        code = main(given)
    except Exception:
        traceback.print_exc()
        code = 1
    distributed.leave(code, together=code in (0, PREEMPTED_CODE))
