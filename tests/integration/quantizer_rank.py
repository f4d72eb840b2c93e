"""quantizer_rank.py OUT: this rank's share of 200 given global batches through quantisers of several kinds."""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from vaescale import distributed
from vaescale.nn.quantize import Config, build
from vaescale.nn.quantizer import Quantizer

STEPS, ROWS, DIM = 200, 96, 6
KINDS = {
    "ema": Config(codes=40, dim=DIM, dead_after=5),
    "gradient": Config(codes=40, dim=DIM, dead_after=5, learning="gradient"),
    "cosine, k-means": Config(codes=40, dim=DIM, dead_after=5, metric="cosine", init="kmeans"),
    "groups": Config(codes=20, dim=DIM, dead_after=5, groups=2),
    "residual": Config(codes=20, dim=DIM, dead_after=5, depth=2),
    "fsq": Config(kind="fsq", codes=60, dim=DIM, levels=[5, 4, 3], groups=2),
}


def train(kind: str) -> Quantizer:
    """Two micro-batches a step; the encoder's outputs drift, so that codes die and are replaced all along."""
    torch.manual_seed(0)
    quantizer = build(KINDS[kind], seed=0)
    generator = torch.Generator().manual_seed(1)
    rank, share = distributed.rank(), ROWS // distributed.world()
    for step in range(STEPS):
        z = torch.randn(ROWS, DIM, generator=generator) + 4 * torch.sin(torch.arange(DIM) + step / 30)
        for part in z[rank * share : (rank + 1) * share].chunk(2):
            quantizer(part)
        quantizer.update(step, lr=0.02)
    return quantizer


if __name__ == "__main__":
    distributed.init()
    for kind in KINDS:
        save_file(train(kind).state_dict(), Path(sys.argv[1]) / f"{kind}-{distributed.rank()}.safetensors")
    distributed.finish()
