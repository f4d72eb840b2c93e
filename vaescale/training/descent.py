"""Training by gradient descent: one model, one engine, AdamW, averaged weights."""

import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .. import distributed
from ..config import ConfigError
from ..interfaces import Batch, LatentStatistics, Model, Tensors
from ..lifecycle.checkpoint import Read
from ..nn.reconstruction import distance_of
from ..numerics import TRITON
from ..settings import Config, Optimizer, blank, micro_batch
from .buffers import joined
from .ema import WeightEMA
from .engine import MOMENTS, Engine
from .gather import on_host
from .guard import CRITIC, LARGEST, WHY, Guard, Skip, Verdict

# (batch, reconstruction) → a term of the loss, and its metrics
Term = Callable[[Batch, Tensor], tuple[Tensor, Tensors]]


class Results:
    """The losses and metrics of a step's micro-batches, which have the same names."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._rows: list[Tensor] = []  # all values of a micro-batch in one tensor: a kernel for all, not some for each

    def add(self, values: Tensors) -> None:
        self._names = list(values)
        self._rows.append(torch.stack([value.float() for value in values.values()]))

    def joined(self) -> tuple[Tensor, Tensors]:
        """Returns the losses, fp32 [M], which are the first values, and the means of all values by name."""
        stacked = torch.stack(self._rows)
        return stacked[:, 0], dict(zip(self._names, stacked.mean(0).unbind(), strict=True))


class Descent:
    """A Learner for any model with parameters."""

    def __init__(self, model: Model, config: Config, samples: int = 0) -> None:
        del samples  # the length of a run is config.steps, whatever the number of epochs
        self.model = model
        self.ema = WeightEMA(model, config.ema_decay)  # copied before an engine converts the model's weights to fp16
        self.averaged = self.ema.model
        if config.compile:
            require_compiler()
            model.compile()  # in place: the copy above, names and class stay as they are
        micro = micro_batch(config, distributed.world())
        self.engine = Engine(
            model, config.optimizer, config.precision, config.zero_stage, micro, config.accumulation, config.deepspeed
        )
        if config.channels_last:
            # Averages need the strides of their weights to be updated by few kernels; gradients and moments get them
            # by themselves. The loader's images are in channels_last already.
            channels_last(model, self.averaged)
        self.ema.follow(self.engine.masters())
        self.buffers = joined(model)
        self.guard = Guard(config.optimizer.spike, self.engine.device)
        self.config = config
        self.skipped = {
            why: 0 for key, why in WHY.items() if key != CRITIC
        }  # cause → skipped steps since the run began
        # One record per step since the last call of `skips`: why, norm, usual norm, steps skipped in a row, their share
        # of the last steps, and the losses of this rank's micro-batches.
        self._first = 0
        self._records: list[Tensor] = []

    @staticmethod
    def planned(config: Config, samples: Callable[[], int], step: int = 0, images: int = 0) -> int:
        del samples, step, images
        return config.steps

    @staticmethod
    def memory(model: Model, config: Config, world: int) -> dict[str, float]:
        buffers = sum(b.nbytes for b in model.buffers())
        return state_bytes(model, config, world) | {
            # of the model and of its averaged copy, which share a perceptual distance
            "buffers": 2 * buffers + sum(tensor.nbytes for tensor in trunk(model)),
            "activations": activation_bytes(model, config) * micro_batch(config, world),
        }

    def step(self, batches: Iterable[Batch], step: int) -> Tensors:
        """Take one step. "skipped" is 1 if the weights did not change.

        Our code does not wait for the device here; DeepSpeed does, once a step, at ZeRO 1 and 2.
        """
        results = Results()
        before = self.buffers.clone()
        for _, _, values in self.passes(batches, step):
            results.add(values)
        losses, means = results.joined()
        excused, norm = self.engine.scaled(losses), self.engine.norm()
        verdict = self.guard.judge(norm, excused)
        skipped = self.finish(step, verdict, losses, before)
        return {**means, "gradient_norm": torch.where(verdict.refused, 0.0, norm), "skipped": skipped}

    def passes(
        self, batches: Iterable[Batch], step: int, term: Term | None = None
    ) -> Iterator[tuple[Batch, Tensor | None, Tensors]]:
        """Does the forward and backward pass of each micro-batch. Yields it, its reconstruction, detached, and the
        model's own loss and metrics. term: of the loss besides the model's own; without it, no reconstruction is
        yielded."""
        for number, batch in enumerate(batches, start=1):
            loss, metrics, reconstruction = self.engine.forward(batch, step)
            values = {"loss": loss.detach(), **metrics}
            if term:
                extra, more = term(batch, reconstruction)
                loss, values = loss + extra, {**values, **more}
            reconstruction = reconstruction.detach() if term else None  # None frees it before the backward pass
            self.engine.backward(loss)
            yield batch, reconstruction, values
            if number < self.config.accumulation:
                self.engine.micro_step()

    def finish(self, step: int, verdict: Verdict, losses: Tensor, before: Tensor) -> Tensor:
        """Updates the weights, the buffers and the averages, as the verdict allows, and records it. Returns fp32 [], 1
        if the weights did not change. losses: fp32 [M] of this rank's micro-batches; before: the buffers before the
        step."""
        lr = learning_rate(self.config.optimizer, step, self.config.steps)
        self.engine.apply(lr, verdict.refused, verdict.overflow)
        self.model.update(step, lr)  # also in a skipped step: it contains collectives
        torch.where(verdict.spoilt, before, self.buffers, out=self.buffers)
        if not self._records:
            self._first = step
        self._records.append(torch.cat([verdict.record, losses]))
        skipped = verdict.refused.float()
        self.ema.update(self.model, self.buffers, step, skipped)
        return skipped

    def refresh(self) -> None:
        self.ema.refresh()

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
        failed[distributed.rank()] = (~mine[:, 5:].isfinite()).float()
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
        if (limit := self.guard.limit()) < LARGEST:
            values["optim/norm_limit"] = limit
        values |= {f"optim/skipped_{why.replace(' ', '_')}": float(count) for why, count in self.skipped.items()}
        values["optim/lr"] = learning_rate(self.config.optimizer, step - 1, self.config.steps)
        if scale := self.engine.loss_scale():
            values["optim/loss_scale"] = scale
        return values

    def tensors(self) -> dict[str, Tensors]:
        return {**self.engine.tensors(), "ema": on_host(self.averaged.state_dict())}

    def state(self) -> dict[str, Any]:
        return {
            **self.engine.state(),
            "skipped": self.skipped,
            "gradient_norms": self.guard.state(),
        }

    def load(self, read: Read, state: dict[str, Any]) -> None:
        averages = read("ema", self.averaged.state_dict())  # all files are read before anything changes
        self.engine.load(read, state)
        self.guard.load(state["gradient_norms"])
        self.skipped = {why: state["skipped"].get(why, 0) for why in self.skipped}
        self._average(averages)

    def begin(self, read: Read) -> None:
        wanted = self.averaged.state_dict()  # a model and its average have the same tensors
        weights, averages = read("model", wanted), read("ema", wanted)
        if self.config.train == "decoder":  # of the averaged encoder: latents that others use come from it
            kept = wanted if isinstance(self.model, LatentStatistics) else self.engine.parameters
            weights |= {name: averages[name] for name in kept}
        self.engine.load_weights(weights)
        self._average(averages)

    def _average(self, averages: Tensors) -> None:
        """Continue from these averages."""
        self.averaged.load_state_dict(averages)
        self.ema.follow(self.engine.masters())

    def size(self) -> int:
        weights = sum(p.numel() for p in self.model.parameters())
        buffers = sum(buffer.nbytes for buffer in self.model.buffers())
        averages = sum(value.nbytes for value in self.averaged.state_dict().values())
        moments = sum(p.numel() for p in self.engine.trained.values()) * len(MOMENTS)
        return 4 * (weights + moments) + buffers + averages

    def summary(self) -> str:
        parameters = list(self.model.parameters())
        weights = sum(p.numel() for p in parameters)
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        share = f" ({trained / 1e6:.2f} M trained)" if trained < weights else ""
        return f"{weights / 1e6:.2f} M parameters{share}, {self.config.precision}, ZeRO {self.config.zero_stage}"


def channels_last(*modules: nn.Module) -> None:
    """Keeps weights of convolutions in memory as images are. Called after DeepSpeed has broadcast the parameters, which
    must be contiguous for that."""
    for parameter in (parameter for module in modules for parameter in module.parameters()):
        if parameter.ndim == 4:
            parameter.data = parameter.data.to(memory_format=torch.channels_last)


def require_compiler() -> None:
    """Raises ConfigError without what `torch.compile` needs."""
    missing = []
    if torch.cuda.is_available() and not TRITON:
        missing.append("the package triton")
    if not any(map(shutil.which, (os.environ.get("CXX") or "g++", "c++", "clang++"))):
        missing.append("a C++ compiler")
    if missing:
        raise ConfigError(f"compile=true needs {' and '.join(missing)}: install it, or set compile=false")


def grouped(name: str) -> str:
    """Returns the metric's name with its group, which is "train" if the name has none."""
    return name if "/" in name else f"train/{name}"


