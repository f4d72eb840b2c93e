"""Counts the operations of torch that launch a kernel on a GPU."""

from collections import Counter
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

# Operations that only allocate or describe memory; views are recognised by their schema.
FREE = {
    "detach",
    "scalar_tensor",
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "_unsafe_view",
    "is_pinned",
}


class Kernels(TorchDispatchMode):
    """Counts the operations that launch a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.launched: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        schema = func._schema
        view = any(one.alias_info is not None and not one.alias_info.is_write for one in schema.returns)
        name = schema.name.removeprefix("aten::")
        if not view and name not in FREE and not name.startswith(("profiler::", "prim::")):
            self.launched[name] += 1
        return func(*args, **(kwargs or {}))

    def total(self) -> int:
        return sum(self.launched.values())
