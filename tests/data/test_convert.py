"""`prepare --convert` turns TIFF, BMP, GIF and HEIF into the formats of shards."""

import io
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import PIL
import pytest
from PIL import Image

from tests.conftest import jpeg
from tests.data.test_listing import command, tree
from tests.data.test_tar import tar
from vaescale.data import decode, names
from vaescale.data.decode import Damaged, converted
from vaescale.data.index import Index
from vaescale.data.stream import Samples

DRAWN = np.random.default_rng(0)
RGB = Image.fromarray(DRAWN.integers(0, 256, (20, 30, 3), np.uint8))
DEEP = DRAWN.integers(0, 1 << 16, (20, 30), np.uint16)
HEIF = '''
from PIL import Image, PngImagePlugin

class Heif(PngImagePlugin.PngImageFile):
    """A PNG behind twelve other bytes stands for a HEIF file."""
    format = "HEIF"

    def _open(self):
        self.fp.seek(12)
        super()._open()

def register_heif_opener():
    Image.register_open("HEIF", Heif, lambda prefix: prefix[4:12] == b"ftypheic")
'''


def stored(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


@pytest.mark.parametrize(
    ("kind", "modes"),
    [
        ("TIFF", ["1", "L", "P", "RGB", "RGBA", "CMYK", "LA", "YCbCr"]),
        ("BMP", ["1", "L", "P", "RGB", "RGBA"]),
        ("GIF", ["1", "L", "P", "RGB", "RGBA", "LA"]),
    ],
)
def test_pixels_are_kept(kind: str, modes: list[str]) -> None:
    """Returns the pixels that Pillow reads from the file, as the reference."""
    for mode in modes:
        data = stored(RGB.convert(mode), kind)
        if mode == "YCbCr" and PIL.__version__ < "13":  # it cannot read the file that it has written itself
            continue
        made = pixels(converted(data, 95))
        assert made.format == "PNG"
        assert made.mode in ("L", "RGB")
        assert (np.asarray(made.convert("RGB")) == np.asarray(pixels(data).convert("RGB"))).all(), mode
        assert decode.validation_image(converted(data, 95), 20).shape == (20, 20, 3)


@pytest.mark.parametrize("kind", ["TIFF", "GIF"])
def test_white_shows_through_and_the_first_picture_counts(kind: str) -> None:
    first, second = RGB.convert("RGBA"), Image.new("RGBA", RGB.size, "red")
    first.paste((0, 0, 0, 0), (0, 0, 10, 10))
    made = np.asarray(pixels(converted(stored(first, kind, save_all=True, append_images=[second]), 95)).convert("RGB"))
    assert (made[:10, :10] == 255).all()
    apart = np.abs(made[10:].astype(int) - np.asarray(RGB)[10:]).mean()
    assert apart < (1 if kind == "TIFF" else 20)  # a GIF has 256 colours


@pytest.mark.parametrize("order", ["<", ">"])
def test_16_bits_of_grey_are_kept(order: str) -> None:
    """In both byte orders; so the warning of dark pictures, and the scaling, are those of PNGs."""
    image = Image.frombytes("I;16" if order == "<" else "I;16B", (30, 20), DEEP.astype(f"{order}u2").tobytes())
    made = converted(stored(image, "TIFF"), 95)
    assert (np.asarray(pixels(made)) == DEEP).all()
    assert not decode.is_dark(made)
    assert decode.is_dark(converted(stored(Image.fromarray(DEEP >> 4), "TIFF"), 95))


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_values_without_a_known_white_are_left_out(kind: type) -> None:
    with pytest.raises(Damaged, match=r"^bit depth is neither 8 nor 16$"):
        converted(stored(Image.fromarray(DEEP.astype(kind)), "TIFF"), 95)


def test_a_turned_picture_is_made_upright() -> None:
    exif = Image.Exif()
    exif[274] = 6  # turn clockwise
    made = np.asarray(pixels(converted(stored(RGB, "TIFF", exif=exif), 95)))
    assert (made == np.rot90(np.asarray(RGB), -1)).all()


def test_what_needs_no_conversion_stays_as_it_is() -> None:
    for data in (jpeg(0), stored(RGB, "PNG"), stored(RGB, "WEBP"), jpeg(0)[:-200]):
        assert converted(data, 95) == data


def test_too_many_pixels_are_refused_before_they_are_decoded() -> None:
    for kind in ("TIFF", "BMP", "GIF", "PNG"):
        data = stored(Image.new("L", (2000, 1001)), kind)
        with pytest.raises(Damaged, match=r"^too many pixels$"):
            converted(data, 95, max_megapixels=2)
        converted(data, 95, max_megapixels=3)


def test_hostile_bytes_are_damaged_and_nothing_else(capfd: pytest.CaptureFixture[str]) -> None:
    draw = random.Random(0)
    sound = [stored(RGB, kind) for kind in ("TIFF", "BMP", "GIF")]
    sound += [stored(RGB, "TIFF", compression=how) for how in ("tiff_lzw", "jpeg", "tiff_deflate")]
    seen = set()
    for number in range(1500):
        data = bytearray(sound[number % len(sound)])
        for _ in range(draw.choice((1, 2, 5))):
            data[draw.randrange(draw.choice((60, len(data))))] = draw.randrange(256)
        try:
            decode.check(converted(bytes(data[: draw.choice((len(data), draw.randrange(len(data))))]), 95))
            seen.add("sound")
        except Damaged as error:
            seen.add(str(error))
    assert seen == {"sound", "not a picture", "cut or corrupt", "too many pixels"}
    capfd.readouterr()  # libtiff writes on its own


def mixed(root: Path) -> dict[str, bytes]:
    """Returns a folder with files of every kind, and the files by name."""
    files = {
        "1.jpg": jpeg(1),
        "2.TIFF": stored(RGB, "TIFF"),
        "3.bmp": stored(RGB, "BMP"),
        "4.gif": stored(RGB, "GIF"),
        "5.jpg": stored(RGB, "TIFF"),  # a wrong ending
        "6.tif": jpeg(6),
        "7.tif": b"II no picture",
        "8.tif": stored(Image.fromarray(DEEP.astype(np.float32)), "TIFF"),
        "9.heic": b"\0\0\0\x18ftypheic" + stored(RGB, "PNG"),
        "notes.txt": b"",
    }
    root.mkdir()
    for name, data in files.items():
        (root / name).write_bytes(data)
    return files


def contents(folder: Path) -> dict[str, bytes]:
    source = Samples(folder)
    return {source.name(number)[1]: source.read(number)[0] for number in range(len(source.index))}


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_a_folder_of_everything(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Without --convert, a message says what it would include; with it, the pixels equal those of the files."""
    source = tmp_path / "d"
    files = mixed(source)
    if kind == "tar":
        source = tar(tmp_path / "d.tar", *files.items())
    assert command("prepare", source, "--unlabelled", "--out", tmp_path / "plain")
    output = capsys.readouterr().out.splitlines()
    assert output[:2] == [
        f"{source}: 10 files: 2 images, 8 skipped: 3 tif, 1 bmp, 1 gif, 1 heic, 1 tiff, 1 txt",
        "add --convert to include the 3 tif, 1 bmp, 1 gif, 1 heic, 1 tiff (heic and heif also need `pip install "
        "pillow-heif`)",
    ]
    assert list(contents(tmp_path / "plain")) == ["1"]
    assert command("prepare", source, "--unlabelled", "--convert", "--out", tmp_path / "converted")
    output = capsys.readouterr().out.splitlines()
    assert output[:2] == [
        f"{source}: 10 files: 8 images, 2 skipped: 1 heic, 1 txt",
        "run `pip install pillow-heif` to include the 1 heic",
    ]
    assert sorted(line for line in output if line.startswith("left out")) == [
        "left out: 7 (not a picture)",
        "left out: 8 (bit depth is neither 8 nor 16)",
    ]
    made = contents(tmp_path / "converted")
    assert sorted(made) == ["1", "2", "3", "4", "5", "6"]
    assert {key: made[key] for key in "16"} == {"1": files["1.jpg"], "6": files["6.tif"]}
    for key in "235":
        assert (np.asarray(pixels(made[key])) == np.asarray(RGB)).all()
    assert command("prepare", source, "--unlabelled", "--convert", "--short-side", 10, "--out", tmp_path / "small")
    assert {pixels(data).size for key, data in contents(tmp_path / "small").items() if key in "2345"} == {(15, 10)}


@pytest.fixture
def heif(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Installs a substitute for pillow-heif with its name and its function."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "pillow_heif.py").write_text(HEIF)
    monkeypatch.syspath_prepend(tmp_path / "site")
    decode._convertible.cache_clear()
    yield
    decode._convertible.cache_clear()
    sys.modules.pop("pillow_heif", None)
    Image.OPEN.pop("HEIF", None)
    Image.ID.remove("HEIF")


def test_heif_with_its_package(tmp_path: Path, heif: None, capsys: pytest.CaptureFixture[str]) -> None:
    """The result is a JPEG of --quality, about as large as the file; with --short-side it is compressed only once."""
    assert names.has_heif()
    smooth = Image.open(io.BytesIO(jpeg(0, 200, 160)))
    data = b"\0\0\0\x18ftypheic" + stored(smooth, "PNG")
    made = converted(data, 90)
    assert made == decode.prepared(stored(smooth, "PNG"), 160, 90)
    assert (np.asarray(pixels(converted(data, 0))) == np.asarray(smooth)).all()
    source = tree(tmp_path / "d", "1.jpg")
    (source / "2.HEIC").write_bytes(data)
    assert command("prepare", source, "--unlabelled", "--out", tmp_path / "plain")
    assert capsys.readouterr().out.splitlines()[1] == "add --convert to include the 1 heic"
    assert command("prepare", source, "--unlabelled", "--convert", "--quality", 90, "--out", tmp_path / "out")
    assert capsys.readouterr().out.startswith(f"{source}: 2 files: 2 images\n")
    assert contents(tmp_path / "out")["2"] == made
    small = ["--short-side", 40, "--quality", 90, "--out", tmp_path / "small"]
    assert command("prepare", source, "--unlabelled", "--convert", *small)
    assert contents(tmp_path / "small")["2"] == decode.prepared(stored(smooth, "PNG"), 40, 90)


def test_class_folders_of_other_formats(tmp_path: Path) -> None:
    source = tree(tmp_path / "d", "a/1.jpg", "b/1.jpg")
    (source / "b" / "1.jpg").unlink()
    for number in range(3):
        (source / "b" / f"{number}.tif").write_bytes(stored(RGB, "TIFF"))
    assert command("prepare", source, "--out", tmp_path / "out", code=2)
    assert command("prepare", source, "--convert", "--out", tmp_path / "out")
    assert Index(tmp_path / "out").classes == ["a", "b"]
    assert len(Index(tmp_path / "out")) == 4
