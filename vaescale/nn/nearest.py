"""Nearest codes without an N×K matrix."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 2**20  # scores at a time: 4 MiB, which a CPU's cache holds between the product and the minimum
COLUMNS = 4096  # of them at most; fewer codes leave room for more rows
BLOCK = 64  # codes whose minimum is taken without its place
TRITON = find_spec("triton") is not None  # CUDA builds of torch bring it along


@torch.no_grad()
def nearest(z: Tensor, codebook: Tensor) -> Tensor:
    """For each row of `z` the row of `codebook` at the smallest Euclidean distance.

    z: fp32 [N, D], codebook: fp32 [K, D] → int64 [N]; ties go to the lowest index, and a row that is not finite gets
    some code. Minimises ‖e‖²/2 − z·e, which orders the codes as ‖z − e‖² does, in fp32 whatever precision is allowed
    for other products. Extra memory: 8 MiB, K numbers and 4096 codes, whatever N·K. On CUDA with Triton one kernel
    does it all.
    """
    with exact(z.device):
        half_norms = torch.cat([part.square().sum(1) for part in codebook.split(COLUMNS)]).div_(2)
        if z.is_cuda and TRITON:
            from .nearest_triton import search  # Triton's import takes a second and is needed nowhere else

            return search(z, codebook, half_norms)
        return _tiled(z, codebook, half_norms)


def _tiled(z: Tensor, codebook: Tensor, half_norms: Tensor) -> Tensor:
    """A CPU's minimum that also tells the place takes ten times as long as one that does not, and longer than the
    product for few channels. So the latter is taken of blocks of codes, and the place is sought in the best block."""
    parts = _parts(codebook, half_norms)
    columns = len(parts[0][0])
    rows = min(TILE // columns, max(len(z), 1))
    scores = z.new_empty(rows, columns)
    first = torch.arange(0, rows * columns // BLOCK, columns // BLOCK, device=z.device)  # block of each row
    codes = torch.empty(len(z), dtype=torch.int64, device=z.device)
    for i in range(0, len(z), rows):
        part = z[i : i + rows]
        tile, place = scores[: len(part)], first[: len(part)]
        for k, (some, norms) in enumerate(parts):
            torch.addmm(norms, part, some.t(), alpha=-1, out=tile)
            blocks = tile.view(-1, columns // BLOCK, BLOCK)
            value, block = blocks.amin(2).min(1)
            code = blocks.flatten(0, 1).index_select(0, place + block).argmin(1).add_(block, alpha=BLOCK)
            if k == 0:
                best, chosen = value, code
            else:
                closer = value < best  # strictly: an equal distance keeps the lower index
                best = torch.where(closer, value, best)
                chosen = torch.where(closer, code.add_(k * columns), chosen)
        codes[i : i + rows] = chosen
    return codes.clamp_(max=len(codebook) - 1)  # inf · 0 is NaN: rows that are not finite may choose a code far away


def _parts(codebook: Tensor, half_norms: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The codebook in equal parts of whole blocks, with codes infinitely far away at the end: a matrix product rounds
    the columns that its kernel's width leaves over differently, and equal codes would not tie."""
    count = -(-len(codebook) // COLUMNS)
    columns = -(-len(codebook) // (count * BLOCK)) * BLOCK
    parts = list(zip(codebook.split(columns), half_norms.split(columns), strict=True))
    last, norms = parts[-1]
    missing = columns - len(last)
    parts[-1] = F.pad(last, (0, 0, 0, missing)), F.pad(norms, (0, missing), value=torch.inf)
    return parts


@contextmanager
def exact(device: torch.device) -> Iterator[None]:
    """fp32 products in fp32, also where TF32 or bf16 are allowed for them (`torch.set_float32_matmul_precision`)."""
    backend = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    products = backend.matmul
    allowed = products.fp32_precision
    if allowed in ("ieee", "none"):
        yield
        return
    products.fp32_precision = "ieee"
    try:
        yield
    finally:
        products.fp32_precision = allowed
