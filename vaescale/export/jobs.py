"""The two exports: the codes of images, and the images of codes."""

import io
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .. import settings
from ..config import ConfigError
from ..data import DataError, codes
from ..data.codes import Codes, Header
from ..data.reader import Reader
from ..data.stream import SPLITS
from ..interfaces import Batch, Codebooks, Codec
from ..monitoring.pictures import to_bytes
from ..nn.frozen import latents_hash, weights_hash
from ..numerics import exact, repeatable
from .parts import Parts, Views, centre, draws, ten
from .write import AT_ONCE, Job

PNG = "png"


def of_codes(
    codec: Any,
    run: Path,
    config: settings.Config,
    split: str,
    crops: str,
    out: Path,
    per_shard: int,
    device: torch.device,
) -> Job:
    """Returns the job that encodes one split of the data of `config` into `out`. Validation images are encoded as
    validation sees them, whatever `crops` is. Raises ConfigError if the model has no codes, and DataError."""
    slices = SPLITS[split](config.data)
    source = slices.samples.index
    if source.codes:
        raise DataError(f"{source.folder} already holds codes: give data.root=… of images")
    rule = crops if split == "train" else "center"
    views = codes.views_of(rule)
    header = Header(latents_hash(codec), *_sizes(codec, run, config, device), rule, views, source.fingerprint())
    plan = {"exported": "codes", **header._asdict(), "attributes": source.attribute_names, "per_shard": per_shard}
    plan |= {"data.size": config.data.size, "data.channels": config.data.channels}
    if rule.startswith("random"):
        drawing = ("augment", "min_crop_area", "flip", "decoder")
        plan |= {"seed": config.seed} | {f"data.{name}": getattr(config.data, name) for name in drawing}
    return Job(
        out,
        Parts(slices, _views(rule, slices.reader, config)),
        header.views,
        per_shard,
        partial(encoded, codec),
        lambda result: [codes.array(result, header)],
        codes.EXTENSION,
        header,
        plan,
    )


def of_pictures(
    codec: Any, run: Path, config: settings.Config, split: str, root: Path, out: Path, per_shard: int
) -> Job:
    """Returns the job that decodes one split of the codes in `root` into `out`. Raises DataError if they are those of
    another tokenizer."""
    slices = SPLITS[split](replace(config.data, root=str(root)))
    source, own = slices.samples.index, latents_hash(codec)
    if not source.codes or not isinstance(slices.reader, Codes):
        raise DataError(f"{source.folder} holds no codes: give the --out of `export.py codes`")
    if source.codes.tokenizer != own:
        raise DataError(
            f"{source.folder} holds codes of another tokenizer ({source.codes.tokenizer}) than {run} ({own}): give "
            f"the --run that they were made with"
        )
    plan = {
        "exported": "images",
        "tokenizer": weights_hash(codec),
        "source": source.fingerprint(),
        "per_shard": per_shard,
    }
    reader = slices.reader
    return Job(
        out,
        Parts(slices, lambda data, sample: list(reader.views(data))),
        source.codes.views,
        per_shard,
        partial(decoded, codec),
        lambda result: [_png(one) for one in result],
        PNG,
        None,
        plan,
    )


@torch.no_grad()
@exact()
@repeatable()
def encoded(codec: Codec, batch: Batch) -> Tensor:
    """Returns the codes of the images, int64 [B, L, h, w] on the CPU, encoded AT_ONCE at a time."""
    parts = [codec.encode(part) for part in _parts(batch)]
    return torch.cat([torch.stack(levels, 1) for levels in parts]).cpu()


@torch.no_grad()
@exact()
@repeatable()
def decoded(codec: Codec, batch: Batch) -> Tensor:
    """Returns the images of the codes, uint8 [B, H, W, C] on the CPU, as an evaluation reconstructs them."""
    parts = [codec.decode(list(part.x.unbind(1)), part.condition) for part in _parts(batch)]
    return to_bytes(torch.cat(parts)).permute(0, 2, 3, 1).cpu()


def _sizes(codec: Any, run: Path, config: settings.Config, device: torch.device) -> tuple[list[int], list[int]]:
    """Returns K of each codebook, and L, h, w. Raises ConfigError if there are no codes, or maps of several sizes."""
    if not isinstance(codec, Codec) or not isinstance(codec, Codebooks):
        raise ConfigError(f"{run} has no codes to export: its model, {config.model.kind}, has no codebooks")
    with torch.no_grad():
        levels = codec.encode(settings.blank(config, 1).to(device))
    shapes = [list(level.shape[1:]) for level in levels]
    if any(shape != shapes[0] for shape in shapes) or len(shapes[0]) != 2:
        raise ConfigError(f"the codes of {run} have shapes {shapes}: only maps [h, w] of one size can be exported")
    return [len(one.window) for one in codec.usage(clear=False).values()], [len(levels), *shapes[0]]


def _views(rule: str, reader: Reader, config: settings.Config) -> Views:
    if rule == "ten":
        return ten(config.data)
    return centre(reader) if rule == "center" else draws(reader, codes.views_of(rule), config.seed)


def _png(image: Tensor) -> bytes:
    file = io.BytesIO()
    pixels = image.numpy()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(file, "PNG")
    return file.getvalue()


def _parts(batch: Batch) -> list[Batch]:
    return [Batch(*parts) for parts in zip(*(part.split(AT_ONCE) for part in batch), strict=True)]
