"""Gradients averaged during the backward pass, against DeepSpeed's own way, on the ranks of a job of forked.py."""

import json
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.integration.probe import Collectives
from vaescale import distributed
from vaescale.settings import Optimizer
from vaescale.training import average
from vaescale.training.engine import Engine

BUCKET_BYTES, WIDTH, LAYERS, STEPS = 1000, 12, 8, 4  # a layer has 624 bytes


class Net(nn.Module):
    """In each micro-batch a layer has no gradient, another one on each rank. The first is frozen, the second is never
    used."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)])
        self.layers[0].requires_grad_(False)

    def forward(self, x: Tensor, left_out: int) -> Tensor:
        for number, layer in enumerate(self.layers):
            if number not in (1, left_out):
                x = torch.tanh(layer(x))
        return x.float().square().mean()


def averaged(job: dict[str, Any]) -> None:
    """Train one engine with our averaging and one with DeepSpeed's. Writes averaged-R.json: [precision, accumulation,
    steps taken, collectives of each micro-batch's backward pass, those begun before the last gradient, whether the
    weights have the same bits, their largest difference] of each case."""
    average.BUCKET_BYTES = BUCKET_BYTES
    rows = []
    for precision, accumulation in product(("fp32", "bf16", "fp16"), (1, 3)):
        ours = train(precision, accumulation, {})
        theirs = train(precision, accumulation, {"prescale_gradients": False})
        assert ours["engine"].average
        assert not theirs["engine"].average
        pairs = list(zip(weights(ours["engine"]), weights(theirs["engine"]), strict=True))
        equal = all(torch.equal(a, b) for a, b in pairs)
        far = max(float((a - b).abs().max()) for a, b in pairs)
        rows.append([precision, accumulation, ours["taken"], ours["backward"], ours["early"], equal, far])
        assert ours["taken"] == theirs["taken"]
    (Path(job["out"]) / f"averaged-{distributed.rank()}.json").write_text(json.dumps(rows))


def train(precision: str, accumulation: int, passed: dict[str, Any]) -> dict[str, Any]:
    engine = Engine(Net(), Optimizer(), precision, 0, 2, accumulation, passed)
    result: dict[str, Any] = {"engine": engine, "backward": [], "early": []}
    seen: list[int] = []  # collectives begun before a gradient was there
    mode = Collectives()
    for layer in list(engine.module.layers)[2:]:
        layer.weight.register_post_accumulate_grad_hook(lambda _: seen.append(len(mode.seen)))
    for step in range(STEPS):
        for micro in range(accumulation):
            seed = distributed.rank() + 10 * micro + 100 * step
            x = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(seed))
            loss = engine.forward(x, 2 + seed % (LAYERS - 2))
            mode.seen.clear()
            with mode:
                engine.backward(loss)
            result["backward"].append(len(mode.seen))
            result["early"].append(seen[-1])
            if micro < accumulation - 1:
                engine.micro_step()
        norm = engine.norm()
        engine.apply(1e-2, ~norm.isfinite(), ~norm.isfinite())
    result["taken"] = engine.optimizer_steps()
    return result


def weights(engine: Engine) -> list[Tensor]:
    return [
        *engine.parameters.values(),
        *(value for state in engine.optimizer.state.values() for value in state.values()),
    ]
