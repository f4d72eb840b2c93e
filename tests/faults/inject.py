"""Runs the commands that a user types on forked ranks, and injects faults from outside, without hooks in the product.

A fault is [name, rank, argument …]; see FAULTS.
"""

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
import traceback
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch
import torch._dynamo  # the commands check shapes with it; imported once for all forks, not for 2 s in each

from tests.lifecycle.test_checkpoint import flip, forge
from vaescale import distributed
from vaescale.evaluation import evaluate, tables  # noqa: F401 (likewise)
from vaescale.lifecycle import stops
from vaescale.lifecycle.checkpoint import verify
from vaescale.lifecycle.writer import Writer
from vaescale.models import kl
from vaescale.monitoring.board import Board
from vaescale.training import trainer, validator
from vaescale.training.descent import Descent
from vaescale.training.ema import WeightEMA
from vaescale.training.engine import Engine


def launch(job: dict[str, Any]) -> None:
    """Run a command as this rank. Reads "command" [script, argument …], "faults", and "every", the seconds between
    exchanges of requests to stop (default 0: after each step, so that the step at which a run stops is known). Writes
    output-R.txt, everything printed, and code-R, the exit code, unless the rank is killed or leaves at once."""
    out, rank = Path(job["out"]), distributed.rank()
    (out / f"pid-{rank}").write_text(str(os.getpid()))
    distributed.barrier()
    with (out / f"output-{rank}.txt").open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    arm(job)
    sys.argv = job["command"]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
        code: Any = 0
    except SystemExit as leave:
        code = leave.code
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    (out / f"code-{rank}").write_text(str(code))


def arm(job: dict[str, Any]) -> None:
    stops.EVERY = job.get("every", 0.0)
    for name, victim, *arguments in job.get("faults", []):
        if victim == distributed.rank():
            FAULTS[name](Path(job["out"]), *arguments)


def before(owner: Any, name: str, part: str, act: Callable[[Path], None]) -> None:
    """Call `act` with the path before each call of owner.name whose first argument, a path or fd, ends with `part`."""
    whole = getattr(owner, name)

    def patched(path: Any, *arguments: Any, **options: Any) -> Any:
        real = Path(f"/proc/self/fd/{path}").readlink() if isinstance(path, int) else Path(path)
        if str(real).endswith(part):
            act(real)
        return whole(path, *arguments, **options)

    setattr(owner, name, patched)


def die(out: Path, point: str, step: int) -> None:
    """SIGKILL all ranks at this point of the save of this step."""

    def kill() -> None:
        pids = [int(path.read_text()) for path in out.glob("pid-*")]
        for pid in sorted(pids, key=lambda pid: pid == os.getpid()):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def halve(path: Path) -> None:
        os.truncate(path, path.stat().st_size // 2)
        kill()

    def begin_to_remove(path: Path) -> None:
        next(path.iterdir()).unlink()
        kill()

    owner, name, part, act = {
        "nothing is written": (Path, "mkdir", f".partial-step-{step:08d}", lambda path: kill()),
        "half a file is written": (os, "fsync", f".partial-step-{step:08d}/ema.safetensors", halve),
        "the manifest is half written": (os, "fsync", f".partial-step-{step:08d}/manifest.json", halve),
        "all is written": (Path, "rename", f".partial-step-{step:08d}", lambda path: kill()),
        "latest has not moved": (Path, "replace", "checkpoints/.latest", lambda path: kill()),
        "the old one is being removed": (shutil, "rmtree", f".gone-step-{step - 4:08d}", begin_to_remove),
    }[point]
    armed = False

    def arm(path: Path) -> None:
        nonlocal armed
        armed = True

    before(owner, name, part, lambda path: act(path) if armed else None)
    before(Path, "mkdir", f".partial-step-{step:08d}", arm)


def fill(out: Path, step: int, disk: str, left: int) -> None:
    """Fill the disk up to `left` bytes when the save of this step begins."""

    def act(path: Path) -> None:
        with (Path(disk) / "ballast").open("wb", buffering=0) as file:
            with suppress(OSError):
                while file.write(bytes(4096)):
                    pass
            file.truncate(file.tell() - left)

    before(Path, "mkdir", f".partial-step-{step:08d}", act)


def free(out: Path, step: int, disk: str) -> None:
    """Free the disk when the save of this step begins, and write the checkpoints and any damage to seen.txt; 0: now."""

    def act(path: Path) -> None:
        there = sorted(path.parent.iterdir())
        damaged = [wrong for one in there if one.name.startswith("step-") for wrong in verify(one)]
        (out / "seen.txt").write_text("\n".join([one.name for one in there] + damaged))
        (Path(disk) / "ballast").unlink()

    if step:
        before(Path, "mkdir", f".partial-step-{step:08d}", act)
    else:
        (Path(disk) / "ballast").unlink()


def spoil(out: Path, step: int) -> None:
    """Set an averaged weight to NaN from this step on, which training itself does not notice."""
    whole = WeightEMA.update

    def update(self: WeightEMA, model: torch.nn.Module, buffers: torch.Tensor, now: int, skipped: torch.Tensor) -> None:
        whole(self, model, buffers, now, skipped)
        if now + 1 == step:
            next(iter(self.model.parameters())).view(-1)[0] = torch.nan

    WeightEMA.update = update


def ask(out: Path, step: int, *names: str) -> None:
    """Send these signals to this rank, all in one step, and again in the save that follows."""
    whole = Descent.step

    def send() -> None:
        for name in names:
            os.kill(os.getpid(), getattr(signal, name))

    def stepped(self: Descent, *arguments: Any) -> Any:
        metrics = whole(self, *arguments)
        if arguments[-1] + 1 == step:
            send()
        return metrics

    Descent.step = stepped
    before(Path, "mkdir", f".partial-step-{step + 1:08d}", lambda path: send())


def insist(out: Path, step: int) -> None:
    """Send ^C to this rank in this step, and again while the step does not return."""

    def act() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(2 * stops.TWICE)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1000)

    _at_step(step, act)


