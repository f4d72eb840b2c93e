"""Copies a checkpoint's tensors to rank 0's host memory, and full tensors to and from the shards of ZeRO 1 and 2.

DeepSpeed's `safe_get_full_fp32_param` needs an all-reduce and a full tensor on every device for each parameter. Here
all parameters together are one long tensor, which is summed over ranks a bucket at a time. A rank contributes its shard
and zeros elsewhere, so the sums are exact.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import distributed
from ..interfaces import Tensors

BUCKET_ENTRIES = 2**23  # 32 MiB of fp32


def on_host(tensors: Tensors) -> Tensors:
    """Returns copies in host memory on rank 0, {} on the other ranks."""
    if distributed.rank():
        return {}
    return {name: value.detach().to("cpu", copy=True) for name, value in tensors.items()}


class Piece(NamedTuple):
    """A range of a parameter's entries whose fp32 values are in this rank's shard."""

    number: int  # of the parameter
    start: int  # in the flattened parameter
    group: int  # of the optimiser, which has a shard for each
    place: int  # in the shard
    entries: int


class Shards:
    """Maps this rank's flat shards of fp32 masters or moments, one for each of the optimiser's parameter groups, to the
    parameters that ZeRO 1 and 2 train."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.shapes = [parameter.shape for parameter in parameters]
        self.counts = [parameter.numel() for parameter in parameters]
        self.begins = [0, *accumulate(self.counts)]
        self.device = parameters[0].device
        self.pieces: list[Piece] = []
        for number, parameter in enumerate(parameters):
            if mapping := parameter._hp_mapping:  # type: ignore[attr-defined]  # None: nothing of it is in the shard
                here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
                self.pieces.append(Piece(number, here.start, mapping.param_group_index, there.start, here.numel))

    @torch.no_grad()
    def scatter(self, full: list[Tensor], shards: list[Tensor]) -> None:
        """Copies this rank's pieces of `full`, one tensor per parameter, into the shards."""
        for number, start, group, place, entries in self.pieces:
            shards[group][place : place + entries].copy_(full[number].flatten()[start : start + entries])

    def gather(self, shards: list[Tensor]) -> list[Tensor]:
        """Returns the full fp32 tensors, one per parameter, on all ranks. Collective."""
        joined = torch.empty(self.begins[-1], device=self.device)
        for begin, values in self._buckets(shards, distributed.sum_):
            joined[begin : begin + len(values)] = values
        return self._cut(joined)

    def on_host(self, shards: list[Tensor]) -> list[Tensor]:
        """Returns the full fp32 tensors, one per parameter, in host memory on rank 0, [] on the other ranks.
        Collective."""
        joined = torch.empty(0 if distributed.rank() else self.begins[-1])
        for begin, values in self._buckets(shards, distributed.reduce_):
            if not distributed.rank():
                joined[begin : begin + len(values)] = values
        return [] if distributed.rank() else self._cut(joined)

    def _cut(self, joined: Tensor) -> list[Tensor]:
        parts = joined.split(self.counts)
        return [part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]

    @torch.no_grad()
    def _buckets(self, shards: list[Tensor], reduce: Callable[[Tensor], Tensor]) -> Iterator[tuple[int, Tensor]]:
        """Yields (place of the first entry, reduced values) for each part of the joined tensor. The values are
        overwritten by the next ones."""
        total = self.begins[-1]
        bucket = torch.empty(min(BUCKET_ENTRIES, total), device=self.device)
        for begin in range(0, total, BUCKET_ENTRIES):
            values = bucket[: total - begin].zero_()
            targets, sources = [], []
            for number, start, group, place, entries in self.pieces:
                first = self.begins[number] + start - begin  # where the piece would start in the bucket
                low, high = max(first, 0), min(first + entries, len(values))
                if low < high:
                    targets.append(values[low:high])
                    sources.append(shards[group][place + low - first : place + high - first])
            if targets:  # torch refuses an empty list
                torch._foreach_copy_(targets, sources)
            yield begin, reduce(values)


class Masters:
    """The fp32 master weights of a model with fp16 weights, at ZeRO 1 and 2.

    parts: this rank's shards of them, flat. trained: for each of the model's parameters, whether it has masters; the
    others are frozen.
    """

    def __init__(self, shards: Shards, parts: list[Tensor], trained: list[bool]) -> None:
        self.shards = shards
        self.parts = parts
        self.trained = trained

    def gather(self, parts: list[Tensor], parameters: Iterable[Tensor]) -> None:
        """Copies the full tensors of all ranks' `parts`, which are laid out as the masters, into those of `parameters`
        that are trained. Collective."""
        for parameter, value in zip(self._chosen(parameters), self.shards.gather(parts), strict=True):
            parameter.copy_(value)

    def scatter(self, parameters: Iterable[Tensor]) -> list[Tensor]:
        """Returns this rank's shards of `parameters`, laid out as the masters."""
        copied = [part.detach().clone() for part in self.parts]
        self.shards.scatter(self._chosen(parameters), copied)
        return copied

    def _chosen(self, parameters: Iterable[Tensor]) -> list[Tensor]:
        return [parameter for parameter, trained in zip(parameters, self.trained, strict=True) if trained]
