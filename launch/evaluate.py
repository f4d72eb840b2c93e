"""Measure a trained run on its validation set with its averaged weights.

    python launch/evaluate.py --run runs/quickstart [key=value …]
    torchrun --nproc-per-node 2 launch/evaluate.py --run …

Prints a table; writes evaluation.json (the numbers, and the protocol they were measured by) and reconstructions.png
into the run directory. Each validation image counts exactly once, on any number of ranks.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vaescale import distributed
from vaescale.config import ConfigError
from vaescale.data import DataError, stream
from vaescale.evaluation.evaluate import PROTOCOL, evaluate, reconstruct
from vaescale.monitoring import codebook, pictures
from vaescale.training import trained
from vaescale.training.checkpoint import CheckpointError

BATCH = 32  # images at a time on one rank; the numbers do not depend on it
SHOWN = {
    "psnr": "PSNR (dB)",
    "ssim": "SSIM",
    "mse": "MSE",
    "usage": "codes used",
    "usage_ever": "codes ever used in training",
    "perplexity": "perplexity",
    "images": "images",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_intermixed_args()
    try:
        result = evaluate_run(arguments.run, arguments.overrides)
    except (ConfigError, DataError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        distributed.finish()
    if distributed.place().rank == 0:
        print(table(arguments.run, result))
    return 0


def evaluate_run(run: Path, overrides: list[str]) -> dict[str, Any]:
    """Collective; rank 0 writes the two files. Returns what evaluation.json holds."""
    config = trained.read_config(run, overrides)
    device = distributed.init()
    model, step = trained.read_model(run, config, device)
    slices = stream.ValidationSlices(config.data)
    loader = stream.validation_loader(slices, BATCH, distributed.rank(), distributed.world(), device.type == "cuda")
    usage = model.usage(clear=False)
    sizes = {name: len(one.window) for name, one in usage.items()}
    watched = distributed.rank() == 0 and sys.stderr.isatty()
    metrics = evaluate(model, tqdm(loader, desc="evaluate", unit="batch", disable=not watched), sizes, device)
    for name, one in usage.items():
        metrics[f"{name}/usage_ever" if len(usage) > 1 else "usage_ever"] = float(codebook.used(one.ever))
    result = {
        **metrics,
        "step": step,
        "weights": "averaged",
        "data": str(Path(config.data.root) / "val"),
        "size": config.data.size,
        "protocol": PROTOCOL,
    }
    if distributed.rank() == 0:
        (run / "evaluation.json").write_text(json.dumps(result, indent=1) + "\n")
        shown = stream.fixed_images(slices).to(device)
        reconstruction, _ = reconstruct(model, shown)
        pictures.save(pictures.reconstructions(shown.x, reconstruction), run / "reconstructions.png")
    return result


def table(run: Path, result: dict[str, Any]) -> str:
    rows = [(text, f"{result[key]:.4g}") for key, text in SHOWN.items() if key in result]
    for key in result:  # of several codebooks, each has its own: codebook0/usage
        name, slash, measure = key.partition("/")
        if slash:
            rows.append((f"{SHOWN[measure]}, {name}", f"{result[key]:.4g}"))
    width = max(len(text) for text, _ in rows)
    lines = [f"{run} at step {result['step']}, {result['data']} at {result['size']} px"]
    lines += [f"  {text:<{width}}  {value:>8}" for text, value in rows]
    return "\n".join([*lines, f"  picture: {run / 'reconstructions.png'}"])


if __name__ == "__main__":
    sys.exit(main())
