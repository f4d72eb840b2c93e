"""Finds the position and the weights that a run continues from."""

from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

from .. import distributed, trained
from ..config import ConfigError
from ..data.stream import TrainSlices
from ..lifecycle import checkpoint
from ..lifecycle import state as states
from ..lifecycle.checkpoint import CheckpointError
from ..matching import check_codec, check_encoder
from ..nn.frozen import latents_hash
from ..nn.noise import VERSION
from ..settings import Config
from .learner import Learner


@dataclass
class Position:
    """The state of a run apart from the learner's."""

    step: int = 0
    images: int = 0  # consumed; the next batch begins with sample number g = images
    damaged: dict[str, int] = field(default_factory=dict)  # cause → samples replaced so far, over all ranks
    # names of what had collapsed at the last report: codebooks, latents
    alarms: list[str] = field(default_factory=list)
    validation_due: bool = False  # this step's validation is pending: a stop cut it short
    noise: int = VERSION  # version of the noise of the run's models
    since: dict[str, int] | None = None  # the current batch size, and the step and images at which it began
    latents: str | None = None  # with train=decoder: the hash of the codec whose latents the model has

    def advance(self, batch: int) -> None:
        """Counts one step of `batch` images."""
        if self.since is None or self.since["batch"] != batch:
            self.since = {"batch": batch, "step": self.step, "images": self.images}
        self.step, self.images = self.step + 1, self.images + batch


def state(position: Position, learner: Learner, order: dict[str, int | str]) -> dict[str, Any]:
    """Returns the contents of state.json."""
    return {
        "version": states.VERSION,
        **vars(position),
        **learner.state(),
        "order": order,
    }


def order(config: Config, slices: TrainSlices, codec: str | None = None) -> dict[str, int | str]:
    """Returns everything that determines what sample number g is. codec: the hash of the codec that the model is built
    on, if it is built on one."""
    return {
        "version": slices.order.version,
        "seed": config.seed,
        "data.columns": config.data.columns,
        "data": slices.samples.index.fingerprint(),
        **({"codec": codec} if codec else {}),
    }


def resume(config: Config, learner: Learner, slices: TrainSlices, codec: str | None = None) -> Position:
    """Loads the newest valid checkpoint of the run directory; else the weights of `init_from`, at step 0 with a fresh
    optimiser; else starts from scratch. Returns the position. codec: as in `order`. Collective.

    A resumed run keeps the version of the sample order that it began with. Raises ConfigError if the order would
    change, and CheckpointError if a checkpoint cannot be used.
    """
    found = find(Path(config.run))
    if found is None:
        return Position(latents=begin(config, learner) if config.init_from else None)
    parts = [part.name for part in fields(Position)]
    state = states.read_checked(found, ["version", *parts, "order", *learner.state()])
    if found.name != (name := f"step-{state['step']:08d}"):
        raise CheckpointError(f"{found} contains the state of step {state['step']}: rename it to {name}, or remove it")
    if states.IMPORTED in state["order"]:
        raise ConfigError(
            f"{config.run} was imported, not trained, and has no position to go on from: give another run=… with "
            f"init_from={config.run}"
        )
    begun = {"version": 1, **state["order"]}  # version 1 did not record its number
    slices.follow(begun["version"])
    for key, value in order(config, slices, codec).items():
        if begun.get(key) == value:
            continue
        if key == "data":
            raise ConfigError(
                f"the training images are not those that {config.run} began with (index {value}, was "
                f"{begun.get(key)}): restore data.root, or give another run=…"
            )
        if key == "codec":
            check_codec(Path(config.run), str(begun.get(key)), str(value))
        raise ConfigError(
            f"{config.run} was started with {key}={begun.get(key)} and now has {value}, which would change the order "
            f"of samples: set it back, or give another run=…"
        )
    learner.load(partial(checkpoint.read_fitting, found), state)
    return Position(**{part: state[part] for part in parts})


def begin(config: Config, learner: Learner) -> str | None:
    """Loads the weights of `init_from`. Returns the hash of the codec whose latents the model keeps, if it does. Raises
    CheckpointError, and ConfigError if settings would change these latents."""
    found = find(Path(config.init_from))
    if found is None:
        raise CheckpointError(
            f"init_from={config.init_from} is neither a checkpoint nor a run directory with one: give the path of "
            f"either"
        )
    if config.train == "decoder":
        check_encoder(config, trained.read_config(found, []), found)
    learner.begin(partial(checkpoint.read_fitting, found))
    if distributed.rank() == 0:
        print(f"{config.run} starts from the weights of {found}", flush=True)
    if config.train != "decoder":
        return None
    learner.averaged.latents_of = states.read_checked(found, ["latents"])["latents"]
    return latents_hash(learner.averaged)


def find(place: Path) -> Path | None:
    """Returns the checkpoint that all ranks use, or None; rank 0 prints what is wrong with any others. Collective."""
    found = checkpoint.agreed(place)
    if distributed.rank() == 0:
        for remark in found.remarks:
            print(remark, flush=True)
    return found.path
