"""One file per idea. A model knows no DeepSpeed and no files."""

from .vqvae import VQVAE

MODELS = {"vqvae": VQVAE}
