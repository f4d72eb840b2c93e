"""A model of only quantisers and a decoder, trained by the real learner and engine.

Its rows are computed from the bytes of the batch, elementwise and in fp32, because an encoder would round differently
on another number of ranks. So codebooks can be compared with those of one process to the last bits, while DeepSpeed
wraps, casts and shards the decoder next to them.
"""

import json
from collections.abc import Callable, Container, Iterator
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from vaescale import distributed, settings
from vaescale.interfaces import Batch, Model, Output
from vaescale.lifecycle import checkpoint
from vaescale.nn.quantize import Config, VectorQuantizer, build
from vaescale.nn.quantizer import Grouped
from vaescale.training.descent import Descent, learning_rate

STEPS, IMAGES, ROWS, DIM = 200, 16, 4, 6  # steps, images per step, rows per image, channels per row
SEED = 18000  # of the images; no row is equally near to two codes within rounding, see test_codebooks.py
# Cube roots, so that no two codes that are rows have the same distance to a third row.
SCALE = torch.tensor([2.0, 3.0, 5.0, 7.0, 11.0, 13.0]) ** (1 / 3) / 255
KINDS = {
    "vq": {
        "ema": Config(codebook_size=40, dim=DIM, dead_after=5),
        "gradient": Config(codebook_size=40, dim=DIM, dead_after=5, learning="gradient"),
    },
    "others": {
        "cosine, k-means": Config(codebook_size=40, dim=DIM, dead_after=5, metric="cosine", init="kmeans"),
        "groups": Config(codebook_size=20, dim=DIM, dead_after=5, groups=2),
        "residual": Config(codebook_size=20, dim=DIM, dead_after=5, depth=2),
        "fsq": Config(kind="fsq", codebook_size=60, dim=DIM, levels=[5, 4, 3], groups=2),
    },
}


class Case(NamedTuple):
    precision: str = "fp32"
    zero: int = 0
    accumulation: int = 1
    kinds: str = "vq"

    @property
    def name(self) -> str:
        return "-".join(str(part) for part in self)


CASES = [Case(*given) for given in product(("fp32", "bf16", "fp16"), (0, 1, 2), (1, 4))]
OTHERS = Case("bf16", 1, 2, "others")
# Number of ranks → cases. Together they have all pairs of precision, stage, accumulation and number of ranks.
PAIRS = {
    2: [
        CASES[0],
        *(Case("fp32", 1, 4), Case("fp32", 2, 1)),
        *(Case("bf16", 0, 4), Case("bf16", 1, 1)),
        *(Case("fp16", 0, 1), Case("fp16", 2, 4)),
        OTHERS,
    ],
    4: [CASES[0], Case("bf16", 2, 1), Case("fp16", 1, 4)],
}
RESETS = [Case(*given) for given in product(("bf16", "fp16"), (0, 1, 2))]
RESET, LATER, STRANDED = 10, 16, slice(10, 40)  # step of the reset; number of steps at the end; codes that are lost


