"""Entropies of soft codes over a codebook of any size, without an N×K matrix in the forward or backward pass.

A row's soft code is p_nk = softmax_k(s_nk), s_nk = −‖z_n − e_k‖² / τ. With H_n = −Σ_k p_nk log p_nk, m_k = mean_n p_nk

    ∂(mean_n H_n) / ∂s_nk = −p_nk (log p_nk + H_n) / N
    ∂(−Σ_k m_k log m_k) / ∂s_nk = p_nk (w_k − Σ_j p_nj w_j) / N,   w_k = −log m_k.

Scores are computed in tiles, twice in the forward and twice in the backward pass: more products for less memory.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..numerics import exact
from .nearest import centre, tile_of


def entropies(z: Tensor, codebook: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """z: [N, D], codebook: [K, D] → (mean entropy of a row's soft code, entropy of the mean soft code), in nats, both
    in [0, log K], with gradients for z and codebook.

    The first minus the second is the loss of Jansen et al. 2020 ("Coincidence, categorization, and consolidation"). For
    codebooks it is used by MaskGIT's VQGAN, Yu et al. 2023 (LFQ, equation 5) and Shi et al. 2024 ("Scalable image
    tokenization with index backpropagation quantization"). It makes each row certain of its code while all codes are
    used. The mean is over the N rows given, one rank's micro-batch, as in the published code. Extra memory: four tiles
    (4 MiB each on a CPU, 128 MiB on a GPU), 4 N + 2 K numbers and the centred copies of both, in addition to the
    gradients.
    """
    # Leaves the distances unchanged and reduces their rounding far from the origin.
    c = centre(z.detach(), codebook.detach())
    sure, varied = _Entropies.apply(z - c, codebook - c, temperature)
    return sure, varied


def patterns(no: Tensor, yes: Tensor) -> Tensor:
    """Log-probabilities [N, B] that each of B bits is 0 or 1 → probabilities [N, 2^B] of all bit patterns."""
    total = no.new_zeros(len(no), 1)
    for bit in range(no.shape[1]):
        total = torch.cat([total + no[:, bit, None], total + yes[:, bit, None]], dim=1)
    return total.exp()


class _Entropies(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, codebook: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        tiles = _Tiles(z, codebook, temperature)
        totals, entropy = z.new_empty(len(z)), z.new_zeros(len(z))  # log Σ_k exp s_nk; H
        mean = z.new_zeros(len(codebook))  # m
        with exact():
            for n in tiles.rows:
                totals[n] = torch.stack([tiles.scores(n, k).logsumexp(1) for k in tiles.columns]).logsumexp(0)
                for k in tiles.columns:
                    log_soft = tiles.scores(n, k).sub_(totals[n, None])
                    soft = log_soft.exp()
                    mean[k] += soft.sum(0)
                    entropy[n] -= soft.mul_(log_soft).sum(1)
        mean /= len(z)
        ctx.save_for_backward(z, codebook, totals, entropy, mean)
        ctx.temperature = temperature
        return entropy.mean(), torch.special.entr(mean).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, sure: Tensor, varied: Tensor) -> tuple[Tensor, Tensor | None, None]:
        z, codebook, totals, entropy, mean = ctx.saved_tensors
        tiles = _Tiles(z, codebook, ctx.temperature)
        of_z = torch.zeros_like(z)
        of_codebook = torch.zeros_like(codebook) if ctx.needs_input_grad[1] else None
        surprise = -mean.clamp(min=torch.finfo(mean.dtype).tiny).log()  # w
        with exact():
            for n in tiles.rows:
                average = z.new_zeros(len(z[n]))  # Σ_k p_nk w_k
                for k in tiles.columns:
                    soft = tiles.scores(n, k).sub_(totals[n, None]).exp_()
                    average.addmv_(soft, surprise[k])
                by_row = sure * entropy[n] + varied * average
                for k in tiles.columns:
                    log_soft = tiles.scores(n, k).sub_(totals[n, None])
                    soft = log_soft.exp()
                    of_scores = log_soft.mul_(-sure).add_(varied * surprise[k]).sub_(by_row[:, None]).mul_(soft)
                    of_z[n].addmm_(of_scores, codebook[k])
                    if of_codebook is not None:
                        of_codebook[k].addmm_(of_scores.t(), z[n])
                        of_codebook[k].sub_(of_scores.sum(0)[:, None] * codebook[k])
        scale = 2 / (ctx.temperature * len(z))
        return of_z.mul_(scale), None if of_codebook is None else of_codebook.mul_(scale), None


class _Tiles:
    """The scores s, without the term −‖z‖² / τ, which cancels in the softmax, tile by tile."""

    def __init__(self, z: Tensor, codebook: Tensor, temperature: float) -> None:
        most = tile_of(z.device)
        self.rows = _slices(len(z), most.rows(len(codebook)))
        self.columns = _slices(len(codebook), most.columns)
        self.z, self.codebook, self.temperature = z, codebook, temperature
        self.norms = torch.cat([codebook[k].square().sum(1) for k in self.columns]).div_(-temperature)

    def scores(self, rows: slice, columns: slice) -> Tensor:
        codes = self.codebook[columns]
        return torch.addmm(self.norms[columns], self.z[rows], codes.t(), alpha=2 / self.temperature)


def _slices(count: int, size: int) -> list[slice]:
    return [slice(i, i + size) for i in range(0, count, size)]
