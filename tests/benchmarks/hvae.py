"""Measures one training step of the 39 M top-down VAE: `python tests/benchmarks/hvae.py [--batch 4] [--rounds 3]`.

The baseline is the trainer's step: DeepSpeed's engine, clipping, AdamW, averaged weights. It takes turns, in this
process, with an equivalent loop of plain torch around the same network, with activation checkpointing, with compiled
blocks, and with the noise of older runs. A ratio is the median over rounds of the variant's seconds ÷ the baseline's.
Peak memory is measured in one process per variant, above what the process held before the model was built: resident on
a CPU, allocated on a GPU.
"""

import argparse
import copy
import subprocess
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path

import torch
from paired import Work, clock_of, paired

from vaescale import distributed, settings
from vaescale.interfaces import Batch, Model
from vaescale.models import vdvae
from vaescale.settings import Config
from vaescale.training.descent import Descent

CONFIG = Path(__file__).parents[2] / "configs" / "hvae_cifar10.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default=str(CONFIG))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=SIDES, help="two steps of this side alone; prints its peak memory in MiB")
    arguments = parser.parse_args()
    device = distributed.init()
    cuda = device.type == "cuda"
    precision = "bf16" if cuda else "fp32"
    config = settings.load(arguments.config, [f"global_batch={arguments.batch}", f"precision={precision}"])
    if arguments.only:
        print(f"{measure_memory(arguments.only, config, device):.0f}")
        return
    print(
        f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}, {precision}, "
        f"batch {config.global_batch}\n"
    )
    print("| side | images/s | ours, images/s | theirs ÷ ours, time | peak memory, MiB |\n|---|---:|---:|---:|---:|")
    ours = SIDES["ours"](config, device)
    print(f"| ours | | | | {in_its_own_process('ours', arguments)} |", flush=True)
    for name, build in SIDES.items():
        if name == "ours":
            continue
        clock = clock_of(device.type)
        theirs, own, ratio = paired(build(config, device), ours, config.global_batch, arguments.rounds, clock)
        memory = in_its_own_process(name, arguments)
        print(f"| {name} | {1000 / theirs:.3f} | {1000 / own:.3f} | {ratio:.3f} | {memory} |", flush=True)
    distributed.finish()


def trained(model: Model, config: Config) -> Work:
    """Returns the trainer's step; the first call also sets everything up."""
    learner = Descent(model, config)
    batch = images(config, next(model.parameters()).device)

    def work() -> None:
        learner.step([batch], 0)

    return work


def ours(config: Config, device: torch.device) -> Work:
    return trained(built(config, device), config)


def plain(config: Config, device: torch.device) -> Work:
    return by_hand(built(config, device), config)


def by_hand(model: Model, config: Config) -> Work:
    """Returns the same step in plain torch, as one would write it by hand."""
    device = next(model.parameters()).device
    averaged = copy.deepcopy(model)
    given = config.optimizer
    adam = torch.optim.AdamW(model.parameters(), given.lr, given.betas, weight_decay=given.weight_decay, fused=True)
    batch = images(config, device)
    steps = count()

    def work() -> None:
        step = next(steps)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            loss = model(batch, step).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), given.grad_clip)
        adam.step()
        adam.zero_grad()
        model.update(step, given.lr)
        with torch.no_grad():
            torch._foreach_lerp_(list(averaged.parameters()), list(model.parameters()), 1 - config.ema_decay)
            for copied, buffer in zip(averaged.buffers(), model.buffers(), strict=True):
                copied.copy_(buffer)

    return work


def checkpointing(config: Config, device: torch.device) -> Work:
    model = built(config, device)
    for module in model.modules():
        if isinstance(module, vdvae.TopDown | vdvae.Encoder):
            module.checkpointing = True
    return trained(model, config)


def compiled(config: Config, device: torch.device) -> Work:
    """Compiles the blocks only: they are one function per size, and take nearly all of the time."""
    torch._dynamo.config.recompile_limit = 64  # sizes and channels; beyond it the rest would run as it is
    model = built(config, device)
    for module in model.modules():
        if isinstance(module, vdvae.Block):
            module.compile()
    return trained(model, config)


def old_noise(config: Config, device: torch.device) -> Work:
    """With the noise of runs that were begun before version 2, which computes in int64 and fp64 throughout."""
    model = built(config, device)
    model.noise_version = 1
    return trained(model, config)


SIDES: dict[str, Callable[[Config, torch.device], Work]] = {
    "ours": ours,
    "plain torch": plain,
    "activation checkpointing": checkpointing,
    "torch.compile": compiled,
    "noise of version 1": old_noise,
}


def built(config: Config, device: torch.device) -> Model:
    torch.manual_seed(0)
    return settings.build(config).to(device)


def images(config: Config, device: torch.device) -> Batch:
    batch = settings.blank(config, config.global_batch)
    x = torch.randint(0, 256, batch.x.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return batch._replace(x=x).to(device)


def measure_memory(side: str, config: Config, device: torch.device) -> float:
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak of the imports
    before = resident()
    work = SIDES[side](config, device)
    for _ in range(2):
        work()
    return torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else resident() - before


def resident() -> float:
    """Returns the peak since it was last reset, in MiB."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024


def in_its_own_process(side: str, arguments: argparse.Namespace) -> str:
    command = [sys.executable, __file__, "--config", arguments.config, "--batch", str(arguments.batch), "--only", side]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1]


if __name__ == "__main__":
    main()
