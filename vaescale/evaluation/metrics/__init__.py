"""The metrics of a codec. To add one, write it in its own file and add it to METRICS."""

from .active_units import ACTIVE_UNITS
from .bits import BITS
from .code_use import CODE_USE
from .metric import Metric
from .perceptual import PERCEPTUAL
from .reconstruction import RECONSTRUCTION

METRICS: list[Metric] = [BITS, RECONSTRUCTION, PERCEPTUAL, ACTIVE_UNITS, CODE_USE]  # in reading order
