"""Measures codebook collapse and its remedies: `python tests/benchmarks/collapse.py [--codes 512 …] [--seeds 0 1 …]`.

Each cell trains one small VQ-VAE on the demo photographs (`python launch/shards.py demo data/photos`), in one process
and on one thread. All cells of a seed have the same images in the same order, encoder, decoder, steps and learning
rate; only the quantiser differs. Each cell is written to --out as one JSON line when it has been measured. If the
command is run again, it continues with the missing cells. It ends with a table of all cells in the file.

Usage and perplexity are measured over 512 training crops and all 142 validation tiles. These have 167,424 latents, many
times K, so that every code could be used. PSNR is measured over the validation tiles. Seconds are CPU time of training.
"""

import argparse
import json
import math
import statistics
import sys
import time
from dataclasses import asdict
from itertools import islice, product
from pathlib import Path
from typing import Any

import torch

from vaescale.data import DataError, stream
from vaescale.evaluation.evaluate import reconstruct
from vaescale.evaluation.metrics import reconstruction
from vaescale.interfaces import Shape
from vaescale.models.vqvae import VQVAE, Config
from vaescale.monitoring import code_statistics
from vaescale.nn import conv, quantize
from vaescale.settings import Optimizer
from vaescale.training.descent import learning_rate

CODES = (512, 2048, 8192, 16384)
SIZE = 64  # pixels a side: 16 × 16 latents
BATCH = 8  # 2,048 latents a step
COUNTED = 64  # training batches whose codes are counted
WIDTH = 32
OPTIMIZER = Optimizer(lr=2e-3, warmup_steps=50)
# Levels of FSQ: their product is near K, and none is below 5, as its paper advises.
LEVELS = {512: [8, 8, 8], 2048: [8, 8, 6, 5], 8192: [8, 8, 5, 5, 5], 16384: [8, 8, 8, 6, 5]}
MEASURES = {"usage": "{:.1%}", "perplexity": "{:.0f}", "psnr": "{:.2f}", "seconds": "{:.0f}"}
Line = dict[str, Any]
UNIFORM: dict[str, Any] = {"init": "uniform", "reset_every": 0}
NARROW: dict[str, Any] = {"metric": "cosine", "codebook_dim": 8}
REMEDIES: dict[str, dict[str, Any]] = {
    "none, codes by gradient": {**UNIFORM, "learning": "gradient"},
    "none, codes by EMA": UNIFORM,
    "first batch": {"init": "samples", "reset_every": 0},
    "k-means of the first batch": {"init": "kmeans", "reset_every": 0},
    "resets": {"init": "uniform"},
    "first batch, resets": {"init": "samples"},
    "k-means, resets": {"init": "kmeans"},
    "cosine in 8 channels": {**UNIFORM, **NARROW},
    "cosine in 8 channels, first batch, resets": NARROW,
    "SimVQ": {"kind": "simvq"},
    "FSQ": {"kind": "fsq"},
    "LFQ": {"kind": "lfq", "entropy_weight": 0.1},
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("data/photos"))
    parser.add_argument("--codes", type=int, nargs="+", choices=CODES, default=CODES, metavar="K")
    parser.add_argument("--remedies", nargs="+", choices=REMEDIES, default=list(REMEDIES), metavar="NAME")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--out", type=Path, default=Path("runs/collapse.jsonl"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    wanted = product(arguments.seeds, arguments.codes, arguments.remedies)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    try:
        study(arguments.data, arguments.out, list(wanted), arguments.steps)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"\n{table(arguments.out, arguments.steps)}")
    return 0


def model(remedy: str, codes: int) -> Config:
    settings = {"codebook_size": codes, **REMEDIES[remedy]}
    if remedy == "FSQ":
        levels = LEVELS[codes]
        settings |= {"levels": levels, "codebook_size": math.prod(levels), "codebook_dim": len(levels)}
    elif remedy == "LFQ":
        settings |= {"codebook_dim": codes.bit_length() - 1}
    return Config(network=conv.Config(width=WIDTH), quantizer=quantize.Config(**settings))


def cell(remedy: str, codes: int, steps: int) -> Line:
    """Returns everything that determines a result, except the seed."""
    return {"remedy": remedy, "codes": codes, "steps": steps, "batch": BATCH, "model": asdict(model(remedy, codes))}


