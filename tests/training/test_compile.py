"""Training a compiled model is training that model."""

from functools import partialmethod

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from tests.training import duel
from vaescale import settings
from vaescale.config import ConfigError
from vaescale.training.adversarial import Adversarial
from vaescale.training.descent import Descent, require_compiler

FAMILIES = ["tiny", "tiny_vae", "tiny_hvae", "tiny_vdvae"]
FSQ = ["model.quantizer.kind=fsq", "model.quantizer.levels=[3,3,3,3]", "model.quantizer.codebook_size=81"]
AT_SCHEDULES = {"tiny_vae": ["model.beta_warmup_steps=3", "model.free_bits=0.1"]}  # the loss depends on the step


def trained(name: str, *overrides: str) -> tuple[list[float], dict[str, torch.Tensor], Descent, list[int]]:
    """Returns the losses, the weights and moments, the learner, and the number of graphs compiled after each step."""
    given = ["run=none", "data.root=none", "precision=fp32", *AT_SCHEDULES.get(name, []), *overrides]
    config = settings.load(f"tests/integration/{name}.yaml", given)
    torch.manual_seed(0)
    learner = Descent(settings.build(config), config)
    x = torch.randint(0, 256, settings.blank(config, 4).x.shape, dtype=torch.uint8)
    batch = settings.blank(config, 4)._replace(x=x, sample=torch.arange(4))
    losses, graphs = [], []
    for step in range(7):
        losses.append(float(learner.step([batch] * config.accumulation, step)["loss"]))
        graphs.append(counters["stats"]["unique_graphs"])
    return losses, {**learner.engine.weights(), **learner.engine.moments()}, learner, graphs


def check(name: str, *overrides: str) -> None:
    """Losses, weights and moments of seven steps, of which two keep no rows for a reset of codes. Only the first step
    compiles, because the watchdog waits longer for it than for others."""
    torch._dynamo.reset()
    counters.clear()
    eager, compiled = trained(name, *overrides), trained(name, "compile=true", *overrides)
    assert set(eager[3]) == {0}
    assert 0 < compiled[3][0] == compiled[3][-1] <= 2
    assert compiled[0] == pytest.approx(eager[0], rel=1e-5)
    assert compiled[1].keys() == eager[1].keys()
    for key, value in eager[1].items():
        if ".k.bias" in key:  # shifts all scores of a query alike, so that its gradient is rounding alone
            continue
        torch.testing.assert_close(compiled[1][key], value, rtol=1e-4, atol=1e-5, msg=key)
    model, averaged = compiled[2].model, compiled[2].averaged
    assert model._compiled_call_impl is not None
    assert averaged._compiled_call_impl is None
    assert type(model) is type(averaged)


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("tiny", ["accumulation=12"]),  # more than Dynamo's limit of compiling a function again
        ("tiny", [*FSQ, "accumulation=3"]),
        ("tiny_vqgan", []),
        ("tiny_vit", []),
        ("tiny_kl", []),
        ("tiny_vae", ["accumulation=3"]),
        ("tiny_hvae", []),
        ("tiny_diffusion", []),
        ("tiny_diffusion", ["model.weighting=flow", "model.net=unet", "model.width=32"]),
    ],
)
def test_a_captured_model_trains_as_before(
    group: None, name: str, overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without Inductor, which takes a minute and more: what is captured is executed operation by operation."""
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="aot_eager"))
    check(name, *overrides)


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "overrides"),
    [*((name, []) for name in FAMILIES), ("tiny", ["accumulation=2"]), ("tiny_vae", ["zero_stage=1"])],
)
def test_a_compiled_model_trains_as_before(group: None, name: str, overrides: list[str]) -> None:
    check(name, *overrides)


def test_a_missing_compiler_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match=r"^compile=true needs a C\+\+ compiler: install it, or set compile=false$"):
        require_compiler()


@pytest.mark.long
@pytest.mark.parametrize("way", ["constant", "adaptive", "r1"])
def test_a_compiled_critic_is_that_critic(group: None, way: str) -> None:
    """The critic has a graph for its own pass and one for the model's. With R1, which needs a second derivative, the
    model alone is compiled."""
    found = []
    for given in ("compile=false", "compile=true"):
        torch._dynamo.reset()
        counters.clear()
        learner = Adversarial(duel.model(), duel.load(0, 2, way, "hinge", 1, given))
        values = [learner.step(batches, step) for step, batches in enumerate(duel.batches(2))]
        found.append(torch.stack([torch.stack(list(one.values())) for one in values]))
    assert counters["stats"]["unique_graphs"] == (1 if way == "r1" else 3)
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-5)