def learning_rate(optimizer: Optimizer, step: int, steps: int) -> float:
    """Returns the learning rate of a step: linear warm-up, then half a cosine from `lr` to `final_lr_ratio`·`lr`
    (Loshchilov, Hutter 2017, equation 5)."""
    warm = min(1.0, (step + 1) / max(1, optimizer.warmup_steps))
    progress = min(1.0, max(0, step - optimizer.warmup_steps) / max(1, steps - optimizer.warmup_steps))
    cosine = optimizer.final_lr_ratio + (1 - optimizer.final_lr_ratio) * (1 + math.cos(math.pi * progress)) / 2
    return optimizer.lr * warm * cosine


def state_bytes(module: nn.Module, config: Config, world: int) -> dict[str, float]:
    """Returns bytes on one rank of the fp32 weights, gradients, AdamW's two moments and the averaged weights. Frozen
    parameters have only weights and averages.

    ZeRO 1 divides the moments by the world size, ZeRO 2 the gradients too, and both add a sharded fp32 master copy. The
    fp16 engine halves weights and gradients.
    """
    parameters = sum(p.numel() for p in module.parameters())
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    shards = world if config.zero_stage else 1
    width = 2 if config.precision == "fp16" and config.zero_stage else 4
    return {
        "weights": width * parameters,
        "gradients": width * trained / (world if config.zero_stage == 2 else 1),
        "moments": 8 * trained / shards,
        "masters": 4 * trained / shards if config.zero_stage else 0,
        "EMA": 4 * parameters,
    }


