"""Measures all numbers of a codec: those of METRICS, and the requested comparisons of sets of images."""

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from .. import distributed
from ..data import stream
from ..interfaces import Batch, Codec, Diffused, WithPrior
from ..nn import features, perceptual
from ..nn.features import Features
from ..nn.perceptual import Distance
from . import record
from . import reference as references
from .compare import GENERATED, RECONSTRUCTED, ByNet, Gathering, Refused, Request, check, chosen, compared
from .drawing import AT_ONCE, Unsupported
from .evaluate import evaluate
from .feature_statistics import Gatherer, Statistics
from .generation import Generated, Labels, generated

T = TypeVar("T")
LPIPS = "lpips_vgg"  # the distance that papers call LPIPS: a key of nn/published.py


# (count, rank, world) → this rank's images of the samples 0 … count − 1.
Generate = Callable[[int, int, int], Iterable[Generated]]


@dataclass(frozen=True)
class Drawing:
    """How images are generated."""

    count: int = 50_000
    labels: Labels = "equal"
    seed: int = 0
    temperature: float = 1.0


def measure(
    codec: Codec,
    slices: stream.ValidationSlices,
    device: torch.device,
    requests: Sequence[Request] = (),
    nets: Sequence[Features] = (),
    count: int = 0,
    generate: Generate | None = None,
    reference: ByNet | None = None,
    known: ByNet | None = None,
    watched: bool = False,
    used: int = 0,
    stopped: Callable[[], object] = lambda: False,
    **options: Any,
) -> dict[str, Any]:
    """Returns the numbers of a codec over a validation set. `nets`: all that the requests need, on the device;
    `generate` makes `count` images, for requests of such; `reference`: what they are compared with, by default the
    validation images; `known`: the statistics of these, filled in if it is empty; `used`: how many of these are
    compared, evenly spaced, 0 for all of them; `stopped`, `options`: of `evaluate`.

    Collective; all ranks return the same result. Raises Refused, before anything is measured, if a request cannot
    be.
    """
    if not requests:
        return evaluate(codec, slices, device, watched=watched, stopped=stopped, **options)
    known = {} if known is None else known
    blank = slices[range(1)].batch.x.to(device)
    total = len(slices.samples.index)
    sides = {side: [request for request in requests if request.side == side] for side in (RECONSTRUCTED, GENERATED)}
    images = Gathering([net for net in nets if net.words not in known], total, blank, used)
    against: dict[str, Gatherer | Statistics] = {**known, **images.by_net}
    mine = Gathering(_of(nets, sides[RECONSTRUCTED]), total, blank, used)
    check(sides[RECONSTRUCTED], mine, against)

    def observe(batch: Batch, y: Tensor) -> None:
        images.add(batch.sample, batch.x)
        mine.add(batch.sample, y)

    if sides[GENERATED]:
        assert generate is not None
        theirs = Gathering(_of(nets, sides[GENERATED]), count, blank)
        check(sides[GENERATED], theirs, reference or against)
        try_to(generate)
    found = evaluate(codec, slices, device, watched=watched, observe=observe, stopped=stopped, **options)
    if not found:
        return {}
    known |= images.result()
    if sides[RECONSTRUCTED]:
        found |= compared(sides[RECONSTRUCTED], known, mine.result())
    if sides[GENERATED]:
        assert generate is not None
        if not _gather(generate, count, theirs, watched, stopped):
            return {}
        found |= compared(sides[GENERATED], reference or known, theirs.result())
    return found


def _of(nets: Iterable[Features], requests: Sequence[Request]) -> list[Features]:
    """The networks that these requests need."""
    return [net for net in nets if any(request.words == net.words for request in requests)]


