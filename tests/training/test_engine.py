"""The DeepSpeed engine on one process, in this process."""

import dataclasses
import inspect
import math
import multiprocessing.queues
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime import torch_autocast
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils.tensor_fragment import tensor_fragment
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.integration.probe import broken
from vaescale import settings
from vaescale.config import ConfigError
from vaescale.interfaces import Batch
from vaescale.lifecycle import checkpoint
from vaescale.lifecycle import state as states
from vaescale.training.descent import Descent, learning_rate
from vaescale.training.ema import WeightEMA
from vaescale.training.engine import Engine, deepspeed_config
from vaescale.training.guard import NOT_FINITE, OVERFLOW, SPIKE, WHY

CONFIG = "tests/integration/tiny.yaml"
VAE = "tests/integration/tiny_vae.yaml"


def load(*overrides: str) -> settings.Config:
    return settings.load(CONFIG, ["run=none", "data.root=none", *overrides])


def batch() -> Batch:
    x = torch.randint(0, 256, (12, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return Batch(x, torch.zeros(12).long(), torch.zeros(12, 0), torch.arange(12))


def test_the_config_of_deepspeed(group: None) -> None:
    passed = {"zero_optimization": {"overlap_comm": True}, "dump_state": True}
    found = deepspeed_config("bf16", 2, 0.7, 3, 4, passed)
    assert found["dump_state"]
    assert found["zero_optimization"] == {"overlap_comm": True, "stage": 2}
    assert found["gradient_clipping"] == 0.7
    sizes = [
        found[key] for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    ]
    assert sizes == [12, 3, 4]
    assert deepspeed_config("fp32", 0, 1.0, 1, 1, {"zero_optimization": None})["zero_optimization"] == {"stage": 0}


def test_fp16_weights_without_hardware_are_one_sentence(group: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: False)
    with pytest.raises(
        ConfigError, match="precision=fp16 with zero_stage=1 needs hardware with fp16: use zero_stage=0"
    ):
        deepspeed_config("fp16", 1, 1.0, 1, 1, {})


def groups(net: nn.Module, vectors: bool) -> list[dict[str, Any]]:
    """Returns AdamW's groups with a weight decay of 0.1, by the names of the parameters."""
    if vectors:
        return [{"params": list(net.parameters()), "weight_decay": 0.1}]
    matrices = {name for name, p in net.named_parameters() if len(p.shape) >= 2}
    assert 0 < len(matrices) < len(list(net.parameters()))
    return [
        {"params": [p for name, p in net.named_parameters() if (name in matrices) == decays], "weight_decay": decay}
        for decays, decay in ((True, 0.1), (False, 0.0))
    ]


@pytest.mark.parametrize("vectors", [True, False])
def test_one_step_is_that_of_plain_torch(group: None, vectors: bool) -> None:
    """Ten steps against a hand-written loop with AdamW and clipping."""
    config = load("optimizer.grad_clip=0.5", "optimizer.weight_decay=0.1", f"optimizer.decay_vectors={vectors}")
    torch.manual_seed(0)
    ours, plain = settings.build(config), settings.build(config)
    plain.load_state_dict(ours.state_dict())
    learner = Descent(ours, config)
    adam = torch.optim.AdamW(groups(plain, vectors), betas=(0.9, 0.99), fused=True)
    for step in range(10):
        norm = learner.step([batch()], step)["gradient_norm"]
        lr = learning_rate(config.optimizer, step, config.steps)
        for parameters in adam.param_groups:
            parameters["lr"] = lr
        plain(batch(), step).loss.backward()
        expected = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        adam.step()
        adam.zero_grad()
        plain.update(step, lr)
        torch.testing.assert_close(norm, expected)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, msg=name)


@pytest.mark.parametrize("vectors", [True, False])
@pytest.mark.parametrize("zero", [0, 1, 2])
def test_two_engines_share_a_step_a_verdict_and_a_checkpoint(
    group: None, tmp_path: Path, zero: int, vectors: bool
) -> None:
    """Compares a generator and a critic, on two micro-batches per step, with plain torch, up to rounding. In the
    generator's pass the critic is called without its engine and frozen. In the third step the critic's gradient is not
    finite: neither network moves."""
    optimizer = settings.Optimizer(lr=1e-2, grad_clip=0.5, weight_decay=0.1, decay_vectors=vectors)

    def nets() -> tuple[nn.Module, nn.Module]:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6)), nn.Sequential(
            nn.Linear(6, 4), nn.Linear(4, 1)
        )

    def losses(
        maker: Any, judge: nn.Module, call: Any, x: torch.Tensor, bad: bool
    ) -> Iterator[tuple[str, torch.Tensor]]:
        judge.requires_grad_(False)
        y = maker(x)
        yield "maker", (y - x).square().mean() - judge(y).mean()
        judge.requires_grad_(True)
        yield "judge", (call(y.detach()) - call(x)).mean() * (float("nan") if bad else 1.0)

    data = torch.randn(6, 2, 5, 6, generator=torch.Generator().manual_seed(1))
    maker, judge = nets()
    engines = {
        "maker": Engine(maker, optimizer, "fp32", zero, 5, 2),
        "judge": Engine(judge, optimizer, "fp32", zero, 5, 2, name="critic"),
    }
    plain = dict(zip(engines, nets(), strict=True))
    adams = {
        name: torch.optim.AdamW(groups(net, vectors), 1e-2, optimizer.betas, fused=True) for name, net in plain.items()
    }
    no = torch.tensor(False)
    for step, micros in enumerate(data):
        for number, x in enumerate(micros):
            for name, loss in losses(engines["maker"].forward, judge, engines["judge"].forward, x, step == 2):
                engines[name].backward(loss)
            for _, loss in losses(plain["maker"], plain["judge"], plain["judge"], x, step == 2):
                (loss / 2).backward()
            if number == 0:
                for engine in engines.values():
                    engine.micro_step()
        norms = {name: engine.norm() for name, engine in engines.items()}
        refused = ~torch.stack(list(norms.values())).isfinite().all()
        assert bool(refused) == (step == 2)
        for name, engine in engines.items():
            engine.apply(1e-2, refused, no)
            norm = torch.nn.utils.clip_grad_norm_(plain[name].parameters(), 0.5)
            if step != 2:
                torch.testing.assert_close(norms[name], norm)
                adams[name].step()
            adams[name].zero_grad()
            for ours, theirs in zip(engine.module.parameters(), plain[name].parameters(), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)

    files = {name: tensors for engine in engines.values() for name, tensors in engine.tensors().items()}
    state = {name: value for engine in engines.values() for name, value in engine.state().items()}
    saved = checkpoint.save(tmp_path, len(data), files, state, keep=1)
    assert {path.stem for path in saved.glob("*.safetensors")} == {"model", "optimizer", "critic", "critic_optimizer"}
    read = states.read_checked(saved, state)
    assert (read["optimizer_steps"], read["critic_optimizer_steps"]) == (len(data) - 1, len(data) - 1)
    for net, (name, before) in zip(nets(), engines.items(), strict=True):
        for parameter in net.parameters():
            nn.init.zeros_(parameter)
        after = Engine(net, optimizer, "fp32", zero, 5, 2, name=before.name)
        after.load(partial(checkpoint.read_fitting, saved), read)
        for file, tensors in after.tensors().items():
            assert all(torch.equal(value, files[file][key]) for key, value in tensors.items()), (name, file)


