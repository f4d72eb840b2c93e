"""The covariance of bytes, exactly."""

import torch
from torch import Tensor, nn

from .. import distributed

MIDDLE = 128  # subtracted from every byte; what is left lies in [−128, 127]
# So many rows' products are summed in fp32, and no more: |Σ| ≤ 1024 · 128² = 2²⁴, where its whole numbers end.
CHUNK = 1024


class Moments(nn.Module):
    """Count, sum and second moment of rows of D bytes, shifted by MIDDLE.

    All are whole numbers, in fp64 exact up to 2⁵³, more than 5·10¹¹ rows. So they do not depend on the order of the
    rows: neither on the batch size, nor on the ranks, nor on where a run was resumed. Only `covariance` rounds, and
    since bytes are near MIDDLE, little: by less than 2·10⁻¹² squared grey levels.

    Memory: 8·D² bytes. Work: 2·D² operations a row, in fp32.
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
        """rows: uint8 [R, D]; counted: bool [R], those that are. Nothing here waits for the device."""
        for part, mask in zip(rows.split(CHUNK), counted.split(CHUNK), strict=True):
            shifted = (part.float() - MIDDLE) * mask[:, None]
            self.count += mask.sum()
            self.sum += shifted.sum(0)
            self.second += shifted.T @ shifted

    def over_ranks(self) -> "dict[str, Tensor]":
        """The three sums over all ranks, in tensors of their own. Collective."""
        return {name: distributed.sum_(tensor.clone()) for name, tensor in self.named_buffers()}


def covariance(count: Tensor, sum: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """(mean [D], unbiased covariance [D, D]) of what Moments has counted, fp64, in grey levels."""
    mean = sum / count
    return mean + MIDDLE, torch.addr(second, sum, mean, alpha=-1) / (count - 1).clamp(min=1)