def _gather(generate: Generate, count: int, theirs: Gathering, watched: bool, stopped: Callable[[], object]) -> bool:
    """Gathers the features of `count` generated images. Returns whether it was not stopped. Collective."""
    rank, world = distributed.rank(), distributed.world()
    batches = range(math.ceil(math.ceil(count / world) / AT_ONCE))  # of the rank with the most images
    with tqdm(None, "generate", (rank + 1) * count // world, unit="image", disable=not watched) as bar:
        for _, batch in zip_longest(batches, generate(count, rank, world)):
            if batch:
                theirs.add(batch.number, batch.x)
                bar.update(len(batch.x))
            if stopped():
                return False
    return True


def generator(
    codec: Codec, drawing: Drawing, class_counts: Sequence[int], attributes: int, device: torch.device
) -> Generate:
    """Returns what generates images as `drawing` says. class_counts, attributes: as in `generated`."""

    def generate(count: int, rank: int, world: int) -> Iterable[Generated]:
        return generated(
            codec, count, drawing.labels, class_counts, drawing.seed, drawing.temperature, rank, world,
            device=device, attributes=attributes,
        )  # fmt: skip

    return generate


def try_to(generate: Generate) -> None:
    """Raises Refused if no image can be generated."""
    try:
        next(iter(generate(1, 0, 1)))
    except Unsupported as error:
        raise Refused(f"no images can be generated: {error}") from None


class Comparer:
    """The comparisons that a command line asks for, and what they share between codecs."""

    def __init__(
        self,
        metrics: Sequence[str],
        names: Sequence[str],
        drawing: Drawing = Drawing(),
        reference: Path | None = None,
    ) -> None:
        """metrics: of the command line; names: of networks; drawing: of generated images; reference: a file that they
        are compared with instead of the validation images. Raises Refused. Collective."""
        asked = chosen(metrics, names)
        if reference and not any(side == GENERATED for one in asked.values() for side, _ in one):
            raise Refused(
                f"--reference {reference} is for comparisons of generated images: give one of them, such as --metrics "
                "gfd, or leave it out"
            )
        self.nets = [read_net(name) for name in asked]
        self.requests = [Request(*one, net.words) for net in self.nets for one in asked[net.name]]
        self.known: dict[tuple[object, ...], ByNet] = {}  # of validation images
        self.drawing, self.reference = drawing, reference

    def measure(
        self,
        codec: Codec,
        slices: stream.ValidationSlices,
        device: torch.device,
        base: record.Protocol,
        records: Sequence[Any],
        generate: Generate | None = None,
        own: Path | None = None,
        training: str | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        """Returns the numbers of this codec, with the comparisons that were measured before. base: the model and the
        images; records: earlier results; generate: makes images, if any are wanted; own: the record of a run that will
        be replaced; training: the fingerprint of the images that labels are drawn like, if they are; options: of
        `evaluate`. Raises Refused. Collective."""
        nets = [net.to(device) for net in self.nets]
        drawn = {**asdict(self.drawing), "reference": "the validation images"}
        if training:
            drawn["training"] = training
        if isinstance(codec, Diffused):
            drawn |= codec.sampling_protocol()
        elif isinstance(codec, WithPrior):
            drawn |= asdict(codec.sampling)
        reference: ByNet | None = None
        if self.reference:
            theirs = _of(nets, [request for request in self.requests if request.side == GENERATED])
            read = partial(references.read, self.reference, theirs, base["size"], base["channels"])
            reference, drawn["reference"] = read_alike(str(self.reference), read)
        if own:
            record.check_drawn(own, [one for one in self.requests if one.side == GENERATED], base, drawn)
        wanted = record.protocols(self.requests, nets, base, drawn)
        before = distributed.tell(record.earlier(records, base))
        comparisons = before.pop("comparisons", {})
        left = [request for request in self.requests if comparisons.get(request.key) != wanted[request.key]]
        if distributed.rank() == 0 and (kept := [request.key for request in self.requests if request not in left]):
            print(f"not measured again, because the protocol is the same: {', '.join(kept)}", file=sys.stderr)
        known = self.known.setdefault(tuple(base[name] for name in ("data", "size", "channels")), {})
        count = self.drawing.count
        found = measure(codec, slices, device, left, nets, count, generate, reference, known, **options)
        comparisons |= {request.key: wanted[request.key] for request in left}
        return {**before, **found, **({"comparisons": comparisons} if comparisons else {})}


def read_net(name: str) -> Features:
    """Reads a network's weights. Raises Refused. Collective."""
    if name not in features.NETS:
        raise Refused(f"--features {name} is not one of {', '.join(features.NETS)}")
    return read_alike(name, partial(features.read, name))


def read_distance(path: str, size: int) -> Distance:
    """Reads a perceptual distance for images of `size` pixels per side. Raises Refused. Collective."""

    def read() -> Distance:
        distance = perceptual.read(path)
        perceptual.require_size(distance, size)
        return distance

    return read_alike(path, read)


def read_alike(what: str, read: Callable[[], T]) -> T:
    """Returns what `read` returns. Raises Refused, on all ranks, if it raises ValueError on any. Collective."""
    found, why = None, ""
    try:
        found = read()
    except ValueError as error:
        why = str(error)
    if ranks := distributed.where(bool(why)):
        raise Refused(why or f"{what} cannot be read on rank {ranks[0]}: copy its file to that node, too")
    assert found is not None
    return found
