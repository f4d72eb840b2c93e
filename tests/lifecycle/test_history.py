"""The config.yaml of a run compared with the current settings."""

import json
from pathlib import Path

import pytest
import yaml

from vaescale import config as mechanics
from vaescale import settings, trained
from vaescale.config import ConfigError
from vaescale.lifecycle import history

TINY = "tests/integration/tiny.yaml"


def load(run: Path, *overrides: str) -> settings.Config:
    return settings.load(TINY, [f"run={run}", "data.root=nowhere", *overrides])


def begun(run: Path, *overrides: str) -> dict[str, tuple[object, object]]:
    """Returns what has changed since `run` was started with tiny.yaml."""
    history.write(load(run), 0, {})
    return history.changes(history.saved_settings(run), load(run, *overrides))


@pytest.mark.parametrize(
    ("overrides", "changed"),
    [
        ([], {}),
        (["steps=24", "optimizer.lr=0.001"], {"steps": (12, 24), "optimizer.lr": (0.01, 0.001)}),
        (["optimizer.betas=[0.9,0.95]"], {"optimizer.betas": ([0.9, 0.99], [0.9, 0.95])}),
        (["deepspeed.wall_clock_breakdown=true"], {"deepspeed": ({}, {"wall_clock_breakdown": True})}),
        (["run=elsewhere"], {}),
    ],
)
def test_what_differs_is_found(tmp_path: Path, overrides: list[str], changed: dict[str, object]) -> None:
    found = begun(tmp_path, *overrides)
    assert found == changed
    history.check_changes(tmp_path, history.saved_settings(tmp_path), found)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.size=32", "data.size 16 → 32"),
        ("data.channels=1", "data.channels 3 → 1"),
        ("data.attributes=[age]", r"data.attributes \[\] → \['age'\]"),
        ("model.network.width=16", "model.network.width 8 → 16"),
        ("model.quantizer.dead_after=3", "model.quantizer.dead_after 2 → 3"),
    ],
)
def test_what_the_weights_depend_on_is_refused(tmp_path: Path, override: str, words: str) -> None:
    key = override.partition("=")[0]
    changed = begun(tmp_path, override, "steps=24")
    with pytest.raises(ConfigError, match=rf"with other settings \({words}\), which .* set {key}=.* again, or give"):
        history.check_changes(tmp_path, history.saved_settings(tmp_path), changed)


def test_a_critic_is_fixed_once_there_is_one(tmp_path: Path) -> None:
    wider = ["adversarial.weight=0.1", "adversarial.width=32"]
    changed = begun(tmp_path, *wider)
    before = history.saved_settings(tmp_path)
    assert before is not None
    history.check_changes(tmp_path, before, changed)
    with pytest.raises(ConfigError, match=r"adversarial\.width 64 → 32"):
        history.check_changes(tmp_path, {**before, "adversarial.weight": 0.1}, changed)


def test_the_file_of_a_perceptual_distance_may_move_and_memory_be_saved(tmp_path: Path) -> None:
    moved = {"model.reconstruction.perceptual.weights": ("/a/vgg", "/b/vgg")}
    history.check_changes(tmp_path, {"adversarial.weight": 0.0}, moved | begun(tmp_path, "model.checkpointing=true"))


def test_another_kind_of_model_is_one_change(tmp_path: Path) -> None:
    history.write(load(tmp_path), 0, {})
    other = settings.load("configs/vae_digits.yaml", [f"run={tmp_path}"])
    changed = history.changes(history.saved_settings(tmp_path), other)
    assert changed == {"model.kind": ("vqvae", "vae")}
    with pytest.raises(ConfigError, match=r"model\.kind vqvae → vae"):
        history.check_changes(tmp_path, history.saved_settings(tmp_path), changed)


def edit(run: Path, section: str, **values: object) -> None:
    """Edits keys of the run's config.yaml; None removes one."""
    path = run / "config.yaml"
    found = yaml.safe_load(path.read_text())
    part = found[section] if section else found
    for key, value in values.items():
        if value is None:
            del part[key]
        else:
            part[key] = value
    path.write_text(yaml.safe_dump(found))


def test_a_config_of_an_older_version(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Keys that it lacks have their defaults; those that are no more are named where it is read to evaluate."""
    history.write(load(tmp_path), 0, {})
    edit(tmp_path, "", hang_timeout=None, old_one=3)
    edit(tmp_path, "model", gone="x")
    assert history.changes(history.saved_settings(tmp_path), load(tmp_path)) == {}
    assert history.changes(history.saved_settings(tmp_path), load(tmp_path, "hang_timeout=5")) == {
        "hang_timeout": (300.0, 5.0)
    }

    config = trained.read_config(tmp_path, ["data.workers=3"])
    assert config.data.workers == 3
    assert mechanics.to_yaml(config.model) == mechanics.to_yaml(load(tmp_path).model)
    assert "settings that this version does not know: model.gone, old_one\n" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"unknown key data\.worker: did you mean data.workers"):
        trained.read_config(tmp_path, ["data.worker=3"])


@pytest.mark.parametrize("text", ["", "[", "model: {kind: nothing}", "model: 3", "steps: many\nmodel: {kind: vqvae}"])
def test_a_damaged_config_is_reported_and_not_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    assert history.saved_settings(tmp_path) is None
    (tmp_path / "config.yaml").write_text(text)
    assert history.saved_settings(tmp_path) is None
    assert "config.yaml cannot be compared with the current settings" in capsys.readouterr().out
    assert history.changes(None, load(tmp_path, "data.size=32")) == {}


def test_what_a_change_means_is_said(tmp_path: Path) -> None:
    changed = begun(tmp_path, "steps=24", "evaluation.count=50")
    said = "steps 12 → 24, evaluation.count 2000 → 50 (Fréchet distances before and after cannot be compared)"
    assert history.described(changed) == said


def test_each_change_is_kept(tmp_path: Path) -> None:
    history.write(load(tmp_path), 0, {})
    before = (tmp_path / "config.yaml").stat()
    history.write(load(tmp_path), 4, {})
    assert (tmp_path / "config.yaml").stat().st_ino == before.st_ino  # not even written
    for step, override in ((8, "steps=24"), (16, "steps=36")):
        config = load(tmp_path, override, "optimizer.betas=[0.9,0.95]")
        history.write(config, step, history.changes(history.saved_settings(tmp_path), config))
    lines = [json.loads(line) for line in (tmp_path / "config_history.jsonl").read_text().splitlines()]
    assert lines == [
        {"step": 8, "changes": {"steps": [12, 24], "optimizer.betas": [[0.9, 0.99], [0.9, 0.95]]}},
        {"step": 16, "changes": {"steps": [24, 36]}},
    ]
    assert settings.load(tmp_path / "config.yaml", []).steps == 36
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "config_history.jsonl"]
