"""Listing the pictures of a source and their classes. Nothing is extracted to disk.

A source is a tree of class folders, a tar of one, the ILSVRC2012 training tar (one inner tar per class), or pictures
without class folders.
"""

import os
import stat
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from tarfile import TarInfo
from typing import NamedTuple

from . import DataError
from .labels import class_of, read_labels
from .names import (
    SPLITS,
    STORED,
    by_ending,
    clean,
    counted,
    ending,
    extensions,
    is_hidden,
    key_of,
    offer,
    summary,
)
from .parallel import progress
from .tar import files

EXAMPLES = 3  # names in one message


class Picture(NamedTuple):
    """One picture of the source: `length` bytes of the file `path`, from byte `offset` on."""

    key: str
    extension: str
    path: str
    offset: int
    length: int
    label: int
    plain_key: str  # `key` before a number was added to make it unique


class Listing(NamedTuple):
    pictures: list[Picture]  # sorted by key
    classes: list[str]  # the name of each label
    notes: list[str]  # one line each, for the user


class Found(NamedTuple):
    """A picture whose class is not known yet; `name` is its path below the source."""

    name: str
    path: str
    offset: int
    length: int


def listing(
    source: Path,
    labels: Path | None,
    classes: Sequence[str],
    unlabelled: bool = False,
    out: Path | None = None,
    convert: bool = False,
) -> Listing:
    """Lists all pictures of `source`.

    labels: a label file, for pictures that are not in class folders.
    classes: class names in the order of their labels; empty: the names in the source, sorted.
    unlabelled: every label is 0 and there are no class names.
    out: a folder that is skipped, since it may be inside `source`.
    convert: list the formats that `decode.converted` reads, too.
    Raises DataError if something cannot be read or is ambiguous.
    """
    if not source.exists():
        raise DataError(f"{source} does not exist: give a tree of class folders or a tar of images")
    passed: Counter[str] = Counter()
    flat = unlabelled or labels is not None
    notes: list[str] = []
    if source.is_dir():
        found = list(_in_folder(source, out, passed, convert))
    elif _begins(source, b"PK\3\4"):  # zipfile.is_zipfile would accept a tar with a zip at its end
        raise DataError(f"{source} is a zip archive: unpack it and give the folder")
    else:
        found, wrapper = _unwrapped(source, list(_in_tar(source, passed, convert)), flat)
        notes += [f"class folders are those in {clean(wrapper)}/ of the tar"] if wrapper and not flat else []
    if not found:
        other = f", only {by_ending(passed)}" if passed else ""
        way = offer(passed, convert)
        raise DataError(
            f"{source} contains no images ({', '.join(extensions(convert))}){other}: {way}{', or ' if way else ''}give "
            f"a tree of class folders, a tar of one, the ILSVRC2012 training tar, or images without class folders "
            f"together with --labels or --unlabelled"
        )
    notes.insert(0, f"{source}: {summary(len(found), passed)}")
    if way := offer(passed, convert):
        notes.insert(1, way)
    keyed = _keyed(source, found, notes)
    if unlabelled:
        return Listing([_picture(key, one, 0) for key, one in keyed], [], notes)
    if labels:
        given = read_labels(labels, [one.name for _, one in keyed], notes)
    else:
        given = _class_folders(source, [one.name for _, one in keyed], passed, notes)
    names, numbers = class_of(given, classes, str(labels or source))
    pictures = [_picture(key, one, label) for (key, one), label in zip(keyed, numbers, strict=True)]
    return Listing(pictures, names, notes)


def _picture(key: str, one: Found, label: int) -> Picture:
    plain = key_of(one.name)
    plain = key if key == plain else plain  # they are mostly equal; this keeps one string in memory instead of two
    return Picture(key, STORED[ending(one.name)], one.path, one.offset, one.length, label, plain)


