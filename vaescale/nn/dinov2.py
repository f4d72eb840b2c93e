"""The vision transformer ViT-L/14 of DINOv2: Oquab et al. 2023, "DINOv2: learning robust visual features without
supervision". Stein et al. 2023, "Exposing flaws of generative model evaluation metrics and their unfair treatment of
diffusion models", take distances between its features.

Names of weights are those of the published file."""

from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .frozen import Net, Tensors, resized, resizing

SIZE, PATCH = 224, 14
SIDE = SIZE // PATCH  # patches per side
PUBLISHED_SIDE = 37  # of the published positions, for 518 pixels
EPSILON = 1e-6  # of the layer norms
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels in [0, 1]


def shapes(width: int, depth: int) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 1 + SIDE**2, width),
        "patch_embed.proj.weight": (width, 3, PATCH, PATCH),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    for block in (f"blocks.{number}" for number in range(depth)):
        for name, after, before in (
            ("attn.qkv", 3 * width, width),
            ("attn.proj", width, width),
            ("mlp.fc1", 4 * width, width),
            ("mlp.fc2", width, 4 * width),
        ):
            found |= {f"{block}.{name}.weight": (after, before), f"{block}.{name}.bias": (after,)}
        for part in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "ls1.gamma", "ls2.gamma"):
            found[f"{block}.{part}"] = (width,)
    return found


def own(names: dict[str, tuple[int, ...]], state: Tensors) -> Tensors:
    """The positions become those of SIDE × SIDE patches. As the authors do, this takes a scale of (SIDE + 0.1) /
    PUBLISHED_SIDE, not of SIDE / PUBLISHED_SIDE. The first layer then reads pixels in [0, 1]: (x − MEAN) / STD becomes
    part of it."""
    tensors = {name: state[name] for name in names}
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (MEAN, STD))
    weight = tensors["patch_embed.proj.weight"] / std
    bias = tensors["patch_embed.proj.bias"] - (weight * mean).sum((1, 2, 3))
    tensors |= {"patch_embed.proj.weight": weight.float(), "patch_embed.proj.bias": bias.float()}
    first, others = tensors["pos_embed"].split([1, tensors["pos_embed"].shape[1] - 1], dim=1)
    grid = rearrange(others, "1 (h w) d -> 1 d h w", h=PUBLISHED_SIDE)
    grid = F.interpolate(grid, scale_factor=(SIDE + 0.1) / PUBLISHED_SIDE, mode="bicubic")
    return tensors | {"pos_embed": torch.cat([first, rearrange(grid, "1 d h w -> 1 (h w) d")], dim=1)}


def run(heads: int, depth: int, tensors: Tensors, x: Tensor) -> tuple[Tensor, None]:
    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"])

    def normed(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], tensors[f"{name}.weight"], tensors[f"{name}.bias"], EPSILON)

    weight, bias = (tensors[f"patch_embed.proj.{part}"] for part in ("weight", "bias"))
    x = F.conv2d(resized(x, SIZE) / 255, weight, bias, PATCH)
    x = rearrange(x, "b d h w -> b (h w) d")
    x = torch.cat([tensors["cls_token"].expand(len(x), -1, -1), x], dim=1) + tensors["pos_embed"]
    for block in (f"blocks.{number}" for number in range(depth)):
        h = linear(f"{block}.attn.qkv", normed(f"{block}.norm1", x))
        q, k, v = rearrange(h, "b n (three h d) -> three b h n d", three=3, h=heads)
        h = rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)")
        x = x + tensors[f"{block}.ls1.gamma"] * linear(f"{block}.attn.proj", h)
        h = F.gelu(linear(f"{block}.mlp.fc1", normed(f"{block}.norm2", x)))
        x = x + tensors[f"{block}.ls2.gamma"] * linear(f"{block}.mlp.fc2", h)
    return normed("norm", x[:, 0]), None


def vit(width: int, depth: int, heads: int) -> Net:
    protocol = {
        "layer": "class token after the last layer norm",
        "resize": resizing(SIZE),
        "range": "x in [0, 1], minus the mean of ImageNet, divided by its deviation",
    }
    names = shapes(width, depth)
    return Net("FD (DINOv2 ViT-L/14)", width, protocol, names, partial(own, names), partial(run, heads, depth))


NET = vit(1024, 24, 16)
