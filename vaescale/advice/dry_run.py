"""Describes what a config would run, without running it."""

from dataclasses import replace
from pathlib import Path

from torch._subclasses import FakeTensorMode

from .. import config as mechanics
from ..data.index import Index
from ..files import readable_size
from ..settings import Config, build, micro_batch
from ..training.learner import chosen


def dry_run(config: Config, world: int) -> str:
    """Returns the resolved config, the batch arithmetic, the number of parameters, and the memory of one rank. Raises
    ConfigError; raises DataError if the number of steps depends on the training images and there is no index."""
    micro = micro_batch(config, world)
    learner = chosen(config)
    config = replace(config, steps=learner.planned(config, lambda: len(Index(Path(config.data.root) / "train"))))
    with FakeTensorMode():  # propagates shapes without computing anything
        model = build(config)
        memory = learner.memory(model, config, world)
    parts = ", ".join(f"{name} {readable_size(value)}" for name, value in memory.items())
    lines = [
        mechanics.to_yaml(config),
        f"batch       {micro} (micro) × {config.accumulation} (accumulation) × {world} (world) = "
        f"{config.global_batch} images",
        f"run         {config.steps} steps of {config.global_batch} images",
        f"parameters  {sum(p.numel() for p in model.parameters()) / 1e6:.3f} M",
        f"memory      {readable_size(sum(memory.values()))} per rank, estimated: {parts}",
    ]
    if config.every.evaluate and config.evaluation.metrics:
        times, given = -(-config.steps // config.every.evaluate), config.evaluation
        generated = " and as many generated images" if any(name[0] == "g" for name in given.metrics) else ""
        lines.append(
            f"evaluation  {times} times, each time {given.features}'s features of up to {given.count} reconstructions"
            f"{generated}"
        )
    return "\n".join(lines)
