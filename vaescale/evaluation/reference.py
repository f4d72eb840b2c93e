"""Files of reference statistics, with which generated images are compared.

A file of our own is made once by `launch/evaluate.py statistics`: safetensors with "mean", "covariance" and "rows", and
as metadata what was measured. The other kind is that of ADM (Dhariwal, Nichol 2021), such as
VIRTUAL_imagenet256_labeled.npz, with "mu" and "sigma" of the features of FID's Inception.
"""

import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from tokenize import TokenError
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .. import distributed
from ..data import DataError, stream
from ..files import atomically, file_hash
from ..nn.features import Features
from .compare import WORDS, ByNet, Gathering, Refused
from .evaluate import IMAGES
from .feature_statistics import Statistics

KIND = "statistics of features"
TENSORS = ("mean", "covariance", "rows")
# What reading a damaged file raises: an npz all but the first.
DAMAGED = (SafetensorError, ValueError, KeyError, TypeError, RuntimeError, EOFError, BadZipFile, zlib.error, TokenError)
TEXT = 512  # bytes of a message that ranks tell one another


def gather(
    slices: stream.ValidationSlices, net: Features, device: torch.device, watched: bool = False, micro: int = 32
) -> Statistics:
    """Returns the statistics of all images of `slices`. net: on the device; micro: images at a time. Raises Refused if
    an image is damaged, on all ranks with the same text. Collective."""
    config = slices.config
    blank = torch.zeros(1, config.channels, config.size, config.size, dtype=torch.uint8, device=device)
    gathering = Gathering([net], len(slices.samples.index), blank)
    why = ""
    try:
        for decoded in filter(None, stream.once(slices, micro, device, "statistics", watched)):
            for damage in decoded.damage:
                raise Refused(f"{damage.key} in {damage.shard} is damaged: {damage.cause}")
            gathering.add(decoded.batch.sample, decoded.batch.x)
    except (Refused, DataError) as error:  # the other ranks do not meet this image, and would wait for this rank
        why = str(error)
    if why := _first(why):
        raise Refused(why)
    return gathering.result()[net.words]


def _first(text: str) -> str:
    """Returns the text of the first rank that has one, cut to TEXT bytes; "" if none has. Collective."""
    if not (ranks := distributed.where(bool(text))):
        return ""
    sent = torch.tensor(list(text.encode()[:TEXT].ljust(TEXT, b"\0")))
    told = distributed.gather(sent)[ranks[0]].to(torch.uint8)
    return bytes(told.tolist()).rstrip(b"\0").decode(errors="replace")


def write(path: Path, known: Statistics, net: Features, images: dict[str, Any]) -> None:
    """Writes a file. images: "data", "fingerprint", "size" and "channels". Raises OSError."""
    described = {**images, "count": known.count, "images": IMAGES}
    metadata = {"kind": KIND, "words": net.words, "features": json.dumps(net.protocol), "images": json.dumps(described)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomically(path) as partial:
        save_file({name: getattr(known, name).contiguous() for name in TENSORS}, partial, metadata)


def read(path: Path, nets: Sequence[Features], size: int, channels: int) -> tuple[ByNet, str]:
    """Returns (the statistics in a file by the words of the features, the file in words for a protocol). size,
    channels: of the images that will be compared with it. Raises Refused if the file cannot be read, or is of other
    features or other images."""
    if len(nets) != 1:
        raise Refused(f"--reference {path} is of one network's features: give one --features")
    try:
        digest = file_hash(path)
        known, words = _npz(path, nets[0]) if path.suffix == ".npz" else _own(path, nets[0], size, channels)
    except OSError as error:
        raise Refused(f"--reference {path} cannot be read ({error.strerror or 'it does not exist'})") from None
    except DAMAGED as error:
        if isinstance(error, Refused):
            raise
        raise Refused(
            f"--reference {path} is neither a file that `launch/evaluate.py statistics` wrote nor an npz with mu and "
            f"sigma ({str(error) or 'it ends early'})"
        ) from None
    return {nets[0].words: known}, f"{path.name}, xxh3 {digest[:8]}{words}"


def _own(path: Path, net: Features, size: int, channels: int) -> tuple[Statistics, str]:
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        if metadata.get("kind") != KIND:
            raise ValueError("its kind is another one")
        images = json.loads(metadata["images"])
        theirs = json.loads(metadata["features"])
        if theirs != net.protocol:
            raise Refused(
                f"--reference {path} is of other features ({metadata['words']}, weights {theirs['file']}) than "
                f"--features {net.name} ({net.protocol['file']}): make it again with these"
            )
        if (images["size"], images["channels"]) != (size, channels):
            raise Refused(
                f"--reference {path} is of images of {images['size']} px and {images['channels']} channel(s), and the "
                f"model's have {size} px and {channels} channel(s): make it again with these"
            )
        mean, covariance, rows = (file.get_tensor(name) for name in TENSORS)
    known = Statistics(int(images["count"]), mean, covariance, rows)
    _require_shapes(known, net.dim)
    return known, f" ({known.count:,} images of {images['data']} at {size} px, index {images['fingerprint'][:8]})"


def _npz(path: Path, net: Features) -> tuple[Statistics, str]:
    if net.words != WORDS:
        raise Refused(f"--reference {path} is of Inception's features, not of {net.words}: give --features inception")
    with np.load(path, allow_pickle=False) as arrays:
        mean, covariance = (torch.from_numpy(np.asarray(arrays[name], np.float64)) for name in ("mu", "sigma"))
    known = Statistics(0, mean, covariance, torch.zeros(0, net.dim))
    _require_shapes(known, net.dim)
    return known, " (as published)"


def _require_shapes(known: Statistics, dim: int) -> None:
    if known.mean.shape != (dim,) or known.covariance.shape != (dim, dim) or known.rows.shape[1:] != (dim,):
        raise ValueError(f"its tensors are not those of {dim} features")
