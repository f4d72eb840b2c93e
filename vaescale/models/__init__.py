"""One file per idea. A model knows no DeepSpeed and no files."""

from typing import Any

from ..interfaces import Model
from . import vae, vqvae

# model.kind → (its settings, its class)
MODELS: dict[str, tuple[type[Any], type[Model]]] = {
    "vae": (vae.Config, vae.VAE),
    "vqvae": (vqvae.Config, vqvae.VQVAE),
}
