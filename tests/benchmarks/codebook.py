"""Compares nearest-code search and usage statistics with other implementations.

Command: `python tests/benchmarks/codebook.py [--rounds N]`. Both sides take turns in this process, on all of its
threads, and also on a GPU if there is one. A ratio is the median over rounds of theirs ÷ ours in seconds. The table
also has lower bounds: the search's matrix product alone, and on a GPU the roofline, the larger of operations over the
speed of an fp32 matrix product and bytes over the speed of a copy, both measured on that GPU. faiss-cpu and
vector-quantize-pytorch are in the extra `benchmark`; flash-kmeans is included on a GPU if it is installed.
"""

import argparse
from collections.abc import Iterator
from importlib.util import find_spec
from typing import NamedTuple

import torch
import torch.nn.functional as F
from paired import Work, clock_of, paired, synchronised
from torch import Tensor

from vaescale.nn.nearest import nearest, tile_of
from vaescale.nn.quantize import Config, VectorQuantizer

ROWS = {"cpu": 8192, "cuda": 65536}
SHAPES = ((64, 512), (256, 1024), (64, 8192), (8, 16384), (8, 262144))  # (D, K)
LARGEST = 16384  # codes up to which an N×K matrix is still held beside; beyond, 8 GiB would be needed
TIE = 1e-6  # of the squared distance, relative to it


class Pair(NamedTuple):
    what: str
    theirs: Work
    ours: Work
    target: float | None = None  # theirs ÷ ours, at least


class Peak(NamedTuple):
    operations: float  # of fp32 matrix products, per ms
    bytes: float  # read and written by a copy, per ms


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    parser.add_argument("--only", choices=devices, help="this device")
    rounds, only = vars(parser.parse_args()).values()
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {rounds} rounds\n")
    print("| search and statistics | on | N | D | K | theirs, ms | ours, ms | theirs ÷ ours | target |")
    print("|---|---|---|---|---|---|---|---|---|")
    for device in (only,) if only else devices:
        clock = clock_of(device)
        peak = None if device == "cpu" else measure_peak()
        for dim, codes in SHAPES:
            where = f"{device} | {ROWS[device]} | {dim} | {codes}"
            generator = torch.Generator().manual_seed(0)
            z = torch.randn(ROWS[device], dim, generator=generator).to(device)
            codebook = torch.randn(codes, dim, generator=generator).to(device)
            check(z, codebook)
            for pair in [*searches(z, codebook), *statistics(z, codebook), *steps(z, codebook)]:
                try:
                    theirs, ours, ratio = paired(pair.theirs, pair.ours, 1, rounds, clock)
                except torch.cuda.OutOfMemoryError:
                    print(f"| {pair.what} | {where} | out of memory | | | |", flush=True)
                    continue
                line(pair.what, where, theirs, ours, ratio, pair.target)
                if peak and pair.what.endswith("alone"):
                    least = roofline(peak, len(z), dim, codes, "product" in pair.what)
                    line(f"{pair.what.split(' alone')[0]}: the roofline", where, least, ours, least / ours, None)


def line(what: str, where: str, theirs: float, ours: float, ratio: float, target: float | None) -> None:
    aim = "" if target is None else f"≥ {target:.3g}, {'met' if ratio >= target else 'missed'}"
    print(f"| {what} | {where} | {theirs:.2f} | {ours:.2f} | {ratio:.2f} | {aim} |", flush=True)


def searches(z: Tensor, codebook: Tensor) -> Iterator[Pair]:
    few, large = len(codebook) <= 1024, len(codebook) > LARGEST

    def ours() -> Tensor:
        return nearest(z, codebook)

    cpu = not z.is_cuda
    # The other shapes have so few channels that the product is not most of the work.
    least = 1 / 1.25 if cpu and z.shape[1] >= 64 else None
    yield Pair("the search's matrix product alone", lambda: product(z, codebook), ours, least)
    if not large:
        yield Pair(
            "torch.cdist", lambda: torch.cdist(z, codebook).argmin(1), ours, (1.25 if few else 2.2) if cpu else None
        )
        expanded_target = (1.8 if few else 5) if cpu else None
        yield Pair("the expanded form (taming, LlamaGen)", lambda: expanded(z, codebook), ours, expanded_target)
    if find_spec("faiss") and not z.is_cuda:
        import faiss

        index = faiss.IndexFlatL2(z.shape[1])
        index.add(codebook.numpy())
        yield Pair("faiss-cpu", lambda: index.search(z.numpy(), 1), ours, 1.9)
    if find_spec("flash_kmeans") and z.is_cuda:
        from flash_kmeans.assign_euclid_triton import euclid_assign_triton

        squares = z.square().sum(1)[None]
        yield Pair("flash-kmeans", lambda: euclid_assign_triton(z[None], codebook[None], squares), ours)


