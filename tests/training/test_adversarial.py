"""The learner with a critic on one process, against a loop of plain torch."""

import copy
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.device.test_step import NETWORK
from tests.training import duel
from tests.training.test_engine import Waiting
from vaescale import settings
from vaescale.advice.dry_run import dry_run
from vaescale.config import ConfigError
from vaescale.lifecycle import checkpoint
from vaescale.lifecycle import state as states
from vaescale.lifecycle.checkpoint import CheckpointError
from vaescale.nn.critic import build
from vaescale.training.adversarial import SEED, Adversarial
from vaescale.training.descent import Descent
from vaescale.training.guard import WHY, explained


@pytest.mark.parametrize(("zero", "accumulation", "way", "loss"), duel.CASES)
def test_four_updates_are_those_of_plain_torch(group: None, zero: int, accumulation: int, way: str, loss: str) -> None:
    """Bit for bit at ZeRO 0; the adaptive weight, and clipping at ZeRO 1 and 2, have another order of operations."""
    config = duel.load(zero, accumulation, way, loss)
    ours, weights = duel.learned(config, duel.batches(accumulation))
    theirs, expected = duel.plain(config, duel.batches(accumulation))
    assert weights == pytest.approx(expected, rel=1e-6)
    assert (len(set(weights)) > 2) == (way == "adaptive")
    exact = zero == 0 and way != "adaptive"
    assert max(duel.off(ours, theirs).values()) <= (0 if exact else 1e-6)


def learner(*more: str, way: str = "constant", zero: int = 0) -> Adversarial:
    return Adversarial(duel.model(), duel.load(zero, 1, way, "hinge", 1, *more))


def everything(learner: Adversarial) -> dict[str, Tensor]:
    """Returns copies of all that a step changes, except the guards' statistics."""
    nets = {"model": learner.model, "ema": learner.averaged, "critic": learner.critic}
    state = {f"{name}/{key}": value for name, net in nets.items() for key, value in net.state_dict().items()}
    for name, engine in (("model", learner.descent.engine), ("critic", learner.engine)):
        state |= {f"{name}/{key}": value for key, value in engine.moments().items()}
    return {name: value.clone() for name, value in state.items()}


@pytest.mark.parametrize("network", NETWORK)
@pytest.mark.parametrize("more", [[], ["reconstruction={l1: 1, perceptual: {weight: 1, trunk: random}}"]], ids=str)
def test_the_adaptive_weight_of_every_network(group: None, network: str, more: list[str], tmp_path: Path) -> None:
    """Against gradients through the whole model at its last layer, also with activation checkpointing."""
    small = [f"network.{one}" for one in [f"kind={network}", *NETWORK[network]]]
    given = [
        f"model.{one}" for one in ("kind=vqvae", "checkpointing=true", "quantizer.codebook_size=24", *small, *more)
    ]
    critic = "adversarial={weight: 0.5, adaptive: true, critic_start: 0, start: 0, width: 8, layers: 2}"
    fixed = ["run=none", "data.root=none", "data.size=16", "precision=fp32", "global_batch=4", critic]
    path = tmp_path / "config.yaml"
    path.write_text("model: {}\n")
    config = settings.load(path, [*fixed, *given])
    torch.manual_seed(0)
    model = settings.build(config)
    twin, judge = copy.deepcopy(model), build(config.adversarial, 3, config.seed + SEED)
    (batch,) = next(duel.batches(1))
    found = Adversarial(model, config).step([batch], 0)["adversarial/weight"]
    images = twin(batch, 0).reconstruction
    losses = twin.reconstruction_loss(images, batch.x), -judge(images).mean()
    pulls = [torch.autograd.grad(loss, twin.last_layer.weight, retain_graph=True)[0].norm() for loss in losses]
    torch.testing.assert_close(found, 0.5 * pulls[0] / (pulls[1] + 1e-4), rtol=1e-4, atol=0)


