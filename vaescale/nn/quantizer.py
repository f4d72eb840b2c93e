"""What all quantisers are, and how small ones combine.

What a codebook learns from is, for every way of learning, the number n_k and the sum s_k of the encoder outputs given
to each code. `gather` collects them over the micro-batches of a step, `update` sums those of all codebooks over the
ranks in one all-reduce, and `learn` applies them once a step. So one step at any world size and any accumulation is
one step on the joined batch, and all ranks compute the same bits from the same sums.

Shapes: D channels, L codebooks of one quantiser.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from .. import distributed
from ..interfaces import Quantized, Usage
from .codebook import Tally

MOST = 100.0  # of the rotation trick's scale of a gradient
TINY = 1e-12  # a length below which a row has no direction


class Quantizer(nn.Module, ABC):
    """sizes: K of each of its codebooks, coarse to fine. Codes are int64 [...] of one codebook, [..., L] of several."""

    sizes: tuple[int, ...]
    tally: Tally  # of a quantiser that has one codebook
    ready: bool | Tensor = True  # whether what it is given means something yet, so that it may be initialised from it

    @abstractmethod
    def forward(self, z: Tensor) -> Quantized:
        """z: [..., D] of any float type → z fp32 [..., D], codes, loss, commitment [L]; an fp32 island."""

    @abstractmethod
    def lookup(self, codes: Tensor) -> Tensor:
        """Codes → fp32 [..., D], what `forward` gave with them."""

    def gather(self, step: int) -> list[Tensor]:
        """Sums over this rank's rows since the last call, to be summed over the ranks; here, of a quantiser whose
        codes do not move by themselves, their counts."""
        del step
        return [self.tally.take()]

    def learn(self, totals: Iterator[Tensor], step: int, lr: float) -> None:
        """Take its own totals, as many as it gathered, and learn from them."""
        del step, lr
        self.tally.count(next(totals))

    def usages(self, clear: bool) -> list[Usage]:
        """One a codebook."""
        return [self.tally.usage(clear)]

    def placed(self) -> bool | Tensor:
        """bool []: its codes mean something: they are initialised, or need not be."""
        return True

    @torch.no_grad()
    def update(self, step: int, lr: float) -> None:
        """Learn from the step's rows; collective: all ranks call it at the same steps. No host synchronisation."""
        parts = self.gather(step)
        flat = distributed.sum_(torch.cat([part.flatten() for part in parts]))
        totals = flat.split([part.numel() for part in parts])
        self.learn(iter([total.view_as(part) for total, part in zip(totals, parts, strict=True)]), step, lr)


class _Several(Quantizer):
    """Codes [..., L]: those of its parts one after the other."""

    def __init__(self, parts: Sequence[Quantizer]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.sizes = tuple(size for part in parts for size in part.sizes)

    def gather(self, step: int) -> list[Tensor]:
        return [total for part in self._parts() for total in part.gather(step)]

    def learn(self, totals: Iterator[Tensor], step: int, lr: float) -> None:
        for part in self._parts():
            part.learn(totals, step, lr)

    def usages(self, clear: bool) -> list[Usage]:
        return [usage for part in self._parts() for usage in part.usages(clear)]

    def _parts(self) -> list[Quantizer]:
        return list(self.parts)  # type: ignore[arg-type]  # a ModuleList forgets what it holds

    def _divided(self, codes: Tensor) -> list[Tensor]:
        """[..., L] → what each part gave."""
        pieces = codes.split([len(part.sizes) for part in self._parts()], dim=-1)
        return [
            piece.squeeze(-1) if len(part.sizes) == 1 else piece
            for piece, part in zip(pieces, self._parts(), strict=True)
        ]

    def _joined(self, outs: Sequence[Quantized]) -> tuple[Tensor, Tensor, Tensor]:
        """(codes [..., L], loss, commitment [L]); the loss is the mean over the parts."""
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
    """Each codebook quantises what the ones before leave over (Lee et al. 2022, "Autoregressive image generation using
    residual quantization", section 3.1).

    With the cosine metric rows are brought to length 1 once, before the first codebook; from there on distances are
    Euclidean, since what is left over is shorter than that. The output is the sum of the codes, of length 1 up to the
    error that the last codebook leaves.
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
        """A codebook is initialised from what the ones before left over, so only after they were."""
        ready: bool | Tensor = True
        for part in self._parts():
            part.ready, ready = ready, ready & part.placed()  # as this step's rows were given
            part.learn(totals, step, lr)

    def lookup(self, codes: Tensor) -> Tensor:
        pieces = zip(self._parts(), self._divided(codes), strict=True)
        return torch.stack([part.lookup(piece) for part, piece in pieces]).sum(0)


class Projected(Quantizer):
    """Codes compared in a few channels, behind a linear map (Yu et al. 2022, section 3.2)."""

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

    def learn(self, totals: Iterator[Tensor], step: int, lr: float) -> None:
        self.inner.learn(totals, step, lr)

    def usages(self, clear: bool) -> list[Usage]:
        return self.inner.usages(clear)

    def _up(self, z: Tensor) -> Tensor:
        return F.linear(z, self.up.weight.float(), self.up.bias.float())


class StraightThrough(torch.autograd.Function):
    """z + sg[e − z], without the two passes over memory and their rounding."""

    @staticmethod
    def forward(ctx: FunctionCtx, z: Tensor, e: Tensor) -> Tensor:
        del ctx, z
        return e.view_as(e)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:
        del ctx
        return gradient, None


def pass_through(z: Tensor, e: Tensor, how: str) -> Tensor:
    """e, with a gradient for z: the same one (van den Oord et al. 2017), or turned and scaled as z is to become e
    (Fifty et al. 2024, "Restructuring vector quantization with the rotation trick", equation 4). z, e: [..., D].

    The scale ‖e‖ / ‖z‖ has no bound where z is near 0. The authors' code adds 1e-6 to the lengths, which leaves a
    gradient of a million at z = 0; here the scale is at most MOST. z = 0 has no direction and is not turned.
    """
    if how == "straight-through":
        return StraightThrough.apply(z, e)
    e, length = e.detach(), z.detach().norm(dim=-1, keepdim=True)
    to = F.normalize(e, dim=-1)
    from_ = torch.where(length > TINY, z.detach() / length.clamp(min=TINY), to)
    between = F.normalize(from_ + to, dim=-1)
    turned = z - 2 * (z * between).sum(-1, keepdim=True) * between + 2 * (z * from_).sum(-1, keepdim=True) * to
    scale = (e.norm(dim=-1, keepdim=True) / length.clamp(min=TINY)).clamp(max=MOST)
    return StraightThrough.apply(turned * scale, e)  # where the scale is clamped, the product is not e
