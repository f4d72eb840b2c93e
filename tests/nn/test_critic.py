"""The critic against closed forms, numpy and its own invariances."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from vaescale.nn.critic import (
    AUGMENT,
    RATE,
    SHIFT,
    Config,
    Critic,
    accuracy,
    augment,
    build,
    critic_loss,
    lecam_penalty,
    model_loss,
    r1_penalty,
)
from vaescale.nn.noise import uniform

SMALL = Config(width=8, layers=2)


def images(count: int = 4, size: int = 16) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def test_the_published_critic() -> None:
    """pix2pix's 70 × 70 PatchGAN (Isola et al. 2017, appendix 6.1.2): 2.77 M parameters with its affine norms, and each
    logit sees 70 × 70 pixels."""
    critic = Critic(Config(), 3)
    weights = [3 * 64, 64 * 128, 128 * 256, 256 * 512, 512]
    assert sum(p.numel() for p in critic.parameters()) == 16 * sum(weights) + 64 + 3 * (128 + 256 + 512) + 1
    x = torch.rand(1, 3, 256, 256, requires_grad=True)
    logits = critic.layers[0](x)
    assert logits.shape == (1, 64, 128, 128)
    plain = nn.Sequential(*(part for part in critic.layers if isinstance(part, nn.Conv2d)))  # norms see everything
    logits = plain(x)
    assert logits.shape == critic(x).shape == (1, 1, 30, 30)
    (gradient,) = torch.autograd.grad(logits[0, 0, 15, 15], x)
    seen = gradient[0].abs().sum(0).nonzero()
    assert (seen.max(0).values - seen.min(0).values + 1).tolist() == [70, 70]


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_smallest_image_has_one_logit(layers: int) -> None:
    config = Config(width=4, layers=layers)
    critic = Critic(config, 1)
    assert critic(torch.rand(2, 1, config.smallest, config.smallest)).shape == (2, 1, 1, 1)
    with pytest.raises(RuntimeError):
        critic(torch.rand(2, 1, config.smallest - 2**layers, config.smallest - 2**layers))


def test_one_batch_gives_the_logits_of_two() -> None:
    critic, (one, other) = Critic(SMALL, 3), images().split(2)
    torch.testing.assert_close(critic(images()), torch.cat([critic(one), critic(other)]), rtol=1e-5, atol=1e-6)


def test_first_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    one, same, other = (build(SMALL, 3, seed).layers[0].weight for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), wanted)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_losses_of_the_best_critic() -> None:
    """If reconstructions are distributed as images, no critic does better than a constant one: hinge 1 + 1 for any
    constant in [−1, 1], non-saturating 2 log 2 at 0 (Goodfellow et al. 2014, theorem 1)."""
    for constant in (-1.0, 0.0, 0.5, 1.0):
        logits = torch.full((5, 1, 2, 2), constant)
        assert critic_loss("hinge", logits, logits).item() == pytest.approx(2)
    same = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    assert critic_loss("hinge", same, same) >= 2
    assert critic_loss("non-saturating", same, same) > 2 * np.log(2)
    nothing = torch.zeros(3)
    assert critic_loss("non-saturating", nothing, nothing).item() == pytest.approx(2 * np.log(2))
    assert model_loss("non-saturating", nothing).item() == pytest.approx(np.log(2))
    assert model_loss("hinge", same).item() == pytest.approx(-same.mean().item())


@pytest.mark.parametrize("kind", ["hinge", "non-saturating"])
def test_losses_pull_apart(kind: str) -> None:
    real, fake = (torch.zeros(4, requires_grad=True) for _ in range(2))
    critic_loss(kind, real, fake).backward()
    assert real.grad is not None
    assert fake.grad is not None
    assert (real.grad < 0).all()
    assert (fake.grad > 0).all()
    (back,) = torch.autograd.grad(model_loss(kind, fake), fake)
    assert (back < 0).all()


def test_lecam_is_two_lines_of_numpy() -> None:
    generator = torch.Generator().manual_seed(2)
    real, fake = (torch.randn(6, 1, 3, 3, generator=generator) for _ in range(2))
    critic = Critic(SMALL, 3)
    steps = torch.randn(int(2 / RATE), 2, generator=generator).double()
    for means in steps:
        critic.observe(means.float())
    n = np.arange(1, len(steps) + 1)
    rates = np.maximum(1 / n, RATE)
    weights = rates * np.append(np.cumprod((1 - rates)[:0:-1])[::-1], 1)
    expected = (weights[:, None] * steps.numpy()).sum(0)
    np.testing.assert_allclose(critic.lecam[:2].numpy(), expected, rtol=1e-4, atol=1e-5)
    assert critic.lecam[2] == len(steps)
    r, f = real.numpy(), fake.numpy()
    wanted = (np.maximum(r - expected[1], 0) ** 2).mean() + (np.maximum(expected[0] - f, 0) ** 2).mean()
    assert lecam_penalty(real, fake, critic.lecam).item() == pytest.approx(wanted, rel=1e-4)


def test_r1_of_a_linear_critic_is_half_its_squared_norm() -> None:
    x = images().requires_grad_()
    linear = nn.Linear(x[0].numel(), 1)
    penalty = r1_penalty(linear(x.flatten(1)), x)
    assert penalty.item() == pytest.approx(linear.weight.square().sum().item() / 2)
    penalty.backward()
    torch.testing.assert_close(linear.weight.grad, linear.weight.detach())


def test_accuracy() -> None:
    assert accuracy(torch.tensor([1.0, 1.0, -1.0, 1.0]), torch.tensor([-1.0, -1.0, 1.0, 1.0])) == (0.75 + 0.5) / 2
    assert accuracy(torch.zeros(3), torch.zeros(3)) == 0  # a dead critic tells nothing right


def test_augmentation_against_a_loop() -> None:
    x, sample = images(6), torch.arange(10, 16)
    drawn = uniform(sample, (7,), 3, AUGMENT, 1).float().numpy()
    found = augment(x, sample, 3, 1)
    most = round(SHIFT * 16)
    for one, image, (brightness, saturation, contrast, *places) in zip(found, x.numpy(), drawn, strict=True):
        down, right, top, left = places
        image = image - 0.5 + (brightness - 0.5) * 0.5
        grey = image.mean(0)
        image = grey + (image - grey) * 2 * saturation
        image = image.mean() + (image - image.mean()) * (contrast + 0.5)
        moved = np.zeros_like(image)
        dy, dx = (int(place * (2 * most + 1)) - most for place in (down, right))
        for i in range(16):
            for j in range(16):
                if 0 <= i - dy < 16 and 0 <= j - dx < 16:
                    moved[:, i, j] = image[:, i - dy, j - dx]
        y, z = (int(place * 17) - 4 for place in (top, left))
        moved[:, max(y, 0) : max(y + 8, 0), max(z, 0) : max(z + 8, 0)] = 0
        np.testing.assert_allclose(one.numpy(), moved + 0.5, atol=1e-6)


def test_augmentation_depends_on_the_sample_and_the_draw_alone() -> None:
    x, sample = images(6), torch.arange(6)
    whole = augment(x, sample, 3, 0)
    torch.testing.assert_close(whole[2:4], augment(x[2:4], sample[2:4], 3, 0), rtol=0, atol=1e-7)
    assert not torch.equal(whole, augment(x, sample, 3, 1))
    assert not torch.equal(whole, augment(x, sample, 4, 0))


def test_augmentation_is_differentiable() -> None:
    x = images(2, 8).double().requires_grad_()
    augment(x, torch.arange(2), 0, 0).square().sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    y = images(2, 8).double()
    y[0, 0, 3, 3] += 1e-3
    difference = augment(y, torch.arange(2), 0, 0).square().sum() - augment(x, torch.arange(2), 0, 0).square().sum()
    slope = x.grad[0, 0, 3, 3].item()
    assert abs(slope) > 0.01  # the pixel is shown
    assert difference.item() == pytest.approx(1e-3 * slope, rel=0.05)
