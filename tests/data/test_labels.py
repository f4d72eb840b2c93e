"""Label files as spreadsheets, pandas and papers write them."""

from pathlib import Path

import pytest

from tests.conftest import jpeg
from vaescale.data import DataError
from vaescale.data.listing import listing

PICTURES = ["0.jpg", "1.jpg", "22.05.jpg", "my photo.jpg"]
NAMES = ["golden retriever", "golden eagle", "cat", "golden retriever"]
NUMBERS = [3, 0, 1, 0]


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flat")
    for number, picture in enumerate(PICTURES):
        (folder / picture).write_bytes(jpeg(number))
    return folder


def read(folder: Path, file: Path) -> list[str]:
    """Returns the class of each image."""
    made = listing(folder, file, [])
    return [made.classes[one.label] for one in made.pictures]


def lines(delimiter: str, classes: list[str] | list[int], pictures: list[str] = PICTURES) -> str:
    return "".join(f"{name}{delimiter}{label}\n" for name, label in zip(pictures, classes, strict=True))


STEMS = ["0", "1", "22.05", "my photo"]
TABLES = {
    "commas": lines(",", NAMES),
    "commas and a space": lines(", ", NAMES),
    "semicolons": lines(";", NAMES),
    "tabs": lines("\t", NAMES),
    "spaces": lines(" ", NAMES),
    "several spaces": lines("   ", NAMES),
    "stems": lines(",", NAMES, STEMS),
    "stems and spaces": lines(" ", NAMES, STEMS),
    "other extensions": lines(",", NAMES, [f"{stem}.PNG" for stem in STEMS]),
    "paths": lines(",", NAMES, [f"./images/{name}" for name in PICTURES]),
    "absolute paths of Windows": lines(",", NAMES, [f"C:\\images\\{name}" for name in PICTURES]),
    "heading": "filename,label\n" + lines(",", NAMES),
    "heading, reversed": "label;file\n" + "".join(f"{n};{p}\n" for p, n in zip(PICTURES, NAMES, strict=True)),
    "quotes": '"file";"class"\n' + "".join(f'"{p}";"{n}"\n' for p, n in zip(PICTURES, NAMES, strict=True)),
    "Windows": "\ufeff" + lines(",", NAMES).replace("\n", "\r\n") + "\r\n",
    "any order, once more, and others": lines(",", NAMES[::-1], PICTURES[::-1]) + "1.jpg,golden eagle\nnone.jpg,dog\n",
    "pandas' index": ",file,split,breed\n" + "".join(f"{i},{PICTURES[i]},x,{NAMES[i]}\n" for i in (3, 2, 1, 0)),
    "no line end": lines(",", NAMES).rstrip(),
}


@pytest.mark.parametrize("kind", TABLES)
def test_tables_of_class_names(tmp_path: Path, flat: Path, kind: str) -> None:
    (tmp_path / "labels").write_text(TABLES[kind], newline="")
    assert read(flat, tmp_path / "labels") == NAMES


def test_spreadsheets_write_utf_16(tmp_path: Path, flat: Path) -> None:
    (tmp_path / "labels").write_text(TABLES["tabs"], "utf-16")
    assert read(flat, tmp_path / "labels") == NAMES