def statistics(z: Tensor, codebook: Tensor) -> Iterator[Pair]:
    found = nearest(z, codebook)
    quantizer = VectorQuantizer(Config(codebook_size=len(codebook), dim=z.shape[1]), 0)

    def ours() -> tuple[Tensor, Tensor]:
        return quantizer._sums(z, found)

    if len(codebook) <= LARGEST:
        yield Pair("one-hot statistics", lambda: one_hot_statistics(z, found, len(codebook)), ours, 40)
    yield Pair("the statistics' index_add_ alone", lambda: bare(z, found, len(codebook)), ours, 1 / 1.2)


def steps(z: Tensor, codebook: Tensor) -> Iterator[Pair]:
    if not find_spec("vector_quantize_pytorch") or len(codebook) > LARGEST:
        return
    from vector_quantize_pytorch import VectorQuantize

    codes, dim = codebook.shape
    theirs = VectorQuantize(dim=dim, codebook_size=codes, kmeans_init=False, threshold_ema_dead_code=2).to(z.device)
    ours = VectorQuantizer(Config(codebook_size=codes, dim=dim), 0).to(z.device)
    target = 5 if codes <= 1024 else 12
    what = "vector-quantize-pytorch, a training step"
    yield Pair(what, lambda: theirs(z[None]), lambda: (ours(z), ours.update(11, 0.0)), None if z.is_cuda else target)


def check(z: Tensor, codebook: Tensor) -> None:
    """Checks that the chosen code is the nearest one in float64, or tied with it."""
    chosen = nearest(z, codebook)
    for part, codes in zip(z.split(256), chosen.split(256), strict=True):
        distances = torch.cdist(part.double(), codebook.double()).square()
        least = distances.min(1).values
        assert (distances.gather(1, codes[:, None])[:, 0] <= least * (1 + TIE) + TIE).all()


def product(z: Tensor, codebook: Tensor) -> None:
    """Computes all products z·e in tiles of the search's size, each over the last: a bound for any fp32 search."""
    most = tile_of(z.device)
    columns = min(most.columns, len(codebook))
    tile = z.new_empty(most.rows(columns), columns)
    for rows in z.split(len(tile)):
        for codes in codebook.split(columns):
            torch.mm(rows, codes.t(), out=tile[: len(rows), : len(codes)])


def expanded(z: Tensor, codebook: Tensor) -> Tensor:
    """Searches with ‖z‖² + ‖e‖² − 2 z·e as one N×K matrix."""
    distances = (
        z.square().sum(1, keepdim=True) + codebook.square().sum(1) - 2 * torch.einsum("nd,dk->nk", z, codebook.t())
    )
    return distances.argmin(1)


def one_hot_statistics(z: Tensor, codes: Tensor, size: int) -> tuple[Tensor, Tensor]:
    chosen = F.one_hot(codes, size).to(z.dtype)
    return chosen.sum(0), chosen.t() @ z


def bare(z: Tensor, codes: Tensor, size: int) -> tuple[Tensor, Tensor]:
    return z.new_zeros(size, z.shape[1]).index_add_(0, codes, z), torch.bincount(codes, minlength=size)


def measure_peak() -> Peak:
    a, b = torch.randn(2, 8192, 8192, device="cuda")
    copy = torch.empty_like(a)
    product, copied, _ = paired(lambda: torch.mm(a, b, out=copy), lambda: copy.copy_(a), 1, 9, synchronised)
    return Peak(2 * 8192**3 / product, 2 * a.numel() * a.element_size() / copied)


def roofline(peak: Peak, rows: int, dim: int, codes: int, search: bool) -> float:
    """Returns the least milliseconds that the operations and bytes of a search, or of the sums and counts, can take."""
    numbers = 4 * dim * (rows + codes) + 8 * rows  # z, the codebook or its sums, the codes found
    operations = 2 * rows * dim * codes if search else rows * dim
    return max(operations / peak.operations, numbers / peak.bytes)


if __name__ == "__main__":
    main()
