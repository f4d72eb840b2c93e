"""File systems that fail temporarily or permanently, and cache folders that belong to another user."""

import errno
import fcntl
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import samples
from tests.data.server import Faults, serve
from vaescale import files
from vaescale.data import DataError, index, places, shards, store, stream
from vaescale.data.index import Index
from vaescale.data.store import Cache
from vaescale.data.tar import Fields
from vaescale.files import is_plain

PASSING = [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN]
LASTING = [errno.EACCES, errno.ENOENT, errno.ELOOP, errno.EMFILE, errno.ENAMETOOLONG]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "FIRST_PAUSE", 0.001)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name, count in (("train", 20), ("val", 5)):
        shards.write(tmp_path / "data" / name, samples(count), 7, [])
    return tmp_path / "data"


class Failing:
    """A function that fails the first `times` times it is called, or with `where` only for such arguments."""

    def __init__(self, function: Callable[..., Any], number: int, times: float) -> None:
        self.function, self.number, self.times, self.calls = function, number, times, 0

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        self.calls += 1
        if self.calls <= self.times:
            raise OSError(self.number, os.strerror(self.number))
        return self.function(*arguments, **named)


def config(root: Path, **changes: Any) -> stream.Config:
    return stream.Config(**{"root": str(root), "size": 16, "columns": 4, "workers": 0, **changes})


def first(root: Path, workers: int = 0) -> stream.Batch:
    slices = stream.TrainSlices(config(root, workers=workers), seed=7)
    return next(stream.train_loader(slices, 0, 8, 1, 0, 1, pin=False)).batch


@pytest.mark.parametrize("number", PASSING)
@pytest.mark.parametrize("call", ["pread", "open", "fstat"])
def test_a_shard_that_can_be_read_again(root: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int) -> None:
    expected = first(root).x
    samples_ = stream.Samples(root / "train")
    failing = Failing(getattr(os, call), number, places.TRIES - 1)
    monkeypatch.setattr(store.os, call, failing)
    assert samples_.read(3) == (samples(20)[3].image, 3)
    assert failing.calls >= places.TRIES
    monkeypatch.undo()
    assert (first(root).x == expected).all()


