"""The DeepSpeed engine on one process, in this process."""

import pytest
import torch
from deepspeed.accelerator import get_accelerator

from vaescale.config import ConfigError
from vaescale.interfaces import Batch
from vaescale.training import settings
from vaescale.training.engine import deepspeed_config
from vaescale.training.learner import Descent, learning_rate

CONFIG = "tests/integration/tiny.yaml"


def load(*overrides: str) -> settings.Config:
    return settings.load(CONFIG, ["run=none", "data.root=none", *overrides])


def batch() -> Batch:
    x = torch.randint(0, 256, (12, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return Batch(x, torch.zeros(12).long(), torch.zeros(12, 0), torch.arange(12))


def test_what_deepspeed_is_told(group: None) -> None:
    told = deepspeed_config(
        load(
            "zero=2", "optimizer.clip=0.7", "deepspeed.zero_optimization.overlap_comm=true", "deepspeed.dump_state=true"
        )
    )
    assert told["dump_state"]
    assert told["zero_optimization"] == {"overlap_comm": True, "stage": 2}
    assert told["gradient_clipping"] == 0.7
    assert deepspeed_config(load("deepspeed.zero_optimization=null"))["zero_optimization"] == {"stage": 0}


def test_fp16_weights_without_hardware_are_one_sentence(group: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: False)
    with pytest.raises(ConfigError, match="precision=fp16 with zero=1 needs hardware with fp16: take zero=0"):
        deepspeed_config(load("precision=fp16", "zero=1"))


def test_one_step_is_that_of_plain_torch(group: None) -> None:
    """Ten steps against a hand-written loop with AdamW and clipping."""
    config = load("optimizer.clip=0.5", "optimizer.weight_decay=0.1")
    torch.manual_seed(0)
    ours, plain = settings.build(config), settings.build(config)
    plain.load_state_dict(ours.state_dict())
    learner = Descent(ours, config)
    adam = torch.optim.AdamW(plain.parameters(), betas=(0.9, 0.99), weight_decay=0.1, fused=True)
    for step in range(10):
        norm = learner.step([batch()], step)["gradient_norm"]
        lr = adam.param_groups[0]["lr"] = learning_rate(config.optimizer, step, config.steps)
        plain(batch(), step).loss.backward()
        expected = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        adam.step()
        adam.zero_grad()
        plain.update(step, lr)
        torch.testing.assert_close(norm, expected)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, msg=name)


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
