"""Reading the bytes of shards: from a folder, or from a URL through a bounded cache on the node's disk."""

import os
import resource
import shutil
import stat
import threading
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from . import DataError, places
from .places import Shard, fetch, is_url, url_of

HASH = "[0-9a-f]" * 16  # pattern of a shard's hash in the cache's file names
AHEAD = 2  # shards that one process prefetches at a time


class Store:
    """The bytes of an index's shards. A forked process can use its copy, because files are opened at the first read."""

    def __init__(self, root: str, shards: Sequence[Shard], cache: str, gib: float) -> None:
        self.remote = is_url(root)
        self._root = root
        self._shards = shards
        self._files: dict[int, int] = {}
        weakref.finalize(self, _close, self._files)
        # The order walks `data.columns` shards at a time, and opening one for each sample takes longer than reading it.
        # So a process keeps all of them open, as far as it may: half of its files are left to others.
        allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._most_open = len(shards) if allowed == resource.RLIM_INFINITY else allowed // 2
        self._cache = Cache(Path(cache).expanduser() / "shards", int(gib * 2**30))
        self._fetching: dict[int, threading.Thread] = {}
        if self.remote:
            self._cache.require(shards)

    def read(self, number: int, offset: int, length: int) -> bytes:
        """Returns bytes of shard `number`, fewer at its end. Raises DataError if the shard cannot be read."""
        try:
            return places.patiently(lambda: self._read(number, offset, length))
        except OSError as error:
            shard = self._shards[number]
            path = self._cache.path(shard) if self.remote else Path(self._root) / shard.name
            raise places.unreadable(f"the shard {path} of the index", error) from None

    def _read(self, number: int, offset: int, length: int) -> bytes:
        if not self.remote:
            file = self._opened(number)
            try:
                return os.pread(file, length, offset)
            except OSError:
                with suppress(OSError):
                    os.close(self._files.pop(number))  # it may be stale once the file system is back
                raise
        while True:
            try:
                # Open the file for one read only: an open file uses disk space after the cache has removed it.
                with self._cached(number).open("rb", buffering=0) as cached:
                    return os.pread(cached.fileno(), length, offset)
            except FileNotFoundError:  # another process has just removed it
                continue

    def refetch(self, number: int) -> None:
        """Removes a damaged copy from the cache, so that the next read fetches the shard again."""
        self._cache.drop(self._shards[number])

    def prefetch(self, numbers: Sequence[int]) -> None:
        """Starts fetching those of the shards that are not in the cache, at most AHEAD at a time."""
        if not self.remote:
            return
        self._fetching = {number: thread for number, thread in self._fetching.items() if thread.is_alive()}
        for number in dict.fromkeys(numbers):
            if len(self._fetching) >= AHEAD:
                return
            if number not in self._fetching and not _used(self._cache.path(self._shards[number])):
                thread = threading.Thread(target=self._fetch_quietly, args=(number,), daemon=True)
                thread.start()
                self._fetching[number] = thread

    def _fetch_quietly(self, number: int) -> None:
        with suppress(DataError):  # reading the shard will raise it again
            self._cached(number)

    def _cached(self, number: int) -> Path:
        shard = self._shards[number]
        return self._cache.get(shard, url_of(self._root, shard.name))

    def _opened(self, number: int) -> int:
        if number not in self._files:
            if len(self._files) >= self._most_open:
                os.close(self._files.pop(next(iter(self._files))))
            shard = self._shards[number]
            path = Path(self._root) / shard.name
            file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # opening a pipe would block
            found = os.fstat(file)
            if not stat.S_ISREG(found.st_mode) or found.st_size != shard.bytes:
                os.close(file)
                raise DataError(
                    f"the shard {path} has changed since it was indexed: verify the shards, or index them again"
                )
            self._files[number] = file
        return self._files[number]


def _close(files: dict[int, int]) -> None:
    while files:
        os.close(files.popitem()[1])


