import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vaescale import config as mechanics
from vaescale import settings
from vaescale.config import ConfigError
from vaescale.data import DataError
from vaescale.data.stream import Config, TrainSlices
from vaescale.lifecycle import checkpoint
from vaescale.training import resume


class Kept:
    """A learner with nothing to load."""

    def load(self, read: Any, state: dict[str, Any]) -> None: ...

    def state(self) -> dict[str, Any]:
        return {}


@pytest.mark.parametrize(("written", "followed"), [({}, 1), ({"version": 1}, 1), ({"version": 2}, 2)])
def test_a_begun_run_keeps_its_order(pictures: Path, tmp_path: Path, written: dict[str, int], followed: int) -> None:
    """A checkpoint from before versions names none, so its run continues with version 1."""
    slices, config = begun(pictures, tmp_path, written)
    position = resume.resume(config, Kept(), slices)  # type: ignore[arg-type]
    assert (position.images, position.noise) == (32, 1)
    assert slices.order.version == followed
    assert resume.order(config, slices)["version"] == followed


def test_a_new_run_takes_the_newest_order(pictures: Path, tmp_path: Path) -> None:
    slices, config = begun(pictures, tmp_path, {})
    config.run = str(tmp_path / "other")
    assert resume.resume(config, Kept(), slices).noise == 2  # type: ignore[arg-type]
    assert resume.order(config, slices)["version"] == 2


def test_an_order_of_a_later_version_is_refused(pictures: Path, tmp_path: Path) -> None:
    slices, config = begun(pictures, tmp_path, {"version": 3})
    with pytest.raises(DataError, match="uses version 3 of the sample order"):
        resume.resume(config, Kept(), slices)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"data": "0"},
            r"the training images are not those that .* began with \(index \w+, was 0\): restore data\.root",
        ),
        ({"seed": 8}, r"was started with seed=8 and now has 7, which would change the order of samples: set it back"),
    ],
)
def test_another_order_is_refused(pictures: Path, tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    slices, config = begun(pictures, tmp_path, changed)
    with pytest.raises(ConfigError, match=message):
        resume.resume(config, Kept(), slices)  # type: ignore[arg-type]


def test_an_imported_run_is_not_gone_on_with(pictures: Path, tmp_path: Path) -> None:
    slices, config = begun(pictures, tmp_path, {"imported": "taming"})
    with pytest.raises(ConfigError, match=r"was imported, not trained, .*: give another run=… with init_from="):
        resume.resume(config, Kept(), slices)  # type: ignore[arg-type]


def begun(pictures: Path, run: Path, version: dict[str, Any]) -> tuple[TrainSlices, Any]:
    """Returns (slices, config), and writes a checkpoint of them to `run`, with `version` added to its order."""
    data = Config(root=str(pictures), size=16, columns=8, workers=0)
    slices = TrainSlices(data, seed=7)
    order = {"seed": 7, "data.columns": 8, "data": slices.samples.index.fingerprint(), **version}
    state = {"step": 2, "images": 32, "damaged": {}, "alarms": [], "validation_due": False, "order": order}
    checkpoint.save(run / "checkpoints", 2, {"model": {"weight": torch.ones(1)}}, state, keep=1)
    return slices, SimpleNamespace(run=str(run), init_from="", seed=7, data=data)


BASE = {"kind": "vqvae", "network": {"kind": "conv", "width": 16}, "quantizer": {"codebook_size": 16, "dim": 4}}


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ("model.quantizer.metric=cosine", r"model\.quantizer\.metric=cosine is not that of .*step-\d+, euclidean"),
        ("model.quantizer.codebook_size=32", r"model\.quantizer\.codebook_size=32 is not that of .*, 16, so"),
        ("model.network.width=32", r"model\.network\.width=32 .*: set model\.network\.width=16, or set train=all"),
        ("model.network.residual_blocks=1", r"model\.network\.residual_blocks=1 is not that"),
        ("data.size=32", r"data\.size=32 is not that"),
        ("data.channels=1", r"data\.channels=1 is not that"),
        ("model.kind=kl", r"model\.kind=kl is not that of .*, vqvae, so"),
        ("model.quantizer.beta=0.5", ""),
    ],
)
def test_a_decoder_alone_needs_the_settings_of_its_latents(tmp_path: Path, given: str, named: str) -> None:
    """Also where weights of the same shapes would be read without a word. Other settings are free."""
    run = tmp_path / "run"
    run.mkdir()
    section: dict[str, Any] = {"model": BASE, "data": {"size": 16}, "version": settings.VERSION}
    (run / mechanics.FILE).write_text(json.dumps(section))
    checkpoint.save(run / "checkpoints", 2, {}, {"step": 2}, keep=1)
    if given == "model.kind=kl":
        section["model"] = {"kind": "kl"}
    other = tmp_path / "other.yaml"
    other.write_text(json.dumps(section))
    overrides = [] if given == "model.kind=kl" else [given]
    config = settings.load(other, [f"init_from={run}", "train=decoder", *overrides])
    read: list[str] = []
    averaged = torch.nn.Linear(1, 1)
    averaged.latents_of = None  # type: ignore[assignment]
    learner = SimpleNamespace(begin=lambda _: read.append("weights"), averaged=averaged)
    if named:
        with pytest.raises(ConfigError, match=named):
            resume.begin(config, learner)  # type: ignore[arg-type]
        assert not read
    else:
        resume.begin(config, learner)  # type: ignore[arg-type]
        assert read
