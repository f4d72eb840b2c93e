"""Measure trained runs on their validation sets with their averaged weights.

    python launch/evaluate.py --run runs/quickstart [key=value …]
    python launch/evaluate.py --run runs/a runs/b … [--iw K] [key=value …]     one table of all runs
    python launch/evaluate.py --run runs/a --metrics rfid rkid rpr gfid gkid gpr [--count N]
    python launch/evaluate.py --run runs/a/checkpoints/step-00000500 --out FILE
    python launch/evaluate.py statistics DATA --size S [--split train] [--features NET] --out FILE    for --reference
    torchrun --nproc-per-node 2 -- launch/evaluate.py --run …     without the --, torchrun reads --run as its own option

Writes evaluation.json (the numbers and how they were measured) and reconstructions.png into each run directory. With
--out FILE it writes only the numbers, into that file: like evaluation.json for one run, a list for several. A run's
evaluation.json is reserved for its newest checkpoint, its own data and its own settings; everything else needs --out.
The perceptual distance that a run was trained with is measured, too. --perceptual FILE measures that of a file which
launch/weights.py wrote, for all runs. --picture FILE draws the reconstructions of all runs beside one another.

--metrics adds comparisons by the features of a network (--features): the Fréchet distance (rfd; rfid with those of
Inception), the kernel distance (rkid), and precision, recall, density and coverage (rpr) of the reconstructions; the
same (gfd, gfid, gkid, gpr) and the inception score (gis) of --count images from the prior. What was measured before
under the same protocol is kept and not measured again.

Each validation image counts exactly once, on any number of ranks. The overrides apply to all runs. Exit code 2: a run
cannot be measured, or the results cannot be written (they are still printed).
"""

import argparse
import sys
from pathlib import Path

from vaescale import arguments, process


