"""Writing, verifying and choosing checkpoints, without a launcher."""

import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import safetensors.torch
import torch
import xxhash
from torch import Tensor, nn

from vaescale import settings, trained
from vaescale.config import ConfigError
from vaescale.lifecycle import checkpoint
from vaescale.lifecycle.checkpoint import CheckpointError, agreed, newest, verify
from vaescale.lifecycle.writer import unsound

TINY = "tests/integration/tiny.yaml"


def tensors(value: float) -> dict[str, dict[str, Tensor]]:
    return {"model": {"w": torch.full((2,), value), "n": torch.tensor(3)}, "optimizer": {}}


def save(run: Path, *steps: int, keep: int = 9, keep_every: int = 0) -> list[Path]:
    folder = run / "checkpoints"
    return [checkpoint.save(folder, step, tensors(step), {"step": step}, keep, keep_every) for step in steps]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def flip(path: Path, place: int, mask: int = 1) -> None:
    with path.open("r+b") as file:
        file.seek(place, os.SEEK_END if place < 0 else os.SEEK_SET)
        (byte,) = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ mask]))


def forge(saved: Path, name: str, data: bytes) -> None:
    """Replaces a file's bytes, and its entry in the manifest."""
    (saved / name).write_bytes(data)
    manifest = json.loads((saved / "manifest.json").read_text())
    manifest[name] = {"bytes": len(data), "xxh3": xxhash.xxh3_64_hexdigest(data)}
    (saved / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")


def test_files_are_those_of_the_library() -> None:
    values = {
        f"{kind}.ü{size}": (9 * torch.randn(3, size)).to(kind) for kind in checkpoint.DTYPES for size in (0, 1, 5)
    }
    values |= {"scalar": torch.tensor(3.0), "transposed": torch.randn(4, 3).t(), "part": torch.randn(9)[2:5]}
    for some in (values, {}):
        library = safetensors.torch.save({name: value.contiguous() for name, value in some.items()})
        assert b"".join(checkpoint.serialised(some)) == library


def test_what_was_saved_is_read(tmp_path: Path) -> None:
    (saved,) = save(tmp_path, 5)
    assert verify(saved) == []
    assert newest(tmp_path / "checkpoints") == (saved, [])
    assert checkpoint.read_state(saved) == {"step": 5}
    read = checkpoint.read_tensors(saved, "model")
    assert torch.equal(read["w"], torch.full((2,), 5.0))
    assert read["n"] == 3
    assert checkpoint.read_tensors(saved, "optimizer") == {}
    manifest = json.loads((saved / "manifest.json").read_text())
    assert set(manifest) == {path.name for path in saved.iterdir()} - {"manifest.json"}
    for name, entry in manifest.items():
        data = (saved / name).read_bytes()
        assert entry == {"bytes": len(data), "xxh3": xxhash.xxh3_64_hexdigest(data)}
    assert names(tmp_path / "checkpoints") == ["latest", "step-00000005"]


@pytest.mark.parametrize(
    ("keep", "keep_every", "left"),
    [(2, 0, [20, 25]), (1, 0, [25]), (1, 10, [10, 20, 25]), (3, 15, [15, 20, 25])],
)
def test_the_newest_and_every_nth_are_kept(tmp_path: Path, keep: int, keep_every: int, left: list[int]) -> None:
    save(tmp_path, 5, 10, 15, 20, 25, keep=keep, keep_every=keep_every)
    assert names(tmp_path / "checkpoints") == ["latest", *(f"step-{step:08d}" for step in left)]


def test_a_flipped_bit_is_found_wherever_it_is(tmp_path: Path) -> None:
    """Flips each bit of every file, including the manifest."""
    (saved,) = save(tmp_path, 5)
    for path in sorted(saved.iterdir()):
        for place, bit in product(range(path.stat().st_size), range(8)):
            flip(path, place, 1 << bit)
            (wrong,) = verify(saved)
            assert path.name in wrong or path.name == "manifest.json", (path.name, place, bit, wrong)
            flip(path, place, 1 << bit)
    assert verify(saved) == []


def missing(path: Path) -> None:
    path.unlink()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (missing, "model.safetensors is missing"),
        (cut, r"model.safetensors has \d+ bytes instead of \d+"),
        (lambda path: flip(path, -1), r"model.safetensors has changed \(xxh3 [0-9a-f]{16} instead of [0-9a-f]{16}\)"),
        (folder, r"model.safetensors cannot be read \(it is not a regular file\)"),
    ],
)
def test_damage_is_reported_and_the_next_newest_used(tmp_path: Path, harm: Callable[[Path], None], words: str) -> None:
    first, second, third = save(tmp_path, 5, 10, 15)
    harm(third / "model.safetensors")
    found = newest(tmp_path / "checkpoints")
    assert found.path == second
    (remark,) = found.remarks
    assert remark.startswith(f"{third} is damaged, trying the next one: ")
    assert re.search(words, remark)
    (second / "manifest.json").unlink()
    found = newest(tmp_path / "checkpoints")
    assert found.path == first
    assert "manifest.json is missing" in found.remarks[1]


