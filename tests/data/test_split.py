"""`prepare --val` splits one folder of images into training and validation."""

import json
import shutil
from pathlib import Path

import pytest

from tests.data.test_listing import command, samples, tree
from tests.data.test_tar import tar
from vaescale.data import DataError, prepare, shards
from vaescale.data.index import Index
from vaescale.data.listing import Picture, listing
from vaescale.data.prepare import Settings, split

HALF = Settings(val=0.5)


def named(*keys: str) -> list[Picture]:
    return [Picture(key, "jpg", "", 0, 0, 0, key) for key in keys]


def in_val(pictures: list[Picture], val: float = 0.1, seed: int = 0) -> set[str]:
    training, validation = split(pictures, val, seed)
    assert sorted([*training, *validation]) == sorted(pictures)
    return {one.key for one in validation}


def test_a_key_and_the_seed_decide() -> None:
    """The split does not depend on other images. The hash must never change, or adding images would mix the splits."""
    pictures = named(*(f"IMG_{number:04d}" for number in range(4000)))
    chosen = in_val(pictures)
    assert 340 < len(chosen) < 460  # 400, and three standard deviations of 19
    assert in_val(pictures[::-1]) == chosen
    assert in_val(pictures[1000:2000]) == chosen & {one.key for one in pictures[1000:2000]}
    assert chosen < in_val(pictures, 0.2)  # a greater share only adds
    other = in_val(pictures, seed=1)
    assert 340 < len(other) < 460
    assert len(other & chosen) < 100  # 40 if the seeds are independent
    assert sorted(in_val(pictures[:40])) == PINNED


PINNED = ["IMG_0003", "IMG_0021", "IMG_0030", "IMG_0034", "IMG_0036"]


