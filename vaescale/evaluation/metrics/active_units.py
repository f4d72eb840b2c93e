"""The number of latents that carry information about images: Burda, Grosse, Salakhutdinov 2016, "Importance weighted
autoencoders", section 5.2."""

import torch

from ...interfaces import Bounded, Tensors, by_level, over_pixels
from .. import latents
from .metric import Metric, Number, Seen

ACTIVE = 0.01  # variance of a posterior mean above which a latent is active


def sums(seen: Seen) -> Tensors:
    """Returns the sums of each level's latents; {} for a codec without a likelihood, with codes, or over pixels."""
    if (
        over_pixels(seen.codec)
        or not isinstance(seen.codec, Bounded)
        or not all(level.is_floating_point() for level in seen.latents)
    ):
        return {}
    return by_level("latents", [latents.sums([level]) for level in seen.latents])


def result(sums: Tensors, images: int) -> dict[str, float]:
    levels = [latents.moments(total, images)[1] > ACTIVE for total in sums.values()]
    active = torch.cat(levels)
    found = {"active_units": int(active.sum()), "active_share": float(active.double().mean())}
    several = by_level("active_units", [int(level.sum()) for level in levels]) if len(levels) > 1 else {}
    return {**found, **several}


ACTIVE_UNITS = Metric(
    numbers={
        "active_units": Number("active units", "d", "active units"),
        "active_share": Number("active units, share", ".3f"),
    },
    protocol={
        "active_units": f"latents whose posterior mean (PCA: score) has a variance over images above {ACTIVE} "
        "(Burda et al. 2016, 5.2), in finer levels even if it only follows coarser ones; active_share: their share",
    },
    sums=sums,
    result=result,
)
