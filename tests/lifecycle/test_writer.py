"""Checkpoints written in parallel with training, on one process, with a disk that waits for a signal."""

import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from vaescale.lifecycle import checkpoint
from vaescale.lifecycle.checkpoint import CheckpointError
from vaescale.lifecycle.status import Diverged
from vaescale.lifecycle.writer import Writer
from vaescale.monitoring.console import Console


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """It syncs only while this event is set; at first it is not."""
    event, sync = threading.Event(), os.fsync

    def fsync(descriptor: int) -> None:
        assert event.wait(60)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    yield event
    event.set()


def writer(folder: Path, keep: int = 2, keep_every: int = 0) -> Writer:
    return Writer(folder, keep, keep_every, Console(0, 10, loud=True))


def tensors(value: float) -> Callable[[], dict[str, dict[str, torch.Tensor]]]:
    return lambda: {"model": {"w": torch.full((3,), value)}}


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, disk: threading.Event) -> None:
    """`latest` changes once all is written, and the next save waits for that before it copies tensors."""
    writing, state = writer(tmp_path), {"step": 5, "damaged": {"torn": 0}}
    writing.save(5, tensors(5), state, ())
    state["damaged"]["torn"] = 9
    writing.collect(wait=False)
    assert not (tmp_path / "latest").exists()

    copied = []

    def copies() -> dict[str, dict[str, torch.Tensor]]:
        copied.append(10)
        return tensors(10)()

    later = threading.Thread(target=writing.save, args=(10, copies, {"step": 10}, ()))
    later.start()
    later.join(0.2)
    assert later.is_alive()
    assert not copied
    disk.set()
    later.join(60)
    first = tmp_path / "step-00000005"
    assert checkpoint.verify(first) == []
    assert torch.equal(checkpoint.read_tensors(first, "model")["w"], torch.full((3,), 5.0))
    assert checkpoint.read_state(first) == {"step": 5, "damaged": {"torn": 0}}
    writing.collect(wait=True, last=True)
    assert checkpoint.newest(tmp_path) == (tmp_path / "step-00000010", [])


def test_a_save_in_progress_is_finished_after_an_error(tmp_path: Path, disk: threading.Event) -> None:
    writing = writer(tmp_path)
    writing.save(5, tensors(5), {}, ())
    threading.Timer(0.2, disk.set).start()
    writing.close()
    assert checkpoint.newest(tmp_path) == (tmp_path / "step-00000005", [])


def test_two_failures_in_a_row_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A successful save resets the count; the last save of a run must not fail."""
    sync, broken = os.fsync, False

    def fsync(descriptor: int) -> None:
        if broken:
            raise OSError(5, "Input/output error")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    writing = writer(tmp_path)
    for step, broken in ((1, False), (2, True), (3, False), (4, True)):  # noqa: B007 (fsync reads it)
        writing.save(step, tensors(step), {}, ())
        writing.collect(wait=True)
    said = capsys.readouterr().out.splitlines()
    assert [line.partition(" (Input/output error); earlier checkpoints are intact")[0] for line in said] == [
        f"the checkpoint of step {step} could not be written" for step in (2, 4)
    ]
    writing.save(5, tensors(5), {}, ())
    with pytest.raises(
        CheckpointError, match=r"step 5 could not .*, and 2 saves in a row have failed: free disk space in"
    ):
        writing.collect(wait=True)
    assert checkpoint.newest(tmp_path) == (tmp_path / "step-00000003", [])

    writing = writer(tmp_path)
    writing.save(6, tensors(6), {}, ())
    with pytest.raises(CheckpointError, match=r"step 6 could not be written .*, and it was the last one"):
        writing.collect(wait=True, last=True)
    writing.save(7, tensors(7), {}, ())
    writing.close()
    assert "step 7 could not be written (Input/output error)\n" in capsys.readouterr().out


def test_what_is_not_finite_is_refused(tmp_path: Path) -> None:
    writing = writer(tmp_path)
    writing.save(5, tensors(5), {}, ())
    writing.save(10, tensors(float("nan")), {}, ())
    with pytest.raises(
        Diverged, match=r"checkpoint of step 10 is not written, because w of model\.safetensors is not finite"
    ):
        writing.collect(wait=True)
    writing.close()
    assert checkpoint.newest(tmp_path) == (tmp_path / "step-00000005", [])


def test_disk_space_is_checked_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for the kept checkpoints and the one being written; existing checkpoints of the run will be removed."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=30 * 2**30))
    writing = writer(tmp_path / "not" / "yet")
    writing.check_room(10 * 2**30, 100)
    with pytest.raises(
        CheckpointError, match=r"3 checkpoints of 11\.00 GiB \(keep_last=2, one being written\) do not fit"
    ):
        writing.check_room(11 * 2**30, 100)
    writer(tmp_path, keep_every=50).check_room(6 * 2**30, 100)
    with pytest.raises(CheckpointError, match=r"5 checkpoints .* one being written, and those of keep_every=50\)"):
        writer(tmp_path, keep_every=50).check_room(7 * 2**30, 100)
    checkpoint.save(tmp_path, 5, {"model": {"w": torch.zeros(2**20)}}, {}, 2)
    writing = writer(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=8 * 2**20))
    writing.check_room(4 * 2**20, 100)
    with pytest.raises(CheckpointError, match=r"8\.0 MiB are free, and existing checkpoints take 4\.0 MiB"):
        writing.check_room(5 * 2**20, 100)
