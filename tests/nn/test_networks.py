"""What holds for every pair of networks between images and feature maps."""

from typing import Any

import pytest
import torch
from torch import nn

from vaescale.nn import conv, networks, vit, vqgan
from vaescale.nn.networks import NETWORKS

SMALL: dict[str, Any] = {
    "conv": conv.Config(width=16, residual_width=8, downsample_factor=8),
    "vqgan": vqgan.Config(channels=32, multipliers=[1, 1, 2, 1], blocks=1, attention=[4, 8]),
    "vit": vit.Config(width=32, depth=2, heads=2, head_channels=4),
}
FINE: dict[str, Any] = {
    "conv": conv.Config(width=32, residual_width=16, downsample_factor=2),
    "vqgan": vqgan.Config(channels=32, multipliers=[1, 1], blocks=1, attention=[]),
}


@pytest.fixture(params=NETWORKS)
def config(request: pytest.FixtureRequest) -> Any:
    return SMALL[request.param]


def pair(config: Any, checkpointing: bool = False, channels: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    encoder = networks.encoder(config, channels, 6, checkpointing)
    return nn.Sequential(encoder, networks.decoder(config, 6, 5, checkpointing))


@pytest.mark.parametrize("channels", [1, 3])
def test_shapes(config: Any, channels: int) -> None:
    """Also of images that are not square."""
    encoder, decoder = pair(config, channels=channels)
    z = encoder(torch.rand(2, channels, 96, 160) - 0.5)
    assert encoder.factor == decoder.factor == 8
    assert z.shape == (2, 6, 12, 20)
    assert decoder(z).shape == (2, 5, 96, 160)


def test_the_last_layer_computes_the_output(config: Any) -> None:
    _, decoder = pair(config)
    assert isinstance(decoder.last, nn.Conv2d | nn.ConvTranspose2d)
    z = torch.randn(2, 6, 2, 2)
    nn.init.zeros_(decoder.last.weight)
    nn.init.constant_(decoder.last.bias, 2.0)
    assert decoder(z).unique().numel() == 1
    assert decoder(z).unique() > 0


def test_checkpointing_changes_no_gradient(config: Any) -> None:
    plain, checkpointed = pair(config), pair(config, checkpointing=True)
    x = torch.rand(2, 3, 16, 24) - 0.5
    stored = []
    for net in (plain, checkpointed):
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: (kept.append(t.numel()), t)[1], lambda t: t):
            loss = net(x).square().mean()
        loss.backward()
        stored.append(sum(kept))
    for (name, one), other in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        assert one.grad is not None
        assert one.grad.abs().sum() > 0, name
        assert torch.equal(one.grad, other.grad), name
    assert stored[1] < stored[0]


def test_evaluation_recomputes_nothing(config: Any) -> None:
    net = pair(config, checkpointing=True)
    calls: list[None] = []
    for part in net.modules():
        if not list(part.children()):
            part.register_forward_hook(lambda *given: calls.append(None))
    counts = []
    for training in (True, False):
        net.train(training)
        calls.clear()
        net(torch.rand(2, 3, 16, 16) - 0.5).sum().backward()
        counts.append(len(calls))
    assert counts[1] < counts[0]


@pytest.mark.parametrize("kind", FINE)
def test_it_learns_and_serves_larger_images(kind: str) -> None:
    """Trained at 64 px, it reconstructs images of 96 × 160 as well."""
    torch.manual_seed(0)
    net = pair(FINE[kind])
    adam = torch.optim.Adam(net.parameters(), 3e-3)
    draw = torch.Generator().manual_seed(0)
    for _ in range(40):
        x = smooth(64, 64, draw)
        loss = (net(x)[:, :3] - x).square().mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
    net.eval()
    with torch.no_grad():
        images = [smooth(64, 64, draw), smooth(96, 160, draw)]
        seen, larger = [(net(x)[:, :3] - x).square().mean() / x.var() for x in images]
    assert larger < 0.6
    assert larger < 1.2 * seen


def smooth(height: int, width: int, draw: torch.Generator) -> torch.Tensor:
    coarse = torch.rand(2, 3, height // 8, width // 8, generator=draw) - 0.5
    return nn.functional.interpolate(coarse, scale_factor=8, mode="bilinear")
