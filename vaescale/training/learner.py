"""How a model learns. The trainer knows a Learner, never an engine."""

from collections.abc import Callable, Iterable
from typing import Any, Protocol

from ..interfaces import Batch, Model, Tensors
from ..lifecycle.checkpoint import Read
from ..settings import Config
from .closed_form import ClosedForm
from .descent import Descent
from .guard import Skip


class Learner(Protocol):
    averaged: Model  # what is validated and evaluated: the model with averaged weights, or itself

    def __init__(self, model: Any, config: Config, samples: int) -> None:
        """samples: N of the training set."""

    @staticmethod
    def planned(config: Config, samples: Callable[[], int], step: int = 0, images: int = 0) -> int:
        """Steps of the whole run, which has taken `step` of them and consumed `images`. samples: gives N of the
        training set."""
        ...

    @staticmethod
    def memory(model: Any, config: Config, world: int) -> dict[str, float]:
        """Estimated bytes on one rank, by what takes them."""
        ...

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
        """What a checkpoint holds, by file: "model", "ema" (those of `averaged`) and what else it needs. Collective."""
        ...

    def state(self) -> dict[str, Any]:
        """What state.json holds beside them."""
        ...

    def load(self, read: Read, state: dict[str, Any]) -> None:
        """Take up what `tensors` and `state` gave."""
        ...

    def begin(self, read: Read) -> None:
        """Take up the "model" and the "ema" of another run, and nothing else."""
        ...

    def size(self) -> int:
        """Bytes of what `tensors` gives."""
        ...

    def summary(self) -> str:
        """What is learned and how, in a few words for the log."""
        ...


LEARNERS: dict[str, type[Learner]] = {"descent": Descent, "closed_form": ClosedForm}
