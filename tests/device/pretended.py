"""A GPU that is pretended: tensors on it have shapes and a device, but no values.

`FakeTensorMode` computes shapes only. An operation that mixes devices, or reads a value on the host, raises an error.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from vaescale.interfaces import Batch

NAME = "gpu"
# At import, which pytest does before it runs any test: autograd counts the devices at the first backward pass.
torch.utils.backend_registration._setup_privateuseone_for_python_backend(NAME)
torch.gpu.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]  # type: ignore[attr-defined]


class HostCopy(RuntimeError):
    """A tensor was copied between host and device in a way that makes one wait for the other."""


@contextmanager
def pretended() -> Iterator[torch.device]:
    with pytest.MonkeyPatch.context() as patch, FakeTensorMode(), NoHostCopies():
        patch.setattr(Tensor, "pin_memory", pinned)
        patch.setattr(FakeTensorMode, "__deepcopy__", lambda self, memo: self, raising=False)  # copies share the mode
        yield torch.device(NAME)


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


def moved(module: nn.Module, place: torch.device) -> Any:
    """Move parameters and buffers to the pretended device, one by one: `Module.to` cannot swap fake tensors."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(on(parameter.detach(), place), parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = on(buffer, place)
        if distance := getattr(part, "distance", None):  # of nn.reconstruction, which `Module.to` moves, too
            distance.tensors = {name: on(tensor, place) for name, tensor in distance.tensors.items()}
    return module


def on(tensor: Tensor, place: torch.device) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=place)


def batch_on(batch: Batch, place: torch.device) -> Batch:
    return Batch(*(on(tensor, place) for tensor in batch))
