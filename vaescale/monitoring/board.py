"""TensorBoard and metrics.jsonl, written by rank 0. The x axis is the step."""

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
# TensorBoard sorts groups and cards by name, capitals before lower case, and opens the first two groups. So the most
# important names are capitalised there. In metrics.jsonl all names are lower case.
MAIN = ("train", "val")
CARDS = {True: ("loss", "reconstructions", "samples"), False: ("usage", "perplexity", "decoded")}  # in MAIN, elsewhere
END = b"}\n"  # of a line
LONGEST = 1 << 20  # bytes per line


class Board:
    """The curves of one run. `step` is where the run resumes: values that an earlier attempt wrote beyond it are
    dropped, so that each curve stays one line. If the disk is full, the curves get a gap and the run continues."""

    def __init__(self, run: Path, step: int, alarms: Collection[str] = ()) -> None:
        """alarms: names of the alarms that are on at this step. Raises OSError if the files cannot be created."""
        self._folder = str(run / "tensorboard")
        self._writer: SummaryWriter | None = SummaryWriter(self._folder, purge_step=step + 1)  # None: the disk is full
        self._lines = run / METRICS
        self._last: dict[str, Any] = {}  # values of the last line
        with atomically(self._lines) as partial, partial.open("wb") as file:
            for line, values in read_lines(self._lines):
                if values["step"] <= step:
                    file.write(line)
                    self._last = values
        self._alarms = read_alarms(run)
        if self._alarms.keys() - alarms:
            self._alarms = {name: said for name, said in self._alarms.items() if name in alarms}
            self._write_alarms()

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Writes values by name; a name includes its group, as in "train/loss". metrics.jsonl has one line per step;
        later values of the last step are added to its line."""
        # JSON has no NaN: values that are not finite become null.
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
        """Writes a histogram of log10(1 + count) of the codes, in which both the few frequent and the many rare codes
        are visible."""
        logarithms = np.log10(1 + counts.cpu().numpy())
        self._write(lambda writer: writer.add_histogram(tag(name), logarithms, step))

    def text(self, name: str, text: str, step: int) -> None:
        self._write(lambda writer: writer.add_text(name, text, step))

    def compare(self, settings: dict[str, Any], names: Collection[str]) -> None:
        """Writes TensorBoard's HParams: the settings (numbers or words) next to the last values of these scalars."""
        parts = hparams(settings, dict.fromkeys(map(tag, names), 0.0))

        def write(writer: SummaryWriter) -> None:
            for part in parts:
                writer._get_file_writer().add_summary(part)
            writer.flush()

        self._write(write)

    def alarm(self, name: str, sentence: str, on: bool, step: int) -> None:
        """Writes the sentence of an alarm that goes on or off under Text, and keeps it in alarms.json while on."""
        self.text(f"{name}/alarm", sentence, step)
        if on:
            self._alarms[name] = sentence
        else:
            self._alarms.pop(name, None)
        with suppress(OSError):  # the disk is full; the log has the sentence
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
                print(
                    f"{self._folder} cannot be written ({error.strerror or error}): the curves will have a gap",
                    flush=True,
                )
            self._writer = None  # its thread has ended, and records after a partial one would not be read

    def _write_alarms(self) -> None:
        with atomically(self._lines.with_name(ALARMS)) as partial:
            partial.write_text(json.dumps(self._alarms, indent=1) + "\n")

    def _add(self, line: dict[str, Any]) -> None:
        """Writes the whole line or nothing, because a partial line would corrupt the next one. Values of the same step
        join the last line."""
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
    """Returns the name of a scalar or picture in TensorBoard."""
    group, slash, card = name.partition("/")
    main = group in MAIN
    return (
        (group.capitalize() if main else group) + slash + (card.capitalize() if card.startswith(CARDS[main]) else card)
    )


def read_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yields each valid line of a metrics.jsonl with its values, numbers or None, including the step. Lines damaged by
    a kill or a power cut are skipped. A missing file has no lines. Raises OSError if the file cannot be read."""
    if not path.exists():
        return
    if not path.is_file():  # opening a pipe would block
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
    """Returns the sentences of the alarms that are on, by name. Unreadable ones are left out."""
    with suppress(OSError, ValueError):
        found = read_json(run / ALARMS)
        if isinstance(found, dict):
            return {name: said for name, said in found.items() if isinstance(said, str)}
    return {}


def validated(run: Path, step: int) -> bool:
    """Returns whether metrics.jsonl has a validation of this step."""
    with suppress(OSError):
        return any(
            values["step"] == step and any(name.startswith("val/") for name in values)
            for _, values in read_lines(run / METRICS)
        )
    return False


def add_pictures(run: Path, pictures: dict[str, Picture], step: int) -> None:
    """Adds pictures to a run's board as a separate TensorBoard run "samples", which does not disturb a training that is
    still running."""
    with SummaryWriter(str(run / "tensorboard" / "samples")) as writer:
        for name, picture in pictures.items():
            writer.add_image(name, picture, step, dataformats="HWC")