def test_files_that_differ_in_their_endings_stay_together(tmp_path: Path) -> None:
    """The number appended to equal keys does not count, nor does the Unicode form of accents."""
    paths = [f"{number}.{kind}" for number in range(40) for kind in ("jpg", "png", "webp")]
    pictures = listing(tree(tmp_path, *paths), None, [], unlabelled=True).pictures
    assert len(pictures) == 120
    chosen = in_val(pictures, 0.4)
    plain = {key for key in chosen if "-" not in key}
    assert 0 < len(plain) < 40
    assert chosen == {f"{key}{number}" for key in plain for number in ("", "-2", "-3")}
    accents = {"e\u0301": "\u00e9", "A\u030a": "\u00c5", "o\u0302": "\u00f4", "n\u0303": "\u00f1"}
    for apart, joined in accents.items():
        assert (in_val(named(apart), 0.5) == set()) == (in_val(named(joined), 0.5) == set())


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_both_splits_share_classes(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [f"{name}/{number}.jpg" for name in ("b", "a", "c") for number in range(10)]
    source = tree(tmp_path / "d", *paths)
    if kind == "tar":
        source = tar(tmp_path / "d.tar", *((path, (source / path).read_bytes()) for path in paths))
    out = tmp_path / "mine"
    assert command("prepare", source, "--out", out, "--val", 0.3)
    training, validation = Index(out / "train"), Index(out / "val")
    assert training.classes == validation.classes == ["a", "b", "c"]
    assert shards.read_classes(out / "train/classes.json") == shards.read_classes(out / "val/classes.json")
    assert training.attribute_names == validation.attribute_names
    one, two = samples(training), samples(validation)
    assert {**one, **two} == {path.removesuffix(".jpg"): "abc".index(path[0]) for path in paths}
    assert len(one) + len(two) == 30
    assert set(two) == in_val(listing(source, None, []).pictures, 0.3)
    output = capsys.readouterr().out.splitlines()
    assert output == [
        f"{source}: 30 files: 30 images",
        f"{out}/train: {len(one)} samples in 1 shard, 3 classes",
        f"{out}/val: {len(two)} samples in 1 shard, 3 classes",
        f"train on them with data.root={out}",
    ]
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.tar")}
    assert command("prepare", source, "--out", out, "--val", 0.3)  # nothing is left to do
    assert capsys.readouterr().out.splitlines() == output
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.tar")} == before


def test_labels_may_come_from_a_file(tmp_path: Path) -> None:
    source = tree(tmp_path / "d", *(f"{number}.jpg" for number in range(20)))
    (tmp_path / "labels.csv").write_text(
        "".join(f"{number}.jpg,{'dog' if number % 3 else 'cat'}\n" for number in range(20))
    )
    one, two = prepare.prepare(source, tmp_path / "out", tmp_path / "labels.csv", [], HALF, 1)
    assert one.classes == two.classes == ["cat", "dog"]
    assert {**samples(one), **samples(two)} == {str(number): int(number % 3 > 0) for number in range(20)}


@pytest.mark.parametrize("out", ["d", "d/shards", "d/a/shards", "mine"])
def test_the_splits_may_lie_inside_the_source(tmp_path: Path, out: str) -> None:
    """The same call is made twice, then one for another folder."""
    paths = [f"{name}/{number}.jpg" for name in "ab" for number in range(6)]
    source = tree(tmp_path / "d", *paths)
    for place in (out, out, "other"):
        one, two = prepare.prepare(source, tmp_path / place, None, [], HALF, 1)
        assert sorted([*samples(one), *samples(two)]) == sorted(path.removesuffix(".jpg") for path in paths)


def test_an_interrupted_call_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The call is interrupted after each shard in turn."""
    source = tree(tmp_path / "d", *(f"{number}.jpg" for number in range(24)))
    settings = Settings(shard_mib=0.01, val=0.4)
    whole = prepare.prepare(source, tmp_path / "whole", None, [], settings, 1, unlabelled=True)
    total = sum(len(one.shards) for one in whole)
    assert min(len(one.shards) for one in whole) > 1
    write = prepare._write
    for done in range(1, total):
        left = [done]

        def stop(*arguments: object, left: list[int] = left) -> object:
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            return write(*arguments)  # type: ignore[arg-type]

        out = tmp_path / str(done)
        monkeypatch.setattr(prepare, "_write", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare.prepare(source, out, None, [], settings, 1, unlabelled=True)
        monkeypatch.setattr(prepare, "_write", write)
        made = prepare.prepare(source, out, None, [], settings, 1, unlabelled=True)
        assert [one.shards for one in made] == [one.shards for one in whole]
        shutil.rmtree(out)


def test_what_cannot_be_split_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = tree(tmp_path / "few", "1.jpg", "2.jpg", "3.jpg")
    out = tmp_path / "out"
    cases = {
        (
            "--val",
            0.0001,
        ): f"error: --val 0.0001 assigns none of the 3 images in {few} to validation: raise it, or use",
        (
            "--val",
            0.9999,
        ): f"error: --val 0.9999 assigns none of the 3 images in {few} to training: lower it, or use",
    }
    for given, words in cases.items():
        assert command("prepare", few, "--unlabelled", "--out", out, *given, code=2)
        error = capsys.readouterr().err
        assert error.startswith(words)
        assert error.count("\n") == 1
    assert not out.exists()
    assert command("prepare", few, "--unlabelled", "--out", out / "train", "--val", 0.5, code=2)
    assert f"error: --val makes train and val inside --out: give --out {out}, or leave" in capsys.readouterr().err
    assert command("prepare", few, "--out", out, "--val", 0.5, code=2)
    assert "has no class folders: give its label file with --labels, or --unlabelled" in capsys.readouterr().err
    for wrong in ("0", "1", "10", "-0.1", "nan", "x"):
        with pytest.raises(SystemExit, match="2"):
            command("prepare", few, "--out", out, "--val", wrong)
        assert f"{wrong} is not a number between 0 and 1, such as 0.1" in capsys.readouterr().err
    assert not out.exists()


def test_other_shards_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    source = tree(tmp_path / "d", *(f"{number}.jpg" for number in range(12)))
    out = tmp_path / "mine"
    prepare.prepare(source, out, None, [], HALF, 1, unlabelled=True)
    with pytest.raises(DataError, match=r"train already contains shards of .* \(val was 0\.5 and is now 0\.4\)"):
        prepare.prepare(source, out, None, [], Settings(val=0.4), 1, unlabelled=True)
    shutil.rmtree(out / "train")
    with pytest.raises(DataError, match=r"val already contains shards of .* \(val was 0\.5 and is now 0\.4\)"):
        prepare.prepare(source, out, None, [], Settings(val=0.4), 1, unlabelled=True)
    assert not list((out / "train").glob("*.tar"))
    assert not (out / "train" / "prepared.json").exists()
    prepare.prepare(source, out, None, [], HALF, 1, unlabelled=True)


def test_shards_of_the_version_before_are_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The old plan has neither --val nor --convert; the folder of a split is not taken for an unsplit one."""
    source = tree(tmp_path / "d", *(f"{number}.jpg" for number in range(12)))
    (made,) = prepare.prepare(source, tmp_path / "out", None, [], Settings(), 1, unlabelled=True)
    path = tmp_path / "out" / "prepared.json"
    plan = json.loads(path.read_text())
    del plan["val"], plan["convert"]
    plan["most_megapixels"] = plan.pop("max_megapixels")
    path.write_text(json.dumps(plan))
    (again,) = prepare.prepare(source, tmp_path / "out", None, [], Settings(), 1, unlabelled=True)
    assert again.shards == made.shards
    assert command("prepare", source, "--unlabelled", "--out", tmp_path / "out")
    assert "training needs a folder with train and val: --val 0.1 makes both" in capsys.readouterr().out
    assert command("prepare", source, "--unlabelled", "--out", tmp_path / "other" / "train")
    assert "--val" not in capsys.readouterr().out


def test_validation_pictures_are_decoded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A damaged validation image would stop a training run; a damaged training image is replaced."""
    source = tree(tmp_path / "d", *(f"{number}.jpg" for number in range(12)))
    for path in source.iterdir():
        if int(path.stem) % 2:
            path.write_bytes(path.read_bytes()[:-200])
    one, two = prepare.prepare(source, tmp_path / "out", None, [], HALF, 1, unlabelled=True)
    output = capsys.readouterr().out
    validation = in_val(listing(source, None, [], unlabelled=True).pictures, 0.5)
    cut = {key for key in validation if int(key) % 2}
    assert cut
    assert set(samples(two)) == validation - cut
    assert len(one) == 12 - len(validation)
    assert {line for line in output.splitlines() if line.startswith("left out")} == {
        f"left out: {key} (cut or corrupt)" for key in cut
    }


def test_a_split_without_readable_pictures_is_one_sentence(tmp_path: Path) -> None:
    source = tree(tmp_path / "d", *(f"{number}.jpg" for number in range(12)))
    for key in in_val(listing(source, None, [], unlabelled=True).pictures, 0.2):
        (source / f"{key}.jpg").write_text("<html>404</html>")
    with pytest.raises(DataError, match=r"out/val would be empty: none of the \d images? can be read"):
        prepare.prepare(source, tmp_path / "out", None, [], Settings(val=0.2), 1, unlabelled=True)


def test_classes_without_training_pictures_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [f"c{label}/x.jpg" for label in range(8)]
    source = tree(tmp_path / "d", *paths)
    prepare.prepare(source, tmp_path / "out", None, [], HALF, 1)
    absent = sorted(key.partition("/")[0] for key in in_val(listing(source, None, []).pictures, 0.5))
    assert len(absent) > 1
    more = ", …" if len(absent) > 3 else ""
    words = f"{len(absent)} of 8 classes have images in val only ({', '.join(absent[:3])}{more}): another --seed"
    assert words in capsys.readouterr().out