@pytest.mark.parametrize("zero", [0, 1, 2])
def test_frozen_and_unused_parameters_are_saved_and_loaded(group: None, tmp_path: Path, zero: int) -> None:
    """A frozen parameter has no moments; one that never had a gradient has moments of zero."""
    optimizer, no = settings.Optimizer(), torch.tensor(False)

    def engine() -> Engine:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
        net.unused = nn.Parameter(torch.ones(5))
        net[1].requires_grad_(False)
        return Engine(net, optimizer, "fp32", zero)

    def train(engine: Engine) -> None:
        engine.backward(engine.forward(torch.ones(1, 4)).square().mean())
        engine.norm()
        engine.apply(1e-2, no, no)

    one = engine()
    for _ in range(2):
        train(one)
    assert one.moments().keys() == {
        f"{name}/{key}" for name in ("unused", "0.weight", "0.bias") for key in ("exp_avg", "exp_avg_sq")
    }
    assert not one.moments()["unused/exp_avg"].any()
    saved = checkpoint.save(tmp_path, 2, one.tensors(), one.state(), keep=1)
    other = engine()
    for parameter in other.module.parameters():
        nn.init.zeros_(parameter)
    other.load(partial(checkpoint.read_fitting, saved), one.state())
    for each in (one, other):
        train(each)
        assert each.optimizer_steps() == 3
    for file, tensors in one.tensors().items():
        assert all(torch.equal(value, other.tensors()[file][name]) for name, value in tensors.items()), file


@pytest.mark.parametrize("zero", [0, 1, 2])
def test_what_is_to_be_saved_does_not_change_with_training(group: None, zero: int) -> None:
    config = load(f"zero_stage={zero}")
    learner = Descent(settings.build(config), config)
    learner.step([batch()], 0)
    held = learner.tensors()
    before = {file: {name: value.clone() for name, value in tensors.items()} for file, tensors in held.items()}
    learner.step([batch()], 1)
    assert not torch.equal(learner.tensors()["ema"]["encoder.0.weight"], held["ema"]["encoder.0.weight"])
    for file, tensors in before.items():
        assert all(torch.equal(value, held[file][name]) for name, value in tensors.items()), file


