"""Reading label files: CSV with commas, semicolons or tabs, lists with spaces, and plain lists in picture order."""

import csv
import io
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from . import DataError
from .names import clean, counted
from .tar import label_of

SYNSETS = "meta.mat"
MOST_CLASSES = 1_000_000
DELIMITERS = ("\t", ";", ",")
# Names of the label column, used if a file has more than two columns. The first name in this order counts.
HEADINGS = (
    *("label", "labels", "class", "class_id", "class_name", "classname", "category", "target", "wnid", "synset"),
    *("predictionstring", "breed", "species", "diagnosis"),
)
BOXES = "predictionstring"  # column of Kaggle's ImageNet: a WordNet id and a box, repeated for each object
UNKNOWN = {"", "-1", "-1.0", "nan"}  # labels of pictures whose class is unknown
NOTHING = {"none", "null", "na", "n/a", "#n/a", "<na>", "-", "?"}  # the same if the other labels are numbers
FRONT = re.compile(r"[\w./\\-]+")  # the beginning of a word, up to a character that may separate name and class
AMBIGUOUS = -1  # stands for the number of a picture if several match
SAMPLED = 1000  # lines used to find the delimiter of a file
# Extensions that a name in a label file may have, whatever the extension of the picture itself.
ENDINGS = {"jpg", "jpeg", "jpe", "jfif", "png", "webp", "bmp", "gif", "tif", "tiff", "heic", "heif"}

Rows = list[list[str]]


def read_labels(path: Path, pictures: Sequence[str], notes: list[str]) -> list[str] | list[int]:
    """Returns the class name of each picture, or the class number of each.

    pictures: their paths relative to the source, sorted by key. notes: receives notes for the user.
    The file has a line `name class` for each picture, in any order of lines and columns; or it has one word or number
    for each picture, in the order of `pictures`. A name is a path or the end of one, with or without extension. Lines
    about other pictures are ignored. Numbers next to names are the labels themselves. Numbers without names are those
    of ILSVRC's development kit and need its `meta.mat` next to the file. Raises DataError for anything else.
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
                f"the label file {path} names {clean(row[name])}, but several images have this name: write their "
                f"folders, too"
            )
        elif given.setdefault(number, row[label]) != row[label]:
            raise DataError(
                f"the label file {path} gives {clean(row[name])} two classes, {clean(given[number])} and "
                f"{clean(row[label])}: remove one of the lines"
            )
    missing = [picture for i, picture in enumerate(pictures) if i not in given]
    if missing:
        first, others = clean(missing[0]), len(missing) - 1
        if not others:
            raise DataError(f"the label file {path} has no line for {first}: add it, or remove the image")
        raise DataError(
            f"the label file {path} has no lines for {first} and {counted(others, 'other image')}: add them, or remove "
            f"the images"
        )
    if others:
        notes.append(f"{path}: {others} lines name images that are not in the source, and are ignored")
    return _numbers(path, [given[i] for i in range(len(pictures))], pictures)


def class_of(given: list[str] | list[int], classes: Sequence[str], where: str) -> tuple[list[str], list[int]]:
    """Returns (class names, label of each picture). given: the class of each picture, as a name or as the label.

    classes: the class names in the order of their labels. If it is empty, the names in `given` are sorted, names that
    are numbers by value. where: the file or folder, for messages. Raises DataError for a class not in `classes`.
    """
    numbers = [one for one in given if isinstance(one, int)]
    if numbers:
        last = max(numbers)
        if last >= (len(classes) or MOST_CLASSES):
            raise DataError(
                f"{where} contains the class number {last}, "
                + (
                    f"but --classes names only {len(classes)}"
                    if classes
                    else f"but at most {MOST_CLASSES} classes are supported"
                )
            )
        return list(classes) or [str(label) for label in range(last + 1)], numbers
    names = [str(one) for one in given]
    known = list(classes) or sorted(set(names), key=_by_number if all(map(_is_number, names)) else None)
    place = {name: label for label, name in enumerate(known)}
    if unknown := sorted(set(names) - set(place)):
        raise DataError(f"{where} has the class {unknown[0]}, which is not one of the {len(known)} in --classes")
    return known, [place[name] for name in names]


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdecimal()


def _by_number(name: str) -> tuple[int, str]:
    return int(name), name


class _Names:
    """Finds pictures by their names in a label file."""

    def __init__(self, pictures: Sequence[str]) -> None:
        paths = [_normal(picture) for picture in pictures]
        self._exact = _by_ends(paths)
        self._stems = _by_ends([path.rpartition(".")[0] for path in paths])

    def find(self, name: str, exactly: bool = False) -> int | None:
        """Returns the number of the picture by its path, or by fewer and fewer of its folders; None if none matches."""
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
    """Maps each path, and each of its ends that begins after a "/", to the number of the path.

    A whole path takes precedence over the end of another.
    """
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
    """Normalises accented letters, which file systems write in two ways, and unusual spaces."""
    return clean(unicodedata.normalize("NFC", text))


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
        wide = data[:2] in (b"\xff\xfe", b"\xfe\xff")  # spreadsheets write "Unicode text" so
        return data.decode("utf-16" if wide else "utf-8-sig")
    except (OSError, UnicodeDecodeError):
        raise DataError(f"the label file {path} cannot be read as UTF-8 text") from None


def _table(path: Path, text: str, known: _Names) -> tuple[Rows, int, int]:
    """Returns (rows without the heading, column of the names, column of the labels); no rows if none names a picture.

    The delimiter is the one with which most lines name a picture.
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
                f"the label file {path} has more than two columns: keep only the names and the classes, or name the "
                f"column of the classes `label`; quote fields that contain the delimiter"
            )
    if heading:
        rows = rows[1:]
    if heading and heading[label] == BOXES:
        rows = [[*row[:label], row[label].split(" ")[0], *row[label + 1 :]] for row in rows]
    return rows, name, label