@pytest.mark.parametrize("form", ["{}", "{}.0", "{}.", "0{}"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", " "])
def test_tables_of_numbers(tmp_path: Path, flat: Path, form: str, delimiter: str) -> None:
    """Numbers are the labels themselves; there is no class 2."""
    (tmp_path / "labels").write_text(lines(delimiter, [form.format(number) for number in NUMBERS]))
    made = listing(flat, tmp_path / "labels", [])
    assert [one.label for one in made.pictures] == NUMBERS
    assert made.classes == ["0", "1", "2", "3"]
    assert listing(flat, tmp_path / "labels", list("wxyz")).classes == list("wxyz")
    with pytest.raises(DataError, match="contains the class number 3, but --classes names only 2"):
        listing(flat, tmp_path / "labels", ["w", "x"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cat\ndog\ncat\ndog\n", ["cat", "dog", "cat", "dog"]),
        ('"golden eagle"\n"cat"\ncat\n"golden eagle"\n', ["golden eagle", "cat", "cat", "golden eagle"]),
        ("label\r\ncat\r\ndog\r\n\r\ncat\r\ndog", ["cat", "dog", "cat", "dog"]),
    ],
)
def test_lists_in_order(tmp_path: Path, flat: Path, text: str, expected: list[str]) -> None:
    (tmp_path / "labels").write_text(text, newline="")
    assert read(flat, tmp_path / "labels") == expected


WRONG = {
    "a line is missing": (lines(",", NAMES[:3], PICTURES[:3]), r"has no line for my photo\.jpg: add it, or"),
    "lines are missing": (lines(",", NAMES[:2], PICTURES[:2]), r"no lines for \S+ and 1 other image: add them, or"),
    "other names": (lines(",", NAMES, list("abcd")), r"names neither 0\.jpg nor any other image"),
    "too few in order": ("cat\ndog\n", "has 2 lines for 4 images"),
    "conflict": (lines(",", NAMES) + "0.jpg,cat\n", r"gives 0\.jpg two classes, golden retriever and cat"),
    "no class": (lines(",", ["cat", "", "cat", "cat"]), r"gives 1\.jpg no class \(an empty field\)"),
    "no class, by spaces": ("0.jpg cat\n1.jpg\n22.05.jpg cat\nmy photo.jpg cat\n", r"gives 1\.jpg no class"),
    "-1": (lines(" ", [-1, 0, 1, 2]), r"gives 0\.jpg no class \(-1\).*--unlabelled"),
    "nan": (lines(",", [0, "nan", 1, 2]), r"gives 1\.jpg no class \(nan\)"),
    "None among numbers": (lines(",", [0, "None", 1, 2]), r"gives 1\.jpg no class \(None\)"),
    "an odd delimiter": (
        "0.jpg|cat\n1.jpg|dog\n22.05.jpg|cat\nmy_photo.jpg|dog\n",
        r"by commas, semicolons, tabs or spaces.*\(0\.jpg\|cat\)",
    ),
    "-2": (lines(",", [0, -2, 1, 2]), "contains -2, which is not a class number"),
    "a measure": (lines(",", [0, 1.5, 1, 2]), r"contains 1\.5, which is not a class number"),
    "full width": (lines(",", [0, "１２", 1, 2]), "contains １２, which is not a class number"),
    "underscore": (lines(",", [0, "0_1", 1, 2]), "contains 0_1, which is not a class number"),
    "many columns": (lines(",", ["1,0,1"] * 4), "has more than two columns"),
    "many columns, by spaces": (lines(" ", ["1 -1 1"] * 4), "has more than two columns"),
    "a comma in a class": (lines(",", ["eagle, golden", *NAMES[1:]]), "more than two columns.*quote"),
    "a NUL": ("0.jpg,1\0\n", "cannot be read as CSV|names neither|has no lines? for|not a class number"),
    "numbers in order": ("1\n2\n3\n1\n", r"has numbers without names: put .*meta\.mat"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_files_are_one_sentence(tmp_path: Path, flat: Path, kind: str) -> None:
    text, message = WRONG[kind]
    (tmp_path / "labels").write_text(text)
    with pytest.raises(DataError, match=message):
        read(flat, tmp_path / "labels")


def test_names_are_found_by_the_folders_they_give(tmp_path: Path) -> None:
    """Equal names in two folders need the folder; accented letters match in both Unicode forms."""
    root = tmp_path / "d"
    for path in ("a/1.jpg", "b/1.jpg", "b/2.jpg", "c/Gro\u0308\u00dfe.jpg"):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(jpeg(0))
    file = tmp_path / "labels"
    file.write_text("data/a/1.jpg,x\nb/1.jpg,y\n2,z\nGr\u00f6\u00dfe,x\n")
    assert read(root, file) == ["x", "y", "z", "x"]
    file.write_text("1.jpg,x\n2.jpg,y\n")
    with pytest.raises(DataError, match=r"names 1\.jpg, but several images have this name: write their folders"):
        read(root, file)
