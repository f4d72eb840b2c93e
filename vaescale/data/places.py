"""The location of shards, a folder or a URL that fsspec reads, and fetching copies of them. No shell is ever run.

Each protocol finds credentials in its usual way (AWS_*, GOOGLE_APPLICATION_CREDENTIALS, HF_TOKEN, ~/.netrc for http,
or fsspec's FSSPEC_* variables). A URL that contains credentials is refused, because it would be stored in the index
and the log.
"""

import asyncio
import concurrent.futures
import errno
import os
import random
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

import fsspec
from braceexpand import braceexpand

from ..files import file_hash, is_plain
from . import DataError
from .names import is_hidden

EXTRAS = {"http": "http", "https": "http", "s3": "s3", "gs": "gs", "hf": "hf"}  # protocol → extra that installs it
TRIES = 8  # per shard; the pauses between them take 32 to 64 s in all
FIRST_PAUSE = 0.5  # seconds; each pause is twice as long as the one before, and each is shortened by a random part
STALL = 30.0  # seconds without a byte after which an http connection is closed
SILENCE = 2  # times STALL: limit without a byte of the file, whatever else arrives (headers, empty chunks, trailers)
LISTING = 600.0  # seconds that listing a folder may take
MOST_LISTED = 1 << 26  # bytes of the page that lists a folder: some 300,000 shards
MOST_UNANNOUNCED = 1 << 32  # bytes of a shard whose server does not announce its size
SLOWEST = 10_000  # bytes a second; a slower copy is started again
# Transient errors: those of a network file system that will return, and of a disk that can be read again.
PASSING = {
    *(errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EREMOTEIO, errno.ENOTCONN, errno.ECONNRESET),
    *(errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH, errno.ESHUTDOWN, errno.ECONNREFUSED),
}
REDIRECTS = ("TooManyRedirects", "NonHttpUrlRedirectClientError", "InvalidUrlRedirectClientError")  # of aiohttp
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}  # the disk cannot hold the file
CHANGED = "its bytes differ from those that were indexed"


Result = TypeVar("Result")


class Shard(NamedTuple):
    name: str  # relative to the index's root
    samples: int
    bytes: int
    xxh3: str


def is_url(place: str) -> bool:
    return "://" in place


def check_place(place: str) -> str:
    """Returns `place` unchanged if it is a folder or a URL of a known protocol.

    Raises DataError otherwise. The message never contains a secret.
    """
    if "pipe:" in place or "::" in place or (re.match(r"\w+:", place) and not is_url(place)):
        raise DataError(
            "shards are read from a folder or a URL: pipes and chained protocols (pipe:, ::) are not supported"
        )
    if is_url(place):
        try:
            url = urlsplit(place)
        except ValueError:
            raise DataError("the URL of the shards is invalid: check its brackets") from None
        if url.scheme not in EXTRAS:
            raise DataError(f"{url.scheme}:// is not a supported protocol: use {', '.join(EXTRAS)}")
        if "@" in url.netloc or url.query:
            raise DataError(
                f"the URL on {url.hostname} contains credentials or a query, which would be stored in the index and "
                f"the log: remove them, and use ~/.netrc, AWS_*, GOOGLE_APPLICATION_CREDENTIALS or HF_TOKEN"
            )
    return place


def check_name(name: str) -> str:
    """Returns `name` unchanged if it is a plain relative path, as a shard's name must be. Raises DataError if not."""
    if not name or name.startswith("/") or ".." in name.split("/") or re.search(r"[:|?#%]", name) or not is_plain(name):
        raise DataError(
            f"{name!r:.80} is not a valid shard name: it must be a relative path in the folder, without any of :|?#%"
        )
    return name


