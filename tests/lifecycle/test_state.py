"""state.json: older versions are read with their defaults, and invalid content is refused in one sentence."""

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from vaescale.lifecycle import checkpoint, state
from vaescale.lifecycle.checkpoint import CheckpointError
from vaescale.training.guard import Guard
from vaescale.training.resume import Position

# As version 1 wrote it, at commit 8439c85.
OLD: dict[str, Any] = {
    "step": 4,
    "images": 48,
    "damaged": {"cut or corrupt": 0},
    "alarms": [],
    "optimizer_steps": 4,
    "scaler": {},
    "skipped": {"not finite": 0, "spike": 0, "overflow": 0},
    "gradient_norms": {"count": 4.0, "mean": -1.5, "variance": 0.2, "run": 0.0, "share": 0.0},
    "order": {"seed": 0, "data.columns": 8, "data": "ba054536"},
}
SINCE = {"batch": 12, "step": 0, "images": 0}
ABSENT = {"critic_optimizer_steps": None, "latents": None}  # of a run without a critic and with its own encoder
NEW = {**OLD, "version": 3, "noise": 2, "validation_due": True, "since": SINCE, "critic_optimizer_steps": 1}
NEW["latents"] = "0123456789abcdef"


def write(run: Path, values: Any) -> Path:
    return checkpoint.save(run / "checkpoints", 4, {"model": {}}, values, keep=1)


def test_a_state_of_version_1_is_read_with_its_defaults(tmp_path: Path) -> None:
    found = state.read_checked(write(tmp_path, OLD), state.KEYS)
    assert found == {**OLD, "version": 1, "noise": 1, "validation_due": False, "since": None, **ABSENT}


def test_a_current_state_is_read_unchanged(tmp_path: Path) -> None:
    assert state.read_checked(write(tmp_path, NEW), state.KEYS) == NEW
    second = {**OLD, "version": 2, "owed": True, "since": SINCE}
    assert state.read_checked(write(tmp_path / "2", second), state.KEYS) == {
        **NEW,
        **ABSENT,
        "version": 2,
        "noise": 1,
    }
    guard = Guard(10.0, torch.device("cpu"))
    assert state.KEYS["gradient_norms"].sound(guard.state())


ODD: dict[str, tuple[dict[str, Any], str]] = {
    "negative step": ({"step": -1}, "step is -1 instead of a whole number"),
    "a step that is no number": ({"step": "4"}, "step is 4 instead of a whole number"),
    "a step in quarters": ({"step": 4.25}, "step is 4.25"),
    "a true step": ({"step": True}, "step is True"),
    "a huge step": ({"step": 2**62}, "step is 4611686018427387904"),
    "a list": ({"images": [48]}, r"images is \[48\]"),
    "other images": ({"images": 47}, "47 images do not match step 4"),
    "fewer images than steps": ({"images": 3, "since": None}, "3 images do not match step 4"),
    "no images": ({"images": 0, "since": None}, "0 images do not match step 4"),
    "a later beginning": ({"since": {"batch": 12, "step": 8, "images": 96}}, "48 images do not match step 4"),
    "a beginning without a batch": ({"since": {"step": 0, "images": 0}}, "since is .* instead of counts of batch"),
    "damage": ({"damaged": {"cut or corrupt": -1}}, "damaged is"),
    "a cause of its own": ({"damaged": {"x\x1b[31m": 1}}, "damaged is"),
    "steps without images": ({"images": 0, "since": {"batch": 0, "step": 0, "images": 0}}, "since is"),
    "alarms": ({"alarms": [3]}, "alarms is"),
    "validation due": ({"validation_due": "no"}, "validation_due is no instead of true or false"),
    "a critic's steps": ({"critic_optimizer_steps": -1}, "critic_optimizer_steps is -1 instead of a whole number"),
    "optimizer steps": ({"optimizer_steps": 5}, "the optimizer cannot have taken 5 steps by step 4"),
    "a scale of 0": ({"scaler": {"scale": 0}}, "scaler is"),
    "a scale in words": ({"scaler": {"cur_scale": "big"}}, "scaler is"),
    "skipped": ({"skipped": ["spike"]}, "skipped is"),
    "a norm without a name": ({"gradient_norms": {"judge": 1.0}}, "gradient_norms is"),
    "latents": ({"latents": "x" * 16}, "latents is x{16} instead of a hash of 16 digits, or null"),
    "a negative variance": ({"gradient_norms": {"variance": -1.0}}, "gradient_norms is"),
    "the order": ({"order": [0]}, "order is"),
    "a later version": ({"version": 4}, r"by a later version of vaescale \(state 4; this one reads 1 to 3\)"),
    "a version that is none": ({"version": None}, "version is None instead of a whole number"),
    "an escape": ({"alarms": "\x1b[31m"}, r"alarms is \\x1b\[31m instead"),
}