class _Reading(NamedTuple):
    """The lines of a file, split by one delimiter."""

    rows: Rows
    width: int  # fields of most lines; shorter lines are padded with empty fields
    spaces: bool = False
    name: int = 0  # the column that names pictures
    found: int = 0  # lines that name a picture
    exact: int = 0  # lines that name a picture with its extension


def _score(reading: _Reading) -> tuple[int, int]:
    return reading.found, reading.exact


def _candidates(readings: Sequence[_Reading], known: _Names, first: int | None) -> Iterator[_Reading]:
    """Yields each column of each reading, with the matches in its first lines; None: in all lines."""
    for reading in readings:
        for column in range(reading.width):
            fields = [row[column] for row in reading.rows[:first]]
            found = sum(known.find(field) is not None for field in fields)
            exact = sum(known.find(field, exactly=True) is not None for field in fields)
            yield reading._replace(name=column, found=found, exact=exact)


def _readings(path: Path, text: str, known: _Names) -> Iterator[_Reading]:
    """Yields a reading for every delimiter that splits most lines into two or more fields."""
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
        raise DataError(f"the label file {path} cannot be read as CSV ({error})") from None
    tables.append([_by_spaces(line, known) for line in text.splitlines() if line.strip()])
    for number, rows in enumerate(tables):
        width = Counter(map(len, rows)).most_common(1)[0][0] if rows else 0
        if width > 1:
            filled = [row + [""] * (width - len(row)) for row in rows]
            yield _Reading(filled, width, number == len(DELIMITERS))


def _by_spaces(line: str, known: _Names) -> list[str]:
    """Splits a line into [name, class], which may both hold spaces. A line without a match is split at the first."""
    words = line.replace('"', " ").split()
    for count in range(len(words) - 1, 0, -1):
        if known.find(" ".join(words[:count])) is not None:
            return [" ".join(words[:count]), " ".join(words[count:])]
    return [words[0], " ".join(words[1:])] if len(words) > 1 else words


