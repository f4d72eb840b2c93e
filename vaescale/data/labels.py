"""Reads files of labels: CSV with commas, semicolons or tabs, lists with spaces, and plain lists in order."""

import csv
import io
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from . import DataError
from .names import clean
from .tar import label_of

SYNSETS = "meta.mat"
MOST_CLASSES = 1_000_000
DELIMITERS = ("\t", ";", ",")
# Column names of labels, where a file has more than two columns; the first that a file has counts.
HEADINGS = (
    *("label", "labels", "class", "class_id", "class_name", "classname", "category", "target", "wnid", "synset"),
    *("predictionstring", "breed", "species", "diagnosis"),
)
BOXES = "predictionstring"  # of Kaggle's ImageNet: a WordNet id and a box, as often as there are objects
UNKNOWN = {"", "-1", "-1.0", "nan"}
NOTHING = {"none", "null", "na", "n/a", "#n/a", "<na>", "-", "?"}  # the same, among numbers; else it may be a class
FRONT = re.compile(r"[\w./\\-]+")  # of a word, up to what may separate a name from a class
AMBIGUOUS = -1  # in place of a picture's number
SAMPLED = 1000  # lines by which a file's delimiter is found
# Endings that a name in a file of labels may have, whatever the picture's own is.
ENDINGS = {"jpg", "jpeg", "jpe", "jfif", "png", "webp", "bmp", "gif", "tif", "tiff", "heic", "heif"}

Rows = list[list[str]]


def read_labels(path: Path, pictures: Sequence[str], notes: list[str]) -> list[str] | list[int]:
    """The class name or number of each picture, given by its path below the source and sorted by its key.

    A file has a line for each picture, `name class` in any order, or it has one word or number for each picture in the
    order of their names. A name is a path or its last part, with or without extension; lines about other pictures are
    ignored. Numbers after names are the labels themselves; numbers in order are those of ILSVRC's development kit,
    which its `meta.mat` next to the file explains. Raises DataError for anything else.
    """
    text = _text(path)
    known = _Names(pictures)
    rows, name, label = _table(path, text, known)
    if not rows:
        return _in_order(path, text, pictures, known)
    given: dict[int, str] = {}
    others = 0
    for row in rows:
        number = known.find(row[name])
        if number is None:
            others += 1
        elif number == AMBIGUOUS:
            raise DataError(
                f"the labels {path} name {clean(row[name])}, and there are several: give their folders, too"
            )
        elif given.setdefault(number, row[label]) != row[label]:
            raise DataError(
                f"the labels {path} give {clean(row[name])} two classes, {clean(given[number])} and {clean(row[label])}"
            )
    missing = [picture for i, picture in enumerate(pictures) if i not in given]
    if missing:
        more = f", nor {len(missing) - 1} other pictures" if len(missing) > 1 else ""
        raise DataError(f"the labels {path} do not name {clean(missing[0])}{more}")
    if others:
        notes.append(f"{path}: {others} lines name pictures that are not there")
    return _numbers(path, [given[i] for i in range(len(pictures))], pictures)


def class_of(given: list[str] | list[int], classes: Sequence[str], where: str) -> tuple[list[str], list[int]]:
    """(class names, the label of each picture) from each picture's class, a name or the label itself.

    `classes`: names in the order of their labels; empty: those that are given, sorted, numbers by their value.
    """
    numbers = [one for one in given if isinstance(one, int)]
    if numbers:
        last = max(numbers)
        if last >= (len(classes) or MOST_CLASSES):
            raise DataError(
                f"{where} holds the class number {last}, "
                + (f"but --classes names only {len(classes)}" if classes else f"more than {MOST_CLASSES} classes")
            )
        return list(classes) or [str(label) for label in range(last + 1)], numbers
    names = [str(one) for one in given]
    known = list(classes) or sorted(set(names), key=_by_number if all(map(_is_number, names)) else None)
    place = {name: label for label, name in enumerate(known)}
    if unknown := sorted(set(names) - set(place)):
        raise DataError(f"{where} has the class {unknown[0]}, which is none of the {len(known)} given by --classes")
    return known, [place[name] for name in names]


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdecimal()


def _by_number(name: str) -> tuple[int, str]:
    return int(name), name


