"""The deep top-down VAE: its sizes against the published ones, its one way through, and its precision."""

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.conftest import ROOT
from tests.models.test_vae import COLOUR, batch, whole
from vaescale import settings
from vaescale.interfaces import Bounded, Condition, Shape
from vaescale.models.variational import Variational
from vaescale.models.vdvae import Config, Stage, build
from vaescale.nn import likelihood

DOWN = [Stage(8, 2), Stage(4, 1), Stage(1, 1)]
UP = [Stage(1, 1), Stage(4, 2), Stage(8, 2)]
LEVELS = 5
MIXTURE = likelihood.Config(kind="logistic-mixture", components=2)


def model(shape: Shape = COLOUR, **changes: object) -> Variational:
    torch.manual_seed(0)
    given = {"width": 8, "bottleneck": 4, "latent_dim": 3, "encoder": DOWN, "decoder": UP, "likelihood": MIXTURE}
    return build(Config(**{**given, **changes}), shape)


def awake(vae: Variational) -> Variational:
    """With priors that depend on what is above them and starts that are not zero, as after some training."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for block in vae.net.blocks:
            last = block.prior.layers[-1]
            last.weight.copy_(0.3 * torch.randn(last.weight.shape, generator=generator))
        for start in vae.net.starts.values():
            start.copy_(torch.randn(start.shape, generator=generator))
    return vae


@pytest.mark.parametrize(
    ("name", "published"), [("hvae_cifar10", 39), ("hvae_imagenet32", 119), ("hvae_imagenet64", 125)]
)
def test_parameters_are_the_published_ones(name: str, published: int) -> None:
    """Child 2021, tables 1 to 3, in millions, within 2 %. A condition, if the config has one, adds parameters."""
    config = settings.load(ROOT / "configs" / f"{name}.yaml", [])
    with torch.device("meta"):
        net = settings.build(config)
    millions = sum(p.numel() for p in net.parameters()) / 1e6
    print(f"{name}: {millions:.2f} M, published {published} M")
    assert millions == pytest.approx(published, rel=0.02)


def test_a_scaled_input_is_what_a_larger_first_convolution_gives() -> None:
    one, four, seen = model(), model(scale=4.0), batch()
    with torch.no_grad():
        one.net.encoder.first.weight.mul_(4)
    for found, expected in zip(four.encode(seen), one.encode(seen), strict=True):
        torch.testing.assert_close(found, expected)
    with pytest.raises(settings.ConfigError, match=r"model\.scale=0"):
        settings.load(ROOT / "configs" / "hvae_photos32.yaml", ["model.scale=0"])


def test_it_begins_where_prior_and_posterior_are_near() -> None:
    """Each prior N(0, I), and h as it was but for what z adds."""
    vae, seen = model().eval(), batch()
    _, levels = vae._infer(seen, seen.condition, lambda _, q: q.mean)
    assert [tuple(level.z.shape[1:]) for level in levels] == [(3, 1, 1), *[(3, 4, 4)] * 2, *[(3, 8, 8)] * 2]
    for level in levels:
        assert not level.p.mean.any()
        assert not level.p.log_std.any()


def test_rates_of_the_levels_sum_to_the_rate_and_the_bound_to_minus_elbo() -> None:
    vae, seen = awake(model()), batch()
    out = vae(seen, 0)
    levels = [out.metrics[f"rate/level{number}"] for number in range(LEVELS)]
    torch.testing.assert_close(sum(levels) * 192 * math.log(2), out.metrics["rate"])
    torch.testing.assert_close(out.loss * 192, out.metrics["rate"] + out.metrics["distortion"])
    torch.testing.assert_close(out.loss, out.metrics["bits_per_dim"] * math.log(2))
    assert all(float(value) > 0 for value in levels)
    out.loss.backward()
    for name, parameter in vae.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name
    bound = vae.bound(seen)
    assert isinstance(vae, Bounded)
    assert [tuple(part.shape) for part in bound] == [(6,), (LEVELS, 6), (6,)]


def test_the_rate_is_the_mean_log_ratio_of_draws() -> None:
    vae, seen = awake(model()).requires_grad_(False), batch(2)
    many = seen._replace(
        x=seen.x.repeat_interleave(1500, 0),
        label=seen.label.repeat_interleave(1500),
        attributes=torch.zeros(3000, 0),
        sample=torch.arange(3000),
    )
    bound = vae.bound(many)
    difference = (bound.rate.sum(0) + bound.log_ratio).double().view(2, 1500)
    assert (difference.mean(1).abs() < 4 * difference.std(1) / 1500**0.5).all()
    assert (difference.std(1) > 1e-2).all()


def trained(vae: Variational, x: Tensor, steps: int) -> Variational:
    """On batches of 16 of these images, in turn."""
    adam = torch.optim.Adam(vae.parameters(), 1e-2)
    for step in range(steps):
        g = torch.arange(16 * step, 16 * step + 16)
        adam.zero_grad()
        vae(whole(x[g % len(x)])._replace(sample=g), step).loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        adam.step()
    return vae.eval().requires_grad_(False)


def test_noise_costs_at_least_its_eight_bits() -> None:
    """No code is shorter than its source: uniform noise of 8 bits has log2 256 a subpixel. Where rates cost nothing in
    training the latents come to carry the image; then the rates must make up for it."""
    x = torch.randint(0, 256, (1024, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    vae = trained(model(beta=0.0), x, 100)
    bound = vae.bound(whole(x[:200]))
    distortion, rate = (nats.double() / (192 * math.log(2)) for nats in (bound.distortion, bound.rate.sum(0)))
    assert float(distortion.mean()) < 7.8
    bits = distortion + rate
    assert float(bits.mean()) > 8 - 4 * float(bits.std()) / 200**0.5


def test_the_more_levels_are_kept_the_nearer_the_image() -> None:
    """On average over images, each level taken from the posterior instead of the prior."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(256, 3, 2, 2, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=8, mode="bilinear")
    images = (255 * smooth).round().to(torch.uint8)
    vae = trained(model(), images[:192], 150)
    seen = whole(images[192:])
    latents = vae.encode(seen)
    errors = []
    for kept in range(LEVELS + 1):
        torch.manual_seed(0)
        y = torch.stack([vae.decode(latents[:kept], seen.condition) for _ in range(8)])
        errors.append(float((y - seen.x / 255).square().mean()))
    print("mean squared error, k = 0 … L:", *(f"{error:.4f}" for error in errors))
    assert all(more <= fewer * 1.02 for fewer, more in pairwise(errors))  # a level without a rate changes nothing
    assert errors[-1] < 0.75 * errors[0]  # in so short a training


