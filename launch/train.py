"""Train a model.

    deepspeed launch/train.py --config configs/quickstart.yaml [key=value …]
    deepspeed --num_accelerators 2 launch/train.py --config …
    torchrun --nproc-per-node 2 launch/train.py --config …
    python launch/train.py --config …                       one process

To resume, run the same command. To stop after a save: SIGTERM or SIGUSR1 to any rank, or `touch RUN/STOP`. Exit codes:
0 finished; 2 wrong settings, missing data, or checkpoints that cannot be read or written; 3 too many steps were
skipped, or weights are not finite; 4 a step did not end, see RUN/stacks; 75 stopped, run it again; 93 failed at one
step time and again, do not requeue. The run directory's run_status.json says the same, and why. Not every launcher
returns its ranks' code: `python launch/run.py deepspeed launch/train.py …` does.
"""

import argparse
import sys
import traceback
from pathlib import Path

from vaescale import distributed
from vaescale.config import ConfigError
from vaescale.data import DataError
from vaescale.training import settings
from vaescale.training.checkpoint import CheckpointError, Unreadable
from vaescale.training.guard import Diverged
from vaescale.training.status import PREEMPTED_CODE, NoProgress, Status

FORESEEN = (ConfigError, DataError, CheckpointError, Diverged)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--dry-run", action="store_true", help="say what would be run, and exit")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # deepspeed passes it; the environment tells
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_intermixed_args()
    try:
        config = settings.load(arguments.config, arguments.overrides)
        settings.check(config, distributed.place().world)
        # Imported only now, so that a typo is answered before DeepSpeed's import or a process group cost time.
        if arguments.dry_run:
            from vaescale.training.dry_run import describe

            if distributed.place().rank == 0:
                print(describe(config, distributed.place().world))
            return 0
        from vaescale.training.trainer import Trainer

        status = Status(Path(config.run), distributed.place().rank)
        with status.recording(lambda: status.read().get("step", 0)):
            trainer = Trainer(config)
        return PREEMPTED_CODE if trainer.train() else 0
    except NoProgress as error:
        if not isinstance(error.__cause__, FORESEEN):
            traceback.print_exception(error.__cause__)
        say(error)
        return error.exit_code
    except FORESEEN as error:
        if distributed.place().rank == 0 or isinstance(error, DataError | Unreadable):  # the same on all ranks
            say(error)
        return error.exit_code
    finally:
        distributed.finish()


def say(error: Exception) -> None:
    rank, _, world = distributed.place()
    print(f"error: {f'rank {rank}: ' if world > 1 else ''}{error}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