def trunk(model: nn.Module) -> list[Tensor]:
    """Returns the weights of the model's perceptual distance, if it has one."""
    distance = distance_of(model)
    return list(distance.tensors.values()) if distance else []


def activation_bytes(model: nn.Module, config: Config) -> int:
    """Returns the bytes that one image keeps for the backward pass, counted in a forward pass."""
    model.eval()  # in training mode a forward pass keeps rows for `update`, which is not called here
    for part in model.modules():
        part.training = bool(getattr(part, "checkpointing", False))  # else it would keep what it recomputes in training
    batch = blank(config, 1)
    weights = [*model.parameters(), *model.buffers(), *trunk(model)]
    total, exact = kept_bytes(lambda: model(batch, 0), weights), 0
    if distance := distance_of(model):  # in fp32 at every precision
        x = (batch.x / 255).requires_grad_()
        exact = kept_bytes(lambda: distance(x, x), weights)
    return exact + (total - exact) // (1 if config.precision == "fp32" else 2)


def kept_bytes(forward: Callable[[], object], weights: Iterable[Tensor]) -> int:
    """Returns the bytes other than those of `weights` that `forward` keeps for the backward pass."""
    held: dict[int, torch.UntypedStorage] = {}  # by an address that fake tensors have, too
    known = {tensor.untyped_storage()._cdata for tensor in weights}

    def hold(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:  # linear layers save their transposed weights
            held[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
        forward()
    return sum(storage.nbytes() for storage in held.values())
