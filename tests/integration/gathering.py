"""What a save gathers from ZeRO's shards, against DeepSpeed's own way, on the ranks of a job of forked.py."""

import json
from pathlib import Path
from typing import Any

import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.integration.probe import Collectives
from vaescale import distributed
from vaescale.settings import Optimizer
from vaescale.training import gather
from vaescale.training.engine import MOMENTS, Engine

BUCKET_ENTRIES = 100  # fewer than some parameters have, and no divisor of where shards end


class Net(nn.Module):
    """Its first parameter has no gradient, the second layer is frozen, and it has a buffer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.unused = nn.Parameter(torch.randn(3, 5))
        self.layers = nn.Sequential(nn.Linear(6, 37), nn.Linear(37, 11), nn.Linear(11, 23))
        self.register_buffer("seen", torch.arange(7))
        self.layers[1].requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.to(self.layers[0].weight.dtype)).float().square().mean()


def engine_of(precision: str, zero: int) -> Engine:
    return Engine(Net(), Optimizer(), precision, zero, micro=4)


def train(engine: Engine, steps: int) -> None:
    no = torch.tensor(False)
    for step in range(steps):
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(100 * step + distributed.rank()))
        engine.backward(engine.forward(x))
        engine.norm()
        engine.apply(1e-2, no, no)


def full(engine: Engine) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What `Engine.weights` and `Engine.moments` return, by DeepSpeed's functions."""
    weights = {
        name: safe_get_full_fp32_param(p) if name in engine.trained else p.detach().float()
        for name, p in engine.parameters.items()
    }
    moments = {
        f"{name}/{key}": safe_get_full_optimizer_state(p, key) for name, p in engine.trained.items() for key in MOMENTS
    }
    return weights | dict(engine.module.named_buffers()), moments


class Largest(TorchDispatchMode):
    """Records the largest number of entries of a floating-point tensor that an operation allocates."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        given = {value.untyped_storage().data_ptr() for value in tree_leaves(args) if isinstance(value, Tensor)}
        for value in tree_leaves(result):
            floating = isinstance(value, Tensor) and value.is_floating_point()
            if floating and value.untyped_storage().data_ptr() not in given:
                self.entries = max(self.entries, value.numel())
        return result


def gathered(job: dict[str, Any]) -> None:
    """Compare what is saved with what DeepSpeed's functions return, bit for bit; continue from it in another engine.
    Writes gathered-R.json: [precision, stage, collectives of a save, collectives of DeepSpeed's functions, largest
    tensor of a save] of each case."""
    gather.BUCKET_ENTRIES = BUCKET_ENTRIES
    rows = []
    for precision, zero in (("fp32", 1), ("fp32", 2), ("fp16", 1), ("fp16", 2)):
        engine = engine_of(precision, zero)
        train(engine, 3)
        with Collectives() as theirs:
            weights, moments = full(engine)
        with Collectives() as ours, Largest() as largest:
            saved = engine.tensors()
        if distributed.rank():
            assert saved == {"model": {}, "optimizer": {}}
        else:
            same(saved, {"model": weights, "optimizer": moments})
        rows.append([precision, zero, len(ours.seen), len(theirs.seen), largest.entries])

        again = engine_of(precision, zero)
        train(again, 1)  # so that other values would stay if nothing were loaded
        again.load_weights({name: value.cpu() for name, value in weights.items()})
        again.load_moments({name: value.cpu() for name, value in moments.items()}, engine.optimizer_steps())
        again.load_scaler(engine.scaler())
        same(dict(zip(("model", "optimizer"), full(again), strict=True)), {"model": weights, "optimizer": moments})
        for one in (engine, again):
            train(one, 2)
        same(again.tensors(), engine.tensors())
    (Path(job["out"]) / f"gathered-{distributed.rank()}.json").write_text(json.dumps(rows))


def same(found: dict[str, dict[str, Tensor]], expected: dict[str, dict[str, Tensor]]) -> None:
    assert found.keys() == expected.keys()
    for file, tensors in expected.items():
        assert found[file].keys() == tensors.keys(), file
        for name, value in tensors.items():
            assert found[file][name].dtype == value.dtype, (file, name)
            assert torch.equal(found[file][name], value), (file, name)
