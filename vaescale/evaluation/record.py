"""The comparisons in an evaluation.json, each with its protocol, so that none is measured twice under the same one.

    "comparisons": {"rfid": {"numbers": [...], "features": {...}, "step": ...}, ...}      and the numbers next to it

What a comparison depends on is in its protocol: the weights, the images, the features and, for generated images, how
they were drawn.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import nn

from .. import files
from ..nn.features import Features
from .compare import GENERATED, Refused, Request, key_of

RECORD = "evaluation.json"
Protocol = dict[str, Any]
OF_RUN = ("weights", "step")  # parts of a protocol that differ from run to run


def hash_of(model: nn.Module) -> str:
    """Returns the hash of all parameters and buffers, 64-bit xxh3 in hexadecimal."""
    digest = xxhash.xxh3_64()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def protocols(
    requests: Sequence[Request], nets: Iterable[Features], measured: Protocol, drawn: Protocol
) -> dict[str, Protocol]:
    """Returns the protocol of each request by its key. measured: the weights and the validation images; drawn: how the
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


def earlier(places: Iterable[Path], measured: Protocol) -> dict[str, Any]:
    """Returns the comparisons, and their numbers, that these files hold of the same weights and validation images, the
    last file first. A file that is missing, or is no record, holds none."""
    found: dict[str, Any] = {}
    comparisons: dict[str, Protocol] = {}
    for place in places:
        try:
            records = files.read_json(place)
            for record in records if isinstance(records, list) else [records]:
                for key, protocol in record["comparisons"].items():
                    if all(protocol[name] == value for name, value in measured.items()):
                        found |= {name: float(record[name]) for name in protocol["numbers"]}
                        comparisons[key] = protocol
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            continue
    return {**found, "comparisons": comparisons} if comparisons else {}


def check(
    path: Path, fingerprint: str, step: int | None, draws: int, requests: Iterable[Request] = (), count: int = 0
) -> None:
    """Raises Refused if the record of a run is of other data, or has bounds of more draws, or comparisons of these
    requests with more generated images than `count`."""
    try:
        known = files.read_json(path)
        data, before, drawn = known["fingerprint"], known["step"], known["draws"]
        counts = {key: one.get("count", 0) for key, one in known.get("comparisons", {}).items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return  # there is none, or it is no record
    if data != fingerprint:
        raise not_own(path, f"images other than the {known.get('data')} that it was measured on")
    if before == step and drawn > draws and "bits_per_dim_iw" in known:
        raise not_own(path, f"--iw {draws}, because it has the tighter bound of --iw {drawn}")
    for key in (request.key for request in requests):
        if before == step and counts.get(key, 0) > count:
            raise not_own(path, f"--count {count}, because it has {key} of --count {counts[key]}")


def not_own(path: Path, what: str) -> Refused:
    return Refused(f"{path} keeps the run's own numbers and is not overwritten with those of {what}: give --out FILE")
