"""EfficientNet-Lite0: Tan, Le 2019, "EfficientNet: rethinking model scaling for convolutional neural networks", in the
variant for small devices, without squeeze-and-excitation and with ReLU6.

The published weights are those of TensorFlow's repository, converted for torch. There pixels are (x − 127) / 128 and
strided convolutions pad more below and to the right."""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from .frozen import Net, Tensors, folded, resized, resizing

SIZE = 224
EPSILON = 1e-3  # of the batch norms
STAGES = (  # (blocks, kernel, stride of the first block, expansion, channels)
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
STEM, HEAD, CLASSES = 32, 1280, 1000  # channels


class Block(NamedTuple):
    """1×1 convolution to `hidden` channels (if they are more), a convolution of each channel, 1×1 to `after`."""

    before: int
    hidden: int
    after: int
    kernel: int
    stride: int


def blocks() -> list[Block]:
    found, before = [], STEM
    for count, kernel, stride, expansion, channels in STAGES:
        for number in range(count):
            found.append(Block(before, before * expansion, channels, kernel, 1 if number else stride))
            before = channels
    return found


BLOCKS = blocks()


def layers() -> dict[str, tuple[tuple[int, int, int, int], str, str]]:
    """Returns the convolutions: name → (shape of the kernel, published names of the convolution and its batch norm)."""
    found = {"stem": ((STEM, 3, 3, 3), "_conv_stem", "_bn0")}
    for number, block in enumerate(BLOCKS):
        own, published = f"blocks.{number}", f"_blocks.{number}"
        if block.hidden > block.before:
            shape = (block.hidden, block.before, 1, 1)
            found[f"{own}.expand"] = (shape, f"{published}._expand_conv", f"{published}._bn0")
        shape = (block.hidden, 1, block.kernel, block.kernel)
        found[f"{own}.depthwise"] = (shape, f"{published}._depthwise_conv", f"{published}._bn1")
        shape = (block.after, block.hidden, 1, 1)
        found[f"{own}.project"] = (shape, f"{published}._project_conv", f"{published}._bn2")
    return found | {"head": ((HEAD, BLOCKS[-1].after, 1, 1), "_conv_head", "_bn1")}


def shapes() -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {"classes.weight": (CLASSES, HEAD), "classes.bias": (CLASSES,)}
    for name, (shape, _, _) in layers().items():
        found |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return found


def own(state: Tensors) -> Tensors:
    tensors = {f"classes.{part}": state[f"_fc.{part}"] for part in ("weight", "bias")}
    for name, (_, convolution, norm) in layers().items():
        tensors[f"{name}.weight"], tensors[f"{name}.bias"] = folded(state, convolution, norm, EPSILON)
    return tensors


def run(tensors: Tensors, x: Tensor) -> tuple[Tensor, Tensor]:
    def convolved(name: str, x: Tensor, stride: int = 1, groups: int = 1) -> Tensor:
        weight = tensors[f"{name}.weight"]
        total = max(weight.shape[-1] - stride, 0)  # of the padding of each side, for H and W divisible by the stride
        if total % 2:
            x = F.pad(x, (0, 1, 0, 1))
        return F.conv2d(x, weight, tensors[f"{name}.bias"], stride, total // 2, groups=groups)

    x = F.relu6(convolved("stem", (resized(x, SIZE) - 127) / 128, 2))
    for number, block in enumerate(BLOCKS):
        name = f"blocks.{number}"
        h = F.relu6(convolved(f"{name}.expand", x)) if block.hidden > block.before else x
        h = F.relu6(convolved(f"{name}.depthwise", h, block.stride, block.hidden))
        h = convolved(f"{name}.project", h)
        x = x + h if block.stride == 1 and block.before == block.after else h
    features = F.relu6(convolved("head", x)).mean((2, 3))
    return features, F.linear(features, tensors["classes.weight"], tensors["classes.bias"])


NET = Net(
    "FD (EfficientNet-Lite0)",
    HEAD,
    {"layer": "mean of the last feature map", "resize": resizing(SIZE), "range": "(x − 127) / 128"},
    shapes(),
    own,
    run,
    CLASSES,
)
