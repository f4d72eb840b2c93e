"""A perceptual distance between images: LPIPS (Zhang, Isola, Efros, Shechtman, Wang 2018, "The unreasonable
effectiveness of deep features as a perceptual metric"), or the same formula with other weights.

    d(x, y) = Σ_stages mean_hw Σ_c w_c (φ_c(x)/‖φ(x)‖ − φ_c(y)/‖φ(y)‖)²    (equation 1)

φ is the feature map after a stage of the trunk, a trained network of convolutions, and w are the heads. It is called
LPIPS only with the published trunk and heads. `launch/weights.py convert` writes files of weights; they hold:

    trunk.I.weight, trunk.I.bias    of convolution I
    head.S    fp32 [C ≥ 0]: w of stage S
    mean, std    fp32 [3]: the trunk reads (x − mean) / std, for x in [0, 1]
    metadata    "kind", a key of KINDS, "source", "sha256" (of the source), "licence"
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..ranges import ranged
from .published import FILES, place, what_to_do


class Net(NamedTuple):
    """A trunk's convolutions, each followed by a ReLU. Max pooling with stride 2 precedes some stages."""

    stages: tuple[tuple[tuple[int, int, int, int], ...], ...]  # (channels, kernel, stride, padding) of each convolution
    pool: int  # pixels per side of a pooling window
    pooled: range  # stages that begin with pooling
    least: int  # pixels per side of the smallest image


def _vgg(channels: int, count: int) -> tuple[tuple[int, int, int, int], ...]:
    return ((channels, 3, 1, 1),) * count


# Stages end where Zhang et al. compare features: relu1_2, 2_2, 3_3, 4_3, 5_3 of VGG16, relu1 to relu5 of AlexNet.
NETS = {
    "vgg16": Net((_vgg(64, 2), _vgg(128, 2), _vgg(256, 3), _vgg(512, 3), _vgg(512, 3)), 2, range(1, 5), 16),
    "alexnet": Net(
        (((64, 11, 4, 2),), ((192, 5, 1, 2),), ((384, 3, 1, 1),), ((256, 3, 1, 1),), ((256, 3, 1, 1),)),
        3, range(1, 3), 31,
    ),
}  # fmt: skip


class Kind(NamedTuple):
    net: str  # a key of NETS
    words: str  # for people


# By the name of their numbers in reports.
KINDS = {
    "lpips_vgg": Kind("vgg16", "LPIPS (VGG16)"),
    "lpips_alex": Kind("alexnet", "LPIPS (AlexNet)"),
    "perceptual_hed": Kind("vgg16", "perceptual distance (HED trunk)"),
    "perceptual_random": Kind("vgg16", "perceptual distance (random trunk)"),
}
# Of LPIPS' trunks: that of ImageNet's pixels. Zhang et al. write it for images in [−1, 1].
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
EPSILON = 1e-10  # added to ‖φ‖, as in the authors' code
MISSING = (
    "model.reconstruction.perceptual.weights is not set: fetch vgg16-397923af.pth (torchvision's VGG16, BSD-3-Clause, "
    "trained on ImageNet), convert it with `python launch/weights.py convert vgg16-397923af.pth`, "
    "and set model.reconstruction.perceptual.weights=lpips_vgg"
)


@dataclass(frozen=True)
class Config:
    weight: float = ranged(0.0, least=0)  # of the distance in the loss; 0: it is not computed
    weights: str = ""  # a file that `launch/weights.py convert` wrote, or its kind if it is in the folder of weights
    trunk: Literal["file", "random"] = "file"  # random: drawn, for tests only


class Distance:
    """The distance, with its weights. It is not a module: no state dict, checkpoint, optimiser or average has its
    weights, and copies of a model share them."""

    def __init__(self, kind: str, tensors: dict[str, Tensor], source: dict[str, str]) -> None:
        """source: the metadata of the file, for reports. Raises ValueError if tensors do not have the kind's shapes."""
        self.kind = kind
        self.net = NETS[KINDS[kind].net]
        self.source = source
        wanted = shapes(self.net)
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if found != wanted:
            wrong = sorted(name for name in {*wanted, *found} if wanted.get(name) != found.get(name))
            raise ValueError(f"is not a file of {KINDS[kind].words}: {wrong[0]} is missing or has another shape")
        self.tensors = {name: tensor.detach().float() for name, tensor in tensors.items()}

    def __deepcopy__(self, memo: dict[int, Any]) -> "Distance":
        return self

    def to(self, device: torch.device) -> "Distance":
        """Moves the weights, in place."""
        self.tensors = {name: tensor.to(device) for name, tensor in self.tensors.items()}
        return self

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns the distance of each pair, fp32 [B]. Both float [B, 1 or 3, H, W] in [0, 1]. The gradient flows into
        x only, so that the features of y are not kept.

        It is computed in fp32, whatever autocast says: a difference of similar features is small next to them.
        """
        with torch.autocast(x.device.type, enabled=False):
            with torch.no_grad():
                references = self._features(y)
            total = torch.zeros((), device=x.device)
            for stage, (ours, theirs) in enumerate(zip(self._features(x), references, strict=True)):
                head = self.tensors[f"head.{stage}"][:, None, None]
                total = total + ((ours - theirs).square() * head).sum(1).mean((1, 2))
        return total

    def _features(self, images: Tensor) -> list[Tensor]:
        """The feature map after each stage, each position's vector scaled to norm 1: fp32 [B, C, h, w]."""
        tensors, found, number = self.tensors, [], 0
        h = (images.float() - tensors["mean"][:, None, None]) / tensors["std"][:, None, None]  # grey → three channels
        for stage, convolutions in enumerate(self.net.stages):
            if stage in self.net.pooled:
                h = F.max_pool2d(h, self.net.pool, 2)
            for _, _, stride, padding in convolutions:
                weight, bias = tensors[f"trunk.{number}.weight"], tensors[f"trunk.{number}.bias"]
                h = F.relu(F.conv2d(h, weight, bias, stride, padding))
                number += 1
            # Unlike the root of a sum of squares, this norm has a gradient, 0, where all features are 0.
            found.append(h / (torch.linalg.vector_norm(h, dim=1, keepdim=True) + EPSILON))
        return found


