"""What a metric is. How to add one: README.md, one folder up."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from ...interfaces import Batch, Codec, Tensors


class Seen(NamedTuple):
    """Some validation images and what a codec makes of them."""

    codec: Codec
    batch: Batch
    reconstruction: Tensor  # uint8 [B, C, H, W]
    latents: list[Tensor]  # what `encode` gives
    draws: int  # latents to be drawn for each image, where any are


class Number(NamedTuple):
    """How people are shown a number."""

    words: str  # in the listing of one run; {draws} is the number of latents drawn for each image
    form: str  # its format in the comparison and in the log
    column: str = ""  # its heading in the comparison and its name in the log; "": it is in neither
    logged: bool = True  # whether a validation's line in the log has it
    absent: str = ""  # what is said where its metric has given other numbers, but not this one


def means(sums: Tensors, images: int) -> dict[str, float]:
    return {name: float(total / images) for name, total in sums.items()}


@dataclass(frozen=True)
class Metric:
    """Numbers of a codec over a validation set: sums over images, and what follows from them."""

    # All that `result` may give, in the order in which people read them. Those of one level or codebook among several
    # are called name/levelN or codebookN/name, and have the words of `name`.
    numbers: Mapping[str, Number]
    protocol: Mapping[str, str]  # how they are measured, for evaluation.json
    # What some images add, by name: of any shape, but of the same names and shapes for all images of a run. It is added
    # up in fp64 over batches and ranks. {}: the metric is not for such a codec, or such images.
    sums: Callable[[Seen], Tensors]
    result: Callable[[Tensors, int], dict[str, float]] = (
        means  # (what was added up, number of images); not called for {}
    )
