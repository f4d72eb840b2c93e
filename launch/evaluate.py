"""Measure trained runs on their validation sets with their averaged weights.

    python launch/evaluate.py --run runs/quickstart [key=value …]
    python launch/evaluate.py --run runs/a runs/b … [--iw K] [key=value …]     one table of all runs
    python launch/evaluate.py --run runs/a --metrics psnr ssim lpips rfid gfid kid is pr fd-dinov2 [--count N]
    python launch/evaluate.py --run runs/a/checkpoints/step-00000500 --out DIR
    python launch/evaluate.py --codec diffusers:FOLDER python:FILE.py:NAME data.root=DATA data.size=64
    python launch/evaluate.py statistics DATA --size S [--split train] [--features NET] --out FILE    for --reference
    torchrun --nproc-per-node 2 -- launch/evaluate.py --run …     without the --, torchrun reads --run as its own option

Writes evaluation.json (the numbers and how they were measured) and reconstructions.png into each run directory. With
--out DIR they go there, for several runs into a folder for each. With --out FILE.json only the numbers are written:
like evaluation.json for one run, a list for several. A run's evaluation.json is reserved for its newest checkpoint, its
own data and its own settings; everything else needs --out.
The perceptual distance that a run was trained with is measured, too. --perceptual FILE measures that of a file which
launch/weights.py wrote, for all runs. --picture FILE draws the reconstructions of all runs beside one another.

--metrics adds comparisons by the features of a network (--features): the Fréchet distance (rfd), the kernel distance
(rkid or kid), and precision, recall, density and coverage (rpr or pr) of the reconstructions; the same (gfd, gkid, gpr)
and the inception score (gis or is) of --count images from the prior. rfid and gfid are rfd and gfd by Inception, and
fd-dinov2 is rfd by DINOv2, whatever --features says. lpips is --perceptual lpips_vgg. psnr and ssim are always
measured. What was measured before under the same protocol is kept and not measured again.

--codec measures tokenizers that others trained in the same way: a network of diffusers from a local folder, or an
object with encode and decode (vaescale/interfaces.py) of a Python file, which is run. Only --out writes their numbers.
With --run they are measured on the data of the first run.

--nearest FILE draws generated images and reconstructions next to their nearest training images by the same features,
and says how often these are nearer to one than a held-out image.

Each validation image counts exactly once, on any number of ranks. The overrides apply to all runs. Exit code 2: a run
cannot be measured, or the results cannot be written (they are still printed).
"""

import argparse
import sys
from pathlib import Path

from vaescale import arguments, process


