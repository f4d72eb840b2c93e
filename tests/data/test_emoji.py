"""The demo emoji, from a small package that has all that is special in npm's."""

import io
import json
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import ROOT, Start, finish
from vaescale.data import DataError
from vaescale.data.emoji import write_emoji
from vaescale.data.stream import Samples

CATEGORIES = ["Activities", "Flags", "Objects"]


def picture(number: int) -> Image.Image:
    """A square of one colour on a transparent ground; every third is grey, every fifth has a palette."""
    image = Image.new("RGBA", (64, 64), (255, 0, 255, 0))
    image.paste((number % 7 * 30, number, 255 - number, 255), (8, 8, 40, 56))
    if number % 3 == 0:
        return image.convert("LA")
    return image.quantize(8) if number % 5 == 0 else image


def package(root: Path) -> Path:
    """100 emoji: 40 in pairs of man and woman, a duplicate picture, a component, and one without an image."""
    (root / "img" / "google" / "64").mkdir(parents=True)
    records = []
    for number in range(100):
        points = f"{0x1F600 + number:X}"
        if number < 40:
            points = f"{('1F468', '1F469')[number % 2]}-200D-{0x2700 + number // 2:X}-FE0F"
        record = {"short_name": f"name-{number}", "unified": points, "sort_order": 1000 - number}
        record |= {"image": f"{points.lower()}.png", "category": CATEGORIES[number % 3], "has_img_google": True}
        records.append(record | {"skin_variations": {"1F3FB": {"image": f"{points.lower()}-1f3fb.png"}}})
        image = picture(98 if number == 50 else number)
        image.save(root / "img" / "google" / "64" / record["image"])
        image.save(root / "img" / "google" / "64" / f"{points.lower()}-1f3fb.png")
    records[60]["category"] = "Component"
    records[61]["has_img_google"] = False
    (root / "img" / "google" / "64" / records[61]["image"]).unlink()
    (root / "emoji.json").write_text(json.dumps(records))
    return root


def packed(root: Path, file: Path) -> Path:
    with tarfile.open(file, "w:gz") as tar:
        tar.add(root, "package")
    return file


def test_each_base_emoji_is_in_one_split(tmp_path: Path) -> None:
    """On white, with its category. Neither skin tones nor equal pictures, and pairs stay together."""
    counts = write_emoji(package(tmp_path / "package"), tmp_path / "out")
    assert sum(counts.values()) == 97  # without the component, the one without an image and the later of two equal ones
    keys: dict[str, list[int]] = {}
    for split, count in counts.items():
        source = Samples(tmp_path / "out" / split)
        assert (len(source.index), source.index.classes) == (count, CATEGORIES)
        keys[split] = [int(source.name(i)[1].removeprefix("name-")) for i in range(count)]
        for i, number in enumerate(keys[split]):
            data, label = source.read(i)
            assert CATEGORIES[label] == CATEGORIES[number % 3]
            found = Image.open(io.BytesIO(data))
            white = Image.new("RGBA", (64, 64), "white")
            expected = Image.alpha_composite(white, picture(number).convert("RGBA")).convert("RGB")
            assert (found.mode, found.size) == ("RGB", (64, 64))
            np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))
    assert sorted(keys["train"] + keys["val"]) == [i for i in range(100) if i not in (50, 60, 61)]
    pairs = [{number // 2 for number in numbers if number < 40} for numbers in keys.values()]
    assert not pairs[0] & pairs[1]
    assert all(pairs)
    assert 0.1 < counts["val"] / 97 < 0.2
    assert keys["train"] != sorted(keys["train"])


def test_folder_and_archive_give_the_same_shards(tmp_path: Path, start: Start) -> None:
    root = package(tmp_path / "package")
    command = [sys.executable, "launch/shards.py", "emoji"]
    sources = {"folder": root, "outside": tmp_path, "archive": packed(root, tmp_path / "x.tgz")}
    made = []
    for name, source in sources.items():
        code, output = finish(start([*command, str(source), str(tmp_path / name)]))
        assert code == 0, output
        made.append({path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name).rglob("*.*")})
    assert made[0] == made[1] == made[2]
    assert "train: 8" in output
    code, output = finish(start([*command, str(ROOT / "launch"), str(tmp_path / "none")]))
    assert (code, output.count("\n")) == (2, 1)
    assert "lacks emoji.json: run `npm pack emoji-datasource-google@16.0.0`" in output


def cut(root: Path) -> Path:
    file = packed(root, root.parent / "cut.tgz")
    file.write_bytes(file.read_bytes()[:-3000])
    return file


def no_archive(root: Path) -> Path:
    file = root.parent / "text.tgz"
    file.write_text("no archive")
    return file


def without_image(root: Path) -> Path:
    next((root / "img/google/64").glob("1f6*0.png")).unlink()
    return root


def damaged_image(root: Path) -> Path:
    next((root / "img/google/64").glob("1f6*0.png")).write_bytes(b"no picture")
    return root


def without_field(root: Path) -> Path:
    (root / "emoji.json").write_text('[{"category": "Flags", "has_img_google": true}]')
    return root


def listed(text: str) -> Callable[[Path], Path]:
    def edit(root: Path) -> Path:
        (root / "emoji.json").write_text(text)
        return root

    return edit


WRONG = {
    r"none does not exist": lambda root: root.parent / "none",
    r"cut.tgz is not a complete .tgz": cut,
    r"text.tgz is not a complete .tgz": no_archive,
    r"lacks img/google/64/1f6\w+0.png": without_image,
    r"is damaged \(img/google/64/1f6\w+0.png is not a picture\)": damaged_image,
    r"lacks sort_order": without_field,
    r"is damaged \(it is not JSON": listed("{"),
    r"is damaged \(.*indices": listed('["a"]'),
    r"is damaged \(.*iterable": listed("7"),
}


@pytest.mark.parametrize("message", WRONG)
def test_what_is_missing_is_one_sentence(tmp_path: Path, message: str) -> None:
    source = WRONG[message](package(tmp_path / "package"))
    with pytest.raises(DataError, match=message + ".*: run `npm pack emoji-datasource-google@16.0.0`"):
        write_emoji(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
