"""Describes the hardware of a run: hosts, devices, backend, and all-reduce bandwidth."""

import socket
import time
from itertools import groupby
from statistics import median

import torch
import torch.distributed as dist

from .. import distributed
from ..files import readable_size

BYTES, ROUNDS = 2**24, 3  # size and number of timed all-reduces, after one that sets up the connections
NAME = 64  # bytes of a name that are exchanged; longer names are cut


def topology(device: torch.device) -> str:
    """Returns the description as one sentence. Collective."""
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    backend, world = dist.get_backend(), distributed.world()
    names = everyones(f"{socket.gethostname()} ({kind})")
    hosts = ", ".join(f"{len(list(ranks))} on {name}" for name, ranks in groupby(names))
    if world == 1:
        return f"topology: 1 rank, {hosts}, {backend}"
    seconds = all_reduce_seconds(device)
    speed = 2 * (world - 1) / world * BYTES / seconds
    return (
        f"topology: {world} ranks, {hosts}, {backend}; all-reduce of {readable_size(BYTES)}: {1000 * seconds:.1f} ms, "
        f"{readable_size(speed)}/s per rank"
    )


def all_reduce_seconds(device: torch.device) -> float:
    """Returns the median seconds of an all-reduce of BYTES on this rank. Collective."""
    tensor = torch.zeros(BYTES // 4, device=device)
    times = []
    for _ in range(1 + ROUNDS):
        distributed.barrier()
        begun = time.monotonic()
        distributed.sum_(tensor)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.monotonic() - begun)
    return median(times[1:])


def everyones(text: str) -> list[str]:
    """Returns every rank's text, cut to NAME bytes. Collective."""
    own = torch.zeros(NAME, dtype=torch.float64)
    data = text.encode()[:NAME]
    own[: len(data)] = torch.tensor(list(data), dtype=torch.float64)
    return [bytes(row).rstrip(b"\0").decode(errors="replace") for row in distributed.gather(own).byte().tolist()]