@pytest.mark.parametrize("zero", [0, 1, 2])
@pytest.mark.parametrize("net", ["model", "critic"])
@pytest.mark.parametrize("fault", ["nan", "spike"])
def test_if_either_gradient_is_refused_neither_network_moves(group: None, zero: int, net: str, fault: str) -> None:
    one = learner("steps=8", zero=zero)
    (batch,) = next(duel.batches(1))
    for step in (2, 3):
        one.step([batch], step)
    before = everything(one)
    guard, layer = (one.descent.guard, one.model.last) if net == "model" else (one.guard, one.critic.layers[0])
    usual = {"count": 100.0, "mean": math.log(1e-6 if fault == "spike" else 1.0), "variance": 0.0, "run": 0.0}
    guard.load(usual)
    bad = layer.bias.register_hook(lambda gradient: gradient * float("nan")) if fault == "nan" else None
    assert one.step([batch], 4)["skipped"] == 1
    after = everything(one)
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    (skip,) = one.skips()
    assert skip.step == 4
    assert WHY[skip.why] == ("critic" if net == "critic" else "spike" if fault == "spike" else "not finite")
    if net == "critic":
        assert explained(skip, 1).startswith("the critic's gradient norm is ")
    if bad:
        bad.remove()
    guard.load({**usual, "mean": 10.0})
    assert one.step([batch], 5)["skipped"] == 0
    changed = everything(one)
    assert not any(torch.equal(value, changed[name]) for name, value in after.items() if value.numel() > 9)


def test_a_loss_that_is_not_finite_is_not_blamed_on_the_critic(group: None) -> None:
    """Its gradient is not finite either, because it has seen the reconstructions."""
    one = learner("steps=8")
    (batch,) = next(duel.batches(1))
    with torch.no_grad():
        one.model.last.weight.fill_(torch.nan)
    assert one.step([batch], 4)["skipped"] == 1
    (skip,) = one.skips()
    assert (WHY[skip.why], skip.micros) == ("not finite", [0])
    assert explained(skip, 1) == "the loss of rank 0 is not finite"


def test_the_critic_alone_is_refused_before_the_start(group: None) -> None:
    """The model then moves as it would without a critic."""
    one = learner("adversarial.start=1")
    (batch,) = next(duel.batches(1))
    one.step([batch], 0)
    before = everything(one)
    one.critic.layers[0].bias.register_hook(lambda gradient: gradient * float("nan"))
    values = one.step([batch], 1)
    assert (values["skipped"], values["critic/skipped"]) == (0, 1)
    after = everything(one)
    for name, value in before.items():
        assert torch.equal(value, after[name]) == name.startswith("critic"), name


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("way", duel.WAYS)
def test_a_step_at_zero_0_does_not_synchronise(group: None, way: str, precision: str) -> None:
    one = learner(f"precision={precision}", "adversarial.augment=true", way=way)
    steps = list(duel.batches(1))
    one.step(steps[0], 0)
    with Waiting():
        values = [one.step(batches, step) for step, batches in enumerate(steps[1:], start=1)]
    assert all(torch.stack(list(found.values())).isfinite().all() for found in values)
    assert not one.skips()


def test_bf16_is_autocast_and_near_fp32(group: None) -> None:
    """Both networks compute in bf16, and their weights stay in fp32."""
    seen = []
    found = {}
    for precision in ("fp32", "bf16"):
        one = learner(f"precision={precision}", way="adaptive")
        for layer in (one.critic.layers[0], one.model.last):
            layer.register_forward_hook(lambda layer, given, output: seen.append(output.dtype))
        found[precision] = [one.step(batches, step) for step, batches in enumerate(duel.batches(1))][1]
        assert all(p.dtype == torch.float32 for net in (one.model, one.critic) for p in net.parameters())
        assert set(seen) == {torch.bfloat16 if precision == "bf16" else torch.float32}
        seen.clear()
    for name, value in found["fp32"].items():
        torch.testing.assert_close(found["bf16"][name], value, rtol=0.1, atol=0.02, msg=name)


def test_channels_last_gives_the_same_losses(group: None) -> None:
    rows = []
    for given in ("channels_last=false", "channels_last=true"):
        one = learner(given, way="adaptive")
        values = [one.step(batches, step) for step, batches in enumerate(duel.batches(1))]
        rows.append(torch.stack([torch.stack(list(found.values())) for found in values]))
    assert one.critic.layers[2].weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(*rows, rtol=1e-3, atol=1e-5)


def test_a_report_is_over_the_steps_that_have_a_critic(group: None) -> None:
    one = learner("adversarial.critic_start=0.25", "adversarial.start=0.75")
    values = [one.step(batches, step) for step, batches in enumerate(duel.batches(1))]
    assert all(list(found) == list(values[0]) for found in values)
    means = {name: float(sum(found[name] for found in values)) / 4 for name in values[0]}
    report = one.report(means, 4)
    for name in ("critic/loss", "critic/accuracy", "critic/gradient_norm"):
        assert report[name] == pytest.approx(float(sum(found[name] for found in values[1:])) / 3)
    assert report["adversarial/loss"] == pytest.approx(float(values[3]["adversarial/loss"]))
    assert report["adversarial/weight"] == pytest.approx(0.5)
    assert report["optim/skipped_critic"] == 0
    later = learner("steps=100", "adversarial.critic_start=0.5", "adversarial.start=0.5")
    report = later.report({name: float(value) for name, value in later.step(next(duel.batches(1)), 0).items()}, 1)
    assert not [name for name in report if name.startswith(("critic/", "adversarial/"))]


