"""Bounds on the log-probability of images, for codecs with a likelihood, in bits per subpixel of the 8-bit image."""

import math

import torch

from ...interfaces import Batch, Bounded, Tensors, by_level
from .metric import Metric, Number, Seen


def bits(codec: Bounded, batch: Batch, draws: int) -> Tensors:
    """Returns bits per subpixel of each image, fp64 [B] by name; `bits_per_dim_iw` only with several draws.

    The bounds are those of Burda, Grosse, Salakhutdinov 2016, "Importance weighted autoencoders": equation 3 with the
    KL in closed form, and equation 8, −log p(x) ≤ −log 1/k Σ_i p(x|z_i) p(z_i) / q(z_i|x).
    """
    distortion = torch.zeros(len(batch.x), dtype=torch.float64, device=batch.x.device)
    rate, log_weights, weighted = distortion, torch.full_like(distortion, -math.inf), True
    for draw in range(draws):
        bound = codec.bound(batch, draw)
        distortion = distortion + bound.distortion.double() / draws
        rate = rate + bound.rate.double() / draws  # depends on the draw except at the coarsest level
        if bound.log_ratio is None:
            weighted = False
        else:
            log_weights = torch.logaddexp(log_weights, bound.log_ratio.double() - bound.distortion.double())
    values = {"bits_per_dim": distortion + rate.sum(0)}
    if draws > 1 and weighted:
        values["bits_per_dim_iw"] = math.log(draws) - log_weights
    values |= {"rate": rate.sum(0), "distortion": distortion}
    if len(rate) > 1:
        values |= by_level("rate", rate.unbind())
    return {name: nats / (math.log(2) * batch.x[0].numel()) for name, nats in values.items()}


def sums(seen: Seen) -> Tensors:
    if not isinstance(seen.codec, Bounded):
        return {}
    return {name: values.sum() for name, values in bits(seen.codec, seen.batch, seen.draws).items()}


BITS = Metric(
    numbers={
        "bits_per_dim": Number("bits/dim, ELBO", ".4f", "bits/dim"),
        "bits_per_dim_iw": Number(
            "bits/dim, IW-{draws}",
            ".4f",
            "bits/dim, IW-{draws}",
            absent="not measured; --iw K draws K latents per image for this bound, which is tighter than the ELBO "
            "(a diffusion has none: there K draws make the ELBO's estimate better)",
        ),
        "rate": Number("rate (bits/dim)", ".4f", "rate"),
        "distortion": Number("distortion (bits/dim)", ".4f", "distortion"),
    },
    protocol={
        "bits_per_dim": "-ELBO in bits per subpixel of the 8-bit image, an upper bound of -log2 p(image); "
        "mean over images",
        "bits_per_dim_iw": "the same for the importance-weighted bound of all draws, Burda et al. 2016, equation 8",
        "dequantisation": "a density is that of the image plus uniform noise in bins of 1/255, with its log averaged "
        "over the bins in closed form; a Bernoulli is of the image binarised at 127.5 and compares only with such",
        "draws": "latents drawn from q(z|x) for each image, of a diffusion at one noise level; the numbers of sample "
        "and draw determine level and noise",
        "rate": "KL(q(z|x) || p(z)) in bits per subpixel, over all levels; rate/levelN: of one level, coarse to fine",
        "distortion": "-log2 p(x|z) in bits per subpixel, mean over draws",
    },
    sums=sums,
)
