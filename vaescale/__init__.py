"""vaescale: variational autoencoders at scale."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # torch takes seconds to import
    import os

    import torch

    from .library import Trained


def load(run: str | os.PathLike[str], device: str | torch.device = "cpu") -> Trained:
    """The averaged weights of a run: encodes pictures and decodes latents. See `vaescale.library.Trained`.

    run: a run directory, for its newest valid checkpoint, RUN/checkpoints/step-…, or a folder that `launch/export.py
    hub` wrote. Raises ConfigError (a ValueError) or CheckpointError (a RuntimeError), one sentence, if there is no such
    run or its checkpoint is damaged. The file of a plug-in, whose model the run has, must be imported before.
    """
    from . import library

    return library.load(run, device)