def touch(out: Path, step: int, file: str) -> None:
    """Create the file as a user would with `touch`, so that it is seen after this step."""
    _at_step(step, Path(file).touch)
    stops.LOOK = 0.0


def touch_unseen(out: Path, step: int, file: str) -> None:
    """Create the file as a user would with `touch`, after this process has looked for it for the last time."""

    def act() -> None:
        Path(file).touch()
        stops.LOOK = float("inf")

    _at_step(step, act)


def hang(out: Path, step: int) -> None:
    """Make this rank hang in this step."""
    _at_step(step, lambda: time.sleep(1000))


def stand(out: Path, step: int) -> None:
    """SIGSTOP this rank in this step. Like a launcher, a shell kills it after rank 0 has ended."""
    pids = (out / "pid-0").read_text(), os.getpid()

    def act() -> None:
        subprocess.Popen(["sh", "-c", 'while kill -0 "$0"; do sleep 0.2; done; kill -9 "$1"', *map(str, pids)])
        os.kill(os.getpid(), signal.SIGSTOP)

    _at_step(step, act)


def _at_step(step: int, act: Callable[[], None]) -> None:
    whole = trainer.Trainer.step

    def stepped(self: trainer.Trainer, *arguments: Any) -> Any:
        if self.position.step + 1 == step:
            act()
        return whole(self, *arguments)

    trainer.Trainer.step = stepped  # type: ignore[method-assign]


def fail(out: Path, step: int) -> None:
    """Raise an error that nobody foresaw, in step `step`. The file "failed" is created at that moment."""

    def act() -> None:
        (out / "failed").touch()
        raise RuntimeError("nobody foresaw this")

    _at_step(step, act)


def starve(out: Path, seconds: float, steps: int) -> None:
    """Delay the data of this rank by `seconds` in each of the first steps."""
    whole = trainer.Trainer.batches

    def slowed(self: trainer.Trainer) -> Any:
        for number, batch in enumerate(whole(self)):
            if number < steps:
                time.sleep(seconds)
            yield batch

    trainer.Trainer.batches = slowed


def dawdle(out: Path, seconds: float) -> None:
    """Delay the first validation by `seconds`."""
    whole = validator.evaluate

    def slowed(*arguments: Any, **options: Any) -> Any:
        time.sleep(seconds)
        validator.evaluate = whole
        return whole(*arguments, **options)

    validator.evaluate = slowed


def draw_slowly(out: Path, seconds: float) -> None:
    """Delay the pictures of the first validation by `seconds`."""
    whole = validator.show

    def slowed(*arguments: Any) -> Any:
        time.sleep(seconds)
        validator.show = whole
        return whole(*arguments)

    validator.show = slowed


def report_slowly(out: Path, seconds: float) -> None:
    """Delay the first report by `seconds`, where rank 0 writes its files."""
    whole = Board.scalars

    def slowed(*arguments: Any) -> None:
        time.sleep(seconds)
        Board.scalars = whole
        whole(*arguments)

    Board.scalars = slowed