def parse() -> argparse.Namespace:
    if sys.argv[1:2] == ["statistics"]:
        return parse_statistics(sys.argv[2:])
    parser = arguments.command(__doc__)
    parser.add_argument("--run", nargs="+", required=True, metavar="RUN")
    parser.add_argument(
        "--iw",
        type=int,
        default=1,
        metavar="K",
        help="latents drawn per image; more give a tighter bound on bits/dim and take K times as long (1)",
    )
    parser.add_argument(
        "--perceptual", metavar="FILE", help="measure this perceptual distance, too (default: that of the run, if any)"
    )
    parser.add_argument(
        "--picture", type=Path, metavar="FILE", help="draw the reconstructions of all runs there, as PNG"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the numbers there, not into the run")
    parser.add_argument("--metrics", nargs="+", default=[], metavar="NAME", help="comparisons to measure, see above")
    parser.add_argument(
        "--features",
        nargs="+",
        default=["inception"],
        metavar="NET",
        help="networks whose features are compared: inception (default), dinov2 or efficientnet-lite0",
    )
    parser.add_argument("--count", type=int, default=50_000, help="images to generate (50,000)")
    parser.add_argument(
        "--labels", choices=["equal", "random", "data"], default="equal", help="labels of generated images (equal)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of generated images (0)")
    parser.add_argument("--temperature", type=float, default=1.0, help="of generated images (1)")
    parser.add_argument(
        "--reference", type=Path, metavar="FILE", help="compare generated images with it (default: validation images)"
    )
    parser.add_argument(
        "--format", choices=["text", "markdown", "latex"], default="text", help="of the table that is printed (text)"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    # Taken out first, or options of several values would swallow them.
    overrides = [word for word in sys.argv[1:] if "=" in word and word[0] != "-" and not Path(word).exists()]
    given = arguments.parse(parser, [word for word in sys.argv[1:] if word not in overrides])
    given.overrides = [*overrides, *given.overrides]
    return given


def parse_statistics(words: list[str]) -> argparse.Namespace:
    parser = arguments.command("Write the statistics of a data set's features, for evaluate.py --reference FILE.")
    parser.prog = "evaluate.py statistics"
    parser.add_argument("data", metavar="DATA", help="a data.root")
    parser.add_argument("--size", type=int, required=True, help="pixels per side, those of the model")
    parser.add_argument("--split", choices=["train", "val"], default="val", help="which images (val)")
    parser.add_argument("--features", default="inception", metavar="NET", help="the network (inception)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="write them there")
    parser.add_argument("--channels", type=int, choices=[1, 3], default=3, help="1: grey (3)")
    parser.add_argument("--workers", type=int, default=2, help="processes that decode images, per rank (2)")
    return parser.parse_args(words)


if __name__ == "__main__":  # before the other imports, which take seconds
    process.forgive_output()  # what is measured or drawn is worth more than the log
    given = parse()

import json
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from vaescale import distributed, settings, trained
from vaescale.config import ConfigError
from vaescale.data import DataError, index, stream
from vaescale.evaluation import record, reference, tables
from vaescale.evaluation.compare import GENERATED, Refused
from vaescale.evaluation.evaluate import protocol, reconstruct
from vaescale.evaluation.generation import Generated, generated
from vaescale.evaluation.measure import Comparer, Drawing, Generate, read_net
from vaescale.evaluation.record import RECORD
from vaescale.evaluation.show import compared, reconstructions
from vaescale.interfaces import Codebooks, Codec
from vaescale.lifecycle.checkpoint import CheckpointError
from vaescale.monitoring import code_statistics, pictures
from vaescale.nn import perceptual

SPLITS = {"train": stream.TrainingOnce, "val": stream.ValidationSlices}
BATCH = 32  # images at a time on one rank
# Settings that say how the images are read, and change no number.
SAME_NUMBERS = {f"data.{key}" for key in ("workers", "prefetch", "decoder", "cache", "cache_gib", "max_megapixels")}


class Shown(NamedTuple):
    x: torch.Tensor  # uint8 [B, C, H, W]
    reconstruction: torch.Tensor  # the same


def main(given: argparse.Namespace) -> int:
    if "data" in given:
        return write_statistics(given)
    runs, overrides = [Path(one) for one in given.run], given.overrides
    results: list[dict[str, Any]] = []
    drawn: dict[str, Shown] = {}
    wrong: list[str] = []
    try:
        check(given)
        # All of them are read before hours are spent on the first.
        configs = [trained.read_config(run, overrides) for run in runs]
        if not given.out:
            check_own(runs, overrides)
        distributed.init()
        drawing = Drawing(given.count, given.labels, given.seed, given.temperature)
        comparer = Comparer(given.metrics, given.features, drawing, given.reference)
        for run, config in zip(runs, configs, strict=True):
            result, drawn[str(run)] = evaluate_run(run, config, given, comparer)
            results.append(result)
            wrong += write(run, results, drawn[str(run)], given.out)
        if given.picture:
            wrong += draw_together(drawn, given.picture)
    except (ConfigError, DataError, Refused, CheckpointError, distributed.Misplaced) as error:
        wrong.append(str(error))
    if distributed.place().rank == 0 and results:
        if given.format == "text" and len(results) == 1:
            print(tables.listing(results[0]))
        else:
            print(tables.comparison(results, "markdown" if given.format == "text" else given.format))
        if not wrong and not given.out and len(results) == 1 and given.format == "text":
            print(f"  picture: {runs[0] / 'reconstructions.png'}")
        sys.stdout.flush()
    for one in wrong:
        print(f"error: {one}", file=sys.stderr)
    return ConfigError.exit_code if wrong else 0


def check(given: argparse.Namespace) -> None:
    if given.iw < 1:
        raise ConfigError(f"--iw {given.iw} must be at least 1")
    if given.count < 1:
        raise ConfigError(f"--count {given.count} must be at least 1")
    if not 0 <= given.seed < 2**48:
        raise ConfigError(f"--seed {given.seed} must be at least 0 and below 2^48")
    if not 0 <= given.temperature < math.inf:
        raise ConfigError(f"--temperature {given.temperature:g} must be a number, 0 or more")


def write_statistics(given: argparse.Namespace) -> int:
    """Gathers and writes the statistics of a data set's features."""
    try:
        config = stream.Config(root=given.data, size=given.size, channels=given.channels, workers=given.workers)
        slices = SPLITS[given.split](config)
        index.check_files(*slices.indexes)
        device = distributed.init()
        net = read_net(given.features).to(device)
        watched = distributed.rank() == 0 and sys.stderr.isatty()
        known = reference.gather(slices, net, device, BATCH, watched)
        if distributed.rank() == 0:
            images = {"data": str(slices.samples.index.folder), "fingerprint": slices.samples.index.fingerprint()}
            reference.write(given.out, known, net, {**images, "size": config.size, "channels": config.channels})
            print(f"{given.out}: {known.count} images of {images['data']}, {net.words}")
    except (ConfigError, DataError, Refused, distributed.Misplaced) as error:
        print(f"error: {error}", file=sys.stderr)
        return ConfigError.exit_code
    except OSError as error:
        print(f"error: {given.out} cannot be written ({error.strerror}): give --out another file", file=sys.stderr)
        return ConfigError.exit_code
    return 0


def write(run: Path, results: list[dict[str, Any]], shown: Shown, out: Path | None) -> list[str]:
    """On rank 0. results: of the runs so far, the last one being that of `run`. Returns what cannot be written."""
    if distributed.rank():
        return []
    try:
        if out:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(results if len(results) > 1 else results[0], indent=1) + "\n")
        else:
            (run / RECORD).write_text(json.dumps(results[-1], indent=1) + "\n")
            pictures.save(reconstructions(*shown), run / "reconstructions.png")
    except OSError as error:
        return [f"{error.filename or run} cannot be written ({error.strerror}): make it writable, or give --out FILE"]
    return []


def draw_together(drawn: dict[str, Shown], out: Path) -> list[str]:
    """Draws the reconstructions of all runs, on rank 0. Returns why that is impossible."""
    if distributed.rank():
        return []
    x = next(iter(drawn.values())).x
    for name, shown in drawn.items():
        if not torch.equal(shown.x, x):
            return [f"{name} shows other images than {next(iter(drawn))}: give runs of the same data and data.size"]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        pictures.save(compared(x, {name: shown.reconstruction for name, shown in drawn.items()}), out)
    except (OSError, ValueError) as error:  # ValueError: a name whose ending is that of no picture
        return [f"{out} cannot be written ({error}): give --picture another file, ending in .png"]
    return []


def check_own(places: list[Path], overrides: list[str]) -> None:
    """Raises Refused for what is not the newest checkpoint of a run with its own settings."""
    changed = [one for one in overrides if one.partition("=")[0] not in SAME_NUMBERS]
    for place in places:
        run = trained.run_of(place)
        if run != place:
            raise record.not_own(run / RECORD, place.resolve().name)
        if changed:
            raise record.not_own(run / RECORD, changed[0])


def evaluate_run(
    run: Path, config: settings.Config, given: argparse.Namespace, comparer: Comparer
) -> tuple[dict[str, Any], Shown]:
    """(what evaluation.json holds, the fixed images and their reconstructions). run: may be a checkpoint of one.
    Raises Refused. Collective."""
    device = distributed.init()
    distance, draws = perceptual_distance(config, given.perceptual), given.iw
    model, step = trained.read_model(run, config, device)
    slices = stream.ValidationSlices(config.data)
    index.check_files(*slices.indexes)
    if not given.out:
        requests = [request for request in comparer.requests if request.side == GENERATED]
        record.check(run / RECORD, slices.samples.index.fingerprint(), step, draws, requests, given.count)
    assert isinstance(model, Codec)
    usage = model.usage(clear=False) if isinstance(model, Codebooks) else {}
    sizes = [len(one.window) for one in usage.values()]
    watched = distributed.rank() == 0 and sys.stderr.isatty()
    base = {
        "weights": record.hash_of(model),
        "step": step,
        "images": len(slices.samples.index),
        "data": slices.samples.index.fingerprint(),
        "size": config.data.size,
        "channels": config.data.channels,
    }
    places = [trained.run_of(run) / RECORD, *([given.out] if given.out else [])]
    options = {"micro": BATCH, "draws": draws, "watched": watched, "distance": distance and distance.to(device)}
    metrics = comparer.measure(model, slices, device, base, places, generator(model, config, given, device), **options)
    for name, one in usage.items():
        metrics[f"{name}/usage_ever" if len(usage) > 1 else "usage_ever"] = float(code_statistics.used(one.ever))
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
        "latents": tables.latents_in_words(latents, sizes),
        **metrics,
        "perceptual": distance.source if distance else None,
        "draws": draws,
        "step": step,
        "weights": "averaged",
        "data": str(Path(config.data.root) / "val"),
        "fingerprint": slices.samples.index.fingerprint(),
        "size": config.data.size,
        "channels": config.data.channels,
        "protocol": protocol(),
    }
    return result, Shown(shown.x.cpu(), reconstruction.cpu())


def generator(model: Codec, config: settings.Config, given: argparse.Namespace, device: torch.device) -> Generate:
    """Returns what generates images as the command line says."""
    classes, counts = getattr(config.model, "classes", 0), [1] * getattr(config.model, "classes", 0)
    if classes and given.labels == "data":
        labels = index.Index(Path(config.data.root) / "train").records["label"]
        counts = [int((labels == label).sum()) for label in range(classes)]

    def generate(count: int, rank: int, world: int) -> Iterator[Generated]:
        return generated(
            model, count, given.labels, counts, given.seed, given.temperature, rank, world,
            device=device, attributes=len(config.data.attributes),
        )  # fmt: skip

    return generate


def perceptual_distance(config: settings.Config, given: str | None) -> perceptual.Distance | None:
    """Returns the distance of the file `given`, else the run's own; None without either, or if the latter's file cannot
    be read by all ranks. Raises ConfigError. Collective."""
    own = getattr(config.model, "reconstruction", None)
    path = given or (own.perceptual.weights if own and own.perceptual.weight else "")
    if not path:
        return None
    distance, why = None, ""
    try:
        distance = perceptual.read(path)
        perceptual.require_size(distance, config.data.size)
    except ValueError as error:
        why = str(error)
    if not (ranks := distributed.where(bool(why))):
        return distance
    why = why or f"{path} cannot be read on rank {ranks[0]}: copy it to that node, too"
    if given:
        raise ConfigError(why)
    if distributed.rank() == 0:
        print(f"the perceptual distance is not measured: {why}, or give --perceptual FILE", file=sys.stderr)
    return None


if __name__ == "__main__":
    code = main(given)
    distributed.leave(code, together=code == 0)
