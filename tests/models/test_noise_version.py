"""The bound of a run that was begun with an earlier version of the noise is measured with that version."""

from pathlib import Path

import pytest
import torch

from vaescale import settings
from vaescale.interfaces import Batch, Bounded, Model
from vaescale.models import MODELS
from vaescale.nn import noise

ROOT = Path(__file__).parents[2]
CONFIGS = {
    "pca": "configs/pca_digits.yaml",
    "autoencoder": "configs/ae_digits.yaml",
    "vae": "configs/vae_digits.yaml",
    "hvae": "configs/hvae2_digits.yaml",
    "vdvae": "tests/integration/tiny_vdvae.yaml",
    "kl": "tests/integration/tiny_kl.yaml",
    "vqvae": "configs/vqvae_digits.yaml",
}


def built(kind: str) -> tuple[Model, Batch]:
    config = settings.load(ROOT / CONFIGS[kind], ["run=none", "data.root=none"])
    torch.manual_seed(0)
    batch = settings.blank(config, 3)
    return settings.build(config).eval(), batch._replace(sample=torch.arange(3))


@pytest.mark.parametrize("kind", [kind for kind in MODELS if not MODELS[kind].base])
def test_the_bound_has_the_noise_of_the_version(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = built(kind)
    if not isinstance(model, Bounded):
        pytest.skip("it has no bound")
    with torch.no_grad():
        new = model.bound(batch, 1).log_ratio
        model.noise_version = 1
        old = model.bound(batch, 1).log_ratio
        model.noise_version = None
        whole = noise.normal
        monkeypatch.setattr(noise, "normal", lambda *keys, version: whole(*keys, version=1))
        wanted = model.bound(batch, 1).log_ratio
    assert torch.equal(old, wanted)
    assert not torch.equal(old, new)
