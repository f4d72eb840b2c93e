"""The doctor's checks before a run: each one passing and failing."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.integration.conftest import TINY
from tests.lifecycle.test_checkpoint import flip
from tests.lifecycle.test_lock import child
from vaescale import settings
from vaescale.advice import preflight
from vaescale.advice.preflight import FAIL, OK, WARN
from vaescale.data.index import Index
from vaescale.distributed import Misplaced
from vaescale.lifecycle.lock import Lock


@pytest.fixture
def config(pictures: Path, tmp_path: Path) -> settings.Config:
    return settings.load(TINY, [f"run={tmp_path / 'run'}", f"data.root={pictures}", "data.workers=2"])


def test_checks_that_pass_are_ok(config: settings.Config) -> None:
    found = list(preflight.alone(config, 1))
    assert [one.level for one in found] == [OK] * 7, found
    assert str(found[0]).startswith("ok: Python 3.")


def test_a_version_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = preflight.metadata.version
    monkeypatch.setattr(preflight.metadata, "version", lambda name: "0.1" if name == "einops" else whole(name))
    found = preflight.versions()
    assert (found.level, found.what) == (FAIL, "vaescale needs einops>=0.8 (installed: 0.1)")


def test_a_run_directory_in_use_is_named(tmp_path: Path) -> None:
    assert preflight.lock(tmp_path / "none").level == OK
    with child(Lock(tmp_path).acquire) as pid:
        found = preflight.lock(tmp_path)
    assert found.level == WARN
    assert f"in use by another training, process {pid} on" in found.what
    assert preflight.lock(tmp_path).level == OK


def test_more_ranks_than_cores(config: settings.Config) -> None:
    assert preflight.devices(config, 10_000).level == WARN


def test_batches_larger_than_shared_memory(config: settings.Config) -> None:
    much = replace(config, data=replace(config.data, prefetch=10**12))
    found = preflight.shared_memory(much, 1, 1)
    assert found.level == WARN
    assert "--shm-size" in str(found)
    assert preflight.shared_memory(config, 1, 1, Path("/nowhere")).level == WARN
    none = replace(config, data=replace(config.data, workers=0))
    assert preflight.shared_memory(none, 1, 1, Path("/nowhere")).level == OK


def test_few_open_files(config: settings.Config) -> None:
    much = replace(config, data=replace(config.data, columns=10**10))
    assert "ulimit -n" in str(preflight.file_limit(much))


def test_a_disk_that_cannot_be_written() -> None:
    found = preflight.disk(Path("/proc/run"))
    assert found.level == FAIL
    assert "/proc cannot be written" in found.what


def test_a_slow_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "SLOW_DISK", 2**60)
    assert preflight.disk(tmp_path / "run").level == WARN
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("harm", ["none", "index", "shard", "gone"])
def test_samples_that_cannot_be_read(config: settings.Config, pictures: Path, tmp_path: Path, harm: str) -> None:
    root = shutil.copytree(pictures, tmp_path / "data")
    if harm == "index":
        flip(root / "val" / "samples.npy", -9)
    if harm == "shard":
        flip(root / "val" / "000000.tar", Index(root / "val").locate(0).offset)
    if harm == "gone":
        shutil.rmtree(root / "train")
    found = preflight.index(replace(config, data=replace(config.data, root=str(root))))
    words = {
        "none": "90 training and 11 validation images",
        "index": "val is damaged (samples.npy does not match its hash in index.json)",
        "shard": "val: changed since it was indexed",
        "gone": "there are no shards in",
    }
    assert found.level == (OK if harm == "none" else FAIL)
    assert words[harm] in found.what


def test_clocks_and_versions_that_differ(config: settings.Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def gather(own: torch.Tensor) -> torch.Tensor:
        return torch.stack([own, own, own + 7])

    monkeypatch.setattr(preflight.distributed, "gather", gather)
    assert (
        str(preflight.clocks())
        == "warn: the ranks' clocks are 7.0 s apart: synchronise them by NTP, or times in logs do not match"
    )
    assert preflight.agreement(config).what == "rank 2 and rank 0 differ in settings"


def test_a_wrong_number_of_local_ranks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setenv("LOCAL_SIZE", "4")
    assert preflight.ranks_here(8) == 4
    for odd in ("x", "0", "-1", "2.0", "\uff12"):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", odd)
        with pytest.raises(Misplaced, match=r"LOCAL_WORLD_SIZE=.* is not a number of ranks"):
            preflight.ranks_here(8)
