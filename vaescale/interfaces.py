"""The nouns of the project, and nothing else.

Images are uint8 [B, 3, H, W] until they are on the device, and float in [0, 1] inside `decode` and `Output`.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple, Protocol

from torch import Tensor, nn


class Batch(NamedTuple):
    x: Tensor  # uint8 [B, 3, H, W]
    label: Tensor  # int64 [B]
    sample: Tensor  # int64 [B]: training: the place g in the endless sequence; validation: the place in the index


class Output(NamedTuple):
    loss: Tensor  # scalar, fp32
    metrics: dict[str, Tensor]  # scalars, detached, means over the batch; "group/name", a bare name being of "train"
    reconstruction: Tensor | None  # [B, 3, H, W], in [0, 1] up to over-shoot


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


class Codec(Protocol):
    def encode(self, batch: Batch) -> list[Tensor]:
        """Latents, coarse to fine; int64 codes where they are discrete."""
        ...

    def decode(self, latents: list[Tensor], label: Tensor | None = None, temperature: float = 1.0) -> Tensor:
        """Images in [0, 1] up to over-shoot, float [B, 3, H, W]."""
        ...


class Model(nn.Module, ABC):
    """What is trained: a Codec that is a torch module and knows its own loss."""

    @abstractmethod
    def forward(self, batch: Batch, step: int) -> Output: ...

    @abstractmethod
    def encode(self, batch: Batch) -> list[Tensor]: ...

    @abstractmethod
    def decode(self, latents: list[Tensor], label: Tensor | None = None, temperature: float = 1.0) -> Tensor: ...

    def update(self, step: int, lr: float) -> None:
        """Called once after each optimiser step, on all ranks: learn what is not learned by the optimiser."""

    def usage(self, clear: bool) -> dict[str, Usage]:
        """Per codebook by name, coarse to fine; `clear` begins a new window."""
        del clear
        return {}
