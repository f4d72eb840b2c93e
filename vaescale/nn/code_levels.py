"""The codes of one place: how they are embedded, and their logits given what comes before.

With one codebook, the logits are a linear map of the vector h of a place. With L codebooks, a small transformer goes
through the levels of each place: level i reads h plus the embedded codes of the levels before i (Lee et al. 2022,
"Autoregressive image generation using residual quantization", section 3.2.2, where only the first one reads h).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .transformer import Transformer

SCALE = 0.02  # standard deviation of initial embeddings


class Levels(nn.Module):
    """sizes: K of each level, coarse to fine. depth, heads: of the transformer over levels."""

    def __init__(self, sizes: Sequence[int], width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.sizes = tuple(sizes)
        self.embeddings = nn.ModuleList(nn.Embedding(size, width) for size in sizes)
        self.outputs = nn.ModuleList(nn.Linear(width, size) for size in sizes)
        several = len(self.sizes) > 1
        self.places = nn.Parameter(SCALE * torch.randn(len(self.sizes), width)) if several else None
        self.transformer = Transformer(width, depth, heads, qk_norm=True) if several else None
        for name, parameter in (*self.embeddings.named_parameters(), *self.outputs.named_parameters()):
            nn.init.normal_(parameter, std=0 if name.endswith("bias") else SCALE)

    def embedded(self, codes: Tensor) -> Tensor:
        """Codes int64 [..., L, N] → [..., N, L, width]."""
        levels = zip(self.embeddings, codes.unbind(-2), strict=True)
        return torch.stack([embedding(code) for embedding, code in levels], dim=-2)

    def forward(self, h: Tensor, embedded: Tensor) -> list[Tensor]:
        """Returns the logits of each level, [..., K]. h: [..., width]; embedded: [..., L, width], of which the last
        level is not used."""
        return [output(x) for output, x in zip(self.outputs, self._read(h, embedded[..., :-1, :]), strict=True)]

    def next(self, h: Tensor, embedded: list[Tensor]) -> Tensor:
        """Returns the logits of the level after those of `embedded`, each [..., width]."""
        level = len(embedded)
        before = torch.stack(embedded, dim=-2) if embedded else h.new_zeros(*h.shape[:-1], 0, h.shape[-1])
        return self.outputs[level](self._read(h, before)[-1])

    def _read(self, h: Tensor, embedded: Tensor) -> list[Tensor]:
        """Returns the inputs of the output layers of the given levels and the next one."""
        if self.transformer is None or self.places is None:
            return [h]
        sums = [h]
        for one in embedded.unbind(-2):
            sums.append(sums[-1] + one)
        x = torch.stack(sums, dim=-2) + self.places[: len(sums)]
        read = self.transformer(x.flatten(0, -3), None, causal=True)
        return list(read.view(x.shape).unbind(-2))
