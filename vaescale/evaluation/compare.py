"""Compares reconstructions and generated images with reference images, by the features of both.

    validation images ─┬─ features ─> Statistics ─┐
                       └─ codec ─> features ─> Statistics ─> numbers "r…"
    prior ─> samples ───────────── features ─> Statistics ─> numbers "g…", against the validation images or a file

Each set of images is gone through once for all comparisons and networks.
"""

import re
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import distributed
from ..nn.features import Features
from . import metrics
from .feature_statistics import Gatherer, Statistics, spaced
from .metrics.kernel_distance import PAIRED_KERNEL_DISTANCE
from .metrics.metric import Comparison, Number

RECONSTRUCTED, GENERATED = "r", "g"
# Without that of reconstructions, whose inception score says little.
NAMES = ["rfd", "rkid", "rpr", "gfd", "gkid", "gis", "gpr"]
# What --metrics accepts besides NAMES: a name of these with its network, "" for those of --features; or None for what
# `evaluate` measures without features: PSNR and SSIM always, LPIPS if it is given that distance.
ALIASES: dict[str, tuple[str, str] | None] = {
    "psnr": None,
    "ssim": None,
    "lpips": None,
    "rfid": ("rfd", "inception"),
    "gfid": ("gfd", "inception"),
    "fd-dinov2": ("rfd", "dinov2"),
    "kid": ("rkid", ""),
    "is": ("gis", ""),
    "pr": ("rpr", ""),
}
WORDS = "FID"  # the `words` of the published Inception's features

ENOUGH = 32  # images that wait for the networks, at least

# Of reconstructions, whose row i is of the same image as that of the reference.
PAIRED = {"kid": PAIRED_KERNEL_DISTANCE}

ByNet = dict[str, Statistics]  # by the words of the features


class Refused(ValueError):
    """Raised if something cannot be measured as it is asked for; the message says why in one sentence. The exit code is
    2."""


class Request(NamedTuple):
    """A comparison to measure."""

    side: str  # RECONSTRUCTED or GENERATED
    name: str  # key of COMPARISONS
    words: str  # of the features

    @property
    def key(self) -> str:
        return key_of(self.side, self.name, self.words)

    @property
    def comparison(self) -> Comparison:
        if self.side == RECONSTRUCTED and self.name in PAIRED:
            return PAIRED[self.name]
        return metrics.COMPARISONS[self.name]


def chosen(names: Sequence[str], networks: Sequence[str]) -> dict[str, list[tuple[str, str]]]:
    """Returns by network the comparisons that names on the command line ask for, as (side, key of COMPARISONS) in the
    order of NAMES. networks: those of --features. Raises Refused."""
    known = {name: (name, "") for name in NAMES} | ALIASES
    asked: dict[str, set[str]] = {network: set() for network in networks}
    for name in names:
        if name not in known:
            raise Refused(f"--metrics {name} is not one of {', '.join(known)}")
        if found := known[name]:
            plain, own = found
            for network in [own] if own else networks:
                asked.setdefault(network, set()).add(plain)
    return {network: _split(plain) for network, plain in asked.items() if plain}


def _split(names: Container[str]) -> list[tuple[str, str]]:
    return [(name[0], name[1:]) for name in NAMES if name in names]


def key_of(side: str, name: str, words: str) -> str:
    """Returns the name of a number in a result: rfid, rkid, rfd_efficientnet_lite0. words: of the features."""
    if words == WORDS:
        return f"{side}{'fid' if name == 'fd' else name}"
    return f"{side}{name}_{re.sub('[^a-z0-9]+', '_', network(words).lower())}"


def network(words: str) -> str:
    """Returns the network's name in the words of its features, "FD (name)"."""
    return words.removeprefix("FD (").removesuffix(")")


def numbers(words: Iterable[str]) -> dict[str, Number]:
    """Returns all numbers that comparisons by these features can have, in reading order. words: of the features."""
    found = {}
    for one in words:
        for side, name in _split(NAMES):
            for key, number in metrics.COMPARISONS[name].numbers.items():
                found[key_of(side, key, one)] = _worded(number, side, one)
    return found


def _worded(number: Number, side: str, words: str) -> Number:
    """The number with words such as "rFID", "rKID, standard deviation over subsets (EfficientNet-Lite0)"."""

    def full(text: str) -> str:
        text = f"{side}{'-' if text[0].islower() else ''}{WORDS if (text, words) == ('FD', WORDS) else text}"
        return text if words == WORDS else f"{text} ({network(words)})"

    return number._replace(words=full(number.words), column=number.column and full(number.column))


class Gathering:
    """Gathers the features of one set of images by several networks."""

    def __init__(self, nets: Sequence[Features], total: int, blank: Tensor, count: int = 0) -> None:
        """total: images of all ranks together, of which `count` evenly spaced ones are used, 0 for all of them; blank:
        any image on the device."""
        self.nets = nets
        self.total, self.count = total, min(count or total, total)
        self.by_net = {net.words: Gatherer(self.count, net.dim, net.net.classes, blank.device) for net in nets}
        self.waiting: list[tuple[Tensor, Tensor]] = []

    def add(self, samples: Tensor, x: Tensor) -> None:
        """samples: int64 [B], each number below `total` once over all ranks; x: uint8 [B, C, H, W]."""
        if self.nets:
            if self.count < self.total:
                place = spaced(samples, self.total, self.count)
                used = place < self.count
                samples, x = place[used], x[used]
            self.waiting.append((samples, x))
            # A network takes as long for one image as for a chunk, and of few images used a batch has only one or two.
            if sum(len(part) for part, _ in self.waiting) >= ENOUGH:
                self._flush()

    def _flush(self) -> None:
        places, images = (torch.cat(parts) for parts in zip(*self.waiting, strict=True))
        self.waiting.clear()
        for net in self.nets:
            self.by_net[net.words].add(places, *net(images))

    def result(self) -> ByNet:
        """Collective."""
        if self.waiting:
            self._flush()
        return {words: gatherer.result() for words, gatherer in self.by_net.items()}


def compared(requests: Sequence[Request], reference: ByNet, other: ByNet) -> dict[str, float]:
    """Returns the numbers of requests of one side. Those of reconstructions need a reference of the same images in the
    same order. Rank 0 computes the numbers. Collective."""
    found: dict[str, Any] = {}
    if distributed.rank() == 0:
        for request in requests:
            side, _, words = request
            values = request.comparison.result(reference[words], other[words])
            found |= {key_of(side, key, words): value for key, value in values.items()}
    return distributed.tell(found)


def check(requests: Sequence[Request], images: Gathering, reference: Mapping[str, Gatherer | Statistics]) -> None:
    """Raises Refused if one of the requests, all of one side, cannot be measured. images: of that side."""
    for request in requests:
        comparison, name = request.comparison, f"{request.side}{request.name}"
        gatherer, against = images.by_net[request.words], reference[request.words]
        if comparison.classes and gatherer.classes is None:
            raise Refused(f"{name} needs classes, which {network(request.words)} does not have")
        if min(gatherer.count, against.count or comparison.least) < comparison.least:
            raise Refused(
                f"{name} needs at least {comparison.least} images on each side, not {gatherer.count} and "
                f"{against.count}"
            )
        if comparison.rows and not len(against.rows):
            raise Refused(
                f"{name} needs features of single images, which the reference does not have: make one with "
                "`launch/evaluate.py statistics`"
            )
