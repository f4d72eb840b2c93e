"""Where shards lie, a folder or a URL that fsspec reads, and how a copy of one is fetched. Never a shell.

Credentials are found by each protocol's own means (AWS_*, GOOGLE_APPLICATION_CREDENTIALS, HF_TOKEN, ~/.netrc for http,
or fsspec's FSSPEC_* variables); a URL that carries them is refused, for it would stand in the index and the log.
"""

import errno
import os
import random
import re
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

import fsspec
import xxhash
from braceexpand import braceexpand

from ..files import is_plain
from . import DataError

EXTRAS = {"http": "http", "https": "http", "s3": "s3", "gs": "gs", "hf": "hf"}  # protocol → extra that brings it
TRIES = 8  # of one shard; with the pauses between them about a minute
FIRST_PAUSE = 0.5  # seconds; each is twice as long as the one before, less a random part
STALL = 30.0  # seconds without a byte after which an http connection is given up
SLOWEST = 10_000  # bytes a second; what comes more slowly is begun anew
# What a network file system that will be back raises, and a disk that is read again.
PASSING = {
    *(errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EREMOTEIO, errno.ENOTCONN, errno.ECONNRESET),
    *(errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH, errno.ESHUTDOWN, errno.ECONNREFUSED),
}
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}  # what a disk raises for a file that it cannot take
CHANGED = "its bytes are not those that were indexed"


Result = TypeVar("Result")


class Shard(NamedTuple):
    name: str  # relative to the index's root
    samples: int
    bytes: int
    xxh3: str


def is_url(place: str) -> bool:
    return "://" in place


def check_place(place: str) -> str:
    """A folder or a URL of a known protocol, as it is; raises DataError for all else, and never repeats a secret."""
    if "pipe:" in place or "::" in place or (re.match(r"\w+:", place) and not is_url(place)):
        raise DataError("shards are read from a folder or a URL: pipes and chained protocols (pipe:, ::) are refused")
    if is_url(place):
        try:
            url = urlsplit(place)
        except ValueError:
            raise DataError("the URL of the shards is not a URL: check its brackets") from None
        if url.scheme not in EXTRAS:
            raise DataError(f"{url.scheme}:// is none of the protocols that shards are read by: {', '.join(EXTRAS)}")
        if "@" in url.netloc or url.query:
            raise DataError(
                f"the URL on {url.hostname} carries credentials or a query: leave them out, they would stand in the "
                f"index and the log; ~/.netrc, AWS_*, GOOGLE_APPLICATION_CREDENTIALS and HF_TOKEN are read"
            )
    return place


def check_name(name: str) -> str:
    """A shard's name under its root: a plain relative path."""
    if not name or name.startswith("/") or ".." in name.split("/") or re.search(r"[:|?#%]", name) or not is_plain(name):
        raise DataError(f"{name!r:.80} is no name that a shard may have: it must lie under its folder")
    return name


def names_in(root: str, pattern: str) -> list[str]:
    """The shards under `root` that match `pattern`, which may hold *, ? and, as webdataset's do, {000..127}."""
    check_place(root)
    found: list[str] = []
    check_name(pattern.replace("?", "*"))
    try:
        expanded = list(braceexpand(pattern))
    except ValueError:
        raise DataError(f"the pattern {pattern} has an odd brace: write {{0000..1023}}") from None
    for one in expanded:
        check_name(one.replace("?", "*"))
        if not re.search(r"[*?\[]", one):
            found.append(one)
        elif is_url(root):
            found += _listed(root, one)
        else:
            found += sorted(path.relative_to(root).as_posix() for path in Path(root).glob(one))
    if not found:
        raise DataError(f"no file in {root} matches {pattern}: give the folder that holds the shards, or --pattern")
    if len(set(found)) < len(found):
        raise DataError(f"the pattern {pattern} names a shard twice")
    return [check_name(name) for name in found]


def url_of(root: str, name: str) -> str:
    return f"{root.rstrip('/')}/{name}"


def state(root: str, name: str) -> str:
    """Changes when a shard does: its size and time, or what the server tells. "" if nobody tells."""
    if not is_url(root):
        found = (Path(root) / name).stat()
        return f"{found.st_size} {found.st_mtime_ns}"
    try:
        filesystem, path = _filesystem(url_of(root, name))
        return repr(sorted(filesystem.info(path).items(), key=repr))
    except Exception:  # fetching it will tell better what is wrong
        return ""


