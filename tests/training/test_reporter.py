"""The reports of a training, with a real model and a minimal learner."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vaescale import settings
from vaescale.advice import postmortem
from vaescale.interfaces import Batch, Model, Output
from vaescale.training.descent import grouped
from vaescale.training.flops import per_image
from vaescale.training.reporter import COMPARED, Reporter, compared
from vaescale.training.resume import Position

CONFIGS = Path(__file__).parent.parent / "integration"
BLIND = ["model.likelihood.learned_variance=false", "model.likelihood.variance=100", "model.network.hidden=8"]


class Descent:
    """The minimum of a learner that a reporter needs."""

    def report(self, means: dict[str, float], step: int) -> dict[str, float]:
        del step
        return {grouped(name): value for name, value in means.items()}


def trained(run: Path, config: str, overrides: list[str], steps: range) -> tuple[Reporter, list[str]]:
    """A reporter that has reported every 50 of these steps of Adam, on grey images, and what it said."""
    given = [f"run={run}", "data.root=data", "every.report=50", f"steps={steps.stop}", *overrides]
    loaded = settings.load(CONFIGS / config, given)
    torch.manual_seed(0)
    model = settings.build(loaded)
    position = Position(steps.start)
    learner: Any = Descent()
    reporter = Reporter(loaded, model, learner, position, torch.device("cpu"))
    said: list[str] = []
    reporter.console.say = said.append  # type: ignore[method-assign]
    reporter.open()
    blank = settings.blank(loaded, 32)
    x = torch.randint(0, 256, blank.x.shape[:2], dtype=torch.uint8)[..., None, None].expand(blank.x.shape)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for step in steps:
        output = model(Batch(x.contiguous(), blank.label, blank.attributes, 32 * step + torch.arange(32)), step)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        model.update(step, 1e-2)
        reporter.window.add({**output.metrics, "loss": output.loss.detach()})
        position.advance(32)
        if (step + 1) % 50 == 0:
            reporter.report(0.0)
    return reporter, said


def test_runs_are_compared_by_settings_that_exist() -> None:
    """Each setting exists in some model."""
    found: dict[str, Any] = {}
    for config in ("tiny_vdvae.yaml", "tiny_vae.yaml", "tiny.yaml"):
        found |= compared(settings.load(CONFIGS / config, ["run=run", "data.root=data"]))
    assert found.keys() == set(COMPARED)
    assert (found["model.quantizer.codebook_size"], found["model.beta"], found["optimizer.lr"]) == (24, 1.0, 0.01)


def test_damaged_samples_are_counted_once_there_are_any(tmp_path: Path) -> None:
    reporter, _ = trained(tmp_path, "tiny_vae.yaml", [], range(1, 1))
    reporter.position.damaged = {"not a picture": 0, "cut or corrupt": 0}
    for count in (0, 2):
        reporter.position.damaged["cut or corrupt"] = count
        reporter.position.advance(32)
        reporter.window.add({"loss": torch.ones(())})
        reporter.report(0.0)
    first, second = map(json.loads, (tmp_path / "metrics.jsonl").open())
    assert second.keys() - first.keys() == {"data/damaged_cut_or_corrupt"}
    assert second["data/damaged_cut_or_corrupt"] == 2
    reporter.close("")


def test_model_flops_are_reported_where_the_peak_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vaescale.training.reporter.peak", lambda config, device: 1e9)
    reporter, said = trained(tmp_path, "tiny_vae.yaml", ["global_batch=32"], range(50))
    reporter.close("")
    (line,) = map(json.loads, (tmp_path / "metrics.jsonl").open())
    assert line["perf/step_flops"] == 32 * per_image(reporter.config)
    assert line["perf/mfu"] == pytest.approx(line["perf/step_flops"] / line["perf/seconds_per_step"] / 1e9)
    assert f"MFU {line['perf/mfu']:.1%}" in said[0]


def test_a_collapse_is_reported_once_and_kept_for_the_doctor(tmp_path: Path) -> None:
    """Pixels of pure noise leave nothing to encode."""
    reporter, said = trained(tmp_path, "tiny_hvae.yaml", BLIND, range(400, 600))
    (sentence,) = (line for line in said if "latents" in line)
    assert sentence.startswith("latents have collapsed at step ")
    assert "lower it, or set model.likelihood.learned_variance=true" in sentence
    assert reporter.position.alarms == ["latents"]
    assert sentence in [finding.what for finding in postmortem.diagnose(tmp_path)]
    reporter.close("")

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    began = int(sentence.split("at step ")[1].partition(":")[0])
    assert {event.step: event.value for event in events.Scalars("latents/alarm")} == {
        step: float(step >= began) for step in (450, 500, 550, 600)
    }
    (text,) = events.Tensors("latents/alarm/text_summary")
    assert sentence in text.tensor_proto.string_val[0].decode()


def test_a_dead_critic_is_reported_once_and_kept_for_the_doctor(tmp_path: Path) -> None:
    given = ["adversarial={weight: 0.1, layers: 2, critic_start: 0, start: 0}", "adversarial.r1=3"]
    reporter, said = trained(tmp_path, "tiny_vae.yaml", given, range(1, 1))
    for _ in range(5):
        for name in ("loss", "mse", "critic/accuracy", "critic/real", "critic/fake"):
            reporter.window.names.append(name)
        reporter.window.sums = 100 * torch.tensor([1.0, 0.1, 0.5, 0.2, 0.2])
        reporter.window.steps = 100
        reporter.position.step += 100
        reporter.report(0.0)
    (sentence,) = (line for line in said if line.startswith("critic"))
    assert sentence == (
        "critic has gone dead at step 201: its logits of images and reconstructions differ by 0.0e+00. R1 holds it "
        "flat: lower adversarial.r1=3"
    )
    assert sentence in [finding.what for finding in postmortem.diagnose(tmp_path)]
    alarms = [json.loads(line)["critic/alarm"] for line in (tmp_path / "metrics.jsonl").open()]
    assert alarms == [0, 1, 1, 1, 1]
    reporter.close("")


class Bare(Model):
    """Trains as its inner model does, and can nothing else."""

    def __init__(self, inner: Model) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, batch: Batch, step: int) -> Output:
        return self.inner(batch, step)


def test_a_model_that_only_reports_a_rate_has_no_alarm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The alarm advises on settings that only a KLWeighted model has."""
    build = settings.build
    monkeypatch.setattr(settings, "build", lambda config: Bare(build(config)))
    reporter, said = trained(tmp_path, "tiny_hvae.yaml", BLIND, range(400, 600))
    reporter.close("")
    assert sum(line.startswith("step ") for line in said) == 4
    assert not any("latents" in line for line in said)