def test_a_checkpoint_without_any_valid_stops(tmp_path: Path) -> None:
    assert newest(tmp_path / "checkpoints") == (None, [])
    one, other = save(tmp_path, 5, 10)
    flip(one / "state.json", 3)
    flip(other / "manifest.json", 0)
    with pytest.raises(
        CheckpointError,
        match=r"none of the 2 checkpoint\(s\) .*step-00000010 is damaged: manifest.json cannot be read",
    ):
        newest(tmp_path / "checkpoints")


POINTERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda path: path.write_bytes(b""), "is empty"),
    "missing": (missing, "is missing"),
    "dangling": (lambda path: path.write_text("step-00000099\n"), "names 'step-00000099', which does not exist"),
    "a path": (lambda path: path.write_text("../../step-00000005\n"), "which does not exist"),
    "no text": (lambda path: path.write_bytes(b"\xff\x00\x80"), "which does not exist"),
    "a folder": (folder, "cannot be read"),
    "a dead link": (lambda path: (path.unlink(), path.symlink_to("nowhere")), "is missing"),
}


@pytest.mark.parametrize("harm", POINTERS)
def test_latest_is_a_hint(tmp_path: Path, harm: str) -> None:
    """A wrong `latest` is reported, and the newest valid checkpoint is used."""
    _, second, third = save(tmp_path, 5, 10, 15)
    pointer = tmp_path / "checkpoints" / "latest"
    act, words = POINTERS[harm]
    act(pointer)
    found = newest(tmp_path / "checkpoints")
    assert found.path == third
    (remark,) = found.remarks
    assert str(pointer) in remark
    assert words in remark
    flip(third / "state.json", 0)
    assert newest(tmp_path / "checkpoints").path == second


def test_a_latest_that_is_right_comes_first(tmp_path: Path) -> None:
    """A run can so continue from an older checkpoint; later saves replace the newer checkpoints of the same steps."""
    first, _, third = save(tmp_path, 5, 10, 15)
    (tmp_path / "checkpoints" / "latest").write_text("step-00000005\n")
    assert newest(tmp_path / "checkpoints") == (first, [])
    flip(first / "state.json", 0)
    assert newest(tmp_path / "checkpoints").path == third
    checkpoint.save(tmp_path / "checkpoints", 10, tensors(-1), {"step": 10}, keep=1)
    found = newest(tmp_path / "checkpoints").path
    assert found is not None
    assert checkpoint.read_tensors(found, "model")["w"][0] == -1
    assert names(tmp_path / "checkpoints") == ["latest", "step-00000010", "step-00000015"]


def test_latest_without_checkpoints_stops_the_run(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "latest").write_text("step-00000005\n")
    with pytest.raises(CheckpointError, match="and there are no checkpoints: remove it to start from scratch"):
        newest(tmp_path / "checkpoints")


def test_copies_and_leftovers_of_a_killed_save_are_never_used(tmp_path: Path) -> None:
    (saved,) = save(tmp_path, 5)
    there = tmp_path / "checkpoints"
    for name in (".partial-step-00000010", ".gone-step-00000002", "step-00000020-copy", "step-7"):
        (there / name).mkdir()
        (there / name / "model.safetensors").write_bytes(b"half")
    (there / ".latest").write_text("step-")
    (there / "latest").unlink()
    assert newest(there).path == saved
    save(tmp_path, 10)
    assert names(there) == ["latest", "step-00000005", "step-00000010", "step-00000020-copy", "step-7"]


def test_only_leftovers_of_a_killed_save_are_removed(tmp_path: Path) -> None:
    """This includes files; other files in the folder stay, and do not prevent a save."""
    there = tmp_path / "checkpoints"
    save(tmp_path, 5)
    (there / ".partial-step-00000010").write_text("a file")
    (there / ".gone-step-00000002").symlink_to(tmp_path)
    for name in (".old-step-1", ".mine-step-00000001", ".partial-step-1"):
        (there / name).mkdir()
    (there / ".note-step-00000005").write_text("a good one")
    (there / "step-00000010").write_text("a file where the checkpoint goes")
    save(tmp_path, 10)
    assert verify(there / "step-00000010") == []
    others = [".mine-step-00000001", ".note-step-00000005", ".old-step-1", ".partial-step-1"]
    assert names(there) == sorted([*others, "latest", "step-00000005", "step-00000010"])