@pytest.mark.parametrize("odd", ODD)
def test_invalid_values_are_named(tmp_path: Path, odd: str) -> None:
    values, words = ODD[odd]
    with pytest.raises(CheckpointError, match=rf"state\.json.*{words}.*use another checkpoint: write its name into"):
        state.read_checked(write(tmp_path, {**NEW, **values}), state.KEYS)


@pytest.mark.parametrize("key", [key for key, value in state.KEYS.items() if value.default is ...])
def test_required_keys_must_exist(tmp_path: Path, key: str) -> None:
    saved = write(tmp_path, {name: value for name, value in NEW.items() if name != key})
    with pytest.raises(CheckpointError, match=rf"state\.json has no {key}: use another"):
        state.read_checked(saved, state.KEYS)


@pytest.mark.parametrize("text", [b"[]", b"{", b"\xff", b'{"step": NaN}', b"[" * 10**6, b""])
def test_a_file_that_is_no_state(tmp_path: Path, text: bytes) -> None:
    saved = write(tmp_path, NEW)
    (saved / "state.json").write_bytes(text)
    with pytest.raises(CheckpointError, match=r"state\.json cannot be read"):
        state.read_checked(saved, state.KEYS)


def test_a_position_knows_how_its_images_came(tmp_path: Path) -> None:
    """Also if the batch size has changed once or more, and from a state of version 1."""
    fresh, old = Position(), Position(step=4, images=50)
    for position, first in ((fresh, 0), (old, 4)):
        images = position.images
        for number, batch in enumerate((12, 12, 20, 8, 8), start=first):
            position.advance(batch)
            images += batch
            assert (position.step, position.images) == (number + 1, images)
            assert state.contradiction(vars(position)) == ""
            assert state.contradiction({**vars(position), "images": images + 1}) != ""
    assert json.loads(json.dumps(fresh.since)) == {"batch": 8, "step": 3, "images": 44}


def test_buffers_that_older_versions_saved_are_left_out(tmp_path: Path) -> None:
    """Buffers of FSQ and LFQ, which follow from the settings; without this, such runs could not resume."""
    wanted = nn.Linear(3, 1).state_dict()
    saved = checkpoint.save(tmp_path, 4, {"model": {**wanted, "inner.radix": torch.ones(2)}}, NEW, keep=1)
    assert checkpoint.read_fitting(saved, "model", wanted).keys() == wanted.keys()


SPOILT = {
    "int8": (lambda value: value.to(torch.int8), r"weight is 1×3 \(I8\) instead of 1×3"),
    "complex": (lambda value: value.to(torch.complex64), r"weight is 1×3 \(C64\) instead of 1×3"),
    "half": (lambda value: value.half(), r"weight is 1×3 \(F16\) instead of 1×3"),
    "double": (lambda value: value.double(), r"weight is 1×3 \(F64\) instead of 1×3"),
    "another shape": (lambda value: value[:, :2], r"weight is 1×2 instead of 1×3"),
}


@pytest.mark.parametrize("how", SPOILT)
@pytest.mark.parametrize("name", ["model", "ema", "optimizer", "moments"])
def test_tensors_of_another_type_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, how: str
) -> None:
    """Also of types that a checkpoint never has: its files may be made by others."""
    spoil, words = SPOILT[how]
    monkeypatch.setattr(checkpoint, "serialised", lambda tensors: [safetensors.torch.save(tensors)])
    wanted = nn.Linear(3, 1).state_dict()
    tensors = {name: {**wanted, "weight": spoil(wanted["weight"]).contiguous()}}
    saved = checkpoint.save(tmp_path, 4, tensors, NEW, keep=1)
    with pytest.raises(CheckpointError, match=words):
        checkpoint.read_fitting(saved, name, wanted)
    missing = checkpoint.save(tmp_path, 5, {name: {"bias": wanted["bias"]}}, NEW, keep=1)
    with pytest.raises(CheckpointError, match="it has no weight"):
        checkpoint.read_fitting(missing, name, wanted)
