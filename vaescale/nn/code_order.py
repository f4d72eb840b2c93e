"""Orders in which the N = h · w codes of a map are drawn: int64 [..., N], the places of the rows of the map."""

import math

from torch import Tensor


def ranks(order: Tensor) -> Tensor:
    """Returns when each place's turn is, the inverse of the order: int64 [..., N]."""
    return order.argsort(-1)


def cosine_count(places: int) -> list[float]:
    """Returns the probability that m = 1 … N places are masked, as m = ⌈N cos(π u / 2)⌉ for uniform u (Chang et al.
    2022, "MaskGIT", section 3.3)."""
    below = [2 / math.pi * math.acos(m / places) for m in range(places + 1)]  # of u, for more than m masked places
    return [below[m - 1] - below[m] for m in range(1, places + 1)]


def halton(height: int, width: int) -> list[int]:
    """Returns the places in the order in which the points of the Halton sequence with bases 2 and 3 meet them (Besnier
    et al. 2025, "Halton scheduler for masked generative image transformer"), so that any first ones are spread
    evenly."""
    order: dict[int, None] = {}
    number = 0
    while len(order) < height * width:
        number += 1
        order.setdefault(int(_radical(number, 2) * height) * width + int(_radical(number, 3) * width))
    return list(order)


def _radical(number: int, base: int) -> float:
    """Returns the number's digits, mirrored at the point."""
    value, scale = 0, 1
    while number:
        number, digit = divmod(number, base)
        value, scale = value * base + digit, scale * base
    return value / scale