def _keyed(source: Path, found: Sequence[Found], notes: list[str]) -> list[tuple[str, Found]]:
    """Returns (key, picture) pairs sorted by key. Equal keys (of `a.b.jpg` and `a_b.jpg`) get a number appended."""
    keyed = sorted((key_of(one.name), one) for one in found)
    taken = {key for key, _ in keyed}
    changed = []
    number = 1
    for i, ((before, last), (key, one)) in enumerate(pairwise(list(keyed)), 1):
        if one.name == last.name:
            raise DataError(f"{source} contains {clean(one.name)} twice: remove one of the two")
        number = number + 1 if key == before else 1
        if number > 1:
            while f"{key}-{number}" in taken:
                number += 1
            taken.add(f"{key}-{number}")
            keyed[i] = (f"{key}-{number}", one)
    for key, one in keyed:
        if key != key_of(one.name) or clean(one.name) != one.name:
            changed.append(f"{clean(one.name)} → {key}")
    if changed:
        more = ", …" if len(changed) > EXAMPLES else ""
        notes.append(
            f"{counted(len(changed), 'image')} stored under another key than the file name (taken, or with characters "
            f"that keys cannot have): {', '.join(changed[:EXAMPLES])}{more}"
        )
    return keyed


def _class_folders(source: Path, paths: Sequence[str], passed: Counter[str], notes: list[str]) -> list[str]:
    """Returns the class of each picture: the first folder of its path. Raises DataError if one has no folder."""
    folders = [path.partition("/")[0] if "/" in path else "" for path in paths]
    names = set(folders) - {""}
    if not names:
        shards = " and may be shards (see `shards.py index`)" if passed["cls"] or passed["json"] else ""
        raise DataError(
            f"{source} has no class folders{shards}: give its label file with --labels, or --unlabelled if it has none"
        )
    if stray := folders.count(""):
        raise DataError(
            f"{source} has {counted(len(names), 'class folder')} ({', '.join(map(clean, sorted(names)[:EXAMPLES]))}"
            f"{', …' if len(names) > EXAMPLES else ''}) and {counted(stray, 'image')} "
            f"next to them ({clean(paths[folders.index('')])}): move these elsewhere, or give --labels or "
            f"--unlabelled"
        )
    if not source.is_dir() and _are_splits(names) and len(names) > 1:
        raise DataError(
            f"{source} contains the splits {', '.join(sorted(names))}: extract it, and prepare one split at a time"
        )
    known: dict[str, str] = {}
    for name in sorted(names):
        if (other := known.setdefault(clean(name), name)) != name:
            raise DataError(f"the class folders {name!a} and {other!a} in {source} would get the same name: rename one")
    inside = {path.split("/")[1] for path in paths if path.count("/") > 1}
    if len(names) == 1 and len(inside) > 1 and all(path.count("/") > 1 for path in paths):
        (name,) = names
        notes.append(
            f"there is one class, {clean(name)}, with its images in {len(inside)} folders "
            f"({', '.join(map(clean, sorted(inside)[:EXAMPLES]))}{', …' if len(inside) > EXAMPLES else ''}): if these "
            f"are the classes, use {clean(str(source / name))}"
        )
    return [clean(folder) for folder in folders]


def _in_folder(source: Path, out: Path | None, passed: Counter[str], convert: bool) -> Iterator[Found]:
    """Yields the pictures of a tree of any depth. Raises DataError for splits and class folders without pictures."""
    kinds = extensions(convert)
    holds: dict[str, Counter[str]] = {}  # class folder without a picture so far → its other files, by ending
    for folder, folders, names in progress(os.walk(source, True, _unreadable, True), f"list {source}", "folder"):
        inside = "" if folder == str(source) else f"{Path(folder).relative_to(source).as_posix()}/"
        top = inside.partition("/")[0]
        shards = [one for one in folders if _holds_shards(Path(folder, one), out)]
        if shards:
            holds.pop(top, None)  # a folder that contains folders of shards is no class
        folders[:] = [one for one in folders if not is_hidden(one) and one not in shards and not _loops(folder, one)]
        if not inside:
            if folders and _are_splits(folders):
                raise DataError(
                    f"{source} contains the splits {', '.join(sorted(folders))}: prepare one split at a time"
                )
            holds = {one: Counter() for one in folders}
        for name in names:
            if is_hidden(name):
                continue
            fault, length = _examine(Path(folder, name), kinds)
            if fault:
                passed[fault] += 1
                holds.get(top, Counter())[fault] += 1
            else:
                holds.pop(top, None)
                yield Found(inside + name, str(Path(folder, name)), 0, length)
    if holds:
        first = min(holds)
        others = f" ({by_ending(holds[first])})" if holds[first] else ""
        way = offer(holds[first], convert)
        raise DataError(
            f"{clean(str(source / first))} contains no images{others}; without it, the classes after it would get "
            f"other labels: fill or remove it{f', or {way}' if way else ''}"
        )


