"""The rules for what is a data file and how a sample is named, shared by all commands that list or read data.

Hidden files and folders, and those that operating systems and editors leave behind, are ignored. Other files that are
not pictures are skipped, counted by extension and reported.
"""

import importlib.util
import unicodedata
from collections import Counter
from pathlib import PurePosixPath

# Extension of a file → the extension used in a shard.
EXTENSIONS = {"jpg": "jpg", "jpeg": "jpg", "jpe": "jpg", "jfif": "jpg", "png": "png", "webp": "webp"}
PICTURES = tuple(EXTENSIONS)
# The same for the extensions that `prepare --convert` adds: HEIF becomes JPEG, the others become PNG.
CONVERTIBLE_EXTENSIONS = {"tif": "png", "tiff": "png", "bmp": "png", "gif": "png"}
HEIF = {"heic": "jpg", "heif": "jpg"}  # needs the package pillow-heif
STORED = {**EXTENSIONS, **CONVERTIBLE_EXTENSIONS, **HEIF}
SPLITS = {"train", "training", "val", "valid", "validation", "dev", "eval", "test", "testing"}
LEFT_BEHIND = {
    *("__macosx", "__pycache__", "thumbs.db", "ehthumbs.db", "desktop.ini", "lost+found"),
    *("@eadir", "$recycle.bin", "system volume information"),
}
LONGEST_ENDING = 10  # characters
SHOWN = 8  # extensions in a summary
NO_ENDING = "without an extension"


def is_hidden(path: str) -> bool:
    """Returns whether a part of a relative path begins with a dot or is in LEFT_BEHIND (`._a.jpg`, `__MACOSX`)."""
    return any(
        (part.startswith(".") and part not in (".", "..")) or part.casefold() in LEFT_BEHIND for part in path.split("/")
    )


def ending(path: str) -> str:
    """Returns the lower-case extension of a file without the dot, or NO_ENDING."""
    suffix = PurePosixPath(path).suffix[1:]
    return suffix.lower() if suffix.isalnum() and len(suffix) <= LONGEST_ENDING else NO_ENDING


def extensions(convert: bool) -> dict[str, str]:
    """Returns the extensions that `prepare` accepts, each with the extension used in a shard."""
    if not convert:
        return EXTENSIONS
    return {**EXTENSIONS, **CONVERTIBLE_EXTENSIONS, **(HEIF if has_heif() else {})}


def has_heif() -> bool:
    return importlib.util.find_spec("pillow_heif") is not None


def offer(passed: Counter[str], convert: bool) -> str:
    """Returns `add --convert to include the 3 tiff` for skipped files, or "" if none could be converted."""
    heif = Counter({one: count for one, count in passed.items() if one in HEIF})
    if convert:
        return f"run `pip install pillow-heif` to include the {by_ending(heif)}" if heif else ""
    taken = heif + Counter({one: count for one, count in passed.items() if one in CONVERTIBLE_EXTENSIONS})
    first = " (heic and heif also need `pip install pillow-heif`)" if heif and not has_heif() else ""
    return f"add --convert to include the {by_ending(taken)}{first}" if taken else ""


def clean(text: str) -> str:
    """Makes `text` printable: unusual spaces become plain ones (NFKC), other unprintable characters become "_"."""
    if text.isprintable():
        return text
    return "".join(
        one if one.isprintable() else plain if (plain := unicodedata.normalize("NFKC", one)).isprintable() else "_"
        for one in text
    )


def key_of(path: str) -> str:
    """Returns the sample key for a picture at this relative path: the path without its extension.

    A dot becomes "_", because webdataset's keys end at the first dot.
    """
    parts = [part for part in path.rpartition(".")[0].split("/") if part not in ("", ".")]
    return clean("/".join(parts)).replace(".", "_")


def summary(pictures: int, passed: Counter[str]) -> str:
    """Returns, for example, `510 files: 503 images, 7 skipped: 3 tiff, 2 txt, 2 without an extension`."""
    total = f"{counted(pictures + passed.total(), 'file')}: {counted(pictures, 'image')}"
    return f"{total}, {passed.total()} skipped: {by_ending(passed)}" if passed else total


def by_ending(passed: Counter[str]) -> str:
    """Returns, for example, `3 tiff, 2 txt, 2 without an extension`: the most frequent extension first."""
    ranked = sorted(passed.items(), key=lambda item: (-item[1], item[0]))
    shown = [f"{count} {name}" for name, count in ranked[:SHOWN]]
    if rest := sum(count for _, count in ranked[SHOWN:]):
        shown.append(f"{rest} with other extensions")
    return ", ".join(shown)


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
