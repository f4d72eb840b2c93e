"""The interface of all quantisers, and the ways to combine them.

Every learning rule needs only the number n_k and the sum s_k of the encoder outputs assigned to each code. `gather`
collects them over the micro-batches of a step, `update` sums those of all codebooks over the ranks in one all-reduce,
and `learn` applies them once per step. So a step at any world size and accumulation equals a step on the joined batch,
and all ranks compute bit-identical codebooks from the same sums.

Shapes: D channels, L codebooks of one quantiser.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from .. import distributed
from ..interfaces import Quantized, Usage
from .codebook import Tally

MOST = 100.0  # upper limit of the rotation trick's gradient scale
TINY = 1e-12  # length below which a row has no direction


class Quantizer(nn.Module, ABC):
    """The base class. Codes are int64, [...] for one codebook and [..., L] for several."""

    sizes: tuple[int, ...]  # K of each codebook, coarse to fine
    tally: Tally  # only in quantisers with a single codebook
    ready: bool | Tensor = True  # whether its inputs are meaningful yet, so that it may be initialised from them
    frozen: bool = False  # its uses are counted, but it does not learn

    def __init__(self) -> None:
        super().__init__()
        # (tensors of the last forward pass, the same of those before) since the last `collect`. Dynamo would compile a
        # forward pass again for each length of a list that it appends to, and if the attribute were new to the object.
        self._latest: tuple[Any, ...] | None = None

    @abstractmethod
    def forward(self, z: Tensor) -> Quantized:
        """z: [..., D] of any float type → z fp32 [..., D], codes, loss, commitment [L]. Computes in fp32, even inside
        autocast."""

    @abstractmethod
    def lookup(self, codes: Tensor) -> Tensor:
        """Codes → the z that `forward` returns with them, fp32 [..., D]."""

    def gather(self, step: int) -> list[Tensor]:
        """Returns sums over this rank's rows since the last call, to be summed over the ranks. The default is the
        counts, for quantisers without a codebook update."""
        del step
        self.collect()
        return [self.tally.take()]

    def collect(self) -> None:
        """Adds up what the forward passes since the last call have noted. A model calls it after each forward pass, to
        free memory, and outside of what is compiled."""
        for codes, *_ in self._noted():
            self.tally.add(codes)

    def learn(self, totals: Iterator[Tensor], step: int, lr: float) -> None:
        """Takes from `totals` as many tensors as `gather` returned, and learns from them."""
        del step, lr
        self.tally.count(next(totals))

    def usages(self, clear: bool) -> list[Usage]:
        """Returns the usage of each codebook; `clear` starts a new window."""
        return [self.tally.usage(clear)]

    def freeze(self) -> None:
        """Keeps all codes as they are from now on. Their uses are still counted."""
        self.requires_grad_(False)
        for part in self.modules():
            if isinstance(part, Quantizer):
                part.frozen = True

    def placed(self) -> bool | Tensor:
        """Returns whether the codes are initialised or need no initialisation; bool []."""
        return True

    def _note(self, *tensors: Tensor) -> None:
        self._latest = tensors, self._latest

    def _noted(self) -> list[tuple[Tensor, ...]]:
        """Returns the tensors noted since the last call, in order."""
        noted: list[tuple[Tensor, ...]] = []
        latest, self._latest = self._latest, None
        while latest:
            tensors, latest = latest
            noted.insert(0, tensors)
        return noted

    @torch.no_grad()
    def update(self, step: int, lr: float) -> None:
        """Learns from the step's rows. Collective: all ranks call it in the same steps. No host synchronisation."""
        parts = self.gather(step)
        flat = distributed.sum_(torch.cat([part.flatten() for part in parts]))
        totals = flat.split([part.numel() for part in parts])
        self.learn(iter([total.view_as(part) for total, part in zip(totals, parts, strict=True)]), step, lr)