def test_a_level_has_the_same_noise_however_many_are_given() -> None:
    """p being N(0, I), what is drawn is the noise."""
    vae, seen = model().eval().requires_grad_(False), batch()
    latents = vae.encode(seen)
    drawn: list[list[Tensor]] = []
    for kept in range(LEVELS + 1):
        found: list[Tensor] = []
        hooks = [
            block.project.register_forward_pre_hook(lambda _, inputs, found=found: found.append(inputs[0]))
            for block in vae.net.blocks
        ]
        torch.manual_seed(4)
        vae.decode(latents[:kept], seen.condition)
        drawn.append(found)
        for hook in hooks:
            hook.remove()
    for kept in range(LEVELS):
        for level in range(LEVELS):
            assert torch.equal(drawn[kept][level], latents[level] if level < kept else drawn[0][level])


def test_posterior_and_prior_are_one_way() -> None:
    """All latents given, the image is the reconstruction of `forward`, though no posterior block was asked."""
    vae, seen = awake(model(classes=3)).eval().requires_grad_(False), batch()
    latents = vae.encode(seen)
    output, _ = vae._infer(seen, seen.condition, lambda _, q: q.mean)
    torch.testing.assert_close(vae.decode(latents, seen.condition), vae.likelihood.mean(output))
    torch.manual_seed(5)
    whole = vae.decode([], seen.condition, 0.7)
    torch.manual_seed(5)
    assert torch.equal(whole, vae.decode([], seen.condition, 0.7))
    for kept in range(LEVELS + 1):
        assert vae.decode(latents[:kept], seen.condition).shape == (6, 3, 8, 8)
    cold = [vae.decode(latents[:kept], seen.condition, 0.0) for kept in (1, 1)]
    assert torch.equal(*cold)