class Cache:
    """A cache of at most `limit` bytes for fetched shards, shared by all processes and runs of a node.

    A shard is stored as `HASH.tar`, which is complete as soon as it exists. The least recently used shards are removed
    when space is needed; reading a shard sets its time of use. A process holds `HASH.lock` while it fetches that
    shard, and `lock.lock` while it removes files or reserves space.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder = folder
        self.limit = limit

    def path(self, shard: Shard) -> Path:
        return self.folder / f"{shard.xxh3}.tar"

    def get(self, shard: Shard, url: str) -> Path:
        """Returns the path of a complete copy. Raises DataError if fetching fails or the cache cannot be used."""
        path = self.path(shard)
        if not _used(path):
            try:
                self._bring(shard, url)
            except (OSError, NotImplementedError) as error:
                raise self._unusable(error) from None
        return path

    def _bring(self, shard: Shard, url: str) -> None:
        path = self.path(shard)
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._lock(shard.xxh3):
            if not path.exists():
                partial = self._reserve(shard)
                fetch(url, partial, shard)
                # _reserve counts the complete shards and then the reserved ones. The lock keeps it from missing this
                # one, which changes from reserved to complete.
                with self._lock("lock"):
                    partial.replace(path)

    def _unusable(self, error: OSError | NotImplementedError) -> DataError:
        why = getattr(error, "strerror", "") or str(error) or type(error).__name__
        return DataError(
            f"data.cache={self.folder} cannot be used ({why}): set data.cache to a folder of your own on a local disk"
        )

    def drop(self, shard: Shard) -> None:
        with suppress(OSError, NotImplementedError), self._lock("lock"):
            self.path(shard).unlink(missing_ok=True)

    def require(self, shards: Sequence[Shard]) -> None:
        """Raises DataError unless the cache is large enough, fits on its disk and is writable."""
        total = sum(shard.bytes for shard in shards)
        least = (AHEAD + 1) * max(shard.bytes for shard in shards)
        if self.limit < min(least, total):
            raise DataError(
                f"data.cache_gib={self.limit / 2**30:.3g} is too small for {AHEAD + 1} of these shards: set it to at "
                f"least {least / 2**30:.3g}"
            )
        try:
            self._require_room(shards, total)
        except (OSError, NotImplementedError) as error:
            raise self._unusable(error) from None

    def _require_room(self, shards: Sequence[Shard], total: int) -> None:
        there = next(folder for folder in (self.folder, *self.folder.parents) if folder.exists())
        held = self._held()
        if {path.name for _, _, path in held}.issuperset(self.path(shard).name for shard in shards):
            return  # nothing will be written
        missing = min(self.limit, total) - sum(size for _, size, _ in held)
        if missing > (free := shutil.disk_usage(there).free):
            raise DataError(
                f"data.cache={self.folder} may grow by {missing / 2**30:.3g} GiB, but its disk has only "
                f"{free / 2**30:.3g} GiB left: set data.cache to another disk, or lower data.cache_gib"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._lock("lock"):  # shows before the first step that the folder is writable
            pass

    def _reserve(self, shard: Shard) -> Path:
        """Reserves space for a shard by an empty file whose name holds the size, and removes old shards if needed."""
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
            time.sleep(0.1)  # all space is reserved for shards that are being fetched and will soon be complete

    def _held(self) -> list[tuple[int, int, Path]]:
        """Returns (time of last use, bytes, path) of the cached shards, the least recently used first."""
        held = []
        for path in self.folder.glob(f"{HASH}.tar"):
            with suppress(FileNotFoundError):
                stat = path.stat()
                held.append((stat.st_mtime_ns, stat.st_size, path))
        return sorted(held)

    def _coming(self, shard: Shard) -> int:
        """Returns the bytes reserved for other shards, and removes the partial files of dead processes."""
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


def _used(path: Path) -> bool:
    """Sets a cached shard's time of use to now. Returns whether it exists; other users' files can be read, too."""
    try:
        os.utime(path)
    except OSError:
        with suppress(OSError):
            return path.exists()
        return False
    return True
