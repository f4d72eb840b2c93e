from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vaescale.monitoring import code_statistics as monitoring
from vaescale.nn.codebook import LAPLACE
from vaescale.nn.quantize import AGAIN, Config, VectorQuantizer, build

LEARNING = ["ema", "gradient"]


def batches(steps: int, rows: int, dim: int, seed: int = 0) -> list[Tensor]:
    """A mixture of 12 clusters, so that codes are used unevenly."""
    generator = torch.Generator().manual_seed(seed)
    centres = 3 * torch.randn(12, dim, generator=generator)
    return [
        centres[torch.randint(12, (rows,), generator=generator)] + torch.randn(rows, dim, generator=generator)
        for _ in range(steps)
    ]


def place_codes(quantizer: VectorQuantizer, codebook: Tensor) -> None:
    """Give all codes a position, as if they had long been in use there."""
    quantizer.codebook.copy_(codebook)
    quantizer.tally.age.zero_()
    if quantizer.config.learning == "ema":
        quantizer.learner.sums.copy_(codebook)
        quantizer.learner.counts.fill_(1)


@pytest.mark.parametrize("learning", LEARNING)
def test_lookup_of_codes_is_z(learning: str) -> None:
    quantizer = VectorQuantizer(Config(codebook_size=20, dim=6, learning=learning))
    z = torch.randn(2, 3, 5, 6)
    out = quantizer(z)
    assert out.codes.shape == (2, 3, 5)
    assert out.codes.dtype == torch.int64
    # z + (e − z) is e but for the rounding of two additions
    torch.testing.assert_close(quantizer.lookup(out.codes), out.z, rtol=0, atol=1e-6)


def test_loss_and_gradient_are_those_of_the_paper() -> None:
    """Equation 3 by autograd, on a codebook that is a parameter."""
    quantizer = VectorQuantizer(Config(codebook_size=20, dim=6, beta=0.3, learning="gradient"))
    quantizer.codebook.copy_(torch.randn(20, 6))
    z = torch.randn(50, 6, requires_grad=True)
    target = torch.randn(50, 6)
    out = quantizer(z)
    (F.mse_loss(out.z, target) + out.loss).backward()

    z2 = z.detach().clone().requires_grad_()
    e = quantizer.codebook.clone().requires_grad_()
    chosen = e[torch.cdist(z2, e).argmin(1)]
    through = z2 + (chosen - z2).detach()
    loss = F.mse_loss(through, target) + F.mse_loss(chosen, z2.detach()) + 0.3 * F.mse_loss(z2, chosen.detach())
    loss.backward()
    torch.testing.assert_close(F.mse_loss(out.z, target) + out.loss, loss)
    torch.testing.assert_close(z.grad, z2.grad)


def test_ema_is_the_published_recursion() -> None:
    """Appendix A.1, equations 6 to 8, in float64, one row at a time."""
    config = Config(codebook_size=10, dim=3, ema_decay=0.9, reset_every=0)
    quantizer = VectorQuantizer(config)
    place_codes(quantizer, torch.randn(10, 3))
    e = quantizer.codebook.double().numpy().copy()
    count, total = np.ones(10), e.copy()
    for step, z in enumerate(batches(30, 64, 3), start=1):
        quantizer(z)
        quantizer.update(step, lr=0.1)
        rows, codes = z.double().numpy(), ((z.double().numpy()[:, None] - e) ** 2).sum(2).argmin(1)
        n, s = np.zeros(10), np.zeros((10, 3))
        for row, code in zip(rows, codes, strict=True):
            n[code] += 1
            s[code] += row
        count = 0.9 * count + 0.1 * n
        total = 0.9 * total + 0.1 * s
        e = total / ((count + LAPLACE) / (count.sum() + 10 * LAPLACE) * count.sum())[:, None]
    torch.testing.assert_close(quantizer.codebook, torch.tensor(e).float(), rtol=1e-5, atol=1e-6)


