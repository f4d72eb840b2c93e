"""The parts of the kit. `python -m tests.gpu.parts NAME OUT PRETEND` runs one and writes OUT/NAME.json."""

import json
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tests.device.kernels import Kernels
from vaescale import distributed, settings
from vaescale.interfaces import Batch
from vaescale.settings import Config
from vaescale.training.descent import Descent

ROOT = Path(__file__).parents[2]
FAMILIES = {name: f"tests/integration/{name}.yaml" for name in ("tiny", "tiny_vae", "tiny_hvae", "tiny_vdvae")}
STEPS = 8
# Largest relative difference of losses from those of a CPU in fp32: products are summed in another order, and 16 bits
# keep three digits (bf16) or four (fp16), in networks of up to ten layers.
CLOSE = {"fp32": 1e-3, "bf16": 5e-2, "fp16": 5e-2}
TIMED = {  # config → images in a step
    "configs/vqvae_imagenet128.yaml": 64,
    "configs/vae_imagenet64.yaml": 64,
    "configs/hvae_imagenet32.yaml": 16,
    "configs/hvae_imagenet64.yaml": 8,
}

Result = dict[str, Any]


class Part(NamedTuple):
    name: str
    limit: int  # seconds
    work: Callable[[Path, bool], Result]
    on_cpu: bool = False


def environment(out: Path, pretend: bool) -> Result:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    if torch.cuda.is_available():
        found |= {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda or ""}
        found["memory, GiB"] = f"{torch.cuda.get_device_properties(0).total_memory / 2**30:.0f}"
    return found


def kernels(out: Path, pretend: bool) -> Result:
    """Triton's search, noise and guard against float64 or the operations on a CPU, by their tests."""
    files = ["nn/test_nearest_triton.py", "nn/test_noise.py", "nn/test_nearest.py", "training/test_guard.py"]
    chosen = ["-k", "gpu"] if pretend else []
    nothing_to_test = 5
    printed = python(
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        *(f"tests/{file}" for file in files),
        *chosen,
        codes=(0, nothing_to_test),
    )
    return {"tests": printed.strip().splitlines()[-1]}


def losses(config: Config, steps: int = STEPS) -> list[float]:
    """Of a training on noise, which no data set is needed for."""
    learner, batch = made(config)
    return [float(learner.step([batch], step)["loss"]) for step in range(steps)]


def made(config: Config) -> tuple[Descent, Batch]:
    device = distributed.init()
    torch.manual_seed(0)
    learner = Descent(settings.build(config).to(device), config)
    blank = settings.blank(config, config.global_batch)
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, blank.x.shape, dtype=torch.uint8, generator=generator)
    return learner, blank._replace(x=x, sample=torch.arange(config.global_batch)).to(device)


def load(path: str, *overrides: str) -> Config:
    return settings.load(ROOT / path, ["run=none", "data.root=none", *overrides])


def reference(out: Path, pretend: bool) -> Result:
    """The losses of each family on the CPU in fp32."""
    return {name: losses(load(path, "precision=fp32")) for name, path in FAMILIES.items()}


def families(out: Path, pretend: bool) -> Result:
    """Each family at each precision and ZeRO stage, against the CPU's losses."""
    wanted = json.loads((out / "report.json").read_text())["reference"]
    found = {}
    for name, path in FAMILIES.items():
        for precision in ("fp32",) if pretend else CLOSE:
            for zero in (0, 1, 2):
                seen = losses(load(path, f"precision={precision}", f"zero_stage={zero}"))
                off = max(abs(a - b) / abs(b) for a, b in zip(seen, wanted[name], strict=True))
                assert off <= CLOSE[precision], f"{name} {precision} ZeRO {zero}: {seen} instead of {wanted[name]}"
                found[f"{name}, {precision}, ZeRO {zero}"] = off
    return found


def waits(out: Path, pretend: bool) -> Result:
    """No step waits for the host: torch raises an error where one would."""
    found = {}
    for name, path in FAMILIES.items():
        for precision in ("fp32",) if pretend else ("fp32", "bf16"):
            learner, batch = made(load(path, f"precision={precision}"))
            for step in range(2):  # what is made once
                learner.step([batch], step)
            with refusing_waits():
                for step in range(2, 12):  # among them a step that resets codes
                    learner.step([batch], step)
            found[f"{name}, {precision}"] = "none" if torch.cuda.is_available() else "not checked without CUDA"
    return found