class _Several(Quantizer):
    """Several quantisers; codes [..., L] are those of the parts, concatenated."""

    def __init__(self, parts: Sequence[Quantizer]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.sizes = tuple(size for part in parts for size in part.sizes)

    def gather(self, step: int) -> list[Tensor]:
        return [total for part in self._parts() for total in part.gather(step)]

    def collect(self) -> None:
        for part in self._parts():
            part.collect()

    def learn(self, totals: Iterator[Tensor], step: int, lr: float) -> None:
        for part in self._parts():
            part.learn(totals, step, lr)

    def usages(self, clear: bool) -> list[Usage]:
        return [usage for part in self._parts() for usage in part.usages(clear)]

    def _parts(self) -> list[Quantizer]:
        return list(self.parts)  # type: ignore[arg-type]  # ModuleList has no element type

    def _divided(self, codes: Tensor) -> list[Tensor]:
        """[..., L] → the codes of each part."""
        pieces = codes.split([len(part.sizes) for part in self._parts()], dim=-1)
        return [
            piece.squeeze(-1) if len(part.sizes) == 1 else piece
            for piece, part in zip(pieces, self._parts(), strict=True)
        ]

    def _joined(self, outs: Sequence[Quantized]) -> tuple[Tensor, Tensor, Tensor]:
        """(codes [..., L], loss averaged over the parts, commitment [L])."""
        codes = [
            out.codes if len(part.sizes) > 1 else out.codes[..., None]
            for out, part in zip(outs, self._parts(), strict=True)
        ]
        loss = torch.stack([out.loss for out in outs]).mean()
        return torch.cat(codes, dim=-1), loss, torch.cat([out.commitment for out in outs])


class Grouped(_Several):
    """Product quantisation: each group of channels has its own codebook (Jégou, Douze, Schmid 2011, section II.B)."""

    def forward(self, z: Tensor) -> Quantized:
        outs = [part(piece) for part, piece in zip(self._parts(), z.chunk(len(self.parts), dim=-1), strict=True)]
        return Quantized(torch.cat([out.z for out in outs], dim=-1), *self._joined(outs))

    def lookup(self, codes: Tensor) -> Tensor:
        pieces = zip(self._parts(), self._divided(codes), strict=True)
        return torch.cat([part.lookup(piece) for part, piece in pieces], dim=-1)


class Residual(_Several):
    """Residual quantisation: each codebook quantises the residual of the previous ones (Lee et al. 2022,
    "Autoregressive image generation using residual quantization", section 3.1).

    With the cosine metric rows are normalised to length 1 once, before the first codebook. After that, distances are
    Euclidean, because residuals are shorter. The output is the sum of the codes, which has length 1 up to the residual
    of the last codebook.
    """

    def __init__(self, parts: Sequence[Quantizer], gradient: str, cosine: bool = False) -> None:
        super().__init__(parts)
        self.gradient = gradient
        self.cosine = cosine

    def forward(self, z: Tensor) -> Quantized:
        with torch.autocast(z.device.type, enabled=False):
            z = F.normalize(z.float(), dim=-1) if self.cosine else z.float()
            rest, outs = z, []
            for part in self._parts():
                outs.append(part(rest))
                rest = rest - outs[-1].z.detach()
            total = torch.stack([out.z.detach() for out in outs]).sum(0)
            return Quantized(pass_through(z, total, self.gradient), *self._joined(outs))

    def learn(self, totals: Iterator[Tensor], step: int, lr: float) -> None:
        """Lets each part learn. A codebook is initialised from residuals of the previous ones, so only after them."""
        ready: bool | Tensor = True
        for part in self._parts():
            part.ready, ready = ready, ready & part.placed()  # the state in which this step's rows were quantised
            part.learn(totals, step, lr)

    def lookup(self, codes: Tensor) -> Tensor:
        pieces = zip(self._parts(), self._divided(codes), strict=True)
        return torch.stack([part.lookup(piece) for part, piece in pieces]).sum(0)


class Projected(Quantizer):
    """Compares codes in a few channels, after a linear map (Yu et al. 2022, section 3.2)."""

    def __init__(self, inner: Quantizer, dim: int, narrow: int) -> None:
        super().__init__()
        self.inner = inner
        self.sizes = inner.sizes
        self.down = nn.Linear(dim, narrow)
        self.up = nn.Linear(narrow, dim)

    def forward(self, z: Tensor) -> Quantized:
        with torch.autocast(z.device.type, enabled=False):
            out = self.inner(F.linear(z.float(), self.down.weight.float(), self.down.bias.float()))
            return out._replace(z=self._up(out.z))

    def lookup(self, codes: Tensor) -> Tensor:
        return self._up(self.inner.lookup(codes))

    def gather(self, step: int) -> list[Tensor]:
        return self.inner.gather(step)

    def collect(self) -> None:
        self.inner.collect()

    def learn(self, totals: Iterator[Tensor], step: int, lr: float) -> None:
        self.inner.learn(totals, step, lr)

    def usages(self, clear: bool) -> list[Usage]:
        return self.inner.usages(clear)

    def _up(self, z: Tensor) -> Tensor:
        return F.linear(z, self.up.weight.float(), self.up.bias.float())


class StraightThrough(torch.autograd.Function):
    """z + sg[e − z], without its rounding and its two passes over memory."""

    @staticmethod
    def forward(ctx: FunctionCtx, z: Tensor, e: Tensor) -> Tensor:
        del ctx, z
        return e.view_as(e)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:
        del ctx
        return gradient, None


def pass_through(z: Tensor, e: Tensor, how: str) -> Tensor:
    """Returns e with a gradient for z. z, e: [..., D]. "straight-through" copies the gradient (van den Oord et al.
    2017). "rotation" rotates and scales it as z is rotated and scaled to become e (Fifty et al. 2024, "Restructuring
    vector quantization with the rotation trick", equation 4).

    The scale ‖e‖ / ‖z‖ is unbounded near z = 0. The authors' code adds 1e-6 to the lengths, which still allows a
    gradient scale of a million at z = 0; here the scale is at most MOST. z = 0 has no direction and is not rotated.
    """
    if how == "straight-through":
        return StraightThrough.apply(z, e)
    e, length = e.detach(), z.detach().norm(dim=-1, keepdim=True)
    to = F.normalize(e, dim=-1)
    from_ = torch.where(length > TINY, z.detach() / length.clamp(min=TINY), to)
    between = F.normalize(from_ + to, dim=-1)
    turned = z - 2 * (z * between).sum(-1, keepdim=True) * between + 2 * (z * from_).sum(-1, keepdim=True) * to
    scale = (e.norm(dim=-1, keepdim=True) / length.clamp(min=TINY)).clamp(max=MOST)
    return StraightThrough.apply(turned * scale, e)  # if the scale is clamped, the product differs from e
