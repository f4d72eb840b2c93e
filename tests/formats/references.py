"""The tokenizers of taming-transformers, latent diffusion and LlamaGen, from their published lists of layers: the same
blocks under other names. And our models, made from the settings and weights that a conversion returns."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

from vaescale import settings
from vaescale.config import to_yaml
from vaescale.interfaces import Batch, Codec, Model


class Names(NamedTuple):
    down: str  # the list of the encoder's resolutions, from the image on
    up: str  # the list of the decoder's
    up_from_image: bool  # whether the decoder's list begins at the image, too
    residual: str
    middle: tuple[str, str, str]


TAMING = Names("down", "up", True, "block", ("block_1", "attn_1", "block_2"))
LLAMAGEN = Names("conv_blocks", "conv_blocks", False, "res", ("0", "1", "2"))


class Residual(nn.Module):
    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(32, channels, 1e-6), nn.GroupNorm(32, out, 1e-6)
        self.conv1, self.conv2 = nn.Conv2d(channels, out, 3, padding=1), nn.Conv2d(out, out, 3, padding=1)
        if channels != out:
            self.nin_shortcut = nn.Conv2d(channels, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(swish(self.norm2(self.conv1(swish(self.norm1(x))))))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class Attention(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(32, channels, 1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(self.norm(x)).flatten(2) for part in (self.q, self.k, self.v))
        weights = (torch.einsum("bci,bcj->bij", q, k) / q.shape[1] ** 0.5).softmax(-1)
        return x + self.proj_out(torch.einsum("bij,bcj->bci", weights, v).view_as(x))


class Resample(nn.Module):
    def __init__(self, channels: int, down: bool) -> None:
        super().__init__()
        self.down = down
        self.conv = nn.Conv2d(channels, channels, 3, stride=2 if down else 1, padding=0 if down else 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.down else x.repeat_interleave(2, 2).repeat_interleave(2, 3))


class Stage(nn.Module):
    """One resolution."""

    def __init__(self, names: Names, widths: Sequence[int], attention: bool, resample: str) -> None:
        """widths: of the input and of each block's output."""
        super().__init__()
        residuals = [Residual(before, after) for before, after in pairwise(widths)]
        self.names, self.resample = names, resample
        self.add_module(names.residual, nn.ModuleList(residuals))
        self.attn = nn.ModuleList([Attention(widths[-1]) for _ in residuals] if attention else [])
        if resample:
            self.add_module(resample, Resample(widths[-1], resample == "downsample"))

    def forward(self, x: Tensor) -> Tensor:
        for number, residual in enumerate(getattr(self, self.names.residual)):
            x = residual(x)
            x = self.attn[number](x) if len(self.attn) else x
        return getattr(self, self.resample)(x) if self.resample else x


