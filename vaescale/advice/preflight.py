"""Checks before a long run starts, each with a one-line result."""

import io
import os
import platform
import re
import resource
import shutil
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import xxhash
from packaging.requirements import Requirement

from .. import config as mechanics
from .. import distributed
from ..data import DataError, decode, stream, workers
from ..files import readable_size
from ..interfaces import Batch
from ..lifecycle.checkpoint import newest
from ..lifecycle.lock import held
from ..lifecycle.writer import Writer
from ..settings import Config, blank, micro_batch
from ..training.trainer import Trainer

OK, WARN, FAIL = "ok", "warn", "FAIL"
WRITTEN = 64 * 2**20  # bytes written to measure the disk
SLOW_DISK = 50 * 2**20  # bytes per second below which there is a warning
OWN_FILES = 256  # files that a rank opens in addition to shards and batches: libraries, sockets, logs
CLOCKS = 1.0  # seconds by which the ranks' clocks may differ


class Finding(NamedTuple):
    level: str  # OK, WARN or FAIL
    what: str
    cure: str = ""

    def __str__(self) -> str:
        return f"{self.level}: {self.what}{f': {self.cure}' if self.cure else ''}"


def alone(config: Config, world: int) -> Iterator[Finding]:
    """Yields the findings of this rank alone; needs no process group."""
    here = ranks_here(world)
    yield versions()
    yield devices(config, here)
    if config.data.workers:
        yield shared_memory(config, world, here)
    yield file_limit(config)
    yield disk(Path(config.run))
    yield lock(Path(config.run))
    yield index(config)


def ranks_here(world: int) -> int:
    """Returns the number of ranks on this node as set by torchrun or DeepSpeed's launcher, else `world`. Raises
    Misplaced if the variable is not a number."""
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        if given := os.environ.get(name):
            if not re.fullmatch("[1-9][0-9]{0,8}", given):
                raise distributed.Misplaced(f"{name}={given!r} is not a number of ranks: unset it")
            return int(given)
    return world


def together(config: Config) -> Iterator[Finding]:
    """Yields the findings of all ranks together. Collective; call it only if no rank has failed a check in `alone`."""
    yield all_reduce()
    yield clocks()
    yield agreement(config)
    yield one_step(config)


def versions() -> Finding:
    try:
        wanted = [Requirement(line) for line in metadata.requires("vaescale") or []]
    except metadata.PackageNotFoundError:
        return Finding(WARN, "vaescale is not installed, so versions cannot be checked", "run `pip install -e .`")
    wanted = [one for one in wanted if not one.marker or one.marker.evaluate({"extra": ""})]
    wrong = []
    for one in wanted:
        found = _installed(one.name)
        if found == "none" or not one.specifier.contains(found, prereleases=True):
            wrong.append(f"{one.name}{one.specifier} (installed: {found})")
    if wrong:
        return Finding(FAIL, f"vaescale needs {', '.join(wrong)}", "run `pip install -c launch/constraints.txt -e .`")
    shown = ", ".join(f"{name} {_installed(name)}" for name in ("torch", "deepspeed"))
    return Finding(OK, f"Python {platform.python_version()}, {shown}, and all other requirements of pyproject.toml")


def devices(config: Config, here: int) -> Finding:
    if not torch.cuda.is_available():
        cores = len(os.sched_getaffinity(0))
        if here > cores:
            return Finding(WARN, f"no accelerator, and {here} ranks share {cores} cores", "start fewer ranks")
        return Finding(OK, f"no accelerator, {cores} cores")
    found = torch.cuda.device_count()
    name = torch.cuda.get_device_name(0)
    if here > found and "SLURM_PROCID" not in os.environ:
        return Finding(FAIL, f"{here} ranks share {found} × {name}", "start one rank per accelerator")
    if config.precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return Finding(WARN, f"{name} only emulates bf16", "set precision=fp16")
    return Finding(OK, f"{found} × {name}")


def shared_memory(config: Config, world: int, here: int, folder: Path = workers.SHARED) -> Finding:
    """Checks the shared memory through which workers hand over batches; if it is full they fall back to pipes."""
    need = here * stream.in_flight(config.data, micro_batch(config, world) * blank(config, 1).x.nbytes)
    free = workers.free_shared_memory(folder)
    what = f"{readable_size(free)} of shared memory are free, and batches in transit take up to {readable_size(need)}"
    if free < need:
        cure = "lower data.prefetch or data.workers, or give a container more (--shm-size, --ipc)"
        return Finding(WARN, f"{what}: some will go through pipes, which is slower", cure)
    return Finding(OK, what)


def file_limit(config: Config) -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    need = OWN_FILES + config.data.columns + config.data.workers * config.data.prefetch * len(Batch._fields)
    if soft != resource.RLIM_INFINITY and soft < need:
        return Finding(WARN, f"{soft} open files are allowed, and a rank may need {need}", f"run `ulimit -n {hard}`")
    return Finding(OK, f"{soft} open files are allowed, and a rank may need {need}")


