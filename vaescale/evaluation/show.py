"""The pictures of a validation. To add one, write its function and add it to PICTURES with the protocol it needs."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..interfaces import Basis, Batch, Bounded, Codebooks, Codec, Diffused, Prior
from ..models.generative import generative
from ..monitoring import code_statistics, pictures
from ..monitoring.pictures import Picture
from . import drawing, sample
from .evaluate import reconstruct
from .metrics.reconstruction import psnr

Pictures = Iterator[tuple[str, Picture]]  # (name on the board, picture), one at a time


@torch.no_grad()
def show(codec: Codec, shown: Batch) -> Pictures:
    """Yields all pictures that this codec supports. shown: the fixed images, on the device."""
    y, latents = reconstruct(codec, shown)
    yield "val/reconstructions", reconstructions(shown.x, y)
    for capability, draw in PICTURES:
        if isinstance(codec, capability):
            yield from draw(codec, shown, latents)


def reconstructions(x: Tensor, y: Tensor) -> Picture:
    """Draws reconstructions with the PSNR of each image. Both uint8 [B, C, H, W]."""
    return pictures.reconstructions(x, y, _decibels(x, y))


def side_by_side(x: Tensor, ys: dict[str, Tensor]) -> Picture:
    """Draws several models' reconstructions, by the models' names, with the PSNR of each image. All uint8
    [B, C, H, W]."""
    return pictures.compared(x, ys, {name: _decibels(x, y) for name, y in ys.items()})


def _decibels(x: Tensor, y: Tensor) -> list[str]:
    return [f"{value:.1f} dB" for value in psnr(x, y).tolist()]


def samples(codec: Codec, shown: Batch, latents: list[Tensor]) -> Pictures:
    del latents
    with suppress(drawing.Unsupported):
        yield "val/samples", sample.at_temperatures(codec, shown.condition)


def guided_samples(codec: Any, shown: Batch, latents: list[Tensor]) -> Pictures:
    del latents
    if (found := sample.guided(codec.with_sampling, shown.condition)) is not None:
        yield "val/guided_samples", found


def progressive(codec: Codec, shown: Batch, latents: list[Tensor]) -> Pictures:
    if len(latents) > 1:
        yield "val/progressive", sample.progressive(codec, shown)


def codebooks(codec: Any, shown: Batch, latents: list[Tensor]) -> Pictures:
    averages = {name: usage.average for name, usage in codec.usage(clear=False).items()}
    decoded = code_statistics.decoded(codec, list(averages.values()), [level.shape[1:] for level in latents])
    for (name, average), level, (codes, tiles) in zip(averages.items(), latents, decoded, strict=True):
        yield f"{name}/map", pictures.code_map(shown.x, level, len(average))
        yield f"{name}/decoded", pictures.codebook(tiles, codes, code_statistics.in_use(average))


@torch.no_grad()
def of_prior(prior: Prior, shown: Batch, maps: dict[str, Tensor]) -> Pictures:
    """Yields samples of a prior, and the bits of each place, fp64 [L, h, w], of "validation" and "training" images and
    the difference."""
    yield "val/samples", sample.at_temperatures(generative(prior), shown.condition)
    if (guided := sample.guided(partial(generative, prior), shown.condition)) is not None:
        yield "val/guided_samples", guided
    yield "val/code_bits", pictures.heat_maps(maps, "validation - training", "bits of the code at each place")


def basis(codec: Any, shown: Batch, latents: list[Tensor]) -> Pictures:
    del shown, latents
    tiles = codec.basis()
    captions = ["mean", *map(str, range(1, len(tiles)))]
    yield "val/basis", pictures.grid(pictures.to_bytes(tiles), len(tiles), captions)


PICTURES: list[tuple[type, Callable[[Any, Batch, list[Tensor]], Pictures]]] = [
    (Codec, samples),
    (Diffused, guided_samples),
    (Bounded, progressive),
    (Codebooks, codebooks),
    (Basis, basis),
]
