"""What turns the bytes of a sample into what a model reads.

Order, resume, damage, cache and workers know nothing of it: they hand over bytes, and take back what is to be stacked.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from . import decode


class Reader(Protocol):
    def require(self) -> None:
        """Raises DataError if something that training needs is not installed."""
        ...

    def training(self, data: bytes, seed: int, g: int) -> Any:
        """A sample as training reads it; what is drawn is drawn from (seed, g). Raises Damaged."""
        ...

    def validation(self, data: bytes) -> Any:
        """A sample as validation reads it, always the same. Raises Damaged."""
        ...

    def stack(self, samples: list[Any]) -> Tensor:
        """Samples of one batch → [B, …], as Batch.x has them."""
        ...

    def blank(self, count: int) -> Tensor:
        """So many samples that show nothing: what `stack` gives, in shape and type."""
        ...


@dataclass(frozen=True)
class Pictures:
    """JPEG, PNG and WEBP → uint8 [B, C, size, size]. The fields are those of stream.Config, and say what they mean."""

    size: int
    channels: int
    least_area: float
    flip: bool
    augment: bool
    decoder: decode.Decoder
    most_megapixels: int

    def require(self) -> None:
        decode.require(self.decoder)

    def training(self, data: bytes, seed: int, g: int) -> decode.Pixels:
        if not self.augment:
            return self.validation(data)
        return decode.train_image(
            data, self.size, self.least_area, self.flip, seed, g, self.decoder, self.most_megapixels
        )

    def validation(self, data: bytes) -> decode.Pixels:
        return decode.validation_image(data, self.size, self.most_megapixels)

    def stack(self, samples: list[decode.Pixels]) -> Tensor:
        pictures = samples if self.channels == 3 else [decode.grey(picture) for picture in samples]
        # [B, H, W, C] seen as [B, C, H, W]: the very bytes of channels_last, which convolutions like best.
        return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)

    def blank(self, count: int) -> Tensor:
        return torch.zeros(count, self.channels, self.size, self.size, dtype=torch.uint8)