class _Names:
    """Finds pictures by what a file of labels calls them."""

    def __init__(self, pictures: Sequence[str]) -> None:
        paths = [_normal(picture) for picture in pictures]
        self._exact = _by_ends(paths)
        self._stems = _by_ends([path.rpartition(".")[0] for path in paths])

    def find(self, name: str, exactly: bool = False) -> int | None:
        """The number of the picture: by its path, or by fewer and fewer of its folders; None if there is none."""
        name = _normal(name.replace("\\", "/"))
        while True:
            if name in self._exact:
                return self._exact[name]
            if not exactly:
                stem, _, suffix = name.rpartition(".")
                for one in (name, stem if suffix.lower() in ENDINGS else name):
                    if one in self._stems:
                        return self._stems[one]
            if "/" not in name:
                return None
            name = name.partition("/")[2]


def _by_ends(paths: Sequence[str]) -> dict[str, int]:
    """The number of each path, by the path and by each of its ends that begins after a "/"; a whole path counts more
    than the end of another."""
    numbers: dict[str, int] = {}
    for number, path in enumerate(paths):
        numbers[path] = AMBIGUOUS if path in numbers else number
    whole = set(numbers)
    for number, path in enumerate(paths):
        while "/" in path:
            path = path.partition("/")[2]
            if path not in whole:
                numbers[path] = AMBIGUOUS if path in numbers else number
    return numbers


def _normal(text: str) -> str:
    """One form of letters with accents, which file systems write in two ways, and of unusual spaces."""
    return clean(unicodedata.normalize("NFC", text))


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
        wide = data[:2] in (b"\xff\xfe", b"\xfe\xff")  # as spreadsheets write "Unicode text"
        return data.decode("utf-16" if wide else "utf-8-sig")
    except (OSError, UnicodeDecodeError):
        raise DataError(f"the labels {path} cannot be read as text in UTF-8") from None


def _table(path: Path, text: str, known: _Names) -> tuple[Rows, int, int]:
    """(rows without a heading, column of the names, column of the labels); no rows if none names a picture.

    Of the possible delimiters the one counts by which the most lines name a picture.
    """
    readings = list(_readings(path, text, known))
    best = max(_candidates(readings, known, SAMPLED), key=_score, default=None)
    if not best or not best.found:  # the first lines may all be about other pictures
        best = max(_candidates(readings, known, None), key=_score, default=None)
    if not best or not best.found:
        return [], 0, 0
    rows, name = best.rows, best.name
    heading = [field.lower() for field in rows[0]] if known.find(rows[0][name]) is None else []
    label = 1 - name
    if max(map(len, rows)) > 2 or (best.spaces and all(map(_is_columns, rows[bool(heading) :]))):
        label = next((heading.index(one) for one in HEADINGS if one in heading), name)
        if label == name or max(map(len, rows)) > best.width:
            raise DataError(
                f"the labels {path} have more than two columns: leave the names and the classes, or call the column "
                f"of the classes `label`; quote what holds the delimiter"
            )
    if heading:
        rows = rows[1:]
    if heading and heading[label] == BOXES:
        rows = [[*row[:label], row[label].split(" ")[0], *row[label + 1 :]] for row in rows]
    return rows, name, label


class _Reading(NamedTuple):
    """A file's lines as one delimiter splits them."""

    rows: Rows
    width: int  # fields of most lines; shorter ones are filled up with empty fields
    spaces: bool = False
    name: int = 0  # the column that names pictures
    found: int = 0  # lines that do
    exact: int = 0  # of these, with the extension, too


def _score(reading: _Reading) -> tuple[int, int]:
    return reading.found, reading.exact


def _candidates(readings: Sequence[_Reading], known: _Names, first: int | None) -> Iterator[_Reading]:
    """Each column of each reading, with what its first lines find."""
    for reading in readings:
        for column in range(reading.width):
            fields = [row[column] for row in reading.rows[:first]]
            found = sum(known.find(field) is not None for field in fields)
            exact = sum(known.find(field, exactly=True) is not None for field in fields)
            yield reading._replace(name=column, found=found, exact=exact)


def _readings(path: Path, text: str, known: _Names) -> Iterator[_Reading]:
    """The fields of each line by every delimiter that makes two or more of most lines."""
    try:
        tables = [
            [
                fields
                for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
                if any(fields := [field.strip() for field in row])
            ]
            for delimiter in DELIMITERS
        ]
    except csv.Error as error:
        raise DataError(f"the labels {path} cannot be read as CSV ({error})") from None
    tables.append([_by_spaces(line, known) for line in text.splitlines() if line.strip()])
    for number, rows in enumerate(tables):
        width = Counter(map(len, rows)).most_common(1)[0][0] if rows else 0
        if width > 1:
            filled = [row + [""] * (width - len(row)) for row in rows]
            yield _Reading(filled, width, number == len(DELIMITERS))