class Probe(Model):
    def __init__(self, kinds: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.quantizer = Grouped([build(config, seed=0) for config in KINDS[kinds].values()])
        width = DIM * len(self.quantizer.parts)
        self.decoder = nn.Linear(width, width, bias=False)

    def forward(self, batch: Batch, step: int) -> Output:
        z = rows(batch.x).repeat(1, len(self.quantizer.parts))
        quantized = self.quantizer(z)
        y = self.decoder(quantized.z.to(self.decoder.weight.dtype))
        return Output(F.mse_loss(y.float(), z) + quantized.loss, {}, None)

    def update(self, step: int, lr: float) -> None:
        self.quantizer.update(step, lr)


def rows(x: Tensor) -> Tensor:
    """uint8 [B, 3, 4, 2] → fp32 [4 B, 6]."""
    return (x.reshape(-1, DIM).float() - 128) * SCALE


@cache
def images(step: int) -> Tensor:
    """The global batch of a step, uint8 [16, 3, 4, 2]. It drifts, so that codes die and are replaced throughout."""
    generator = torch.Generator().manual_seed(SEED + step)
    centre = 128 + 40 * torch.sin(torch.arange(DIM) + step / 30)
    x = centre + 24 * torch.randn(IMAGES, ROWS, DIM, generator=generator)
    return x.clamp(0, 255).byte().view(IMAGES, 3, 4, 2)


def batches(step: int, accumulation: int) -> Iterator[Batch]:
    """This rank's micro-batches of a step."""
    share = images(step).chunk(distributed.world())[distributed.rank()]
    for x in share.chunk(accumulation):
        yield Batch(x, torch.zeros(len(x)).long(), torch.zeros(len(x), 0), torch.arange(len(x)))


def settings_of(case: Case) -> settings.Config:
    optimizer = settings.Optimizer(lr=2e-2, warmup_steps=10)
    given = {"precision": case.precision, "zero_stage": case.zero, "accumulation": case.accumulation}
    small = {"zero_optimization": {"reduce_bucket_size": 1000, "allgather_bucket_size": 1000}}
    return settings.Config(None, steps=STEPS, global_batch=IMAGES, optimizer=optimizer, deepspeed=small, **given)


class Run:
    """One Probe under one engine."""

    def __init__(self, case: Case) -> None:
        self.accumulation = case.accumulation
        self.model = Probe(case.kinds)
        self.learner = Descent(self.model, settings_of(case))

    def train(self, first: int, until: int) -> None:
        for step in range(first, until):
            self.learner.step(batches(step, self.accumulation), step)


def alone(kinds: str, first: int = 0, until: int = STEPS, quantizer: Grouped | None = None) -> Grouped:
    """Train the same quantisers on the joined batches in one process, without learner, engine or DeepSpeed."""
    quantizer = quantizer or Probe(kinds).quantizer
    for step in range(first, until):
        quantizer(rows(images(step)).repeat(1, len(quantizer.parts)))
        quantizer.update(step, learning_rate(settings_of(Case()).optimizer, step, STEPS))
    return quantizer


def every_case(job: dict[str, Any]) -> None:
    """Train the "cases" one after another, in one process group."""
    for case in map(Case._make, job["cases"]):
        run = Run(case)
        run.train(0, STEPS)
        save(Path(job["out"]), f"{case.name}-", run.model)


def every_reset(job: dict[str, Any]) -> None:
    """Strand codes, let a reset replace them, and train on. Then train the last steps again, resumed from a checkpoint
    that was saved after the reset."""
    out = Path(job["out"])
    for case in RESETS:
        run = Run(case)
        run.train(0, 2)
        strand(run.model.quantizer, STRANDED)
        run.train(2, RESET + 1)
        save(out, f"{case.name}-reset-", run.model)
        tensors, state = run.learner.tensors(), run.learner.state()
        folder = out / f"{case.name}-checkpoints"
        if distributed.rank() == 0:
            checkpoint.save(folder, RESET + 1, tensors, state, keep=1)
        distributed.barrier()
        run.train(RESET + 1, LATER)
        save(out, f"{case.name}-later-", run.model)

        run = Run(case)
        found = checkpoint.newest(folder).path
        run.learner.load(partial(checkpoint.read_fitting, found), checkpoint.read_state(found))
        run.train(RESET + 1, LATER)
        save(out, f"{case.name}-resumed-", run.model)


def strand(quantizer: nn.Module, codes: slice) -> None:
    """Move codes far from all rows, as if they had been trained there for long."""
    for part in quantizer.modules():
        if not isinstance(part, VectorQuantizer):
            continue
        part.codebook[codes] += 1000
        if part.config.learning == "ema":
            part.learner.counts[codes] = 1
            part.learner.sums[codes] = part.codebook[codes]
        else:
            part.learner.mean[codes] = part.learner.square[codes] = 1
            part.learner.steps[codes] = 100


def broken(
    model: Model, fault: str, steps: Container[int], micros: Container[int] = range(99)
) -> Callable[[Batch, int], Output]:
    """Wrap the model's forward pass so that in these steps and micro-batches an image is NaN ("nan") or the loss is a
    thousand times as large ("spike")."""
    whole, current, micro = model.forward, -1, 0

    def forward(batch: Batch, step: int) -> Output:
        nonlocal current, micro
        micro = micro + 1 if step == current else 0
        current = step
        bad = step in steps and micro in micros
        if bad and fault == "nan":
            x = batch.x.float()
            x[0] = torch.nan
            batch = batch._replace(x=x)
        output = whole(batch, step)
        return output._replace(loss=1000 * output.loss) if bad and fault == "spike" else output

    return forward


class Collectives(TorchDispatchMode):
    """Records collectives: [name, entries] of each call."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[list[Any]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.namespace == "c10d":
            self.seen.append([func.__name__, sum(tensor.numel() for tensor in args[0])])
        return func(*args, **(kwargs or {}))


def collectives(job: dict[str, Any]) -> None:
    """Write the collectives of rank 0 in a step with a reset and one without: those of the quantisers' update, and all
    of them."""
    run = Run(OTHERS)
    run.train(0, RESET)
    update, seen = run.model.update, []

    def watched(step: int, lr: float) -> None:
        with Collectives() as mode:
            update(step, lr)
        seen.append(mode.seen)

    run.model.update = watched
    with Collectives() as whole:
        run.train(RESET, RESET + 2)
    if distributed.rank() == 0:
        (Path(job["out"]) / "collectives.json").write_text(json.dumps({"updates": seen, "whole": whole.seen}))


def save(out: Path, prefix: str, model: nn.Module) -> None:
    tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(tensors, out / f"{prefix}rank-{distributed.rank()}.safetensors")