def names_in(root: str, pattern: str) -> list[str]:
    """Returns the names of the shards under `root` that match `pattern`.

    The pattern may contain *, ? and, as in webdataset, {000..127}. Raises DataError if nothing matches or the pattern
    is not allowed.
    """
    check_place(root)
    found: list[str] = []
    check_name(pattern.replace("?", "*"))
    try:
        expanded = list(braceexpand(pattern))
    except ValueError:
        raise DataError(f"the pattern {pattern} has an unmatched brace: write {{0000..1023}}") from None
    for one in expanded:
        check_name(one.replace("?", "*"))
        if not re.search(r"[*?\[]", one):
            found.append(one)
            continue
        listed = (
            _listed(root, one)
            if is_url(root)
            else sorted(path.relative_to(root).as_posix() for path in Path(root).glob(one) if not path.is_dir())
        )
        found += [name for name in listed if not is_hidden(name)]
    if not found:
        raise DataError(f"no file in {root} matches {pattern}: give the folder that contains the shards, or --pattern")
    if len(set(found)) < len(found):
        raise DataError(f"the pattern {pattern} names a shard twice")
    return [check_name(name) for name in found]


def url_of(root: str, name: str) -> str:
    return f"{root.rstrip('/')}/{name}"


def state(root: str, name: str) -> str:
    """Returns a text that changes when the shard does: its size and time, or the server's metadata; "" if unknown."""
    if not is_url(root):
        found = (Path(root) / name).stat()
        return f"{found.st_size} {found.st_mtime_ns}"
    try:
        filesystem, path = _filesystem(url_of(root, name))
        return repr(sorted(_called(filesystem, "info", path, late=_after(SILENCE * STALL)).items(), key=repr))
    except Exception:  # fetching the shard will give a better error
        return ""


@contextmanager
def local(root: str, name: str) -> Iterator[Path]:
    """Yields the path of a shard as a local file: the shard itself or a temporary copy. Raises DataError, OSError."""
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
    """Returns work(), which reads files, and repeats it after transient errors of their file system (PASSING).

    Raises the OSError of the last of TRIES tries, or any other error at once.
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
    return DataError(f"{path} cannot be read ({why}): check that it exists, its permissions and its file system")


def _pause(attempt: int) -> None:
    """Waits before every try but the first."""
    if attempt:
        time.sleep(FIRST_PAUSE * 2 ** (attempt - 1) * (0.5 + random.random() / 2))


def fetch(url: str, target: Path, shard: Shard | None = None) -> None:
    """Copies a URL to a local file, with up to TRIES tries and pauses that double.

    shard: if given, the size and hash that the copy must have. Raises DataError if the copy fails.
    """
    wrong = ""
    for attempt in range(TRIES):
        _pause(attempt)
        try:
            filesystem, path = _filesystem(url)
            watch = _Watch(target, shard.bytes if shard else None)
            _called(filesystem, "get_file", path, str(target), late=watch.late, callback=watch)
            if shard is None or (target.stat().st_size, file_hash(target)) == (shard.bytes, shard.xxh3):
                return
            raise Unfit(CHANGED)
        except Unfit as error:
            wrong = str(error)
        except Refused as error:
            wrong = str(error)
            break
        except FileNotFoundError:
            wrong = "the server has no such file"
            break
        except PermissionError:
            wrong = "the server denies access"
            break
        except ImportError:
            raise _uninstalled(url) from None
        except Exception as error:  # each protocol's library has its own errors
            # The text may contain a signed URL, so only the type and the status of the response are shown.
            status = getattr(error, "status", None)
            wrong = f"{type(error).__name__} {status or ''}".strip()
            if isinstance(error, OSError) and error.errno in FULL:
                wrong = f"{target.parent} cannot store it ({os.strerror(error.errno)})"
                break
            if status in (401, 403, 410) or type(error).__name__ in REDIRECTS:  # asking again does not help
                break
    raise DataError(f"{url} could not be fetched: {wrong}")


class Unfit(OSError):
    """The copy is unusable, but another try may succeed. The text says why."""


class Refused(Exception):
    """The server's response is refused, and another try would not help. The text says why."""