def disk(run: Path) -> Finding:
    """Measures how fast the disk of the run directory takes a checkpoint's bytes."""
    folder = next(path for path in (run, *run.absolute().parents) if path.is_dir())
    file = folder / f".doctor-{os.getpid()}"
    data = np.random.default_rng().bytes(WRITTEN)
    try:
        begun = time.monotonic()
        with file.open("wb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
        speed = WRITTEN / (time.monotonic() - begun)
    except OSError as error:
        return Finding(FAIL, f"{folder} cannot be written ({error.strerror})", "give another run=…, or free disk space")
    finally:
        file.unlink(missing_ok=True)
    what = f"{folder} writes {readable_size(speed)}/s and has {readable_size(shutil.disk_usage(folder).free)} free"
    if speed < SLOW_DISK:
        return Finding(WARN, what, "raise every.checkpoint if a save takes longer than the steps between two saves")
    return Finding(OK, what)


def lock(run: Path) -> Finding:
    if who := held(run):
        return Finding(WARN, f"{run} is in use by another training, {who}", "wait until it ends, or give another run=…")
    return Finding(OK, f"no other training uses {run}")


def index(config: Config) -> Finding:
    """Checks both indexes, and reads the first and the last sample of each."""
    counts = []
    for split in ("train", "val"):
        folder = Path(config.data.root) / split
        try:
            samples = stream.Samples(folder, config.data.cache, config.data.cache_gib)
            samples.index.check()
            wrong = ""
            for sample in (0, len(samples.index) - 1):
                samples.read(sample)
        except DataError as error:
            return Finding(FAIL, str(error))
        except (OSError, decode.Damaged) as error:
            wrong = str(error)
        if wrong:
            return Finding(FAIL, f"{folder}: {wrong}", f"run `python launch/shards.py verify {folder}` for details")
        counts.append(len(samples.index))
    return Finding(OK, f"{counts[0]} training and {counts[1]} validation images can be read")


def all_reduce() -> Finding:
    begun = time.monotonic()
    distributed.gather(torch.zeros(1))
    return Finding(
        OK, f"{distributed.world()} rank(s) exchanged a number in {1000 * (time.monotonic() - begun):.1f} ms"
    )


def clocks() -> Finding:
    distributed.barrier()
    times = distributed.gather(torch.tensor([time.time()], dtype=torch.float64))
    apart = float(times.max() - times.min())
    if apart > CLOCKS:
        return Finding(
            WARN, f"the ranks' clocks are {apart:.1f} s apart", "synchronise them by NTP, or times in logs do not match"
        )
    return Finding(OK, f"the ranks' clocks are {apart:.2f} s apart")


def agreement(config: Config) -> Finding:
    packages = [f"{name} {_installed(name)}" for name in ("torch", "deepspeed", "numpy", "vaescale")]
    parts = {"settings": mechanics.to_yaml(config), "versions": f"{platform.python_version()} {packages}"}
    for name, part in parts.items():
        known = distributed.gather(torch.tensor(xxhash.xxh32_intdigest(part.encode()), dtype=torch.float64))
        others = (known != known[0]).nonzero().flatten().tolist()
        if others:
            ranks = ", ".join(map(str, others))
            return Finding(
                FAIL,
                f"rank {ranks} and rank 0 differ in {name}",
                "start all ranks from the same installation and config",
            )
    return Finding(OK, "all ranks have the same settings and versions")


def one_step(config: Config) -> Finding:
    """Trains and saves one step in a temporary folder next to the run directory, and checks that the run's checkpoints
    will fit."""
    run = Path(config.run)
    trial = run.absolute().with_name(distributed.tell(f".doctor-{os.getpid()}"))
    every = replace(config.every, report=1, validate=2**60, checkpoint=2**60)
    brief = replace(config, run=str(trial), every=every, keep_last=1, keep_every=0)
    if distributed.rank() == 0:
        trial.mkdir(parents=True)
        (trial / "STOP").touch()  # stops the trainer after the first step, or on several ranks after the second
    try:
        begun = time.monotonic()
        with redirect_stdout(io.StringIO()):
            trainer = Trainer(brief)
            trainer.train()
            seconds = time.monotonic() - begun
            saved = newest(trial / "checkpoints").path if distributed.rank() == 0 else None
            size = sum(file.stat().st_size for file in saved.iterdir()) if saved else 0
            Writer(run / "checkpoints", config.keep_last, config.keep_every, trainer.console).check_room(
                size, config.steps
            )
    except Exception as error:  # any error here would have ended the run
        return Finding(FAIL, f"a trial step and its checkpoint failed ({type(error).__name__}: {error})")
    finally:
        if distributed.rank() == 0:
            shutil.rmtree(trial, ignore_errors=True)
    steps = trainer.position.step
    return Finding(OK, f"{steps} step(s) taken and a checkpoint of {readable_size(size)} saved in {seconds:.1f} s")


def _installed(name: str) -> str:
    """Returns the package's version; "none" if it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "none"