def interrupt(out: Path, victim: int) -> None:
    """Send SIGTERM to rank `victim` in the first batch of the first validation; batches-R counts those of rank R."""
    measure, count = evaluate._measure, 0

    def measured(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        (out / f"batches-{distributed.rank()}").write_text(str(count - 1))  # the first call measures nothing
        if count == 2 and distributed.rank() == victim:
            os.kill(os.getpid(), signal.SIGTERM)
        return measure(*arguments)

    evaluate._measure = measured


def interrupt_calibration(out: Path, name: str) -> None:
    """Send this signal to this rank in the second batch of the calibration."""
    posterior, count = kl.Spatial.posterior, 0

    def measured(self: kl.Spatial, *arguments: Any) -> Any:
        nonlocal count
        count += 1
        if count == 3:  # the first call is of a blank batch
            os.kill(os.getpid(), getattr(signal, name))
        return posterior(self, *arguments)

    kl.Spatial.posterior = measured


def harm(out: Path, run: str, how: str) -> None:
    """Before this attempt, flip a bit of the newest checkpoint, or empty or remove `latest`."""
    latest = Path(run) / "checkpoints" / "latest"
    if how == "a flipped bit":
        path = max(latest.parent.glob("step-*")) / "optimizer.safetensors"
        place = zlib.crc32(str(out).encode())  # of this attempt: a second flip would undo the first
        flip(path, place % path.stat().st_size, 16)
    elif how == "an empty latest":
        latest.write_bytes(b"")
    else:
        latest.unlink()


def keep(out: Path, run: str) -> None:
    """Copy the run directory as it was before this process to `kept`."""
    shutil.copytree(run, out / "kept")


def block(out: Path, step: int, path: str) -> None:
    """From this step on, put a folder in place of a file. Step 0: from now on."""

    def act() -> None:
        Path(path).unlink(missing_ok=True)
        Path(path).mkdir()

    _at_step(step, act) if step else act()


def rewrite(out: Path, source: str, run: str, changes: dict[str, Any]) -> None:
    """Copy another run, and change or remove (None) entries of its newest state.json, with a matching manifest."""
    shutil.copytree(source, run)
    newest = max((Path(run) / "checkpoints").glob("step-*"))
    state = {**json.loads((newest / "state.json").read_text()), **changes}
    state = {key: value for key, value in state.items() if value is not None}
    forge(newest, "state.json", (json.dumps(state, indent=1) + "\n").encode())


def keep_status(out: Path, run: str) -> None:
    """Copy the run_status.json that the previous attempt left to status.json."""
    with suppress(FileNotFoundError):
        shutil.copy(Path(run) / "run_status.json", out / "status.json")


def between(out: Path, step: int) -> None:
    """Send SIGTERM to this rank between the first two micro-batches of this step."""
    micro_step, due = Engine.micro_step, False

    def arm() -> None:
        nonlocal due
        due = True

    def micro(self: Engine) -> None:
        nonlocal due
        if due:
            due = False
            os.kill(os.getpid(), signal.SIGTERM)
        micro_step(self)

    _at_step(step, arm)
    Engine.micro_step = micro


def kill(out: Path, step: int) -> None:
    """SIGKILL this rank in this step."""
    _at_step(step, lambda: os.kill(os.getpid(), signal.SIGKILL))


def kill_worker(out: Path, step: int) -> None:
    """SIGKILL a worker of this rank's loader in this step."""
    _at_step(step, lambda: psutil.Process().children()[0].kill())


def pester(out: Path, number: int) -> None:
    """Send SIGUSR1 to this rank before the number-th file-system call of its first save; asked.txt counts the calls."""
    whole, count, over = Writer.save, -1, False

    def save(self: Writer, *arguments: Any) -> None:
        nonlocal count, over
        if self._thread:
            self._thread.join()
        over, count = count > 0, max(count, 0)
        whole(self, *arguments)

    def act(path: Path) -> None:
        nonlocal count
        if count < 0 or over or "checkpoints" not in path.parts:
            return
        count += 1
        (out / "asked.txt").write_text(str(count))
        if count == number:
            os.kill(os.getpid(), signal.SIGUSR1)

    Writer.save = save
    for owner, name in ((Path, "mkdir"), (os, "fsync"), (Path, "rename"), (Path, "replace"), (Path, "open")):
        before(owner, name, "", act)


def ends(out: Path, seconds: float) -> None:
    """Let the SLURM job end in `seconds`."""
    os.environ["SLURM_JOB_END_TIME"] = str(round(time.time() + seconds))


def elsewhere(out: Path, folder: str) -> None:
    """Imitate a node on which the same relative path is another folder."""
    os.chdir(folder)


FAULTS: dict[str, Callable[..., None]] = {
    "die": die,
    "fill": fill,
    "free": free,
    "spoil": spoil,
    "ask": ask,
    "insist": insist,
    "touch": touch,
    "touch unseen": touch_unseen,
    "hang": hang,
    "stand": stand,
    "fail": fail,
    "starve": starve,
    "dawdle": dawdle,
    "draw slowly": draw_slowly,
    "report slowly": report_slowly,
    "interrupt": interrupt,
    "interrupt calibration": interrupt_calibration,
    "harm": harm,
    "keep": keep,
    "block": block,
    "rewrite": rewrite,
    "keep status": keep_status,
    "between": between,
    "kill": kill,
    "kill worker": kill_worker,
    "pester": pester,
    "ends": ends,
    "elsewhere": elsewhere,
}
