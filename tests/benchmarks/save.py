"""What a save costs the training thread: `python tests/benchmarks/save.py [--mib 512] [--rounds 3] [--folder DIR]`.

A checkpoint of that size is saved on a thread, while this thread multiplies small matrices, as one that launches
kernels would. Printed: seconds of a save, the longest gap between two products, and the peak of resident memory above
what was held before; once for ours, and once for files made by the library's `save`, by turns.
"""

import argparse
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from threading import Thread
from unittest.mock import patch

import torch
from safetensors.torch import save
from torch import Tensor

from tests.nn.memory import growth
from vaescale.lifecycle import checkpoint

PART = 4 << 20  # bytes of a tensor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mib", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to save (default: the folder of temporary files)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tensors = {f"layer.{number}": torch.randn(PART // 4) for number in range(arguments.mib * 2**20 // PART)}
    folder = Path(tempfile.mkdtemp(dir=arguments.folder))
    sides = {"ours": checkpoint.serialised, "safetensors.torch.save": library}
    seen: dict[str, list[tuple[float, float, float]]] = {name: [] for name in sides}
    try:
        for step in range(arguments.rounds):
            for name, serialised in sides.items():
                with patch.object(checkpoint, "serialised", serialised):
                    seen[name].append(measured(folder, step, tensors))
    finally:
        shutil.rmtree(folder)
    print("| serialised by | a save, s | longest gap, ms | memory above the state's, MiB |\n|---|---:|---:|---:|")
    for name, rows in seen.items():
        seconds, gap, memory = (median(column) for column in zip(*rows, strict=True))
        print(f"| {name} | {seconds:.2f} | {1000 * gap:.0f} | {memory / 2**20:.0f} |")


def library(tensors: dict[str, Tensor]) -> Iterator[bytes]:
    yield save(tensors)


def measured(folder: Path, step: int, tensors: dict[str, Tensor]) -> tuple[float, float, float]:
    """Returns the seconds of a save, its longest gap in seconds, and its memory in bytes."""
    gaps: list[float] = []
    saving = Thread(target=checkpoint.save, args=(folder, step, {"model": tensors}, {"step": step}, 1))

    def work() -> None:
        a, last = torch.randn(16, 16), time.perf_counter()
        saving.start()
        while saving.is_alive():
            a = torch.tanh(a @ a)
            now = time.perf_counter()
            gaps.append(now - last)
            last = now

    begun = time.perf_counter()
    memory = growth(work)
    return time.perf_counter() - begun, max(gaps), memory


if __name__ == "__main__":
    main()
