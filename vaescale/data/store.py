"""Where shards lie: a folder, or a URL that fsspec reads into a bounded cache on the node's disk. Never a shell.

Credentials are found by each protocol's own means (AWS_*, GOOGLE_APPLICATION_CREDENTIALS, HF_TOKEN, ~/.netrc for http,
or fsspec's FSSPEC_* variables); a URL that carries them is refused, for it would stand in the index and the log.
"""

import errno
import os
import random
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import fsspec
import xxhash
from braceexpand import braceexpand
from filelock import FileLock, Timeout

from . import DataError

EXTRAS = {"http": "http", "https": "http", "s3": "s3", "gs": "gs", "hf": "hf"}  # protocol → extra that brings it
OPEN_SHARDS = 64  # file descriptors that a process keeps
TRIES = 8  # of one shard; with the pauses between them about a minute
FIRST_PAUSE = 0.5  # seconds; each is twice as long as the one before, less a random part
STALL = 30.0  # seconds without a byte after which an http connection is given up
SLOWEST = 10_000  # bytes a second; what comes more slowly is begun anew
HASH = "[0-9a-f]" * 16  # of a shard, in the cache's file names
CHANGED = "its bytes are not those that were indexed"
AHEAD = 2  # shards that one process prefetches at once


class Shard(NamedTuple):
    name: str  # relative to the index's root
    samples: int
    bytes: int
    xxh3: str


def is_url(place: str) -> bool:
    return "://" in place


def check_place(place: str) -> str:
    """A folder or a URL of a known protocol, as it is; raises DataError for all else, and never repeats a secret."""
    if "pipe:" in place or "::" in place or (":" in place and not is_url(place)):
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
    if (
        not name
        or name.startswith("/")
        or ".." in name.split("/")
        or re.search(r"[:|?#%]", name)
        or not name.isprintable()
    ):
        raise DataError(f"{name!r:.80} is no name that a shard may have: it must lie under its folder")
    return name


def names_in(root: str, pattern: str) -> list[str]:
    """The shards under `root` that match `pattern`, which may hold *, ? and, as webdataset's do, {000..127}."""
    check_place(root)
    found: list[str] = []
    try:
        expanded = list(braceexpand(check_name(pattern.replace("?", "*")) and pattern))
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


def state(root: str, name: str) -> str:
    """Changes when a shard does: its size and time, or what the server tells. "" if nobody tells."""
    if not is_url(root):
        stat = (Path(root) / name).stat()
        return f"{stat.st_size} {stat.st_mtime_ns}"
    try:
        filesystem, path = _filesystem(f"{root.rstrip('/')}/{name}")
        return repr(sorted(filesystem.info(path).items(), key=repr))
    except Exception:  # fetching it will tell better what is wrong
        return ""


@contextmanager
def local(root: str, name: str) -> Iterator[Path]:
    """A shard as a local file: itself, or a copy for as long as it is needed."""
    if not is_url(root):
        yield Path(root) / name
        return
    with tempfile.TemporaryDirectory(prefix="vaescale-") as folder:
        path = Path(folder) / Path(name).name
        fetch(f"{root.rstrip('/')}/{name}", path)
        yield path


def fetch(url: str, target: Path, shard: Shard | None = None) -> None:
    """Copy a URL to a local file, with pauses between tries that double; it must be `shard`, where that is given."""
    wrong = ""
    for attempt in range(TRIES):
        if attempt:
            time.sleep(FIRST_PAUSE * 2 ** (attempt - 1) * (0.5 + random.random() / 2))
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
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                wrong = f"the disk of {target.parent} is full"
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


