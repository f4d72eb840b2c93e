"""The parts of the kit that check. `python -m tests.gpu.parts NAME OUT PRETEND` runs any part, and writes OUT/NAME.json
after each result."""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import samples
from tests.device.kernels import Kernels
from tests.gpu import speed
from tests.gpu.common import CUDA, FIRST, ROOT, TOGETHER, Part, Results, load, made, python, tried
from vaescale import distributed
from vaescale.data.shards import write
from vaescale.settings import Config

FAMILIES = {
    name: f"tests/integration/{name}.yaml"
    for name in ("tiny", "tiny_vae", "tiny_hvae", "tiny_vdvae", "tiny_autoencoder")
}
STEPS = 8
SCALE = 256.0  # of fp16's losses
# Largest relative difference of losses from those of a CPU in fp32: products are summed in another order, and 16 bits
# keep three digits (bf16) or four (fp16).
CLOSE = {"fp32": 1e-4, "bf16": 5e-3, "fp16": 1e-3}
# Tests that compare CUDA kernels with float64 or a CPU; those of a new kernel belong here.
KERNEL_TESTS = (
    "tests/nn/test_nearest_triton.py",
    "tests/nn/test_noise.py",
    "tests/training/test_guard.py",
)
NO_TEST = 5  # pytest's exit code if it found none


def environment(out: Path, pretend: bool) -> Results:
    """What a reader needs to compare the numbers with others."""
    yield "commit", commit()
    yield "python", platform.python_version()
    for name in ("torch", "triton", "deepspeed", "numpy"):
        yield name, tried(lambda name=name: version(name))
    yield "CPU cores", len(os.sched_getaffinity(0))
    yield "/dev/shm, GiB", shutil.disk_usage("/dev/shm").total / 2**30 if Path("/dev/shm").exists() else "none"
    yield "nvcc", shutil.which("nvcc") or "none (not needed)"
    if not CUDA:
        yield "device", "CPU"
        return
    properties = torch.cuda.get_device_properties(0)
    yield (
        "device",
        f"{properties.name}, {properties.multi_processor_count} multiprocessors, {torch.cuda.device_count()} visible",
    )
    yield "compute capability", f"{properties.major}.{properties.minor}"
    yield "memory, GiB", properties.total_memory / 2**30
    yield (
        "CUDA, cuDNN, NCCL",
        tried(lambda: f"{torch.version.cuda}, {torch.backends.cudnn.version()}, {torch.cuda.nccl.version()}"),
    )


def commit() -> str:
    command = ["git", "-c", f"safe.directory={ROOT}", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, text=True, capture_output=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown (no git, or no repository)"


def version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "none"


def kernels(out: Path, pretend: bool) -> Results:
    """Triton's search, noise and guard against float64 or the operations on a CPU, by their tests."""
    # The interpreter of Triton 3.6 fails with NumPy 2.4, and has nothing to do with a GPU.
    chosen = ["-k", "gpu" if pretend else "not interpreter"]
    for file in KERNEL_TESTS:
        command = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "--timeout", "100", file, *chosen)
        yield file, tried(lambda command=command: python(*command, codes=(0, NO_TEST)).strip().splitlines()[-1])


def losses(config: Config) -> list[float]:
    learner, batch = made(config)
    scaler = learner.engine.scaler()  # of fp16; its first scale would be too large, and skip steps
    learner.engine.load_scaler({key: SCALE if key in ("scale", "cur_scale") else scaler[key] for key in scaler})
    seen = [float(learner.step([batch], step)["loss"]) for step in range(STEPS)]
    taken = learner.engine.optimizer_steps()
    assert taken == STEPS, f"{STEPS - taken} of {STEPS} steps were skipped"
    return seen


def reference(out: Path, pretend: bool) -> Results:
    """The losses of each family on the CPU in fp32."""
    for name, path in FAMILIES.items():
        yield name, tried(lambda path=path: losses(load(path, "precision=fp32")))


def families(out: Path, pretend: bool) -> Results:
    """Each family at each precision and ZeRO stage, against the CPU's losses."""
    wanted = json.loads((out / "report.json").read_text())["reference"]
    for name in FAMILIES:
        for precision in ("fp32",) if pretend else CLOSE:
            for zero in (0, 1, 2) if precision == "fp32" else (0, 2):
                case = (name, precision, zero, wanted.get(name))
                yield f"{name}, {precision}, ZeRO {zero}", tried(lambda case=case: difference(*case))


def difference(name: str, precision: str, zero: int, wanted: Any) -> float:
    """Returns the largest relative difference of losses from `wanted`."""
    assert isinstance(wanted, list), f"the part reference has no losses: {wanted}"
    seen = losses(load(FAMILIES[name], f"precision={precision}", f"zero_stage={zero}"))
    off = max(abs(a - b) / abs(b) for a, b in zip(seen, wanted, strict=True))
    assert off <= CLOSE[precision], f"{off:.2g} > {CLOSE[precision]}: losses {seen} instead of {wanted}"
    return off


