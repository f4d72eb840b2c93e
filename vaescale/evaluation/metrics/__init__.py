"""What is measured of a codec. To add a metric, write it in a file of its own and add it to METRICS."""

from .active_units import ACTIVE_UNITS
from .bits import BITS
from .code_use import CODE_USE
from .metric import Metric
from .reconstruction import RECONSTRUCTION

METRICS: list[Metric] = [BITS, RECONSTRUCTION, ACTIVE_UNITS, CODE_USE]  # in the order in which people read them