@pytest.mark.parametrize("zero", [0, 2])
def test_a_checkpoint_holds_both_networks(group: None, tmp_path: Path, zero: int) -> None:
    one, other = learner(zero=zero), learner(zero=zero)
    steps = list(duel.batches(1))
    for step in (0, 1):
        one.step(steps[step], step)
    saved = checkpoint.save(tmp_path, 2, one.tensors(), one.state(), keep=1)
    files = {path.stem for path in saved.glob("*.safetensors")}
    assert files == {"model", "optimizer", "ema", "critic", "critic_optimizer"}
    assert one.size() == sum(value.nbytes for tensors in one.tensors().values() for value in tensors.values())
    other.load(partial(checkpoint.read_fitting, saved), states.read_checked(saved, other.state()))
    for step in (2, 3):
        for each in (one, other):
            each.step(steps[step], step)
    assert one.state() == other.state()
    after = everything(other)
    assert all(torch.equal(value, after[name]) for name, value in everything(one).items())


def test_a_new_run_may_bring_a_critic_or_begin_one(group: None, tmp_path: Path) -> None:
    one = learner()
    for step, batches in enumerate(duel.batches(1)):
        one.step(batches, step)
    saved = checkpoint.save(tmp_path / "with", 4, one.tensors(), one.state(), keep=1)
    brought = learner()
    brought.begin(partial(checkpoint.read_fitting, saved))
    assert all(torch.equal(value, one.critic.state_dict()[name]) for name, value in brought.critic.state_dict().items())
    assert brought.engine.optimizer_steps() == 0
    first = learner().critic.state_dict()
    plain = one.descent
    saved = checkpoint.save(tmp_path / "without", 4, plain.tensors(), plain.state(), keep=1)
    for begin in ("init_from", "resume"):
        begun, read = learner(), partial(checkpoint.read_fitting, saved)
        begun.begin(read) if begin == "init_from" else begun.load(read, states.read_checked(saved, begun.state()))
        assert torch.equal(begun.model.last.weight, one.model.last.weight)
        assert all(torch.equal(value, first[name]) for name, value in begun.critic.state_dict().items())


@pytest.mark.parametrize("given", ["adversarial.width=16", "adversarial.layers=1"])
def test_another_critic_is_refused_by_the_settings_that_decide_it(group: None, tmp_path: Path, given: str) -> None:
    one = learner()
    saved = checkpoint.save(tmp_path, 1, one.tensors(), one.state(), keep=1)
    words = (
        r"critic\.safetensors does not fit the critic: .*; restore adversarial\.width and adversarial\.layers, or use"
    )
    with pytest.raises(CheckpointError, match=words):
        learner(given).begin(partial(checkpoint.read_fitting, saved))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["precision=fp16"], "precision=fp16 cannot be used with adversarial.weight"),
        (["adversarial.start=0.1"], "adversarial.critic_start=0.2 must not be larger than adversarial.start=0.1"),
        (
            ["adversarial.layers=3"],
            "data.size=16 is too small for a critic with adversarial.layers=3, which needs 24 px",
        ),
        (
            ["model={kind: autoencoder}", "adversarial.adaptive=true"],
            "adversarial.adaptive=true cannot be used with model.kind=autoencoder",
        ),
        (["model={kind: vae}"], "adversarial.weight=0.1 cannot be used with model.kind=vae"),
        (["model={kind: pca}"], "adversarial.weight=0.1 cannot be used with model.kind=pca"),
    ],
)
def test_settings_that_cannot_work_are_one_sentence(given: list[str], message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("model: {kind: vqvae}\ndata: {size: 16}\nadversarial: {weight: 0.1, layers: 2}\n")
    with pytest.raises(ConfigError, match=message):
        settings.check(settings.load(path, given), 1)


def test_a_dry_run_counts_the_critic() -> None:
    config = duel.load(0, 1, "constant", "hinge")
    critic = sum(p.numel() for p in build(config.adversarial, 3, 0).parameters())
    memory = Adversarial.memory(settings.build(config), config, 1)
    plain = Descent.memory(settings.build(config), config, 1)
    assert memory["critic"] == 16 * critic  # weights, gradients, two moments
    assert memory["critic's activations"] > 0
    assert {name: memory[name] for name in plain} == plain
    assert "critic's activations" in dry_run(config, 1)