def test_gradient_learning_is_torchs_adam_on_a_parameter() -> None:
    """Straight-through VQ-VAE gradients by autograd and torch.optim.Adam, on the joined micro-batches."""
    quantizer = VectorQuantizer(Config(codebook_size=10, dim=3, learning="gradient", reset_every=0))
    place_codes(quantizer, torch.randn(10, 3))
    e = torch.nn.Parameter(quantizer.codebook.double().clone())
    adam = torch.optim.Adam([e], lr=0.02)
    for step, z in enumerate(batches(50, 64, 3), start=1):
        for part in z.chunk(4):
            quantizer(part)
        quantizer.update(step, lr=0.02)
        adam.zero_grad()
        chosen = e[torch.cdist(z.double(), e).argmin(1)]
        F.mse_loss(chosen, z.double()).backward()
        adam.step()
    torch.testing.assert_close(quantizer.codebook, e.detach().float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("learning", LEARNING)
def test_accumulated_micro_batches_are_one_batch(learning: str) -> None:
    whole, parts = (VectorQuantizer(Config(codebook_size=16, dim=4, learning=learning)) for _ in range(2))
    parts.load_state_dict(whole.state_dict())
    for step, z in enumerate(batches(30, 64, 4), start=1):
        whole(z)
        for part in z.chunk(4):
            parts(part)
        for quantizer in (whole, parts):
            quantizer.update(step, lr=0.01)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[name], value, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("learning", LEARNING)
def test_the_first_update_puts_every_code_on_a_row(learning: str) -> None:
    quantizer = VectorQuantizer(Config(codebook_size=64, dim=4, learning=learning, reset_every=0))
    (z,) = batches(1, 512, 4)
    quantizer(z)
    quantizer.update(0, lr=0.01)
    assert (quantizer.codebook[:, None] == z).all(2).any(1).all()
    assert len(torch.unique(quantizer.codebook, dim=0)) == 64
    usage = quantizer.tally.usage(clear=False)
    assert not usage.ever.any()
    assert not usage.window.any()


BEGINNINGS = [{"init": init, "learning": learning} for init in ("samples", "kmeans") for learning in LEARNING]


@pytest.mark.parametrize("changes", [*BEGINNINGS, {"depth": 3}, {"depth": 2, "groups": 2, "metric": "cosine"}], ids=str)
def test_a_codebook_of_another_run_is_not_placed_anew(changes: dict[str, Any]) -> None:
    """At step 0 of the run that takes it up it learns as in any step of its own: nothing is replaced or dropped."""
    config = Config(codebook_size=16, dim=4, reset_every=10, **changes)
    rows = batches(30, 100, 4)
    first, second, own = build(config, seed=1), build(config, seed=2), build(config, seed=1)
    for step in range(25):
        first(rows[step])
        first.update(step, lr=0.01)
    for taken in (second, own):
        taken.load_state_dict(first.state_dict())
    for step in range(5):
        second(rows[25 + step])
        second.update(step, lr=0.01)
        own(rows[25 + step])
        own.update(31 + step, lr=0.01)
    for name, value in second.state_dict().items():
        assert torch.equal(value, own.state_dict()[name]), name


@pytest.mark.parametrize("changes", [*BEGINNINGS, {"depth": 3}, {"depth": 2, "groups": 2, "metric": "cosine"}], ids=str)
@pytest.mark.parametrize("skipped", [[0], [0, 1, 2], [1], [0, 2, 3], list(range(19))], ids=str)
def test_a_first_step_that_is_taken_back_is_made_up_for(changes: dict[str, Any], skipped: list[int]) -> None:
    """All codes start on rows, each level's on what the level before leaves over, however many first steps are skipped,
    and without resets."""
    config = Config(codebook_size=16, dim=4, reset_every=0, **changes)
    quantizer = build(config, seed=1)
    for step, z in enumerate(batches(26, 100, 4)):
        before = {name: value.clone() for name, value in quantizer.state_dict().items()}
        leaves = [leaf for leaf in quantizer.modules() if isinstance(leaf, VectorQuantizer)]
        placed = [bool(leaf.placed()) for leaf in leaves]
        quantizer(z)
        quantizer.collect()
        rests = [leaf._seen[0][0] for leaf in leaves]
        quantizer.update(step, lr=0.01)
        for number, (leaf, rest) in enumerate(zip(leaves, rests, strict=True)):
            if leaf.placed() and not placed[number]:
                assert number % config.depth == 0 or placed[number - 1]
                on_rows = (leaf.codebook[:, None] == rest).all(2).any(1)
                assert on_rows.all() or (config.init == "kmeans" and leaf.codebook.std() > 0.1)
        if step in skipped:
            quantizer.load_state_dict(before)
    assert all(leaf.placed() and leaf.tally.ever.any() for leaf in leaves)
    assert all(int(leaf.tally.resets) == 16 for leaf in leaves)


@pytest.mark.parametrize("learning", LEARNING)
def test_dead_codes_return(learning: str) -> None:
    """At the start all codes but three lie far from every row, and 200 steps later nearly all are in use."""
    config = Config(codebook_size=64, dim=4, learning=learning, reset_every=10, dead_after=20)
    quantizer = VectorQuantizer(config)
    codebook = torch.randn(64, 4)
    codebook[3:] += 1000.0
    place_codes(quantizer, codebook)
    for step, z in enumerate(batches(200, 512, 4), start=1):
        quantizer(z)
        quantizer.update(step, lr=0.01)
        if step == 5:
            assert monitoring.used(quantizer.tally.usage(clear=True).window) < 0.1
        if step == 190:
            quantizer.tally.usage(clear=True)
    assert monitoring.used(quantizer.tally.usage(clear=False).window) > 0.95


@pytest.mark.parametrize("learning", LEARNING)
def test_a_reset_takes_a_row_and_forgets_the_past(learning: str) -> None:
    quantizer = VectorQuantizer(Config(codebook_size=8, dim=4, learning=learning, reset_every=4, dead_after=3))
    codebook = torch.randn(8, 4)
    codebook[5:] += 1000.0
    place_codes(quantizer, codebook)
    z = batches(5, 32, 4)
    for step in range(1, 5):
        quantizer(z[step])
        quantizer.update(step, lr=0.01)
    for code in range(5, 8):
        assert (z[4] == quantizer.codebook[code]).all(1).any()
        if learning == "ema":
            assert quantizer.learner.counts[code] == 1
            assert torch.equal(quantizer.learner.sums[code], quantizer.codebook[code])
        else:
            assert not quantizer.learner.mean[code].any()
            assert not quantizer.learner.square[code].any()
            assert quantizer.learner.steps[code] == 0
    assert int(quantizer.tally.resets) >= 3
    assert len(torch.unique(quantizer.codebook[5:], dim=0)) == 3


@pytest.mark.parametrize("learning", LEARNING)
def test_a_nan_cannot_poison_the_codebook(learning: str) -> None:
    quantizer = VectorQuantizer(Config(codebook_size=8, dim=4, learning=learning))
    for step, z in enumerate(batches(12, 32, 4), start=1):
        if step == 10:  # a reset step too
            z[7, 2] = float("nan")
        quantizer(z)
        quantizer.update(step, lr=0.01)
        if step == 9:
            before = quantizer.codebook.clone()
        if step == 10:
            torch.testing.assert_close(quantizer.codebook, before, rtol=1e-5, atol=1e-5)
    for name, value in quantizer.state_dict().items():
        assert value.double().isfinite().all(), name


@pytest.mark.parametrize("init", ["samples", "kmeans"])
def test_micro_batches_are_summed_as_they_come(init: Any) -> None:
    """A step of five micro-batches has the bits of the joined batch. It holds the rows of two, but of all five where it
    places or replaces codes."""
    config = Config(codebook_size=8, dim=4, init=init, reset_every=4, dead_after=3)
    joined, split = VectorQuantizer(config, seed=1), VectorQuantizer(config, seed=1)
    split.load_state_dict(joined.state_dict())
    for step, z in enumerate(batches(42, 60, 4)):
        joined(z)
        joined.update(step, lr=0.01)
        held = []
        for part in z.chunk(5):
            split(part)
            split.collect()
            held.append(len(split._seen))
        split.update(step, lr=0.01)
        assert max(held) == (5 if step in AGAIN or step % 4 == 0 else 1)
        assert not split._seen
        for name, value in joined.state_dict().items():
            assert torch.equal(value, split.state_dict()[name]), (step, name)


def test_usage_is_a_plain_count() -> None:
    config = Config(codebook_size=30, dim=3, reset_every=0)
    quantizer = VectorQuantizer(config)
    place_codes(quantizer, torch.randn(30, 3))
    window: list[np.ndarray] = []
    ever: set[int] = set()
    last = np.full(30, -1)
    for step, z in enumerate(batches(20, 40, 3), start=1):
        codes = quantizer(z).codes.numpy()
        quantizer.update(step, lr=0.0)
        window.append(codes)
        ever |= set(codes)
        last[codes] = step
        if step == 10:
            quantizer.tally.usage(clear=True)
            window = []
    usage = quantizer.tally.usage(clear=False)
    counts = np.bincount(np.concatenate(window), minlength=30)
    assert usage.window.tolist() == counts.tolist()
    assert set(np.flatnonzero(usage.ever)) == ever
    used = sorted(ever)
    assert usage.age[used].tolist() == (20 - last[used]).tolist()
    share = counts[counts > 0] / counts.sum()
    numbers = monitoring.scalars(usage)
    assert numbers["perplexity"] == pytest.approx(np.exp(-(share * np.log(share)).sum()))
    assert numbers["usage_window"] == (counts > 0).mean()
    assert numbers["usage_ever"] == len(ever) / 30


def test_quantisation_is_an_fp32_island() -> None:
    quantizer = VectorQuantizer(Config(codebook_size=300, dim=8))
    quantizer.codebook.copy_(torch.randn(300, 8))
    z = torch.randn(500, 8).bfloat16()
    plain = quantizer(z.float())
    with torch.autocast("cpu", torch.bfloat16):
        inside = quantizer(z)
    assert inside.z.dtype == torch.float32
    assert torch.equal(inside.codes, plain.codes)
    assert torch.equal(inside.loss, plain.loss)
    assert not list(quantizer.parameters())


def test_evaluation_leaves_no_trace() -> None:
    quantizer = VectorQuantizer(Config(codebook_size=8, dim=4)).eval()
    before = {name: value.clone() for name, value in quantizer.state_dict().items()}
    quantizer(torch.randn(10, 4))
    assert not quantizer._seen
    for name, value in quantizer.state_dict().items():
        assert torch.equal(value, before[name])
