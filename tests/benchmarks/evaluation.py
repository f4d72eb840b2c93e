"""Compares distances between sets of images with other implementations, and shows the bias of the Fréchet distance.

Commands: `python tests/benchmarks/evaluation.py [--rounds N] [--only WHAT]` and `… bias`. Both sides take turns in this
process, on all of its threads. A ratio is the median over rounds of theirs ÷ ours in seconds. The features are compared
with torch-fidelity's if that is installed.
"""

import argparse
import statistics
import sys
import tempfile
import time
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from threading import Event, Thread
from typing import NamedTuple

import numpy as np
import psutil
import torch
from paired import Work, paired
from scipy.linalg import sqrtm
from torch import Tensor
from torch.utils.data import Dataset

from tests.nn.fidelity import published, torchvision
from vaescale.evaluation.compare import Gathering
from vaescale.evaluation.feature_statistics import Gatherer, Statistics
from vaescale.evaluation.metrics.frechet import frechet
from vaescale.evaluation.metrics.kernel_distance import kernel_distance
from vaescale.evaluation.metrics.manifold import manifold
from vaescale.nn import features, inception


class Pair(NamedTuple):
    what: str
    theirs: Work
    ours: Work
    target: float  # theirs ÷ ours, at least


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="?", default="speed", choices=["speed", "bias"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dim", type=int, default=2048, help="features (2048, those of Inception)")
    parser.add_argument("--images", type=int, default=5000, help="of each side, for precision and recall (5000)")
    parser.add_argument("--pictures", type=int, default=64, help="whose features are computed (64)")
    parser.add_argument("--only", choices=["frechet", "manifold", "features"])
    given = parser.parse_args()
    if given.what == "bias":
        bias(4 * given.rounds)
        return
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {given.rounds} rounds\n")
    print("| what | theirs, ms | ours, ms | theirs ÷ ours | target | theirs holds | ours holds |")
    print("|---|---|---|---|---|---|---|")
    made = {
        "frechet": lambda: frechet_pair(given.dim),
        "manifold": lambda: manifold_pair(given.dim, given.images),
        "features": lambda: features_pair(given.pictures),
    }
    missing = find_spec("torch_fidelity") is None
    for name in [given.only] if given.only else made:
        if name == "features" and missing:
            continue
        pair = made[name]()
        theirs, ours, ratio = paired(pair.theirs, pair.ours, 1, given.rounds, time.perf_counter)
        aim = f"≥ {pair.target:g}, {'met' if ratio >= pair.target else 'missed'}"
        held = " | ".join(f"{held_by(work) / 2**20:.0f} MiB" for work in (pair.theirs, pair.ours))
        print(f"| {pair.what} | {theirs:.0f} | {ours:.0f} | {ratio:.2f} | {aim} | {held} |", flush=True)
    if missing:
        print("\nThe features were not compared: pip install --no-deps torch-fidelity==0.4.0")


def frechet_pair(dim: int) -> Pair:
    x, y = rows(500, dim, 0), rows(500, dim, 1)
    one, other = gathered(x), gathered(y)
    assert abs(frechet(one, other) / with_sqrtm(one, other) - 1) < 1e-2  # theirs adds 10⁻⁶ to a singular product
    what = f"Fréchet distance, N = 500, D = {dim}"
    return Pair(what, lambda: with_sqrtm(one, other), lambda: frechet(one, other), 20)


def manifold_pair(dim: int, images: int) -> Pair:
    x, y = rows(images, dim, 0), rows(images, dim, 1)
    expected, found = plain_manifold(x, y), manifold(x, y)
    assert all(abs(found[name] - value) < 1e-3 for name, value in expected.items())
    what = f"precision, recall, density, coverage, N = {images}, D = {dim}"
    return Pair(what, lambda: plain_manifold(x, y), lambda: manifold(x, y), 1)


class Pictures(Dataset[Tensor]):
    def __init__(self, x: Tensor) -> None:
        self.x = x

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, number: int) -> Tensor:
        return self.x[number]


