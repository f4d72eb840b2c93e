"""What a save costs the training thread: `python tests/benchmarks/save.py [--mib 512] [--zero 0] [--rounds 3]
[--folder DIR]`.

An engine whose weights and moments have that size is saved as in training, while this thread multiplies small matrices,
as one that launches kernels would. Printed: seconds of a plain copy of the state to fresh host memory, of the call that
saves, of the longest gap between two products (that call included) and its ratio to the plain copy, of the whole save;
and the peak of resident memory above what was held before, in MiB and as a multiple of the state. Once for ours, and
once for files made by the library's `save`, by turns.
"""

import argparse
import ctypes
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from unittest.mock import patch

import torch
from safetensors.torch import save
from torch import Tensor, nn

from tests.nn.memory import growth
from vaescale import distributed
from vaescale.lifecycle import checkpoint
from vaescale.lifecycle.writer import Writer
from vaescale.monitoring.console import Console
from vaescale.settings import Optimizer
from vaescale.training.engine import Engine

PART = 4 << 20  # bytes of a parameter
HEAD = "| serialised by | a copy, s | the call, s | longest gap, s | gap / copy | a save, s | memory, MiB | / state |"


class Parts(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.parts = nn.ParameterList([nn.Parameter(torch.randn(PART // 4)) for _ in range(count)])

    def forward(self) -> Tensor:
        return torch.stack([part.square().mean() for part in self.parts]).sum()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mib", type=int, default=512, help="size of weights and moments")
    parser.add_argument("--zero", type=int, default=0, choices=(0, 1, 2), help="ZeRO stage")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to save (default: the folder of temporary files)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    engine = trained(arguments.mib * 2**20 // (3 * PART), arguments.zero, distributed.init())
    folder = Path(tempfile.mkdtemp(dir=arguments.folder))
    sides = {"ours": checkpoint.serialised, "safetensors.torch.save": library}
    seen: dict[str, list[list[float]]] = {name: [] for name in sides}
    try:
        for step in range(arguments.rounds):
            for name, serialised in sides.items():
                with patch.object(checkpoint, "serialised", serialised):
                    seen[name].append(measured(engine, Writer(folder, 1, 0, Console(0, 1, loud=True)), step))
    finally:
        shutil.rmtree(folder)
        distributed.finish()
    print(f"{HEAD}\n|---|---:|---:|---:|---:|---:|---:|---:|")
    size = arguments.mib * 2**20
    for name, rows in seen.items():
        copied, called, gap, seconds, memory = (median(column) for column in zip(*rows, strict=True))
        print(
            f"| {name} | {copied:.3g} | {called:.3g} | {gap:.3g} | {gap / copied:.2f} | {seconds:.3g} "
            f"| {memory / 2**20:.0f} | {memory / size:.2f} |"
        )


def library(tensors: dict[str, Tensor]) -> Iterator[bytes]:
    yield save(tensors)


def trained(count: int, zero: int, device: torch.device) -> Engine:
    """Returns an engine with `count` parameters after a step, so that it has moments."""
    engine = Engine(Parts(max(1, count)).to(device), Optimizer(), "fp32", zero)
    engine.backward(engine.forward())
    engine.norm()
    no = torch.tensor(False, device=device)
    engine.apply(1e-3, no, no)
    return engine


def measured(engine: Engine, writer: Writer, step: int) -> list[float]:
    """Returns the seconds of a plain copy, of the call that saves, of the longest gap and of the whole save, and the
    save's memory in bytes."""
    called, gaps = 0.0, []

    def work() -> None:
        nonlocal called
        a, last = torch.randn(16, 16), time.perf_counter()
        writer.save(step, engine.tensors, {"step": step}, ())
        called = time.perf_counter() - last
        while writer._thread and writer._thread.is_alive():
            a = torch.tanh(a @ a)
            now = time.perf_counter()
            gaps.append(now - last)
            last = now

    fresh()
    begun = time.perf_counter()
    memory = growth(work)
    seconds = time.perf_counter() - begun
    writer.collect(wait=True, last=True)
    fresh()
    copied = time.perf_counter()
    held = [value.detach().to("cpu", copy=True) for value in state(engine)]
    copied = time.perf_counter() - copied
    del held
    return [copied, called, max(gaps, default=called), seconds, memory]


def fresh() -> None:
    """Returns freed memory to the system, so that the next copy pages its memory in, as the first one of a run does."""
    ctypes.CDLL(None).malloc_trim(0)


def state(engine: Engine) -> list[Tensor]:
    """Returns the weights and moments where they lie."""
    held = [tensor for group in engine.optimizer.param_groups for tensor in group["params"]]
    return [*held, *(engine.optimizer.state[tensor][key] for tensor in held for key in ("exp_avg", "exp_avg_sq"))]


if __name__ == "__main__":
    main()