def shapes(net: Net) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a file's tensors by name."""
    found: dict[str, tuple[int, ...]] = {"mean": (3,), "std": (3,)}
    before = 3
    for number, (channels, kernel, _, _) in enumerate(one for stage in net.stages for one in stage):
        found[f"trunk.{number}.weight"] = (channels, before, kernel, kernel)
        found[f"trunk.{number}.bias"] = (channels,)
        before = channels
    return found | {f"head.{stage}": (convolutions[-1][0],) for stage, convolutions in enumerate(net.stages)}


def build(config: Config, size: int) -> Distance | None:
    """Builds the distance that the config names; None at weight 0. size: pixels per side. Raises ValueError."""
    if not config.weight:
        if config.weights:
            raise ValueError(
                "model.reconstruction.perceptual.weights is set, but its weight in the loss is 0: set "
                "model.reconstruction.perceptual.weight=1, or remove the file"
            )
        return None
    if config.trunk == "random":
        distance = drawn("perceptual_random")
    elif config.weights:
        distance = read(config.weights)
    else:
        raise ValueError(MISSING)
    require_size(distance, size)
    return distance


def require_size(distance: Distance, size: int) -> None:
    if size < distance.net.least:
        raise ValueError(
            f"data.size={size} is too small for {KINDS[distance.kind].words}, which needs {distance.net.least} px"
        )


def read(path: str) -> Distance:
    """Reads a file of weights; also under FakeTensorMode, through arrays. Raises ValueError, one sentence.

    path: may also be a key of KINDS, for the file of this kind in the folder of weights (nn/published.py)."""
    if path in FILES:
        kind, path = path, str(place(path))
        if not Path(path).exists():
            raise ValueError(f"{path} does not exist: {what_to_do(kind)}")
    try:
        with safe_open(path, "numpy") as file:
            source = file.metadata() or {}
            kind = source.get("kind", "")
            if kind not in KINDS:
                raise ValueError("is not a file of weights that `launch/weights.py convert` wrote")
            return Distance(kind, {name: torch.from_numpy(file.get_tensor(name)) for name in file.keys()}, source)  # noqa: SIM118
    except OSError as error:
        reason = error.strerror or "it does not exist"
        raise ValueError(f"{path} cannot be read ({reason}): convert it with `launch/weights.py convert`") from None
    except (SafetensorError, ValueError) as error:
        reason = str(error) if isinstance(error, ValueError) else f"is damaged ({error})"
        raise ValueError(f"{path} {reason}: convert it again with `launch/weights.py convert`") from None


def drawn(kind: str, seed: int = 0) -> Distance:
    """Draws weights, the same on all ranks: a trunk that keeps the scale of its input (He et al. 2015), and the heads
    of `uniform`."""
    generator = torch.Generator().manual_seed(seed)
    net = NETS[KINDS[kind].net]
    tensors = {"mean": torch.tensor(MEAN), "std": torch.tensor(STD), **uniform(net)}
    for name, shape in shapes(net).items():
        if name.endswith("weight"):
            tensors[name] = torch.randn(shape, generator=generator) * math.sqrt(2 / math.prod(shape[1:]))
        elif name.endswith("bias"):
            tensors[name] = torch.zeros(shape)
    return Distance(kind, tensors, {"source": "drawn"})


def uniform(net: Net) -> dict[str, Tensor]:
    """Returns heads without which the distance would need training: with them it is the mean over stages and positions
    of 1 − cos of the two feature vectors, in [0, 1], because ‖a − b‖² = 2 (1 − cos) for vectors of norm 1."""
    count = len(net.stages)
    return {f"head.{stage}": torch.full((one[-1][0],), 1 / (2 * count)) for stage, one in enumerate(net.stages)}