def _is_columns(row: Sequence[str]) -> bool:
    """Returns whether a line split at spaces has several numbers after the name, which are no class."""
    words = row[1].split()
    return len(words) > 1 and all(_reads(float, word) for word in words)


def _in_order(path: Path, text: str, pictures: Sequence[str], known: "_Names") -> list[str] | list[int]:
    """Reads one word, number or quoted name per line, in the order of the pictures."""
    lines = [fields for row in csv.reader(text.splitlines()) if any(fields := [field.strip() for field in row])]
    quoted = text.lstrip().startswith('"')
    if any(len(fields) > 1 or (not quoted and len(fields[0].split()) > 1) for fields in lines):
        raise DataError(
            f"the label file {path} names neither {clean(pictures[0])} nor any other image: write lines of `name class`"
        )
    words = [fields[0] for fields in lines]
    fronts = [found[0] for word in words if (found := FRONT.match(word)) and found[0] != word]
    if 2 * sum(known.find(front) is not None for front in fronts) > len(words):  # `a.jpg|cat` is no class
        raise DataError(
            f"the label file {path} does not separate names and classes by commas, semicolons, tabs or spaces "
            f"({clean(words[0])}): write lines of `name,class`"
        )
    if len(words) == len(pictures) + 1 and words[0].lower() in HEADINGS:
        del words[0]
    if len(words) != len(pictures):
        raise DataError(
            f"the label file {path} has {len(words)} lines for {len(pictures)} images: write one line per image"
        )
    given = _numbers(path, words, pictures)
    numbers = [one for one in given if isinstance(one, int)]
    return list(_synsets(path, numbers)) if numbers else given


def _numbers(path: Path, given: list[str], pictures: Sequence[str]) -> list[str] | list[int]:
    """Converts the labels to numbers if all of them are numbers. Raises DataError if one means an unknown class."""
    unknown = UNKNOWN
    numbers = [_reads(label_of, label) for label in given]
    if any(numbers) and all(number or label.lower() in NOTHING for number, label in zip(numbers, given, strict=True)):
        unknown = UNKNOWN | NOTHING
    for label, picture in zip(given, pictures, strict=True):
        if label.lower() in unknown:
            raise DataError(
                f"the label file {path} gives {clean(picture)} no class ({clean(label) or 'an empty field'}): remove "
                f"such images from the source, or prepare all of them with --unlabelled"
            )
    try:
        return [label_of(label) for label in given]
    except ValueError:
        if all(_reads(float, label) for label in given):
            odd = next(label for label in given if not _reads(label_of, label))
            raise DataError(f"the label file {path} contains {clean(odd)}, which is not a class number") from None
        return [clean(label) for label in given]


def _reads(kind: Callable[[str], object], text: str) -> bool:
    """Returns whether `kind`, which is `float` or `label_of`, accepts the text."""
    try:
        kind(text)
    except ValueError:
        return False
    return True


def _synsets(path: Path, numbers: Sequence[int]) -> list[str]:
    """Maps the numbers of the development kit (1 … 1000, in no sorted order) to WordNet ids."""
    try:
        from scipy.io import loadmat

        rows = loadmat(path.parent / SYNSETS, squeeze_me=True)["synsets"]
    except ImportError:
        raise DataError(f"{path.parent / SYNSETS} needs scipy: run `pip install scipy`") from None
    except (OSError, ValueError, KeyError):
        raise DataError(
            f"the label file {path} has numbers without names: put {SYNSETS} of the development kit next to it, or "
            f"write lines of `name number`"
        ) from None
    names = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in rows}
    if unknown := set(numbers) - set(names):
        raise DataError(f"{path} contains the number {min(unknown)}, which is not in {SYNSETS}")
    return [names[number] for number in numbers]
