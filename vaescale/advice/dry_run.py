"""What a config would run, said before anything is run."""

from pathlib import Path

import torch
from torch import Tensor, nn

from .. import config as mechanics
from ..data.index import Index
from ..files import readable_size
from ..models.pca import PCA
from ..settings import Config, blank, build, micro_batch
from ..training.closed_form import moment_bytes, one_epoch


def describe(config: Config, world: int) -> str:
    """The resolved config, the batch arithmetic, parameters, and the memory of one rank. Raises DataError where the
    number of steps depends on that of the training images, and there are none."""
    micro = micro_batch(config, world)
    model = build(config)
    parameters = sum(p.numel() for p in model.parameters())
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    if isinstance(model, PCA):
        samples = len(Index(Path(config.data.root) / "train"))
        config = one_epoch(config, samples)
        run = f"{config.steps} steps, {samples} images, each once"
        # While they are solved: their sum over ranks, the covariance, and what the eigensolver needs (measured: 3.6).
        memory = {"moments": moment_bytes(model), "solution": 4 * moment_bytes(model), "buffers": buffers}
    else:
        run = f"{config.steps} steps, {config.steps * config.batch} images"
        memory = state_bytes(parameters, config, world) | {
            "buffers": 2 * buffers,  # the model's and the averaged copy's
            "activations": activation_bytes(model, config) * micro,
        }
    total = sum(memory.values())
    lines = [
        mechanics.to_yaml(config),
        f"batch       {micro} (micro) × {config.accumulation} (accumulation) × {world} (world) = {config.batch} images",
        f"run         {run}",
        f"parameters  {parameters / 1e6:.3f} M",
        f"memory      {readable_size(total)} a rank, estimated: "
        + ", ".join(f"{name} {readable_size(value)}" for name, value in memory.items()),
    ]
    return "\n".join(lines)


def state_bytes(parameters: int, config: Config, world: int) -> dict[str, float]:
    """fp32 weights, gradients, AdamW's two moments and the averaged weights; ZeRO divides the moments (1) and the
    gradients (2) by the world size and adds a sharded fp32 master copy. The fp16 engine halves weights and gradients.
    """
    shards = world if config.zero else 1
    width = 2 if config.precision == "fp16" and config.zero else 4
    return {
        "weights": width * parameters,
        "gradients": width * parameters / (world if config.zero == 2 else 1),
        "moments": 8 * parameters / shards,
        "masters": 4 * parameters / shards if config.zero else 0,
        "EMA": 4 * parameters,
    }


def activation_bytes(model: nn.Module, config: Config) -> int:
    """Bytes that one image keeps for the backward pass: counted in a real forward pass on the CPU."""
    held: dict[int, int] = {}

    def hold(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            storage = tensor.untyped_storage()
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.eval()  # a training forward would wait for an update that never comes
    with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
        model(blank(config, 1), 0)
    return sum(held.values()) // (1 if config.precision == "fp32" else 2)
