"""Averages gradients over ranks during the backward pass, at ZeRO 0.

DeepSpeed 0.19.8 averages them afterwards, in one all-reduce, and has no setting for this. At stage 0 `overlap_comm` has
no effect.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import distributed

BUCKET_BYTES = 25 * 2**20  # a bucket with as many is full
# DeepSpeed's settings of how it reduces gradients. If one is passed, it does so itself, after the backward pass.
REDUCTION = {
    *("communication_data_type", "gradient_allreduce_op", "gradient_predivide_factor", "prescale_gradients"),
    "sparse_gradients",
}


def averages(zero: int, passed: dict[str, Any] | None) -> bool:
    """Returns whether Average averages the gradients, not DeepSpeed. passed: the settings given to DeepSpeed."""
    return not zero and not REDUCTION & (passed or {}).keys()


def bucketed(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Groups parameters into buckets, last parameters first."""
    buckets: list[list[nn.Parameter]] = []
    for parameter in reversed(parameters):
        bucket = buckets[-1] if buckets else []
        if not bucket or bucket[0].dtype != parameter.dtype or sum(p.nbytes for p in bucket) >= BUCKET_BYTES:
            buckets.append(bucket := [])
        bucket.append(parameter)
    return buckets


class Average:
    """Groups parameters into buckets, last parameters first, as the backward pass reaches them. Once a bucket has all
    gradients, its all-reduce begins.

    All ranks begin all buckets in the same order, whatever gradients they have: a parameter without one counts as zero,
    and holds back its bucket and the later ones to the end of the backward pass.
    """

    def __init__(self, parameters: list[nn.Parameter], last: Callable[[], bool]) -> None:
        """last: whether this is the backward pass of a step's last micro-batch; the others only accumulate."""
        self.last = last
        self.buckets = bucketed(parameters)
        for number, bucket in enumerate(self.buckets):
            bucket.reverse()  # the order of DeepSpeed, on which the rounding of sums over three or more ranks depends
            for parameter in bucket:
                parameter.register_post_accumulate_grad_hook(lambda _, number=number: self._have_one(number))
        self._begin_step()

    def _begin_step(self) -> None:
        self._missing = [len(bucket) for bucket in self.buckets]  # gradients
        self._running: list[tuple[list[Tensor], Tensor, dist.Work]] = []  # gradients, their copies, all-reduce

    def _have_one(self, number: int) -> None:
        if not self.last():
            return
        self._missing[number] -= 1
        while len(self._running) < len(self.buckets) and not self._missing[len(self._running)]:
            self._begin_next()

    @torch.no_grad()
    def _begin_next(self) -> None:
        bucket = self.buckets[len(self._running)]
        for parameter in bucket:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in bucket if parameter.grad is not None]
        joined = gradients[0].new_empty(sum(gradient.numel() for gradient in gradients))
        torch._foreach_copy_(_views(joined, gradients), gradients)
        self._running.append((gradients, joined, distributed.begin_sum_(joined)))

    @torch.no_grad()
    def finish(self) -> None:
        """Averages the remaining gradients. Called after the last backward pass of a step. Collective."""
        while len(self._running) < len(self.buckets):
            self._begin_next()
        for gradients, joined, work in self._running:
            work.wait()
            joined.mul_(1 / distributed.world())
            torch._foreach_copy_(gradients, _views(joined, gradients))
        self._begin_step()


def _views(joined: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    """Returns views of `joined` with the shapes and strides of `tensors`. With other strides each copy would need a
    kernel. A gradient has the strides of its parameter, the same on all ranks."""
    parts = joined.split([tensor.numel() for tensor in tensors])
    return [part.as_strided(tensor.shape, tensor.stride()) for part, tensor in zip(parts, tensors, strict=True)]
