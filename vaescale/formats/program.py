"""Encoder and decoder as programs that run without vaescale: of torch.export, or in ONNX.

    images fp32 [B, C, H, W] in [0, 1] → encoder → latents, coarse to fine → decoder → images

B may be any number; H and W are data.size. Latents are those of `Codec.encode`: int64 codes, or the means of q(z|x).
"""

import json
import logging
import warnings
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from .. import settings, trained
from ..config import ConfigError
from ..interfaces import Batch, Codebooks, Codec, Diffused, Model, Prior
from ..lifecycle import checkpoint
from . import write
from .metadata import metadata

Library = Literal["onnx", "torch"]
ABOUT = "metadata.json"
NAMES = frozenset(
    [ABOUT, *(f"{part}.{end}" for part in ("encoder", "decoder") for end in ("pt2", "onnx", "onnx.data"))]
)


class Encoder(nn.Module):
    """Images → latents. Pixels are rounded to 8 bits, as those of all images that vaescale reads."""

    def __init__(self, codec: Codec) -> None:
        super().__init__()
        self.codec = codec

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        x = (images * 255).round()
        nothing = torch.full((x.shape[0],), -1, dtype=torch.int64, device=x.device)
        return tuple(self.codec.encode(Batch(x, nothing, x.new_zeros(x.shape[0], 0), nothing)))


class Decoder(nn.Module):
    """Latents of all levels → images, clamped to [0, 1]."""

    def __init__(self, codec: Codec) -> None:
        super().__init__()
        self.codec = codec

    def forward(self, *latents: Tensor) -> Tensor:
        return self.codec.decode(list(latents), temperature=0.0).clamp(0, 1)


def export_program(run: Path, out: Path, library: Library) -> list[Path]:
    """Writes a folder with the encoder and the decoder of a run. run: a run directory or a checkpoint. Returns the
    files. Raises ConfigError, CheckpointError, OSError."""
    if library == "onnx":
        _require_onnx()
    out = out.resolve()
    write.require_free(out, ABOUT, NAMES)
    place = checkpoint.agreed(run).path or run
    config = trained.read_config(place, [])
    model, _ = trained.read_model(place, config, torch.device("cpu"))
    codec = _exportable(model, config)
    about = metadata(place, place, config, library)
    encoder, decoder, names = programs(codec, settings.blank(config, 2).x / 255)
    with write.folder(out) as partial:
        for part, program in {"encoder": encoder, "decoder": decoder}.items():
            ends = (["images"], names) if part == "encoder" else (names, ["images"])
            if library == "onnx":
                write_onnx(program, partial / f"{part}.onnx", *ends, about)
            else:
                torch.export.save(program, partial / f"{part}.pt2", extra_files={ABOUT: json.dumps(about)})
        (partial / ABOUT).write_text(json.dumps(about, indent=1) + "\n")
    return sorted(out.iterdir())


@torch.no_grad()
def programs(codec: Codec, images: Tensor) -> tuple[ExportedProgram, ExportedProgram, list[str]]:
    """Returns the encoder, the decoder and the names of the latents. images: two of the right size."""
    encoder, decoder = Encoder(codec), Decoder(codec)
    latents = encoder(images)
    name = "codes" if isinstance(codec, Codebooks) else "latents"
    names = [f"{name}{level}" for level in range(len(latents))] if len(latents) > 1 else [name]
    batch = {0: Dim("batch")}
    # strict: `len` of a tensor is then no constant
    first = torch.export.export(encoder, (images,), dynamic_shapes=(batch,), strict=True)
    second = torch.export.export(decoder, latents, dynamic_shapes=((batch,) * len(latents),), strict=True)
    return first, second, names


def _exportable(model: Model, config: settings.Config) -> Codec:
    """Returns the model as a codec. Raises ConfigError if it needs more than images and latents."""
    if isinstance(model, Prior | Diffused):
        base = settings.base_run(config)
        instead = f": export the codec that it is built on, {base}" if base else ""
        raise ConfigError(f"model.kind={config.model.kind} has no encoder and decoder of its own{instead}")
    classes = getattr(config.model, "classes", 0)
    if classes or config.data.attributes:
        given = f"model.classes={classes}" if classes else f"data.attributes={','.join(config.data.attributes)}"
        raise ConfigError(f"{given}: exported programs take images and latents, but no condition")
    return cast(Codec, model)


def _require_onnx() -> None:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"ONNX needs {error.name}: pip install 'vaescale[onnx]'") from None


def write_onnx(
    program: ExportedProgram, path: Path, inputs: list[str], outputs: list[str], about: dict[str, str]
) -> None:
    """Writes a program with these names of its inputs and outputs. about: metadata."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it says that torchvision is not there
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of its own code
        export: Any = torch.onnx.export  # its types do not know programs
        found = export(program, input_names=inputs, output_names=outputs, dynamo=True, verbose=False)
    found.rename_axes({found.model.graph.inputs[0].shape[0]: "batch"})
    found.model.metadata_props.update(about)
    found.save(path)