def read(out: Path) -> list[Line]:
    return [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []


def study(data: Path, out: Path, wanted: list[tuple[int, int, str]], steps: int) -> None:
    """Measures the missing cells and prints each. wanted: (seed, K, remedy) of each cell."""
    known = read(out)
    print("| cell | K | remedy | seed | usage | perplexity | PSNR, dB | seconds |\n|---|---|---|---|---|---|---|---|")
    images: dict[int, Images] = {}
    for number, (seed, size, remedy) in enumerate(wanted, start=1):
        this = {**cell(remedy, size, steps), "seed": seed}
        result = next((line for line in known if line.items() >= this.items()), None)
        if result is None:
            if seed not in images:
                images = {seed: Images(data, seed, steps)}  # and free those of the previous seed
            result = {**this, **measure(remedy, size, seed, images[seed], steps)}
            with out.open("a") as file:
                file.write(json.dumps(result) + "\n")
        print(f"| {number}/{len(wanted)} | {size} | {remedy} | {seed} | {' | '.join(figures([result]))} |", flush=True)


class Images:
    """All batches of a seed, decoded once for all of its cells."""

    def __init__(self, root: Path, seed: int, steps: int) -> None:
        config = stream.Config(str(root), size=SIZE, min_crop_area=0.8, columns=BATCH, workers=0)
        loader = stream.train_loader(stream.TrainSlices(config, seed), 0, BATCH, 1, 0, 1, pin=False)
        self.train = list(islice(loader, max(steps, COUNTED)))
        self.validation = list(stream.validation_loader(stream.ValidationSlices(config), BATCH, 0, 1, pin=False))


def measure(remedy: str, codes: int, seed: int, images: Images, steps: int) -> Line:
    torch.manual_seed(seed)
    vqvae = VQVAE(model(remedy, codes), Shape(size=SIZE), seed)
    start = time.process_time()
    train(vqvae, images, steps)
    seconds = time.process_time() - start
    vqvae.eval()
    counts = torch.zeros(vqvae.quantizer.sizes[0], dtype=torch.int64)
    psnr: list[float] = []
    with torch.no_grad():
        for batch, _ in images.train[:COUNTED]:
            counts += occurrences(vqvae.encode(batch), len(counts))
        for batch, _ in images.validation:
            y, latents = reconstruct(vqvae, batch)
            counts += occurrences(latents, len(counts))
            psnr += reconstruction.psnr(batch.x, y).tolist()
    return {
        "latents": int(counts.sum()),
        "usage": float(code_statistics.used(counts)),
        "perplexity": float(code_statistics.perplexity(counts)),
        "psnr": statistics.mean(psnr),
        "seconds": seconds,
    }


def occurrences(latents: list[torch.Tensor], codes: int) -> torch.Tensor:
    """Returns how often each code of the only codebook occurs, int64 [K]."""
    return torch.bincount(latents[0].flatten(), minlength=codes)


def train(vqvae: VQVAE, images: Images, steps: int) -> None:
    adam = torch.optim.AdamW(vqvae.parameters(), betas=OPTIMIZER.betas, weight_decay=OPTIMIZER.weight_decay, fused=True)
    for step, (batch, _) in enumerate(images.train[:steps]):
        lr = learning_rate(OPTIMIZER, step, steps)
        for group in adam.param_groups:
            group["lr"] = lr
        adam.zero_grad()
        vqvae(batch, step).loss.backward()
        torch.nn.utils.clip_grad_norm_(vqvae.parameters(), OPTIMIZER.grad_clip)
        adam.step()
        vqvae.update(step, lr)


def figures(results: list[Line]) -> list[str]:
    """Returns usage, perplexity, PSNR and seconds as text, means over seeds."""
    means = {key: statistics.mean(line[key] for line in results) for key in MEASURES}
    return [form.format(means[key]) for key, form in MEASURES.items()]


def table(out: Path, steps: int) -> str:
    """Returns the table of all cells in the file with this number of steps; a dash marks a missing cell."""
    known = read(out)
    rows = [f"| remedy | {' | '.join(f'K = {size}' for size in CODES)} |", "|---|" + "---|" * len(CODES)]
    for remedy in REMEDIES:
        cells = []
        for size in CODES:
            this = cell(remedy, size, steps).items()
            results = [line for line in known if line.items() >= this]
            cells.append(", ".join(figures(results)) if results else "–")
        rows.append(f"| {remedy} | {' | '.join(cells)} |")
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
