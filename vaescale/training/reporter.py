"""Reports a training run to the log, TensorBoard and metrics.jsonl."""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import config as mechanics
from .. import distributed
from ..evaluation import tables
from ..evaluation.show import Pictures
from ..interfaces import Codebooks, KLWeighted, Model, Tensors, Usage
from ..lifecycle.pace import Pace
from ..monitoring import alarm, code_statistics, critic, pictures, posterior
from ..monitoring.board import Board
from ..monitoring.console import Console
from ..settings import Config, shape
from .adversarial import phases
from .flops import peak, per_image
from .learner import Learner
from .resume import Position

COMPARED = (
    *("model.kind", "model.latent_dim", "model.width", "model.network.kind", "model.network.width"),
    *("model.beta", "model.free_bits", "model.beta_warmup_steps"),
    *("model.quantizer.kind", "model.quantizer.codebook_size", "model.quantizer.dim", "model.quantizer.beta"),
    *("optimizer.lr", "optimizer.warmup_steps", "global_batch", "steps", "ema_decay", "precision", "seed", "data.size"),
)


@dataclass
class Window:
    """Accumulates between two reports: sums of metrics on the device, seconds on the host."""

    steps: int = 0
    waited: float = 0.0  # for data
    paused: float = 0.0  # for validation and saving
    begun: float = field(default_factory=time.monotonic)
    names: list[str] = field(default_factory=list)  # of the metrics, which are the same in all steps
    sums: Tensor | float = 0.0  # fp32 [names]

    def add(self, metrics: Tensors) -> None:
        values = torch.stack(list(metrics.values()))  # in one tensor, so that a step adds them in one kernel
        self.steps += 1
        self.names, self.sums = list(metrics), values + self.sums

    @property
    def seconds(self) -> float:
        """Training time since the last report, without pauses."""
        return time.monotonic() - self.begun - self.paused


