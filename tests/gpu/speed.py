"""The parts of the kit that measure."""

import io
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image
from torch._subclasses import FakeTensorMode

from tests.benchmarks.paired import clock_of
from tests.gpu.common import ALONE, CUDA, Part, Results, load, made, python, tried
from vaescale import settings
from vaescale.data import stream
from vaescale.data.shards import Sample, write
from vaescale.files import readable_size
from vaescale.interfaces import Batch
from vaescale.lifecycle.writer import Writer
from vaescale.monitoring.console import Console
from vaescale.settings import Config
from vaescale.training.descent import Descent

PRECISION = "bf16" if CUDA else "fp32"
TINY = "tests/integration/tiny.yaml"
VQVAE, HVAE = "configs/vqvae_imagenet128.yaml", "configs/hvae_imagenet64.yaml"
TIMED = {VQVAE: 64, "configs/vae_imagenet64.yaml": 64, "configs/hvae_imagenet32.yaml": 16, HVAE: 8}  # images in a step
FEW = 16  # images in a step of a model so deep that each measurement takes half a minute
WARM, ROUNDS = 5, 10  # steps
PICTURES, SHAPE = 512, (500, 375)  # of the loader's part, in the usual shape of ImageNet's


def configs(pretend: bool) -> dict[str, Config]:
    timed = {TINY: 4} if pretend else TIMED
    return {
        Path(path).stem: load(path, f"precision={PRECISION}", f"global_batch={images}", "accumulation=1")
        for path, images in timed.items()
    }


def steps(out: Path, pretend: bool) -> Results:
    """Time and memory of the trainer's step."""
    for name, config in configs(pretend).items():
        yield f"{name}, eager", tried(lambda config=config: timed(config))
        if config.global_batch > FEW:
            yield f"{name}, channels_last", tried(lambda config=config: timed(replace(config, channels_last=True)))
        yield f"{name}, memory estimated by --dry-run", tried(lambda config=config: estimated(config))


def compiled(out: Path, pretend: bool) -> Results:
    """The same with `compile: true`, and how long it compiles."""
    if not CUDA:
        yield "left out", "it needs CUDA"
        return
    for name, config in configs(pretend).items():
        yield name, tried(lambda config=config: timed(replace(config, compile=True)))


def timed(config: Config) -> str:
    learner, batch = made(config)
    clock = clock_of(batch.x.device.type)
    begun = clock()
    for step in range(WARM):
        learner.step([batch], step)
    first = clock() - begun
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    begun = clock()
    for step in range(WARM, WARM + ROUNDS):
        learner.step([batch], step)
    seconds = (clock() - begun) / ROUNDS
    memory = f", at most {readable_size(torch.cuda.max_memory_allocated())}, {busy(learner, batch)}" if CUDA else ""
    slow = f", the first {WARM} steps took {first:.0f} s" if config.compile else ""
    images = config.global_batch
    return f"{1000 * seconds:.1f} ms a step of {images} images, {images / seconds:.1f} images/s{memory}{slow}"


