"""Run a launcher, leave nothing of it behind, and return the code that its ranks mean.

    python launch/run.py deepspeed launch/train.py --config configs/quickstart.yaml [key=value …]
    python launch/run.py torchrun --nproc-per-node 8 launch/train.py --config …

    python launch/run.py --requeue srun … launch/train.py --config …          what launch/slurm/train.sbatch does

Launchers lose their ranks' codes, and signals: `deepspeed` ends with 0 where its launch.py was killed, and with SIGTERM
leaves its ranks alone. So the code is that of run_status.json (see launch/train.py for the codes); where that tells
nothing of this life, the launcher's own, but never 0. SIGTERM and SIGUSR1 become the file RUN/STOP, which reaches the
ranks wherever they are; those of srun get signals from SLURM itself. To stop at once: SIGINT, which the launcher gets.

--requeue puts a SLURM job back into the queue where another life is worth it: the run was stopped by a signal or the
job's end, or has failed of what it need not fail of again. Not if it was cancelled, or stopped by the file STOP, or has
diverged, or makes no progress. A job whose node fails SLURM requeues itself.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from vaescale import config
from vaescale.config import ConfigError
from vaescale.training.guard import Diverged
from vaescale.training.status import FAILED, PREEMPTED, Status
from vaescale.training.stops import FILE

PATIENCE = 120.0  # seconds in which ranks whose launcher has ended must have saved and left
SET_DEATH_SIGNAL, SET_SUBREAPER = 1, 36  # linux/prctl.h


def main() -> int:
    requeue = sys.argv[1:2] == ["--requeue"]
    command = sys.argv[2:] if requeue else sys.argv[1:]
    try:
        run = run_directory(command)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    prctl = ctypes.CDLL(None).prctl
    prctl(SET_SUBREAPER, 1, 0, 0, 0)  # orphans become children of this process
    before = Status(run, 0).read()
    process = subprocess.Popen(
        command,
        start_new_session=True,  # what is sent to this process's group is sent to it alone
        preexec_fn=lambda: prctl(SET_DEATH_SIGNAL, signal.SIGTERM, 0, 0, 0),
    )
    stop = run / "STOP"
    cancelled = False

    def ask(*_: Any) -> None:
        nonlocal cancelled
        cancelled = True
        if command[0] != "srun":
            run.mkdir(parents=True, exist_ok=True)
            stop.touch()

    signal.signal(signal.SIGTERM, ask)
    signal.signal(signal.SIGUSR1, ask)
    signal.signal(signal.SIGINT, lambda *_: process.send_signal(signal.SIGINT))
    code = process.wait()
    outlive(PATIENCE)
    if command[0] != "srun":
        stop.unlink(missing_ok=True)  # none is left to heed it
    after = Status(run, 0).read()
    if requeue and not cancelled and after != before and worth_another_life(after):
        subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]], check=True)
    return meant(code, before, after)


def run_directory(command: list[str]) -> Path:
    """That of `… train.py --config C key=value …`. Raises ConfigError."""
    script = next((place for place, word in enumerate(command) if word.endswith(".py")), len(command))
    words = command[script + 1 :]
    if "--config" not in words[:-1]:
        raise ConfigError("write launch/run.py LAUNCHER … launch/train.py --config C [key=value …]")
    overrides = [word for word in words if "=" in word and not word.startswith("-")]
    raw = config.read(words[words.index("--config") + 1], overrides)
    if "run" not in raw:
        raise ConfigError("say run=… in the config or beside it")
    return Path(str(raw.run))


def outlive(patience: float) -> None:
    """Wait for what the launcher has left behind; kill what is there after so many seconds."""
    until = time.monotonic() + patience
    with suppress(ChildProcessError):
        while True:
            if os.waitpid(-1, os.WNOHANG)[0]:
                continue
            if time.monotonic() > until:
                for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
                    os.kill(int(pid), signal.SIGKILL)
            time.sleep(0.2)


def worth_another_life(status: dict[str, Any]) -> bool:
    """status: run_status.json."""
    if status["status"] == PREEMPTED:
        return status["why"] != FILE
    return status["status"] == FAILED and status["code"] not in (ConfigError.exit_code, Diverged.exit_code)


def meant(code: int, before: dict[str, Any], after: dict[str, Any]) -> int:
    """code: the launcher's; before, after: run_status.json, which tells nothing of this life if it has not changed."""
    said = after.get("code") if after != before else None
    if isinstance(said, int):
        return said
    return 128 - code if code < 0 else code or 1


if __name__ == "__main__":
    sys.exit(main())