def test_private_methods_of_libraries_that_we_use_exist() -> None:
    """Replacing a method that DeepSpeed no longer calls would raise no error."""
    zero = ["scaled_global_norm", "_update_scale", "_wait_for_offload_copies"]
    assert all(hasattr(DeepSpeedZeroOptimizer, name) for name in zero)
    called = inspect.getsource(DeepSpeedZeroOptimizer.step)
    assert "self.scaled_global_norm()" in called
    assert "self._update_scale(self.overflow)" in called
    mapping = {"lp_fragment_address", "hp_fragment_address"}  # of `_hp_mapping`, which test_gather.py covers
    assert mapping <= {field.name for field in dataclasses.fields(tensor_fragment)}
    assert hasattr(torch_autocast, "TORCH_AUTOCAST_INITIALIZED")
    assert "torch_autocast_z0_gradscaler" in inspect.getsource(DeepSpeedEngine)
    assert "self.enable_backward_allreduce" in inspect.getsource(DeepSpeedEngine)
    assert hasattr(torch.amp.GradScaler, "_found_inf_per_device")
    assert hasattr(multiprocessing.queues.Queue, "_on_queue_feeder_error")


def test_a_nan_gradient_moves_nothing(group: None) -> None:
    config = load()
    model = settings.build(config)
    learner = Descent(model, config)
    engine = learner.engine
    learner.step([batch()], 0)
    before = {name: value.clone() for name, value in [*model.named_parameters(), *engine.moments().items()]}
    model.decoder[0].bias.register_hook(lambda gradient: gradient * float("nan"))
    metrics = learner.step([batch()], 1)
    assert metrics["skipped"] == 1
    assert metrics["gradient_norm"] == 0
    assert engine.optimizer_steps() == 1
    for name, value in [*model.named_parameters(), *engine.moments().items()]:
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("fault", ["nan", "spike"])
@pytest.mark.parametrize(
    "overrides",
    [
        ["zero_stage=0"],
        ["zero_stage=1", "model.quantizer.learning=gradient"],
        ["zero_stage=2", "model.quantizer.metric=cosine", "model.quantizer.depth=2"],
        ["model.quantizer.kind=lfq", "model.quantizer.codebook_size=16"],
        ["vae"],
    ],
    ids=" ".join,
)
def test_a_skipped_step_leaves_no_trace(group: None, overrides: list[str], fault: str) -> None:
    """Weights, moments, and what is learned without the optimiser, codebooks, their use and the VAE's rates, go on
    with the bits of a run that never had the step; step 4 is one of a reset, too."""
    config = (
        settings.load(VAE, ["run=none", "data.root=none", "data.channels=3"])
        if overrides == ["vae"]
        else load(*overrides)
    )

    def train(bad: bool) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = settings.build(config)
        learner = Descent(model, config)
        norms: list[float] = []
        for step in range(8):
            if step == 4:
                if not bad:
                    continue
                model.forward = broken(model, fault, [4])
                learner.guard.load({"count": 100.0, "mean": math.log(norms[-1]), "variance": 0.0, "run": 0.0})
            norms.append(float(learner.step([batch()], step)["gradient_norm"]))
        if bad:
            (skip,) = learner.skips()
            assert skip.step == 4
            assert WHY[skip.why] == ("spike" if fault == "spike" else "not finite")
        return {**model.state_dict(), **learner.engine.moments()}

    one, twin = train(bad=True), train(bad=False)
    assert one.keys() == twin.keys()
    for name, value in one.items():
        assert torch.equal(value, twin[name]), name


class Waiting(TorchDispatchMode):
    """Fails if a value is read that the device has yet to compute."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        assert func.overloadpacket.__name__ not in ("_local_scalar_dense", "nonzero", "equal", "is_nonzero"), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_step_at_zero_0_does_not_synchronise(group: None, precision: str) -> None:
    config = load(f"precision={precision}")
    model = settings.build(config)
    learner = Descent(model, config)
    learner.step([batch()], 0)
    model.forward = broken(model, "nan", [2])
    with Waiting():
        for step in range(1, 6):  # a NaN and a reset are among them
            learner.step([batch()], step)
    with pytest.raises(AssertionError, match=r"_local_scalar_dense|nonzero"), Waiting():
        learner.skips()


@pytest.mark.parametrize("zero", [0, 1, 2])
def test_nothing_synchronises_the_device(group: None, monkeypatch: pytest.MonkeyPatch, zero: int) -> None:
    """DeepSpeed's timers do, by default, from the second step on."""
    calls = []
    monkeypatch.setattr(type(get_accelerator()), "synchronize", lambda self, *device: calls.append(device))
    config = load(f"zero_stage={zero}", "accumulation=2", "global_batch=24")
    learner = Descent(settings.build(config), config)
    for step in range(5):
        learner.step([batch(), batch()], step)
    assert not calls