def busy(learner: Descent, batch: Batch) -> str:
    """Says how many kernels a step launches, and for how long the device executes them."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        learner.step([batch], WARM + ROUNDS)
        torch.cuda.synchronize()
    kernels = [one for one in seen.events() if one.device_type == torch.autograd.DeviceType.CUDA]
    return f"{len(kernels)} kernels take {sum(one.time_range.elapsed_us() for one in kernels) / 1000:.1f} ms"


def estimated(config: Config) -> str:
    with FakeTensorMode():
        memory = Descent.memory(settings.build(config), config, 1)
    return readable_size(sum(memory.values()))


def loader(out: Path, pretend: bool) -> Results:
    """How fast JPEGs are loaded, and how much of the training time is spent waiting for them."""
    (name, config), *_ = configs(pretend).items()
    count = 24 if pretend else PICTURES
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "train", [Sample(f"{i:05d}", photograph(i), 0) for i in range(count)], 64, [])
        yield "pictures", f"{count} JPEGs of {SHAPE[0]} × {SHAPE[1]} and {len(photograph(0)) / 1000:.0f} kB"
        for workers in (2,) if pretend else (8, 16):
            data = replace(config.data, root=folder, workers=workers, columns=8, decoder="turbo")
            yield f"{workers} workers alone", tried(lambda data=data: loaded(config, data, None))
            yield f"{workers} workers, {name} trains", tried(lambda data=data: loaded(config, data, made(config)[0]))


def photograph(seed: int) -> bytes:
    """Returns a JPEG of about the size of a photograph's."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (40, 30, 3), np.uint8)).resize(SHAPE, Image.Resampling.BICUBIC)
    pixels = np.asarray(coarse) + random.normal(0, 8, (SHAPE[1], SHAPE[0], 3))
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def loaded(config: Config, data: stream.Config, learner: Descent | None) -> str:
    """learner: None: the loader alone."""
    device = "cuda" if CUDA else "cpu"
    clock, images = clock_of(device), config.global_batch
    batches = stream.train_loader(stream.TrainSlices(data, 0), 0, images, 1, 0, 1, pin=CUDA)
    waited = 0.0
    for step in range(WARM + ROUNDS):
        if step == WARM:
            begun, waited = clock(), 0.0
        asked = time.perf_counter()
        batch = next(batches).batch
        waited += time.perf_counter() - asked
        if learner:
            learner.step([batch.to(torch.device(device))], step)
    seconds = clock() - begun
    return f"{ROUNDS * images / seconds:.0f} images/s, {waited / seconds:.1%} of the time waiting for the loader"


def search(out: Path, pretend: bool) -> Results:
    """Nearest codes and their statistics compared with the roofline."""
    if CUDA:
        yield "table", tried(lambda: python("tests/benchmarks/codebook.py", "--rounds", "5", "--only", "cuda"))
    else:
        yield "left out", "it needs CUDA; on a CPU run tests/benchmarks/codebook.py"


def save(out: Path, pretend: bool) -> Results:
    """What a save costs the training thread."""
    (name, config) = list(configs(pretend).items())[-1]
    yield f"{name}, from the device", tried(lambda: saved(config))
    for mib in (8,) if pretend else (512,):
        yield (
            f"{mib} MiB on the host",
            tried(lambda mib=mib: python("tests/benchmarks/save.py", "--mib", str(mib), "--rounds", "1")),
        )


def saved(config: Config) -> str:
    learner, batch = made(config)
    clock = clock_of(batch.x.device.type)

    def seconds(step: int) -> float:
        begun = clock()
        learner.step([batch], step)
        return clock() - begun

    usual = median([seconds(step) for step in range(WARM + ROUNDS)][WARM:])
    with tempfile.TemporaryDirectory() as folder:
        writer = Writer(Path(folder), 1, 0, Console(0, 1, loud=False))
        begun = clock()
        writer.save(1, learner.tensors, {}, dict(learner.model.named_buffers()))
        stall = clock() - begun
        during = [seconds(WARM + ROUNDS + step) for step in range(ROUNDS)]
        writer.collect(wait=True, last=True)
        size = sum(file.stat().st_size for file in Path(folder).rglob("*.safetensors"))
        total = clock() - begun
    return (
        f"{size / 2**20:.0f} MiB: training waits {1000 * stall:.0f} ms; the save ends after {total:.1f} s; "
        f"a step takes {1000 * usual:.1f} ms, and at most {1000 * max(during):.1f} ms after the save began"
    )


PARTS = [
    Part(
        "steps",
        120,
        steps,
        "configs/README.md, state of the ImageNet configs. `launch/plan.py --step-time` takes the seconds of a step. "
        "Where channels_last is 5 % faster or more, set channels_last: true in that config.",
        ALONE,
    ),
    Part(
        "loader",
        60,
        loader,
        "data.workers in the ImageNet configs: the fewest at which waiting takes less than 1 %.",
        ALONE,
    ),
    Part("search", 60, search, "vaescale/nn/README.md, «Speed».", ALONE),
    Part("save", 120, save, "vaescale/lifecycle/README.md, where it says what a save costs.", ALONE),
    Part(
        "compiled",
        150,
        compiled,
        "configs: set `compile: true` where a step is 5 % faster or more than in the part steps.",
        ALONE,
    ),
]
