"""How loader workers send batches if shared memory is small, and how workers end."""

import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from tests.conftest import ROOT
from tests.data.test_stream import config
from vaescale.data import DataError, stream, workers

STEPS, SIZE, BATCH = 8, 64, 30  # 360 KiB a batch


def batches(root: Path, **changes: object) -> Any:
    slices = stream.TrainSlices(config(root, size=SIZE, **changes), seed=7)
    return stream.train_loader(slices, 0, BATCH, 1, 0, 1, pin=False)


def take(root: Path, **changes: object) -> list[stream.Batch]:
    return [one.batch for one in islice(batches(root, **changes), STEPS)]


def same(a: list[stream.Batch], b: list[stream.Batch]) -> bool:
    """Equal in bits and in memory layout, on which the choice of a convolution algorithm depends."""
    return len(a) == len(b) and all(
        torch.equal(one, two) and one.stride() == two.stride() and one.dtype == two.dtype
        for x, y in zip(a, b, strict=True)
        for one, two in zip(x, y, strict=True)
    )


def test_the_bits_are_the_same_without_shared_memory(
    pictures: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Shared memory fills up during a run: the error is raised as torch raises it."""
    whole, count = torch.Tensor.share_memory_, 0

    def share(self: torch.Tensor) -> torch.Tensor:
        nonlocal count
        count += 1
        if count > 6:
            raise RuntimeError(
                "unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)"
            )
        return whole(self)

    monkeypatch.setattr(torch.Tensor, "share_memory_", share)
    assert same(take(pictures, workers=2), take(pictures))
    said = "shared memory is not available (No space left on device (28)): batches go through pipes, which is slower"
    assert capfd.readouterr().out.count(said) == 2  # once a worker


SMALL = """
import os, sys
from itertools import islice
from pathlib import Path
from tests.data.test_workers import STEPS, batches, same, take
root = Path(sys.argv[1])
found = []
loader = batches(root, workers=2, prefetch=2)
for number, one in enumerate(islice(loader, STEPS)):
    found.append(one.batch)
    if number == 2:
        with open("/dev/shm/ballast", "wb", buffering=0) as file:
            try:
                while file.write(bytes(4096)):
                    pass
            except OSError:
                pass
assert same(found, take(root, workers=2))  # no room for a semaphore
assert same(found, take(root))
print("all the same")
"""


def test_shared_memory_that_is_too_small_or_fills_up(pictures: Path) -> None:
    """Shared memory that is really small, as in a container."""
    if not shutil.which("unshare") or subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("mounts cannot be made here")
    mount = 'mount -t tmpfs none /dev/shm -o size=12m && exec "$0" -c "$1" "$2"'
    found = subprocess.run(
        ["unshare", "-m", "bash", "-c", mount, sys.executable, SMALL, str(pictures)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert found.returncode == 0, found.stderr
    assert "all the same" in found.stdout
    assert "batches go through pipes, which is slower" in found.stdout
    assert (
        "loader workers cannot be started (No space left on device): this process decodes instead, which is slower"
        in found.stdout
    )


def test_a_batch_that_cannot_be_sent_is_an_error(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It fails in a thread of the worker, which torch does not notice."""
    slices = stream.TrainSlices(config(pictures, workers=1), seed=7)
    damage = stream.Damage(0, "", "", lambda: 0)  # type: ignore[arg-type]  # no function can be pickled
    monkeypatch.setattr(slices, "_one", lambda g, sample: (*real(g, sample)[:3], [damage]))
    real = stream.TrainSlices._one.__get__(slices)
    with pytest.raises(DataError, match=r"DataLoader worker \(pid"):
        next(stream.train_loader(slices, 0, 12, 1, 0, 1, pin=False))


def test_stopped_workers_end(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "DYING", 0.5)
    loader = batches(pictures, workers=2)
    before = set(psutil.Process().children())
    next(loader)
    begun = [child for child in psutil.Process().children() if child not in before]
    assert len(begun) == 2
    begun[0].send_signal(signal.SIGSTOP)
    loader.close()
    assert psutil.wait_procs(begun, timeout=30)[1] == []


def test_workers_ignore_signals_meant_for_their_rank(pictures: Path) -> None:
    loader = batches(pictures, workers=2)
    before = set(psutil.Process().children())
    begun = [next(loader).batch for _ in range(2)]  # one of each worker: both ignore signals by now
    for child in set(psutil.Process().children()) - before:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            child.send_signal(number)
    assert same([*begun, *(one.batch for one in islice(loader, STEPS - 2))], take(pictures))


def test_a_thread_may_load(pictures: Path) -> None:
    """Only the main thread may set signal handlers."""
    with ThreadPoolExecutor(1) as pool:
        assert same(pool.submit(take, pictures, workers=1).result(), take(pictures))


HANDLER = """
import signal, sys
from tests.data.test_workers import batches
loader = batches(sys.argv[1], workers=1)
next(loader)
print(int(signal.getsignal(signal.SIGCHLD)))
"""


def test_torch_leaves_no_handler_behind(pictures: Path) -> None:
    """With its own a worker's death would raise in the midst of whatever the process is at. In a new process, since
    torch sets the handler only once."""
    command = [sys.executable, "-c", HANDLER, str(pictures)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["0"], done.stderr  # SIG_DFL


AT_EXIT = """
import sys, threading
from tests.data.test_workers import batches
loader = batches(sys.argv[1], workers=1)
next(loader)
def refuse(thread):
    raise RuntimeError("can't create new thread at interpreter shutdown")
threading.Thread.start = refuse
"""


def test_a_process_ends_with_its_workers_where_threads_cannot_be_started_any_more(pictures: Path) -> None:
    """As at exit from Python 3.12 on."""
    command = [sys.executable, "-c", AT_EXIT, str(pictures)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
