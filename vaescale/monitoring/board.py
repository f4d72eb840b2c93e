"""TensorBoard and metrics.jsonl. x is the step; rank 0 writes."""

import errno
import json
import math
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from ..files import atomically, parse_json, read_json
from .pictures import Picture

METRICS = "metrics.jsonl"
ALARMS = "alarms.json"
# TensorBoard orders groups and cards by name, capitals before small letters, and opens the first two groups. So what
# people look for first has a capital there; in metrics.jsonl all names are small.
MAIN = ("train", "val")
CARDS = {True: ("loss", "reconstructions", "samples"), False: ("usage", "perplexity", "decoded")}  # in MAIN, elsewhere
END = b"}\n"  # of a line
LONGEST = 1 << 20  # bytes of a line


class Board:
    """One run's curves. `step` is where the run resumes: what an earlier life wrote beyond it is dropped, so that
    each curve stays one line. A disk that takes nothing any more costs a piece of the curves, not the run."""

    def __init__(self, run: Path, step: int, alarms: Collection[str] = ()) -> None:
        """alarms: the names of those that are on at this step. Raises OSError if its files cannot be made."""
        self._folder = str(run / "tensorboard")
        self._writer: SummaryWriter | None = SummaryWriter(self._folder, purge_step=step + 1)  # None: there is no room
        self._lines = run / METRICS
        partial = self._lines.with_suffix(".partial")
        self._last: dict[str, Any] = {}  # what the last line says
        with partial.open("wb") as file:
            for line, values in read_lines(self._lines):
                if values["step"] <= step:
                    file.write(line)
                    self._last = values
        partial.replace(self._lines)
        self._alarms = read_alarms(run)
        if self._alarms.keys() - alarms:
            self._alarms = {name: said for name, said in self._alarms.items() if name in alarms}
            self._write_alarms()

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Names carry their group: "train/loss". One JSONL line a step: what is said of a step later joins its line."""
        # JSON knows no NaN: what is not finite becomes null.
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}

        def write(writer: SummaryWriter) -> None:
            for name, value in values.items():
                writer.add_scalar(tag(name), value, step)
            writer.flush()

        self._write(write, {"step": step, **finite})

    def picture(self, name: str, picture: Picture, step: int) -> None:
        def write(writer: SummaryWriter) -> None:
            writer.add_image(tag(name), picture, step, dataformats="HWC")
            writer.flush()

        self._write(write)

    def code_counts(self, name: str, counts: Tensor, step: int) -> None:
        """Histogram of how often codes are used, as log10(1 + count): a few loved codes and many rare ones show."""
        logarithms = np.log10(1 + counts.cpu().numpy())
        self._write(lambda writer: writer.add_histogram(tag(name), logarithms, step))

    def text(self, name: str, text: str, step: int) -> None:
        self._write(lambda writer: writer.add_text(name, text, step))

    def compare(self, settings: dict[str, Any], names: Collection[str]) -> None:
        """For TensorBoard's HParams: settings, numbers or words, beside the last values of these scalars."""
        parts = hparams(settings, dict.fromkeys(map(tag, names), 0.0))

        def write(writer: SummaryWriter) -> None:
            for part in parts:
                writer._get_file_writer().add_summary(part)
            writer.flush()

        self._write(write)

    def alarm(self, name: str, sentence: str, on: bool, step: int) -> None:
        """What is said when an alarm goes on or off: under Text, and in alarms.json for as long as it is on."""
        self.text(f"{name}/alarm", sentence, step)
        if on:
            self._alarms[name] = sentence
        else:
            self._alarms.pop(name, None)
        with suppress(OSError):  # a disk that is full; the log has the sentence
            self._write_alarms()

    def close(self) -> None:
        self._write(SummaryWriter.close)

    def _write(self, write: Callable[[SummaryWriter], None], line: dict[str, Any] | None = None) -> None:
        try:
            if line:
                self._add(line)
                if not self._writer and shutil.disk_usage(self._folder).free:
                    self._writer = SummaryWriter(self._folder)
            if self._writer:
                write(self._writer)
        except OSError as error:
            if self._writer:
                print(f"{self._folder} cannot be written ({error.strerror or error}): curves have a gap", flush=True)
            self._writer = None  # its thread has ended, and what follows half a record in a file is not read

    def _write_alarms(self) -> None:
        with atomically(self._lines.with_name(ALARMS)) as partial:
            partial.write_text(json.dumps(self._alarms, indent=1) + "\n")

    def _add(self, line: dict[str, Any]) -> None:
        """All of it or nothing: half a line would spoil the next."""
        joins = self._last.keys() & line.keys() == {"step"} and self._last["step"] == line["step"]
        file = os.open(self._lines, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            begin = os.lseek(file, 0, os.SEEK_END)
            joins = joins and begin > len(END) and os.pread(file, len(END), begin - len(END)) == END
            data = json.dumps(line).encode() + b"\n"
            if joins:
                begin -= len(END)
                rest = json.dumps({name: value for name, value in line.items() if name != "step"})
                data = f", {rest[1:]}\n".encode()
            if os.pwrite(file, data, begin) < len(data):
                os.ftruncate(file, begin)
                os.pwrite(file, END if joins else b"", begin)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(file)
        self._last = {**self._last, **line} if joins else line


def tag(name: str) -> str:
    """What TensorBoard calls it."""
    group, slash, card = name.partition("/")
    main = group in MAIN
    return (
        (group.capitalize() if main else group) + slash + (card.capitalize() if card.startswith(CARDS[main]) else card)
    )


def read_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Each sound line of a metrics.jsonl and its values, numbers or None, the step among them. What a kill or a power
    cut has damaged is passed over. No lines if there is no such file; raises OSError if it cannot be read."""
    if not path.exists():
        return
    if not path.is_file():  # a pipe would be waited for
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    with path.open("rb") as file:
        for line in iter(lambda: file.readline(LONGEST), b""):
            try:
                values = parse_json(line)
            except ValueError:
                continue
            if isinstance(values, dict) and type(step := values.get("step")) is int and step >= 0:
                numbers = {name: value for name, value in values.items() if type(value) in (int, float, NoneType)}
                yield line.rstrip() + b"\n", numbers


def read_alarms(run: Path) -> dict[str, str]:
    """The sentences of the alarms that are on, by name; what cannot be read is left out."""
    with suppress(OSError, ValueError):
        found = read_json(run / ALARMS)
        if isinstance(found, dict):
            return {name: said for name, said in found.items() if isinstance(said, str)}
    return {}


def validated(run: Path, step: int) -> bool:
    """Whether metrics.jsonl has a validation of this step."""
    with suppress(OSError):
        return any(
            values["step"] == step and any(name.startswith("val/") for name in values)
            for _, values in read_lines(run / METRICS)
        )
    return False


def add_pictures(run: Path, pictures: dict[str, Picture], step: int) -> None:
    """Beside a run's curves, as a run "samples" of its own: a training that goes on meanwhile is left alone."""
    with SummaryWriter(str(run / "tensorboard" / "samples")) as writer:
        for name, picture in pictures.items():
            writer.add_image(name, picture, step, dataformats="HWC")
