"""What is measured, a trained model or the codec of others, and its whole result."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import distributed
from ..data import DataError, index, stream
from ..interfaces import Codebooks, Codec, OnCodec, WithPrior
from ..monitoring import code_statistics
from ..nn.perceptual import Distance
from . import record, tables
from .compare import Refused
from .evaluate import protocol, reconstruct
from .measure import Comparer, Drawing, Generate, generator, read_distance

BATCH = 32  # images at a time on one rank


class Candidate(NamedTuple):
    """A codec to measure."""

    name: str
    codec: Codec
    data: stream.Config
    model: str  # its kind, in words
    step: int | None  # None: not of a run
    config: Any  # of the model; None: not of a run
    weights: str | None  # hash; None: not known
    record: Path | None  # where its numbers are kept, by default


class Shown(NamedTuple):
    x: Tensor  # uint8 [B, C, H, W]
    reconstruction: Tensor  # the same


def measured(
    candidate: Candidate,
    comparer: Comparer,
    device: torch.device,
    draws: int = 1,
    perceptual: str | None = None,
    earlier: Sequence[Any] | None = None,
) -> tuple[dict[str, Any], Shown]:
    """Returns (the content of an evaluation.json, the fixed images and their reconstructions). draws: latents per
    image; perceptual: a file; earlier: the results in the file that is written, None: the candidate's own record is
    written. Raises Refused. Collective."""
    codec, data = candidate.codec, candidate.data
    distance = perceptual_distance(candidate, perceptual)
    slices = stream.ValidationSlices(data)
    index.check_files(*slices.indexes)
    fingerprint = slices.samples.index.fingerprint()
    own = candidate.record if earlier is None else None
    if own:
        record.check(own, fingerprint, candidate.step, draws)
    shown = stream.fixed_images(slices).to(device)
    reconstruction, latents = reconstruct(codec, shown)
    if reconstruction.shape != shown.x.shape:
        sizes = " instead of ".join(" × ".join(map(str, one.shape[1:])) for one in (reconstruction, shown.x))
        raise Refused(f"{candidate.name} returns images of {sizes}: give another data.size or data.channels")
    about = {"images": len(slices.samples.index), "data": fingerprint, "size": data.size, "channels": data.channels}
    settings = record.hash_of_settings(candidate.config, data.attributes)
    base = {"weights_hash": candidate.weights, "settings_hash": settings, "step": candidate.step, **about}
    places = [candidate.record] if candidate.record else []
    records = [*record.read(places), *(earlier or [])] if candidate.weights else []
    watched = distributed.rank() == 0 and sys.stderr.isatty()
    passes = 1 if isinstance(codec, WithPrior) else draws  # codes are not drawn: all draws would be the same
    options = {"micro": BATCH, "draws": passes, "watched": watched, "distance": distance and distance.to(device)}
    generate = generator_of(candidate, comparer.drawing, device)
    counted = training_labels(candidate, comparer.drawing)
    training = counted.fingerprint() if counted else None
    metrics = comparer.measure(codec, slices, device, base, records, generate, own, training, **options)
    usage = codec.usage(clear=False) if isinstance(codec, Codebooks) else {}
    for name, one in usage.items() if candidate.config and candidate.step else ():  # step 0: it was imported
        metrics[f"{name}/usage_ever" if len(usage) > 1 else "usage_ever"] = float(code_statistics.used(one.ever))
    likelihood = getattr(candidate.config, "likelihood", None)
    result = {
        "run": candidate.name,
        "model": candidate.model,
        "likelihood": likelihood.kind if likelihood else None,
        **({"parameters": parameters_of(codec)} if isinstance(codec, nn.Module) else {}),
        "latents": tables.latents_in_words(latents, [len(one.window) for one in usage.values()]),
        **metrics,
        "perceptual": distance.source if distance else None,
        "draws": draws,
        "step": candidate.step,
        "weights": "averaged" if candidate.config else "as given",
        "data": str(Path(data.root) / "val"),
        "fingerprint": fingerprint,
        "size": data.size,
        "channels": data.channels,
        "protocol": protocol(),
        "measured": base,
    }
    result |= distributed.tell(record.others(records, base, distance is None, training_fingerprint(data)))
    return result, Shown(shown.x.cpu(), reconstruction.cpu())


def parameters_of(codec: nn.Module) -> int:
    """Returns how many there are, in a codec and its prior together."""
    if isinstance(codec, OnCodec) and isinstance(base := codec.codec, nn.Module):
        return sum(p.numel() for part in (codec, base) for p in part.parameters())
    # What a closed form has learned are buffers.
    return sum(p.numel() for p in codec.parameters()) or sum(b.numel() for b in codec.buffers())


def training_fingerprint(data: stream.Config) -> str | None:
    try:
        return index.Index(Path(data.root) / stream.TrainingOnce.split).fingerprint()
    except DataError:  # they are not needed here
        return None


def training_labels(candidate: Candidate, drawing: Drawing) -> index.Index | None:
    """Returns the index whose labels decide how often each class is generated, if any does."""
    if getattr(candidate.config, "classes", 0) and drawing.labels == "data":
        return index.Index(Path(candidate.data.root) / "train")
    return None


def generator_of(candidate: Candidate, drawing: Drawing, device: torch.device) -> Generate:
    """Returns what generates images as `drawing` says."""
    classes = getattr(candidate.config, "classes", 0)
    counts = [1] * classes
    if counted := training_labels(candidate, drawing):
        labels = counted.records["label"]
        counts = [int((labels == label).sum()) for label in range(classes)]
    return generator(candidate.codec, drawing, counts, len(candidate.data.attributes), device)


def perceptual_distance(candidate: Candidate, given: str | None) -> Distance | None:
    """Returns the distance of the file `given`, else the run's own; None without either, or if the latter's file cannot
    be read by all ranks. Raises Refused. Collective."""
    own = getattr(candidate.config, "reconstruction", None)
    path = given or (own.perceptual.weights if own and own.perceptual.weight else "")
    if not path:
        return None
    try:
        return read_distance(path, candidate.data.size)
    except Refused as error:
        if given:
            raise
        if distributed.rank() == 0:
            print(f"the perceptual distance is not measured: {error}, or give --perceptual FILE", file=sys.stderr)
        return None
