"""Draw pictures of what a run has learned, with its averaged weights.

    python launch/sample.py --run runs/vae_digits                                      everything the model supports
    python launch/sample.py --run runs/vae_digits generate --count 64 --seed 0 --temperature 0.7 1.0
    python launch/sample.py --run runs/vae_digits interpolate vary --images 3 17 --board [key=value …]

    generate       samples from the prior: means of p(x|z), next to draws from it
    interpolate    from one image to the next, linearly and along a great circle
    vary           variations of each image, from close to far
    traverse       one latent changed at a time, most active first
    swap           the same latents with every class, and with other attributes
    complete       the upper half of an image, and lower halves drawn from a prior over codes
    inpaint        the same with the centre of an image drawn, for priors with random or masked order
    neighbours     samples of a prior over codes next to the training images with the most equal codes; only on request

Writes sample_MODE.png into the run directory, or into --out FOLDER; the same seed gives the same picture. --run may be
a checkpoint, RUN/checkpoints/step-…, which needs --out. Exit code 2: the run does not exist, its model does not support
the pictures, or they cannot be written.
"""

import argparse
import sys
from pathlib import Path

from vaescale import arguments, process


def parse() -> argparse.Namespace:
    parser = arguments.command(__doc__)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("modes", nargs="*", metavar="MODE", help="one of the above; default: all of them")
    parser.add_argument("--count", type=int, default=64, help="number of images for generate (64)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (0)")
    parser.add_argument(
        "--temperature", type=float, nargs="+", default=[1.0], help="temperatures of the prior for generate (1)"
    )
    parser.add_argument(
        "--images", type=int, nargs="+", metavar="N", help="validation images to start from, counted from 0"
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write the pictures there, not into the run")
    arguments.add_sampling(parser)
    arguments.add_plugin(parser)
    parser.add_argument("--board", action="store_true", help="also show the pictures in TensorBoard")
    return arguments.parse_apart(parser)


if __name__ == "__main__":  # before the other imports, which take seconds
    process.forgive_output()  # what is measured or drawn is worth more than the log
    given = parse()

import math
from collections.abc import Iterator
from itertools import islice

from vaescale import distributed, numerics, plugins, trained
from vaescale.config import ConfigError
from vaescale.data import DataError, index, stream
from vaescale.evaluation import sample, sample_codes
from vaescale.evaluation.drawing import Unsupported
from vaescale.evaluation.sample import Subject
from vaescale.interfaces import Batch, Sampling
from vaescale.lifecycle.checkpoint import CheckpointError
from vaescale.monitoring import board, pictures

MODES = {**sample.MODES, **sample_codes.MODES}
REQUESTED = {**MODES, **sample_codes.SLOW}  # also those that are drawn only on request
BATCH = 32
SEEN = 32  # batches from which the spread of the latents is measured


def main(given: argparse.Namespace) -> int:
    try:
        plugins.load(given.plugin)
        check(given)
        run = trained.run_of(given.run)
        if run != given.run and not given.out:
            raise ConfigError(f"{given.run} is one of the checkpoints of {run}: give --out FOLDER for its images")
        subject, step = load(given)
        return write(run, subject, step, given.modes, given.board, given.out or given.run)
    except (ConfigError, DataError, CheckpointError, distributed.Misplaced, Unsupported) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def load(given: argparse.Namespace) -> tuple[Subject, int]:
    """(the model and what it is shown on, the step of its weights)."""
    config = trained.read_config(given.run, given.overrides)
    slices = stream.ValidationSlices(trained.pictures_of(config))
    index.check_files(*slices.indexes)
    total = len(slices.samples.index)
    if wrong := [number for number in given.images or () if not 0 <= number < total]:
        raise ConfigError(f"--images {wrong[0]}: the validation images are 0 to {total - 1}")
    device = distributed.init()
    numerics.choose(tf32=False, deterministic=False)
    model, step = trained.read_model(given.run, config, device)
    sampling = Sampling(given.top_k, given.top_p, given.guidance, given.passes, given.positions)

    def several() -> Iterator[Batch]:
        loader = stream.validation_loader(slices, BATCH, 0, 1, device.type == "cuda")
        return (decoded.batch.to(device) for decoded in islice(loader, SEEN))

    def training() -> Iterator[Batch]:
        images = stream.TrainingOnce(config.data)
        index.check_files(*images.indexes)
        watched = sys.stderr.isatty()
        found = stream.once(images, BATCH, device, "neighbours", watched)
        return (one.batch for one in found if one and len(one.batch.x))

    shown = stream.chosen_images(slices, given.images) if given.images else stream.fixed_images(slices)
    classes, names = getattr(config.model, "classes", 0), slices.samples.index.classes
    subject = Subject(
        codec=trained.codec_of(model, sampling),
        shown=shown.to(device),
        several=several,
        training=training,
        classes=[names[label] if label < len(names) else str(label) for label in range(classes)],
        attributes=config.data.attributes,
        seed=given.seed,
        count=given.count,
        temperatures=given.temperature,
    )
    return subject, step


def write(run: Path, subject: Subject, step: int, modes: list[str], on_board: bool, out: Path) -> int:
    """Writes the pictures of `modes`; without modes all that the model supports, and why it lacks the others.
    Raises Unsupported if there are none."""
    made: dict[str, pictures.Picture] = {}
    for mode in modes or MODES:
        try:
            made |= REQUESTED[mode](subject)
        except Unsupported as error:
            if modes:
                raise Unsupported(f"{run} cannot {mode}: {error}") from None
            print(f"skipped {mode}: {error}")
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, picture in made.items():
            pictures.save(picture, out / f"sample_{name}.png")
            print(out / f"sample_{name}.png")
        if on_board:
            board.add_pictures(run, made, step)
    except OSError as error:
        raise ConfigError(
            f"{error.filename or out} cannot be written ({error.strerror}): make it writable, or give --out FOLDER"
        ) from None
    if not made:
        raise Unsupported(f"{run} has no pictures to show: its model supports none of {', '.join(MODES)}")
    return 0


def check(given: argparse.Namespace) -> None:
    if unknown := set(given.modes) - set(REQUESTED):
        raise ConfigError(f"{min(unknown)} is not one of the modes: {', '.join(REQUESTED)}")
    if given.count < 1:
        raise ConfigError(f"--count {given.count} must be at least 1")
    if not 0 <= given.seed < 2**48:
        raise ConfigError(f"--seed {given.seed} must be at least 0 and below 2^48")
    for temperature in given.temperature:
        if not 0 <= temperature < math.inf:
            raise ConfigError(f"--temperature {temperature:g} must be a number, 0 or more")


if __name__ == "__main__":
    code = main(given)
    distributed.leave(code, together=code == 0)