def parse() -> argparse.Namespace:
    if arguments.words()[:1] == ["statistics"]:
        return parse_statistics(arguments.words()[1:])
    parser = arguments.command(__doc__)
    parser.add_argument("--run", nargs="+", default=[], metavar="RUN")
    parser.add_argument("--codec", nargs="+", default=[], metavar="KIND:PATH", help="codecs of others, see above")
    parser.add_argument(
        "--iw",
        type=int,
        default=1,
        metavar="K",
        help="latents drawn per image; more give a tighter bound on bits/dim (of a diffusion: a better estimate) and "
        "take K times as long (1)",
    )
    parser.add_argument(
        "--perceptual", metavar="FILE", help="measure this perceptual distance, too (default: that of the run, if any)"
    )
    parser.add_argument(
        "--picture", type=Path, metavar="FILE", help="draw the reconstructions of all runs there, as PNG"
    )
    parser.add_argument(
        "--nearest", type=Path, metavar="FILE", help="draw the nearest training images of generated and decoded images"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="write evaluation.json and reconstructions.png there, not into the run; FILE.json: only the numbers",
    )
    parser.add_argument("--metrics", nargs="+", default=[], metavar="NAME", help="what to measure, see above")
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
    arguments.add_sampling(parser)
    arguments.add_plugin(parser)
    parser.add_argument(
        "--reference", type=Path, metavar="FILE", help="compare generated images with it (default: validation images)"
    )
    parser.add_argument(
        "--format", choices=["text", "markdown", "latex"], default="text", help="of the table that is printed (text)"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return arguments.parse_apart(parser)


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
    arguments.add_plugin(parser)
    return parser.parse_args(words)


if __name__ == "__main__":  # before the other imports, which take seconds
    process.forgive_output()  # what is measured or drawn is worth more than the log
    given = parse()

import json
import math
import re
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from vaescale import distributed, files, plugins, settings, trained
from vaescale.config import FILE, ConfigError, override, typed
from vaescale.data import DataError, index, stream
from vaescale.evaluation import codecs, nearest, record, reference, tables
from vaescale.evaluation.candidate import Candidate, Shown, measured
from vaescale.evaluation.compare import Refused
from vaescale.evaluation.measure import LPIPS, Comparer, Drawing, read_alike, read_net
from vaescale.evaluation.record import RECORD
from vaescale.evaluation.show import reconstructions, side_by_side
from vaescale.interfaces import Sampling
from vaescale.lifecycle.checkpoint import CheckpointError
from vaescale.monitoring import pictures
from vaescale.nn.features import Features

PICTURE = "reconstructions.png"
SPLITS = {"train": stream.TrainingOnce, "val": stream.ValidationSlices}
# Settings that say how the images are read, and change no number.
SAME_NUMBERS = {f"data.{key}" for key in ("workers", "prefetch", "decoder", "cache", "cache_gib", "max_megapixels")}
SAME_NUMBERS |= {"model.tokenizer", "model.over"}  # whose weights must be those that the run began with


@dataclass(frozen=True)
class OnlyData:
    data: stream.Config = field(default_factory=stream.Config)


def main(given: argparse.Namespace) -> int:
    if "data" in given:
        return write_statistics(given)
    runs, overrides = [Path(one) for one in given.run], given.overrides
    results: list[dict[str, Any]] = []
    drawn: dict[str, Shown] = {}
    wrong: list[str] = []
    try:
        plugins.load(given.plugin)
        check(given)
        # All of them are read before hours are spent on the first.
        configs = [trained.read_config(run, overrides) for run in runs]
        if not given.out:
            check_own(runs, overrides)
        places = records(given.out, [*given.run, *given.codec])
        data = data_of_codecs(configs, overrides) if given.codec else stream.Config()
        device = distributed.init()
        sampling = Sampling(given.top_k, given.top_p, given.guidance, given.passes, given.positions)
        drawing = Drawing(given.count, given.labels, given.seed, given.temperature)
        comparer = Comparer(given.metrics, given.features, drawing, given.reference)
        candidates = [
            partial(read_run, run, config, sampling, device) for run, config in zip(runs, configs, strict=True)
        ]
        candidates += [partial(read_codec, text, data, device) for text in given.codec]
        # What can be refused is, before anything is measured.
        net = read_for_nearest(given, configs, data, device) if given.nearest else None
        before = record.read(filter(None, places)) if given.out else None  # a file is replaced after the first
        for read, place in zip(candidates, places, strict=True):
            candidate = read()
            result, shown = measured(candidate, comparer, device, given.iw, given.perceptual, before)
            results.append(result)
            drawn[candidate.name] = shown
            together = given.out is not None and place == given.out
            keep = partial(
                write, place or candidate.record, results if together else [result], None if together else shown
            )
            wrong += keep()
            if net:
                wrong += draw_nearest(candidate, result, net, given.nearest, drawing, device)
                wrong += [one for one in keep() if one not in wrong]
        if given.picture:
            wrong += draw_together(drawn, given.picture)
    except (ConfigError, DataError, Refused, CheckpointError, distributed.Misplaced) as error:
        wrong.append(str(error))
    if distributed.place().rank == 0 and results:
        if given.format == "text" and len(results) == 1:
            print(tables.listing(results[0]))
        else:
            print(tables.comparison(results, "markdown" if given.format == "text" else given.format))
        if not wrong and not given.out and len(results) == len(runs) == 1 and given.format == "text":
            print(f"  picture: {runs[0] / PICTURE}")
        sys.stdout.flush()
    for one in wrong:
        print(f"error: {one}", file=sys.stderr)
    return ConfigError.exit_code if wrong else 0


def check(given: argparse.Namespace) -> None:
    if not given.run and not given.codec:
        raise ConfigError("there is nothing to measure: give --run RUN or --codec KIND:PATH")
    if given.nearest and len(given.run) + len(given.codec) > 1:
        raise ConfigError("--nearest draws the images of one model: give one --run or one --codec")
    if "lpips" in given.metrics:
        if given.perceptual not in (None, LPIPS):
            raise ConfigError("--metrics lpips and --perceptual measure one distance: give one of them")
        given.perceptual = LPIPS
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
        plugins.load(given.plugin)
        config = stream.Config(root=given.data, size=given.size, channels=given.channels, workers=given.workers)
        slices = SPLITS[given.split](config)
        index.check_files(*slices.indexes)
        device = distributed.init()
        net = read_net(given.features).to(device)
        watched = distributed.rank() == 0 and sys.stderr.isatty()
        known = reference.gather(slices, net, device, watched)
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


def records(out: Path | None, names: list[str]) -> list[Path | None]:
    """Returns where the results of each run and codec are written: None for its own record, the same file for all, or
    a record in the folder `out` or its sub-folders. Raises Refused if that would be the record of a run."""
    if not out or (not out.is_dir() and (out.exists() or out.suffix == ".json")):  # it may also be a pipe
        return [out] * len(names)
    if len(names) > 1:
        short = [Path(name).resolve().name for name in names]
        folders = [out / re.sub(r"[^\w.-]+", "_", one) for one in (short if len({*short}) == len(short) else names)]
    else:
        folders = [out]
    for folder in folders:
        if (folder / FILE).exists():
            raise Refused(f"--out {out} would replace the {RECORD} of the run {folder}: give another folder")
    return [folder / RECORD for folder in folders]


def write(place: Path | None, results: list[dict[str, Any]], shown: Shown | None) -> list[str]:
    """Writes results into a file, and a picture beside it, on rank 0. Returns what cannot be written."""
    if distributed.rank() or not place:
        return []
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        write_json(place, results if len(results) > 1 else results[0])
        if shown:
            place = place.with_name(PICTURE)
            pictures.save(reconstructions(*shown), place)
    except OSError as error:
        return [f"{place} cannot be written ({error.strerror}): make it writable, or give --out DIR"]
    return []


def write_json(path: Path, value: Any) -> None:
    """A file is replaced at once, so that earlier numbers are there until then. A pipe or a device is written to."""
    text = json.dumps(value, indent=1) + "\n"
    path = path.resolve()
    if path.exists() and not path.is_file():
        path.write_text(text)
    else:
        with files.atomically(path) as partial:
            partial.write_text(text)


def read_for_nearest(
    given: argparse.Namespace, configs: list[settings.Config], data: stream.Config, device: torch.device
) -> Features:
    """Returns the network of `draw_nearest`. Raises Refused, also for too few training images, and DataError if there
    are none. Collective."""
    training = stream.TrainingOnce(trained.pictures_of(configs[0]) if configs else data)
    index.check_files(*training.indexes)
    nearest.require_enough(training)
    return read_net(given.features[0]).to(device)


def draw_nearest(
    candidate: Candidate, result: dict[str, Any], net: Features, out: Path, drawing: Drawing, device: torch.device
) -> list[str]:
    """Draws the nearest training images, and adds the share of nearer images to `result`. Returns why the picture
    cannot be written. Collective."""
    picture, result["nearest"] = nearest.of(candidate, net, drawing, device)
    if distributed.rank():
        return []
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        pictures.save(picture, out)
    except (OSError, ValueError) as error:  # ValueError: a name whose ending is that of no picture
        return [f"{out} cannot be written ({error}): give --nearest another file, ending in .png"]
    print(f"{out}: {nearest.in_words(result['nearest'])}")
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
        pictures.save(side_by_side(x, {name: shown.reconstruction for name, shown in drawn.items()}), out)
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


def data_of_codecs(configs: list[settings.Config], overrides: list[str]) -> stream.Config:
    """Returns the data that codecs of others are measured on, those of the first run if there is one. Raises
    ConfigError."""
    if configs:
        return trained.pictures_of(configs[0])
    if not all(any(one.startswith(f"data.{key}=") for one in overrides) for key in ("root", "size")):
        raise ConfigError("--codec without --run needs data.root=… and data.size=…")
    raw: dict[str, Any] = {}
    override(raw, overrides)
    return typed(OnlyData(), raw, "--codec").data


def read_run(run: Path, config: settings.Config, sampling: Sampling, device: torch.device) -> Candidate:
    """run: may be a checkpoint of one. Collective."""
    model, step = trained.read_model(run, config, device)
    path = trained.run_of(run) / RECORD
    codec, data = trained.measured_codec(model, config, sampling), trained.pictures_of(config)
    return Candidate(str(run), codec, data, config.model.kind, step, config.model, trained.weights_of(model), path)


def read_codec(text: str, data: stream.Config, device: torch.device) -> Candidate:
    """Raises Refused. Collective."""
    found = read_alike(text, partial(codecs.read, text, device))
    return Candidate(text, found.codec, data, found.model, None, None, found.weights, None)


if __name__ == "__main__":
    code = main(given)
    distributed.leave(code, together=code == 0)