class Store:
    """The bytes of an index's shards. A process that forks needs no new one: files are opened where they are read."""

    def __init__(self, root: str, shards: Sequence[Shard], cache: str, gib: float) -> None:
        self.remote = is_url(root)
        self._root = root
        self._shards = shards
        self._files: dict[int, int] = {}
        self._cache = Cache(Path(cache).expanduser() / "shards", int(gib * 2**30))
        self._fetching: dict[int, threading.Thread] = {}
        if self.remote:
            self._cache.require(shards)

    def read(self, number: int, offset: int, length: int) -> bytes:
        """Bytes of shard `number`, fewer where it ends. Raises DataError if it cannot be had."""
        if not self.remote:
            return os.pread(self._opened(number), length, offset)
        while True:
            try:
                # Opened for one read: a file held open would take disk space after the cache has dropped it.
                with self._cached(number).open("rb", buffering=0) as file:
                    return os.pread(file.fileno(), length, offset)
            except FileNotFoundError:  # dropped by another process in between
                continue

    def refetch(self, number: int) -> None:
        """Drop a cached copy that turned out to be damaged; the next read fetches the shard again."""
        self._cache.drop(self._shards[number])

    def prefetch(self, numbers: Sequence[int]) -> None:
        """Begin to fetch those shards that are not in the cache, at most AHEAD at a time."""
        if not self.remote:
            return
        self._fetching = {number: thread for number, thread in self._fetching.items() if thread.is_alive()}
        for number in dict.fromkeys(numbers):
            if len(self._fetching) >= AHEAD:
                return
            if number not in self._fetching and not self._cache.path(self._shards[number]).exists():
                thread = threading.Thread(target=self._fetch_quietly, args=(number,), daemon=True)
                thread.start()
                self._fetching[number] = thread

    def _fetch_quietly(self, number: int) -> None:
        with suppress(DataError):  # whoever reads the shard will meet it again, and say so
            self._cached(number)

    def _cached(self, number: int) -> Path:
        shard = self._shards[number]
        return self._cache.get(shard, f"{self._root.rstrip('/')}/{shard.name}")

    def _opened(self, number: int) -> int:
        if number not in self._files:
            if len(self._files) >= OPEN_SHARDS:
                os.close(self._files.pop(next(iter(self._files))))
            shard = self._shards[number]
            path = Path(self._root) / shard.name
            try:
                file = os.open(path, os.O_RDONLY)
            except OSError as error:
                raise DataError(f"the shard {path} of the index cannot be read ({error.strerror})") from None
            self._files[number] = file
            if os.fstat(file).st_size != shard.bytes:
                raise DataError(f"the shard {path} has changed since it was indexed: verify the shards, or index anew")
        return self._files[number]


class Cache:
    """Shards fetched to this node, by their hash, never more than `limit` bytes; shared by all its processes and runs.

    A file is complete from the moment it has its name. The least recently used go when room is needed: reading sets
    the time of use. `HASH.lock` is held by who fetches that shard, `lock` by who makes room.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder = folder
        self.limit = limit

    def path(self, shard: Shard) -> Path:
        return self.folder / f"{shard.xxh3}.tar"

    def get(self, shard: Shard, url: str) -> Path:
        path = self.path(shard)
        try:
            os.utime(path)
        except FileNotFoundError:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._lock(shard.xxh3):
                if not path.exists():
                    partial = self._reserve(shard)
                    fetch(url, partial, shard)
                    partial.replace(path)
        return path

    def drop(self, shard: Shard) -> None:
        with self._lock("lock"):
            self.path(shard).unlink(missing_ok=True)

    def require(self, shards: Sequence[Shard]) -> None:
        """Raises DataError unless the cache can do its work."""
        least = (AHEAD + 1) * max(shard.bytes for shard in shards)
        if self.limit < min(least, sum(shard.bytes for shard in shards)):
            raise DataError(
                f"data.cache_gib={self.limit / 2**30:.3g} holds not even {AHEAD + 1} of these shards: give it at least "
                f"{least / 2**30:.3g}"
            )
        there = next(folder for folder in (self.folder, *self.folder.parents) if folder.exists())
        held = sum(size for _, size, _ in self._held())
        missing = min(self.limit, sum(shard.bytes for shard in shards)) - held
        if missing > (free := shutil.disk_usage(there).free):
            raise DataError(
                f"data.cache={self.folder} may grow by {missing / 2**30:.3g} GiB and its disk has {free / 2**30:.3g} "
                f"left: set data.cache to another disk, or data.cache_gib lower"
            )

    def _reserve(self, shard: Shard) -> Path:
        """Make room for a shard; its file's name holds the room until the bytes do."""
        while True:
            with self._lock("lock"):
                held = self._held()
                room = self.limit - sum(size for _, size, _ in held) - self._coming(shard)
                for _, size, path in held:
                    if room >= shard.bytes:
                        break
                    path.unlink(missing_ok=True)
                    room += size
                if room >= shard.bytes:
                    partial = self.folder / f"{shard.xxh3}.{shard.bytes}.partial"
                    partial.touch()
                    return partial
            time.sleep(0.1)  # all the room is promised to shards that are being fetched: they will be there soon

    def _held(self) -> list[tuple[int, int, Path]]:
        """(time of last use, bytes, path) of the shards here, the least recently used first; of no other file."""
        held = []
        for path in self.folder.glob(f"{HASH}.tar"):
            with suppress(FileNotFoundError):
                stat = path.stat()
                held.append((stat.st_mtime_ns, stat.st_size, path))
        return sorted(held)

    def _coming(self, shard: Shard) -> int:
        """Bytes promised to others; what a dead process left behind is removed."""
        coming = 0
        for partial in self.folder.glob(f"{HASH}.*.partial"):
            xxh3, size, _ = partial.name.split(".")
            if xxh3 == shard.xxh3:
                continue
            try:
                with self._lock(xxh3, timeout=0):
                    partial.unlink(missing_ok=True)
            except Timeout:
                coming += int(size)
        return coming

    def _lock(self, name: str, timeout: float = -1) -> FileLock:
        return FileLock(self.folder / f"{name}.lock", timeout=timeout)


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
