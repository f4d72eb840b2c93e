"""Training without an optimiser: one pass over the images sums moments, and the solution is computed on demand."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch

from .. import distributed
from ..config import ConfigError
from ..interfaces import Batch, Model, Tensors
from ..lifecycle.checkpoint import Read
from ..models.pca import PCA
from ..settings import Config
from .gather import on_host
from .guard import Skip


class ClosedForm:
    """A Learner for PCA. Its state is the model's moments, exact sums over the images consumed, so the solution has the
    same bits at any batch size and number of ranks, resumed or not. It has no engine and no averaged weights.
    """

    def __init__(self, model: PCA, config: Config, samples: int) -> None:
        """samples: N of the training set. One pass is g in [0, N): samples of the last batch beyond N are ignored."""
        del config
        self.model = model
        self.averaged: Model = model
        self.samples = samples
        self.moments = model.moments()

    @staticmethod
    def planned(config: Config, samples: Callable[[], int], step: int = 0, images: int = 0) -> int:
        """Returns the number of steps after which the first epoch is complete."""
        return step + max(0, math.ceil((samples() - images) / config.global_batch))

    @staticmethod
    def memory(model: PCA, config: Config, world: int) -> dict[str, float]:
        """Returns the estimated bytes while `solve` runs: the moments, and for their sum over ranks, the covariance and
        the workspace of the eigensolver six times as much (measured: 5.4 to 6.1 times at D = 1000 and 1600)."""
        del config, world
        moments = moment_bytes(model)
        return {"moments": moments, "solution": 6 * moments, "buffers": sum(b.nbytes for b in model.buffers())}

    @torch.no_grad()
    def step(self, batches: Iterable[Batch], step: int) -> Tensors:
        """Adds the images to the moments. The loss is that of the last solution, which does not include them yet: the
        mean squared error of pixels in [0, 1]."""
        total: Tensors = {}
        for count, batch in enumerate(batches, start=1):
            output = self.model(batch, step)
            for name, value in {"loss": output.loss, **output.metrics}.items():
                total[name] = total.get(name, value) + (value - total.get(name, value)) / count
            self.model.count(self.moments, batch, batch.sample < self.samples)
        return total

    def refresh(self) -> None:
        self.model.solve(self.moments.over_ranks())

    def skips(self) -> list[Skip]:
        return []  # there is no gradient to refuse

    def report(self, means: dict[str, float], step: int) -> dict[str, float]:
        del step
        return {
            **{f"train/{name}": value for name, value in means.items()},
            "train/explained": float(self.model.explained()),
        }

    def tensors(self) -> dict[str, Tensors]:
        solution = on_host(self.model.state_dict())
        return {"model": solution, "moments": on_host(self.moments.over_ranks()), "ema": solution}

    def state(self) -> dict[str, Any]:
        return {}

    def load(self, read: Read, state: dict[str, Any]) -> None:
        """Rank 0 continues from the sums over all ranks; the other ranks start at zero."""
        del state
        read("ema", self.model.state_dict())  # a copy of "model" for evaluation; read only to refuse a damaged one
        model, moments = read("model", self.model.state_dict()), read("moments", self.moments.state_dict())
        self.model.load_state_dict(model)
        if distributed.rank() == 0:
            self.moments.load_state_dict(moments)

    def begin(self, read: Read) -> None:
        del read
        raise ConfigError("init_from does not apply to PCA, which is solved from the images: remove it")

    def size(self) -> int:
        parts = (self.model, self.moments, self.averaged)
        return sum(value.nbytes for part in parts for value in part.state_dict().values())

    def summary(self) -> str:
        return f"closed form over one epoch, {moment_bytes(self.model) / 2**20:.1f} MiB of moments"


def moment_bytes(model: PCA) -> float:
    return 8.0 * len(model.mean) ** 2
