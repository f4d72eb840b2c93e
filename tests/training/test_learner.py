"""The parts of training that can be tested without a launcher."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from vaescale import settings
from vaescale.advice.dry_run import dry_run
from vaescale.settings import Optimizer
from vaescale.training.buffers import joined
from vaescale.training.descent import Descent, activation_bytes, learning_rate, trunk
from vaescale.training.ema import WeightEMA

QUICKSTART = Path(__file__).parent.parent.parent / "configs" / "quickstart.yaml"


def test_the_learning_rate_rises_and_falls() -> None:
    optimizer = Optimizer(lr=2.0, warmup_steps=10, final_lr_ratio=0.1)
    rates = [learning_rate(optimizer, step, 110) for step in range(110)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9] == rates[10] == 2.0
    assert rates[60] == pytest.approx(2.0 * (0.1 + 0.9 * (1 + math.cos(math.pi / 2)) / 2))
    assert learning_rate(optimizer, 110, 110) == pytest.approx(0.2)
    assert sorted(rates[10:], reverse=True) == rates[10:]


def test_joined_buffers_keep_their_values_and_are_restored_together() -> None:
    """Of all types and shapes, NaN among them; they begin at multiples of 128 bytes."""
    module = nn.Linear(1, 1)
    module.inner = nn.Module()
    given = {
        "age": torch.arange(5),
        "ever": torch.tensor([True, False, True]),
        "inner.sums": torch.tensor([[1.5, math.nan], [-math.inf, 0.0]]).t(),
        "inner.steps": torch.tensor(7),
        "nothing": torch.empty(0, 3),
    }
    for name, value in given.items():
        owner, _, key = name.rpartition(".")
        module.get_submodule(owner).register_buffer(key, value.clone())
    words = joined(module)
    before = words.clone()
    for restored in (False, True):
        for name, buffer in module.named_buffers():
            assert buffer.dtype == given[name].dtype
            torch.testing.assert_close(buffer, given[name], rtol=0, atol=0, equal_nan=True)
            assert buffer.storage_offset() * buffer.element_size() % 128 == 0
            buffer.zero_()
        if not restored:
            assert not words.any()
            words.copy_(before)


def test_averaged_weights_are_the_weighted_sum() -> None:
    model = nn.Linear(1, 1, bias=False)
    model.register_buffer("codebook", torch.zeros(2))
    ema, buffers = WeightEMA(model, decay=0.9), joined(model)
    expected = model.weight.item()
    for step in range(200):
        model.weight.data.fill_(math.sin(step))
        model.codebook.fill_(step)
        ema.update(model, buffers, step, torch.zeros(()))
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * math.sin(step)
    assert float(ema.model.weight) == pytest.approx(expected, abs=1e-5)
    assert torch.equal(ema.model.codebook, model.codebook)


def test_averaged_weights_do_not_move_in_skipped_steps() -> None:
    """Skipped steps do not change the average; the decision is on the device."""
    model = nn.Linear(3, 2)
    ema, buffers = WeightEMA(model, decay=0.9), joined(model)
    expected = [p.detach().clone() for p in model.parameters()]
    for step in range(20):
        torch.nn.init.normal_(model.weight)
        before = [p.clone() for p in ema.model.parameters()]
        skipped = step % 3 == 1
        ema.update(model, buffers, step, torch.tensor(float(skipped)))
        if skipped:
            assert all(torch.equal(p, q) for p, q in zip(ema.model.parameters(), before, strict=True))
        else:
            weight = 1 - min(0.9, (1 + step) / (10 + step))
            expected = [torch.lerp(p, q.detach(), weight) for p, q in zip(expected, model.parameters(), strict=True)]
    for found, wanted in zip(ema.model.parameters(), expected, strict=True):
        torch.testing.assert_close(found, wanted)


def test_a_model_without_buffers_is_averaged() -> None:
    model = nn.Linear(1, 1)
    ema, buffers = WeightEMA(model, decay=0.9), joined(model)
    before = float(ema.model.weight)
    model.weight.data.fill_(3.0)
    ema.update(model, buffers, 0, torch.zeros(()))
    assert float(ema.model.weight) == pytest.approx(0.1 * before + 0.9 * 3.0)


def test_a_dry_run_says_the_batch_arithmetic_and_the_memory() -> None:
    config = settings.load(QUICKSTART, ["global_batch=24", "accumulation=3", "zero_stage=2", "steps=10"])
    text = dry_run(config, world=4)
    assert "2 (micro) × 3 (accumulation) × 4 (world) = 24 images" in text
    assert "10 steps of 24 images" in text
    assert f"{sum(p.numel() for p in settings.build(config).parameters()) / 1e6:.3f} M" in text
    assert "codebook_size: 512" in text
    assert "evaluation  " not in text
    more = ["every.evaluate=4", "every.validate=2", "evaluation.metrics=[rkid,gkid]", "evaluation.count=50"]
    text = dry_run(settings.load(QUICKSTART, ["global_batch=24", "steps=10", *more]), world=4)
    assert "3 times, each time inception's features of up to 50 reconstructions and as many generated images" in text


def test_weights_are_not_counted_as_activations() -> None:
    """A linear layer saves its transposed weight for the backward pass."""
    given = ["run=none", "data.root=none", "model.network.kind=linear", "data.size=64", "model.latent_dim=64"]
    config = settings.load("tests/integration/tiny_autoencoder.yaml", given)
    with FakeTensorMode():
        model = settings.build(config)
        images = settings.blank(config, 1).x.numel() * 4  # in fp32
        assert images <= activation_bytes(model, config) < 8 * images < sum(p.nbytes for p in model.parameters())


def test_a_perceptual_distance_counts_in_fp32_at_every_precision() -> None:
    given = ["data.size=64", "model.reconstruction.perceptual.weight=1", "model.reconstruction.perceptual.trunk=random"]
    with FakeTensorMode():
        plain, low, high = (
            settings.load(QUICKSTART, [f"precision={precision}", "data.size=64", *more])
            for precision, more in (("fp32", []), ("bf16", given), ("fp32", given))
        )
        held = [activation_bytes(settings.build(config), config) for config in (plain, low, high)]
        # The inputs of VGG16's convolutions: channels, and the share of the pixels of a 64 × 64 image.
        read = (3 + 64) + (64 + 128) / 4 + (128 + 2 * 256) / 16 + (256 + 2 * 512) / 64 + 3 * 512 / 256
        inputs = 4 * 64**2 * read
        assert inputs < held[2] - held[0] < 4 * inputs
        assert held[1] == pytest.approx(held[2] - held[0] / 2, rel=0.01)
        model = settings.build(high)
        assert sum(tensor.nbytes for tensor in trunk(model)) == 4 * (14_714_688 + 64 + 128 + 256 + 512 + 512 + 6)
        assert Descent.memory(model, high, 1)["buffers"] > 58e6


def test_activations_are_counted() -> None:
    """A VQ-VAE keeps at least the input of each convolution, and at most a few times that."""
    config = settings.load(QUICKSTART, ["precision=fp32"])
    model = settings.build(config)
    inputs = 0

    def count(module: nn.Module, arguments: tuple[torch.Tensor]) -> None:
        nonlocal inputs
        inputs += arguments[0].numel() * 4

    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            module.register_forward_pre_hook(count)
    counted = activation_bytes(model, config)
    assert 0.8 * inputs < counted < 2 * inputs
    with FakeTensorMode():
        assert activation_bytes(settings.build(config), config) == counted


@pytest.mark.parametrize("name", ["tiny_vqgan", "tiny_vdvae"])
def test_blocks_that_are_computed_again_keep_less(name: str) -> None:
    given = ["run=none", "data.root=none", "precision=fp32"]
    held = []
    for checkpointing in ("false", "true"):
        config = settings.load(f"tests/integration/{name}.yaml", [*given, f"model.checkpointing={checkpointing}"])
        with FakeTensorMode():
            held.append(activation_bytes(settings.build(config), config))
    assert 0 < held[1] < 0.7 * held[0]
