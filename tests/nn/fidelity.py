"""torch-fidelity beside a torch without torchvision, and random weights in the format of the file that it reads."""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from vaescale.nn import inception
from vaescale.nn.frozen import random_weights


def published() -> dict[str, Tensor]:
    """Random weights in the format of the published file: torchvision's names, each batch norm on its own."""
    state = {"fc.bias": torch.zeros(inception.CLASSES)}
    generator = torch.Generator().manual_seed(1)
    for name, tensor in random_weights(inception.shapes(), 0).items():
        layer, _, part = name.rpartition(".")
        if layer == "fc":
            state[name] = tensor
        elif part == "weight":
            count = len(tensor)
            state |= {
                f"{layer}.conv.weight": tensor,
                f"{layer}.bn.weight": 1 + 0.2 * torch.randn(count, generator=generator),
                f"{layer}.bn.bias": 0.2 * torch.randn(count, generator=generator),
                f"{layer}.bn.running_mean": 0.2 * torch.randn(count, generator=generator),
                f"{layer}.bn.running_var": 0.5 + torch.rand(count, generator=generator),
                f"{layer}.bn.num_batches_tracked": torch.tensor(1),
            }
    return state


def torchvision() -> dict[str, ModuleType]:
    """Modules in place of torchvision, which does not import beside the CPU build of torch. The Inception of
    torch-fidelity does not use it, but other modules of the package import it."""
    names = ("", ".datasets", ".transforms", ".transforms.functional")
    modules: dict[str, Any] = {f"torchvision{name}": ModuleType(f"torchvision{name}") for name in names}
    modules["torchvision"].transforms = modules["torchvision.transforms"]
    modules["torchvision.transforms"].functional = modules["torchvision.transforms.functional"]
    for name in ("CIFAR10", "CIFAR100", "STL10"):
        setattr(modules["torchvision.datasets"], name, object)
    return modules
