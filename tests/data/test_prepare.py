"""A miniature of ImageNet as published: class folders, the tar of tars, the flat validation set."""

import io
import json
import os
import signal
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image
from scipy.io import savemat

from tests.conftest import Start, finish, jpeg
from tests.data.test_tar import tar
from vaescale.data import DataError, prepare, shards
from vaescale.data.index import Index
from vaescale.data.parallel import alone
from vaescale.data.prepare import Settings
from vaescale.data.stream import Samples

WNIDS = ["n01440764", "n01443537", "n15075141"]
PER_CLASS = 9
SMALL = Settings(shard_mib=0.02)


def picture(label: int, i: int) -> bytes:
    return jpeg(100 * label + i, 60, 48)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tree")
    for label, wnid in enumerate(WNIDS):
        (root / wnid).mkdir()
        for i in range(PER_CLASS):
            (root / wnid / f"{wnid}_{i}.JPEG").write_bytes(picture(label, i))
    (root / "README.txt").write_text("no picture")
    return root


@pytest.fixture(scope="module")
def tar_of_tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("train")
    inner = []
    for label, wnid in enumerate(WNIDS):
        members = [(f"{wnid}_{i}.JPEG", picture(label, i)) for i in range(PER_CLASS)]
        inner.append((f"{wnid}.tar", tar(folder / "inner.tar", *members).read_bytes()))
    return tar(folder / "ILSVRC2012_img_train.tar", *inner)


FLAT = [2, 0, 1, 1, 2, 0, 2]  # the labels of seven validation pictures


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("val")
    for i, label in enumerate(FLAT):
        (folder / f"ILSVRC2012_val_{i + 1:08d}.JPEG").write_bytes(picture(label, i))
    return folder


def make(
    source: Path, out: Path, settings: Settings = SMALL, labels: Path | None = None, **given: Sequence[str]
) -> Index:
    (made,) = prepare.prepare(source, out, labels, given.get("classes", []), settings, 1)
    return made


def contents(index: Index) -> dict[str, tuple[bytes, int]]:
    source = Samples(index.folder)
    return {source.name(sample)[1]: source.read(sample) for sample in range(len(index))}


EXPECTED = {
    f"{wnid}/{wnid}_{i}": (picture(label, i), label) for label, wnid in enumerate(WNIDS) for i in range(PER_CLASS)
}


def test_a_tree_and_the_tar_of_tars_give_the_same_shards(tmp_path: Path, tree: Path, tar_of_tars: Path) -> None:
    """Shards contain the original bytes once each, with labels from the sorted WordNet ids; webdataset reads them."""
    one, two = make(tree, tmp_path / "a"), make(tar_of_tars, tmp_path / "b")
    assert contents(one) == EXPECTED
    assert one.classes == WNIDS == shards.read_classes(tmp_path / "a" / "classes.json")
    assert len(one.shards) > 2
    assert one.shards == two.shards
    urls = [str(tmp_path / "b" / shard.name) for shard in two.shards]
    read = {one["__key__"]: (one["jpg"], int(one["cls"])) for one in webdataset.WebDataset(urls, shardshuffle=False)}
    assert read == EXPECTED


def test_the_shuffle_is_global_and_seeded(tmp_path: Path, tree: Path) -> None:
    keys = [
        list(contents(make(tree, tmp_path / str(i), Settings(0, 95, 0.02, seed)))) for i, seed in enumerate((0, 0, 1))
    ]
    assert keys[0] == keys[1]
    assert keys[0] != keys[2]
    labels = [key[:9] for key in keys[0]]
    assert labels != sorted(labels)
    assert len(set(labels[:PER_CLASS])) > 1


def label_files(folder: Path) -> dict[str, Path]:
    """Returns the labels FLAT in every common form of label file."""
    names = [f"ILSVRC2012_val_{i + 1:08d}" for i in range(len(FLAT))]
    ids = [WNIDS[label] for label in FLAT]
    texts = {
        "ids.txt": [*ids],
        "files.txt": [f"{name}.JPEG {wnid}" for name, wnid in zip(names, ids, strict=True)],
        "caffe.txt": [f"val/{name}.JPEG {label}" for name, label in zip(names, FLAT, strict=True)],
        "kaggle.csv": [
            "ImageId,PredictionString",
            *(f"{name},{wnid} 1 2 3 4 " for name, wnid in reversed(list(zip(names, ids, strict=True)))),
        ],
        "ILSVRC2012_validation_ground_truth.txt": [str({0: 3, 1: 1, 2: 2}[label]) for label in FLAT],
    }
    for name, lines in texts.items():
        (folder / name).write_text("\ufeff" + "\r\n".join(lines) + "\r\n\r\n")  # as Windows has it
    row = [("ILSVRC2012_ID", "f8"), ("WNID", "O"), ("words", "O"), ("num_children", "f8")]
    synsets = [(1, WNIDS[1], "b", 0), (2, WNIDS[2], "c", 0), (3, WNIDS[0], "a", 0), (4, "n00001740", "entity", 3)]
    savemat(folder / "meta.mat", {"synsets": np.array(synsets, row)})
    return {name: folder / name for name in texts}


