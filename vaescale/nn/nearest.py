"""Nearest-code search without an N×K matrix."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..numerics import TRITON, exact


class Tile(NamedTuple):
    """The largest part of an N×K matrix that is held at once."""

    numbers: int
    columns: int  # most codes; with fewer codes a tile holds more rows

    def rows(self, codes: int) -> int:
        return max(1, self.numbers // min(self.columns, codes))


CPU = Tile(2**20, 4096)  # 4 MiB, which stay in the cache between the product and the minimum
GPU = Tile(2**25, 2**15)  # 128 MiB: each tile costs some launches, and small ones leave most of the device idle
BLOCK = 64  # codes whose minimum is computed without its index
SAMPLED = 32  # rows whose median is computed; sorting them takes a small part of a search


@torch.no_grad()
def nearest(z: Tensor, codebook: Tensor) -> Tensor:
    """Returns for each row of `z` the index of the codebook row at the smallest Euclidean distance.

    z: fp32 [N, D], codebook: fp32 [K, D] → int64 [N]. Ties go to the lowest index; a row that is not finite gets an
    arbitrary code. The search minimises ‖e − c‖²/2 − (z − c)·(e − c), which for any c orders the codes as ‖z − e‖²
    does. Without a c near the rows (see `centre`), products far from the origin would round away the differences
    between codes. Products are fp32, whatever precision is allowed elsewhere. Extra memory on a CPU: 12 MiB, N + K
    numbers and 4096 codes, whatever N·K. On CUDA with Triton a single kernel does the search.
    """
    if torch.compiler.is_exporting():
        return _plain(z, codebook)
    if not len(z):
        return torch.empty(0, dtype=torch.int64, device=z.device)
    c = centre(z, codebook)
    parts = codebook.split(tile_of(z.device).columns)
    return _search(z, codebook, c, torch.cat([(part - c).square().sum(1) for part in parts]).div_(2))


def _plain(z: Tensor, codebook: Tensor) -> Tensor:
    """The search for exported programs: one N×K matrix and no operation of our own, for any number of rows."""
    c = codebook.mean(0)
    near = codebook - c
    return (near.square().sum(1) / 2 - (z - c) @ near.T).argmin(1)


@torch.library.custom_op("vaescale::nearest", mutates_args=())  # one operation for torch.compile and for profilers
def _search(z: Tensor, codebook: Tensor, c: Tensor, half_norms: Tensor) -> Tensor:
    """half_norms: ‖e − c‖²/2, fp32 [K]."""
    with exact():
        if z.is_cuda and TRITON:
            from .nearest_triton import search  # imported late: it takes a second and is rarely needed

            return search(z, codebook, c, half_norms)
        return _tiled(z, codebook, c, half_norms)


@_search.register_fake
def _(z: Tensor, codebook: Tensor, c: Tensor, half_norms: Tensor) -> Tensor:
    del codebook, c, half_norms
    return torch.empty(len(z), dtype=torch.int64, device=z.device)


def tile_of(device: torch.device) -> Tile:
    return CPU if device.type == "cpu" else GPU


def centre(z: Tensor, codebook: Tensor) -> Tensor:
    """z [N, D], codebook [K, D] → c [D]: the code nearest to the median of some rows, but 0 in channels where that code
    is near 0 compared with the spread of the rows.

    c is near the rows, because it is their codes that must be distinguished. It is a code, because the codes may be far
    from the rows: most of them if they are dead, all of them at the start. A code's value also keeps integers exact.
    """
    some = z[:: -(-len(z) // SAMPLED)].sort(0).values
    low, middle, high = (some[len(some) * quarter // 4] for quarter in (1, 2, 3))
    squares = torch.cat([(part - middle).square().sum(1) for part in codebook.split(tile_of(z.device).columns)])
    c = codebook.index_select(0, squares.argmin(keepdim=True)).squeeze(0)
    return torch.where(c.abs() > 16 * torch.minimum(middle - low, high - middle), c, 0.0)


def _tiled(z: Tensor, codebook: Tensor, c: Tensor, half_norms: Tensor) -> Tensor:
    """Searches tile by tile. On a CPU a minimum with its index takes ten times as long as one without, and longer than
    the product if there are few channels. So the minimum of each block of codes is computed without an index, and the
    index is looked up in the best block only, by comparing its numbers with their minimum."""
    most = tile_of(z.device)
    count = -(-len(codebook) // most.columns)
    columns = -(-len(codebook) // (count * BLOCK)) * BLOCK
    rows = min(most.rows(columns), max(1, most.numbers // z.shape[1]), len(z))
    scores, centred = z.new_empty(rows, columns), z.new_empty(rows, z.shape[1])
    first = torch.arange(0, rows * columns // BLOCK, columns // BLOCK, device=z.device)  # block of each row
    places = torch.arange(-BLOCK, 0, device=z.device, dtype=z.dtype)  # in a block, counted from the next block
    best = z.new_empty(len(z))
    codes = torch.empty(len(z), dtype=torch.int64, device=z.device)
    for k, (some, norms) in enumerate(_parts(codebook, c, half_norms, columns)):
        for i in range(0, len(z), rows):
            part = slice(i, min(i + rows, len(z)))
            tile = scores[: part.stop - i]
            near = torch.sub(z[part], c, out=centred[: part.stop - i])
            torch.addmm(norms, near, some.t(), alpha=-1, out=tile)
            blocks = tile.view(-1, columns // BLOCK, BLOCK)
            value, block = blocks.amin(2).min(1)
            same = blocks.flatten(0, 1).index_select(0, first[: part.stop - i] + block).eq_(value[:, None])  # 1 or 0
            code = same.mul_(places).amin(1).long().add_(block.add_(1), alpha=BLOCK)
            if k == 0:
                best[part], codes[part] = value, code
            else:
                closer = value < best[part]  # strictly: an equal distance keeps the lower index
                best[part] = torch.where(closer, value, best[part])
                codes[part] = torch.where(closer, code.add_(k * columns), codes[part])
    return codes.clamp_(max=len(codebook) - 1)  # inf · 0 is NaN: rows that are not finite may choose a padding code


def _parts(codebook: Tensor, c: Tensor, half_norms: Tensor, columns: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(e − c, ‖e − c‖²/2) of the codebook in equal parts of whole blocks. The last part is padded with codes at
    infinite distance: a matrix product rounds columns beyond a multiple of its kernel's width differently, so that
    equal codes would not tie."""
    for part, norms in zip(codebook.split(columns), half_norms.split(columns), strict=True):
        missing = columns - len(part)
        yield F.pad(part - c, (0, 0, 0, missing)), F.pad(norms, (0, missing), value=torch.inf)
