"""Reconstruction quality of any Codec over a validation set, each sample exactly once over all ranks."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .. import distributed
from ..data.stream import Decoded
from ..interfaces import Batch, Codec
from ..monitoring import codebook
from ..monitoring.pictures import to_bytes
from . import metrics

PROTOCOL = {
    "images": "largest centred square, bicubic to the model's size, each exactly once",
    "rounding": "reconstructions rounded to 8 bits before any metric",
    "mse": "pixels in [0, 1], mean over images",
    "psnr": "dB, peak 1, mean of the per-image values",
    "ssim": "data range 1, Gaussian window 11, sigma 1.5, mean of the per-image values",
    "usage": "share of codes used at least once over all images",
    "perplexity": "exp of the entropy of the code frequencies over all images",
}


@torch.no_grad()
def evaluate(codec: Codec, loader: Iterable[Decoded], sizes: dict[str, int], device: torch.device) -> dict[str, Any]:
    """mse, psnr, ssim, and usage and perplexity for each codebook of `sizes` (name → K, coarse to fine).

    Collective; the same result on all ranks.
    """
    totals = torch.zeros(4, dtype=torch.float64, device=device)
    counts = {name: torch.zeros(size, dtype=torch.int64, device=device) for name, size in sizes.items()}
    for decoded in loader:
        batch = decoded.batch.to(device)
        x, latents = batch.x, codec.encode(batch)
        y = to_bytes(codec.decode(latents, batch.condition))
        values = torch.stack([metrics.mse(x, y), metrics.psnr(x, y), metrics.ssim(x, y)])
        totals += torch.cat([values.sum(1), values.new_tensor([len(x)])])
        for name, codes in zip(counts, latents, strict=False):
            counts[name].index_add_(0, codes.flatten(), torch.ones_like(codes.flatten()))
    distributed.sum_(totals)
    mse, psnr, ssim, images = totals.tolist()
    result: dict[str, Any] = {"images": int(images)}
    result |= {"psnr": psnr / images, "ssim": ssim / images, "mse": mse / images}
    for name, count in counts.items():
        distributed.sum_(count)
        prefix = "" if len(counts) == 1 else f"{name}/"
        result[f"{prefix}usage"] = float(codebook.used(count))
        result[f"{prefix}perplexity"] = float(codebook.perplexity(count))
    return result


@torch.no_grad()
def reconstruct(codec: Codec, batch: Batch) -> tuple[Tensor, list[Tensor]]:
    """Its images' reconstructions, uint8 [B, C, H, W], and the latents."""
    latents = codec.encode(batch)
    return to_bytes(codec.decode(latents, batch.condition)), latents
