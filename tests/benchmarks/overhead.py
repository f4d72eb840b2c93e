"""Measures what the trainer adds to a step and to a save: `python tests/benchmarks/overhead.py [--data data/photos]`.

Uses the model of configs/quickstart.yaml. Both sides take turns in this process, on the same images and weights; times
are medians over rounds. The trainer's step is everything that its loop does in each step, except loading; a loop of
plain torch that learns the same is the other side. The place of tensors in memory changes a step by a few percent, so
everything is built several times, and the ratio is the median over builds. Guards, watch and hashes are timed alone, as
shares of a step or a save; a save is written in parallel with training.
"""

import argparse
import statistics
import tempfile
import time
from itertools import count, repeat
from pathlib import Path

import torch
import xxhash
from hvae import by_hand, images
from paired import Work, clock_of, paired
from safetensors.torch import save as to_bytes

from vaescale import distributed, settings
from vaescale.data.stream import Decoded
from vaescale.files import readable_size
from vaescale.lifecycle import checkpoint
from vaescale.lifecycle.status import Status
from vaescale.lifecycle.stops import Stop
from vaescale.lifecycle.watch import Watch
from vaescale.training.descent import Descent
from vaescale.training.trainer import Trainer

ROOT = Path(__file__).parents[2]
MANY = 100  # times that a part is done, to be timed at all


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default=str(ROOT / "data" / "photos"))
    parser.add_argument("--builds", type=int, default=9)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_intermixed_args()
    rounds = arguments.rounds
    with tempfile.TemporaryDirectory() as folder:

        def build(number: int) -> Trainer:
            given = [f"data.root={arguments.data}", f"run={folder}/{number}", *arguments.overrides]
            return Trainer(settings.load(ROOT / "configs" / "quickstart.yaml", given))

        print(f"{distributed.init()}, {torch.get_num_threads()} threads, torch {torch.__version__}, {rounds} rounds\n")
        print("| what | ms | beside | ms | ratio | aim |\n|---|---:|---|---:|---:|---|")
        compared = [step_by_hand(build(number), rounds) for number in range(arguments.builds)]
        theirs, ours, ratio = map(statistics.median, zip(*compared, strict=True))
        row("a training step", ours, "by hand in plain torch", theirs, 1 / ratio, 1.03)
        trainer = build(arguments.builds)
        for name, part in (("guards, alone", guarding(trainer)), ("watch and stops, alone", watching(trainer))):
            whole, alone, ratio = paired(stepping(trainer), many(part), 1, rounds, clock_of(trainer.device.type))
            row(name, alone / MANY, "a training step", whole, 1 / ratio / MANY, 0.01)
        saves(trainer, Path(folder) / "saves", rounds)
    distributed.finish()


def step_by_hand(trainer: Trainer, rounds: int) -> tuple[float, float, float]:
    return paired(by_hand(trainer.model, trainer.config), stepping(trainer), 1, rounds, clock_of(trainer.device.type))


def stepping(trainer: Trainer) -> Work:
    batches = repeat(Decoded(images(trainer.config, trainer.device), []))
    watch = watching(trainer)

    def work() -> None:
        trainer.step(batches)
        watch()

    return work


def watching(trainer: Trainer) -> Work:
    stop = Stop(trainer.run, 0.0)
    watch = Watch(trainer.run, 300.0, 0, stop, Status(trainer.run, 0), 0, lambda: None)

    def work() -> None:
        watch.beat(trainer.position.step)
        stop.agreed()

    return work


def guarding(trainer: Trainer) -> Work:
    """Does what a step does for the guard."""
    learner = trainer.learner
    assert isinstance(learner, Descent)
    guard = learner.guard
    norm = torch.ones((), device=trainer.device)
    excused = norm > 2

    def work() -> None:
        before = learner.buffers.clone()
        verdict = guard.judge(norm, excused)
        torch.where(verdict.spoilt, before, learner.buffers, out=learner.buffers)
        torch.cat([verdict.record, norm[None]])

    return work


def saves(trainer: Trainer, folder: Path, rounds: int) -> None:
    tensors = trainer.learner.tensors()
    files = [to_bytes(values) for values in tensors.values()]
    number = count()

    def save() -> None:
        checkpoint.save(folder, next(number), tensors, {}, keep=1)

    def hashing() -> None:
        """Hashes what is written, and what is read back."""
        for data in files:
            xxhash.xxh3_64_hexdigest(data), xxhash.xxh3_64_hexdigest(data)

    whole, alone, ratio = paired(save, many(hashing), 1, rounds, time.perf_counter)
    row(
        "hashing, alone",
        alone / MANY,
        f"a save of {readable_size(sum(map(len, files)))}",
        whole,
        1 / ratio / MANY,
        0.05,
    )


def many(part: Work) -> Work:
    def work() -> None:
        for _ in range(MANY):
            part()

    return work


def row(what: str, ours: float, beside: str, theirs: float, ratio: float, most: float) -> None:
    met = "met" if ratio <= most else "missed"
    print(f"| {what} | {ours:.4g} | {beside} | {theirs:.4g} | {ratio:.4g} | ≤ {most:g}, {met} |", flush=True)


if __name__ == "__main__":
    main()
