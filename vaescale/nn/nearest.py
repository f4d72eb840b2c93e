"""Nearest-code search without an N×K matrix."""

from collections.abc import Iterator
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from ..numerics import exact

TILE = 2**20  # numbers per tile: 4 MiB, which stay in a CPU's cache between the product and the minimum
COLUMNS = 4096  # most codes per tile; with fewer codes a tile holds more rows
BLOCK = 64  # codes whose minimum is computed without its index
SAMPLED = 32  # rows whose median is computed; sorting them takes a small part of a search
TRITON = find_spec("triton") is not None  # comes with CUDA builds of torch


@torch.no_grad()
def nearest(z: Tensor, codebook: Tensor) -> Tensor:
    """Returns for each row of `z` the index of the codebook row at the smallest Euclidean distance.

    z: fp32 [N, D], codebook: fp32 [K, D] → int64 [N]. Ties go to the lowest index; a row that is not finite gets an
    arbitrary code. The search minimises ‖e − c‖²/2 − (z − c)·(e − c), which for any c orders the codes as ‖z − e‖²
    does. Without a c near the rows (see `centre`), products far from the origin would round away the differences
    between codes. Products are fp32, whatever precision is allowed elsewhere. Extra memory: 12 MiB, N + K numbers and
    4096 codes, whatever N·K. On CUDA with Triton a single kernel does the search.
    """
    if not len(z):
        return torch.empty(0, dtype=torch.int64, device=z.device)
    with exact():
        c = centre(z, codebook)
        if z.is_cuda and TRITON:
            from .nearest_triton import search  # imported late: it takes a second and is rarely needed

            half_norms = torch.cat([(part - c).square().sum(1) for part in codebook.split(COLUMNS)]).div_(2)
            return search(z, codebook, c, half_norms)
        return _tiled(z, codebook, c)


def centre(z: Tensor, codebook: Tensor) -> Tensor:
    """z [N, D], codebook [K, D] → c [D]: the code nearest to the median of some rows, but 0 in channels where that code
    is near 0 compared with the spread of the rows.

    c is near the rows, because it is their codes that must be distinguished. It is a code, because the codes may be far
    from the rows: most of them if they are dead, all of them at the start. A code's value also keeps integers exact.
    """
    some = z[:: -(-len(z) // SAMPLED)].sort(0).values
    low, middle, high = (some[len(some) * quarter // 4] for quarter in (1, 2, 3))
    squares = torch.cat([(part - middle).square().sum(1) for part in codebook.split(COLUMNS)])
    c = codebook.index_select(0, squares.argmin(keepdim=True)).squeeze(0)
    return torch.where(c.abs() > 16 * torch.minimum(middle - low, high - middle), c, 0.0)


def _tiled(z: Tensor, codebook: Tensor, c: Tensor) -> Tensor:
    """Searches tile by tile. On a CPU a minimum with its index takes ten times as long as one without, and longer than
    the product if there are few channels. So the minimum of each block of codes is computed without an index, and the
    index is looked up in the best block only."""
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
    return codes.clamp_(max=len(codebook) - 1)  # inf · 0 is NaN: rows that are not finite may choose a padding code


def _parts(codebook: Tensor, c: Tensor, columns: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(e − c, ‖e − c‖²/2) of the codebook in equal parts of whole blocks. The last part is padded with codes at
    infinite distance: a matrix product rounds columns beyond a multiple of its kernel's width differently, so that
    equal codes would not tie."""
    for part in codebook.split(columns):
        some = part - c
        norms = some.square().sum(1).div_(2)
        missing = columns - len(some)
        yield F.pad(some, (0, 0, 0, missing)), F.pad(norms, (0, missing), value=torch.inf)
