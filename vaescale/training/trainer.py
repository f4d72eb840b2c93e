"""The training loop.

A run's position is one integer, the number of images consumed; with the seed it decides all that follows. To resume,
run the same command.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import config as mechanics
from .. import distributed, process
from ..data import DataError, stream
from ..data.decode import CAUSES
from ..data.index import check as check_indexes
from ..evaluation.evaluate import evaluate
from ..evaluation.show import show
from ..interfaces import Batch, Codebooks, Codec, Usage
from ..lifecycle import checkpoint, history, topology
from ..lifecycle.lock import Lock, on_rank_0
from ..lifecycle.pace import Pace
from ..lifecycle.status import FINISHED, PREEMPTED, Diverged, Status
from ..lifecycle.stops import Stop
from ..lifecycle.watch import Watch
from ..lifecycle.writer import Writer
from ..models import MODELS
from ..monitoring import alarm, codebook, pictures
from ..monitoring.board import Board, validated
from ..monitoring.console import Console
from ..settings import Config, absent_classes, build, check_classes, check_labels, micro_batch
from . import resume
from .guard import Skip, diagnosis, explained, too_many
from .learner import LEARNERS

NAMED = 8  # samples of a skipped step, in the log


@dataclass
class Window:
    """What is gathered between two reports: sums on the device, seconds on the host."""

    steps: int = 0
    waited: float = 0.0
    damaged: Counter[str] = field(default_factory=Counter)  # by cause
    begun: float = field(default_factory=time.monotonic)
    sums: dict[str, Tensor] = field(default_factory=dict)

    def add(self, metrics: dict[str, Tensor]) -> None:
        self.steps += 1
        for name, value in metrics.items():
            self.sums[name] = self.sums.get(name, 0) + value


class Trainer:
    def __init__(self, config: Config, lock: Lock | None = None) -> None:
        """lock: of the run directory, to be taken; None where nobody else can know the directory."""
        self.config = config
        self.launcher = process.launcher()
        self.device = distributed.init(config.hang_timeout)
        self.run = Path(config.run)
        self.rank, self.world = distributed.rank(), distributed.world()
        self.micro = micro_batch(config, self.world)
        self.release: Callable[[], None] = lambda: None
        if lock:
            lock.acquire()
            self.release = lock.release
        # The data are opened first: of all that can be wrong they are the most likely, and the cheapest to find.
        self.slices = stream.TrainSlices(config.data, config.seed)
        self.validation = stream.ValidationSlices(config.data)
        self.indexes = (self.slices.samples.index, self.validation.samples.index)
        check_indexes(*self.indexes)
        for index in self.indexes:
            check_labels(config, index)
        check_classes(config, *self.indexes)

        self.before: history.Values | None = None  # the settings of an earlier process; known to rank 0
        on_rank_0(self.run, self.compare)

        torch.manual_seed(config.seed)
        self.model = build(config).to(self.device)
        samples = len(self.slices.samples.index)
        self.learner = LEARNERS[MODELS[config.model.kind].learner](self.model, config, samples)
        self.pace = Pace(self.model, self.device)
        self.position = resume.resume(config, self.learner, self.slices)
        self.order = resume.order(config, self.slices)
        if self.position.owed:  # unless an earlier process has made up for it
            self.position.owed = not distributed.tell(validated(self.run, self.position.step))
        steps = self.learner.planned(config, lambda: samples, self.position.step, self.position.images)
        config = self.config = replace(config, steps=steps)

        self.console = Console(self.position.step, config.steps, loud=self.rank == 0)
        self.writer = Writer(self.run / "checkpoints", config.keep, config.keep_every, self.console)
        self.board: Board | None = None
        self.changes = history.changes(self.before, config)
        if self.left():
            self.writer.check_room(self.learner.size(), config.steps)
            on_rank_0(self.run, self.open_board)

    def compare(self) -> None:
        """Raises ConfigError where there are weights that the settings do not fit."""
        if checkpoint.there(self.run / "checkpoints"):
            self.before = history.read(self.run)
            history.check(self.run, history.changes(self.before, self.config))

    def open_board(self) -> None:
        self.board = Board(self.run, self.position.step)
        self.board.text("config", _verbatim(mechanics.to_yaml(self.config)), self.position.step)

    def left(self) -> bool:
        """Whether there is anything to do."""
        return self.position.step < self.config.steps or self.position.owed

    def train(self) -> str:
        """Returns why the run was stopped before its end, one of stops.REASONS; "" if it has finished.

        Raises NoProgress in place of what has ended it at the same step the last times, too.
        """
        status, position = Status(self.run, self.rank), self.position
        if self.left():
            on_rank_0(self.run, lambda: status.begin(position.step))
        try:
            stop = Stop(self.run, self.config.stop_before)
            timeout = self.config.hang_timeout
            with (
                status.recording(lambda: position.step),
                stop,
                Watch(self.run, timeout, self.launcher, stop, status, position.step, self.release) as watch,
            ):
                why = self.loop(stop, watch)
        finally:
            self.writer.close()
        if self.rank == 0:
            status.end(PREEMPTED if why else FINISHED, why, position.step)
        distributed.barrier()  # a launcher ends all ranks once one has left with 75, and that must stand before
        return why

    def loop(self, stop: Stop, watch: Watch) -> str:
        config, position = self.config, self.position
        self.console.say(self.banner())
        where = topology.describe(self.device)
        self.console.say(where)
        if self.board:
            self.board.text("topology", where, position.step)
        for advice in filter(None, (self.slices.advice(), absent_classes(config, *self.indexes))):
            self.console.say(advice)
        if self.changes:
            self.console.say(f"settings that have changed: {history.described(self.changes)}")
        if not self.left():
            self.console.say("there is nothing left to do, and all stays as it is; to go on, raise steps")
        batches = self.batches()
        window = Window()
        first = position.step
        asked = self.validate(stop, watch) if position.owed else ""
        while position.step < config.steps and not asked:
            self.step(batches, window)
            watch.beat(position.step)
            if position.step == first + 1:
                on_rank_0(self.run, lambda: history.write(config, first, self.changes))

            last = position.step == config.steps
            asked = "" if last else stop.agreed()
            every = (config.every.report, config.every.validate, config.every.checkpoint)
            report, position.owed, save = (last or position.step % steps == 0 for steps in every)
            if position.owed or save or asked:
                with watch.doing("the solution"):
                    self.learner.settle()
            if report:
                self.report(window)
                window = Window()
            paused = time.monotonic()
            if position.owed and not asked:
                asked = self.validate(stop, watch)
            if save or asked:
                with watch.doing("saving"):
                    self.count_damage(window)
                    self.count_skips()
                    self.save()
            window.begun += time.monotonic() - paused  # images/s are those of training
        with watch.doing("the last save"):
            self.writer.settle(wait=True, last=True)
        stop.heeded()
        self.console.close()
        ended = f"stopped for {asked}, run the same command to go on" if asked else "finished"
        self.console.say(f"{ended} at step {position.step}: {self.run}")
        if self.board:
            self.board.close()
        return asked

    def batches(self) -> Iterator[stream.Decoded]:
        config, pin = self.config, self.device.type == "cuda"
        start = self.position.images
        return stream.train_loader(self.slices, start, config.batch, config.accumulation, self.rank, self.world, pin)

    def step(self, batches: Iterator[stream.Decoded], window: Window) -> None:
        position = self.position
        metrics = self.learner.step(self.next_batches(batches, window), position.step)
        window.add(metrics)
        position.advance(self.config.batch)
        self.console.advance()

    def next_batches(self, batches: Iterator[stream.Decoded], window: Window) -> Iterator[Batch]:
        """One step's micro-batches on the device; the time spent waiting for them is measured."""
        for _ in range(self.config.accumulation):
            begun = time.monotonic()
            batch, damage = next(batches)
            window.waited += time.monotonic() - begun
            window.damaged.update(one.cause for one in damage)
            for one in damage:
                print(f"damaged sample replaced ({one.cause}): {one.key} in {one.shard} (g={one.g})", flush=True)
            yield batch.to(self.device)

    def report(self, window: Window) -> None:
        """Means over the window and over all ranks; the only place between checkpoints that waits for the device."""
        config, position = self.config, self.position
        names = sorted(window.sums)
        sums = torch.stack([window.sums[name].to(self.device) / window.steps for name in names])
        totals = distributed.sum_(sums.double()).tolist()
        self.count_damage(window)
        self.count_skips()
        self.writer.settle(wait=False)
        seconds = time.monotonic() - window.begun

        means = {name: total / self.world for name, total in zip(names, totals, strict=True)}
        values = self.learner.report(means, position.step)
        if isinstance(self.model, Codebooks):
            quantizers = self.model.quantizers()
            for name, usage in self.model.usage(clear=True).items():
                usage = Usage(*(part.cpu() for part in usage))
                values |= self.watch_codebook(name, usage, values[f"{name}/commitment"], quantizers[name])
        values["perf/images_per_second"] = window.steps * config.batch / seconds
        values["perf/seconds_per_step"] = seconds / window.steps
        if self.device.type == "cuda":
            values["perf/memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        if said := self.pace.report(window.waited, window.steps, seconds):
            self.console.say(said)
        values["perf/slowest_rank"] = self.pace.times
        values["data/wait_share"] = window.waited / seconds
        values["data/epoch"] = position.images / len(self.slices.samples.index)
        values |= {f"data/damaged_{cause.replace(' ', '_')}": float(count) for cause, count in position.damaged.items()}
        if self.board:
            self.board.scalars(values, position.step)
        self.console.report(position.step, values)

    def watch_codebook(self, name: str, usage: Usage, commitment: float, quantizer: Any) -> dict[str, float]:
        """One codebook's scalars, and its histogram; a sentence when it collapses, and one when it has recovered."""
        step, on, config = self.position.step, self.position.alarms, self.config
        reading = alarm.read(usage, commitment, step)
        said = alarm.watch(name, reading, quantizer, config.optimizer.warmup, on)
        if said:
            self.console.say(said)
        if self.board:
            self.board.code_counts(f"{name}/counts", usage.window, step)
            if said:
                self.board.text(f"{name}/alarm", said, step)
        values = {**codebook.scalars(usage), "alarm": float(name in on)}
        return {f"{name}/{key}": value for key, value in values.items()}

    def count_damage(self, window: Window) -> None:
        """Add the window's damaged samples, over all ranks, to the run's; too many stop all ranks together."""
        config, position = self.config.data, self.position
        counts = distributed.sum_(torch.tensor([window.damaged[cause] for cause in CAUSES], device=self.device))
        window.damaged.clear()
        for cause, count in zip(CAUSES, counts.tolist(), strict=True):
            position.damaged[cause] = position.damaged.get(cause, 0) + count
        total = sum(position.damaged.values())
        if total > config.damaged_free + config.damaged_share * position.images:
            causes = ", ".join(f"{count} {cause}" for cause, count in position.damaged.items() if count)
            raise DataError(
                f"{total} damaged samples ({causes}) among {position.images} are more than data.damaged_share="
                f"{config.damaged_share} allows: mend the shards named above, or raise it"
            )

    def count_skips(self) -> None:
        """Say which steps were skipped since the last call, and why; too many stop all ranks together."""
        optimizer, micros = self.config.optimizer, self.config.accumulation
        for skip in self.learner.skips():
            self.console.say(f"step {skip.step + 1} skipped: {explained(skip, micros)}; {self.named(skip)}")
            if too_many(skip, optimizer.patience):
                raise Diverged(diagnosis(skip, micros, optimizer.spike))

    def named(self, skip: Skip) -> str:
        """The samples of the micro-batches whose losses are not finite, or of all."""
        total = self.config.accumulation * self.world
        begin = self.position.images - (self.position.step - skip.step) * self.config.batch
        g = begin + np.arange(self.config.batch).reshape(total, self.micro)[skip.micros or range(total)].flatten()
        samples = self.slices.samples
        keys = [samples.name(sample)[1] for sample in self.slices.order(g[:NAMED]).tolist()]
        return f"its samples: {', '.join(keys)}" + (f" and {len(g) - NAMED} more" if len(g) > NAMED else "")

    def validate(self, stop: Stop, watch: Watch) -> str:
        """The averaged weights on the whole validation set, and the fixed images as pictures. Returns for what it was
        cut short; the next life makes up for it."""
        step = self.position.step
        averaged = self.learner.averaged
        assert isinstance(averaged, Codec)
        with watch.doing("validation"):
            measured = evaluate(averaged, self.validation, self.device, self.micro, stopped=stop.agreed)
            if not measured:
                return stop.said
            values = {f"val/{name}": value for name, value in measured.items()}
            self.console.validation(step, values)
            if self.board:
                shown = stream.fixed_images(self.validation).to(self.device)
                for name, picture in show(averaged, shown):
                    self.board.picture(name, picture, step)
                if rates := [value for name, value in measured.items() if name.startswith("rate/")]:
                    title = "bits/dim that each level of latents costs, coarse to fine"
                    self.board.picture("val/rates", pictures.bars(rates, title), step)
                self.board.scalars(values, step)  # at last: by its line a later process knows that all is written
        self.position.owed = False
        return ""

    def save(self) -> None:
        """Collective: every rank takes part in gathering, rank 0 writes."""
        position = self.position
        state = resume.state(position, self.learner, self.order)
        self.writer.save(position.step, self.learner.tensors(), state, dict(self.model.named_buffers()))

    def banner(self) -> str:
        config, index = self.config, self.slices.samples.index
        begin = f"resumes at step {self.position.step}" if self.position.step else "begins"
        return (
            f"{config.run} {begin}: {config.model.kind}, {self.learner.summary()}, {self.world} rank(s) on "
            f"{self.device.type}; batch {config.batch} = {self.micro} × {config.accumulation} × {self.world}; "
            f"{len(index)} training images, {len(self.validation.samples.index)} validation images"
        )


def _verbatim(text: str) -> str:
    """Indented, Markdown leaves it as it is."""
    return "".join(f"    {line}\n" for line in text.splitlines())
