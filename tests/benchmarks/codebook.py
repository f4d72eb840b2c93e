"""Nearest codes and their statistics against what others do: `python tests/benchmarks/codebook.py [--rounds N]`.

Both sides run in this one process by turns, on all of its threads; a ratio is the median over rounds of theirs ÷ ours
in seconds. faiss-cpu and vector-quantize-pytorch stand beside where they are installed: `pip install --no-deps
faiss-cpu vector-quantize-pytorch einx frozendict torch-einops-utils loguru`.
"""

import argparse
import time
from importlib.util import find_spec
from typing import NamedTuple

import torch
import torch.nn.functional as F
from paired import Work, paired
from torch import Tensor

from vaescale.nn.nearest import nearest
from vaescale.nn.quantize import Config, VectorQuantizer

ROWS = 8192
SHAPES = ((64, 512), (256, 1024), (64, 8192), (8, 16384), (8, 262144))  # (D, K)
LARGEST = 16384  # codes up to which an N×K matrix is still held beside; beyond, 8 GiB would be needed
TIE = 1e-6  # of the squared distance, relative to it


class Row(NamedTuple):
    what: str
    shape: tuple[int, int]
    theirs: float  # milliseconds
    ours: float
    ratio: float
    target: str


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    print(f"{ROWS} rows, {torch.get_num_threads()} threads, torch {torch.__version__}, {rounds} rounds\n")
    print("| search and statistics | D | K | theirs, ms | ours, ms | theirs ÷ ours | target |")
    print("|---|---|---|---|---|---|---|")
    for shape in SHAPES:
        for row in compare(*shape, rounds):
            times = f"{row.theirs:.2f} | {row.ours:.2f} | {row.ratio:.2f}"
            print(f"| {row.what} | {row.shape[0]} | {row.shape[1]} | {times} | {row.target} |", flush=True)


def compare(dim: int, codes: int, rounds: int) -> list[Row]:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(ROWS, dim, generator=generator)
    codebook = torch.randn(codes, dim, generator=generator)
    check(z, codebook)
    few = codes <= 1024
    found = nearest(z, codebook)
    ours = VectorQuantizer(Config(codes=codes, dim=dim), 0)
    searches: dict[str, tuple[Work, Work, str]] = {}
    if codes <= LARGEST:
        searches["torch.cdist"] = (
            lambda: torch.cdist(z, codebook).argmin(1),
            lambda: nearest(z, codebook),
            aim(few, 1.25, 2.2),
        )
        searches["the expanded form (taming, LlamaGen)"] = (
            lambda: expanded(z, codebook),
            lambda: nearest(z, codebook),
            aim(few, 1.8, 5),
        )
        searches["one-hot statistics"] = (
            lambda: one_hot_statistics(z, found, codes),
            lambda: ours._sums(z, found),
            "≥ 40",
        )
    searches["bare index_add_"] = lambda: bare(z, found, codes), lambda: ours._sums(z, found), "≥ 0.83"
    if find_spec("faiss"):
        import faiss

        index = faiss.IndexFlatL2(dim)
        index.add(codebook.numpy())
        searches["faiss-cpu"] = lambda: index.search(z.numpy(), 1), lambda: nearest(z, codebook), "≥ 1.9"
    if find_spec("vector_quantize_pytorch") and codes <= LARGEST:
        from vector_quantize_pytorch import VectorQuantize

        theirs = VectorQuantize(dim=dim, codebook_size=codes, kmeans_init=False, threshold_ema_dead_code=2).train()
        searches["vector-quantize-pytorch, a training step"] = (
            lambda: theirs(z[None]),
            lambda: (ours(z), ours.update(11, 0.0)),
            aim(few, 5, 12),
        )
    return [
        Row(name, (dim, codes), *paired(a, b, 1, rounds, time.perf_counter), target)
        for name, (a, b, target) in searches.items()
    ]


def aim(few: bool, small: float, large: float) -> str:
    return f"≥ {small if few else large:g}"


def check(z: Tensor, codebook: Tensor) -> None:
    """The chosen code is the nearest one in float64, or tied with it."""
    chosen = nearest(z, codebook)
    for rows in torch.arange(len(z)).split(256):
        distances = torch.cdist(z[rows].double(), codebook.double()).square()
        least = distances.min(1).values
        assert (distances[torch.arange(len(rows)), chosen[rows]] <= least * (1 + TIE) + TIE).all()


def expanded(z: Tensor, codebook: Tensor) -> Tensor:
    """‖z‖² + ‖e‖² − 2 z·e as one N×K matrix."""
    distances = (
        z.square().sum(1, keepdim=True) + codebook.square().sum(1) - 2 * torch.einsum("nd,dk->nk", z, codebook.t())
    )
    return distances.argmin(1)


def one_hot_statistics(z: Tensor, codes: Tensor, size: int) -> tuple[Tensor, Tensor]:
    chosen = F.one_hot(codes, size).to(z.dtype)
    return chosen.sum(0), chosen.t() @ z


def bare(z: Tensor, codes: Tensor, size: int) -> tuple[Tensor, Tensor]:
    return z.new_zeros(size, z.shape[1]).index_add_(0, codes, z), torch.bincount(codes, minlength=size)


if __name__ == "__main__":
    main()
