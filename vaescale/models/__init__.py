"""One file per idea. A model knows no DeepSpeed and no files."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from ..interfaces import Model
from . import autoencoder, hvae, pca, vae, vdvae, vqvae


class Family(NamedTuple):
    config: type[Any]  # its settings, a dataclass
    build: Callable[..., Model]  # (settings, shape, seed) → model
    learner: Literal["descent", "closed_form"] = "descent"  # how it learns: a key of training.learner.LEARNERS


MODELS = {  # model.kind → its family
    "pca": Family(pca.Config, pca.PCA, "closed_form"),
    "autoencoder": Family(autoencoder.Config, autoencoder.Autoencoder),
    "vae": Family(vae.Config, vae.build),
    "hvae": Family(hvae.Config, hvae.build),
    "vdvae": Family(vdvae.Config, vdvae.build),
    "vqvae": Family(vqvae.Config, vqvae.VQVAE),
}
