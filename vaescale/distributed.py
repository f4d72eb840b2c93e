"""Ranks, the process group and collectives. Collectives do nothing in a single process."""

import ctypes
import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # malloc.h
JOIN = 60.0  # seconds that a rank waits at least for the others to start
COLLECTIVE = 1800.0  # seconds that a rank waits at least in a collective: torch's default for gloo
TRACE = "nccl-rank-"  # name of a record of the last collectives, followed by the rank
LONG = 12  # times hang_timeout: the limit for anything but a step (validation, saving, the first step)


class Unjoined(RuntimeError):
    """Not all ranks joined the process group in time, or they cannot connect to one another."""

    exit_code = 1


class Place(NamedTuple):
    """The rank of this process, its rank on the node, and the number of ranks, as set by the launcher."""

    rank: int
    local_rank: int
    world: int


class Misplaced(ValueError):
    """The environment variables for the rank are invalid. The text is one sentence: what is wrong, and what to do."""

    exit_code = 2


def place() -> Place:
    """Returns this process's Place from RANK/LOCAL_RANK/WORLD_SIZE (deepspeed, torchrun) or srun's SLURM_* variables.

    `sbatch` sets SLURM_PROCID in the batch shell, too. So a job step is recognised by SLURM_STEP_ID and more than one
    task; otherwise there is one process. Raises Misplaced if variables are invalid, incomplete or those of an
    interactive shell: such a rank would wait for others that nobody starts.
    """
    env = os.environ
    if "RANK" in env or env.get("WORLD_SIZE", "1") != "1":
        advice = "start the ranks with deepspeed, torchrun or srun, or unset RANK and WORLD_SIZE for one process"
        return _place("RANK", "LOCAL_RANK", "WORLD_SIZE", advice)
    tasks = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS"
    if "SLURM_STEP_ID" in env and env.get(tasks, "1") != "1":
        advice = "start the ranks with launch/slurm/submit.py, or unset SLURM_STEP_ID for one process"
        if "SLURM_PTY_PORT" in env and sys.stdin is not None and sys.stdin.isatty():
            raise Misplaced(f"{tasks}={env[tasks]} belongs to an interactive shell (SLURM_PTY_PORT is set): {advice}")
        return _place("SLURM_PROCID", "SLURM_LOCALID", tasks, advice)
    return Place(0, 0, 1)


def _place(rank: str, local_rank: str, world: str, advice: str) -> Place:
    """Returns the Place from the variables of these names. Raises Misplaced, with `advice` in its text."""
    env = os.environ

    def count(name: str, least: int) -> int:
        if name not in env:
            given = next(other for other in (rank, world, "SLURM_STEP_ID") if other in env)
            raise Misplaced(f"{given}={env[given]} is set, but {name} is not: {advice}")
        if not re.fullmatch("[0-9]{1,9}", env[name]) or int(env[name]) < least:
            raise Misplaced(f"{name}={env[name]!r} is not a whole number of at least {least}: {advice}")
        return int(env[name])

    found = Place(count(rank, 0), count(local_rank, 0) if local_rank in env else 0, count(world, 1))
    if found.rank >= found.world:
        raise Misplaced(f"{rank}={found.rank} must be below {world}={found.world}: {advice}")
    if found.world > 1:
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if not env.get(name):
                raise Misplaced(f"{world}={found.world} is set, but {name}, where the ranks meet, is not: {advice}")
        if not 1 <= count("MASTER_PORT", 1) < 2**16:
            raise Misplaced(f"MASTER_PORT={env['MASTER_PORT']} is not a port number below 65536: {advice}")
    return found


def init(patience: float = 300.0, traces: Path | None = None) -> torch.device:
    """Joins the process group and returns this rank's device. A single process needs neither address nor port.

    patience: hang_timeout in seconds. A rank waits so long, and at least JOIN, for the others to start (0: COLLECTIVE),
    then raises Unjoined. Collectives of all groups time out after LONG times as long, and at least COLLECTIVE. Raises
    Misplaced.

    traces: the folder in which NCCL writes the last collectives of each rank when one has timed out.
    """
    rank, local_rank, world = place()
    cuda = torch.cuda.is_available()
    device = torch.device("cpu")
    if cuda:
        local_rank %= torch.cuda.device_count()  # under SLURM each task may see only its own device
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        _keep_memory()
    if dist.is_initialized():
        return device
    backend = "nccl" if cuda else "gloo"
    # DeepSpeed reads these variables, whatever the launcher is.
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(local_rank), WORLD_SIZE=str(world))
    if world == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    else:
        wait = timedelta(seconds=max(JOIN, patience or COLLECTIVE))
        store = _met(Place(rank, local_rank, world), wait)
        wait = timedelta(seconds=max(COLLECTIVE, LONG * patience))
        store.set_timeout(wait)
        # Groups made later, ours and DeepSpeed's, take their time-out from here: NCCL's would be 10 minutes.
        defaults = dist.distributed_c10d
        defaults.default_pg_timeout = defaults.default_pg_nccl_timeout = wait
        if traces:
            _record(traces)
        with _over_gloo(backend):
            dist.init_process_group(
                backend, store=store, rank=rank, world_size=world, timeout=wait, device_id=device if cuda else None
            )
    return device


