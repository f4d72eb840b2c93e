"""Measures all numbers of a codec: those of METRICS, and the requested comparisons of sets of images."""

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .. import distributed
from ..data import stream
from ..interfaces import Batch, Codec
from ..nn import features
from ..nn.features import Features
from . import record
from .compare import GENERATED, RECONSTRUCTED, ByNet, Gathering, Refused, Request, check, chosen, compared
from .evaluate import evaluate
from .statistics import Gatherer, Statistics


@dataclass(frozen=True)
class Generated:
    """Images from a prior."""

    count: int  # of all ranks together
    batches: Iterable[tuple[Tensor, Tensor]]  # this rank's sample numbers, int64 [B], and images, uint8 [B, C, H, W]


def measure(
    codec: Codec,
    slices: stream.ValidationSlices,
    device: torch.device,
    requests: Sequence[Request] = (),
    nets: Sequence[Features] = (),
    generated: Generated | None = None,
    reference: ByNet | None = None,
    known: ByNet | None = None,
    watched: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Returns the numbers of a codec over a validation set. `nets`: all that the requests need, on the device;
    `generated`: for requests of generated images; `reference`: what they are compared with, by default the validation
    images; `known`: the statistics of these, filled in if it is empty; `options`: of `evaluate`.

    Collective; all ranks return the same result. Raises Refused, before anything is measured, if a request cannot
    be.
    """
    if not requests:
        return evaluate(codec, slices, device, watched=watched, **options)
    known = {} if known is None else known
    blank = slices[range(1)].batch.x.to(device)
    total = len(slices.samples.index)
    sides = {side: [request for request in requests if request.side == side] for side in (RECONSTRUCTED, GENERATED)}
    images = Gathering([net for net in nets if net.words not in known], total, blank)
    against: dict[str, Gatherer | Statistics] = {**known, **images.by_net}
    mine = Gathering(nets if sides[RECONSTRUCTED] else [], total, blank)
    check(sides[RECONSTRUCTED], mine, against)

    def observe(batch: Batch, y: Tensor) -> None:
        images.add(batch.sample, batch.x)
        mine.add(batch.sample, y)

    if sides[GENERATED]:
        assert generated is not None
        theirs = Gathering(nets, generated.count, blank)
        check(sides[GENERATED], theirs, reference or against)
    found = evaluate(codec, slices, device, watched=watched, observe=observe, **options)
    known |= images.result()
    if sides[RECONSTRUCTED]:
        found |= compared(sides[RECONSTRUCTED], known, mine.result())
    if sides[GENERATED]:
        assert generated is not None
        for samples, x in tqdm(generated.batches, "generate", unit="batch", disable=not watched):
            theirs.add(samples.to(device), x.to(device))
        found |= compared(sides[GENERATED], reference or known, theirs.result())
    return found


class Comparer:
    """The comparisons that a command line asks for, and what they share between codecs."""

    def __init__(self, metrics: Sequence[str], names: Sequence[str]) -> None:
        """metrics: names of comparisons; names: of networks. Raises Refused. Collective."""
        asked = chosen(metrics, names)
        if asked and (unknown := [name for name in names if name not in features.NETS]):
            raise Refused(f"--features {unknown[0]} is not one of {', '.join(features.NETS)}")
        self.nets = [read_alike(name, partial(features.read, name)) for name in names] if asked else []
        self.requests = [Request(*one, net.words) for net in self.nets for one in asked]
        self.known: dict[tuple[object, ...], ByNet] = {}  # of validation images

    def measure(
        self,
        codec: Codec,
        slices: stream.ValidationSlices,
        device: torch.device,
        base: record.Protocol,
        places: Sequence[Path],
        **options: Any,
    ) -> dict[str, Any]:
        """Returns the numbers of this codec, with the comparisons that were measured before. base: the weights and the
        images; places: files with earlier results; options: of `evaluate`. Raises Refused. Collective."""
        nets = [net.to(device) for net in self.nets]
        wanted = record.protocols(self.requests, nets, base, {})
        before = distributed.tell(record.earlier(places, base))
        comparisons = before.pop("comparisons", {})
        left = [request for request in self.requests if comparisons.get(request.key) != wanted[request.key]]
        if distributed.rank() == 0 and (kept := [request.key for request in self.requests if request not in left]):
            print(f"not measured again, because the protocol is the same: {', '.join(kept)}", file=sys.stderr)
        known = self.known.setdefault(tuple(base[name] for name in ("data", "size", "channels")), {})
        found = measure(codec, slices, device, left, nets, known=known, **options)
        comparisons |= {request.key: wanted[request.key] for request in left}
        return {**before, **found, **({"comparisons": comparisons} if comparisons else {})}


def read_alike(what: str, read: Callable[[], Features]) -> Features:
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
