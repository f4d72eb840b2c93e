"""The operations that a training step dispatches, each of which a GPU launches as a kernel, outside the model's own
forward and backward pass. Counted on a CPU: the number depends neither on the device nor on widths."""

import pytest
import torch

from tests.device.kernels import Kernels
from tests.training import duel
from vaescale import settings
from vaescale.training.adversarial import Adversarial
from vaescale.training.descent import Descent

STEP = 5  # one in which no codebook is initialised or reset
OUTSIDE = 29  # the loss and its metrics, the norm, the guard, clipping, AdamW and the averages

# Config, settings that make it small, largest ratio of a step to the model's own pass. A VQ-VAE's own pass is short: a
# ratio of 1.15 would leave 17 operations for OUTSIDE and the codebook's update (35, and 62 in a step with a reset).
STEPS = [
    ("vqvae_imagenet128", ["data.size=32", "model.network.width=8", "model.network.residual_width=4"], 1.56),
    ("vae_imagenet64", ["model.network.width=8", "model.network.hidden=16"], 1.15),
    ("hvae_imagenet64", ["model.width=8", "model.bottleneck=4"], 1.15),
]


@pytest.mark.parametrize(("name", "small", "most"), STEPS)
def test_a_step_launches_few_kernels_outside_the_models_own(
    group: None, name: str, small: list[str], most: float
) -> None:
    given = ["run=none", "data.root=none", "precision=fp32", "global_batch=2", *small]
    config = settings.load(f"configs/{name}.yaml", given)
    batch = settings.blank(config, 2)
    model = settings.build(config).train()
    model(batch, 0).loss.backward()
    model.update(0, 1e-3)
    model.zero_grad()
    with Kernels() as own:
        model(batch, STEP).loss.backward()
    with Kernels() as update:
        model.update(STEP, 1e-3)
    learner = Descent(settings.build(config).train(), config)
    learner.step([batch], 0)
    with Kernels() as whole:
        learner.step([batch], STEP)
    print(f"{name}: {own.total()} own, {update.total()} in its update, {whole.total()} in a step")
    assert whole.total() - own.total() - update.total() <= OUTSIDE
    assert own.total() < whole.total() <= most * own.total()


@pytest.mark.parametrize(("way", "most"), [("constant", 91), ("adaptive", 109)])
def test_a_critic_launches_few_kernels_outside_its_own(group: None, way: str, most: int) -> None:
    """Of a step with the term, without those of a step without a critic. The critic's own are its forward and backward
    pass for its training, and for the gradient at the reconstruction. The others are the losses and LeCam, the metrics,
    the product with the gradient, the norm, the guard, clipping and AdamW."""
    learner = Adversarial(duel.model(), duel.load(0, 1, way, "hinge"))
    steps = list(duel.batches(1))
    for step in (0, 1):
        learner.step(steps[step], step)
    with Kernels() as plain:
        learner.descent.step(steps[2], 2)
    with Kernels() as whole:
        learner.step(steps[2], 2)
    critic, x = learner.critic, torch.rand(4, 3, 16, 16)
    with Kernels() as own:
        critic(torch.cat([x, x])).mean().backward()
        critic.requires_grad_(False)
        torch.autograd.grad(critic(x.requires_grad_()).mean(), x)
    print(f"{way}: {plain.total()} without a critic, {own.total()} its own, {whole.total()} in a step")
    assert whole.total() - plain.total() - own.total() <= most
