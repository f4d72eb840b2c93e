"""How codes of maps are drawn from a network: one place after the other, or many places at once in a few steps.

Shapes: L levels, N places. Under guidance a network computes 2B maps for B images, those with the condition first.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..interfaces import Sampling
from . import noise
from .categorical import drawn, guided, nats
from .code_levels import Levels
from .code_order import ranks

NOISE = 4.5  # scale of the noise of confidences at the first step, in nats; MaskGIT's published code


class Choice:
    """Draws the codes of a place, or of all places, given h."""

    def __init__(self, levels: Levels, temperature: float, sampling: Sampling) -> None:
        self.levels = levels
        self.temperature = temperature
        self.sampling = sampling

    def __call__(self, h: Tensor, uniform: Tensor, codes: Tensor, where: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Returns codes int64 [B, L, ...], and the embedding of each level's, [B or 2B, ..., width].

        h: [B or 2B, ..., width]; uniform: fp64 [B, L, ...], one number for each code; codes: those to take instead
        where `where`, bool [B, L, ...], is true."""
        chosen: list[Tensor] = []
        embedded: list[Tensor] = []
        for level, embedding in enumerate(self.levels.embeddings):
            logits = self.combined(self.levels.next(h, embedded), len(codes))
            code = drawn(logits, uniform[:, level], self.temperature, self.sampling.top_k, self.sampling.top_p)
            chosen.append(torch.where(where[:, level], codes[:, level], code))
            embedded.append(embedding(doubled(chosen[-1], h)))
        return torch.stack(chosen, dim=1), embedded

    def combined(self, logits: Tensor, images: int) -> Tensor:
        """Returns the logits under guidance, if they are for more than this number of images."""
        return guided(logits, self.sampling.guidance) if len(logits) > images else logits

    def nats(self, h: Tensor, embedded: list[Tensor], codes: Tensor) -> Tensor:
        """Returns −log p of the codes at temperature 1, the sum over levels, fp32 [B, ...]."""
        logits = self.levels(h, torch.stack(embedded, dim=-2))
        parts = [nats(self.combined(one, len(codes)), code) for one, code in zip(logits, codes.unbind(1), strict=True)]
        return torch.stack(parts).sum(0)


def doubled(x: Tensor, like: Tensor) -> Tensor:
    """Repeats the images of x, [B, ...], as often as those of `like`, [B or 2B, ...], are."""
    return x if len(x) == len(like) else torch.cat([x, x])


def one_by_one(
    read: Callable[[int, Tensor | None], Tensor], choose: Choice, uniform: Tensor, codes: Tensor, where: Tensor
) -> Tensor:
    """Returns codes int64 [B, L, N], drawn in their order.

    read: (i, the embedded code before it, summed over levels) → h of code i; uniform, codes, where: [B, L, N], as in
    `Choice`."""
    found = []
    last: Tensor | None = None
    for i in range(codes.shape[2]):
        code, embedded = choose(read(i, last), uniform[..., i], codes[..., i], where[..., i])
        last = torch.stack(embedded).sum(0)
        found.append(code)
    return torch.stack(found, dim=2)


def together(
    net: Callable[[Tensor, Tensor], Tensor],
    choose: Choice,
    sample: Tensor,
    codes: Tensor,
    where: Tensor,
    keys: tuple[int, int],
    first: Tensor | None,
) -> Tensor:
    """Returns codes int64 [B, L, N], drawn in a few steps (Chang et al. 2022, "MaskGIT", section 3.2).

    After step s of S, N cos(π s / 2S) places stay masked: those with the least confidence, which is log p of the drawn
    code plus Gumbel noise that falls to 0, and is multiplied by the temperature.

    net: (codes, masked bool [B, N]) → h; keys: of the noise of codes and of confidences; first: int64 [N], an order in
    which the places are drawn instead."""
    steps, size = choose.sampling.passes, tuple(codes.shape[1:])
    masked = ~where.all(1)
    hidden = left = masked.sum(1, keepdim=True)
    for step in range(1, min(steps, size[1]) + 1):  # each draws one place or more
        h = net(codes, masked)
        uniform = noise.uniform(sample, size, keys[0], step)
        given = where | ~masked[:, None]
        codes, embedded = choose(h, uniform, codes, given)
        left = torch.minimum((hidden * math.cos(math.pi / 2 * step / steps)).long(), left - 1).clamp(min=0)
        if first is None:
            gumbel = -torch.log(-torch.log(noise.uniform(sample, size[1:], keys[1], step)))
            scale = NOISE * choose.temperature * (1 - step / steps)
            confidence = scale * gumbel - choose.nats(h, embedded, codes)
        else:
            confidence = -ranks(first).double().expand(masked.shape)
        masked = ranks(confidence.masked_fill(~masked, torch.inf).argsort(1)) < left
    return codes