@pytest.mark.parametrize("zero", [0, 1])
def test_a_loss_scale_falls_for_overflows_alone(group: None, monkeypatch: pytest.MonkeyPatch, zero: int) -> None:
    """Neither for a loss that is not finite nor for a spike; and not below 1, where an overflow is none any more and
    DeepSpeed would raise."""
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)
    config = load("precision=fp16", f"zero_stage={zero}", "steps=100")
    torch.manual_seed(0)
    model = settings.build(config)
    learner = Descent(model, config)
    engine = learner.engine

    def steps(count: int, first: int) -> list[int]:
        for step in range(first, first + count):
            learner.step([batch()], step)
        return [skip.why for skip in learner.skips()]

    assert set(steps(12, 0)) <= {OVERFLOW}
    learned, scale = engine.optimizer_steps(), engine.loss_scale()
    model.forward = broken(model, "nan", range(12, 32))
    assert steps(20, 12) == [NOT_FINITE] * 20
    learner.guard.load({"count": 100.0, "mean": -10.0, "variance": 0.0, "run": 20.0})
    assert steps(2, 32) == [SPIKE] * 2
    assert learner.guard.state()["run"] == 22
    assert engine.loss_scale() == scale

    hook = model.decoder[0].bias.register_hook(lambda gradient: gradient * torch.inf)
    forgiven = int(engine.scaler().get("cur_hysteresis", 1)) - 1  # by DeepSpeed
    halvings = int(math.log2(scale)) + forgiven
    assert steps(halvings + 3, 34) == [OVERFLOW] * halvings + [NOT_FINITE] * 3
    assert engine.loss_scale() == 1
    assert learner.guard.state()["run"] == 25
    assert engine.optimizer_steps() == learned
    hook.remove()
    learner.guard.load({"count": 0.0, "mean": 0.0, "variance": 0.0, "run": 25.0})
    assert steps(1, 80) == []
    assert engine.optimizer_steps() == learned + 1
    assert learner.guard.state()["run"] == 0


@pytest.mark.parametrize("zero", [1, 2])
def test_half_weights_are_averaged_as_their_masters(group: None, monkeypatch: pytest.MonkeyPatch, zero: int) -> None:
    """In fp32, skipped steps left out; half weights round away what a small step moves. And taken up from a
    checkpoint, the averages go on with the same bits."""
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)
    config = load(
        "precision=fp16",
        f"zero_stage={zero}",
        "steps=100",
        "optimizer.lr=1e-5",
        "optimizer.warmup_steps=0",
        "ema_decay=0.9",
        "optimizer.weight_decay=0.1",
        "optimizer.decay_vectors=false",  # two groups, hence two shards
    )
    torch.manual_seed(0)
    model = settings.build(config)
    learner = Descent(model, config)
    expected = {name: p.double().clone() for name, p in learner.averaged.named_parameters()}
    taken = 0
    for step in range(40):
        skipped = learner.step([batch()], step)["skipped"]
        taken += int(skipped == 0)
        if step == 30:
            learner.refresh()
            again = WeightEMA(settings.build(config), decay=0.9)
            again.model.load_state_dict(learner.averaged.state_dict())
            again.follow(learner.engine.masters())
        if step > 30:
            again.update(model, learner.buffers, step, skipped)
        if not skipped:
            weight = 1 - min(0.9, (1 + step) / (10 + step))
            for name, master in learner.engine.weights().items():
                if name in expected:
                    expected[name] += weight * (master.double() - expected[name])
    assert 5 < taken < 40
    for one in (learner, again):
        one.refresh()
    assert model.dtype == torch.float16
    off = 0.0
    for name, average in learner.averaged.named_parameters():
        torch.testing.assert_close(average.double(), expected[name], rtol=1e-6, atol=1e-8, msg=name)
        assert torch.equal(average, dict(again.model.named_parameters())[name])
        off += float((average - average.half()).abs().sum())
    assert off > 0  # they are no half weights


def test_an_engine_does_not_inherit_the_autocast_of_another(group: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed keeps it in a global: fp16 weights would get torch's GradScaler on top of their own and skip every
    step, halving the scale to its end."""
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)

    def losses(zero: int) -> list[float]:
        config = load("precision=fp16", f"zero_stage={zero}")
        torch.manual_seed(0)
        model = settings.build(config)
        learner = Descent(model, config)
        return [float(learner.step([batch()], step)["loss"]) for step in range(12)]

    first = losses(zero=1)
    losses(zero=0)
    assert losses(zero=1) == first
