"""Times a training step of a diffusion and its samples: `python tests/benchmarks/diffusion.py [--rounds 5]`.

A training step of vaescale's learner is timed in turns with a loop of plain torch around the same network, with torch's
random numbers. The ratio is a median over rounds. On one thread of a CPU the times are those of the process, so that
other processes hardly change them. For samples it says how many images a second the 50 steps of DDIM give.
"""

import argparse
import sys
import time
from pathlib import Path
from statistics import median

import torch
from paired import Work, clock_of, paired
from plain import plain_learner

sys.path.insert(0, str(Path(__file__).parents[2]))
from vaescale import distributed
from vaescale.interfaces import Batch, Condition, Shape
from vaescale.models import diffusion, vqvae
from vaescale.nn.diffusion import noised, prior_kl
from vaescale.settings import Config, Optimizer
from vaescale.training.descent import Descent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--net", choices=("transformer", "unet"), default="unet")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    device = distributed.init()
    cpu_time = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if cpu_time else clock_of(device.type)
    model = build(given, device)
    count = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}, {count:.1f} M parameters, ", end="")
    print(f"{given.size} px, batch {given.batch}, {given.rounds} rounds\n")
    theirs, ours, ratio = paired(plain_step(given, device), our_step(given, device), 1, given.rounds, clock)
    print("| what | plain, ms | ours, ms | ours ÷ plain | aim |\n|---|---:|---:|---:|---|")
    met = "met" if 1 / ratio <= 1.05 else "missed"
    print(f"| training step | {theirs:.1f} | {ours:.1f} | {1 / ratio:.3f} | ≤ 1.05, {met} |")
    labels, none = torch.arange(given.batch, device=device) % 10, torch.zeros(given.batch, 0, device=device)
    seconds = []
    for _ in range(given.rounds + 1):  # the first one warms up
        begun = clock()
        model.eval().decode([], Condition(labels, none))
        seconds.append(clock() - begun)
    print(f"\nsamples: {given.batch / median(seconds[1:]):.2f} images/s with {model.config.sample_steps} steps")
    distributed.finish()


def build(given: argparse.Namespace, device: torch.device) -> diffusion.Diffusion:
    torch.manual_seed(0)
    settings = diffusion.Config(net=given.net, width=given.width, depth=given.depth, heads=4, classes=10)
    return diffusion.build(settings, Shape(3, given.size, 0), 0).to(device)


def images(given: argparse.Namespace, device: torch.device) -> Batch:
    x = torch.randint(256, (given.batch, 3, given.size, given.size), dtype=torch.uint8)
    label = torch.arange(given.batch) % 10
    return Batch(x, label, torch.zeros(given.batch, 0), torch.arange(given.batch)).to(device)


def settings_of(given: argparse.Namespace) -> Config:
    optimizer = Optimizer(lr=2e-4, betas=(0.9, 0.99), weight_decay=0.01, grad_clip=1.0)
    return Config(vqvae.Config(), global_batch=given.batch, precision="fp32", optimizer=optimizer)


def our_step(given: argparse.Namespace, device: torch.device) -> Work:
    learner, batch = Descent(build(given, device).train(), settings_of(given)), images(given, device)
    return lambda: learner.step([batch], 0)


def plain_step(given: argparse.Namespace, device: torch.device) -> Work:
    """As one would write it by hand: the same loss, and averaged weights."""
    model, batch, config = build(given, device).train(), images(given, device), settings_of(given)
    learn = plain_learner(model, config)
    lowest, highest = model.ends()

    def work() -> None:
        x = batch.x / 127.5 - 1
        label = batch.label.masked_fill(torch.rand(len(x), device=device) < model.config.label_dropout, -1)
        given = model._given(batch.condition._replace(label=label), len(x))
        time = (torch.rand((), dtype=torch.float64, device=device) + torch.arange(len(x), device=device) / len(x)) % 1
        gamma = lowest + (highest - lowest) * time
        noise = torch.randn_like(x)
        z = noised(x, noise, gamma)
        error = (noise - z - model._output(z, gamma, given, None)).square().flatten(1).sum(1)
        rate = (highest - lowest).float() / 2 * error + prior_kl(x, highest)
        distortion = model.data.bound_given(batch, x, torch.randn_like(x), lowest).distortion
        learn((rate + distortion).mean() / x[0].numel())

    return work


if __name__ == "__main__":
    main()
