"""One file per idea. A model knows no DeepSpeed and no files."""

from typing import Any

from ..interfaces import Model
from . import autoencoder, pca, vqvae

# model.kind → (its settings, its class)
MODELS: dict[str, tuple[type[Any], type[Model]]] = {
    "pca": (pca.Config, pca.PCA),
    "autoencoder": (autoencoder.Config, autoencoder.Autoencoder),
    "vqvae": (vqvae.Config, vqvae.VQVAE),
}
