"""One file per idea. A model knows no DeepSpeed and no files."""

from collections.abc import Callable
from typing import Any

from ..interfaces import Model
from . import autoencoder, hvae, pca, vae, vdvae, vqvae

# model.kind → (its settings, (settings, shape, seed) → model)
MODELS: dict[str, tuple[type[Any], Callable[..., Model]]] = {
    "pca": (pca.Config, pca.PCA),
    "autoencoder": (autoencoder.Config, autoencoder.Autoencoder),
    "vae": (vae.Config, vae.build),
    "hvae": (hvae.Config, hvae.build),
    "vdvae": (vdvae.Config, vdvae.build),
    "vqvae": (vqvae.Config, vqvae.VQVAE),
}
