"""Reading untrusted tars: the samples in them and the position of each picture.

Nothing is extracted or unpickled, and no name in a tar is used as a path. Only the picture, the class and the JSON of a
sample are read.

Members are grouped as in webdataset: the key is the name up to the first dot of its last part, and consecutive members
with the same key are one sample. If such a group has no picture (`a.2019.jpg`, `a.2019.cls`: key `a`), the key is the
name up to its last dot.
"""

import io
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import xxhash

from ..files import is_plain, parse_json, printable
from . import DataError, codes, decode
from .names import PICTURES, ending, is_hidden
from .places import PASSING

BLOCK = 512  # bytes of a tar header
MOST_BYTES = 1 << 28  # of one picture
MOST_HEAD = 1 << 24  # bytes of tar headers before a picture, including those of long names and PAX
MOST_TEXT = 1 << 20  # bytes of one .cls or .json
MOST_NAME = 200  # characters of an attribute's name
MOST_VALUE = float(np.finfo(np.float32).max)
# The exceptions that tarfile raises for bytes that are no tar, or for a hostile one.
ODD = (OSError, tarfile.TarError, ValueError, OverflowError, RecursionError, MemoryError)
ENCODING: dict[str, Any] = {"encoding": "utf-8", "errors": "replace"}  # of names

Members = list[tuple[str, tarfile.TarInfo]]  # (extension, member)


@dataclass(frozen=True)
class Fields:
    """Which members and fields of a sample are indexed."""

    extensions: tuple[str, ...] = PICTURES  # of the members that a model reads
    label_field: str = ""  # field of the sample's JSON with the class number; "": it is in the .cls
    unlabelled: bool = False  # every label is 0
    attributes: tuple[str, ...] | None = None  # numbers in the JSON to keep; None: all
    max_megapixels: int = decode.MAX_MEGAPIXELS  # larger pictures are left out
    check: bool = False  # decode every picture, not only its header


class Entry(NamedTuple):
    """One sample. The picture is at [offset, offset + length), its tar header in the `head` bytes before that."""

    key: str
    offset: int
    length: int
    head: int
    label: int
    check: int
    attributes: dict[str, float]
    fault: str  # why the picture cannot be decoded, one of decode.CAUSES; "" if it can


def scan(path: Path, fields: Fields = Fields(), passed: Counter[str] | None = None) -> Iterator[Entry]:
    """Yields the samples of one tar, in order. passed: counts the members that belong to no sample, by ending.

    Raises DataError if a sample is invalid or the tar is damaged or cut; tarfile itself mostly stops at a damaged
    header without an error.
    """
    keys: set[str] = set()
    with path.open("rb") as file:
        for group in _groups(_members(file, path)):
            samples = list(_samples(group, fields))
            for key, members in samples:
                if key in keys or len({extension for extension, _ in members}) < len(members):
                    raise DataError(
                        f"{path}: the key {key} occurs twice: give each sample its own key and write the shard again"
                    )
                keys.add(key)
                yield _entry(file, path, key, members, fields)
            if passed is not None and not samples:
                passed.update(ending(member.name) for _, member in group)


def checksum(data: bytes) -> int:
    """Returns the lower 32 bits of xxh3, which detect damage but not forgery."""
    return xxhash.xxh3_64_intdigest(data) & 0xFFFFFFFF


def key_in(head: bytes) -> str:
    """Returns the key from the tar header of a picture or of codes (which includes a long name's header, if any); "" if
    damaged."""
    try:
        with tarfile.open(fileobj=io.BytesIO(head), mode="r:", **ENCODING) as tar:
            first = tar.next()
    except ODD:
        return ""
    name, end = first.name if first else "", f".{codes.EXTENSION}"
    return printable(name.removesuffix(end) if name.endswith(end) else name.rpartition(".")[0])


def label_of(value: object) -> int:
    """Returns the class number in a .cls file or a JSON field: ASCII digits, or a whole number in JSON, below 2**31.

    3.0 is read as 3, because some programs write labels as floats. int() would also accept 0_1, +1 and the digits of
    other scripts. Raises ValueError otherwise.
    """
    text = value.strip() if isinstance(value, str) else repr(value)
    if not (digits := re.fullmatch(r"([0-9]{1,20})(\.0*)?", text)) or (label := int(digits[1])) >= 2**31:
        raise ValueError
    return label


