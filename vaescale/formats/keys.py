"""What other libraries call the layers of the networks of nn/vqgan.py.

The three columns of each table belong to diffusers (`VQModel`, `AutoencoderKL`), to taming-transformers and latent
diffusion, whose networks have the same names, and to LlamaGen. Each is used in both directions.

The values of the weights are the same everywhere. Only the projections of an attention, which are linear layers here
and in diffusers, are 1×1 convolutions elsewhere: [C, C] here, [C, C, 1, 1] there.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..config import ConfigError
from ..files import printable
from ..nn import vqgan

Library = Literal["diffusers", "taming", "llamagen"]
COLUMNS: tuple[Library, ...] = ("diffusers", "taming", "llamagen")
NAMED = 3  # tensors that an error names
CODEBOOK = "quantize.embedding.weight"  # in all libraries: [K, D]

# fmt: off
ENDS = {  # ours         diffusers                taming                LlamaGen
    "encoder.first":   ("encoder.conv_in",       "encoder.conv_in",    "encoder.conv_in"),
    "encoder.norm":    ("encoder.conv_norm_out", "encoder.norm_out",   "encoder.norm_out"),
    "encoder.last":    ("encoder.conv_out",      "encoder.conv_out",   "encoder.conv_out"),
    "encoder.project": ("quant_conv",            "quant_conv",         "quant_conv"),
    "decoder.project": ("post_quant_conv",       "post_quant_conv",    "post_quant_conv"),
    "decoder.first":   ("decoder.conv_in",       "decoder.conv_in",    "decoder.conv_in"),
    "decoder.norm":    ("decoder.conv_norm_out", "decoder.norm_out",   "decoder.norm_out"),
    "decoder.last":    ("decoder.conv_out",      "decoder.conv_out",   "decoder.conv_out"),
}
# Blocks: encoder.blocks.N and decoder.blocks.N here; there, these names after "encoder." or "decoder.". {b} is the
# block's number at its resolution, {r} the resolution's number from the image on, {u} from the latents on: of three
# resolutions, the full one is {r} = 0 and {u} = 2.
BLOCKS = {  #            diffusers                          taming                 LlamaGen
    "encoder.residual":  ("down_blocks.{r}.resnets.{b}",    "down.{r}.block.{b}",  "conv_blocks.{r}.res.{b}"),
    "encoder.attention": ("down_blocks.{r}.attentions.{b}", "down.{r}.attn.{b}",   "conv_blocks.{r}.attn.{b}"),
    "encoder.resample":  ("down_blocks.{r}.downsamplers.0", "down.{r}.downsample", "conv_blocks.{r}.downsample"),
    "encoder.middle.0":  ("mid_block.resnets.0",            "mid.block_1",         "mid.0"),
    "encoder.middle.1":  ("mid_block.attentions.0",         "mid.attn_1",          "mid.1"),
    "encoder.middle.2":  ("mid_block.resnets.1",            "mid.block_2",         "mid.2"),
    "decoder.middle.0":  ("mid_block.resnets.0",            "mid.block_1",         "mid.0"),
    "decoder.middle.1":  ("mid_block.attentions.0",         "mid.attn_1",          "mid.1"),
    "decoder.middle.2":  ("mid_block.resnets.1",            "mid.block_2",         "mid.2"),
    "decoder.residual":  ("up_blocks.{u}.resnets.{b}",      "up.{r}.block.{b}",    "conv_blocks.{u}.res.{b}"),
    "decoder.attention": ("up_blocks.{u}.attentions.{b}",   "up.{r}.attn.{b}",     "conv_blocks.{u}.attn.{b}"),
    "decoder.resample":  ("up_blocks.{u}.upsamplers.0",     "up.{r}.upsample",     "conv_blocks.{u}.upsample"),
}
PARTS = {  # of a block
    "norm1":    ("norm1",         "norm1",        "norm1"),
    "conv1":    ("conv1",         "conv1",        "conv1"),
    "norm2":    ("norm2",         "norm2",        "norm2"),
    "conv2":    ("conv2",         "conv2",        "conv2"),
    "shortcut": ("conv_shortcut", "nin_shortcut", "nin_shortcut"),
    "norm":     ("group_norm",    "norm",         "norm"),
    "q":        ("to_q",          "q",            "q"),
    "k":        ("to_k",          "k",            "k"),
    "v":        ("to_v",          "v",            "v"),
    "out":      ("to_out.0",      "proj_out",     "proj_out"),
    "conv":     ("conv",          "conv",         "conv"),
}
# fmt: on
MIDDLE = ("middle.0", "middle.1", "middle.2")


@dataclass(frozen=True)
class Net:
    """All that decides the names and shapes of the weights."""

    network: vqgan.Config
    channels: int  # C of the images
    dim: int  # D, channels of a code or of a latent
    codes: int = 0  # K of the codebook; 0: a KL autoencoder, which has none


class Row(NamedTuple):
    """One tensor."""

    ours: str
    theirs: str
    shape: tuple[int, ...]
    their_shape: tuple[int, ...]


def rows(net: Net, library: Library) -> list[Row]:
    """Returns one row for each tensor of a network: `encoder.…`, `decoder.…` and `quantizer.codebook` of a VQ-VAE, or
    `net.encoder.…` and `net.decoder.…` of a KL autoencoder. Raises ConfigError for settings that no network has."""
    column = COLUMNS.index(library)
    prefix = "" if net.codes else "net."
    found = []
    for side, module in _modules(net).items():
        places = [
            f"{side}.{BLOCKS[f'{side}.{block}'][column].format(**numbers)}"
            for block, numbers in _blocks(net.network, side)
        ]
        for name, tensor in module.state_dict().items():
            layer, _, end = name.rpartition(".")
            theirs = _their_layer(side, layer, places, column)
            shape = tuple(tensor.shape)
            linear = len(shape) == 2 and library != "diffusers"
            row = Row(f"{prefix}{side}.{name}", f"{theirs}.{end}", shape, (*shape, 1, 1) if linear else shape)
            found.append(row)
    if net.codes:
        found.append(Row("quantizer.codebook", CODEBOOK, (net.codes, net.dim), (net.codes, net.dim)))
    return found


def to_theirs(tensors: Mapping[str, Tensor], rows: Sequence[Row]) -> dict[str, Tensor]:
    """Renames and reshapes our tensors, each of which must be in one row. Raises ConfigError, which names those that
    are missing, have no row, or have another shape."""
    return _renamed(tensors, {row.ours: (row.shape, row.theirs, row.their_shape) for row in rows}, "there")


def to_ours(tensors: Mapping[str, Tensor], rows: Sequence[Row]) -> dict[str, Tensor]:
    """As `to_theirs`, in the other direction. Raises ConfigError for values that are no weights, too."""
    for row in rows:
        if row.theirs in tensors and (wrong := _wrong(tensors[row.theirs])):
            raise ConfigError(f"{row.theirs} {wrong}: give weights that are finite floats, in dense tensors")
    return _renamed(tensors, {row.theirs: (row.their_shape, row.ours, row.shape) for row in rows}, "here")


def _wrong(tensor: Tensor) -> str:
    """Returns a clause if the tensor has no values of weights, else ""."""
    if tensor.is_meta:
        return "has no values (it is on the device meta)"
    if tensor.is_quantized or tensor.layout != torch.strided:
        return "is quantised" if tensor.is_quantized else f"is sparse ({tensor.layout})"
    if not tensor.is_floating_point():
        return f"is of type {str(tensor.dtype).removeprefix('torch.')}"
    return "" if tensor.isfinite().all() else "has values that are not finite in fp32"


def inferred(tensors: Mapping[str, Tensor], library: Library) -> Net:
    """Reads the settings of a network from the names and shapes of its weights. Looks at a few of them; `to_ours`
    compares all. Raises ConfigError if they are not those of such a network."""
    column = COLUMNS.index(library)
    ends = {ours: theirs[column] for ours, theirs in ENDS.items()}
    residual, attention = (f"encoder.{BLOCKS[f'encoder.{block}'][column]}" for block in ("residual", "attention"))
    conv1, q = (f"{{}}.{PARTS[part][column]}.weight" for part in ("conv1", "q"))

    def size(name: str, axis: int) -> int:
        """Returns a dimension of the weight of a convolution."""
        if name not in tensors or tensors[name].ndim != 4 or not all(tensors[name].shape):
            problem = f"is {_size(tensors[name].shape)}" if name in tensors else "is missing"
            raise ConfigError(f"these are not weights of such a network of {library}: the convolution {name} {problem}")
        return tensors[name].shape[axis]

    levels, blocks = 0, 0
    while conv1.format(residual.format(r=levels, b=0)) in tensors:
        levels += 1
    while conv1.format(residual.format(r=0, b=blocks)) in tensors:
        blocks += 1
    channels, images = (size(f"{ends['encoder.first']}.weight", axis) for axis in (0, 1))
    widths = [size(conv1.format(residual.format(r=level, b=0)), 0) for level in range(levels)]
    if not widths or any(width % channels for width in widths):
        raise ConfigError(
            f"the resolutions of the network have {widths} channels: model.network.channels is the {channels} of "
            f"{ends['encoder.first']}, of which they must be multiples"
        )
    z, dim = size(f"{ends['decoder.first']}.weight", 1), size(f"{ends['decoder.project']}.weight", 1)
    codes = len(tensors[CODEBOOK]) if CODEBOOK in tensors else 0
    if not codes and z != dim:
        raise ConfigError(
            f"{ends['decoder.project']} maps {dim} channels to {z}, but in model.kind=kl both are model.latent_dim"
        )
    attends = [2**level for level in range(levels) if q.format(attention.format(r=level, b=0)) in tensors]
    multipliers = [width // channels for width in widths]
    return Net(vqgan.Config("vqgan", channels, multipliers, blocks, attends, 0 if z == dim else z), images, dim, codes)


def _modules(net: Net) -> dict[str, torch.nn.Module]:
    try:
        with torch.device("meta"):  # without memory or time for values
            return {
                "encoder": vqgan.Encoder(net.network, net.channels, net.dim if net.codes else 2 * net.dim, False),
                "decoder": vqgan.Decoder(net.network, net.dim, net.channels, False),
            }
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _blocks(network: vqgan.Config, side: str) -> Iterator[tuple[str, dict[str, int]]]:
    """Yields the blocks of the encoder or the decoder in our order, each with its numbers."""
    down, count = side == "encoder", len(network.multipliers)
    if not down:
        yield from ((block, {}) for block in MIDDLE)
    for level in range(count) if down else reversed(range(count)):
        if down and level:
            yield "resample", {"r": level - 1}
        numbers = {"r": level, "u": count - 1 - level}
        for block in range(network.blocks if down else network.blocks + 1):
            yield "residual", {**numbers, "b": block}
            if 2**level in network.attention:
                yield "attention", {**numbers, "b": block}
        if not down and level:
            yield "resample", numbers
    if down:
        yield from ((block, {}) for block in MIDDLE)


def _their_layer(side: str, layer: str, places: Sequence[str], column: int) -> str:
    """Their name of our layer, as in "first" or "blocks.3.conv1"."""
    if f"{side}.{layer}" in ENDS:
        return ENDS[f"{side}.{layer}"][column]
    _, number, part = layer.split(".")
    return f"{places[int(number)]}.{PARTS[part][column]}"


def _renamed(
    tensors: Mapping[str, Tensor], wanted: Mapping[str, tuple[tuple[int, ...], str, tuple[int, ...]]], where: str
) -> dict[str, Tensor]:
    """wanted: name → (shape, new name, new shape)."""
    wrong = [f"{name} ({new} {where}) is missing" for name, (_, new, _) in wanted.items() if name not in tensors]
    wrong += [f"{printable(name, 80)} has no counterpart {where}" for name in tensors if name not in wanted]
    wrong += [
        f"{name} ({wanted[name][1]} {where}) is {_size(tensor.shape)} instead of {_size(wanted[name][0])}"
        for name, tensor in tensors.items()
        if name in wanted and tuple(tensor.shape) != wanted[name][0]
    ]
    if wrong:
        more = f" and {len(wrong) - NAMED} more" if len(wrong) > NAMED else ""
        raise ConfigError(f"the weights do not fit: {', '.join(wrong[:NAMED])}{more}; give all weights of one network")
    return {new: tensors[name].reshape(shape) for name, (_, new, shape) in wanted.items()}


def _size(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape)) or "a number"
