"""The Inception-v3 of the FID: Szegedy et al. 2016, "Rethinking the Inception architecture for computer vision", with
the weights of 2015-12-05 from TensorFlow and their 1008 classes.

It differs from later versions: averages leave out the padding, the last block has a maximum in the place of an average,
and images are resized by TensorFlow 1's rule. The names of layers are those of torchvision, as in the files of
pytorch-fid and torch-fidelity."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .frozen import Net, Tensors, folded

SIZE = 299
FEATURES, CLASSES = 2048, 1008
EPSILON = 1e-3  # of the batch norms


class Conv(NamedTuple):
    """A convolution, a batch norm and a ReLU. With stride 1 it keeps height and width unless it is not padded."""

    name: str
    channels: int
    height: int = 1
    width: int = 1
    stride: int = 1
    padded: bool = True


class Branch(NamedTuple):
    convs: tuple[Conv, ...]  # one after the other
    ends: tuple[Conv, ...] = ()  # of the last one's output, side by side
    pool: str = ""  # before them: "average" or "max" of 3 × 3 pixels, or "half", the same maximum with stride 2


Block = tuple[str, tuple[Branch, ...]]  # name; the outputs of the branches are joined


def chain(name: str, *layers: tuple[int, int, int]) -> tuple[Conv, ...]:
    """Returns convolutions NAME_1, NAME_2, … of (channels, height, width)."""
    return tuple(Conv(f"{name}_{number}", *layer) for number, layer in enumerate(layers, start=1))


def pooled(channels: int, pool: str = "average") -> Branch:
    return Branch((Conv("branch_pool", channels),), pool=pool)


def block_a(name: str, channels: int) -> Block:
    return name, (
        Branch((Conv("branch1x1", 64),)),
        Branch(chain("branch5x5", (48, 1, 1), (64, 5, 5))),
        Branch(chain("branch3x3dbl", (64, 1, 1), (96, 3, 3), (96, 3, 3))),
        pooled(channels),
    )


def block_b(name: str) -> Block:
    double = (*chain("branch3x3dbl", (64, 1, 1), (96, 3, 3)), Conv("branch3x3dbl_3", 96, 3, 3, 2, False))
    return name, (Branch((Conv("branch3x3", 384, 3, 3, 2, False),)), Branch(double), Branch((), pool="half"))


def block_c(name: str, inner: int) -> Block:
    double = ((inner, 1, 1), (inner, 7, 1), (inner, 1, 7), (inner, 7, 1), (192, 1, 7))
    return name, (
        Branch((Conv("branch1x1", 192),)),
        Branch(chain("branch7x7", (inner, 1, 1), (inner, 1, 7), (192, 7, 1))),
        Branch(chain("branch7x7dbl", *double)),
        pooled(192),
    )


def block_d(name: str) -> Block:
    seven = (*chain("branch7x7x3", (192, 1, 1), (192, 1, 7), (192, 7, 1)), Conv("branch7x7x3_4", 192, 3, 3, 2, False))
    three = (Conv("branch3x3_1", 192), Conv("branch3x3_2", 320, 3, 3, 2, False))
    return name, (Branch(three), Branch(seven), Branch((), pool="half"))


def block_e(name: str, pool: str) -> Block:
    return name, (
        Branch((Conv("branch1x1", 320),)),
        Branch(chain("branch3x3", (384, 1, 1)), (Conv("branch3x3_2a", 384, 1, 3), Conv("branch3x3_2b", 384, 3, 1))),
        Branch(
            chain("branch3x3dbl", (448, 1, 1), (384, 3, 3)),
            (Conv("branch3x3dbl_3a", 384, 1, 3), Conv("branch3x3dbl_3b", 384, 3, 1)),
        ),
        pooled(192, pool),
    )


STEM = (  # the maximum of 3 × 3 pixels with stride 2 follows each of the two parts
    (
        Conv("Conv2d_1a_3x3", 32, 3, 3, 2, False),
        Conv("Conv2d_2a_3x3", 32, 3, 3, 1, False),
        Conv("Conv2d_2b_3x3", 64, 3, 3),
    ),
    (Conv("Conv2d_3b_1x1", 80), Conv("Conv2d_4a_3x3", 192, 3, 3, 1, False)),
)
BLOCKS = (
    block_a("Mixed_5b", 32),
    block_a("Mixed_5c", 64),
    block_a("Mixed_5d", 64),
    block_b("Mixed_6a"),
    block_c("Mixed_6b", 128),
    block_c("Mixed_6c", 160),
    block_c("Mixed_6d", 160),
    block_c("Mixed_6e", 192),
    block_d("Mixed_7a"),
    block_e("Mixed_7b", "average"),
    block_e("Mixed_7c", "max"),
)


def kernels() -> dict[str, tuple[int, int, int, int]]:
    """Returns the shapes of the convolutions' weights by name."""
    found, before = {}, 3
    for conv in (conv for part in STEM for conv in part):
        found[conv.name] = (conv.channels, before, conv.height, conv.width)
        before = conv.channels
    for block, branches in BLOCKS:
        after = 0
        for branch in branches:
            channels = before
            for conv in branch.convs:
                found[f"{block}.{conv.name}"] = (conv.channels, channels, conv.height, conv.width)
                channels = conv.channels
            for conv in branch.ends:
                found[f"{block}.{conv.name}"] = (conv.channels, channels, conv.height, conv.width)
            after += sum(conv.channels for conv in branch.ends) or channels
        before = after
    return found


