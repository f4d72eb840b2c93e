"""Run a launcher, pass signals on to its ranks, leave no process behind, and return the exit code of the run.

    python launch/run.py deepspeed launch/train.py --config configs/quickstart.yaml [key=value …]
    python launch/run.py torchrun --nproc-per-node 8 launch/train.py --config …

    python launch/run.py --requeue srun … launch/train.py --config …          as launch/slurm/train.sbatch does

Launchers lose signals and the exit codes of their ranks: `deepspeed` ends with 0 when its launch.py was killed, and
leaves its ranks running after SIGTERM. The exit code is therefore the one in run_status.json (launch/train.py lists the
codes). If this attempt wrote none, it is the launcher's own code, but never 0.

SIGTERM, SIGUSR1, SIGHUP and the first ^C create the file RUN/STOP, which all ranks see wherever they run: they save and
exit. Ranks under srun get signals from SLURM itself, and the file only for ^C. A second ^C, or one before training has
started, ends all ranks at once, with code 130.

--requeue requeues the SLURM job if another attempt can succeed: the run was stopped by a signal or by the end of the
job, or failed for a reason that need not come back. It does not after scancel, ^C or the file STOP, nor for a run that
diverged or makes no progress. SLURM itself requeues a job whose node fails.
"""

import argparse
import sys

from vaescale import arguments, process


def parse() -> argparse.Namespace:
    parser = arguments.command(__doc__)
    parser.add_argument("--requeue", action="store_true", help="requeue the SLURM job if another attempt can succeed")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="LAUNCHER … launch/train.py --config C …")
    return parser.parse_args()


if __name__ == "__main__":  # before the other imports, which take seconds
    process.start()
    given = parse()

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from vaescale import plugins, settings
from vaescale.config import ConfigError
from vaescale.lifecycle.lock import held
from vaescale.lifecycle.status import FAILED, PREEMPTED, RUNNING, Diverged, Status
from vaescale.lifecycle.stops import FILE, TWICE, TWICE_INTERRUPTED

PATIENCE = 120.0  # seconds that ranks have to save and exit after their launcher has ended
AT_ONCE = 2.0  # seconds that a launcher has to end its ranks on other hosts, before all on this host are killed
BY_USER = (FILE, "SIGINT", TWICE_INTERRUPTED)
LOOK = 0.2  # seconds between checks for ended processes and for signals
SET_DEATH_SIGNAL, SET_SUBREAPER = 1, 36  # linux/prctl.h


class Asked:
    """What the signals received so far have requested."""

    def __init__(self, run: Path, srun: bool) -> None:
        self.status, self.stop, self.srun = Status(run, 0), run / "STOP", srun
        self.before = self.status.read()
        self.cancelled = self.at_once = False
        self._interrupted: float | None = None  # when first
        for number in process.SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup
                signal.signal(number, self._hear)

    def _hear(self, number: int, _: Any) -> None:
        now = time.monotonic()
        if number == signal.SIGINT:
            self._interrupted = self._interrupted or now
            self.at_once |= self.status.read() == self.before or now - self._interrupted > TWICE
        self.cancelled = True
        if self.srun and number != signal.SIGINT:
            return
        try:
            self.stop.parent.mkdir(parents=True, exist_ok=True)
            self.stop.touch()
        except OSError as error:
            print(f"error: {self.stop} cannot be created ({error.strerror}): press ^C twice to end at once", flush=True)

    def acknowledge(self) -> None:
        """Removes the file STOP, after all ranks have ended."""
        if self.cancelled or not self.srun:
            with suppress(OSError):
                self.stop.unlink(missing_ok=True)


def main(command: list[str], requeue: bool) -> int:
    try:
        run = run_directory(command)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if "--take-over" not in command and (who := held(run)):  # some launchers would lose the ranks' code
        print(
            f"error: {run} is in use by another training, {who}: wait until it ends, or give another run=…",
            file=sys.stderr,
        )
        return ConfigError.exit_code
    prctl = ctypes.CDLL(None).prctl
    prctl(SET_SUBREAPER, 1, 0, 0, 0)  # orphans become children of this process
    process.hand_over()
    asked = Asked(run, command[0] == "srun")
    launcher = subprocess.Popen(
        command,
        start_new_session=True,  # signals sent to this process's group reach only this process
        preexec_fn=lambda: prctl(SET_DEATH_SIGNAL, signal.SIGTERM, 0, 0, 0),
    )
    code = ended(launcher, asked)
    asked.acknowledge()
    if asked.at_once:
        return process.INTERRUPTED_CODE
    after = asked.status.read()
    own = after if after != asked.before else {}  # written by this attempt
    if requeue and not asked.cancelled and worth_another_attempt(code, own):
        subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]], check=True)
    return exit_code(code, own)


def ended(launcher: "subprocess.Popen[bytes]", asked: Asked) -> int:
    """Waits for the launcher and the processes it leaves behind, which are killed after PATIENCE or at once on request.
    Returns the launcher's exit code."""
    while launcher.poll() is None and not asked.at_once:
        time.sleep(LOOK)
    if asked.at_once:
        for _ in range(2 if asked.srun else 1):  # srun wants it twice
            launcher.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            launcher.wait(AT_ONCE)
        kill()
        launcher.wait()
    until = time.monotonic() + PATIENCE
    with suppress(ChildProcessError):
        while True:
            if os.waitpid(-1, os.WNOHANG)[0]:
                continue
            if asked.at_once or time.monotonic() > until:
                kill()
            time.sleep(LOOK)
    return launcher.returncode


def kill() -> None:
    """Sends SIGKILL to all descendants of this process at once, so that none reports another's end as a failure."""
    for pid in list(descendants(os.getpid())):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def descendants(pid: int) -> Iterator[int]:
    for thread in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            for child in map(int, thread.read_text().split()):
                yield child
                yield from descendants(child)


def run_directory(command: list[str]) -> Path:
    """Returns the run directory of `… train.py --config C key=value …`. Raises ConfigError."""
    script = next((place for place, word in enumerate(command) if word.endswith(".py")), len(command))
    words = command[script + 1 :]
    if not any(word.startswith("--config") for word in words):
        raise ConfigError("write launch/run.py LAUNCHER … launch/train.py --config C [key=value …]")
    train = arguments.parse(arguments.training(None), words)
    plugins.load(train.plugin)
    return Path(settings.load(train.config, [one for one in train.overrides if "=" in one]).run)


def worth_another_attempt(code: int, status: dict[str, Any]) -> bool:
    """Returns whether to requeue the job. code: that of the launcher; status: run_status.json of this attempt, or {} if
    it wrote none."""
    if not status or status["status"] == RUNNING:
        return code == process.STOPPED_CODE  # by a signal before training began
    if status["status"] == PREEMPTED:
        return status["why"] not in BY_USER
    return status["status"] == FAILED and status["code"] not in (ConfigError.exit_code, Diverged.exit_code)


def exit_code(code: int, status: dict[str, Any]) -> int:
    """Returns the code of the run. Arguments as in worth_another_attempt."""
    said = status.get("code")
    if isinstance(said, int):
        return said
    return 128 - code if code < 0 else code or 1


if __name__ == "__main__":
    sys.exit(main(given.command, given.requeue))
