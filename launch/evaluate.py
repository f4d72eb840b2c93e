"""Measure trained runs on their validation sets with their averaged weights.

    python launch/evaluate.py --run runs/quickstart [key=value …]
    python launch/evaluate.py --run runs/a runs/b … [--iw K] [key=value …]     one table of all
    torchrun --nproc-per-node 2 -- launch/evaluate.py --run …     without the -- torchrun takes --run for its own

Writes evaluation.json (the numbers, and the protocol they were measured by) and reconstructions.png into each run
directory. Each validation image counts exactly once, on any number of ranks. The overrides hold for all the runs.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from vaescale import distributed, process
from vaescale.config import ConfigError
from vaescale.data import DataError, index, stream
from vaescale.evaluation import tables
from vaescale.evaluation.evaluate import PROTOCOL, evaluate, reconstruct
from vaescale.monitoring import codebook, pictures
from vaescale.training import settings, trained
from vaescale.training.checkpoint import CheckpointError

BATCH = 32  # images at a time on one rank


def main() -> int:
    process.forgive_output()  # what is measured or drawn is worth more than the log
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", nargs="+", required=True, metavar="RUN")
    parser.add_argument(
        "--iw", type=int, default=64, metavar="K", help="latents drawn for each image; the time grows with it (64)"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_intermixed_args()
    # --run takes all that follows it.
    runs = [Path(one) for one in arguments.run if "=" not in one or Path(one).is_dir()]
    overrides = arguments.overrides + [one for one in arguments.run if Path(one) not in runs]
    try:
        if arguments.iw < 1:
            raise ConfigError(f"--iw {arguments.iw} must be at least 1")
        # All of them are read before hours are spent on the first.
        configs = [trained.read_config(run, overrides) for run in runs]
        results = [evaluate_run(run, config, arguments.iw) for run, config in zip(runs, configs, strict=True)]
    except (ConfigError, DataError, CheckpointError, distributed.Misplaced) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        distributed.finish()
    if distributed.place().rank == 0:
        if len(results) == 1:
            print(tables.listing(results[0]))
            print(f"  picture: {runs[0] / 'reconstructions.png'}")
        else:
            print(tables.comparison(results))
    return 0


def evaluate_run(run: Path, config: settings.Config, draws: int) -> dict[str, Any]:
    """Collective; rank 0 writes the two files. Returns what evaluation.json holds."""
    device = distributed.init()
    model, step = trained.read_model(run, config, device)
    slices = stream.ValidationSlices(config.data)
    index.check(*slices.indexes)
    usage = model.usage(clear=False)
    sizes = {name: len(one.window) for name, one in usage.items()}
    watched = distributed.rank() == 0 and sys.stderr.isatty()
    metrics = evaluate(model, slices, sizes, device, BATCH, draws, watched)
    for name, one in usage.items():
        metrics[f"{name}/usage_ever" if len(usage) > 1 else "usage_ever"] = float(codebook.used(one.ever))
    shown = stream.fixed_images(slices).to(device)
    reconstruction, latents = reconstruct(model, shown)
    # What a closed form has learned are buffers.
    parameters = sum(p.numel() for p in model.parameters()) or sum(b.numel() for b in model.buffers())
    likelihood = getattr(config.model, "likelihood", None)
    result = {
        "run": str(run),
        "model": config.model.kind,
        "likelihood": likelihood.kind if likelihood else None,
        "parameters": parameters,
        "latents": tables.describe(latents, list(sizes.values())),
        **metrics,
        "draws": draws,
        "step": step,
        "weights": "averaged",
        "data": str(Path(config.data.root) / "val"),
        "fingerprint": slices.samples.index.fingerprint(),
        "size": config.data.size,
        "channels": config.data.channels,
        "protocol": PROTOCOL,
    }
    if distributed.rank() == 0:
        (run / "evaluation.json").write_text(json.dumps(result, indent=1) + "\n")
        pictures.save(pictures.reconstructions(shown.x, reconstruction), run / "reconstructions.png")
    return result


if __name__ == "__main__":
    sys.exit(main())