class _Watch(fsspec.Callback):
    """Aborts a copy that receives more bytes than the file has, or receives them too slowly.

    most: bytes of the file; None: as many as the server announces, or MOST_UNANNOUNCED if it announces no size.
    """

    def __init__(self, target: Path, most: int | None) -> None:
        super().__init__()
        self._target = target
        self._most = most
        self._announced: int | None = None
        self._got = 0
        self._begun = self._last = time.monotonic()

    def set_size(self, size: int | None) -> None:
        self._announced = size

    def relative_update(self, inc: int = 1) -> None:
        self._got += inc
        self._last = time.monotonic()
        seconds = self._last - self._begun
        if self._most is not None and self._got > self._most:
            raise Unfit(CHANGED)
        if self._most is None:
            self._check_announced()
        if seconds > STALL and self._got < SLOWEST * seconds:
            raise Unfit("the transfer is too slow")

    def late(self) -> bool:
        """Returns whether the last byte arrived too long ago."""
        return time.monotonic() - self._last > SILENCE * STALL

    def _check_announced(self) -> None:
        most = MOST_UNANNOUNCED if self._announced is None else self._announced
        if self._got > most:
            raise Refused(
                f"it has more than {most} bytes"
                + (", and the server announces no size" if most != self._announced else "")
            )
        free = shutil.disk_usage(self._target.parent).free
        if self._announced is not None and self._announced - self._got > free:
            raise Refused(f"it has {self._announced} bytes, but {self._target.parent} has only {free} left")


def _called(filesystem: Any, name: str, *arguments: Any, late: Callable[[], bool], **named: Any) -> Any:
    """Calls filesystem.name(…) and aborts it once late() is true. Any byte received resets the libraries' own limits.

    Synchronous file systems are called without this limit. Raises Unfit if the call is aborted.
    """
    if not filesystem.async_impl:
        return getattr(filesystem, name)(*arguments, **named)
    call = getattr(filesystem, f"_{name}")(*arguments, **named)
    future = asyncio.run_coroutine_threadsafe(call, filesystem.loop)
    while not concurrent.futures.wait([future], timeout=min(1.0, STALL / 4)).done:
        if late():
            future.cancel()
            raise Unfit("the transfer has stalled")
    return future.result()


def _after(seconds: float) -> Callable[[], bool]:
    end = time.monotonic() + seconds
    return lambda: time.monotonic() > end


@lru_cache(1)
def _bounded() -> type:
    """Returns aiohttp's response class with limits: headers within STALL, no compression, pages up to MOST_LISTED."""
    import aiohttp

    class Answer(aiohttp.ClientResponse):
        async def start(self, connection: Any) -> aiohttp.ClientResponse:
            await asyncio.wait_for(super().start(connection), STALL)
            if (coding := self.headers.get("Content-Encoding", "identity")).lower() not in ("identity", ""):
                raise Refused(
                    f"the server sends it compressed (Content-Encoding: {coding[:20]}), which is not supported"
                )
            return self

        async def read(self) -> bytes:
            page = bytearray()
            while part := await self.content.read(1 << 16):
                page += part
                if len(page) > MOST_LISTED:
                    self.close()
                    raise Refused(f"the listing has more than {MOST_LISTED} bytes")
            self._body = bytes(page)
            return self._body

    return Answer


def _filesystem(url: str) -> tuple[Any, str]:
    options: dict[str, Any] = {}
    if url.startswith("http"):
        import aiohttp

        # fsspec limits the whole file to five minutes, which is too short. The limit here is the time without a byte.
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=STALL, sock_read=STALL)
        options["client_kwargs"] = {
            "timeout": timeout,
            "trust_env": True,
            "headers": {"Accept-Encoding": "identity"},
            "auto_decompress": False,  # keeps the bytes as they were indexed, and as many as announced
            "response_class": _bounded(),
        }
    filesystem, path = fsspec.core.url_to_fs(url, **options)
    return filesystem, path


def _uninstalled(url: str) -> DataError:
    protocol = urlsplit(url).scheme
    return DataError(f"{protocol}:// needs another package: run `pip install 'vaescale[{EXTRAS[protocol]}]'`")


def _listed(root: str, pattern: str) -> list[str]:
    try:
        filesystem, path = _filesystem(root.rstrip("/"))
        found = _called(filesystem, "glob", f"{path}/{pattern}", late=_after(LISTING))
        return sorted(name[len(path) + 1 :] for name in found)
    except ImportError:
        raise _uninstalled(root) from None
    except Exception as error:
        why = str(error) if isinstance(error, Refused | Unfit) else type(error).__name__
        raise DataError(
            f"{root} cannot be listed ({why}): list the shards with braces, as in --pattern 'x-{{000..127}}.tar'"
        ) from None