def shapes() -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {"fc.weight": (CLASSES, FEATURES)}
    for name, kernel in kernels().items():
        found |= {f"{name}.weight": kernel, f"{name}.bias": kernel[:1]}
    return found


def own(state: Tensors) -> Tensors:
    tensors = {"fc.weight": state["fc.weight"]}
    for name in kernels():
        tensors[f"{name}.weight"], tensors[f"{name}.bias"] = folded(state, f"{name}.conv", f"{name}.bn", EPSILON)
    return tensors


def run(tensors: Tensors, x: Tensor) -> tuple[Tensor, Tensor]:
    def convolved(x: Tensor, conv: Conv, block: str = "") -> Tensor:
        weight, bias = tensors[f"{block}{conv.name}.weight"], tensors[f"{block}{conv.name}.bias"]
        padding = (conv.height // 2, conv.width // 2) if conv.padded else 0
        return F.relu(F.conv2d(x, weight, bias, conv.stride, padding))

    x = (resized(x, SIZE) - 128) / 128
    for part in STEM:
        for conv in part:
            x = convolved(x, conv)
        x = F.max_pool2d(x, 3, 2)
    for block, branches in BLOCKS:
        joined = []
        for branch in branches:
            h = POOLS[branch.pool](x) if branch.pool else x
            for conv in branch.convs:
                h = convolved(h, conv, f"{block}.")
            joined += [convolved(h, conv, f"{block}.") for conv in branch.ends] or [h]
        x = torch.cat(joined, 1)
    features = x.mean((2, 3))
    return features, F.linear(features, tensors["fc.weight"])


POOLS = {
    "average": lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False),
    "max": lambda x: F.max_pool2d(x, 3, 1, 1),
    "half": lambda x: F.max_pool2d(x, 3, 2),
}


def resized(x: Tensor, size: int) -> Tensor:
    """Resizes bilinearly by the rule of TensorFlow 1: pixel i of the new side lies at i · length / size of the old one,
    and nothing is averaged."""
    for axis in (3, 2):
        length = x.shape[axis]
        at = torch.arange(size, device=x.device, dtype=torch.float32) * (length / size)
        low = at.long()
        weight = (at - low)[:, None] if axis == 2 else at - low
        first, second = x.index_select(axis, low), x.index_select(axis, (low + 1).clamp_max(length - 1))
        x = first + (second - first) * weight
    return x


NET = Net(
    "FID",
    FEATURES,
    {
        "layer": "pool3; classes: its product with the weights of the last layer, without bias",
        "resize": f"bilinear to {SIZE} × {SIZE} by TensorFlow 1's rule, without antialiasing",
        "range": "(x − 128) / 128",
    },
    shapes(),
    own,
    run,
    CLASSES,
)