def damaged(path: Path, place: int) -> str:
    return f"{path} is damaged or cut off at byte {place}: fetch or write this shard again"


def files(file: BinaryIO, path: Path, begin: int = 0) -> Iterator[tarfile.TarInfo]:
    """Yields the members of the tar that begins at byte `begin`, without folders.

    Raises DataError unless the tar is complete. Only zeros may follow its end, unless it is inside another tar.
    """
    file.seek(begin)
    end = begin
    try:
        tar = tarfile.open(fileobj=file, mode="r:", **ENCODING)  # noqa: SIM115  # `file` is the caller's to close
    except ODD as error:
        if getattr(error, "errno", None) in PASSING:
            raise  # the disk fails, not the tar
        raise DataError(f"{path} is not a plain tar file ({error}): only uncompressed tars can be read") from None
    try:
        for member in tar:
            end = tar.offset
            if member.size < 0:
                raise ValueError
            if not member.isdir():
                yield member
    except ODD as error:
        if getattr(error, "errno", None) in PASSING:
            raise
        raise DataError(damaged(path, tar.offset)) from None
    # A complete tar ends in zeros. Anything else after the last readable member means that samples are lost.
    file.seek(end)
    rest = file.read(BLOCK)
    whole = len(rest) == BLOCK
    while whole and rest:
        whole = not rest.strip(b"\0")
        rest = b"" if begin else file.read(1 << 20)
    if not whole:
        raise DataError(damaged(path, end))


def _members(file: BinaryIO, path: Path) -> Iterator[tarfile.TarInfo]:
    """Yields the members that are not hidden. Raises DataError for names and kinds of members that no shard needs."""
    for member in files(file, path):
        if not is_hidden(member.name):
            _refuse(path, member)
            yield member


def _groups(members: Iterable[tarfile.TarInfo]) -> Iterator[Members]:
    """Yields groups of consecutive members with the same key."""
    split = ((*_split(member.name), member) for member in members)
    for _, group in groupby(split, key=lambda member: member[0]):
        yield [(extension, member) for _, extension, member in group]


def _samples(group: Members, fields: Fields) -> Iterator[tuple[str, Members]]:
    """Yields (key, members) of each sample in a group that has a picture."""
    if any(extension in fields.extensions for extension, _ in group):
        yield _split(group[0][1].name)[0], group
        return
    stems: dict[str, Members] = {}
    for _, member in group:
        stem, _, extension = member.name.rpartition(".")
        stems.setdefault(stem, []).append((extension.lower(), member))
    for stem, members in stems.items():
        if any(extension in fields.extensions for extension, _ in members):
            yield stem, members


def _entry(file: BinaryIO, path: Path, key: str, members: Members, fields: Fields) -> Entry:
    pictures = [(extension, member) for extension, member in members if extension in fields.extensions]
    if len(pictures) > 1:
        names = " and ".join(member.name for _, member in pictures)
        raise DataError(f"{path}: the sample {key} has several images, {names}: choose one with --picture EXTENSION")
    extension, picture = pictures[0]
    if picture.size > MOST_BYTES:
        raise DataError(f"{path}: {picture.name} claims {picture.size} bytes, too many for an image")
    if picture.offset_data - picture.offset > MOST_HEAD:
        raise DataError(f"{path}: {picture.name} has a header of more than {MOST_HEAD} bytes, too many for an image")
    texts = {extension: member for extension, member in members if extension in ("cls", "json")}
    wanted = fields.attributes != () or (fields.label_field and not fields.unlabelled)
    record = _json(file, path, texts["json"]) if "json" in texts and wanted else {}
    data = _bytes(file, picture)
    return Entry(
        key,
        picture.offset_data,
        picture.size,
        picture.offset_data - picture.offset,
        _label(file, path, key, texts, record, fields),
        checksum(data),
        {name: value for name, value in _numbers(record) if fields.attributes is None or name in fields.attributes},
        _fault(data, fields) if extension in PICTURES else "",  # other formats are checked when they are read
    )


def _fault(data: bytes, fields: Fields) -> str:
    try:
        decode.check(data, fields.max_megapixels, fields.check)
    except decode.Damaged as error:
        return str(error)
    return ""


