"""One step of learning, and the state that goes with it. The trainer knows a Learner, never an engine."""

import math
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor

from .. import distributed
from ..interfaces import Batch, Model
from ..settings import Config, Optimizer
from .engine import MOMENTS, Engine, Masters
from .guard import TAKEN, WHY, Skip

Tensors = dict[str, Tensor]
# A file's tensors, which must have the names, shapes and types of those that are given.
Read = Callable[[str, Tensors], Tensors]


class Learner(Protocol):
    def step(self, batches: Iterable[Batch], step: int) -> Tensors:
        """Learn from one step's micro-batches; returns this rank's means over them, fp32 scalars on the device."""
        ...

    def settle(self) -> None:
        """Called before the model is validated or saved: finish what is not finished at every step. Collective."""
        ...

    def skips(self) -> list[Skip]:
        """The steps that were not taken since the last call. Collective; waits for the device."""
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

    def load(self, read: Read, state: dict[str, Any]) -> None:
        """Take up what `tensors` and `state` gave."""
        ...

    def begin(self, weights: Tensors) -> None:
        """Take up the "model" of another run, and nothing else."""
        ...

    def masters(self) -> Masters | None:
        """The fp32 weights that averages are taken of, where the model's are half."""
        ...

    def size(self) -> int:
        """Bytes of what `tensors` gives."""
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
        self.skipped = dict.fromkeys(WHY.values(), 0)  # steps since the run began
        # Of each step since the last call of `skips`: why, norm, usual norm, steps skipped in a row, their share of the
        # last ones, and for each micro-batch of this rank whether its loss is not finite.
        self._first = 0
        self._records: list[Tensor] = []

    def step(self, batches: Iterable[Batch], step: int) -> Tensors:
        """ "skipped" is 1 where the optimiser did not move. Nothing of ours waits for the device here; DeepSpeed does,
        once a step, at ZeRO 1 and 2.
        """
        lr = learning_rate(self.config.optimizer, step, self.config.steps)
        count = self.config.accumulation
        total: Tensors = {}
        finite: list[Tensor] = []
        before = [buffer.clone() for buffer in self.model.buffers()]
        for number, batch in enumerate(batches, start=1):
            loss, metrics = self.engine.forward(batch, step)[:2]  # what else there is makes room for the backward pass
            self.engine.backward(loss)
            finite.append(loss.detach().isfinite())
            for name, value in {"loss": loss.detach(), **metrics}.items():
                total[name] = total.get(name, 0) + value.float() / count
            if number < count:
                self.engine.micro_step()
        guard = self.engine.guard
        losses, usual = torch.stack(finite), guard.usual()
        norm, why = self.engine.step(lr, losses.all())
        self.model.update(step, lr)
        self.take_back(before, guard.spoilt(why))
        if not self._records:
            self._first = step
        self._records.append(torch.stack([why, norm, usual, guard.run, guard.share, *~losses]).float())
        skipped = why != TAKEN
        return {**total, "gradient_norm": torch.where(skipped, 0.0, norm), "skipped": skipped.float()}

    def take_back(self, before: list[Tensor], spoilt: Tensor) -> None:
        """What was learned without the optimiser; its collectives have taken place on all ranks in any case."""
        for buffer, old in zip(self.model.buffers(), before, strict=True):
            buffer.copy_(torch.where(spoilt, old, buffer))

    def settle(self) -> None:
        """Each step is."""

    def skips(self) -> list[Skip]:
        if not self._records:
            return []
        records = torch.stack(self._records)
        self._records = []
        (places,) = records[:, 0].cpu().nonzero(as_tuple=True)  # the same on all ranks
        if not len(places):
            return []
        mine = records[places.to(records.device)]
        failed = mine.new_zeros(distributed.world(), *mine[:, 5:].shape)
        failed[distributed.rank()] = mine[:, 5:]
        failures = distributed.sum_(failed).transpose(0, 1).flatten(1).cpu()
        found = []
        for place, (why, norm, usual, run, share), failure in zip(
            places.tolist(), mine[:, :5].tolist(), failures, strict=True
        ):
            micros = failure.nonzero().flatten().tolist()
            found.append(Skip(self._first + place, int(why), norm, usual, int(run), share, micros))
            self.skipped[WHY[int(why)]] += 1
        return found

    def report(self, means: dict[str, float], step: int) -> dict[str, float]:
        skipped, norm = means.pop("skipped"), means.pop("gradient_norm")
        values = {grouped(name): value for name, value in means.items()}
        values["optim/skipped"] = skipped  # share of the window's steps
        values["optim/gradient_norm"] = norm / max(1 - skipped, 1e-9)  # mean of the others
        if math.isfinite(limit := float(self.engine.guard.limit())):
            values["optim/norm_limit"] = limit
        values |= {f"optim/skipped_{why.replace(' ', '_')}": float(count) for why, count in self.skipped.items()}
        values["optim/lr"] = learning_rate(self.config.optimizer, step - 1, self.config.steps)
        if scale := self.engine.loss_scale():
            values["optim/loss_scale"] = scale
        return values

    def tensors(self) -> dict[str, Tensors]:
        return {"model": self.engine.weights(), "optimizer": self.engine.moments()}

    def state(self) -> dict[str, Any]:
        return {
            "optimizer_steps": self.engine.optimizer_steps(),
            "scaler": self.engine.scaler(),
            "skipped": self.skipped,
            "gradient_norms": self.engine.guard.state(),
        }

    def load(self, read: Read, state: dict[str, Any]) -> None:
        weights, moments = self.engine.saved(state["optimizer_steps"])
        weights, moments = read("model", weights), read("optimizer", moments)
        self.engine.load_weights(weights)
        self.engine.load_moments(moments, state["optimizer_steps"])
        self.engine.load_scaler(state["scaler"])
        self.engine.guard.load(state["gradient_norms"])
        self.skipped = {why: state["skipped"].get(why, 0) for why in self.skipped}

    def begin(self, weights: Tensors) -> None:
        self.engine.load_weights(weights)

    def masters(self) -> Masters | None:
        return self.engine.masters()

    def size(self) -> int:
        weights = sum(p.numel() for p in self.model.parameters())
        return 4 * weights * (1 + len(MOMENTS)) + sum(buffer.nbytes for buffer in self.model.buffers())

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
