"""Files: bounded reading of untrusted JSON, atomic writes, hashes, readable sizes, and text that is safe to print."""

import json
import math
import os
import re
import stat
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import xxhash

MOST_BYTES = 1 << 24  # of one JSON file, by default
PART = 1 << 20  # bytes read at once
MOST_DEPTH = 32  # levels of lists and objects
JOINERS = "\u200c\u200d"  # format characters that occur in ordinary words and emoji


def read_bytes(path: Path, most: int = MOST_BYTES) -> bytes:
    """Returns the content of a regular file of at most `most` bytes. It never blocks on a pipe or a device.

    Raises OSError if the file cannot be read, and ValueError, with a phrase, if it is too large or not regular.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe without a writer would block
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError("it is not a regular file")
        data = bytearray()
        while len(data) <= most and (part := os.read(descriptor, min(most + 1 - len(data), PART))):
            data += part
    finally:
        os.close(descriptor)
    if len(data) > most:
        raise ValueError(f"it has more than {most} bytes")
    return bytes(data)


def read_json(path: Path, most: int = MOST_BYTES, lenient: bool = False) -> Any:
    """Returns the value in a JSON file. Raises OSError and ValueError as `read_bytes` and `parse_json` do."""
    return parse_json(read_bytes(path, most), lenient)


def parse_json(data: bytes, lenient: bool = False) -> Any:
    """Returns the value of a JSON text in UTF-8, at most MOST_DEPTH levels deep and without duplicate keys.

    Every number is a 64-bit integer or a finite float, and every string is valid Unicode. `lenient` also accepts what
    other programs write: NaN, infinities, integers of any size, half surrogate pairs, and damaged UTF-8 (read as
    U+FFFD). Raises only ValueError, with a phrase that says what is wrong.
    """
    try:
        text = data.decode("utf-8-sig", "replace" if lenient else "strict")
        value = json.loads(text, object_pairs_hook=_object, **(LENIENT if lenient else STRICT))
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON (line {error.lineno}, column {error.colno}: {error.msg})") from None
    except RecursionError:
        raise ValueError(f"it is nested more than {MOST_DEPTH} levels deep") from None
    if _deeper(text, MOST_DEPTH):
        raise ValueError(f"it is nested more than {MOST_DEPTH} levels deep")
    # Only escapes can produce surrogates, so few texts need the full check.
    if not lenient and re.search(r"\\u[dD][89a-fA-F]", text) and not _encodable(value):
        raise ValueError("it contains half of a surrogate pair")
    return value


def printable(text: object, most: int = 1000) -> str:
    """Returns `text`, cut to `most` characters, with escapes for those that could act on a terminal or hide in a log.

    These are control characters, line ends, changes of writing direction and half surrogates.
    """
    shown = str(text)
    if len(shown) > most:
        shown = f"{shown[:most]}…"
    if shown.isprintable():
        return shown
    return "".join(one if _harmless(one) else one.encode("unicode_escape").decode() for one in shown)


def is_plain(text: str) -> bool:
    """Returns whether `printable` would escape nothing, as is required of the names of classes, samples and files."""
    return text.isprintable() or all(map(_harmless, text))


@contextmanager
def atomically(path: Path) -> Iterator[Path]:
    """Yields a temporary path to write to, and renames it to `path` at the end. So `path` is never incomplete. After an
    error the temporary file is removed."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def file_hash(path: Path, algorithm: Callable[[], Any] = xxhash.xxh3_64) -> str:
    """Returns the hash of a file, by default the 64-bit xxh3, in hexadecimal. Raises OSError."""
    digest = algorithm()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def readable_size(count: float) -> str:
    """Formats a number of bytes, as in "1.50 GiB"."""
    for power, unit in ((3, "GiB"), (2, "MiB")):
        if count >= 1024**power:
            return f"{count / 1024**power:.{power - 1}f} {unit}"
    return f"{count / 1024:.1f} KiB"


def _harmless(character: str) -> bool:
    return unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Zl", "Zp") or character in JOINERS


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"it contains the key {printable(twice, 60)!r} twice")
    return value


def _whole(digits: str) -> int:
    if len(digits) > 20 or not -(2**63) <= (value := int(digits)) < 2**63:
        raise ValueError(f"it contains the number {digits[:25]}, which is too large")
    return value


def _finite(digits: str) -> float:
    if not math.isfinite(value := float(digits)):
        raise ValueError(f"it contains the number {digits[:25]}, which is too large")
    return value


def _constant(name: str) -> NoReturn:
    raise ValueError(f"it contains {name}, which is not a number")


def _any_whole(digits: str) -> int | float:
    return int(digits) if len(digits) < 400 else float(digits)  # int() takes quadratic time and refuses 4,301 digits


STRICT: dict[str, Any] = {"parse_int": _whole, "parse_float": _finite, "parse_constant": _constant}
NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
LENIENT: dict[str, Any] = {"parse_int": _any_whole}


def _deeper(text: str, depth: int) -> bool:
    """Returns whether the brackets of a valid JSON text are nested deeper than `depth`."""
    if text.count("[") + text.count("{") <= depth:
        return False
    if "\\" in text:
        text = re.sub(r"\\.", "", text)
    outside = "".join(text.split('"')[::2])  # the text outside of strings
    brackets = outside.encode().translate(None, NO_BRACKETS).decode()
    for _ in range(depth):
        brackets = brackets.replace("[]", "").replace("{}", "")
    return bool(brackets)


def _encodable(value: Any) -> bool:
    if isinstance(value, str):
        return value.isascii() or not any("\ud800" <= one <= "\udfff" for one in value)
    if isinstance(value, dict):
        return all(_encodable(key) and _encodable(part) for key, part in value.items())
    return all(map(_encodable, value)) if isinstance(value, list) else True