def _label(
    file: BinaryIO, path: Path, key: str, texts: dict[str, tarfile.TarInfo], record: dict[str, object], fields: Fields
) -> int:
    if fields.unlabelled:
        return 0
    value: object = None
    if fields.label_field:
        where = f"{key}.json, field {fields.label_field}"
        value = _field(record, fields.label_field)
    else:
        where = f"{key}.cls"
        if "cls" in texts:
            value = _text(file, path, texts["cls"]).decode("utf-8-sig", "replace").strip()
    if value is None:
        if apart := _apart(path, f"{key}.{'json' if fields.label_field else 'cls'}", texts):
            raise DataError(
                f"{path}: the members of the sample {key} are not next to each other, {apart} is elsewhere in the tar: "
                f"pack the files again, sorted by name (tar --sort=name)"
            )
        raise DataError(
            f"{path}: the sample {key} has an image but no class (no {where}): give --label-field NAME if its JSON "
            f"contains the class, or --unlabelled if there are no classes"
        )
    try:
        return label_of(value)
    except ValueError:
        raise DataError(f"{path}: {where} contains {value!r:.60}, not a class number") from None


def _field(record: object, name: str) -> object:
    """Returns a field of a JSON object. `a.b` is field b of field a, unless there is a field named `a.b`."""
    if isinstance(record, dict) and name in record:
        return record[name]
    first, dot, rest = name.partition(".")
    if isinstance(record, dict):
        return _field(record.get(first), rest) if dot else None
    if isinstance(record, list) and first.isdecimal() and int(first) < len(record):
        return _field(record[int(first)], rest) if dot else record[int(first)]
    return None


def _apart(path: Path, wanted: str, texts: dict[str, tarfile.TarInfo]) -> str:
    """Returns the member that a sample lacks if it is elsewhere in the tar, not next to the picture; else ""."""
    if any(member.name.lower() == wanted.lower() for member in texts.values()):
        return ""
    stem, _, extension = wanted.rpartition(".")
    with path.open("rb") as file:
        for member in _members(file, path):
            if member.name.rpartition(".")[0] == stem and member.name.rpartition(".")[2].lower() == extension:
                return member.name
    return ""


def _json(file: BinaryIO, path: Path, member: tarfile.TarInfo) -> dict[str, object]:
    try:
        record = parse_json(_text(file, path, member), lenient=True)
    except ValueError as error:
        raise DataError(f"{path}: {member.name} is not a JSON object: {error}") from None
    if not isinstance(record, dict):
        raise DataError(f"{path}: {member.name} is not a JSON object")
    return record


def _numbers(value: object, name: str = "") -> Iterator[tuple[str, float]]:
    """Yields (dotted name, number) for every number in a JSON value.

    true and false are 1 and 0. NaN and numbers beyond the range of float32 are skipped.
    """
    if isinstance(value, (bool, int, float)):
        if abs(value) <= MOST_VALUE:
            yield printable(name, MOST_NAME), float(value)
    elif isinstance(value, (dict, list)):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _numbers(part, f"{name}.{key}" if name else str(key))


def _text(file: BinaryIO, path: Path, member: tarfile.TarInfo) -> bytes:
    if member.size > MOST_TEXT:
        raise DataError(f"{path}: {member.name} claims {member.size} bytes, too many for a class or JSON")
    return _bytes(file, member)


def _bytes(file: BinaryIO, member: tarfile.TarInfo) -> bytes:
    return os.pread(file.fileno(), member.size, member.offset_data)


def _refuse(path: Path, member: tarfile.TarInfo) -> None:
    name = member.name
    if name.startswith("/") or ".." in name.split("/") or not is_plain(name):
        raise DataError(
            f"{path}: the member {name!r:.100} does not have a valid name: it must be a printable relative path"
        )
    if not member.isfile() or member.issparse():
        raise DataError(f"{path}: the member {name} is a link, a device or sparse, not a regular file")


def _split(name: str) -> tuple[str, str]:
    """Returns the (key, lower-case extension) of a member by webdataset's rule."""
    folder, slash, last = name.rpartition("/")
    stem, _, extension = last.partition(".")
    return folder + slash + stem, extension.lower()
