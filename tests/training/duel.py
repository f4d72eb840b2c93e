"""A model against a critic in a loop of plain torch, which the learner is compared with."""

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from vaescale import distributed, settings
from vaescale.interfaces import Batch, Model, Output
from vaescale.nn import critic
from vaescale.training.adversarial import SEED, Adversarial
from vaescale.training.descent import learning_rate

STEPS, IMAGES, SIZE = 4, 4, 16
GIVEN = (
    *("run=none", "data.root=none", f"steps={STEPS}", "optimizer.warmup_steps=2", "optimizer.grad_clip=0.5"),
    *("optimizer.weight_decay=0.1", "adversarial.width=8", "adversarial.layers=2", "adversarial.lecam=0.1"),
    *("adversarial.weight=0.5", "adversarial.critic_start=0", "adversarial.start=0.25"),
)
WAYS = {
    "constant": [],
    "adaptive": ["adversarial.adaptive=true"],
    "r1": ["adversarial.r1=0.2"],
    "augmented": ["adversarial.augment=true"],
}
CASES = list(product((0, 1, 2), (1, 2), WAYS, ("hinge", "non-saturating")))  # ZeRO, accumulation, way, loss


class Tiny(Model):
    """Two convolutions. A codebook would turn differences in the last bit into others."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)

    @property
    def last_layer(self) -> nn.Module:
        return self.last

    def reconstruction_loss(self, reconstruction: Tensor, x: Tensor) -> Tensor:
        return (reconstruction.float() - x / 255).abs().mean()

    def forward(self, batch: Batch, step: int) -> Output:
        y = self.last(F.silu(self.first(batch.x / 255 - 0.5))) + 0.5
        loss = self.reconstruction_loss(y, batch.x)
        return Output(loss, {"l1": loss.detach()}, y)


def model() -> Tiny:
    torch.manual_seed(0)
    return Tiny()


def load(zero: int, accumulation: int, way: str, loss: str, world: int = 1, *more: str) -> settings.Config:
    """Returns a config for IMAGES images per rank and micro-batch."""
    sizes = [f"zero_stage={zero}", f"accumulation={accumulation}", f"global_batch={IMAGES * accumulation * world}"]
    given = [*GIVEN, *sizes, *WAYS[way], f"adversarial.loss={loss}", *more]
    return settings.load("tests/integration/tiny.yaml", given)


def batches(accumulation: int, world: int = 1, ranks: slice = slice(None)) -> Iterator[list[Batch]]:
    """Yields the micro-batches of each step. Images of higher numbers are brighter, so that ranks differ."""
    generator = torch.Generator().manual_seed(1)
    count = IMAGES * world
    for step in range(STEPS):
        micros = []
        for micro in range(accumulation):
            x = torch.randint(0, 256, (count, 3, SIZE, SIZE), generator=generator)
            x = (x * torch.linspace(0.2, 1, count).view(-1, 1, 1, 1)).to(torch.uint8)
            g = torch.arange(count) + count * (micro + accumulation * step)
            whole = Batch(x, torch.zeros(count).long(), torch.zeros(count, 0), g)
            micros.append(Batch(*(part[ranks] for part in whole)))
        yield micros


def learned(config: settings.Config, steps: Iterator[list[Batch]]) -> tuple[dict[str, Tensor], list[float]]:
    """Returns the weights and buffers of both networks, and the adversarial weights of the steps."""
    learner = Adversarial(model(), config)
    weights = [float(learner.step(micros, step)["adversarial/weight"]) for step, micros in enumerate(steps)]
    for net in (learner.model, learner.critic):  # neither network's step leaves a gradient in the other
        assert all(p.grad is None or not p.grad.any() for p in net.parameters())
        assert all(p.requires_grad for p in net.parameters())
    return state(learner.model, learner.critic), weights


def off(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, float]:
    """Returns ‖difference‖ / ‖theirs‖ of each network."""
    found = {}
    for net in ("model", "critic"):
        names = [name for name in theirs if name.startswith(net)]
        one, other = (torch.cat([values[name].flatten() for name in names]) for values in (ours, theirs))
        found[net] = float((one - other).norm() / other.norm())
    return found


def state(one: nn.Module, other: nn.Module) -> dict[str, Tensor]:
    return {
        f"{name}/{key}": value
        for name, net in (("model", one), ("critic", other))
        for key, value in net.state_dict().items()
    }


def file(case: tuple[int, int, str, str], rank: int) -> str:
    return f"{'-'.join(map(str, case))}-{rank}.safetensors"


def duelled(job: dict[str, Any]) -> None:
    """A task of forked.py: train all cases on this rank's share of the joined batches. Writes each one's `file`."""
    rank, world = distributed.rank(), distributed.world()
    for case in CASES:
        config, share = load(*case, world), slice(rank * IMAGES, (rank + 1) * IMAGES)
        found, weights = learned(config, batches(case[1], world, share))
        save_file({**found, "weights": torch.tensor(weights)}, Path(job["out"]) / file(case, rank))


def plain(config: settings.Config, steps: Iterator[list[Batch]]) -> tuple[dict[str, Tensor], list[float]]:
    """The same, by autograd.grad through the model, with neither engines nor ranks."""
    given = config.adversarial
    one, other = model(), critic.build(given, 3, config.seed + SEED)
    nets = [(one, config.optimizer.betas), (other, given.betas)]
    adams = [torch.optim.AdamW(net.parameters(), 1.0, betas, weight_decay=0.1, fused=True) for net, betas in nets]
    found = []
    for step, micros in enumerate(steps):
        weights, seen = [], []
        for batch in micros:
            x = batch.x / 255
            loss, _, y = one(batch, step)
            weight = 0.0
            if step >= round(given.start * config.steps):
                fake = other(shown(given, config.seed, y, batch, 1))
                term = -fake.mean() if given.loss == "hinge" else F.softplus(-fake).mean()
                weight = given.weight
                if given.adaptive:
                    last = one.last.weight
                    pulls = [torch.autograd.grad(each, last, retain_graph=True)[0].norm() for each in (loss, term)]
                    weight = weight * float((pulls[0] / (pulls[1] + 1e-4)).clamp(0, 1e4))
                loss = loss + weight * term
            (loss / len(micros)).backward()
            other.zero_grad()
            seen.append((x, y.detach(), batch))
            weights.append(weight)
        means = []
        for x, y, batch in seen:
            x = shown(given, config.seed, x, batch, 0).requires_grad_()
            y = shown(given, config.seed, y, batch, 1)
            real, fake = (other(x), other(y)) if given.r1 else other(torch.cat([x, y])).chunk(2)  # for the same bits
            if given.loss == "hinge":
                loss = F.relu(1 - real).mean() + F.relu(1 + fake).mean()
            else:
                loss = F.softplus(-real).mean() + F.softplus(fake).mean()
            loss = loss + given.lecam * (F.relu(real - other.lecam[1]) ** 2).mean()
            loss = loss + given.lecam * (F.relu(other.lecam[0] - fake) ** 2).mean()
            if given.r1:
                (gradient,) = torch.autograd.grad(real.sum(), x, create_graph=True)
                loss = loss + given.r1 / 2 * gradient.square().sum((1, 2, 3)).mean()
            (loss / len(micros)).backward()
            means.append(torch.stack([real.mean(), fake.mean()]).detach())
        for (net, _), adam in zip(nets, adams, strict=True):
            nn.utils.clip_grad_norm_(net.parameters(), config.optimizer.grad_clip)
            adam.param_groups[0]["lr"] = learning_rate(config.optimizer, step, config.steps)
            adam.step()
            adam.zero_grad()
        other.observe(torch.stack(means).mean(0))
        found.append(sum(weights) / len(weights))
    return state(one, other), found


def shown(given: critic.Config, seed: int, x: Tensor, batch: Batch, draw: int) -> Tensor:
    return critic.augment(x, batch.sample, seed, draw) if given.augment else x
