"""The training loop.

A run's position in the data is one integer, the number of images consumed. Together with the seed it determines
everything that follows. To resume, run the same command.
"""

import gc
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from .. import distributed, numerics, process, trained
from ..config import ConfigError
from ..data import DataError, stream
from ..data.decode import CAUSES
from ..data.index import check_files
from ..data.reader import Reader
from ..interfaces import Batch, Calibrated, Codec, LatentStatistics, Model, Prior, calibrated
from ..lifecycle import checkpoint, history, topology
from ..lifecycle.lock import Lock, on_rank_0
from ..lifecycle.status import FINISHED, PREEMPTED, Diverged, Status
from ..lifecycle.stops import Stop
from ..lifecycle.watch import STACKS, Watch
from ..lifecycle.writer import Writer
from ..matching import absent_classes, check_classes, check_codes, check_labels
from ..monitoring.board import validated
from ..settings import Config, build, micro_batch, without_bound
from . import resume
from .calibration import calibrate
from .guard import Skip, diagnosis, explained, too_many
from .learner import chosen
from .prior_validator import PriorValidator
from .reporter import Reporter
from .validator import Validator

NAMED = 8  # samples of a skipped step that the log names


class Trainer:
    def __init__(self, config: Config, lock: Lock | None = None, reader: Reader | None = None) -> None:
        """lock: the run directory's lock, acquired here; None if no other process can know the directory. reader:
        decodes the samples; None: as pictures."""
        self.config = config
        self.run = Path(config.run)
        self.launcher = process.launcher()
        numerics.choose(config.tf32, config.deterministic)
        self.device = distributed.init(config.hang_timeout, self.run / STACKS)
        self.rank, self.world = distributed.rank(), distributed.world()
        self.micro = micro_batch(config, self.world)
        self.release: Callable[[], None] = lambda: None
        if lock:
            lock.acquire()
            self.release = lock.release
        # The data are opened first: errors there are the most likely, and the cheapest to find.
        self.slices = stream.TrainSlices(config.data, config.seed, reader)
        self.validation = stream.ValidationSlices(config.data, reader)
        self.indexes = (self.slices.samples.index, self.validation.samples.index)
        check_files(*self.indexes)
        for index in self.indexes:
            check_labels(config, index)
        check_classes(config, *self.indexes)

        self.before: history.Values | None = None  # the settings of an earlier process; on rank 0 only
        on_rank_0(self.run, self.compare)

        torch.manual_seed(config.seed)
        self.model, self.codec = self.built()
        codes = (self.codec, self.model.code_shape) if isinstance(self.model, Prior) else (None, ())
        for index in self.indexes:
            check_codes(config, index, *codes)
        samples = len(self.slices.samples.index)
        self.learner = chosen(config)(self.model, config, samples)
        self.validator = self.measuring(self.learner.averaged)
        self.position = resume.resume(config, self.learner, self.slices, self.codec)
        self.model.noise_version = self.learner.averaged.noise_version = self.position.noise
        self.order = resume.order(config, self.slices, self.codec)
        if self.position.validation_due:  # unless an earlier process has done it since the checkpoint
            self.position.validation_due = not distributed.tell(validated(self.run, self.position.step))
        steps = self.learner.planned(config, lambda: samples, self.position.step, self.position.images)
        config = self.config = replace(config, steps=steps)

        self.reporter = Reporter(config, self.model, self.learner, self.position, self.device)
        self.console = self.reporter.console
        self.writer = Writer(self.run / "checkpoints", config.keep_last, config.keep_every, self.console)
        self.damaged: Counter[str] = Counter()  # damaged samples by cause, on this rank, since `count_damage`
        self.changes = history.changes(self.before, config)
        if self.left():
            self.writer.check_room(self.learner.size(), config.steps)
            on_rank_0(self.run, self.reporter.open)

    def built(self) -> tuple[Model, str | None]:
        """Builds the model. Returns it, and the hash of the codec that it is built on, if it is built on one. If a rank
        lacks a file that it needs, because rank 0 has checked the settings on another node, all ranks raise Unreadable,
        which says so on each. Collective."""
        wrong = ""
        try:
            model = build(self.config)
        except ConfigError as error:
            wrong = str(error)
        if distributed.where(bool(wrong)):
            raise checkpoint.Unreadable(wrong or "another rank cannot read a file, see its error")
        codec = trained.read_base(model, self.config)
        return model.to(self.device), codec

    def measuring(self, averaged: Model) -> Validator | PriorValidator:
        """Returns what measures the averaged weights. Collective."""
        if isinstance(averaged, Prior):
            return PriorValidator(self.config, averaged, self.slices, self.validation, self.device, self.micro)
        return Validator(self.config, averaged, self.validation, self.device, self.micro)

    def compare(self) -> None:
        """Reads the settings of an earlier process. Raises ConfigError if its weights do not fit today's settings."""
        if checkpoint.there(self.run / "checkpoints"):
            self.before = history.saved_settings(self.run)
            history.check_changes(self.run, self.before, history.changes(self.before, self.config))

    def left(self) -> bool:
        """Returns whether steps, a validation or a calibration are pending."""
        return self.position.step < self.config.steps or self.position.validation_due or self.uncalibrated()

    def uncalibrated(self) -> bool:
        """Returns whether the averaged model has statistics that are not measured yet."""
        averaged = self.learner.averaged
        return isinstance(averaged, Calibrated) and not calibrated(averaged)

    def train(self) -> str:
        """Trains to the end. Returns why the run was stopped early, one of stops.REASONS; "" if it has finished.

        Raises NoProgress instead of an error that has repeatedly ended the run at the same step.
        """
        status, position = Status(self.run, self.rank), self.position
        if self.left():
            on_rank_0(self.run, lambda: status.begin(position.step))
        try:
            timeout = self.config.hang_timeout
            with (
                status.recording(lambda: position.step),
                Stop(self.run, self.config.stop_before) as stop,
                Watch(self.run, timeout, self.launcher, stop, status, position.step, self.release) as watch,
            ):
                why = self.loop(stop, watch)
        finally:
            gc.enable()
            gc.unfreeze()
            self.writer.close()
        if self.rank == 0:
            status.end(PREEMPTED if why else FINISHED, why, position.step)
        distributed.barrier()  # a launcher ends all ranks once one exits with 75: the status must be written before
        return why

    def loop(self, stop: Stop, watch: Watch) -> str:
        config, position, reporter = self.config, self.position, self.reporter
        remarks = [self.slices.advice(), absent_classes(config, *self.indexes), without_bound(config)]
        remarks.append(self.validator.about)
        if self.changes:
            remarks.append(f"changed settings: {history.described(self.changes)}")
        if not self.left():
            remarks.append("nothing is left to do: to train longer, raise steps")
        reporter.begin(self.banner(), topology.topology(self.device), remarks)
        batches = self.batches()
        first = position.step
        asked = self.finish_pending(stop, watch)
        while position.step < config.steps and not asked:
            self.step(batches)
            watch.beat(position.step)
            if position.step == first + 1:
                gc.freeze()  # what lives now lives to the end
                gc.disable()  # a collection would interrupt a step on this rank, and all others would wait; see below
                with watch.doing("writing the settings"):
                    on_rank_0(self.run, lambda: history.write(config, first, self.changes))

            last = position.step == config.steps
            asked = "" if last else stop.agreed()
            every = (config.every.report, config.every.validate, config.every.checkpoint)
            report, position.validation_due, save = (last or position.step % steps == 0 for steps in every)
            position.validation_due |= self.evaluation_due()
            if position.validation_due or save or asked:
                with watch.doing("updating the weights to save"):
                    self.learner.refresh()
            if report:
                with watch.doing("the report"):
                    self.count_damage()
                    self.count_skips()
                    self.writer.collect(wait=False)
                    reporter.report(position.images / len(self.slices.samples.index))
                    gc.collect()
            paused = time.monotonic()
            if position.validation_due and not asked:
                asked = self.validate(stop, watch)
            if last and not asked:
                asked = self.calibrate(stop, watch)
            if save or asked:
                with watch.doing("saving"):
                    self.count_damage()
                    self.count_skips()
                    self.save()
            reporter.window.paused += time.monotonic() - paused  # not counted in images/s
        with watch.doing("the last save"):
            self.writer.collect(wait=True, last=True)
        stop.acknowledge()
        how = f"stopped at step {position.step} ({asked}). Run the same command to continue."
        reporter.close(f"{self.run} {how if asked else f'finished at step {position.step}'}")
        return asked

    def batches(self) -> Iterator[stream.Decoded]:
        config, pin = self.config, self.device.type == "cuda"
        start = self.position.images
        return stream.train_loader(
            self.slices, start, config.global_batch, config.accumulation, self.rank, self.world, pin
        )

    def step(self, batches: Iterator[stream.Decoded]) -> None:
        position = self.position
        metrics = self.learner.step(self.next_batches(batches), position.step)
        self.reporter.window.add(metrics)
        position.advance(self.config.global_batch)
        self.console.advance()

    def next_batches(self, batches: Iterator[stream.Decoded]) -> Iterator[Batch]:
        """Yields one step's micro-batches on the device, and measures the time spent waiting for them."""
        for _ in range(self.config.accumulation):
            begun = time.monotonic()
            batch, damage = next(batches)
            self.reporter.window.waited += time.monotonic() - begun
            self.damaged.update(one.cause for one in damage)
            for one in damage:
                print(f"damaged sample replaced ({one.cause}): {one.key} in {one.shard} (g={one.g})", flush=True)
            yield batch.to(self.device)

    def count_damage(self) -> None:
        """Adds the damaged samples of all ranks since the last call to the run's count. Collective. Raises DataError,
        on all ranks, if there are too many."""
        config, position = self.config.data, self.position
        counts = distributed.sum_(torch.tensor([self.damaged[cause] for cause in CAUSES], device=self.device))
        self.damaged.clear()
        for cause, count in zip(CAUSES, counts.tolist(), strict=True):
            position.damaged[cause] = position.damaged.get(cause, 0) + count
        total = sum(position.damaged.values())
        if total > config.damaged_allowance + config.max_damaged_ratio * position.images:
            causes = ", ".join(f"{count} {cause}" for cause, count in position.damaged.items() if count)
            raise DataError(
                f"{total} damaged samples ({causes}) among {position.images} are more than data.max_damaged_ratio="
                f"{config.max_damaged_ratio} allows: replace the shards named above, or raise it"
            )

    def count_skips(self) -> None:
        """Logs which steps were skipped since the last call, and why. Collective. Raises Diverged, on all ranks, if
        there are too many."""
        optimizer, micros = self.config.optimizer, self.config.accumulation
        for skip in self.learner.skips():
            self.console.say(f"step {skip.step + 1} skipped: {explained(skip, micros)}; {self.named(skip)}")
            if too_many(skip, optimizer.max_skipped_steps):
                raise Diverged(diagnosis(skip, micros, optimizer.spike))

    def named(self, skip: Skip) -> str:
        """Returns a clause that names samples of the micro-batches whose loss is not finite, or of all if none is."""
        total = self.config.accumulation * self.world
        begin = self.position.images - (self.position.step - skip.step) * self.config.global_batch
        g = (
            begin
            + np.arange(self.config.global_batch).reshape(total, self.micro)[skip.micros or range(total)].flatten()
        )
        samples = self.slices.samples
        keys = [samples.name(sample)[1] for sample in self.slices.order(g[:NAMED]).tolist()]
        return f"its samples: {', '.join(keys)}" + (f" and {len(g) - NAMED} more" if len(g) > NAMED else "")

    def evaluation_due(self) -> bool:
        """Returns whether this step's validation also compares images by their features."""
        every, step = self.config.every.evaluate, self.position.step
        return every > 0 and (step == self.config.steps or step % every == 0)

    def validate(self, stop: Stop, watch: Watch) -> str:
        """Evaluates the averaged weights on the validation set, and draws the fixed images. Returns why it was cut
        short, one of stops.REASONS; "" if it was not. A validation that was cut short stays pending for the next
        process."""
        if not isinstance(self.learner.averaged, Codec | Prior):
            self.position.validation_due = False  # nothing to measure
            return ""

        def stopped() -> str:
            watch.progress()
            return stop.agreed("batch")

        with watch.doing("validation"):
            measured = self.validator.measure(self.evaluation_due(), stopped)
            if not measured:
                return stop.said
            shown = partial(stream.fixed_images, self.validation)
            self.reporter.validation(measured, lambda: self.validator.pictures(shown().to(self.device)))
        self.position.validation_due = False
        return ""

    def calibrate(self, stop: Stop, watch: Watch) -> str:
        """Measures the statistics of the averaged model, if it has any. Returns why it was cut short, one of
        stops.REASONS; "" if it was not. The next process then begins anew."""
        averaged = self.learner.averaged
        if not isinstance(averaged, Calibrated):
            return ""
        if self.config.train == "decoder" and isinstance(averaged, LatentStatistics) and calibrated(averaged):
            return ""  # those of init_from, by which the latents are normalised for others

        def stopped() -> str:
            watch.progress()
            return stop.agreed("batch")

        with watch.doing("the calibration"):
            images = stream.TrainingOnce(self.config.data, self.slices.reader)
            count = len(images.samples.index)
            self.console.say(f"calibrating on {count} training images")
            damaged = calibrate(averaged, images, self.device, self.micro, stopped, self.console.watched)
        if damaged < 0:
            return stop.said
        left_out = f" ({damaged} damaged ones left out)" if damaged else ""
        found = ", ".join(
            f"{name} {values.min():.4g} to {values.max():.4g}" for name, values in averaged.calibration().items()
        )
        self.console.say(f"calibrated on {count} training images{left_out}: {found}")
        return ""

    def finish_pending(self, stop: Stop, watch: Watch) -> str:
        """Does what a stop has cut short at this step. Returns why it was cut short again, one of stops.REASONS; "" if
        it was not."""
        asked = self.validate(stop, watch) if self.position.validation_due else ""
        if asked or self.position.step < self.config.steps or not self.uncalibrated():
            return asked
        asked = self.calibrate(stop, watch)
        if not asked:
            with watch.doing("saving"):
                self.save()
        return asked

    def save(self) -> None:
        """Saves a checkpoint: all ranks gather, rank 0 writes. Collective."""
        position = self.position
        state = resume.state(position, self.learner, self.order)
        self.writer.save(position.step, self.learner.tensors, state, dict(self.model.named_buffers()))

    def banner(self) -> str:
        config, index = self.config, self.slices.samples.index
        begin = f"resumes at step {self.position.step}" if self.position.step else "starts"
        return (
            f"{config.run} {begin}: {config.model.kind}, {self.learner.summary()}, {self.world} rank(s) on "
            f"{self.device.type}; batch {config.global_batch} = {self.micro} × {config.accumulation} × {self.world}; "
            f"{len(index)} training images, {len(self.validation.samples.index)} validation images"
        )
