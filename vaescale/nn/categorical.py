"""Categorical distributions given by logits [..., K]: losses, and draws with temperature, top-k, top-p and guidance.

Draws count in whole numbers, so that a number in (0, 1) decides a code on every device, whatever the order of sums. On
CUDA that is also what `deterministic: true` needs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

UNIT = 2.0**48  # probability 1; smaller ones than 1/UNIT are 0


def nats(logits: Tensor, codes: Tensor) -> Tensor:
    """Returns −log p of the codes, int64 [...], in fp32 [...]."""
    return -F.log_softmax(logits, dim=-1, dtype=torch.float32).gather(-1, codes[..., None]).squeeze(-1)


def guided(logits: Tensor, guidance: float) -> Tensor:
    """Returns without + guidance · (given − without), [B, ..., K]. logits: [2B, ..., K], those with the condition
    first (Ho, Salimans 2022, "Classifier-free diffusion guidance")."""
    given, without = logits.float().chunk(2)
    return without + guidance * (given - without)


def drawn(logits: Tensor, uniform: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Returns codes int64 [...] by the inverse of the cumulative distribution.

    uniform: fp64 [...] in (0, 1). The logits are divided by the temperature; at 0 the most probable code is taken. Then
    only the top_k most probable codes remain (0: all), and of these only the most probable ones that together have at
    least the probability top_p (Holtzman et al. 2020, "The curious case of neural text degeneration").
    """
    if not temperature:
        return logits.argmax(-1)
    cumulative = weights(logits.float() / temperature, top_k, top_p).cumsum(-1)
    total = cumulative[..., -1:]
    target = torch.minimum((uniform[..., None] * total).long(), total - 1)  # the product may be rounded up
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1)


def weights(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Returns the probabilities of the codes that remain, in units of 1 / UNIT and not normalised: int64 [..., K]."""
    counts = (logits.softmax(-1).double() * UNIT).long()
    if 0 < top_k < logits.shape[-1]:
        places = logits.topk(top_k).indices
        counts = torch.zeros_like(counts).scatter(-1, places, counts.gather(-1, places))
    if top_p < 1:
        ranked, places = counts.sort(dim=-1, descending=True, stable=True)
        cumulative = ranked.cumsum(-1)
        more_probable = cumulative - ranked  # what the codes before it have together
        ranked = ranked.masked_fill(more_probable >= top_p * cumulative[..., -1:].double(), 0)
        counts = torch.zeros_like(counts).scatter(-1, places, ranked)
    return counts
