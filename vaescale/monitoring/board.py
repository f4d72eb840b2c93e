"""TensorBoard and metrics.jsonl. x is the step; rank 0 writes."""

import json
import math
from pathlib import Path

import numpy as np
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from .pictures import Picture


class Board:
    """One run's curves. `step` is where the run resumes: what an earlier life wrote beyond it is dropped, so that
    each curve stays one line."""

    def __init__(self, run: Path, step: int) -> None:
        self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)
        self._lines = run / "metrics.jsonl"
        kept = self._lines.read_text().splitlines() if self._lines.exists() else []
        kept = [line for line in kept if line.endswith("}") and json.loads(line)["step"] <= step]
        partial = self._lines.with_suffix(".partial")
        partial.write_text("".join(line + "\n" for line in kept))
        partial.replace(self._lines)

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Names carry their group: "train/loss". One JSONL line a call."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        # JSON knows no NaN: what is not finite becomes null.
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        with self._lines.open("a") as file:
            file.write(json.dumps({"step": step, **finite}) + "\n")
        self._writer.flush()

    def picture(self, name: str, picture: Picture, step: int) -> None:
        self._writer.add_image(name, picture, step, dataformats="HWC")
        self._writer.flush()

    def code_counts(self, name: str, counts: Tensor, step: int) -> None:
        """Histogram of how often codes are used, as log10(1 + count): a few loved codes and many rare ones show."""
        self._writer.add_histogram(name, np.log10(1 + counts.cpu().numpy()), step)

    def text(self, name: str, text: str, step: int) -> None:
        self._writer.add_text(name, text, step)

    def close(self) -> None:
        self._writer.close()


def add_pictures(run: Path, pictures: dict[str, Picture], step: int) -> None:
    """Beside a run's curves, as a run "samples" of its own: a training that goes on meanwhile is left alone."""
    with SummaryWriter(str(run / "tensorboard" / "samples")) as writer:
        for name, picture in pictures.items():
            writer.add_image(name, picture, step, dataformats="HWC")
