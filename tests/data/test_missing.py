"""If data.root is wrong, the message names the command or the setting that helps."""

import re
import shlex
import shutil
from pathlib import Path

import pytest

from tests.conftest import samples
from tests.data.test_listing import command, tree
from tests.data.test_tar import tar
from vaescale.data import DataError, shards
from vaescale.data.index import Index


def said(root: Path, split: str = "train") -> str:
    """Returns the message of a training with this data.root, without the beginning that all messages share."""
    with pytest.raises(DataError) as caught:
        Index(root / split)
    begin = f"there are no shards in {root / split}: "
    assert str(caught.value).startswith(begin)
    return str(caught.value).removeprefix(begin)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, because paths are mostly given as relative ones."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def written(root: Path) -> Path:
    for split in ("train", "val"):
        shards.write(root / split, samples(2), 2, [])
    return root


SHARDS = "`python launch/shards.py"


def test_one_level_too_high_or_low(here: Path) -> None:
    written(Path("data/mine"))
    assert said(Path("data")) == "data.root=data is one level too high, so set data.root=data/mine"
    for split in ("train", "val"):
        words = f"data.root=data/mine/{split} is one level too low, so set data.root=data/mine"
        assert said(Path("data/mine", split)) == words
    assert said(here / "data") == f"data.root={here}/data is one level too high, so set data.root={here}/data/mine"
    shutil.copytree("data/mine", "data/an other")
    assert said(Path("data")).endswith("so set 'data.root=data/an other' or data.root=data/mine")


def test_shards_that_are_not_split(here: Path) -> None:
    shards.write(Path("mine"), samples(2), 2, [])
    assert said(Path("mine")) == (
        f"the shards in mine itself are not split: run {SHARDS} prepare FOLDER --out mine --val 0.1`, which makes "
        f"mine/train and mine/val"
    )


def test_validation_alone_is_missing(here: Path) -> None:
    shutil.rmtree(written(Path("mine")) / "val")
    assert said(Path("mine"), "val") == (
        f"run {SHARDS} prepare FOLDER --out mine/val` with the validation images in FOLDER; to split one folder of "
        f"images, {SHARDS} prepare FOLDER --out DIR --val 0.1` makes DIR/train and DIR/val"
    )


@pytest.mark.parametrize(
    ("paths", "source"),
    [
        (["1.jpg", "2.jpg", "notes.txt"], "pics --unlabelled"),
        (["1.jpg", "sub/2.jpg"], "pics --unlabelled"),
        (["a/1.JPG", "b/2.png", "notes.txt", ".hidden/1.jpg", "._1.jpg"], "pics"),
        (["a/x/1.jpg", "b/y/2.jpg"], "pics"),
        (["1.tif", "2.tif"], "pics --unlabelled --convert"),
        (["a/1.HEIC"], "pics --convert"),
        (["train/a/1.jpg"], "pics/train"),
        (["Training/1.jpg"], "pics/Training --unlabelled"),
        (["train/1.jpg", "others/1.jpg"], "pics"),
    ],
)
def test_pictures_in_place_of_shards(here: Path, paths: list[str], source: str) -> None:
    """The command in the message does what it says."""
    tree(Path("pics"), *paths)
    assert said(Path("pics")) == (
        f"pics contains images, not shards, so run {SHARDS} prepare {source} --out pics-shards --val 0.1` and set "
        f"data.root=pics-shards"
    )
    assert said(here / "pics").endswith(f"--out {here}/pics-shards --val 0.1` and set data.root={here}/pics-shards")


def test_pictures_that_are_split_already(here: Path) -> None:
    tree(Path("my pics"), "val/a/1.jpg", "train/a/1.jpg", "train/b/1.jpg")
    assert said(Path("my pics")) == (
        f"my pics contains images, not shards, so prepare each split: run {SHARDS} prepare 'my pics/train' --out "
        f"'my pics-shards/train'`, do the same for the other split with --out 'my pics-shards/val', and set "
        f"'data.root=my pics-shards'"
    )


def test_the_current_folder_and_the_one_above(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tree(here / "pics", "1.jpg") / "x").mkdir()
    for folder, root in ((here / "pics", "."), (here / "pics/x", "..")):
        monkeypatch.chdir(folder)
        with pytest.raises(DataError, match=re.escape(f"--out {here}/pics-shards --val 0.1` and set data.root={here}")):
            Index(Path(root, "train"))


def test_files_in_place_of_a_folder(here: Path) -> None:
    tar(Path("pics.tar"), ("a/1.jpg", b""))
    tree(Path("2025.07"), "1.jpg")
    assert said(Path("2025.07")).endswith(" set data.root=2025.07-shards")
    Path("pics.zip").write_bytes(b"PK")
    assert said(Path("pics.tar")) == (
        f"pics.tar is a tar, so run {SHARDS} prepare pics.tar --out pics-shards --val 0.1` and set "
        f"data.root=pics-shards"
    )
    assert said(Path("pics.zip")) == "pics.zip is not a folder"


def test_shards_of_others(here: Path) -> None:
    Path("wds").mkdir()
    tar(Path("wds/0.tar"), ("1.jpg", b""))
    assert said(Path("wds")) == (
        f"if the tars in wds are webdataset shards, run {SHARDS} index wds --out DIR/train`, do the same for the "
        f"validation shards with --out DIR/val, and set data.root=DIR"
    )


def test_only_missing_demo_data_name_the_demo_command(here: Path) -> None:
    for name, which in (("photos", "demo"), ("digits", "digits"), ("emoji", "emoji PACKAGE")):
        assert said(Path("data", name)) == f"run {SHARDS} {which} data/{name}` to write the demo data"
        assert said(here / "data" / name) == f"run {SHARDS} {which} {here}/data/{name}` to write the demo data"
        for root in (Path(name), Path("data/mine"), Path("data", name, "more")):
            assert said(root) == f"run {SHARDS} prepare FOLDER --out {root} --val 0.1` with your images in FOLDER"
    tree(Path("data/photos"), "1.jpg")
    assert "prepare data/photos --unlabelled --out data/photos-shards --val 0.1`" in said(Path("data/photos"))


def test_a_misspelt_root_gets_the_nearest_name(here: Path) -> None:
    written(Path("data/flowers"))
    assert said(Path("data/flower")) == "did you mean data.root=data/flowers?"
    assert "prepare FOLDER --out data/cars" in said(Path("data/cars"))


def test_commands_other_than_training(here: Path) -> None:
    written(Path("mine"))
    for folder, words in (("mine", "use mine/train"), ("none", f"run {SHARDS} prepare FOLDER --out none`")):
        with pytest.raises(DataError, match=re.escape(f"there are no shards in {folder}: {words}")):
            Index(Path(folder))


def test_the_named_commands_work(here: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """The commands work as written in the messages, for a flat folder and for class folders."""
    for name, paths in (("flat", "{}.jpg"), ("classes", "a/{}.jpg"), ("in splits", "train/a/{}.jpg")):
        root = tree(here / name, *(paths.format(number) for number in range(30)))
        sentence = said(root)
        words = re.search(r"`python launch/shards\.py ([^`]*)`", sentence)
        assert words
        monkeypatch.chdir(request.config.rootpath)
        assert command(*shlex.split(words[1]))
        monkeypatch.chdir(here)
        (setting,) = shlex.split(sentence.rpartition(" set ")[2])
        made = [Index(Path(setting.removeprefix("data.root="), split)) for split in ("train", "val")]
        assert sum(map(len, made)) == 30