def test_an_old_checkpoint_that_cannot_be_removed_fails_no_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (first,) = save(tmp_path, 5)

    def busy(path: Path) -> None:
        raise OSError(16, "Device or resource busy", str(path))

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", busy)
        (second,) = save(tmp_path, 10, keep=1)
    assert newest(tmp_path / "checkpoints") == (second, [])
    assert not first.exists()
    save(tmp_path, 15, keep=2)
    assert names(tmp_path / "checkpoints") == ["latest", "step-00000010", "step-00000015"]


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def link(path: Path) -> None:
    path.rename(path.with_name("aside"))
    path.symlink_to("aside")


def device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("harm", [pipe, link, device, folder])
@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "manifest.json"])
def test_only_regular_files_are_read(tmp_path: Path, name: str, harm: Callable[[Path], None]) -> None:
    """Reading an endless file, or a pipe without a writer, would never end."""
    (saved,) = save(tmp_path, 5)
    harm(saved / name)
    assert verify(saved) == [f"{name} cannot be read (it is not a regular file)"]


def test_latest_is_not_waited_for(tmp_path: Path) -> None:
    (saved,) = save(tmp_path, 5)
    pipe(tmp_path / "checkpoints" / "latest")
    found = newest(tmp_path / "checkpoints")
    assert found.path == saved
    assert "cannot be read (it is not a regular file)" in found.remarks[0]


