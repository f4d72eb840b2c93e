import math

import pytest
import torch
from torch import Tensor, nn

from tests.nn.test_features import SOURCE, images
from vaescale.nn import dinov2, features
from vaescale.nn.dinov2 import PUBLISHED_SIDE, SIDE, vit
from vaescale.nn.features import Features
from vaescale.nn.frozen import random_weights, resized

pytestmark = pytest.mark.unit


class Reference(nn.Module):
    """The published network in torch's own layers."""

    def __init__(self, state: dict[str, Tensor], width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.state = state
        self.patches = nn.Conv2d(3, width, 14, 14)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm1": nn.LayerNorm(width, 1e-6),
                    "attention": nn.MultiheadAttention(width, heads, batch_first=True),
                    "norm2": nn.LayerNorm(width, 1e-6),
                    "mlp": nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)),
                }
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width, 1e-6)
        names = {
            "patch_embed.proj": "patches",
            "attn.qkv.": "attention.in_proj_",
            "attn.proj": "attention.out_proj",
            "mlp.fc1": "mlp.0",
            "mlp.fc2": "mlp.2",
        }
        own = {}
        for name, tensor in state.items():
            if name.endswith(("gamma", "token", "pos_embed")):
                continue
            for published, ours in names.items():
                name = name.replace(published, ours)
            own[name] = tensor
        self.load_state_dict(own)

    def forward(self, x: Tensor) -> Tensor:
        """x: float64 [B, 3, 224, 224] in [0, 1]."""
        mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], dtype=x.dtype)[..., None, None]
        x = self.patches((x - mean) / std).flatten(2).transpose(1, 2)
        positions = self.state["pos_embed"]
        side = math.isqrt(positions.shape[1] - 1)
        grid = positions[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
        grid = nn.functional.interpolate(grid, scale_factor=(16.1 / 37, 16.1 / 37), mode="bicubic")
        first = self.state["cls_token"] + positions[:, :1]
        x = torch.cat([first.expand(len(x), -1, -1), x + grid.permute(0, 2, 3, 1).reshape(1, 256, -1)], 1)
        for number, block in enumerate(self.blocks):
            h = block["norm1"](x)
            x = x + self.state[f"blocks.{number}.ls1.gamma"] * block["attention"](h, h, h, need_weights=False)[0]
            x = x + self.state[f"blocks.{number}.ls2.gamma"] * block["mlp"](block["norm2"](x))
        return self.norm(x)[:, 0]


def published(width: int, depth: int) -> dict[str, Tensor]:
    """Random weights in the format of the published file, whose positions are those of 518 pixels."""
    names = {**dinov2.shapes(width, depth), "pos_embed": (1, 1 + PUBLISHED_SIDE**2, width), "mask_token": (1, width)}
    state = random_weights(names, 0)
    generator = torch.Generator().manual_seed(1)
    for name in ("cls_token", "pos_embed"):  # large enough to matter
        state[name] = torch.randn(names[name], generator=generator)
    return state


def test_it_is_the_published_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a small one."""
    net = vit(64, 3, 4)
    monkeypatch.setitem(features.NETS, "dinov2", net)
    state = published(64, 3)
    x = images(3, 100, 120)
    reference = Reference({name: tensor.double() for name, tensor in state.items()}, 64, 3, 4).double()
    with torch.no_grad():
        expected = reference(resized(x.float(), 224).double() / 255)
    found, logits = Features("dinov2", net.own(state), SOURCE, net.words)(x)
    assert logits is None
    assert expected.std(0).mean() > 0.01  # the images differ
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


def test_the_shapes_are_those_of_vit_l() -> None:
    """304,368,640 parameters are published, with positions for 518 pixels and a token for masks, which is not used."""
    shapes = dinov2.NET.shapes
    count = sum(math.prod(shape) for shape in shapes.values())
    assert count + 1024 * (PUBLISHED_SIDE**2 - SIDE**2) + 1024 == 304_368_640
    assert shapes["blocks.23.mlp.fc1.weight"] == (4096, 1024)
    assert dinov2.NET.dim == 1024
