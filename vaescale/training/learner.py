"""One step of learning, and the state that goes with it. The trainer knows a Learner, never an engine."""

import math
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor

from ..interfaces import Batch, Model
from .engine import Engine
from .settings import Config, Optimizer

Tensors = dict[str, Tensor]


class Learner(Protocol):
    def step(self, batches: Iterable[Batch], step: int) -> Tensors:
        """Learn from one step's micro-batches; returns this rank's means over them, fp32 scalars on the device."""
        ...

    def settle(self) -> None:
        """Called before the model is validated or saved: finish what is not finished at every step. Collective."""
        ...

    def report(self, means: dict[str, float], step: int) -> dict[str, float]:
        """The board's names and values, after `step` steps. means: of what `step` returned, over a window of steps and
        all ranks."""
        ...

    def tensors(self) -> dict[str, Tensors]:
        """What a checkpoint holds, by file: "model" and what else it needs. Collective."""
        ...

    def state(self) -> dict[str, Any]:
        """What state.json holds beside them."""
        ...

    def load(self, read: Callable[[str], Tensors], state: dict[str, Any]) -> None:
        """Take up what `tensors` and `state` gave; `read` gives a file's tensors."""
        ...

    def summary(self) -> str:
        """What is learned and how, in a few words for the log."""
        ...


class Descent:
    """One model, one engine, AdamW."""

    def __init__(self, model: Model, config: Config) -> None:
        self.model = model
        self.engine = Engine(model, config)
        self.config = config

    def step(self, batches: Iterable[Batch], step: int) -> Tensors:
        """ "skipped" is 1 where the gradient was not finite and the optimiser therefore did not move. Nothing of ours
        waits for the device here; DeepSpeed does, once a step, at ZeRO 1 and 2.
        """
        lr = learning_rate(self.config.optimizer, step, self.config.steps)
        count = self.config.accumulation
        total: Tensors = {}
        norm = torch.zeros(())
        for number, batch in enumerate(batches, start=1):
            output = self.engine.forward(batch, step)
            self.engine.backward(output.loss)
            for name, value in {"loss": output.loss.detach(), **output.metrics}.items():
                total[name] = total.get(name, 0) + value.float() / count
            if number < count:
                self.engine.micro_step()
            else:
                norm = self.engine.step(lr)
        self.model.update(step, lr)
        finite = norm.isfinite()
        return {**total, "gradient_norm": torch.where(finite, norm, 0.0), "skipped": (~finite).float()}

    def settle(self) -> None:
        """Each step is."""

    def report(self, means: dict[str, float], step: int) -> dict[str, float]:
        skipped, norm = means.pop("skipped"), means.pop("gradient_norm")
        values = {grouped(name): value for name, value in means.items()}
        values["optim/skipped"] = skipped  # share of the window's steps
        values["optim/gradient_norm"] = norm / max(1 - skipped, 1e-9)  # mean of the others
        values["optim/lr"] = learning_rate(self.config.optimizer, step - 1, self.config.steps)
        if scale := self.engine.loss_scale():
            values["optim/loss_scale"] = scale
        return values

    def tensors(self) -> dict[str, Tensors]:
        return {"model": self.engine.weights(), "optimizer": self.engine.moments()}

    def state(self) -> dict[str, Any]:
        return {"optimizer_steps": self.engine.optimizer_steps(), "scaler": self.engine.scaler()}

    def load(self, read: Callable[[str], Tensors], state: dict[str, Any]) -> None:
        self.engine.load_weights(read("model"))
        self.engine.load_moments(read("optimizer"), state["optimizer_steps"])
        self.engine.load_scaler(state["scaler"])

    def summary(self) -> str:
        weights = sum(p.numel() for p in self.model.parameters())
        return f"{weights / 1e6:.2f} M parameters, {self.config.precision}, ZeRO {self.config.zero}"


def grouped(name: str) -> str:
    """A metric says its group, or is one of training."""
    return name if "/" in name else f"train/{name}"


def learning_rate(optimizer: Optimizer, step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine from `lr` to `final`·`lr` (Loshchilov, Hutter 2017, equation 5)."""
    warm = min(1.0, (step + 1) / max(1, optimizer.warmup))
    progress = min(1.0, max(0, step - optimizer.warmup) / max(1, steps - optimizer.warmup))
    cosine = optimizer.final + (1 - optimizer.final) * (1 + math.cos(math.pi * progress)) / 2
    return optimizer.lr * warm * cosine
