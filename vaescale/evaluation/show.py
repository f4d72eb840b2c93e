"""The pictures of a validation: the fixed images, samples, codes, and what each codebook or linear decoder holds."""

from collections.abc import Iterator
from contextlib import suppress

import torch

from ..interfaces import Batch, Bounded, Model
from ..monitoring import codebook, pictures
from ..monitoring.pictures import Picture
from . import sample
from .evaluate import reconstruct


@torch.no_grad()
def show(model: Model, shown: Batch) -> Iterator[tuple[str, Picture]]:
    """(name on the board, picture), one at a time, of what the model can do. shown: the fixed images, on the device."""
    y, latents = reconstruct(model, shown)
    yield "val/reconstructions", pictures.reconstructions(shown.x, y)
    with suppress(sample.Unable):
        yield "val/samples", sample.at_temperatures(model, shown.condition)
    if isinstance(model, Bounded) and len(latents) > 1:
        yield "val/progressive", sample.progressive(model, shown)
    averages = {name: usage.average for name, usage in model.usage(clear=False).items()}
    decoded = codebook.decoded(model, list(averages.values()), [level.shape[1:] for level in latents])
    for (name, average), level, (codes, tiles) in zip(averages.items(), latents, decoded, strict=False):
        yield f"{name}/map", pictures.code_map(shown.x, level, len(average))
        yield f"{name}/decoded", pictures.codebook(tiles, codes, codebook.in_use(average))
    basis = model.basis()
    if basis is not None:
        captions = ["mean", *map(str, range(1, len(basis)))]
        yield "val/basis", pictures.grid(pictures.to_bytes(basis), len(basis), captions)
