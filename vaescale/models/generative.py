"""A codec made generative by a prior over its codes.

    encode: image → codec → codes          decode: codes, drawn from the prior where they are left out → codec → image

With the codes c(x) of an image, −log p(x) ≤ −log p(x|c(x)) − log p(c(x)): the distortion of the codec and the rate of
the prior (van den Oord et al. 2017, section 3.2).
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

from ..interfaces import (
    Batch,
    Bound,
    Calibrated,
    Codebooks,
    Codec,
    Condition,
    Known,
    PixelLikelihood,
    Prior,
    Sampling,
    Usage,
    calibrated,
)


class Generative(nn.Module):
    """The codec of a prior, with samples from the prior. It is a Codec with Codebooks."""

    def __init__(self, prior: Prior, sampling: Sampling) -> None:
        super().__init__()
        self.model = cast(nn.Module, prior)
        self.sampling = sampling

    @property
    def prior(self) -> Prior:
        return cast(Prior, self.model)

    @property
    def codec(self) -> Codec:
        return self.prior.codec

    def encode(self, batch: Batch, temperature: float = 0.0) -> list[Tensor]:
        """Returns codes int64 [B, h, w], one tensor per codebook."""
        return self.codec.encode(batch, temperature)

    def decode(
        self,
        latents: list[Tensor],
        condition: Condition | None = None,
        temperature: float = 1.0,
        draw: bool = False,
        sample: Tensor | None = None,
    ) -> Tensor:
        """Decodes codes to images; those of codebooks that are left out, the finer ones or all, are drawn from the
        prior. Raises ValueError if they are, but there is no condition."""
        codebooks = len(self.usage(clear=False))
        if len(latents) < codebooks:
            if condition is None:
                raise ValueError("decode needs the codes of all codebooks, or a condition to draw them under")
            if sample is None:
                sample = torch.randint(2**62, condition.label.shape, device=condition.label.device)
            known = _known(latents, codebooks) if latents else None
            latents = list(self.prior.draw(condition, sample, temperature, self.sampling, known).unbind(1))
        return self.codec.decode(latents, condition, temperature, draw)

    def usage(self, clear: bool) -> dict[str, Usage]:
        return cast(Codebooks, self.codec).usage(clear)

    def quantizers(self) -> dict[str, Any]:
        return cast(Codebooks, self.codec).quantizers()


class GenerativeWithBound(Generative):
    """The same, with a codec that has a likelihood."""

    def bound(self, batch: Batch, draw: int = 0) -> Bound:
        """Returns distortion and rate of each codebook. With random or masked order, the rate of draw `draw` is an
        unbiased estimate."""
        latents = self.codec.encode(batch)
        rates = self.prior.rates(torch.stack(latents, dim=1), batch.condition, batch.sample, draw)
        rate = rates.sum((2, 3)).T
        given = cast(PixelLikelihood, self.codec).bound_given(batch, latents)
        return Bound(given.distortion, rate, -rate.sum(0))


def generative(prior: Prior, sampling: Sampling = Sampling()) -> Generative:
    """Returns the prior's codec with samples from the prior, and with a bound if the codec has a likelihood that is
    calibrated."""
    codec = prior.codec
    known = isinstance(codec, PixelLikelihood) and isinstance(codec, Calibrated) and calibrated(codec)
    return (GenerativeWithBound if known else Generative)(prior, sampling)


def _known(latents: list[Tensor], codebooks: int) -> Known:
    """The codes of the coarse codebooks as those that are given."""
    codes = torch.stack(latents, dim=1)
    images, given, *size = codes.shape
    missing = codes.new_zeros(images, codebooks - given, *size)
    where = torch.arange(codebooks, device=codes.device)[:, None, None] < given
    return Known(torch.cat([codes, missing], dim=1), where.expand(codebooks, *size))
