"""The metrics of a codec. To add one, write it in its own file and add it to METRICS or COMPARISONS."""

from .active_units import ACTIVE_UNITS
from .bits import BITS
from .code_use import CODE_USE
from .frechet import FRECHET
from .inception_score import INCEPTION_SCORE
from .kernel_distance import KERNEL_DISTANCE
from .manifold import MANIFOLD
from .metric import Comparison, Metric
from .perceptual import PERCEPTUAL
from .rate import RATE
from .reconstruction import RECONSTRUCTION

METRICS: list[Metric] = [BITS, RATE, RECONSTRUCTION, PERCEPTUAL, ACTIVE_UNITS, CODE_USE]  # in reading order
# By name, measured on request.
COMPARISONS: dict[str, Comparison] = {
    "fd": FRECHET,
    "kid": KERNEL_DISTANCE,
    "is": INCEPTION_SCORE,
    "pr": MANIFOLD,
}
