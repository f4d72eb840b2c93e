"""Counts the collectives of training steps on real ranks."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vaescale import distributed, settings
from vaescale.training import average
from vaescale.training.learner import chosen

BUCKET_BYTES = 2000  # of our own averaging of gradients; several buckets for each of the models
FIRST, COUNTED = 21, 4  # steps before the counted ones, which initialise codebooks, and as many as from reset to reset


class Traffic(TorchDispatchMode):
    """Records [operation, bytes] of each collective; of an all-gather, the bytes of its result."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.namespace == "c10d":
            tensors = [args[0]] if isinstance(args[0], Tensor) else args[0]
            self.seen.append((func.__name__.partition(".")[0].strip("_"), sum(one.nbytes for one in tensors)))
        return func(*args, **(kwargs or {}))


def counted(job: dict[str, Any]) -> None:
    """Train the "cases", [config file, key=value …] each, for some steps; traffic.json has the collectives by case."""
    average.BUCKET_BYTES = BUCKET_BYTES
    found = []
    for case in job["cases"]:
        config = load(*case)
        torch.manual_seed(0)  # some weights diverge on blank images, and a skipped step gathers none
        learner: Any = chosen(config)(settings.build(config), config, 0)
        if config.precision == "fp16":  # no step overflows, which would leave out the gathering of weights
            state = learner.engine.scaler()
            learner.engine.load_scaler({**state, "scale" if "scale" in state else "cur_scale": 1.0})
        batch = settings.blank(config, settings.micro_batch(config, distributed.world()))
        micros = [batch] * config.accumulation
        for step in range(FIRST):
            learner.step(micros, step)
        with Traffic() as mode:
            for step in range(FIRST, FIRST + COUNTED):
                learner.step(micros, step)
        found.append(mode.seen)
    if distributed.rank() == 0:
        (Path(job["out"]) / "traffic.json").write_text(json.dumps(found))


def load(config: str, *given: str) -> settings.Config:
    return settings.load(config, ["run=none", "data.root=none", *given])
