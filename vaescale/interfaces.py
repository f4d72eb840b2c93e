"""The nouns of the project, and nothing else.

Images are uint8 [B, C, H, W], C = 3 or 1, until they are on the device, and float in [0, 1] inside `decode` and
`Output`. Information is in nats; only what is shown to people is in bits.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn


class Shape(NamedTuple):
    """What a model is given; known before any data are read."""

    channels: int = 3  # C
    size: int = 128  # H = W
    attributes: int = 0  # A


class Condition(NamedTuple):
    """What images are said to show."""

    label: Tensor  # int64 [B]; −1: not said
    attributes: Tensor  # fp32 [B, A], standardised over the training set; NaN: not said


class Batch(NamedTuple):
    x: Tensor  # what the Reader gives; of pictures uint8 [B, C, H, W]
    label: Tensor  # int64 [B]
    attributes: Tensor  # fp32 [B, A]
    sample: Tensor  # int64 [B]: training: the place g in the endless sequence; validation: the place in the index

    @property
    def condition(self) -> Condition:
        return Condition(self.label, self.attributes)

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in self))


class Output(NamedTuple):
    loss: Tensor  # scalar, fp32
    metrics: dict[str, Tensor]  # scalars, detached, means over the batch; "group/name", a bare name being of "train"
    reconstruction: Tensor | None  # [B, C, H, W], in [0, 1] up to over-shoot


class Bound(NamedTuple):
    """What one draw z ~ q(z|x) says of log p(x), the probability of the 8-bit image, in nats.

    ELBO = −distortion − Σ rate. log p(x|z) + log p(z) − log q(z|x) = −distortion + log_ratio is a log-weight of the
    importance-weighted bound.
    """

    distortion: Tensor  # fp32 [B]: −log p(x|z)
    rate: Tensor  # fp32 [L, B]: KL(q‖p) of each level, coarse to fine, in closed form where there is one
    log_ratio: Tensor  # fp32 [B]: log p(z) − log q(z|x) of the draw, over all levels


T = TypeVar("T")
Tensors = dict[str, Tensor]


def by_level(name: str, values: Sequence[T]) -> dict[str, T]:
    """How a number of each level is called, coarse to fine; sorted, the names stand as the levels do."""
    width = len(str(len(values) - 1))
    return {f"{name}/level{number:0{width}}": value for number, value in enumerate(values)}


class Quantized(NamedTuple):
    z: Tensor  # [..., D] what the decoder reads; the gradient passes straight through to the encoder
    codes: Tensor  # int64 [...]
    loss: Tensor  # scalar: what the codebook and the commitment add to the loss
    commitment: Tensor  # fp32 [L], detached: mean squared distance between what each codebook is given and its code


class Usage(NamedTuple):
    """What a codebook has been used for; equal on all ranks, since every count is summed over them."""

    window: Tensor  # int64 [K] uses since the last report
    ever: Tensor  # bool [K]
    age: Tensor  # int64 [K] steps since the last use or reset
    average: Tensor  # fp32 [K] uses a step, exponentially averaged over about 100 steps, from zero
    resets: Tensor  # int64 [] dead codes replaced since the last report
    steps: Tensor  # int64 [] since the last report


@runtime_checkable
class Codec(Protocol):
    """Images to latents and back. Evaluation needs no more than this."""

    def encode(self, batch: Batch, temperature: float = 0.0) -> list[Tensor]:
        """Latents, coarse to fine; int64 codes where they are discrete. Where they have a distribution q(z|x): its
        mean, and around it a draw whose standard deviation is multiplied by `temperature`."""
        ...

    def decode(
        self, latents: list[Tensor], condition: Condition | None = None, temperature: float = 1.0, draw: bool = False
    ) -> Tensor:
        """Images in [0, 1] up to over-shoot, float [B, C, H, W]: the mean of p(x|z), or with `draw` a draw from it.

        Latents not given are drawn from the prior, with standard deviations multiplied by `temperature`; their number B
        is then that of the condition. Raises ValueError where there is no prior to draw them from.
        """
        ...


@runtime_checkable
class Bounded(Protocol):
    """A codec that knows how probable images are."""

    def bound(self, batch: Batch, draw: int = 0) -> Bound:
        """Of the draw of this number for each image: the number and `batch.sample` decide its noise, whatever else is
        in the batch."""
        ...


@runtime_checkable
class Codebooks(Protocol):
    """A codec whose latents are codes: level i of `encode` holds codes of codebook i."""

    def usage(self, clear: bool) -> dict[str, Usage]:
        """Per codebook by name, coarse to fine; `clear` begins a new window."""
        ...

    def quantizers(self) -> dict[str, Any]:
        """The settings of the quantiser that each codebook belongs to, by the same names."""
        ...


@runtime_checkable
class Basis(Protocol):
    """A codec with a linear decoder."""

    def basis(self) -> Tensor:
        """The mean image and the first directions, as deviations from 0.5 of at most 0.5; fp32 [K, C, H, W] in
        [0, 1]."""
        ...


class Model(nn.Module, ABC):
    """What is trained: a torch module that knows its own loss. What else it can do it says by having the methods of
    Codec, Bounded, Codebooks or Basis; whoever needs one of these asks for it, never for a class."""

    @abstractmethod
    def forward(self, batch: Batch, step: int) -> Output: ...

    def update(self, step: int, lr: float) -> None:
        """Called once after each optimiser step, on all ranks: learn what is not learned by the optimiser."""