@pytest.mark.parametrize(
    "name", ["ids.txt", "files.txt", "caffe.txt", "kaggle.csv", "ILSVRC2012_validation_ground_truth.txt"]
)
@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_the_flat_validation_set(tmp_path: Path, flat: Path, name: str, kind: str) -> None:
    labels = label_files(tmp_path)[name]
    source = flat
    if kind == "tar":
        members = [(path.name, path.read_bytes()) for path in sorted(flat.iterdir())]
        source = tar(tmp_path / "ILSVRC2012_img_val.tar", *members)
    made = make(source, tmp_path / "out", labels=labels, classes=WNIDS if name == "caffe.txt" else [])
    assert contents(made) == {f"ILSVRC2012_val_{i + 1:08d}": (picture(label, i), label) for i, label in enumerate(FLAT)}
    assert made.classes == WNIDS


def test_classes_number_validation_as_training_does(tmp_path: Path, tree: Path) -> None:
    made = make(tree, tmp_path / "out", classes=["n00000000", *WNIDS])
    assert {key[:9]: label for key, (_, label) in contents(made).items()} == dict(zip(WNIDS, (1, 2, 3), strict=True))
    with pytest.raises(DataError, match="class n15075141, which is not one of the 2 in --classes"):
        make(tree, tmp_path / "other", classes=WNIDS[:2])


def test_numbered_class_folders_count_as_numbers(tmp_path: Path) -> None:
    for name in ("0", "2", "10"):
        (tmp_path / "tree" / name).mkdir(parents=True)
        (tmp_path / "tree" / name / "x.png").write_bytes(jpeg(0))
    assert make(tmp_path / "tree", tmp_path / "out").classes == ["0", "2", "10"]


def test_prepared_pictures_have_the_asked_short_side(tmp_path: Path, tree: Path) -> None:
    broken = tmp_path / "tree"
    for path in tree.glob("*/*.JPEG"):
        (broken / path.parent.name).mkdir(parents=True, exist_ok=True)
        (broken / path.parent.name / path.name).write_bytes(path.read_bytes())
    (broken / WNIDS[1] / f"{WNIDS[1]}_4.JPEG").write_bytes(b"no picture")
    made = make(broken, tmp_path / "out", Settings(short_side=24, shard_mib=0.02))
    assert len(made) == len(EXPECTED) - 1
    for data, _ in contents(made).values():
        assert Image.open(io.BytesIO(data)).size == (30, 24)


def test_several_processes_write_the_same_bytes(tmp_path: Path, tree: Path) -> None:
    settings = Settings(short_side=24, shard_mib=0.01)
    (one,) = prepare.prepare(tree, tmp_path / "a", None, [], settings, 1)
    (two,) = prepare.prepare(tree, tmp_path / "b", None, [], settings, 2)
    assert one.shards == two.shards


def test_a_killed_preparation_goes_on(tmp_path: Path, tree: Path, start: Start) -> None:
    """SIGKILL ends the command and its processes after the first shard; finished shards stay unchanged."""
    command = [sys.executable, "launch/shards.py", "prepare", str(tree), "--out", str(tmp_path / "out")]
    command += ["--shard-mib", "0.005", "--short-side", "24", "--processes", "1"]
    process = start(command)
    while not list((tmp_path / "out").glob("*.tar")) and process.poll() is None:
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.tar")}
    assert kept
    code, output = finish(start(command))
    assert code == 0, output
    assert f"{len(EXPECTED)} samples" in output
    assert all(path.stat().st_mtime_ns == when for path, when in kept.items())
    whole = make(tree, tmp_path / "whole", Settings(short_side=24, shard_mib=0.005))
    assert Index(tmp_path / "out").shards == whole.shards
    assert not list((tmp_path / "out").glob("*.partial"))
    code, output = finish(start(command))  # once more: nothing is left to do
    assert code == 0, output


