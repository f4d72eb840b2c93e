"""Weights in channels_last, against contiguous ones."""

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vaescale import settings
from vaescale.interfaces import Batch
from vaescale.lifecycle import checkpoint
from vaescale.lifecycle import state as states
from vaescale.training.descent import Descent

FAMILIES = ("tiny", "tiny_vqgan", "tiny_vit", "tiny_kl", "tiny_vae", "tiny_hvae", "tiny_vdvae")
STEPS, HALF = 8, 4


def learner_of(family: str, channels_last: bool, *overrides: str) -> Descent:
    given = ["run=none", "data.root=none", f"channels_last={str(channels_last).lower()}", *overrides]
    config = settings.load(f"tests/integration/{family}.yaml", given)
    torch.manual_seed(0)
    return Descent(settings.build(config), config)


def train(learner: Descent, first: int, until: int) -> list[float]:
    blank = settings.blank(learner.config, learner.config.global_batch)
    losses = []
    for step in range(first, until):
        x = torch.randint(0, 256, blank.x.shape, generator=torch.Generator().manual_seed(step), dtype=torch.uint8)
        x = x.contiguous(memory_format=torch.channels_last)  # as the loader's
        losses.append(
            float(learner.step([Batch(x, blank.label, blank.attributes, torch.arange(len(x)))], step)["loss"])
        )
    return losses


def layouts(tensors: list[Tensor]) -> set[bool]:
    """Returns whether 4-D tensors are in channels_last. Those with one channel or 1×1 pixels are in both layouts."""
    found = set()
    for tensor in tensors:
        last, contiguous = tensor.is_contiguous(memory_format=torch.channels_last), tensor.is_contiguous()
        assert last or contiguous
        if last != contiguous:
            found.add(last)
    return found


def kept(learner: Descent) -> list[Tensor]:
    """Returns the 4-D tensors of weights, moments and averages."""
    moments = [value for state in learner.engine.optimizer.state.values() for value in state.values()]
    tensors = [*learner.model.parameters(), *moments, *learner.averaged.parameters()]
    return [tensor for tensor in tensors if tensor.ndim == 4]


def assert_close(one: Descent, other: Descent) -> None:
    for file, tensors in one.tensors().items():
        others = other.tensors()[file]
        for name, value in tensors.items():
            if ".k.bias" in name:  # shifts all scores of a query alike, so that its gradient is rounding alone
                continue
            torch.testing.assert_close(value, others[name], rtol=1e-5, atol=1e-5, msg=f"{file}: {name}")


@pytest.mark.parametrize("family", FAMILIES)
def test_both_layouts_train_alike(group: None, family: str) -> None:
    """Gradients, moments and averages get the layout of their weights."""
    learners = [learner_of(family, channels_last) for channels_last in (False, True)]
    losses = []
    for channels_last, learner in enumerate(learners):
        gradients: list[Tensor] = []
        for parameter in learner.model.parameters():
            if parameter.ndim == 4:
                parameter.register_post_accumulate_grad_hook(lambda p, seen=gradients: seen.append(p.grad))
        losses.append(train(learner, 0, STEPS))
        assert layouts(gradients) == layouts(kept(learner)) == {bool(channels_last)}
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert_close(*learners)


@pytest.mark.parametrize("family", ["tiny", "tiny_vae"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_checkpoint_is_the_same_and_continues_in_the_other_layout(
    group: None, tmp_path: Path, family: str, channels_last: bool
) -> None:
    one, other = learner_of(family, channels_last), learner_of(family, not channels_last)
    train(one, 0, HALF)
    saved = checkpoint.save(tmp_path, HALF, one.tensors(), one.state(), keep=1)
    for parameter in other.model.parameters():
        torch.nn.init.zeros_(parameter)
    other.load(partial(checkpoint.read_fitting, saved), states.read_checked(saved, list(one.state())))
    assert layouts(kept(other)) == {not channels_last}
    again = checkpoint.save(tmp_path / "again", HALF, other.tensors(), other.state(), keep=1)
    for file in ("model", "ema", "optimizer"):
        assert (saved / f"{file}.safetensors").read_bytes() == (again / f"{file}.safetensors").read_bytes()
    assert train(one, HALF, STEPS) == pytest.approx(train(other, HALF, STEPS), rel=1e-5)
    assert_close(one, other)
