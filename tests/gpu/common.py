"""What the parts of the kit share."""

import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vaescale import distributed, numerics, settings
from vaescale.interfaces import Batch
from vaescale.settings import Config
from vaescale.training.descent import Descent

ROOT = Path(__file__).parents[2]
FAILED = "failed: "  # how a result begins that makes its part fail
CUDA = torch.cuda.is_available()
FIRST, TOGETHER, ALONE = range(3)  # stages: what other parts need, checks, measurements

Results = Iterator[tuple[str, Any]]


class Part(NamedTuple):
    name: str
    limit: int  # seconds
    work: Callable[
        [Path, bool], Results
    ]  # (folder of the report, pretend) → results, each reported as soon as it is known
    then: str  # what to do with the results
    stage: int
    on_cpu: bool = False


def tried(work: Callable[[], Any]) -> Any:
    """Returns what `work` returns, or why it failed. The part's other results are not lost."""
    try:
        return work()
    except Exception as error:
        traceback.print_exc()
        return f"{FAILED}{type(error).__name__}: {str(error).strip()[-2000:]}"


def load(path: str, *overrides: str) -> Config:
    return settings.load(ROOT / path, ["run=none", "data.root=none", *overrides])


def made(config: Config) -> tuple[Descent, Batch]:
    """Returns a learner with fixed weights, and a batch of noise, which no data set is needed for."""
    device = distributed.init()
    numerics.choose(config.tf32, config.deterministic)
    torch.manual_seed(0)
    learner = Descent(settings.build(config).to(device), config)
    blank = settings.blank(config, config.global_batch)
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, blank.x.shape, dtype=torch.uint8, generator=generator)
    x = x.contiguous(memory_format=torch.channels_last)  # as the loader's
    return learner, blank._replace(x=x, sample=torch.arange(config.global_batch)).to(device)


def python(*arguments: str, codes: tuple[int, ...] = (0,)) -> str:
    """Returns what a command of Python printed, which must end with one of `codes`."""
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    print(done.stdout)
    if done.returncode not in codes:
        raise RuntimeError(f"exit code {done.returncode}: {done.stdout[-2000:]}")
    return done.stdout