@contextmanager
def local(root: str, name: str) -> Iterator[Path]:
    """A shard as a local file: itself, or a copy for as long as it is needed."""
    if not is_url(root):
        path = Path(root) / name
        if not stat.S_ISREG(path.stat().st_mode):
            raise DataError(f"{path} is not a regular file")
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="vaescale-") as folder:
        path = Path(folder) / Path(name).name
        fetch(url_of(root, name), path)
        yield path


def patiently(work: Callable[[], Result]) -> Result:
    """The result of `work`, which reads files, tried again for about a minute while their file system is away.

    Raises the OSError that stays.
    """
    for attempt in range(TRIES):
        _pause(attempt)
        try:
            return work()
        except OSError as error:
            if error.errno not in PASSING or attempt == TRIES - 1:
                raise
    raise AssertionError


def unreadable(path: Path | str, error: OSError) -> DataError:
    why = error.strerror or type(error).__name__
    return DataError(f"{path} cannot be read ({why}): check that it is there, its permissions and its file system")


def _pause(attempt: int) -> None:
    """Before each try but the first; together TRIES of them wait for about a minute."""
    if attempt:
        time.sleep(FIRST_PAUSE * 2 ** (attempt - 1) * (0.5 + random.random() / 2))


def fetch(url: str, target: Path, shard: Shard | None = None) -> None:
    """Copy a URL to a local file, with pauses between tries that double; it must be `shard`, where that is given."""
    wrong = ""
    for attempt in range(TRIES):
        _pause(attempt)
        try:
            filesystem, path = _filesystem(url)
            filesystem.get_file(path, str(target), callback=_Watch(shard.bytes if shard else None))
            if shard is None or (target.stat().st_size, file_hash(target)) == (shard.bytes, shard.xxh3):
                return
            raise Unfit(CHANGED)
        except Unfit as error:
            wrong = str(error)
        except (FileNotFoundError, PermissionError) as error:
            wrong = type(error).__name__
            break
        except ImportError:
            raise _uninstalled(url) from None
        except Exception as error:  # each protocol's library has errors of its own
            # Its text may hold a signed URL: only what kind it was, and the status of the answer, may be told.
            status = getattr(error, "status", None)
            wrong = f"{type(error).__name__} {status or ''}".strip()
            if isinstance(error, OSError) and error.errno in FULL:
                wrong = f"{target.parent} takes no more ({os.strerror(error.errno)})"
                break
            if status in (401, 403, 410):  # asking again does not help
                break
    raise DataError(f"{url} could not be fetched: {wrong}")


class Unfit(OSError):
    """What was copied is of no use; the text says why."""


class _Watch(fsspec.Callback):
    """Ends a copy that brings more bytes than there are, or so few that it would take for ever."""

    def __init__(self, most: int | None) -> None:
        super().__init__()
        self._most = most
        self._got = 0
        self._begun = time.monotonic()

    def relative_update(self, inc: int = 1) -> None:
        self._got += inc
        seconds = time.monotonic() - self._begun
        if self._most is not None and self._got > self._most:
            raise Unfit(CHANGED)
        if seconds > STALL and self._got < SLOWEST * seconds:
            raise Unfit("it comes too slowly")


def _filesystem(url: str) -> tuple[Any, str]:
    options: dict[str, Any] = {}
    if url.startswith("http"):
        import aiohttp

        # fsspec's own limit of five minutes for the whole file is too short; what counts is that bytes still come.
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=STALL, sock_read=STALL)
        options["client_kwargs"] = {"timeout": timeout, "trust_env": True}
    filesystem, path = fsspec.core.url_to_fs(url, **options)
    return filesystem, path


def _uninstalled(url: str) -> DataError:
    protocol = urlsplit(url).scheme
    return DataError(f"{protocol}:// needs a package: pip install 'vaescale[{EXTRAS[protocol]}]'")


def _listed(root: str, pattern: str) -> list[str]:
    try:
        filesystem, path = _filesystem(root.rstrip("/"))
        return sorted(name[len(path) + 1 :] for name in filesystem.glob(f"{path}/{pattern}"))
    except ImportError:
        raise _uninstalled(root) from None
    except Exception as error:
        raise DataError(
            f"{root} cannot be listed ({type(error).__name__}): name the shards with braces, "
            f"--pattern 'x-{{000..127}}.tar'"
        ) from None


def file_hash(path: Path) -> str:
    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()