def _record(folder: Path) -> None:
    """Has NCCL record the last collectives, and write them into this folder when one has timed out. Keeps what the user
    has set, also under the names of older versions of torch."""
    wanted = {
        ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"): "2000",  # collectives
        ("TORCH_NCCL_DUMP_ON_TIMEOUT",): "1",
        ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"): str(folder.absolute() / TRACE),
    }
    for names, value in wanted.items():
        if not any(name in os.environ for name in names):
            os.environ[names[0]] = value


def recorded() -> bytes:
    """Returns NCCL's record of this rank's last collectives, as torch's `torchfrtrace` reads it; b"" without NCCL."""
    if not dist.is_initialized() or dist.get_backend() != "nccl":
        return b""
    return bytes(torch._C._distributed_c10d._dump_nccl_trace())  # type: ignore[attr-defined]


def side_group() -> dist.ProcessGroup | None:
    """Returns a gloo group of all ranks, whose collectives no device waits for; None for a single process. Collective.
    Raises Unjoined if the ranks cannot connect.

    Each rank connects only to those it talks to, two for an all-reduce. A connection from each to each, gloo's default,
    would need W − 1 sockets on a rank, more than the usual limit of 1,024 files, and W² reads from rank 0's store.
    """
    if world() == 1:
        return None
    os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
    with _over_gloo("gloo"):
        group = dist.new_group(backend="gloo")
        dist.all_reduce(torch.zeros(1), group=group)  # connects now, where an error has a cause that can be named
    return group


@contextmanager
def _over_gloo(backend: str) -> Iterator[None]:
    """Raises Unjoined, which says what to set, if the block cannot connect ranks over gloo."""
    try:
        yield
    except RuntimeError as error:
        if backend != "gloo":
            raise
        reason = re.sub(r"^\[.*?\] ", "", str(error).partition("\n")[0])  # without the place in gloo's sources
        given = os.environ.get("GLOO_SOCKET_IFNAME")
        raise Unjoined(
            f"the ranks cannot connect over gloo ({reason}): set GLOO_SOCKET_IFNAME "
            f"({f'now {given!r}' if given else 'not set now'}) on each node to the network interface by which the "
            f"others reach it, one of those that `ip -br address` lists"
        ) from None


def _met(place: Place, wait: timedelta) -> dist.Store:
    """Returns the store at which all ranks meet. torch waits here for all of them. Raises Unjoined after `wait`."""
    try:
        store, _, _ = next(rendezvous("env://", timeout=wait))
    except dist.DistError as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        reason = str(error).partition("\n")[0]
        raise Unjoined(
            f"not all {place.world} ranks connected to {address} within {wait.total_seconds():.0f} s: one of them has "
            f"ended, or cannot reach that address ({reason}); read the output of the others, then start all again"
        ) from None
    return dist.PrefixStore("default_pg", store)


def finish() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def leave(code: int, together: bool) -> NoReturn:
    """Exits with this code. together: all ranks exit with it now.

    A rank that exits alone does not leave the process group: NCCL would wait for the others, which may be inside a
    collective, and the launcher would not learn that this rank has failed.
    """
    if together or world() == 1:
        finish()
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def sum_(tensor: Tensor) -> Tensor:
    """Sums over ranks, in place. All ranks get identical results."""
    if world() > 1:
        dist.all_reduce(tensor)
    return tensor


def begin_sum_(tensor: Tensor) -> dist.Work:
    """Begins to sum over ranks, in place. The result is there after `wait` of what this returns. Needs a group."""
    return dist.all_reduce(tensor, async_op=True)


def reduce_(tensor: Tensor) -> Tensor:
    """Sums over ranks, in place, on rank 0. The other ranks' values are undefined afterwards."""
    if world() > 1:
        dist.reduce(tensor, 0)
    return tensor


def broadcast_(tensor: Tensor) -> Tensor:
    """Copies rank 0's values to all ranks, in place."""
    if world() > 1:
        dist.broadcast(tensor, 0)
    return tensor


def tell(value: Any) -> Any:
    """Returns rank 0's value on all ranks. It is sent as JSON. Collective."""
    if world() == 1:
        return value
    text = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8, device=_device())
    length = broadcast_(torch.tensor(len(text), device=_device()))
    if rank():
        text = torch.empty(int(length), dtype=torch.uint8, device=_device())
    return json.loads(bytes(broadcast_(text).tolist()))


def gather(values: Tensor) -> Tensor:
    """Returns the values of all ranks on every rank: fp64 [W, …] on the CPU. Collective."""
    table = torch.zeros(world(), *values.shape, dtype=torch.float64, device=_device())
    table[rank()] = values
    return sum_(table).cpu()


def where(flag: bool) -> list[int]:
    """Returns the ranks whose flag is true. Collective."""
    return gather(torch.tensor(flag)).nonzero().flatten().tolist()


def barrier() -> None:
    if world() > 1:
        dist.barrier()


def _keep_memory() -> None:
    """Keeps freed memory in the process, as CUDA's allocator does.

    glibc returns large blocks to the system, so every step would page its activations in again: 18 % of a quickstart
    step's time.
    """
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(MMAP_THRESHOLD, 2**25)  # the highest value that it accepts
    mallopt(TRIM_THRESHOLD, 2**31 - 1)


def _device() -> torch.device:
    """Returns the device on which the backend needs its tensors."""
    cuda = dist.is_initialized() and dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