@pytest.mark.parametrize("field", ["bytes", "xxh3", "dtype"])
def test_text_from_a_checkpoint_is_made_printable(tmp_path: Path, field: str) -> None:
    (saved,) = save(tmp_path, 5)
    if field == "dtype":
        head = json.dumps({"w": {"dtype": "\x1b[31m", "shape": [2], "data_offsets": [0, 8]}}).encode()
        forge(saved, "model.safetensors", len(head).to_bytes(8, "little") + head + bytes(8))
    else:
        manifest = json.loads((saved / "manifest.json").read_text())
        manifest["model.safetensors"][field] = "\x1b[31m"
        (saved / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    (wrong,) = verify(saved)
    assert r"\x1b[31m" in wrong
    assert wrong.isprintable()


@pytest.mark.parametrize(
    "name", ["/dev/zero", "../x.json", "a/b.json", "..", "", ".json", "manifest.json", "x.pt", "\x1b"]
)
def test_a_manifest_lists_files_of_the_checkpoint_alone(tmp_path: Path, name: str) -> None:
    (saved,) = save(tmp_path, 5)
    manifest = json.loads((saved / "manifest.json").read_text())
    manifest[name] = {"bytes": 1, "xxh3": "0" * 16}
    (saved / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    (wrong,) = verify(saved)
    assert wrong.startswith("manifest.json lists ")
    assert wrong.endswith(", which is not a checkpoint file")
    assert "\x1b" not in wrong


@pytest.mark.parametrize(
    "entry", [{"bytes": "1", "xxh3": 1}, {"bytes": -1, "xxh3": ""}, {"bytes": 10**30, "xxh3": "0"}, 3, None, {}, []]
)
def test_an_entry_that_makes_no_sense_is_damage(tmp_path: Path, entry: object) -> None:
    (saved,) = save(tmp_path, 5)
    manifest = json.loads((saved / "manifest.json").read_text())
    manifest["model.safetensors"] = entry
    (saved / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    assert len(verify(saved)) == 1


def test_a_failed_save_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk fails while the checkpoint is written, or returns other bytes than were written."""
    (saved,) = save(tmp_path, 5, keep=1)
    sync, synced = os.fsync, []

    def failing(descriptor: int) -> None:
        synced.append(descriptor)
        if len(synced) == 3:
            raise OSError(5, "Input/output error")
        sync(descriptor)

    def lying(descriptor: int) -> None:
        sync(descriptor)
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        if path.name == "model.safetensors":
            flip(path, -1)

    for fsync, error in ((failing, OSError), (lying, CheckpointError)):
        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", fsync)
            with pytest.raises(
                error, match=r"Input/output|other bytes than were written: model\.safetensors has changed"
            ):
                save(tmp_path, 10, keep=1)
        assert names(tmp_path / "checkpoints") == ["latest", "step-00000005"]
        assert newest(tmp_path / "checkpoints") == (saved, [])


def test_the_place_may_be_a_run_or_a_checkpoint(tmp_path: Path) -> None:
    first, second = save(tmp_path, 5, 10)
    assert agreed(tmp_path).path == second
    assert agreed(first).path == first
    assert agreed(tmp_path / "nowhere").path is None
    flip(first / "model.safetensors", -1)
    with pytest.raises(CheckpointError, match=r"step-00000005 is damaged: model\.safetensors has changed"):
        agreed(first)


def test_what_does_not_fit_is_one_sentence(tmp_path: Path) -> None:
    (saved,) = save(tmp_path, 5)
    model = nn.Linear(3, 1)
    model.register_buffer("w", torch.zeros(2, 2))
    with pytest.raises(
        CheckpointError,
        match=r"belongs to another model: it has no weight, it has no bias, the model has no n and 1 more; restore",
    ):
        checkpoint.read_fitting(saved, "model", model.state_dict())
    model = nn.Module()
    model.register_buffer("w", torch.zeros(2, 2))
    model.register_buffer("n", torch.tensor(0))
    with pytest.raises(
        CheckpointError, match=r"belongs to another model: w is 2 \(I64\) instead of 2×2; restore the settings"
    ):
        checkpoint.read_fitting(saved, "model", model.state_dict())


def test_buffers_that_older_versions_did_not_save_keep_their_first_values(tmp_path: Path) -> None:
    model = nn.Linear(2, 1)
    old = {"model": model.state_dict()}
    checkpoint.save(tmp_path / "checkpoints", 5, old, {}, 9)
    model.register_buffer("latent_std", torch.full((3,), torch.inf))
    read = checkpoint.read_fitting(tmp_path / "checkpoints" / "step-00000005", "model", model.state_dict())
    assert list(read) == ["weight", "bias", "latent_std"]
    assert read["latent_std"].isinf().all()
    assert torch.equal(read["weight"], model.weight)
    model.register_buffer("other", torch.zeros(3))
    with pytest.raises(CheckpointError, match="belongs to another model: it has no other; restore"):
        checkpoint.read_fitting(tmp_path / "checkpoints" / "step-00000005", "model", model.state_dict())


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    for value in (1.0, 2.0):
        saved = checkpoint.save(folder, 5, tensors(value), {"step": 5}, 1)
    assert names(folder) == ["latest", "step-00000005"]
    assert checkpoint.read_tensors(saved, "model")["w"].tolist() == [2.0, 2.0]


class Poison:
    """If unpickled, it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, int]]:
        return os.mkdir, (str(self.path), 0o777)


@pytest.mark.parametrize("forged", [False, True])
@pytest.mark.parametrize("name", ["model", "ema", "optimizer", "state.json", "manifest.json", "latest"])
def test_a_poisoned_pickle_is_named_and_never_run(tmp_path: Path, name: str, forged: bool) -> None:
    """Even if the manifest lists it, and even without verification."""
    poison, ran = pickle.dumps(Poison(tmp_path / "ran")), tmp_path / "ran"
    pickle.loads(poison)
    ran.rmdir()  # it works
    config = settings.load(TINY, [f"run={tmp_path}", f"data.root={tmp_path}"])
    model = settings.build(config)
    held = {"model": model.state_dict(), "ema": model.state_dict(), "optimizer": {}}
    saved = [checkpoint.save(tmp_path / "checkpoints", step, held, {"step": step}, 9) for step in (5, 10)]

    file = name if name in ("state.json", "manifest.json", "latest") else f"{name}.safetensors"
    if file == "latest":
        (tmp_path / "checkpoints" / file).write_bytes(poison)
    elif file == "manifest.json" or not forged:
        (saved[1] / file).write_bytes(poison)
    else:
        forge(saved[1], file, poison)
    found = agreed(tmp_path)
    assert found.path == saved[file == "latest"]
    assert file in found.remarks[0]
    _, step = trained.read_model(tmp_path, config, torch.device("cpu"))
    assert step == (10 if file == "latest" else 5)
    if name in held:
        with pytest.raises(CheckpointError, match=rf"{name}\.safetensors cannot be read"):
            checkpoint.read_tensors(saved[1], name)
    elif file == "state.json":
        with pytest.raises(CheckpointError, match=r"state\.json cannot be read"):
            checkpoint.read_state(saved[1])
    assert not ran.exists()


def test_what_is_not_finite_is_named() -> None:
    nan, inf = torch.tensor([0.0, torch.nan]), torch.tensor(torch.inf)
    assert unsound({"model": {"n": torch.tensor(3), "w": torch.zeros(2)}, "ema": {}}, ()) == ""
    assert unsound({"model": {"w": torch.zeros(2)}, "ema": {"w": nan}}, ()) == "w of ema.safetensors"
    assert unsound({"model": {"bound": inf}}, ["bound"]) == ""
    assert unsound({"model": {"bound": inf}}, []) == "bound of model.safetensors"
    assert unsound({"model": {"bound": nan}}, ["bound"]) == "bound of model.safetensors"
    assert (
        unsound({"model": {"none": torch.zeros(0), "first": torch.tensor([torch.nan, 1.0])}}, ())
        == "first of model.safetensors"
    )
    assert unsound({"model": {"half": -inf.half()}}, []) == "half of model.safetensors"


def test_keep_every_must_be_a_multiple_of_the_interval() -> None:
    with pytest.raises(ConfigError, match=r"keep_every=6 must be a multiple of every\.checkpoint=4"):
        settings.load(TINY, ["run=none", "data.root=none", "keep_every=6"])
