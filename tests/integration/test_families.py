"""The networks of today's tokenizers and the KL autoencoder under real DeepSpeed, alone and against a critic."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Start, finish
from tests.integration.conftest import forked, losses, training, written
from tests.integration.test_adversarial import CRITIC, same_critic
from tests.integration.test_resume import rewind, same_bits

HERE = Path(__file__).parent
PLAIN = {"model.reconstruction.l1": 1}  # of the KL autoencoder: in place of its likelihood
CASES: dict[str, tuple[str, int, dict[str, object]]] = {  # config, world, settings
    "vqgan": ("vqgan", 1, {}),
    "vqgan on two ranks": ("vqgan", 2, {"zero_stage": 2}),
    "vit": ("vit", 1, {}),
    "vit on two ranks": ("vit", 2, {"accumulation": 2}),
    "kl": ("kl", 1, {}),
    "kl on two ranks": ("kl", 2, {"zero_stage": 1}),
    "vqgan and a critic": ("vqgan", 2, {**CRITIC, "adversarial.adaptive": True}),
    "kl and a critic": ("kl", 1, {**CRITIC, **PLAIN}),
}
RESUMED = ("vqgan and a critic", "kl and a critic")


def job(folder: Path, name: str, pictures: Path) -> dict[str, Any]:
    config, world, settings = CASES[name]
    values = {"run": folder / name / "run", "data.root": pictures, **settings}
    return training(folder / name, HERE / f"tiny_{config}.yaml", written(values), world)


@pytest.fixture(scope="module")
def trained(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("families")
    forked(folder, [job(folder, name, pictures) for name in CASES])
    return folder


@pytest.mark.parametrize("name", ["vqgan", "vit", "kl"])
def test_one_loss_curve_at_any_number_of_ranks(trained: Path, name: str) -> None:
    alone, joined = (losses(trained / one / "run") for one in (name, f"{name} on two ranks"))
    assert joined == pytest.approx(alone, rel=1e-4)
    assert alone[-1] < alone[0]


def test_resumed_runs_end_in_the_same_bits(trained: Path, pictures: Path, tmp_path: Path) -> None:
    """From step 8, where the critics have learned for five steps, and their term has been in the loss for two."""
    for name in RESUMED:
        (tmp_path / name).mkdir()
        rewind(trained / name / "run", tmp_path / name / "run")
    forked(tmp_path, [job(tmp_path, name, pictures) for name in RESUMED])
    for name in RESUMED:
        same_bits(tmp_path / name / "run", trained / name / "run")
        same_critic(tmp_path / name / "run", trained / name / "run")


@pytest.mark.parametrize("name", ["vqgan", "kl", "kl and a critic"])
def test_evaluated_as_any_other_run(trained: Path, start: Start, name: str) -> None:
    """A KL autoencoder without a likelihood has no bits/dim. A VQGAN has those with a uniform prior."""
    run = trained / name / "run"
    code, output = finish(start([sys.executable, "launch/evaluate.py", "--run", str(run)]))
    assert code == 0, output
    found = json.loads((run / "evaluation.json").read_text())
    assert found["psnr"] > 0
    assert ("bits_per_dim" in found) == (name != "kl and a critic")
