"""The comparisons in an evaluation.json, each with its protocol, so that none is measured twice under the same one.

    "comparisons": {"rfid": {"numbers": [...], "features": {...}, "step": ...}, ...}      and the numbers next to it

What a comparison depends on is in its protocol: the weights and settings of the model, the images, the features and,
for generated images, how they were drawn.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import xxhash

from .. import files
from ..models import MODELS
from ..nn.features import Features
from .compare import GENERATED, Refused, Request, key_of
from .metrics.perceptual import PERCEPTUAL

RECORD = "evaluation.json"
Protocol = dict[str, Any]
OF_RUN = ("weights_hash", "settings_hash", "step")  # parts of a protocol that differ from run to run


def hash_of_settings(config: Any, attributes: Sequence[str]) -> str:
    """Returns the hash of what decides, besides the weights, what a model computes: its settings, a dataclass or None,
    and the attributes that it is given. 64-bit xxh3 in hexadecimal."""
    own = asdict(config) if config else None
    if own and (base := MODELS[own["kind"]].base if own.get("kind") in MODELS else ""):
        own.pop(base)  # where a tokenizer lies; its weights have a hash
    parts = [own, list(attributes)]
    return xxhash.xxh3_64_hexdigest(json.dumps(parts, sort_keys=True, default=str).encode())


def protocols(
    requests: Sequence[Request], nets: Iterable[Features], measured: Protocol, drawn: Protocol
) -> dict[str, Protocol]:
    """Returns the protocol of each request by its key. measured: the model and the validation images; drawn: how the
    generated images are, for requests of such."""
    features = {net.words: {"words": net.words, **net.protocol} for net in nets}
    return {
        request.key: {
            "numbers": [key_of(request.side, number, request.words) for number in request.comparison.numbers],
            "how": request.comparison.protocol,
            "features": features[request.words],
            **measured,
            **(drawn if request.side == GENERATED else {}),
        }
        for request in requests
    }


def read(places: Iterable[Path]) -> list[Any]:
    """Returns the records in these files. One that is missing, or is not JSON, has none."""
    found: list[Any] = []
    for place in places:
        try:
            records = files.read_json(place)
        except (OSError, ValueError):
            continue
        found += records if isinstance(records, list) else [records]
    return found


def earlier(records: Iterable[Any], measured: Protocol) -> dict[str, Any]:
    """Returns the comparisons, and their numbers, that these records hold of the same model and validation images. The
    last one counts. What is no record holds none."""
    found: dict[str, Any] = {}
    comparisons: dict[str, Protocol] = {}
    for record in records:
        try:
            for key, protocol in record["comparisons"].items():
                if all(protocol[name] == value for name, value in measured.items()):
                    found |= {name: float(record[name]) for name in protocol["numbers"]}
                    comparisons[key] = protocol
        except (ValueError, TypeError, KeyError, AttributeError):
            continue
    return {**found, "comparisons": comparisons} if comparisons else {}


def others(records: Iterable[Any], measured: Protocol, perceptual: bool, training: str | None) -> dict[str, Any]:
    """Returns the shares of nearer images and, if `perceptual`, the perceptual distance with its source that these
    records hold of the same model and validation images. The last one counts. training: the fingerprint of the training
    images, of which the shares must be; None if there are no training images now."""
    found: dict[str, Any] = {}
    for record in records:
        if isinstance(record, dict) and record.get("measured") == measured:
            names = [*PERCEPTUAL.numbers, "perceptual"] if perceptual and record.get("perceptual") else []
            nearest = record.get("nearest")
            if isinstance(nearest, dict) and training in (None, nearest.get("training")):
                names.append("nearest")
            found |= {name: record[name] for name in names if name in record}
    return found


def check(path: Path, fingerprint: str, step: int | None, draws: int) -> None:
    """Raises Refused if the record of a run is of other data, or has bounds of more draws."""
    try:
        known = files.read_json(path)
        data, before, drawn = known["fingerprint"], known["step"], known["draws"]
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return  # there is none, or it is no record
    if data != fingerprint:
        raise not_own(path, f"images other than the {known.get('data')} that it was measured on")
    if before == step and drawn > draws and "bits_per_dim_iw" in known:
        raise not_own(path, f"--iw {draws}, because it has the tighter bound of --iw {drawn}")


def check_drawn(path: Path, requests: Iterable[Request], measured: Protocol, drawn: Protocol) -> None:
    """Raises Refused if the record of a run has one of these comparisons of generated images, of the same step and
    weights, that were drawn or compared in another way. More images drawn in the same way are welcome."""
    try:
        comparisons = files.read_json(path)["comparisons"]
        known = [(request.key, dict(comparisons[request.key])) for request in requests if request.key in comparisons]
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return  # there is none, or it is no record
    for key, before in known:
        if any(before.get(name, measured[name]) != measured[name] for name in ("weights_hash", "step")):
            continue
        for name in sorted(drawn, key="count".__eq__):
            old, new = before.get(name), drawn[name]
            if old != new and not (name == "count" and (old or 0) < new):
                words = "training images" if name == "training" else "--" + name.replace("_", "-")
                raise not_own(path, f"{words} {new}, because it has {key} of {words} {old}")


def not_own(path: Path, what: str) -> Refused:
    return Refused(f"{path} keeps the run's own numbers and is not overwritten with those of {what}: give --out DIR")
