"""The interface between the trainer and a way of learning. The trainer uses a Learner and never an engine."""

from collections.abc import Callable, Iterable
from typing import Any, Protocol

from ..interfaces import Batch, Model, Tensors
from ..lifecycle.checkpoint import Read
from ..models import MODELS
from ..settings import Config
from .adversarial import Adversarial
from .closed_form import ClosedForm
from .descent import Descent
from .guard import Skip


class Learner(Protocol):
    averaged: Model  # the model that is validated and evaluated: the one with averaged weights, or the model itself

    def __init__(self, model: Any, config: Config, samples: int) -> None:
        """samples: N of the training set."""

    @staticmethod
    def planned(config: Config, samples: Callable[[], int], step: int = 0, images: int = 0) -> int:
        """Returns the number of steps of the whole run, which is at `step` and has consumed `images`. samples: returns
        N of the training set."""
        ...

    @staticmethod
    def memory(model: Any, config: Config, world: int) -> dict[str, float]:
        """Returns the estimated bytes on one rank, by purpose."""
        ...

    def step(self, batches: Iterable[Batch], step: int) -> Tensors:
        """Takes one step on its micro-batches; returns this rank's means over them, fp32 scalars on the device."""
        ...

    def refresh(self) -> None:
        """Brings the model and `averaged` up to date before they are validated or saved, by work that is too costly for
        every step. Collective."""
        ...

    def skips(self) -> list[Skip]:
        """Returns the steps skipped since the last call. Collective; waits for the device."""
        ...

    def report(self, means: dict[str, float], step: int) -> dict[str, float]:
        """Returns the values for the board by name, after `step` steps. means: the results of `step`, averaged over a
        window of steps and all ranks."""
        ...

    def tensors(self) -> dict[str, Tensors]:
        """Returns a checkpoint's tensors by file: "model", "ema" (those of `averaged`) and others that the learner
        needs. They are copies in rank 0's host memory; the other ranks have none. Collective."""
        ...

    def state(self) -> dict[str, Any]:
        """Returns the learner's entries of state.json."""
        ...

    def load(self, read: Read, state: dict[str, Any]) -> None:
        """Restores what `tensors` and `state` returned."""
        ...

    def begin(self, read: Read) -> None:
        """Starts from the "model" and "ema" tensors of another run, and nothing else of it."""
        ...

    def size(self) -> int:
        """Returns the bytes of all tensors of a checkpoint."""
        ...

    def summary(self) -> str:
        """Returns a few words for the log on what is learned and how."""
        ...


LEARNERS: dict[str, type[Learner]] = {"descent": Descent, "closed_form": ClosedForm, "adversarial": Adversarial}


def chosen(config: Config) -> type[Learner]:
    """Returns the learner of the model's family; Adversarial if the config has an adversarial loss."""
    return LEARNERS["adversarial" if config.adversarial.weight else MODELS[config.model.kind].learner]
