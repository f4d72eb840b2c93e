"""Transformers over a map of codes: one vector h for each place, from what the place may depend on.

Both know the place of an input by rotary positions, and the place of an output by a learned vector.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .code_levels import SCALE
from .transformer import Cache, Dropout, Transformer, grid


class _Trunk(nn.Module):
    """height, length: of the map, in codes. dim: channels of a head."""

    def __init__(
        self, height: int, length: int, width: int, depth: int, heads: int, dim: int, checkpointing: bool
    ) -> None:
        super().__init__()
        self.shape = (height, length)
        self.dim = dim
        self.places = nn.Parameter(SCALE * torch.randn(height * length, width))
        self.transformer = Transformer(width, depth, heads, checkpointing, qk_norm=True)

    def _angles(self) -> Tensor:
        """Returns the angles of the places, after one of zeros for the condition: fp32 [1 + N, dim/2]."""
        angles = grid(*self.shape, self.dim, self.places.device)
        return torch.cat([torch.zeros_like(angles[:1]), angles])


class CausalTransformer(_Trunk):
    """The inputs are the condition and, in any order, the codes but the last one. Each output knows the place of the
    code that it is for (Pang et al. 2024, "RandAR"; Yu et al. 2024, "Randomized autoregressive visual generation").

    by_target: whether queries have the angles of the outputs' places, so that attention knows where each code lies as
    seen from the place that it is for, whatever came before it. In the order of rows this is always one place apart.
    """

    def __init__(
        self,
        height: int,
        length: int,
        width: int,
        depth: int,
        heads: int,
        dim: int,
        checkpointing: bool,
        by_target: bool = False,
    ) -> None:
        super().__init__(height, length, width, depth, heads, dim, checkpointing)
        self.by_target = by_target

    def forward(
        self, embedded: Tensor, condition: Tensor, order: Tensor | None = None, dropout: Dropout | None = None
    ) -> Tensor:
        """Returns h [B, N, width], of which each depends on the condition and the codes before it.

        embedded: codes in their order, [B, N, width]; condition: [B, width]; order: the places of the codes, int64
        [B, N]; None: by rows."""
        x = torch.cat([condition[:, None], embedded[:, :-1].to(condition.dtype)], dim=1)
        targets, angles, queries = self._positions(order)
        return self.transformer(x + targets, angles, causal=True, dropout=dropout, queries=queries)

    def reader(self, condition: Tensor, order: Tensor | None = None) -> Callable[[int, Tensor | None], Tensor]:
        """Returns a function that computes h one by one: (i, embedded code i − 1) → h of code i, [B, width]. It must be
        called for i = 0 (without a code), 1, 2, …"""
        targets, angles, queries = self._positions(order)
        caches = [Cache(len(self.places)) for _ in self.transformer.blocks]

        def read(i: int, last: Tensor | None) -> Tensor:
            x = (condition if last is None else last)[:, None] + targets[..., i : i + 1, :]
            turned = None if queries is None else queries[..., i : i + 1, :]
            return self.transformer(x, angles[..., i : i + 1, :], caches=caches, queries=turned)[:, 0]

        return read

    def _positions(self, order: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Returns the vectors of the outputs' places, the angles of the inputs' places, which are those of keys, and
        the angles of queries, if they are others."""
        angles = self._angles()
        if order is None:
            return self.places, angles[:-1], angles[1:] if self.by_target else None
        inputs = torch.cat([torch.zeros_like(order[:, :1]), order[:, :-1] + 1], dim=1)
        queries = angles[order + 1] if self.by_target else None
        return nn.functional.embedding(order, self.places), angles[inputs], queries


class MaskedTransformer(_Trunk):
    """The inputs are the condition and all codes, of which masked ones are replaced by a learned vector (Chang et al.
    2022, "MaskGIT")."""

    def __init__(
        self, height: int, length: int, width: int, depth: int, heads: int, dim: int, checkpointing: bool
    ) -> None:
        super().__init__(height, length, width, depth, heads, dim, checkpointing)
        self.unknown = nn.Parameter(SCALE * torch.randn(width))

    def forward(self, embedded: Tensor, condition: Tensor, masked: Tensor, dropout: Dropout | None = None) -> Tensor:
        """Returns h [B, N, width], of which each depends on the condition and all codes that are not masked.

        embedded: [B, N, width]; condition: [B, width]; masked: bool [B, N]."""
        known = torch.where(masked[..., None], self.unknown, embedded.to(self.unknown.dtype)) + self.places
        x = torch.cat([condition[:, None].to(known.dtype), known], dim=1)
        return self.transformer(x, self._angles(), dropout=dropout)[:, 1:]