def _are_splits(folders: Iterable[str]) -> bool:
    return {folder.casefold() for folder in folders} <= SPLITS


def _examine(path: Path, kinds: Container[str]) -> tuple[str, int]:
    """Returns ("", bytes) for a picture, else (the file's ending, 0); a picture's ending is followed by the reason."""
    kind = ending(path.name)
    if kind not in kinds:
        return kind, 0
    try:
        state = path.stat()
    except PermissionError:
        return f"{kind} (unreadable)", 0
    except OSError:
        return f"{kind} (broken link)", 0
    return ("", state.st_size) if stat.S_ISREG(state.st_mode) else (f"{kind} (not a regular file)", 0)


def _holds_shards(folder: Path, out: Path | None) -> bool:
    """Returns whether a folder is `out` itself, or holds shards that were written or indexed earlier."""
    if out and out.exists() and folder.exists() and folder.samefile(out):
        return True
    return (folder / "prepared.json").is_file() or all(
        (folder / name).is_file() for name in ("index.json", "samples.npy")
    )


def _loops(folder: str, name: str) -> bool:
    """Returns whether an entry is a symbolic link to one of its ancestors, with all links resolved."""
    path = Path(folder, name)
    if not path.is_symlink():
        return False
    real = path.resolve()
    return any(one.resolve().is_relative_to(real) for one in (path.parent, *path.parent.parents))


def _unreadable(error: OSError) -> None:
    raise DataError(f"{error.filename} cannot be read ({error.strerror})")


def _begins(source: Path, magic: bytes) -> bool:
    with source.open("rb") as file:
        return file.read(len(magic)) == magic


def _in_tar(source: Path, passed: Counter[str], convert: bool) -> Iterator[Found]:
    """Yields the pictures of a tar. Those of an inner tar get the inner tar's name as their folder."""
    kinds = extensions(convert)
    with source.open("rb") as outer, source.open("rb") as within:
        for member in progress(files(outer, source), f"list {source}", "member"):
            if not is_hidden(member.name) and member.isfile() and ending(member.name) == "tar":
                inner = files(within, source, member.offset_data)
                yield from _pictures(source, inner, f"{Path(member.name).stem}/", passed, kinds)
            else:
                yield from _pictures(source, [member], "", passed, kinds)


def _pictures(
    source: Path, members: Iterable[TarInfo], folder: str, passed: Counter[str], kinds: Container[str]
) -> Iterator[Found]:
    for member in members:
        if is_hidden(member.name):
            continue
        kind = ending(member.name)
        if kind not in kinds:
            passed[kind] += 1
        elif not member.isfile() or member.issparse():
            passed[f"{kind} (not a regular file)"] += 1
        else:
            yield Found(folder + _plain(member.name), str(source), member.offset_data, member.size)


def _plain(name: str) -> str:
    """Normalises a member's path: no `./`, no `//` and no leading `/`."""
    return "/".join(part for part in name.split("/") if part not in ("", "."))


def _unwrapped(source: Path, found: list[Found], flat: bool) -> tuple[list[Found], str]:
    """Removes the outer folder that `tar cf x.tar folder` adds. Returns (pictures, the folder or "").

    A single folder of pictures is a class, unless it has the name of a split or `flat` is true (no class folders).
    """
    folders = {one.name.rpartition("/")[0] for one in found}
    if not folders or "" in folders:
        return found, ""
    wrapper = os.path.commonpath(folders)
    if folders == {wrapper} and not flat and not _are_splits([Path(wrapper).name]):
        wrapper = wrapper.rpartition("/")[0]
    if not wrapper:
        return found, ""
    return [one._replace(name=one.name[len(wrapper) + 1 :]) for one in found], wrapper