class Reporter:
    """Exists on all ranks; only rank 0 prints and writes."""

    def __init__(
        self, config: Config, model: Model, learner: Learner, position: Position, device: torch.device
    ) -> None:
        self.config, self.model, self.learner, self.position, self.device = config, model, learner, position, device
        self.console = Console(position.step, config.steps, loud=distributed.rank() == 0)
        self.pace = Pace(model, device)
        self.posterior = None
        if isinstance(model, KLWeighted):
            self.posterior = posterior.Posterior(model.kl_settings(), config.optimizer.warmup_steps, position.alarms)
        self.critic = None
        if config.adversarial.weight:
            self.critic = critic.Critic(config.adversarial, *phases(config), position.alarms)
        self.board: Board | None = None
        self.flops, self.peak = 0, 0.0  # FLOPs an image; peak FLOP/s of the device. Set on rank 0 if the peak is known
        self.window = Window()

    def open(self) -> None:
        """Open the board. Called on rank 0. Raises OSError if its files cannot be created."""
        self.board = Board(Path(self.config.run), self.position.step, self.position.alarms)
        self.peak = peak(self.config, self.device)
        if self.peak:
            self.flops = per_image(self.config)
        self.board.text("config", _verbatim(mechanics.to_yaml(self.config)), self.position.step)

    def begin(self, banner: str, topology: str, remarks: Iterable[str]) -> None:
        """Log what comes before the first step."""
        self.console.say(banner)
        self.console.say(topology)
        if self.board:
            self.board.text("topology", topology, self.position.step)
        for remark in filter(None, remarks):
            self.console.say(remark)
        self.window = Window()

    def report(self, epoch: float) -> None:
        """Report the means over the window and all ranks. Nothing else between checkpoints waits for the device.
        Collective."""
        window, position = self.window, self.position
        sums = torch.as_tensor(window.sums, dtype=torch.float64, device=self.device)
        totals = distributed.sum_(sums / window.steps).tolist()
        seconds = window.seconds
        means = {name: total / distributed.world() for name, total in zip(window.names, totals, strict=True)}
        values = self.learner.report(means, position.step)
        if isinstance(self.model, Codebooks):
            quantizers = self.model.quantizers()
            for name, usage in self.model.usage(clear=True).items():
                on_host = Usage(*(part.cpu() for part in usage))
                values |= self._codebook(name, on_host, values[f"{name}/commitment"], quantizers[name])
        channels, size, _ = shape(self.config)
        if self.posterior and (rates := posterior.rates(values, channels * size**2)):
            self._alarm(posterior.NAME, self.posterior.report(position.step, window.steps, rates))
            values[f"{posterior.NAME}/alarm"] = float(posterior.NAME in position.alarms)
        if self.critic and "critic/accuracy" in values:
            names = ("critic/accuracy", "critic/real", "critic/fake", "train/mse")
            reading = critic.Reading(*(values.get(name, math.nan) for name in names))  # a model may report no mse
            self._alarm(critic.NAME, self.critic.report(position.step, window.steps, reading))
            values["critic/alarm"] = float(critic.NAME in position.alarms)
        values |= self._speed(seconds)
        values["data/epoch"] = epoch
        damaged = {cause.replace(" ", "_"): count for cause, count in position.damaged.items() if count}
        values |= {f"data/damaged_{cause}": float(count) for cause, count in damaged.items()}
        if self.board:
            self.board.scalars(values, position.step)
        self.console.report(position.step, values)
        self.window = Window()

    def _speed(self, seconds: float) -> dict[str, float]:
        window = self.window
        values = {
            "perf/images_per_second": window.steps * self.config.global_batch / seconds,
            "perf/seconds_per_step": seconds / window.steps,
        }
        if self.device.type == "cuda":
            values["perf/memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        if self.flops:
            values["perf/step_flops"] = float(self.flops * self.config.global_batch)
            work = self.flops * values["perf/images_per_second"]
            values["perf/mfu"] = work / (self.peak * distributed.world())
        if said := self.pace.report(window.waited, window.steps, seconds):
            self.console.say(said)
        return {**values, "perf/slowest_rank": self.pace.times, "data/wait_share": window.waited / seconds}

    def _codebook(self, name: str, usage: Usage, commitment: float, quantizer: Any) -> dict[str, float]:
        """Report one codebook: returns its scalars, writes its histogram, and logs when it collapses or recovers."""
        step, on = self.position.step, self.position.alarms
        reading = alarm.reading_of(usage, commitment, step)
        self._alarm(name, alarm.watch(name, reading, quantizer, self.config.optimizer.warmup_steps, on))
        if self.board:
            self.board.code_counts(f"{name}/counts", usage.window, step)
        values = {**code_statistics.scalars(usage), "alarm": float(name in on)}
        return {f"{name}/{key}": value for key, value in values.items()}

    def _alarm(self, name: str, said: str | None) -> None:
        if said is None:
            return
        self.console.say(said)
        if self.board:
            self.board.alarm(name, said, name in self.position.alarms, self.position.step)

    def validation(self, measured: dict[str, float], drawn: Callable[[], Pictures]) -> None:
        """Report the results on the validation set, and pictures, which `drawn` yields."""
        step = self.position.step
        values = {f"val/{name}": value for name, value in measured.items()}
        self.console.say(f"validation at step {step}:  {tables.line(measured)}")
        if self.posterior and "active_units" in measured:
            self._alarm(posterior.NAME, self.posterior.validation(step, int(measured["active_units"])))
        if not self.board:
            return
        for name, picture in drawn():
            self.board.picture(name, picture, step)
        if rates := [value for name, value in measured.items() if name.startswith("rate/")]:
            title = "bits/dim of each level of latents, coarse to fine"
            self.board.picture("val/rates", pictures.bars(rates, title), step)
        if step == self.config.steps:
            self.board.compare(compared(self.config), values)
        self.board.scalars(values, step)  # last: a later process takes this line as proof that all else is written

    def close(self, ended: str) -> None:
        self.console.close()
        self.console.say(ended)
        if self.board:
            self.board.close()


def compared(config: Config) -> dict[str, Any]:
    """Returns those settings of COMPARED that this model has."""
    found = {}
    for name in COMPARED:
        value: Any = config
        for part in name.split("."):
            value = getattr(value, part, None)
        if value is not None:
            found[name] = value
    return found


def _verbatim(text: str) -> str:
    """Returns the text indented, as a Markdown code block."""
    return "".join(f"    {line}\n" for line in text.splitlines())
