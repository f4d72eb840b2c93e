"""What counts as data in folders and tars of many kinds."""

import runpy
import signal
import sys
import tarfile
from collections import Counter
from pathlib import Path
from zipfile import ZipFile

import pytest

from tests.conftest import jpeg
from tests.data.test_tar import tar
from vaescale.data import DataError, names, shards
from vaescale.data.index import Index
from vaescale.data.listing import Listing, listing
from vaescale.data.prepare import Settings, prepare
from vaescale.data.stream import Samples
from vaescale.data.tar import Fields

HIDDEN = [
    *(".ipynb_checkpoints/x-checkpoint.jpg", "a/.ipynb_checkpoints/x-checkpoint.jpg", "a/.thumbnails/x.jpg"),
    *("__MACOSX/a/._x.jpg", "__MACOSX/x.jpg", "a/._x.jpg", "._a/x.jpg", "a/Thumbs.db", "a/desktop.ini", "a/.DS_Store"),
    *(".git/x.png", "a/@eaDir/x.jpg/thumb.jpg", "a/__pycache__/x.jpg"),
]


def tree(root: Path, *paths: str) -> Path:
    for number, path in enumerate(paths):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(jpeg(number))
    return root


def packed(root: Path, path: Path) -> Path:
    """Packs a folder as `tar` does, with the entries `./a`, `./a/x.jpg`."""
    with tarfile.open(path, "w") as file:
        file.add(root, ".")
    return path


def keys(made: Listing) -> dict[str, int]:
    return {one.key: one.label for one in made.pictures}