def test_wrong_sources_are_one_sentence(tmp_path: Path, tree: Path, flat: Path, tar_of_tars: Path) -> None:
    (tmp_path / "empty").mkdir()
    cut = tmp_path / "cut.tar"
    cut.write_bytes(tar_of_tars.read_bytes()[:20_000])
    (tmp_path / "few.txt").write_text("n01440764\n")
    (tmp_path / "numbers.txt").write_text("1\n" * len(FLAT))
    (tmp_path / "huge.txt").write_text("a 1\nb 9999999999\n")
    (tmp_path / "hole" / "n01").mkdir(parents=True)
    (tmp_path / "hole" / "n02").mkdir()
    (tmp_path / "hole" / "n02" / "a.jpg").write_bytes(b"x")
    (tmp_path / "splits" / "train" / "n01").mkdir(parents=True)
    (tmp_path / "splits" / "val").mkdir()
    (tmp_path / "pair").mkdir()
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / "pair" / name).write_bytes(b"x")
    for source, labels, message in (
        (tmp_path / "none", None, "does not exist"),
        (tmp_path / "empty", None, "contains no images"),
        (cut, None, "damaged or cut off at byte"),
        (flat, None, "has no class folders: give its label file with --labels"),
        (flat, tmp_path / "few.txt", "has 1 lines for 7 images"),
        (flat, tmp_path / "numbers.txt", r"has numbers without names: put meta\.mat of the development kit"),
        (flat, tmp_path / "absent.txt", "cannot be read as UTF-8 text"),
        (tmp_path / "splits", None, "contains the splits train, val: prepare one split at a time"),
        (tmp_path / "pair", tmp_path / "huge.txt", "contains 9999999999, which is not a class number"),
        (tmp_path / "hole", None, "n01 contains no images; without it, the classes after it"),
    ):
        with pytest.raises(DataError, match=message):
            make(source, tmp_path / "out", labels=labels)
    assert not (tmp_path / "out").exists()
    make(tree, tmp_path / "out")
    with pytest.raises(
        DataError, match=r"already contains shards of another source or other settings \(seed was 0 and is now 1\)"
    ):
        make(tree, tmp_path / "out", Settings(shard_mib=0.02, seed=1))
    (tmp_path / "out" / "prepared.json").unlink()
    with pytest.raises(DataError, match="already contains shards that were not made by prepare"):
        make(tree, tmp_path / "out")


def test_files_that_are_not_images_are_skipped(tmp_path: Path, tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A class folder may be a link; files of macOS, pipes and broken links are not images."""
    (tmp_path / "tree").mkdir()
    for wnid in WNIDS:
        (tmp_path / "tree" / wnid).symlink_to(tree / wnid)
    (tmp_path / "tree" / "n01440765").mkdir()
    odd = tmp_path / "tree" / "n01440765"
    (odd / "a.jpg").write_bytes(picture(0, 0))
    (odd / "._a.jpg").write_bytes(b"resource fork")
    (odd / "gone.jpg").symlink_to(tmp_path / "nothing")
    os.mkfifo(odd / "pipe.jpg")
    (odd / "empty.jpg").write_bytes(b"")
    made = make(tmp_path / "tree", tmp_path / "out")
    assert len(made) == len(EXPECTED) + 1
    assert made.classes == sorted([*WNIDS, "n01440765"])
    output = capsys.readouterr().out
    assert ": 31 files: 29 images, 2 skipped: 1 jpg (broken link), 1 jpg (not a regular file)\n" in output
    assert "left out: n01440765/empty (empty)\n" in output


@pytest.mark.parametrize("damage", ["deleted", "cut"])
def test_a_deleted_shard_is_made_again(tmp_path: Path, tree: Path, damage: str) -> None:
    made = make(tree, tmp_path / "out")
    path = tmp_path / "out" / made.shards[1].name
    if damage == "deleted":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:2000])
    assert make(tree, tmp_path / "out").shards == made.shards
    assert contents(Index(tmp_path / "out")) == EXPECTED


def test_a_second_process_is_refused(tmp_path: Path, tree: Path) -> None:
    with alone(tmp_path / "out"), pytest.raises(DataError, match="another process is writing to"):
        make(tree, tmp_path / "out")
    assert len(make(tree, tmp_path / "out")) == len(EXPECTED)


def test_a_full_disk_is_seen_before_anything_is_written(
    tmp_path: Path, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = type("Usage", (), {"free": 1000})()
    monkeypatch.setattr(prepare.shutil, "disk_usage", lambda _: free)
    with pytest.raises(DataError, match=r"needs 0\.0 GiB, but its disk has only 0\.0 GiB left"):
        make(tree, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.tar"))


def test_the_listing_has_the_position_of_each_picture(tar_of_tars: Path) -> None:
    """The listing has byte ranges of the outer tar, so nothing is extracted."""
    pictures, _, _ = prepare.listing(tar_of_tars, None, [])
    data = tar_of_tars.read_bytes()
    assert {one.key: (data[one.offset : one.offset + one.length], one.label) for one in pictures} == EXPECTED
    with tarfile.open(tar_of_tars) as outer:
        assert [member.name for member in outer] == [f"{wnid}.tar" for wnid in WNIDS]
    assert json.dumps(pictures)  # plain values: they travel to the processes


@pytest.mark.parametrize("plan", [b"", b"[1]", b"7", b"[" * 10**5, b'{"seed": 1e999}', b'{"seed": 0, "more": 1}'])
def test_a_damaged_plan_is_one_sentence(tmp_path: Path, tree: Path, plan: bytes) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "prepared.json").write_bytes(plan)
    with pytest.raises(
        DataError,
        match=r"out already contains shards (that were not made by prepare|of another source or other settings \()",
    ):
        make(tree, tmp_path / "out")
