"""Measures a step with a critic: `python tests/benchmarks/adversarial.py [--rounds 7] [key=value …]`.

The first rows compare the learner's step with a loop of plain torch over the same networks, as one would write it by
hand: the adversarial loss is a term of the model's loss, and an adaptive weight takes two gradients at the last layer
through the model's graph. The next row compares the critic's own pass over images and reconstructions in two batches
with that in one. Both sides take turns in this process; a ratio is the median over rounds, the times are medians.

The second table is the memory of a step of configs/vqgan_photos64.yaml with and without `model.checkpointing`: in a
process of its own, how far the first step's peak is above what was held before it, gradients and AdamW's moments
included; resident on a CPU, allocated on a GPU.
"""

import argparse
import copy
import subprocess
import sys
from itertools import count
from pathlib import Path

import torch
import torch.nn.functional as F
from hvae import images, resident
from paired import Work, clock_of, paired

from vaescale import distributed, settings
from vaescale.nn import critic
from vaescale.settings import Config
from vaescale.training.adversarial import Adversarial

CONFIG = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
LARGER = CONFIG.with_name("vqgan_photos64.yaml")
PERCEPTUAL = ("model.reconstruction.perceptual.weight=1", "model.reconstruction.perceptual.trunk=random")
WAYS = {
    "constant weight": (),
    "adaptive weight": ("adversarial.adaptive=true",),
    "adaptive weight, perceptual distance": ("adversarial.adaptive=true", *PERCEPTUAL),
}
SMALL = (
    "data.size=64",
    "global_batch=8",
    "adversarial.weight=0.1",
    "adversarial.critic_start=0",
    "adversarial.start=0",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default=str(CONFIG))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--memory", action="store_true", help="print the memory of a step of this config in MiB alone")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_intermixed_args()
    device = distributed.init()
    if arguments.memory:
        print(f"{memory(settings.load(arguments.config, [*SMALL, *arguments.overrides]), device):.0f}")
        return
    clock = clock_of(device.type)
    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}, {arguments.rounds} rounds\n")
    print("| what | ms | beside | ms | ratio | aim |\n|---|---:|---|---:|---:|---|")
    for way, given in WAYS.items():
        config = settings.load(arguments.config, [*SMALL, *given, *arguments.overrides])
        theirs, ours, ratio = paired(by_hand(config, device), learned(config, device), 1, arguments.rounds, clock)
        print(f"| a step, {way} | {ours:.1f} | plain torch | {theirs:.1f} | {1 / ratio:.3f} | ≤ 1.05 |", flush=True)
    config = settings.load(arguments.config, [*SMALL, *arguments.overrides])
    works = [critics(config, device, batches) for batches in (2, 1)]
    two, one, ratio = paired(*works, 1, arguments.rounds, clock)
    print(f"| the critic, one batch | {one:.1f} | two batches | {two:.1f} | {1 / ratio:.3f} | |")
    less, more = (memory_alone(checkpointing, arguments.overrides) for checkpointing in ("true", "false"))
    print("\n| memory of a step | MiB | beside | MiB | ratio |\n|---|---:|---|---:|---:|")
    print(f"| with checkpointing | {less:.0f} | without | {more:.0f} | {less / more:.3f} |")
    distributed.finish()


def learned(config: Config, device: torch.device) -> Work:
    learner = Adversarial(settings.build(config).to(device), config)
    batch, steps = images(config, device), count()

    def work() -> None:
        learner.step([batch], next(steps))

    return work


def by_hand(config: Config, device: torch.device) -> Work:
    model, given = settings.build(config).to(device), config.adversarial
    judge = critic.build(given, config.data.channels, 1).to(device)
    averaged, rate = copy.deepcopy(model), config.optimizer.lr
    adams = [
        torch.optim.AdamW(net.parameters(), rate, betas, weight_decay=config.optimizer.weight_decay, fused=True)
        for net, betas in ((model, config.optimizer.betas), (judge, given.betas))
    ]
    batch, steps = images(config, device), count()

    def work() -> None:
        step = next(steps)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            loss, _, fake = model(batch, step)
            judge.requires_grad_(False)
            term, weight = -judge(fake).mean(), given.weight
            judge.requires_grad_(True)
            if given.adaptive:
                last = model.last_layer.weight
                compared = model.reconstruction_loss(fake, batch.x)
                pulls = [torch.autograd.grad(each, last, retain_graph=True)[0].norm() for each in (compared, term)]
                weight = weight * (pulls[0] / (pulls[1] + 1e-4)).clamp(max=1e4)
        (loss + weight * term).backward()
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            real, fake = judge(torch.cat([batch.x / 255, fake.detach()])).chunk(2)
            loss = F.relu(1 - real).mean() + F.relu(1 + fake).mean()
            loss = loss + given.lecam * critic.lecam_penalty(real, fake, judge.lecam)
        loss.backward()
        for net, adam in zip((model, judge), adams, strict=True):
            torch.nn.utils.clip_grad_norm_(net.parameters(), config.optimizer.grad_clip)
            adam.step()
            adam.zero_grad()
        judge.observe(torch.stack([real.detach().mean(), fake.detach().mean()]))
        model.update(step, rate)
        with torch.no_grad():
            torch._foreach_lerp_(list(averaged.parameters()), list(model.parameters()), 1 - config.ema_decay)
            for copied, buffer in zip(averaged.buffers(), model.buffers(), strict=True):
                copied.copy_(buffer)

    return work


def critics(config: Config, device: torch.device, batches: int) -> Work:
    """Returns the critic's forward and backward pass over images and as many reconstructions."""
    judge = critic.build(config.adversarial, config.data.channels, 1).to(device)
    x = images(config, device).x / 255
    y = x.flip(0)

    def work() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            real, fake = (judge(x), judge(y)) if batches == 2 else judge(torch.cat([x, y])).chunk(2)
            loss = critic.critic_loss("hinge", real, fake)
        loss.backward()
        judge.zero_grad()

    return work


def memory_alone(checkpointing: str, overrides: list[str]) -> float:
    """Returns MiB, measured in a process of its own."""
    given = [*overrides, f"model.checkpointing={checkpointing}"]
    command = [sys.executable, __file__, "--config", str(LARGER), "--memory", *given]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def memory(config: Config, device: torch.device) -> float:
    work = learned(config, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew, at what is resident now
    before = resident()
    work()
    return resident() - before


if __name__ == "__main__":
    main()
