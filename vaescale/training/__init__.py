"""The training loop and the training step. Only `engine` imports deepspeed."""

from .. import settings  # noqa: F401 (until 0.2 it was in this package, and scripts import it from here)
