"""The interfaces of metrics. README.md, one folder up, explains how to add one."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from ...interfaces import Batch, Codec, Tensors
from ...nn.perceptual import Distance
from ..feature_statistics import Statistics


class Seen(NamedTuple):
    """Some validation images and the codec's results for them."""

    codec: Codec
    batch: Batch
    reconstruction: Tensor  # uint8 [B, C, H, W]
    latents: list[Tensor]  # from `encode`
    draws: int  # latents per image, for metrics that draw any
    distance: Distance | None = None  # the perceptual distance to measure


class Number(NamedTuple):
    """How a number is displayed."""

    words: str  # in the listing of one run; {draws} is the number of latents drawn per image
    form: str  # format in the comparison and in the log
    column: str = ""  # heading in the comparison and name in the log; "": in neither
    logged: bool = True  # whether a validation's log line includes it
    absent: str = ""  # explanation if the metric gave other numbers, but not this one


def means(sums: Tensors, images: int) -> dict[str, float]:
    return {name: float(total / images) for name, total in sums.items()}


@dataclass(frozen=True)
class Metric:
    """Numbers of a codec over a validation set, computed from sums over images."""

    # All numbers that `result` may return, in reading order. Those of one level or codebook among several are named
    # name/levelN or codebookN/name and use the words of `name`.
    numbers: Mapping[str, Number]
    protocol: Mapping[str, str]  # how they are measured, for evaluation.json
    # The sums over some images, by name, with the same names and shapes for all images of a run. They are added in fp64
    # over batches and ranks. {}: the metric does not apply to this codec or these images.
    sums: Callable[[Seen], Tensors]
    result: Callable[[Tensors, int], dict[str, float]] = means  # (sums, number of images); not called for {}


@dataclass(frozen=True)
class Comparison:
    """Numbers of a set of images next to reference images, computed from the features of both. They are measured of
    reconstructions ("r" before the name) and of generated images ("g"), with any network's features."""

    numbers: Mapping[str, Number]  # all numbers that `result` returns, in reading order
    protocol: Mapping[str, str]  # how they are measured, for evaluation.json
    result: Callable[[Statistics, Statistics], dict[str, float]]  # (of the reference, of the images)
    least: int = 1  # images needed on each side
    rows: bool = True  # whether it needs rows of features on both sides, and not only moments
    classes: bool = False  # whether it needs the logits of the images