class Encoder(nn.Module):
    def __init__(self, names: Names, ch: int, mult: Sequence[int], blocks: int, attention: Sequence[int], **io: int):
        """attention: numbers of the resolutions with attention; io: channels of the input and the output."""
        super().__init__()
        self.names = names
        self.conv_in = nn.Conv2d(io["channels"], ch, 3, padding=1)
        stages, before = [], ch
        for level, width in enumerate(ch * one for one in mult):
            resample = "downsample" if level < len(mult) - 1 else ""
            stages.append(Stage(names, [before] + [width] * blocks, level in attention, resample))
            before = width
        self.add_module(names.down, nn.ModuleList(stages))
        self.mid = middle(names, before)
        self.norm_out = nn.GroupNorm(32, before, 1e-6)
        self.conv_out = nn.Conv2d(before, io["out"], 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for stage in [*getattr(self, self.names.down), *self.mid.children()]:
            h = stage(h)
        return self.conv_out(swish(self.norm_out(h)))


class Decoder(nn.Module):
    def __init__(self, names: Names, ch: int, mult: Sequence[int], blocks: int, attention: Sequence[int], **io: int):
        super().__init__()
        self.names = names
        before = ch * mult[-1]
        self.conv_in = nn.Conv2d(io["channels"], before, 3, padding=1)
        self.mid = middle(names, before)
        stages = []
        for level, width in reversed(list(enumerate(ch * one for one in mult))):
            resample = "upsample" if level else ""
            stages.append(Stage(names, [before] + [width] * (blocks + 1), level in attention, resample))
            before = width
        self.add_module(names.up, nn.ModuleList(reversed(stages) if names.up_from_image else stages))
        self.norm_out = nn.GroupNorm(32, before, 1e-6)
        self.conv_out = nn.Conv2d(before, io["out"], 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        stages = list(getattr(self, self.names.up))
        h = self.conv_in(z)
        for stage in [*self.mid.children(), *(reversed(stages) if self.names.up_from_image else stages)]:
            h = stage(h)
        return self.conv_out(swish(self.norm_out(h)))


class Tokenizer(nn.Module):
    """Images lie in [−1, 1]. codes=0: a KL autoencoder, whose `z` are the means and log-variances of its latents."""

    def __init__(self, names: Names, net: tuple[int, Sequence[int], int, Sequence[int]], z: int, dim: int, codes: int):
        """net: channels, multipliers, blocks, numbers of the resolutions with attention."""
        super().__init__()
        twice = 1 if codes else 2
        self.encoder, self.decoder = (
            Encoder(names, *net, channels=3, out=twice * z),
            Decoder(names, *net, channels=z, out=3),
        )
        self.quant_conv, self.post_quant_conv = nn.Conv2d(twice * z, twice * dim, 1), nn.Conv2d(dim, z, 1)
        self.unit = names is LLAMAGEN
        if codes:
            self.quantize = nn.Module()
            self.quantize.embedding = nn.Embedding(codes, dim)
            if self.unit:
                self.quantize.register_buffer("codebook_used", torch.zeros(65536))
        self.eval().requires_grad_(False)

    def z(self, x: Tensor) -> Tensor:
        return self.quant_conv(self.encoder(x))

    def codes(self, x: Tensor) -> Tensor:
        """int64 [B, h, w]."""
        z, embedding = self.z(x).movedim(1, -1), self.codebook()
        z = F.normalize(z, dim=-1) if self.unit else z
        return (z[..., None, :] - embedding).square().sum(-1).argmin(-1)

    def codebook(self) -> Tensor:
        weight = self.quantize.embedding.weight
        return F.normalize(weight, dim=-1) if self.unit else weight

    def images(self, z: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(z))


def middle(names: Names, channels: int) -> nn.Module:
    blocks = Residual(channels, channels), Attention(channels), Residual(channels, channels)
    found = nn.Module()
    for name, block in zip(names.middle, blocks, strict=True):
        found.add_module(name, block)
    return found


def swish(x: Tensor) -> Tensor:
    return x * x.sigmoid()


def perturb(module: nn.Module, seed: int = 0) -> None:
    """Moves all weights away from where they are initialised, norms and biases too, as training does."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in module.parameters():
        tensor.data += 0.05 * torch.randn(tensor.shape, generator=generator)


def model_of(section: Mapping[str, Any], folder: Path, size: int = 32) -> tuple[settings.Config, Model]:
    """Returns the settings and the model that a `model` section of a config file makes."""
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump({"model": section, "data": {"size": size}, "version": settings.VERSION}))
    config = settings.load(file, [])
    assert to_yaml(config)
    return config, settings.build(config).eval().requires_grad_(False)


def images(count: int, height: int, width: int) -> Batch:
    """Smooth random images, uint8 [B, 3, H, W]."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(count, 3, 5, 5, generator=generator)
    x = (255 * F.interpolate(coarse, (height, width), mode="bilinear")).round().to(torch.uint8)
    return Batch(x, torch.zeros(count, dtype=torch.int64), torch.zeros(count, 0), torch.arange(count))


def put(model: Model, weights: Mapping[str, Tensor]) -> Codec:
    """Loads weights into a model, all of whose other tensors are statistics."""
    state = model.state_dict()
    assert weights.keys() <= state.keys()
    left = [name for name in state if name not in weights]
    assert not [name for name in left if name.split(".")[-1] in ("weight", "bias", "codebook")], left
    model.load_state_dict({**state, **weights})
    assert isinstance(model, Codec)
    return model
