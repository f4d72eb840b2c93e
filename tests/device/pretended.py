"""A GPU that is pretended: tensors on it have shapes and a device, but no values.

`FakeTensorMode` computes shapes only. An operation that mixes devices, or reads a value on the host, raises an error,
and `Kernels` counts the operations that a GPU would be given.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from vaescale.interfaces import Batch

NAME = "gpu"
# Operations that only allocate or describe memory; views are recognised by their schema.
FREE = {"detach", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "is_pinned"}


class HostCopy(RuntimeError):
    """A tensor was copied between host and device in a way that makes one wait for the other."""


@cache
def device() -> torch.device:
    torch.utils.backend_registration._setup_privateuseone_for_python_backend(NAME)
    torch.gpu.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]  # type: ignore[attr-defined]
    return torch.device(NAME)


@contextmanager
def pretended() -> Iterator[torch.device]:
    place = device()
    with pytest.MonkeyPatch.context() as patch, FakeTensorMode(), NoHostCopies():
        patch.setattr(Tensor, "pin_memory", pinned)
        patch.setattr(FakeTensorMode, "__deepcopy__", lambda self, memo: self, raising=False)  # copies share the mode
        yield place


def pinned(tensor: Tensor) -> Tensor:
    """Replaces `Tensor.pin_memory`, which needs a GPU."""
    tensor.pretended_pinned = True  # type: ignore[attr-defined]
    return tensor


class NoHostCopies(TorchDispatchMode):
    """Refuses copies between host and device, also those of a single number, unless they come from pinned memory."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func._schema.name in ("aten::_to_copy", "aten::copy_") and isinstance(result, Tensor):
            source = args[1] if func._schema.name == "aten::copy_" else args[0]
            free = hasattr(source, "pretended_pinned") and (kwargs or {}).get("non_blocking", False)
            if source.device.type != result.device.type and not free:
                raise HostCopy(f"{source.device.type} → {result.device.type}, {list(source.shape)} {source.dtype}")
        return result


class Kernels(TorchDispatchMode):
    """Counts the operations that launch a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.launched: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        schema = func._schema
        view = any(one.alias_info is not None and not one.alias_info.is_write for one in schema.returns)
        name = schema.name.removeprefix("aten::")
        if not view and name not in FREE and not name.startswith("profiler::"):
            self.launched[name] += 1
        return func(*args, **(kwargs or {}))

    def total(self) -> int:
        return sum(self.launched.values())


def moved(module: nn.Module, place: torch.device) -> Any:
    """Move parameters and buffers to the pretended device, one by one: `Module.to` cannot swap fake tensors."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(on(parameter.detach(), place), parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = on(buffer, place)
    return module


def on(tensor: Tensor, place: torch.device) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=place)


def batch_on(batch: Batch, place: torch.device) -> Batch:
    return Batch(*(on(tensor, place) for tensor in batch))
