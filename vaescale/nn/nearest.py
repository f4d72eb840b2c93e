"""Nearest codes without an N×K matrix."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 2**20  # numbers at a time: 4 MiB, which a CPU's cache holds between the product and the minimum
COLUMNS = 4096  # codes at a time at most; fewer leave room for more rows
BLOCK = 64  # codes whose minimum is taken without its place
SAMPLED = 32  # rows whose median is taken: their sort is a small part of a search
TRITON = find_spec("triton") is not None  # CUDA builds of torch bring it along


@torch.no_grad()
def nearest(z: Tensor, codebook: Tensor) -> Tensor:
    """For each row of `z` the row of `codebook` at the smallest Euclidean distance.

    z: fp32 [N, D], codebook: fp32 [K, D] → int64 [N]; ties go to the lowest index, and a row that is not finite gets
    some code. Minimises ‖e − c‖²/2 − (z − c)·(e − c), which orders the codes as ‖z − e‖² does for any c, in fp32
    whatever precision is allowed for other products. `centre` chooses c: far from the origin the products would round
    away the differences between codes. Extra memory: 12 MiB, N + K numbers and 4096 codes, whatever N·K. On CUDA with
    Triton one kernel does it all.
    """
    if not len(z):
        return torch.empty(0, dtype=torch.int64, device=z.device)
    with exact(z.device):
        c = centre(z, codebook)
        if z.is_cuda and TRITON:
            from .nearest_triton import search  # Triton's import takes a second and is needed nowhere else

            half_norms = torch.cat([(part - c).square().sum(1) for part in codebook.split(COLUMNS)]).div_(2)
            return search(z, codebook, c, half_norms)
        return _tiled(z, codebook, c)


def centre(z: Tensor, codebook: Tensor) -> Tensor:
    """[N, D], [K, D] → c [D]: the code nearest to the median of some rows; 0 in channels where that is not far from 0
    for the rows' spread.

    Near the rows, since their codes are to be told apart, and a code, since others may be far away: most of them where
    they are dead, all of them at the beginning. As the value of a code it also keeps whole numbers exact.
    """
    some = z[:: -(-len(z) // SAMPLED)].sort(0).values
    low, middle, high = (some[len(some) * quarter // 4] for quarter in (1, 2, 3))
    squares = torch.cat([(part - middle).square().sum(1) for part in codebook.split(COLUMNS)])
    c = codebook.index_select(0, squares.argmin(keepdim=True)).squeeze(0)
    return torch.where(c.abs() > 16 * torch.minimum(middle - low, high - middle), c, 0.0)


def _tiled(z: Tensor, codebook: Tensor, c: Tensor) -> Tensor:
    """A CPU's minimum that also tells the place takes ten times as long as one that does not, and longer than the
    product for few channels. So the latter is taken of blocks of codes, and the place is sought in the best block."""
    count = -(-len(codebook) // COLUMNS)
    columns = -(-len(codebook) // (count * BLOCK)) * BLOCK
    rows = max(1, min(TILE // columns, TILE // z.shape[1], len(z)))
    scores, centred = z.new_empty(rows, columns), z.new_empty(rows, z.shape[1])
    first = torch.arange(0, rows * columns // BLOCK, columns // BLOCK, device=z.device)  # block of each row
    best = z.new_empty(len(z))
    codes = torch.empty(len(z), dtype=torch.int64, device=z.device)
    for k, (some, norms) in enumerate(_parts(codebook, c, columns)):
        for i in range(0, len(z), rows):
            part = slice(i, min(i + rows, len(z)))
            tile, place = scores[: part.stop - i], first[: part.stop - i]
            near = torch.sub(z[part], c, out=centred[: part.stop - i])
            torch.addmm(norms, near, some.t(), alpha=-1, out=tile)
            blocks = tile.view(-1, columns // BLOCK, BLOCK)
            value, block = blocks.amin(2).min(1)
            code = blocks.flatten(0, 1).index_select(0, place + block).argmin(1).add_(block, alpha=BLOCK)
            if k == 0:
                best[part], codes[part] = value, code
            else:
                closer = value < best[part]  # strictly: an equal distance keeps the lower index
                best[part] = torch.where(closer, value, best[part])
                codes[part] = torch.where(closer, code.add_(k * columns), codes[part])
    return codes.clamp_(max=len(codebook) - 1)  # inf · 0 is NaN: rows that are not finite may choose a code far away


def _parts(codebook: Tensor, c: Tensor, columns: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(e − c, ‖e − c‖²/2) of the codebook in equal parts of whole blocks, with codes infinitely far away at the end: a
    matrix product rounds the columns that its kernel's width leaves over differently, and equal codes would not tie."""
    for part in codebook.split(columns):
        some = part - c
        norms = some.square().sum(1).div_(2)
        missing = columns - len(some)
        yield F.pad(some, (0, 0, 0, missing)), F.pad(norms, (0, missing), value=torch.inf)


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