def command(*arguments: object, code: int = 0) -> bool:
    """Runs launch/shards.py in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["shards.py", *map(str, arguments), "--processes", "1"])
        script = runpy.run_path("launch/shards.py")
        handlers = {number: signal.getsignal(number) for number in (signal.SIGPIPE, signal.SIGTERM)}
        try:
            return bool(script["main"](script["parse"]()) == code)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)


def samples(made: Index) -> dict[str, int]:
    source = Samples(made.folder)
    return {source.name(number)[1]: source.read(number)[1] for number in range(len(made))}


@pytest.mark.parametrize("path", HIDDEN)
def test_hidden_paths(path: str) -> None:
    assert names.is_hidden(path)
    assert names.is_hidden(f"./{path}")


@pytest.mark.parametrize("path", ["a/x.jpg", "./a.b/x.jpg", "../x.jpg", "a_/x..jpg", "__a/x.jpg", "macosx/x.jpg"])
def test_other_paths(path: str) -> None:
    assert not names.is_hidden(path)


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_hidden_files_are_neither_classes_nor_pictures(tmp_path: Path, kind: str) -> None:
    source = tree(tmp_path / "d", "b/x.jpg", "a/x.jpg", "a/y.jpg", *HIDDEN)
    (source / ".empty").mkdir()
    if kind == "tar":
        source = packed(source, tmp_path / "d.tar")
    made = listing(source, None, [])
    assert keys(made) == {"a/x": 0, "a/y": 0, "b/x": 1}
    assert made.classes == ["a", "b"]
    assert made.notes == [f"{source}: 3 files: 3 images"]


def test_hidden_shards_and_members_are_not_indexed(tmp_path: Path) -> None:
    """Neither `._0.tar` next to the shards nor `._a.jpg` in them, at any place among the members of a sample."""
    fork = b"\0\5\x16\7\0\2\0\0Mac OS X"
    tar(
        tmp_path / "0.tar",
        *(("./._a.jpg", fork), ("./a.jpg", jpeg(0)), ("./._a.cls", fork), ("./a.cls", b"3")),
        *(("__MACOSX/b.jpg", jpeg(1)), (".ipynb_checkpoints/b.jpg", jpeg(1)), ("b.jpg", jpeg(1)), ("b.cls", b"4")),
    )
    (tmp_path / "._0.tar").write_bytes(fork)
    made = shards.index(str(tmp_path), tmp_path, "*.tar", Fields(), 1)
    assert samples(made) == {"./a": 3, "b": 4}
    assert [shard.name for shard in made.shards] == ["0.tar"]


def test_skipped_files_are_counted_by_extension(tmp_path: Path) -> None:
    source = tree(tmp_path, "a/x.jpg", "a/y.JFIF", "b/z.JPEG", "b/q.jpe", "b/r.WebP")
    for path in ("a/1.TIFF", "a/2.tiff", "a/3.bmp", "b/4.heic", "b/README", "labels.csv", "b/odd.a-b", "b/end."):
        (source / path).write_text("")
    (source / "a" / "gone.jpg").symlink_to("nowhere")
    made = listing(source, None, [])
    assert {one.key: one.extension for one in made.pictures} == {
        **{"a/x": "jpg", "a/y": "jpg", "b/z": "jpg", "b/q": "jpg", "b/r": "webp"},
    }
    assert made.notes == [
        f"{source}: 14 files: 5 images, 9 skipped: 3 without an extension, 2 tiff, 1 bmp, 1 csv, 1 heic, "
        f"1 jpg (broken link)",
        "add --convert to include the 2 tiff, 1 bmp, 1 heic (heic and heif also need `pip install pillow-heif`)",
    ]


def test_a_summary_is_bounded() -> None:
    passed = Counter({f"e{number}": number for number in range(1, 11)})
    assert names.by_ending(passed) == "10 e10, 9 e9, 8 e8, 7 e7, 6 e6, 5 e5, 4 e4, 3 e3, 3 with other extensions"


def test_a_class_folder_of_other_formats_says_what_it_holds(tmp_path: Path) -> None:
    tree(tmp_path, "a/x.jpg", "b/x.tif", "b/y.tif", "b/.hidden.jpg")
    with pytest.raises(
        DataError, match=r"b contains no images \(2 tif\); without it, the .* or add --convert to include the 2 tif$"
    ):
        listing(tmp_path, None, [])


def test_links_to_a_folder_above_are_not_followed(tmp_path: Path) -> None:
    source = tree(tmp_path / "d", "a/x.jpg", "b/x.jpg")
    (source / "a" / "loop").symlink_to(source)
    (source / "b" / "self").symlink_to(".")
    (source / "a" / "to").symlink_to("../b")  # and back again
    (source / "b" / "to").symlink_to("../a")
    assert keys(listing(source, None, [])) == {"a/x": 0, "a/to/x": 0, "b/x": 1, "b/to/x": 1}


@pytest.mark.parametrize("out", ["d/shards", "d/shards/train", "d/a/shards", "d"])
def test_shards_inside_the_source_are_no_data(tmp_path: Path, out: str) -> None:
    """The same call is made twice, then once with another --out."""
    source = tree(tmp_path / "d", "a/x.jpg", "b/x.jpg", "c/x.jpg")
    for place in (out, out, f"{out}/more" if out == "d" else f"{out}2"):
        (made,) = prepare(source, tmp_path / place, None, [], Settings(), 1)
        assert samples(made) == {"a/x": 0, "b/x": 1, "c/x": 2}
        assert made.classes == ["a", "b", "c"]


@pytest.mark.parametrize("wrapper", ["", "d/", "./", "/d/", "d/train/"])
def test_a_tar_of_class_folders_is_taken_with_its_classes(tmp_path: Path, wrapper: str) -> None:
    members = [(f"{wrapper}{path}", jpeg(0)) for path in ("b/x.jpg", "a/sub/x.jpg", "a/x.jpg")]
    made = listing(tar(tmp_path / "t.tar", *members, (f"{wrapper}a/README.txt", b"")), None, [])
    assert keys(made) == {"a/x": 0, "a/sub/x": 0, "b/x": 1}
    assert made.notes[0].endswith("4 files: 3 images, 1 skipped: 1 txt")


def test_a_tar_may_hold_links_and_odd_names(tmp_path: Path) -> None:
    link = tarfile.TarInfo("a/link.jpg")
    link.type, link.linkname = tarfile.SYMTYPE, "x.jpg"
    made = listing(tar(tmp_path / "t.tar", ("a/x.jpg", jpeg(0)), link, ("b/y\x1b.jpg", jpeg(1))), None, [])
    assert keys(made) == {"a/x": 0, "b/y_": 1}
    assert made.notes[0].endswith("3 files: 2 images, 1 skipped: 1 jpg (not a regular file)")


def test_ambiguous_sources_are_refused_with_their_reason(tmp_path: Path) -> None:
    flat = tree(tmp_path / "flat", "1.jpg", "2.jpg")
    stray = tree(tmp_path / "stray", "a/1.jpg", "b/1.jpg", "logo.jpg")
    same = tree(tmp_path / "same", "a\u00a0b/1.jpg", "a b/1.jpg")
    splits = [(f"d/{split}/a/1.jpg", jpeg(0)) for split in ("train", "val")]
    capital = tree(tmp_path / "capital", "Training/a/1.jpg", "Testing/a/2.jpg")
    with ZipFile(tmp_path / "flat.zip", "w") as archive:
        archive.writestr("1.jpg", jpeg(1))
    with_zip = tar(tmp_path / "zip.tar", ("a/1.jpg", jpeg(1)), ("b.zip", (tmp_path / "flat.zip").read_bytes()))
    assert keys(listing(with_zip, None, [])) == {"a/1": 0}
    for source, message in (
        (tmp_path / "flat.zip", "is a zip archive: unpack it and give the folder"),
        (flat, "has no class folders: give .* --labels, or --unlabelled"),
        (packed(flat, tmp_path / "flat.tar"), "has no class folders: give .* --labels, or --unlabelled"),
        (tar(tmp_path / "val.tar", ("val/1.jpg", jpeg(0))), "has no class folders"),
        (tar(tmp_path / "shard.tar", ("1.jpg", jpeg(0)), ("1.cls", b"1")), "may be shards \\(see `shards.py index`\\)"),
        (stray, r"has 2 class folders \(a, b\) and 1 image next to them \(logo\.jpg\): move"),
        (packed(stray, tmp_path / "stray.tar"), r"has 2 class folders \(a, b\) and 1 image next to them"),
        (tar(tmp_path / "splits.tar", *splits), "contains the splits train, val: extract it"),
        (tar(tmp_path / "twice.tar", ("a/1.jpg", jpeg(0)), ("./a/1.jpg", jpeg(1))), "contains a/1.jpg twice"),
        (same, "would get the same name: rename one"),
        (capital, "contains the splits Testing, Training: prepare one split at a time"),
        (
            tree(tmp_path / "tifs", "a.tif"),
            "contains no images .*, only 1 tif: add --convert to include the 1 tif, or give",
        ),
    ):
        with pytest.raises(DataError, match=message):
            listing(source, None, [])


def test_a_folder_around_the_class_folders_is_reported(tmp_path: Path) -> None:
    """The folder may also be the only class, with its images sorted into subfolders."""
    around = listing(tree(tmp_path / "d", "images/a/1.jpg", "images/b/2.jpg"), None, [])
    assert around.classes == ["images"]
    assert f"its images in 2 folders (a, b): if these are the classes, use {tmp_path}/d/images" in around.notes[-1]
    for paths in (("a/x/1.jpg", "b/x/2.jpg", "b/y/2.jpg"), ("a/1.jpg", "a/x/2.jpg", "a/y/2.jpg"), ("a/x/1.jpg",)):
        assert len(listing(tree(tmp_path / paths[0].replace("/", "-"), *paths), None, []).notes) == 1


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_unlabelled_pictures(tmp_path: Path, kind: str) -> None:
    source = tree(tmp_path / "d", "1.jpg", "2.jpg", "sub/1.jpg", "train/x.jpg")
    if kind == "tar":
        source = packed(source, tmp_path / "d.tar")
    (made,) = prepare(source, tmp_path / "out", None, [], Settings(), 1, unlabelled=True)
    assert samples(made) == {"1": 0, "2": 0, "sub/1": 0, "train/x": 0}
    assert made.classes == []


def test_keys_are_distinct_and_printable(tmp_path: Path) -> None:
    """Folders below a class stay in the key; dots would end webdataset's key; a screenshot's name of macOS."""
    source = tree(
        *(tmp_path, "a/1.jpg", "a/x/1.jpg", "a/y/1.jpg", "a/y/1.png", "a/v1.0/2.jpg", "a/v1_0/2.jpg"),
        *("a/Shot at 10.00\u202fAM.png", "St. Bernard/Gr\u00f6\u00dfe.jpg", "St. Bernard/a\nb.jpg", "q/\udce9.jpg"),
    )
    made = listing(source, None, [])
    assert keys(made) == {
        **{"a/1": 1, "a/x/1": 1, "a/y/1": 1, "a/y/1-2": 1, "a/v1_0/2": 1, "a/v1_0/2-2": 1},
        **{"a/Shot at 10_00 AM": 1, "St_ Bernard/Gr\u00f6\u00dfe": 0, "St_ Bernard/a_b": 0, "q/_": 2},
    }
    assert made.classes == ["St. Bernard", "a", "q"]
    (note,) = made.notes[1:]
    assert note.startswith("5 images stored under another key than the file name")
    assert note.isprintable()
    (prepared,) = prepare(source, tmp_path / "out", None, [], Settings(), 1)
    assert samples(prepared) == keys(made)


def test_validation_takes_the_classes_of_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    training = tree(tmp_path / "d", "a/1.jpg", "b/1.jpg", "c/1.jpg")
    validation = tree(tmp_path / "v", "a/1.jpg", "c/1.jpg")
    command("prepare", training, "--out", tmp_path / "data/train")
    command("prepare", validation, "--out", tmp_path / "data/val")
    assert f"as in {tmp_path / 'data/train/classes.json'}" in capsys.readouterr().out
    assert samples(Index(tmp_path / "data/val")) == {"a/1": 0, "c/1": 2}
    assert Index(tmp_path / "data/val").classes == ["a", "b", "c"]
    tree(tmp_path / "v", "d/1.jpg")
    assert command("prepare", validation, "--out", tmp_path / "data/test", code=2)
    assert "has the class d, which is not one of the 3" in capsys.readouterr().err


def test_unlabelled_training_gives_no_classes(tmp_path: Path) -> None:
    source = tree(tmp_path / "d", "a/1.jpg", "c/1.jpg")
    command("prepare", source, "--unlabelled", "--out", tmp_path / "data/train")
    command("prepare", source, "--out", tmp_path / "data/val")
    assert Index(tmp_path / "data/val").classes == ["a", "c"]


def test_what_cannot_be_read_is_left_out_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tree(tmp_path / "d", *(f"a/{number}.jpg" for number in range(6)))
    (source / "a" / "1.jpg").write_text("<html>404</html>")
    (source / "a" / "2.jpg").write_bytes(b"")
    (source / "a" / "3.jpg").write_bytes(jpeg(3)[:-200])
    opened = Path.open

    def forbid(path: Path, *rest: str, **named: str) -> object:
        if path.name == "4.jpg":
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *rest, **named)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", forbid)
    (made,) = prepare(source, tmp_path / "out", None, [], Settings(), 1)
    assert sorted(samples(made)) == ["a/0", "a/3", "a/5"]
    output = capsys.readouterr().out
    for line in ("a/1 (not a picture)", "a/2 (empty)", "a/4 (permission denied)"):
        assert f"left out: {line}\n" in output
    (made,) = prepare(source, tmp_path / "checked", None, [], Settings(check=True), 1)
    assert sorted(samples(made)) == ["a/0", "a/5"]
    assert "left out: a/3 (cut or corrupt)\n" in capsys.readouterr().out


def test_indexing_leaves_out_and_names_what_is_no_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tar(
        tmp_path / "a.tar",
        *(("1.jpg", b"<html>404</html>"), ("1.cls", b"1"), ("2.jpg", jpeg(2)), ("2.cls", b"2")),
        *(("3.jpg", jpeg(3)[:-200]), ("3.cls", b"3"), ("4.tif", b"II"), ("4.cls", b"4"), ("README", b"")),
    )
    made = shards.index(str(tmp_path), tmp_path, "*.tar", Fields(), 1)
    assert samples(made) == {"2": 2, "3": 3}
    assert capsys.readouterr().out.splitlines() == [
        "left out: 1 in a.tar (not a picture)",
        "skipped, in samples without an image: 1 cls, 1 tif, 1 without an extension",
    ]
    made = shards.index(str(tmp_path), tmp_path, "*.tar", Fields(check=True), 1)
    assert samples(made) == {"2": 2}
    assert "left out: 3 in a.tar (cut or corrupt)\n" in capsys.readouterr().out
