from pathlib import Path

import pytest

from vaescale.config import ConfigError
from vaescale.lifecycle import history
from vaescale.settings import build, load, without_bound
from vaescale.training.descent import Descent

TINY = "tests/integration/tiny.yaml"
GIVEN = ["run=none", "data.root=none"]
DECODER = [*GIVEN, "init_from=other", "train=decoder"]


def test_it_is_said_that_losses_replace_a_likelihood() -> None:
    losses = [*GIVEN, "model.reconstruction.l1=1"]
    assert without_bound(load("tests/integration/tiny_kl.yaml", losses)).startswith("the run has no bits/dim, because")
    assert without_bound(load("tests/integration/tiny_kl.yaml", GIVEN)) == ""
    assert without_bound(load(TINY, losses)) == ""
    assert without_bound(load("tests/integration/tiny_vae.yaml", GIVEN)) == ""


def test_a_decoder_is_trained_alone_only_on_a_trained_encoder() -> None:
    with pytest.raises(ConfigError, match="train=decoder needs a trained encoder: set init_from to a run, or set"):
        load(TINY, [*GIVEN, "train=decoder"])


@pytest.mark.parametrize("family", ["tiny_vae", "tiny_hvae", "tiny_vdvae", "tiny_autoencoder"])
def test_other_families_have_no_decoder_to_train_alone(family: str) -> None:
    config = load(f"tests/integration/{family}.yaml", DECODER)
    with pytest.raises(ConfigError, match=r"train=decoder cannot be used with model\.kind=\w+, whose decoder cannot"):
        build(config)
    build(config, training=False)  # what evaluates a run does not ask what it trains


def test_a_run_does_not_change_what_it_trains(tmp_path: Path) -> None:
    """It does not have the optimiser state of the other weights."""
    history.write(load(TINY, [*DECODER, f"run={tmp_path}"]), 0, {})
    before = history.saved_settings(tmp_path)
    changed = history.changes(before, load(TINY, [f"run={tmp_path}", "data.root=none"]))
    with pytest.raises(ConfigError, match=r"has been trained with other settings \(train decoder → all\), which its"):
        history.check_changes(tmp_path, before, changed)


def test_frozen_parameters_take_no_memory_for_training() -> None:
    """At fp32 and ZeRO 0: 4 bytes for each weight and each average, 4 for each gradient and 8 for two moments."""
    plain, config = load(TINY, GIVEN), load(TINY, DECODER)
    count = sum(p.numel() for p in build(plain).parameters())
    model = build(config)
    trained = sum(p.numel() for p in model.decoder.parameters())
    assert 0 < trained < count
    found, whole = Descent.memory(model, config, 1), Descent.memory(build(plain), plain, 1)
    assert (found["weights"], found["EMA"]) == (whole["weights"], whole["EMA"]) == (4 * count, 4 * count)
    assert (whole["gradients"], whole["moments"]) == (4 * count, 8 * count)
    assert (found["gradients"], found["moments"]) == (4 * trained, 8 * trained)
    assert found["activations"] < whole["activations"]
