"""quantizer_rank.py OUT: this rank's share of 200 given global batches through a quantizer of each kind of learning."""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from vaescale import distributed
from vaescale.nn.quantize import Config, VectorQuantizer

STEPS, ROWS, DIM = 200, 96, 6


def train(learning: str) -> VectorQuantizer:
    """Two micro-batches a step; the encoder's outputs drift, so that codes die and are replaced all along."""
    torch.manual_seed(0)
    quantizer = VectorQuantizer(Config(codes=40, dim=DIM, learning=learning, dead_after=5))
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
    for learning in ("ema", "gradient"):
        save_file(train(learning).state_dict(), Path(sys.argv[1]) / f"{learning}-{distributed.rank()}.safetensors")
    distributed.finish()
