"""Readers turn the bytes of a sample into the input of a model.

Order, resuming, damage, cache and workers do not depend on the reader: they pass it bytes, and then the results to
stack.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from . import decode


class Reader(Protocol):
    def require(self) -> None:
        """Raises DataError if a package that training needs is not installed."""
        ...

    def training(self, data: bytes, seed: int, g: int) -> Any:
        """Decodes a sample for training. Random draws are functions of (seed, g). Raises Damaged."""
        ...

    def validation(self, data: bytes) -> Any:
        """Decodes a sample for validation, deterministically. Raises Damaged."""
        ...

    def stack(self, samples: list[Any]) -> Tensor:
        """Stacks the decoded samples of one batch → [B, …], as in Batch.x."""
        ...

    def blank(self, count: int) -> Tensor:
        """Returns `count` empty samples, with the shape and type that `stack` returns."""
        ...


@dataclass(frozen=True)
class Pictures:
    """JPEG, PNG and WEBP → uint8 [B, C, size, size]. The fields are those of stream.Config, which explains them."""

    size: int
    channels: int
    min_crop_area: float
    flip: bool
    augment: bool
    decoder: decode.Decoder
    max_megapixels: int

    def require(self) -> None:
        decode.require(self.decoder)

    def training(self, data: bytes, seed: int, g: int) -> decode.Pixels:
        if not self.augment:
            return self.validation(data)
        return decode.train_image(
            data, self.size, self.min_crop_area, self.flip, seed, g, self.decoder, self.max_megapixels
        )

    def validation(self, data: bytes) -> decode.Pixels:
        return decode.validation_image(data, self.size, self.max_megapixels)

    def stack(self, samples: list[decode.Pixels]) -> Tensor:
        pictures = samples if self.channels == 3 else [decode.grey(picture) for picture in samples]
        # A view of [B, H, W, C] as [B, C, H, W] has the memory layout channels_last, which convolutions prefer.
        return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)

    def blank(self, count: int) -> Tensor:
        return torch.zeros(count, self.channels, self.size, self.size, dtype=torch.uint8)
