"""Measures how often a classifier of the training images recognises samples as the class they were drawn for.

    python tests/benchmarks/classes.py runs/diffusion_digits --guidance 1 2

The classifier is a support vector machine on pixels. The share of held-out images that it recognises is also printed:
where that is low, those of samples mean little. It is high for digits, and would be low for photographs.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from sklearn.svm import SVC

import vaescale
from vaescale.data import stream

PART = 100  # images read at a time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0])
    parser.add_argument("--count", type=int, default=1000, help="samples, whose classes take turns")
    given = parser.parse_args()
    model = vaescale.load(given.run)
    classifier = SVC(gamma=0.02, C=10).fit(*images(stream.TrainingOnce(model.config.data)))
    print(f"held-out images: {classifier.score(*images(stream.ValidationSlices(model.config.data))):.1%}")
    label = torch.arange(given.count) % model.config.model.classes
    for guidance in given.guidance:
        drawn = model.sample(given.count, label=label, seed=0, guidance=guidance)
        share = classifier.score(flat(np.moveaxis(drawn, -1, 1)), label.numpy())
        print(f"{given.count} samples, guidance {guidance:g}: {share:.1%}")


def images(slices: stream.TrainingOnce | stream.ValidationSlices) -> tuple[np.ndarray, np.ndarray]:
    """Returns all pixels in [0, 1], [N, C · H · W], and labels."""
    count = len(slices.samples.index)
    parts = [slices[range(first, min(first + PART, count))].batch for first in range(0, count, PART)]
    return flat(np.concatenate([part.x.numpy() for part in parts])), torch.cat([part.label for part in parts]).numpy()


def flat(x: np.ndarray) -> np.ndarray:
    """uint8 [N, C, H, W] → [N, C · H · W] in [0, 1]."""
    return x.reshape(len(x), -1) / 255


if __name__ == "__main__":
    main()