def _by_spaces(line: str, known: _Names) -> list[str]:
    """[name, class] of a line, both of which may hold spaces; a line that names no picture is cut at its first."""
    words = line.replace('"', " ").split()
    for count in range(len(words) - 1, 0, -1):
        if known.find(" ".join(words[:count])) is not None:
            return [" ".join(words[:count]), " ".join(words[count:])]
    return [words[0], " ".join(words[1:])] if len(words) > 1 else words


def _is_columns(row: Sequence[str]) -> bool:
    """Whether a line by spaces holds several numbers after the name, which is no class."""
    words = row[1].split()
    return len(words) > 1 and all(_reads(float, word) for word in words)


def _in_order(path: Path, text: str, pictures: Sequence[str], known: "_Names") -> list[str] | list[int]:
    """One word, number or quoted name a line, in the order of the pictures."""
    lines = [fields for row in csv.reader(text.splitlines()) if any(fields := [field.strip() for field in row])]
    quoted = text.lstrip().startswith('"')
    if any(len(fields) > 1 or (not quoted and len(fields[0].split()) > 1) for fields in lines):
        raise DataError(
            f"the labels {path} do not name {clean(pictures[0])} nor any other picture: write lines of `name class`"
        )
    words = [fields[0] for fields in lines]
    fronts = [found[0] for word in words if (found := FRONT.match(word)) and found[0] != word]
    if 2 * sum(known.find(front) is not None for front in fronts) > len(words):  # `a.jpg|cat` is no class
        raise DataError(
            f"the labels {path} separate names and classes by none of commas, semicolons, tabs and spaces "
            f"({clean(words[0])}): write lines of `name,class`"
        )
    if len(words) == len(pictures) + 1 and words[0].lower() in HEADINGS:
        del words[0]
    if len(words) != len(pictures):
        raise DataError(f"the labels {path} have {len(words)} lines, but there are {len(pictures)} pictures")
    given = _numbers(path, words, pictures)
    numbers = [one for one in given if isinstance(one, int)]
    return list(_synsets(path, numbers)) if numbers else given


def _numbers(path: Path, given: list[str], pictures: Sequence[str]) -> list[str] | list[int]:
    """The labels as numbers, if all are. Raises DataError for one that says that the class is unknown."""
    unknown = UNKNOWN
    numbers = [_reads(label_of, label) for label in given]
    if any(numbers) and all(number or label.lower() in NOTHING for number, label in zip(numbers, given, strict=True)):
        unknown = UNKNOWN | NOTHING
    for label, picture in zip(given, pictures, strict=True):
        if label.lower() in unknown:
            raise DataError(
                f"the labels {path} give {clean(picture)} no class ({clean(label) or 'an empty field'}): leave such "
                f"pictures out of the source, or prepare all of them with --unlabelled"
            )
    try:
        return [label_of(label) for label in given]
    except ValueError:
        if all(_reads(float, label) for label in given):
            odd = next(label for label in given if not _reads(label_of, label))
            raise DataError(f"the labels {path} hold {clean(odd)}, which is no class number") from None
        return [clean(label) for label in given]


def _reads(kind: Callable[[str], object], text: str) -> bool:
    """Whether `kind` takes this text: `float` or `label_of`."""
    try:
        kind(text)
    except ValueError:
        return False
    return True


def _synsets(path: Path, numbers: Sequence[int]) -> list[str]:
    """The WordNet ids of the development kit's numbers 1 … 1000, which are in no sorted order."""
    try:
        from scipy.io import loadmat

        rows = loadmat(path.parent / SYNSETS, squeeze_me=True)["synsets"]
    except ImportError:
        raise DataError(f"{path.parent / SYNSETS} needs a package: pip install scipy") from None
    except (OSError, ValueError, KeyError):
        raise DataError(
            f"the labels {path} are numbers without names: put the development kit's {SYNSETS} beside them, or write "
            f"lines of `name number`"
        ) from None
    names = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in rows}
    if unknown := set(numbers) - set(names):
        raise DataError(f"{path} holds the number {min(unknown)}, which {SYNSETS} does not explain")
    return [names[number] for number in numbers]
