"""The covariance of bytes, from exact sums."""

import torch
from torch import Tensor, nn

from .. import distributed

MIDDLE = 128  # subtracted from every byte; the result lies in [−128, 127]
# Rows whose products are summed in fp32. |Σ| ≤ 1024 · 128² = 2²⁴, up to which fp32 represents every integer.
CHUNK = 1024


class Moments(nn.Module):
    """Count, sum and second moment of rows of D bytes, shifted by MIDDLE.

    All are integers, exact in fp64 up to 2⁵³, which is more than 5·10¹¹ rows. So they do not depend on the order of the
    rows, the batch size, the number of ranks or where a run was resumed. Only `covariance` rounds, by less than
    2·10⁻¹² squared grey levels, because bytes are near MIDDLE.

    Memory: 8·D² bytes. Work: 2·D² operations per row, in fp32.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.count: Tensor
        self.sum: Tensor
        self.second: Tensor
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("sum", torch.zeros(dim, dtype=torch.float64))
        self.register_buffer("second", torch.zeros(dim, dim, dtype=torch.float64))

    def add(self, rows: Tensor, counted: Tensor) -> None:
        """Adds the rows, uint8 [R, D], where `counted`, bool [R], is true. No host synchronisation."""
        for part, mask in zip(rows.split(CHUNK), counted.split(CHUNK), strict=True):
            shifted = (part.float() - MIDDLE) * mask[:, None]
            self.count += mask.sum()
            self.sum += shifted.sum(0)
            self.second += shifted.T @ shifted

    def over_ranks(self) -> "dict[str, Tensor]":
        """Returns copies of the three sums, summed over all ranks. Collective."""
        return {name: distributed.sum_(tensor.clone()) for name, tensor in self.named_buffers()}


def covariance(count: Tensor, sum: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (mean [D], unbiased covariance [D, D]) from the sums of Moments, fp64, in grey levels."""
    mean = sum / count
    return mean + MIDDLE, torch.addr(second, sum, mean, alpha=-1) / (count - 1).clamp(min=1)