def features_pair(count: int) -> Pair:
    """Of random weights, which take as long as the published ones, in batches of 64, the default of theirs."""
    features.CHUNK = min(features.CHUNK, count)  # ours would compute a whole chunk
    sys.modules.update(torchvision())
    utils = import_module("torch_fidelity.utils")
    state = published()
    with tempfile.TemporaryDirectory() as folder:
        torch.save(state, Path(folder, "weights.pth"))
        theirs = utils.create_feature_extractor(
            "inception-v3-compat", ["2048", "logits_unbiased"], cuda=False, verbose=False,
            feature_extractor_weights_path=str(Path(folder, "weights.pth")),
        )  # fmt: skip
    ours = features.Features("inception", inception.own(state), {"source": "", "sha256": ""}, "FID")
    x = torch.randint(0, 256, (count, 3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)

    def loop() -> Tensor:
        found = utils.get_featuresdict_from_dataset(Pictures(x), theirs, 64, False, True, False)
        return torch.as_tensor(found["2048"])

    def gathering() -> Tensor:
        gathering = Gathering([ours], count, x[:1])
        for numbers in torch.arange(count).split(64):
            gathering.add(numbers, x[numbers])
        return gathering.result()["FID"].rows

    expected = loop()
    assert (gathering() - expected).abs().max() < 1e-5 * expected.abs().max()
    return Pair(f"features of Inception and their moments, {count} images of 64 × 64 pixels", loop, gathering, 1)


def rows(count: int, dim: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(count, dim, generator=generator) * torch.logspace(0, -1, dim)).relu()


def gathered(x: Tensor) -> Statistics:
    gatherer = Gatherer(len(x), x.shape[1], 0, x.device)
    gatherer.add(torch.arange(len(x)), x, None)
    return gatherer.result()


def with_sqrtm(one: Statistics, other: Statistics) -> float:
    """As pytorch-fid and torch-fidelity do it: a root of the product, with a constant on the diagonals if that is not
    finite."""
    a, b = one.covariance.numpy(), other.covariance.numpy()
    root = np.asarray(sqrtm(a @ b))
    if not np.isfinite(root).all():
        offset = np.eye(len(a)) * 1e-6
        root = np.asarray(sqrtm((a + offset) @ (b + offset)))
    means = (one.mean - other.mean).square().sum()
    return float(means) + np.trace(a) + np.trace(b) - 2 * np.trace(root.real)


def plain_manifold(x: Tensor, y: Tensor) -> dict[str, float]:
    """With whole matrices of distances."""
    xx, yy, xy = torch.cdist(x, x), torch.cdist(y, y), torch.cdist(x, y)
    near_x, near_y = (one.topk(6, largest=False).values for one in (xx, yy))
    inside = xy <= near_x[:, 5, None]
    return {
        "precision": float((xy <= near_x[:, 3, None]).any(0).double().mean()),
        "recall": float((xy <= near_y[:, 3]).any(1).double().mean()),
        "density": float(inside.sum()) / (5 * len(y)),
        "coverage": float(inside.any(1).double().mean()),
    }


def held_by(work: Work) -> int:
    """Returns the bytes by which this process grows while it works, at most, looking every 2 ms."""
    process, done, most = psutil.Process(), Event(), 0
    before = process.memory_info().rss

    def watch() -> None:
        nonlocal most
        while not done.wait(0.002):
            most = max(most, process.memory_info().rss - before)

    watcher = Thread(target=watch)
    watcher.start()
    work()
    done.set()
    watcher.join()
    return most


def bias(pairs: int, dim: int = 64) -> None:
    print("| images of each side | Fréchet distance | kernel distance, × 1000 |\n|---|---|---|")
    for count in (50, 100, 200, 500, 1000, 5000):
        found = []
        for pair in range(pairs):
            x, y = (
                torch.randn(count, dim, generator=torch.Generator().manual_seed(2 * pair + side)) for side in (0, 1)
            )
            found.append((frechet(gathered(x), gathered(y)), 1000 * kernel_distance(x, y)[0]))
        cells = [f"{statistics.mean(one):.2f} ± {statistics.stdev(one):.2f}" for one in zip(*found, strict=True)]
        print(f"| {count:,} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
