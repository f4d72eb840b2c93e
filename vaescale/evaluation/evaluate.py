"""Any Codec, measured over a validation set, each sample exactly once over all ranks."""

import math
from collections.abc import Callable
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .. import distributed
from ..data import stream
from ..interfaces import Batch, Bounded, Codebooks, Codec, by_level
from ..monitoring import codebook
from ..monitoring.pictures import to_bytes
from . import metrics
from .latents import Moments

ACTIVE = 0.01  # variance of a posterior mean

PROTOCOL = {
    "images": "largest centred square, bicubic to the model's size, each exactly once",
    "rounding": "reconstructions rounded to 8 bits before mse, psnr and ssim",
    "mse": "pixels in [0, 1], mean over images",
    "psnr": "dB, peak 1, mean of the per-image values",
    "ssim": "data range 1, Gaussian window 11, sigma 1.5, mean of the per-image values; not below 11 pixels a side",
    "usage": "share of codes used at least once over all images",
    "perplexity": "exp of the entropy of the code frequencies over all images",
    "bits_per_dim": "-ELBO in bits a subpixel of the 8-bit image, an upper bound of -log2 p(image); mean over images",
    "bits_per_dim_iw": "the same for the importance-weighted bound of all draws, Burda et al. 2016, equation 8",
    "dequantisation": "a density is that of the image plus uniform noise in its bins of 1/255, its log averaged over "
    "them in closed form; a Bernoulli speaks of the image binarised at 127.5 and compares with no other",
    "draws": "latents drawn from q(z|x) for each image; their noise is decided by the numbers of sample and draw",
    "rate": "KL(q(z|x) || p(z)) in bits a subpixel, over all levels; rate/levelN: each, coarse to fine",
    "distortion": "-log2 p(x|z) in bits a subpixel, mean over draws",
    "active_units": f"latents whose posterior mean (PCA: score) has a variance over images above "
    f"{ACTIVE}, Burda et al. 2016, 5.2, in finer levels also if it only follows the coarser ones; active_share: of all",
}


@torch.no_grad()
def evaluate(
    codec: Codec,
    slices: stream.ValidationSlices,
    device: torch.device,
    micro: int = 32,
    draws: int = 1,
    watched: bool = False,
    stopped: Callable[[], object] = lambda: False,
) -> dict[str, Any]:
    """mse, psnr, ssim; usage and perplexity for each codebook, coarse to fine; for what is
    Bounded the bits a subpixel, `draws` latents being drawn for each image. `micro`: images at a time on one rank.

    Collective; the same result on all ranks. Memory does not grow with `draws`, time does. `stopped` is asked after
    each batch, equally often on all ranks, and must answer all alike: if it says so, the rest is left and {} returned.
    """
    rank, world = distributed.rank(), distributed.world()
    loader = stream.validation_loader(slices, micro, rank, world, device.type == "cuda")
    # A rank without images, where there are fewer than ranks, must know the names of what the others sum.
    first, latents = _measure(codec, slices[range(1)].batch.to(device), min(draws, 2))
    names = list(first)
    totals = torch.zeros(len(names), dtype=torch.float64, device=device)
    usages = codec.usage(clear=False) if isinstance(codec, Codebooks) else {}
    counts = {name: torch.zeros_like(usage.window) for name, usage in usages.items()}
    moments = Moments(device)
    images = len(slices.samples.index)
    batches = range(math.ceil(math.ceil(images / world) / micro))  # of the rank that has most
    for _, decoded in tqdm(zip_longest(batches, loader), "evaluate", len(batches), unit="batch", disable=not watched):
        if decoded:
            values, latents = _measure(codec, decoded.batch.to(device), draws)
            totals += torch.stack([value.sum() for value in values.values()])
            for name, codes in zip(counts, latents, strict=False):  # no counts where latents are not codes
                counts[name].index_add_(0, codes.flatten(), torch.ones_like(codes.flatten()))
            if isinstance(codec, Bounded):
                moments.add(latents)
        if stopped():
            return {}
    means = (distributed.sum_(totals) / images).tolist()
    result: dict[str, Any] = {"images": images, **dict(zip(names, means, strict=True))}
    if isinstance(codec, Bounded):
        active = moments.result()[1] > ACTIVE
        result["active_units"], result["active_share"] = int(active.sum()), float(active.double().mean())
        if len(latents) > 1:
            each = active.split([level[0].numel() for level in latents])
            result |= by_level("active_units", [int(level.sum()) for level in each])
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


def bits(codec: Bounded, batch: Batch, draws: int) -> dict[str, Tensor]:
    """Bits a subpixel of each image, fp64 [B] a name; `bits_per_dim_iw` only with several draws.

    The bounds are those of Burda, Grosse, Salakhutdinov 2016, "Importance weighted autoencoders": equation 3 with the
    KL in closed form, and equation 8, −log p(x) ≤ −log 1/k Σ_i p(x|z_i) p(z_i) / q(z_i|x).
    """
    distortion = torch.zeros(len(batch.x), dtype=torch.float64, device=batch.x.device)
    rate, log_weights = distortion, torch.full_like(distortion, -math.inf)
    for draw in range(draws):
        bound = codec.bound(batch, draw)
        distortion = distortion + bound.distortion.double() / draws
        rate = rate + bound.rate.double() / draws  # of all but the coarsest level it depends on the draw
        log_weights = torch.logaddexp(log_weights, bound.log_ratio.double() - bound.distortion.double())
    values = {"bits_per_dim": distortion + rate.sum(0)}
    if draws > 1:
        values["bits_per_dim_iw"] = math.log(draws) - log_weights
    values |= {"rate": rate.sum(0), "distortion": distortion}
    if len(rate) > 1:
        values |= by_level("rate", rate.unbind())
    return {name: nats / (math.log(2) * batch.x[0].numel()) for name, nats in values.items()}


def _measure(codec: Codec, batch: Batch, draws: int) -> tuple[dict[str, Tensor], list[Tensor]]:
    """(fp64 [B] a measure, latents)."""
    y, latents = reconstruct(codec, batch)
    values = {"psnr": metrics.psnr(batch.x, y), "mse": metrics.mse(batch.x, y)}
    if batch.x.shape[-1] >= metrics.WINDOW:
        values["ssim"] = metrics.ssim(batch.x, y)
    if isinstance(codec, Bounded):
        values |= bits(codec, batch, draws)
    return values, latents