def test_a_stale_file_is_opened_anew(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After ESTALE a descriptor stays stale, so the file is opened again; no descriptor is left open."""
    samples_ = stream.Samples(root / "train")
    samples_.read(3)
    (stale,) = samples_.store._files.values()
    pread, descriptors = os.pread, len(list(Path("/proc/self/fd").iterdir()))

    def gone(file: int, length: int, offset: int) -> bytes:
        if file == stale and failing.calls == 0:
            failing()
        return pread(file, length, offset)

    failing = Failing(lambda: None, errno.ESTALE, 1)
    monkeypatch.setattr(store.os, "pread", gone)
    assert samples_.read(3) == (samples(20)[3].image, 3)
    assert len(list(Path("/proc/self/fd").iterdir())) == descriptors


@pytest.mark.parametrize("call", ["pread", "open"])
@pytest.mark.parametrize("number", [PASSING[0], *LASTING])
def test_a_shard_that_stays_unreadable(root: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int) -> None:
    samples_ = stream.Samples(root / "train")
    failing = Failing(getattr(os, call), number, float("inf"))
    monkeypatch.setattr(store.os, call, failing)
    with pytest.raises(
        DataError, match=r"the shard .*000000\.tar of the index cannot be read \(\w.*\): check"
    ) as caught:
        samples_.read(3)
    monkeypatch.undo()
    assert os.strerror(number) in str(caught.value)
    assert failing.calls == (places.TRIES if number in PASSING else 1)


def test_a_worker_reports_the_same_error(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store.os, "pread", Failing(os.pread, errno.EIO, float("inf")))
    with pytest.raises(DataError) as caught:
        first(root, workers=1)
    assert str(caught.value).startswith("the shard ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("what", ["pipe", "folder", "device", "other size"])
def test_a_shard_replaced_by_something_else(root: Path, what: str) -> None:
    path = root / "train" / "000000.tar"
    path.unlink()
    if what == "pipe":
        os.mkfifo(path)
    elif what == "device":
        path.symlink_to("/dev/zero")
    elif what == "folder":
        path.mkdir()
    else:
        path.write_bytes(b"1")
    samples_ = stream.Samples(root / "train")
    for _ in range(2):  # what has been opened and refused is not taken the second time
        with pytest.raises(DataError, match=r"the shard .*000000\.tar has changed since it was indexed"):
            samples_.read(0)
    (found,) = shards.verify(root / "train", decoding=False, processes=1)
    assert (found.shard, found.lost) == ("000000.tar", 7)
    if what != "folder":
        with pytest.raises(
            DataError, match=r"000000\.tar (is damaged or cut|is not a plain tar|is not a regular file)"
        ):
            shards.index(str(root / "train"), root / "again", "*.tar", Fields(), 1)


INDEX_CALLS = [(files.os, "open"), (files.os, "read"), (index, "open_memmap"), (index, "file_hash"), (index, "_parts")]


@pytest.mark.parametrize(("module", "call"), INDEX_CALLS, ids=[call for _, call in INDEX_CALLS])
def test_an_index_on_a_file_system_that_fails(
    root: Path, monkeypatch: pytest.MonkeyPatch, module: Any, call: str
) -> None:
    original = getattr(module, call)
    monkeypatch.setattr(module, call, Failing(original, errno.ESTALE, places.TRIES - 1))
    Index(root / "train").check()
    for number in (errno.EIO, errno.EACCES):
        monkeypatch.setattr(module, call, Failing(original, number, float("inf")))
        with pytest.raises(DataError, match=rf"train.* cannot be read \({os.strerror(number)}\): check that") as caught:
            Index(root / "train").check()
        assert is_plain(str(caught.value))


@pytest.mark.parametrize(("module", "call"), [(os, "pread"), (tarfile.TarInfo, "fromtarfile")])
def test_a_disk_that_fails_is_not_called_a_damaged_shard(
    root: Path, monkeypatch: pytest.MonkeyPatch, module: Any, call: str
) -> None:
    monkeypatch.setattr(module, call, Failing(getattr(module, call), errno.EIO, float("inf")))
    with pytest.raises(
        DataError, match=r"1 of 1 shards cannot be indexed: .*000000\.tar cannot be read \(Input/output"
    ):
        shards.index(str(root / "val"), root / "again", "*.tar", Fields(), 1)


# A cache in front of a URL, in folders that are no good. The tests may run as root, whom no permission stops.


def indexed(url: str, folder: Path) -> Path:
    for name, count in (("train", 3), ("val", 1)):
        shards.index(f"{url}/{name}", folder / name, f"{{000000..{count - 1:06d}}}.tar", Fields(), 1)
    return folder


def unusable(root: Path, cache: Path | str, why: str) -> None:
    with pytest.raises(
        DataError, match=rf"data\.cache=.*shards cannot be used \({why}\): set data\.cache to"
    ) as caught:
        stream.TrainSlices(config(root, cache=str(cache), cache_gib=0.5), seed=0)
    assert is_plain(str(caught.value))


def test_cache_folders_that_cannot_be_used(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "shards").write_text("mine")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with serve(root, Faults()) as url:
        remote = indexed(url, tmp_path / "index")
        unusable(remote, tmp_path / "file", "Not a directory")
        unusable(remote, tmp_path / "half", "File exists")
        unusable(remote, tmp_path / "loop", "Too many levels of symbolic links|File exists")
        for number in (errno.ENOLCK, errno.EOPNOTSUPP, errno.EPERM):
            monkeypatch.setattr(fcntl, "flock", Failing(fcntl.flock, number, float("inf")))
            unusable(remote, tmp_path / "cache", os.strerror(number))
            monkeypatch.undo()
            monkeypatch.setattr(places, "FIRST_PAUSE", 0.001)
        for number in (errno.EACCES, errno.EROFS, errno.EDQUOT):
            monkeypatch.setattr(store.Path, "mkdir", Failing(Path.mkdir, number, float("inf")))
            unusable(remote, tmp_path / "other", os.strerror(number))
            monkeypatch.undo()
            monkeypatch.setattr(places, "FIRST_PAUSE", 0.001)
    assert (tmp_path / "file").read_text() == (tmp_path / "half" / "shards").read_text() == "mine"


def test_a_full_cache_of_somebody_else_is_read(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All shards are cached, so no time, lock or folder needs to be written."""
    with serve(root, Faults()) as url:
        remote = indexed(url, tmp_path / "index")
        expected = first(root)
        made = stream.TrainSlices(config(remote, cache=str(tmp_path / "cache"), cache_gib=0.5), seed=7)
        for number in range(3):
            made.samples.store.read(number, 0, 1)
    for module, call in ((os, "utime"), (fcntl, "flock"), (Path, "mkdir"), (Path, "touch")):
        monkeypatch.setattr(module, call, Failing(getattr(module, call), errno.EROFS, float("inf")))
    slices = stream.TrainSlices(config(remote, cache=str(tmp_path / "cache"), cache_gib=0.5), seed=7)
    assert (next(stream.train_loader(slices, 0, 8, 1, 0, 1, pin=False)).batch.x == expected.x).all()


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_a_cache_full_of_another_users_shards_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Another user's shards fill the cache and cannot be removed; this must not wait forever."""
    monkeypatch.setattr(store, "fetch", lambda url, target, shard: target.write_bytes(bytes(shard.bytes)))
    cache = Cache(tmp_path, 2 << 20)
    for i in range(2):
        cache.get(places.Shard(f"{i}.tar", 1, 1 << 20, f"{i:016x}"), "")
    monkeypatch.setattr(store.Path, "unlink", Failing(Path.unlink, number, float("inf")))
    with pytest.raises(DataError, match=r"data\.cache=.* cannot be used"):
        cache.get(places.Shard("2.tar", 1, 1 << 20, f"{2:016x}"), "")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG])
def test_a_full_disk_is_reported_at_once(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """The disk's error is reported at once, and not as an error of the server."""

    def full(self: places._Watch, inc: int = 1) -> None:
        raise OSError(number, os.strerror(number))

    faults = Faults()
    monkeypatch.setattr(places._Watch, "relative_update", full)
    with serve(root, faults) as url, pytest.raises(DataError, match=rf"cannot store it \({os.strerror(number)}\)"):
        places.fetch(f"{url}/val/000000.tar", tmp_path / "x")
    assert len(faults.requests) == 1
