"""Model FLOPs against closed forms, and when a share of the peak is reported."""

from pathlib import Path

import pytest
import torch

from vaescale import settings
from vaescale.training import flops

CONFIGS = Path(__file__).parent.parent.parent / "configs"
TINY = Path(__file__).parent.parent / "integration"


def test_a_linear_autoencoder_has_two_flops_a_weight_and_pass() -> None:
    """Forward, gradient of the weights, and gradient of the input, which the first layer does not need."""
    given = ["run=run", "data.root=data", "model.latent_dim=10", "data.size=16", "data.channels=1"]
    config = settings.load(CONFIGS / "ae_linear_digits.yaml", given)
    assert flops.per_image(config) == 2 * (2 * 256 * 10) + 3 * (2 * 10 * 256)


@pytest.mark.parametrize("config", ["tiny.yaml", "tiny_hvae.yaml", "tiny_vdvae.yaml"])
def test_every_family_is_counted_without_a_trace(config: str) -> None:
    """Counting changes no random state."""
    loaded = settings.load(TINY / config, ["run=run", "data.root=data"])
    before = torch.get_rng_state()
    assert flops.per_image(loaded) > 10**5
    assert torch.equal(torch.get_rng_state(), before)


def test_a_closed_form_has_no_count() -> None:
    given = ["run=run", "data.root=data", "data.size=16"]
    assert flops.per_image(settings.load(CONFIGS / "pca_digits.yaml", given)) == 0


def test_a_peak_is_that_of_a_known_device(monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings.load(TINY / "tiny.yaml", ["run=run", "data.root=data", "precision=bf16"])
    assert flops.peak(config, torch.device("cpu")) == 0
    for name, expected in {
        "NVIDIA H100 80GB HBM3": 989e12,
        "NVIDIA A100-SXM4-40GB": 312e12,
        "NVIDIA H100 PCIe": 0.0,
        "Tesla T4": 0.0,
    }.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert flops.peak(config, torch.device("cuda")) == expected
    other = settings.load(TINY / "tiny.yaml", ["run=run", "data.root=data", "precision=fp32"])
    assert flops.peak(other, torch.device("cuda")) == 0


def test_a_critic_is_counted_with_both_of_its_passes() -> None:
    """Its own is over two images, in which the first layer needs no gradient of its input; the model's is over one, and
    needs no gradients of weights."""
    given = ["run=run", "data.root=data", "adversarial.width=8", "adversarial.layers=1"]
    without, loaded = (
        settings.load(TINY / "tiny.yaml", [*given, f"adversarial.weight={weight}"]) for weight in (0, 0.1)
    )
    layers = [2 * 16 * 3 * 8 * 8 * 8, 2 * 16 * 8 * 16 * 7 * 7, 2 * 16 * 16 * 1 * 6 * 6]  # 16 → 8, 7 and 6 px
    assert flops.per_image(loaded) - flops.per_image(without) == 8 * sum(layers) - 2 * layers[0]
