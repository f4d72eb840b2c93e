"""A process group for tests that refuses what NCCL refuses, or what hangs it, though gloo does without.

Before each collective of the default group, all ranks compare what they are about to do: the operation, the shape and
the type. Where NCCL would hang or return garbage, every rank raises `Refused`. `destroy_process_group` returns only
once all ranks have called it: NCCL's may wait for ever for a rank that is inside a collective.

Not covered: tensors on the CPU, which gloo needs and NCCL refuses. tests/device finds them in a training step.
"""

import time
import zlib
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

# torch/csrc/distributed/c10d/NCCLUtils.cpp; NCCL knows no 16-bit integers.
TYPES = {
    *(torch.uint8, torch.int8, torch.int32, torch.int64, torch.bool),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
}
NAMES = (
    "all_reduce",
    "broadcast",
    "reduce",
    "all_gather_into_tensor",
    "reduce_scatter_tensor",
    "all_gather",
    "barrier",
)
PATIENCE = 600.0  # seconds that a rank waits for the others to destroy their groups


class Refused(RuntimeError):
    """NCCL would refuse this collective, or hang."""


def arm() -> None:
    """Replace the collectives of torch.distributed in this process. Collective."""
    if dist.get_world_size() == 1:
        return
    side = dist.new_group(backend="gloo")
    compare, destroy, store = dist.all_gather, dist.destroy_process_group, dist.distributed_c10d._get_default_store()

    def agreed(name: str, tensors: list[Tensor]) -> None:
        mine = f"{name} {[(tuple(one.shape), str(one.dtype)) for one in tensors]}"
        with _disable_current_modes():  # modes of a test see the collectives of the product alone
            hashes = [torch.empty(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
            compare(hashes, torch.tensor([zlib.crc32(mine.encode())]), group=side)
        if len({int(one) for one in hashes}) > 1:
            raise Refused(f"rank {dist.get_rank()} is at {mine}, another rank elsewhere")

    def strict(name: str) -> Any:
        whole = getattr(dist, name)

        def collective(*arguments: Any, **options: Any) -> Any:
            group = options.get("group") or next((one for one in arguments if isinstance(one, dist.ProcessGroup)), None)
            if group not in (None, dist.group.WORLD):
                return whole(*arguments, **options)
            tensors = [one for one in (*arguments, *options.values()) if isinstance(one, Tensor)]
            for one in tensors:
                if one.dtype not in TYPES:
                    raise Refused(f"{name} of {one.dtype}, which NCCL does not know")
                if not one.is_contiguous():
                    raise Refused(f"{name} of a tensor that is not contiguous: {tuple(one.shape)}, {one.stride()}")
            agreed(name, tensors)
            return whole(*arguments, **options)

        return collective

    def destroy_together(*arguments: Any, **options: Any) -> None:
        world, until = dist.get_world_size(), time.monotonic() + PATIENCE
        with suppress(dist.DistError):  # rank 0, which has the store, saw all leave and is gone
            store.add("leaving", 1)
            while store.add("leaving", 0) < world and time.monotonic() < until:
                time.sleep(0.02)
        destroy(*arguments, **options)

    for name in NAMES:
        setattr(dist, name, strict(name))
    dist.destroy_process_group = destroy_together