def resume(out: Path, pretend: bool) -> Results:
    """A run that stops after its first step and goes on, against one that does not stop."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write(root / "data/train", samples(90), 20, [])
        write(root / "data/val", samples(11, seed=1), 4, [])
        precision = "bf16" if CUDA else "fp32"
        weights = {}
        for name, stopped in (("through", False), ("stopped", True)):
            run = root / name
            run.mkdir()
            command = (
                *("launch/train.py", "--config", FAMILIES["tiny"], f"run={run}", f"data.root={root / 'data'}"),
                *(f"precision={precision}", "deterministic=true", "data.workers=2"),
            )
            if stopped:
                (run / "STOP").touch()
                yield "stops", tried(lambda command=command: ended(python(*command, codes=(75,))))
            yield name, tried(lambda command=command: ended(python(*command)))
            weights[name] = [load_file(file) for file in run.glob("checkpoints/step-*12/model.safetensors")]
        yield "weights", tried(lambda: equal(*weights["through"], *weights["stopped"]))


def ended(output: str) -> str:
    """Returns the line that says at which step a run has ended."""
    (line,) = (line for line in output.splitlines() if " finished at step " in line or " stopped at step " in line)
    return re.sub(r"^\S+ ", "", line)


def equal(wanted: dict[str, torch.Tensor], seen: dict[str, torch.Tensor]) -> str:
    off = [name for name, value in wanted.items() if not torch.equal(seen[name], value)]
    assert not off, f"these differ: {', '.join(off)}"
    return "the same bits"


def waits(out: Path, pretend: bool) -> Results:
    """No step waits for the host: torch raises an error where one would."""
    for name, path in FAMILIES.items():
        for precision in ("fp32",) if pretend else ("fp32", "bf16"):
            config = load(path, f"precision={precision}")
            yield f"{name}, {precision}", tried(lambda config=config: without_waits(config))


def without_waits(config: Config) -> str:
    learner, batch = made(config)
    for step in range(2):  # what is made once
        learner.step([batch], step)
    with refusing_waits():
        for step in range(2, 12):  # among them a step that resets codes
            learner.step([batch], step)
    return "none" if CUDA else "runs; waits are not seen without CUDA"


@contextmanager
def refusing_waits() -> Iterator[None]:
    if not CUDA:
        yield
        return
    torch.cuda.synchronize()
    with pytest.MonkeyPatch.context() as patch:
        # The mode does not know of these.
        for place in (torch.cuda, torch.cuda.Event, torch.cuda.Stream):
            patch.setattr(place, "synchronize", refused)
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


def refused(*given: Any) -> NoReturn:
    raise RuntimeError("a step waits for the device")


def launches(out: Path, pretend: bool) -> Results:
    """Kernels that a step launches, as the profiler sees them, compared with the operations that torch dispatches."""
    for name, path in FAMILIES.items():
        yield name, tried(lambda path=path: counted(load(path, "precision=fp32")))


def counted(config: Config) -> str:
    learner, batch = made(config)
    learner.step([batch], 0)
    with Kernels() as dispatched:
        learner.step([batch], 1)
    text = f"{dispatched.total()} operations dispatched"
    if not CUDA:
        return text
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        learner.step([batch], 2)
        torch.cuda.synchronize()
    events = [one for one in seen.events() if one.device_type == torch.autograd.DeviceType.CUDA]
    copies = sum("mem" in one.name.lower() for one in events)
    return f"{text}, {len(events) - copies} kernels and {copies} copies launched"


PARTS = [
    Part("environment", 60, environment, "State the device and the versions with every number.", FIRST),
    Part(
        "kernels",
        150,
        kernels,
        "If a kernel fails, set TRITON = False in vaescale/numerics.py until it is fixed. The operations of torch then "
        "do the same.",
        TOGETHER,
    ),
    Part("reference", 60, reference, "", FIRST, on_cpu=True),
    Part(
        "families",
        180,
        families,
        "Numbers are relative differences from the CPU's losses. If all pass, say so in launch/README.md, «What was "
        "tested, and what was not», with the device and the commit.",
        TOGETHER,
    ),
    Part(
        "resume",
        150,
        resume,
        "As families. If the bits differ, find the operation that `deterministic: true` misses.",
        TOGETHER,
    ),
    Part(
        "waits",
        100,
        waits,
        "The traceback in output.txt names the operation that waits; plant it in tests/device.",
        TOGETHER,
    ),
    Part(
        "launches",
        100,
        launches,
        "More kernels than operations: what to fuse next, see `torch.profiler` of that step.",
        TOGETHER,
    ),
    *speed.PARTS,
]


def main(name: str, out: Path, pretend: bool) -> None:
    (part,) = (part for part in PARTS if part.name == name)
    found = {}
    for key, value in part.work(out, pretend):
        found[key] = value
        partial = out / f"{name}.partial"  # after each result, because the part may be ended at any time
        partial.write_text(json.dumps(found))
        partial.replace(out / f"{name}.json")
    distributed.finish()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3] == "1")
