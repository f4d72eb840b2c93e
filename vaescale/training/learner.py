"""One optimisation step."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from ..interfaces import Batch, Model
from .engine import Engine
from .settings import Config, Optimizer


class Learner:
    """The plain learner: one model, one engine."""

    def __init__(self, model: Model, engine: Engine, config: Config) -> None:
        self.model = model
        self.engine = engine
        self.config = config

    def step(self, batches: Iterable[Batch], step: int) -> dict[str, Tensor]:
        """Learn from one step's micro-batches; returns this rank's means over them, fp32 scalars on the device.

        "skipped" is 1 where the gradient was not finite and the optimiser therefore did not move. Nothing of ours waits
        for the device here; DeepSpeed does, once a step, at ZeRO 1 and 2.
        """
        lr = learning_rate(self.config.optimizer, step, self.config.steps)
        count = self.config.accumulation
        total: dict[str, Tensor] = {}
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


def learning_rate(optimizer: Optimizer, step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine from `lr` to `final`·`lr` (Loshchilov, Hutter 2017, equation 5)."""
    warm = min(1.0, (step + 1) / max(1, optimizer.warmup))
    progress = min(1.0, max(0, step - optimizer.warmup) / max(1, steps - optimizer.warmup))
    cosine = optimizer.final + (1 - optimizer.final) * (1 + math.cos(math.pi * progress)) / 2
    return optimizer.lr * warm * cosine
