"""Shards behind a URL: a real web server on loopback, real faults, a real cache that several processes share; and how
many shards of a folder are open."""

import json
import multiprocessing
import os
import resource
import threading
import time
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from tests.conftest import samples
from tests.data.server import Faults, serve
from vaescale.data import DataError, places, shards, store, stream
from vaescale.data.places import Shard, check_place, names_in
from vaescale.data.store import Cache
from vaescale.data.tar import Fields

MIB = 2**20


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shortens the limits from half a minute to a second."""
    monkeypatch.setattr(places, "STALL", 0.5)
    monkeypatch.setattr(places, "FIRST_PAUSE", 0.01)


@pytest.fixture
def remote(tmp_path: Path) -> Path:
    """A folder to serve, with 60 training and 11 validation images in shards of 1 to 13."""
    for name, count, per_shard in (("train", 60, 7), ("val", 11, 3)):
        shards.write(tmp_path / "remote" / name, samples(count), per_shard, [])
    return tmp_path / "remote"


def indexed(url: str, folder: Path) -> Path:
    for name, count in (("train", 9), ("val", 4)):
        pattern = f"{{000000..{count - 1:06d}}}.tar"
        shards.index(f"{url}/{name}", folder / name, pattern, Fields(), 1)
    return folder


def config(root: Path, cache: Path, **changes: object) -> stream.Config:
    given = {"size": 16, "columns": 4, "workers": 0, "cache": str(cache), "cache_gib": 0.5} | changes
    return stream.Config(root=str(root), **given)  # type: ignore[arg-type]


def epoch(settings: stream.Config) -> list[stream.Batch]:
    slices = stream.TrainSlices(settings, seed=7)
    loader = stream.train_loader(slices, 0, 12, 1, 0, 1, pin=False)
    return [next(loader).batch for _ in range(10)]  # two epochs


def same(a: list[stream.Batch], b: list[stream.Batch]) -> bool:
    return all(torch.equal(x, y) for one, two in zip(a, b, strict=True) for x, y in zip(one, two, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_failing_server_loses_nothing(tmp_path: Path, remote: Path, impatient: None, workers: int) -> None:
    """A tenth of the requests fail, others stall, break off or return a wrong byte; the cache holds four shards."""
    expected = epoch(config(remote, tmp_path / "none"))
    largest = max(path.stat().st_size for path in remote.rglob("*.tar"))
    with serve(remote, Faults()) as url:
        root = indexed(url, tmp_path / "index")
        limit = 4 * largest / 2**30
    index = tmp_path / "index" / "train" / "index.json"
    faults = Faults(fail=10, stall=9, cut=7, flip=8)
    with serve(remote, faults) as url:
        index.write_text(index.read_text().replace(before_port(index), url))
        seen = epoch(config(root, tmp_path / "cache", workers=workers, cache_gib=limit))
        held = sum(path.stat().st_size for path in (tmp_path / "cache" / "shards").glob("*.tar"))
    assert same(seen, expected)
    assert len(faults.requests) > 20
    assert 0 < held <= limit * 2**30


def before_port(index: Path) -> str:
    return str(json.loads(index.read_text())["root"]).removesuffix("/train")


def test_indexing_a_url_equals_indexing_the_folder(tmp_path: Path, remote: Path, impatient: None) -> None:
    with serve(remote, Faults(fail=4)) as url:
        made = shards.index(f"{url}/val", tmp_path / "index", "*.tar", Fields(), 1)  # from the server's listing
        assert made.shards == shards.Index(remote / "val").shards
        assert made.records.tolist() == shards.Index(remote / "val").records.tolist()
        assert list(shards.verify(tmp_path / "index", decoding=True, processes=1)) == []
        (remote / "val" / "000001.tar").unlink()
        (found,) = shards.verify(tmp_path / "index", decoding=False, processes=1)
        assert (found.shard, found.lost) == ("000001.tar", 3)


@pytest.mark.parametrize("workers", [0, 2])
def test_validation_reads_from_a_url(tmp_path: Path, remote: Path, workers: int) -> None:
    with serve(remote, Faults()) as url:
        slices = stream.ValidationSlices(config(indexed(url, tmp_path / "index"), tmp_path / "cache", workers=workers))
        local = stream.ValidationSlices(config(remote, tmp_path / "none"))
        for one, two in zip(*(stream.validation_loader(s, 4, 0, 1, False) for s in (slices, local)), strict=True):
            assert torch.equal(one.batch.x, two.batch.x)


def test_a_server_that_is_gone_is_named(tmp_path: Path, remote: Path, impatient: None) -> None:
    with serve(remote, Faults()) as url:
        root = indexed(url, tmp_path / "index")
    with pytest.raises(DataError, match=r"http://127\.0\.0\.1:\d+/train/00000\d\.tar could not be fetched: \w+"):
        epoch(config(root, tmp_path / "cache"))


def test_a_shard_that_changed_at_its_source_is_named(tmp_path: Path, remote: Path, impatient: None) -> None:
    with serve(remote, Faults()) as url:
        root = indexed(url, tmp_path / "index")
        for path in (remote / "train").glob("*.tar"):
            path.write_bytes(path.read_bytes() + bytes(512))
        with pytest.raises(DataError, match="could not be fetched: its bytes differ from those that were indexed"):
            epoch(config(root, tmp_path / "cache"))


def test_a_damaged_cached_shard_is_fetched_again(tmp_path: Path, remote: Path) -> None:
    with serve(remote, Faults()) as url:
        settings = config(indexed(url, tmp_path / "index"), tmp_path / "cache")
        expected = epoch(settings)
        cached = list((tmp_path / "cache" / "shards").glob("*.tar"))
        assert len(cached) == 9
        for path in cached:
            path.write_bytes(bytes(path.stat().st_size))
        assert same(epoch(settings), expected)


def shard(number: int, size: int) -> Shard:
    return Shard(f"{number}.tar", 1, size, f"{number:016x}")


def fetch_slowly(url: str, target: Path, expected: Shard) -> None:
    """Replaces a download: writes a line to a log and waits, so that others ask for the same shard."""
    with (target.parent / "log.txt").open("a") as log:
        log.write(f"{expected.name}\n")
    time.sleep(0.01)
    target.write_bytes(bytes(expected.bytes))


def use(folder: Path, limit: int, numbers: list[int]) -> None:
    store.fetch = fetch_slowly
    cache = Cache(folder, limit)
    for number in numbers:
        cache.get(shard(number, MIB), "")


def test_processes_share_one_cache(tmp_path: Path) -> None:
    """Four processes request eight shards at the same time, in different orders; each shard is fetched once."""
    context = multiprocessing.get_context("fork")
    orders = [list(range(8)), list(range(7, -1, -1)), [4, 5, 6, 7, 0, 1, 2, 3], [1, 3, 5, 7, 0, 2, 4, 6]]
    processes = [context.Process(target=use, args=(tmp_path, 8 * MIB, order)) for order in orders]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert sorted((tmp_path / "log.txt").read_text().split()) == [f"{number}.tar" for number in range(8)]


def test_the_bound_holds_at_every_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four threads read twelve shards through a cache for three, whose size is watched."""
    monkeypatch.setattr(store, "fetch", fetch_slowly)
    most, done = [0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            total = 0
            with FileLock(tmp_path / "lock.lock"):  # so that none goes or is renamed while they are counted
                for path in tmp_path.iterdir():
                    if path.suffix in (".tar", ".partial"):
                        total += path.stat().st_size
            most[0] = max(most[0], total)

    watcher = threading.Thread(target=watch)
    watcher.start()
    users = [
        threading.Thread(target=use, args=(tmp_path, 3 * MIB, [(i * 5 + k) % 12 for i in range(24)])) for k in range(4)
    ]
    for user in users:
        user.start()
    for user in users:
        user.join()
    done.set()
    watcher.join()
    assert 0 < most[0] <= 3 * MIB


def test_a_shard_that_becomes_complete_meanwhile_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for two; the second is fetched while the third makes room: its rename falls between the two lists, that of
    the complete shards and that of the promised ones, unless it waits for the lock."""
    begun, go_on, listed = threading.Event(), threading.Event(), Cache._held

    def fetch(url: str, target: Path, expected: Shard) -> None:
        target.write_bytes(bytes(expected.bytes))
        if expected.name == "1.tar":
            begun.set()
            assert go_on.wait(60)

    def held(self: Cache) -> list[tuple[int, int, Path]]:
        found = listed(self)
        if begun.is_set():
            go_on.set()
            second.join(0.3)  # it must not end here
        return found

    monkeypatch.setattr(store, "fetch", fetch)
    monkeypatch.setattr(Cache, "_held", held)
    cache = Cache(tmp_path, 2 * MIB)
    cache.get(shard(0, MIB), "")
    second = threading.Thread(target=cache.get, args=(shard(1, MIB), ""))
    second.start()
    assert begun.wait(60)
    cache.get(shard(2, MIB), "")
    second.join()
    assert sorted(path.stem[-1] for path in tmp_path.glob("*.tar")) == ["1", "2"]


def test_the_least_recently_used_shard_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "fetch", fetch_slowly)
    cache = Cache(tmp_path, 3 * MIB)
    for number in (0, 1, 2):
        cache.get(shard(number, MIB), "")
        os.utime(cache.path(shard(number, MIB)), (number, number))
    cache.get(shard(0, MIB), "")  # used again
    cache.get(shard(3, MIB), "")
    assert sorted(path.stem[-1] for path in tmp_path.glob("*.tar")) == ["0", "2", "3"]


def test_leftovers_of_a_dead_process_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "fetch", fetch_slowly)
    left = tmp_path / f"{9:016x}.{3 * MIB}.partial"
    left.write_bytes(b"half")
    Cache(tmp_path, 3 * MIB).get(shard(1, MIB), "")
    assert not left.exists()


def test_a_cache_too_small_to_work_is_refused(tmp_path: Path, remote: Path) -> None:
    with serve(remote, Faults()) as url:
        root = indexed(url, tmp_path / "index")
    with pytest.raises(DataError, match=r"data\.cache_gib=9\.54e-07 is too small for 3 of these shards"):
        stream.TrainSlices(config(root, tmp_path / "cache", cache_gib=2**-20), 0)


def test_a_cache_too_small_for_the_columns_is_reported(tmp_path: Path, remote: Path) -> None:
    with serve(remote, Faults()) as url:
        root = indexed(url, tmp_path / "index")
    largest = max(path.stat().st_size for path in remote.rglob("train/*.tar")) / 2**30
    slices = stream.TrainSlices(config(root, tmp_path / "cache", columns=9, cache_gib=4 * largest), 0)
    assert "less than the 9 shards that a batch reads from" in slices.advice()
    assert stream.TrainSlices(config(root, tmp_path / "cache", columns=4, cache_gib=4 * largest), 0).advice() == ""
    assert stream.TrainSlices(config(remote, tmp_path / "cache", cache_gib=1e-9), 0).advice() == ""


def test_files_of_others_in_the_cache_folder_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "fetch", fetch_slowly)
    others = [tmp_path / name for name in ("precious.tar", "foo.partial", "a.b.partial")]
    for path in others:
        path.write_bytes(bytes(4 * MIB))
    for number in range(4):
        Cache(tmp_path, 3 * MIB).get(shard(number, MIB), "")
    assert all(path.exists() for path in others)


def test_an_endless_response_is_aborted(tmp_path: Path, remote: Path, impatient: None) -> None:
    """The server sends more than was indexed; at most one buffer of the excess is written."""
    with serve(remote, Faults()) as url:
        root = indexed(url, tmp_path / "index")
        largest = []
        monitored = places._Watch.relative_update

        def watch(self: places._Watch, inc: int = 1) -> None:
            largest.append(self._got)
            monitored(self, inc)

        places._Watch.relative_update = watch  # type: ignore[method-assign]
        try:
            for path in (remote / "train").glob("*.tar"):
                path.write_bytes(path.read_bytes() + bytes(30 * MIB))
            with pytest.raises(DataError, match="its bytes differ from those that were indexed"):
                epoch(config(root, tmp_path / "cache"))
        finally:
            places._Watch.relative_update = monitored  # type: ignore[method-assign]
    assert max(largest) < 6 * MIB


def test_a_slow_response_is_aborted(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = places._Watch(Path(), places.SLOWEST * 1000)
    monkeypatch.setattr(places.time, "monotonic", lambda: watch._begun + 100)
    watch.relative_update(100 * places.SLOWEST)
    monkeypatch.setattr(places.time, "monotonic", lambda: watch._begun + 101)
    with pytest.raises(OSError, match="the transfer is too slow"):
        watch.relative_update(1)


def test_an_interrupted_index_of_a_url_goes_on(tmp_path: Path, remote: Path, impatient: None) -> None:
    hidden = remote / "val" / "000002.tar"
    data = hidden.read_bytes()
    hidden.unlink()
    faults = Faults()
    with serve(remote, faults) as url:
        with pytest.raises(DataError, match=r"1 of 4 shards cannot be indexed: .*000002\.tar could not be fetched"):
            shards.index(f"{url}/val", tmp_path / "index", "{000000..000003}.tar", Fields(), 1)
        hidden.write_bytes(data)
        faults.requests.clear()
        shards.index(f"{url}/val", tmp_path / "index", "{000000..000003}.tar", Fields(), 1)
    assert set(faults.requests) == {"/val/000002.tar"}


def test_a_server_that_refuses_is_asked_once(tmp_path: Path, remote: Path) -> None:
    faults = Faults(refuse=True)
    with serve(remote, faults) as url, pytest.raises(DataError, match="could not be fetched: ClientResponseError 403"):
        places.fetch(f"{url}/val/000000.tar", tmp_path / "x")
    assert len(faults.requests) == 1


SECRET = "hunter2"


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("pipe:cat a.tar", "pipes and chained protocols"),
        ("pipe://cat", "pipe:// is none|pipes"),
        ("simplecache::pipe:cat a.tar", "pipes and chained protocols"),
        ("filecache::http://host/a", "pipes and chained protocols"),
        ("http://host/pipe:cat", "pipes and chained protocols"),
        ("ssh://host/a", "ssh:// is not a supported protocol"),
        ("file:///etc", "file:// is not a supported protocol"),
        (f"https://me:{SECRET}@host/a", "URL on host contains credentials"),
        (f"https://host/a?token={SECRET}", "URL on host contains credentials"),
        (f"s3://{SECRET}@bucket/a", "contains credentials"),
    ],
)
def test_places_that_are_refused(place: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        check_place(place)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("pattern", ["pipe:cat {a,b}.tar", "{pipe:cat,b} x", "../*.tar", "/etc/*", "a/../../b.tar"])
def test_patterns_that_are_refused(tmp_path: Path, pattern: str) -> None:
    with pytest.raises(DataError, match="not a valid shard name"):
        names_in(str(tmp_path), pattern)


def test_an_index_cannot_name_a_pipe(tmp_path: Path) -> None:
    made = shards.write(tmp_path, samples(2), 2, [])
    path = made.folder / "index.json"
    path.write_text(path.read_text().replace('"root": "."', '"root": "pipe:touch owned"'))
    with pytest.raises(DataError, match="pipes and chained protocols"):
        shards.Index(tmp_path)


def test_a_missing_package_is_one_sentence(tmp_path: Path) -> None:
    pytest.importorskip("aiohttp")
    with pytest.raises(DataError, match=r"gs:// needs another package: run `pip install 'vaescale\[gs\]'`"):
        names_in("gs://bucket/x", "*.tar")


def test_credentials_come_from_netrc_and_are_not_repeated(
    tmp_path: Path, remote: Path, monkeypatch: pytest.MonkeyPatch, impatient: None
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text(f"machine 127.0.0.1 login me password {SECRET}\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    faults = Faults()
    with serve(remote, faults) as url:
        root = indexed(url, tmp_path / "index")
        assert all("Authorization" in headers for headers in faults.headers)
        assert SECRET not in (root / "train" / "index.json").read_text()


@pytest.mark.parametrize(("allowed", "opened"), [(1000, 100), (resource.RLIM_INFINITY, 100), (40, 300)])
def test_a_shard_is_opened_once_as_far_as_files_may_be_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allowed: int, opened: int
) -> None:
    shards.write(tmp_path, samples(100), 1, [])
    calls, whole = [], os.open
    monkeypatch.setattr(resource, "getrlimit", lambda _: (allowed, allowed))
    monkeypatch.setattr(os, "open", lambda *given: calls.append(given) or whole(*given))
    read = stream.Samples(tmp_path)
    calls.clear()
    for sample in 3 * list(range(100)):
        assert read.read(sample)[1] == sample % 7
    assert len(calls) == opened
    assert len(read.store._files) == (20 if allowed == 40 else 100)
    held = [Path(f"/proc/self/fd/{file}") for file in read.store._files.values()]
    assert all(link.exists() for link in held)
    del read
    assert not any(link.exists() for link in held)  # evaluating many runs in a process opens many stores