@contextmanager
def refusing_waits() -> Iterator[None]:
    if not torch.cuda.is_available():
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def launches(out: Path, pretend: bool) -> Result:
    """Kernels that a step launches, as the profiler sees them, beside the operations that torch dispatches."""
    found = {}
    for name, path in FAMILIES.items():
        learner, batch = made(load(path, "precision=fp32"))
        learner.step([batch], 0)
        with Kernels() as dispatched:
            learner.step([batch], 1)
        found[name] = {"dispatched": dispatched.total()}
        if torch.cuda.is_available():
            from torch.profiler import ProfilerActivity, profile

            with profile(activities=[ProfilerActivity.CUDA]) as seen:
                learner.step([batch], 2)
                torch.cuda.synchronize()
            events = [one for one in seen.events() if one.device_type == torch.autograd.DeviceType.CUDA]
            found[name]["launched"] = sum("mem" not in one.name.lower() for one in events)
    return {name: str(entry) for name, entry in found.items()}


def speed(out: Path, pretend: bool) -> Result:
    """Images a second and peak memory of the trainer's step, in bf16."""
    found = {}
    timed = {"tests/integration/tiny.yaml": 4} if pretend else TIMED
    for path, images in timed.items():
        for side in ("eager", "channels_last", "compiled"):
            if pretend and side == "compiled":
                continue
            precision = "bf16" if torch.cuda.is_available() else "fp32"
            learner, batch = made(load(path, f"precision={precision}", f"global_batch={images}"))
            if side == "channels_last":  # after initialisation: DeepSpeed cannot broadcast such parameters
                learner.model.to(memory_format=torch.channels_last)
            if side == "compiled":
                for child in learner.model.children():
                    child.compile()
            try:
                found[f"{Path(path).stem}, {side}"] = timing(learner, batch, images)
            except Exception as error:
                found[f"{Path(path).stem}, {side}"] = f"failed: {str(error).splitlines()[0][:200]}"
            del learner
    return found


def timing(learner: Descent, batch: Batch, images: int, rounds: int = 20) -> str:
    from tests.benchmarks.paired import clock_of

    clock = clock_of(batch.x.device.type)
    for step in range(5):
        learner.step([batch], step)
    if cuda := torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    begun = clock()
    for step in range(5, 5 + rounds):
        learner.step([batch], step)
    seconds = (clock() - begun) / rounds
    memory = f", {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB" if cuda else ""
    return f"{1000 * seconds:.1f} ms a step, {images / seconds:.1f} images/s{memory}"


def python(*arguments: str, codes: tuple[int, ...] = (0,)) -> str:
    """Returns what a command of Python printed, which must end with one of `codes`."""
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, text=True, capture_output=True, check=False)
    assert done.returncode in codes, (done.stdout + done.stderr)[-3000:]
    return done.stdout


def search(out: Path, pretend: bool) -> Result:
    """Nearest codes and their statistics beside the roofline."""
    if not torch.cuda.is_available():
        return {"left out": "it needs CUDA; on a CPU run tests/benchmarks/codebook.py"}
    return {"table": python("tests/benchmarks/codebook.py", "--rounds", "5", "--only", "cuda")}


def save(out: Path, pretend: bool) -> Result:
    """What a save costs the training thread."""
    return {
        f"{mib} MiB": python("tests/benchmarks/save.py", "--mib", str(mib), "--rounds", "1")
        for mib in ((8,) if pretend else (512, 2048))
    }


PARTS = [
    Part("environment", 20, environment),
    Part("kernels", 90, kernels),
    Part("reference", 60, reference, on_cpu=True),
    Part("families", 90, families),
    Part("waits", 40, waits),
    Part("launches", 40, launches),
    Part("speed", 120, speed),
    Part("search", 60, search),
    Part("save", 60, save),
]

if __name__ == "__main__":
    _, name, out, pretend = sys.argv
    (part,) = (part for part in PARTS if part.name == name)
    (Path(out) / f"{name}.json").write_text(json.dumps(part.work(Path(out), pretend == "1")))
    distributed.finish()
