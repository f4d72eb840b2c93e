"""The model families, one file each. Models use neither DeepSpeed nor files, but for the weights of a
perceptual distance."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from ..interfaces import Model
from ..nn.networks import NETWORKS, Kind
from . import autoencoder, code_prior, diffusion, hvae, kl, pca, vae, vdvae, vqvae

PIXELS = diffusion.PIXELS


class Family(NamedTuple):
    config: type[Any]  # the dataclass of its settings
    build: Callable[..., Model]  # (settings, shape, seed) → model; with `base`: (settings, shape, seed, codec) → model
    learner: Literal["descent", "closed_form"] = "descent"  # a key of training.learner.LEARNERS
    # model.network.kind → its networks, if model.network is of several classes
    networks: Mapping[str, Kind] = MappingProxyType({})
    # the setting of `config` that names a run, whose frozen codec the model is built on; the name PIXELS is no run
    base: str = ""


MODELS = {  # model.kind → its family
    "pca": Family(pca.Config, pca.PCA, "closed_form"),
    "autoencoder": Family(autoencoder.Config, autoencoder.Autoencoder),
    "vae": Family(vae.Config, vae.build),
    "hvae": Family(hvae.Config, hvae.build),
    "vdvae": Family(vdvae.Config, vdvae.build),
    "kl": Family(kl.Config, kl.build, networks=NETWORKS),
    "vqvae": Family(vqvae.Config, vqvae.VQVAE, networks=NETWORKS),
    "code_prior": Family(code_prior.Config, code_prior.build, base="tokenizer"),
    "diffusion": Family(diffusion.Config, diffusion.build, base="over"),
}