def test_the_label_changes_every_level() -> None:
    vae, seen = awake(model(classes=3)).eval().requires_grad_(False), batch()
    other = seen._replace(label=(seen.label + 1) % 3)
    for one, two in zip(vae.encode(seen), vae.encode(other), strict=True):
        assert not torch.allclose(one, two)
    nothing = Condition(torch.full((6,), -1), torch.zeros(6, 0))
    assert not torch.allclose(vae.decode(vae.encode(seen), nothing), vae.decode(vae.encode(seen), seen.condition))


@pytest.mark.parametrize("precision", ["fp32", "autocast", "half"])
def test_checkpointing_computes_again_and_changes_no_bit(precision: str) -> None:
    """The second computation draws the same noise."""
    seen, gradients = batch(), []
    for checkpointing in (False, True):
        vae = awake(model(checkpointing=checkpointing, classes=3, label_dropout=0.5))
        vae = vae.half() if precision == "half" else vae
        passes: list[int] = []
        vae.net.blocks[2].register_forward_pre_hook(lambda *_, passes=passes: passes.append(1))
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            loss = vae(seen, 3).loss
        loss.backward()
        assert len(passes) == 1 + checkpointing
        gradients.append([parameter.grad for parameter in vae.parameters()])
    assert all(torch.equal(one, two) for one, two in zip(*gradients, strict=True))


def test_free_bits_are_those_of_channels() -> None:
    seen, vae = batch(), awake(model(free_bits=1e9))
    assert vae.rates.shape == (LEVELS * 3,)
    vae(seen, 0)
    vae.update(0, 0.1)
    free = vae(seen, 1)
    assert float(free.loss.detach()) * 192 == pytest.approx(float(free.metrics["distortion"]) + LEVELS * 3e9, rel=1e-4)


@pytest.mark.parametrize("kind", ["logistic-mixture", "discretised-gaussian"])
def test_bf16_has_the_loss_of_fp32(kind: str) -> None:
    """Of a model that has learned something, on several batches."""
    vae = model(likelihood=likelihood.Config(kind=kind, components=2))
    vae = trained(vae, torch.cat([batch(first=first).x for first in range(0, 60, 6)]), 60)
    for first in range(0, 30, 6):
        seen = batch(first=first)
        with torch.autocast("cpu", torch.bfloat16):
            half = vae(seen, 0)
        full = vae(seen, 0)
        assert half.loss.dtype == torch.float32
        assert 7 < float(full.metrics["bits_per_dim"]) < 9
        assert float(half.metrics["bits_per_dim"]) == pytest.approx(float(full.metrics["bits_per_dim"]), abs=0.005)


def test_h_is_summed_in_fp32_inside_autocast() -> None:
    vae, seen, dtypes = model(), batch(), []
    for block in vae.net.blocks:
        block.register_forward_hook(lambda _, inputs, outputs: dtypes.append(outputs[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        vae(seen, 0)
    assert dtypes == [torch.float32] * LEVELS


def test_half_weights_serve() -> None:
    vae, seen = awake(model(classes=3)).half(), batch()
    out = vae(seen, 0)
    out.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in vae.parameters())
    assert vae.decode(vae.encode(seen), seen.condition).dtype == torch.float32


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"encoder": []}, r"model\.encoder must be a list of stages"),
        ({"decoder": [Stage(8, 0)]}, r"model\.decoder\.blocks=0 must be at least 1"),
        ({"encoder": DOWN[1:]}, r"starts at 4 px .* both must be data\.size=8"),
        ({"encoder": [Stage(8, 1), Stage(3, 1)]}, "3 px next to 8 px"),
        ({"decoder": [Stage(2, 1), Stage(8, 1)]}, r"model\.decoder has a stage of 2 px, but model\.encoder has none"),
        (
            {"decoder": [Stage(8, 1), Stage(4, 1), Stage(8, 1)]},
            "must decrease in the encoder and increase in the decoder",
        ),
        ({"decoder": UP[1:]}, "ends at 1 px, but model.decoder starts at 4 px"),
    ],
)
def test_stages_that_do_not_fit_are_named(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        model(**changes)


def test_a_stage_is_checked_like_any_setting(tmp_path: Path) -> None:
    text = "model: {kind: vdvae, encoder: [{size: 8, block: 2}], decoder: [{size: 8, blocks: 1}]}\ndata: {size: 8}\n"
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(settings.ConfigError, match="block"):
        settings.load(path, [])
    path.write_text(text.replace("block:", "blocks:"))
    assert settings.load(path, []).model.encoder == [Stage(8, 2)]
