"""When silence is a hang, and when a rank is slow."""

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from vaescale import process
from vaescale.lifecycle import pace, stops, watch
from vaescale.lifecycle.pace import Pace, Work, slowest
from vaescale.lifecycle.status import HUNG_CODE, Status
from vaescale.lifecycle.stops import Stop
from vaescale.lifecycle.watch import Watch


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(watch.time, "monotonic", lambda: now[0])
    return now


def watching(run: Path) -> Watch:
    return Watch(run, 30.0, 0, Stop(run, 0.0), Status(run, 0), 0, lambda: None)


def test_the_timeout_follows_the_longest_recent_gap(tmp_path: Path, clock: list[float]) -> None:
    one = watching(tmp_path)
    assert one.limit(30.0) == 360  # the first step
    clock[0] += 200
    one.beat(1)
    assert one.limit(30.0) == 30  # the first step tells nothing of the others
    for step, gap in enumerate([1, 5, 2], start=2):
        clock[0] += gap
        one.beat(step)
    assert one.limit(30.0) == 50
    assert one.limit(60.0) == 60
    for step in range(5, 104):
        clock[0] += 1
        one.beat(step)
    assert one.limit(30.0) == 30  # 5 s are more than 100 steps ago


def test_validation_has_a_timeout_of_its_own(tmp_path: Path, clock: list[float]) -> None:
    one = watching(tmp_path)
    one.beat(1)
    for lasts, limit in ((40, 360), (10, 400), (1, 400)):
        with one.doing("validation"):
            assert one.limit(30.0) == limit
            clock[0] += lasts
            if lasts == 40:
                continue
        assert one.limit(30.0) == 30
    clock[0] += 2
    one.beat(2)
    assert one.limit(1.0) == 20  # of the gap since the validation
    with one.doing("saving"):
        assert one.limit(30.0) == 360


def test_progress_within_a_validation_is_seen(tmp_path: Path, clock: list[float]) -> None:
    one = watching(tmp_path)
    with one.doing("validation"):
        for _ in range(5):
            signs = one._signs
            clock[0] += 40
            one.progress()
            assert one._signs > signs
        assert one.limit(30.0) == 360
        clock[0] += 2
    with one.doing("validation"):
        assert one.limit(30.0) == 360  # its longest silence was 40 s
    assert one.limit(30.0) == 360  # still the first step


def test_the_first_step_keeps_its_limit_if_a_validation_precedes_it(tmp_path: Path, clock: list[float]) -> None:
    one = watching(tmp_path)
    with one.doing("validation"):
        clock[0] += 1
    assert one.limit(30.0) == 360
    one.beat(1)
    assert one.limit(30.0) == 30


def test_a_hang_leaves_what_nccl_has_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    monkeypatch.setattr(watch.distributed, "recorded", lambda: b"collectives")
    monkeypatch.setattr(watch, "LINGER", 0.0)
    monkeypatch.setattr(watch.threading, "Timer", lambda *_: SimpleNamespace(start=lambda: None))
    monkeypatch.setattr(watch.os, "_exit", ended.append)
    watching(tmp_path)._end(31.0, 30.0, False)
    assert ended == [HUNG_CODE]
    assert (tmp_path / "stacks" / "nccl-rank-0").read_bytes() == b"collectives"


class Ticks:
    """Replaces the event: at each check the clock advances or something happens; then the watch ends."""

    def __init__(self, clock: list[float], script: Sequence[float | Callable[[], None]]) -> None:
        self.clock, self.script = clock, list(script)

    def wait(self, _: float) -> bool:
        if not self.script:
            return True
        one = self.script.pop(0)
        if callable(one):
            self.clock[0] += 1
            one()
        else:
            self.clock[0] += one
        return False


def ends(one: Watch, clock: list[float], script: Sequence[float | Callable[[], None]]) -> list[tuple[float, bool]]:
    """Returns (silent, orphan) of each check at which the process would have ended."""
    found: list[tuple[float, bool]] = []
    one._over = Ticks(clock, script)  # type: ignore[assignment]
    one._end = lambda silent, limit, orphan: found.append((silent, orphan))  # type: ignore[method-assign]
    one._watch()
    return found


def test_silence_is_a_hang_after_the_timeout(tmp_path: Path, clock: list[float]) -> None:
    one = watching(tmp_path)
    one.beat(1)
    quiet = [1.0] * 30
    assert ends(one, clock, quiet) == []
    assert ends(one, clock, [*quiet, lambda: one.beat(2), *quiet]) == []
    one._gaps.clear()
    assert ends(one, clock, [*quiet, 1.0, 1.0]) == [(31.0, False)]  # the first look sees the last beat
    one.timeout = 0
    assert ends(one, clock, [1.0] * 1000) == []


def test_a_process_that_was_stopped_has_not_hung(tmp_path: Path, clock: list[float]) -> None:
    one = watching(tmp_path)
    one.beat(1)
    assert ends(one, clock, [1.0] * 10 + [5000.0] + [1.0] * 10) == []


def test_a_launcher_that_is_gone_asks_for_a_stop_and_then_ends(
    tmp_path: Path, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = watching(tmp_path)
    one.launcher, one.timeout = 77, 0.0
    one.beat(1)
    parent = [77]
    monkeypatch.setattr(process.os, "getppid", lambda: parent[0])
    assert ends(one, clock, [1.0] * 100) == []
    assert one.stop.agreed() == ""
    saving = one.doing("saving")
    script = [lambda: parent.__setitem__(0, 1), *[1.0] * 19, saving.__enter__, *[1.0] * 100]
    assert ends(one, clock, script) == []  # a save may take longer
    assert one.stop.agreed() == "the death of its launcher"
    saving.__exit__(None, None, None)
    one._longest.clear()
    one.launcher, parent[0] = 77, 77
    assert ends(one, clock, [1.0] * 50 + [lambda: parent.__setitem__(0, 1)] + [1.0] * 19) == []  # from then on
    assert ends(one, clock, [1.0] * 22)[0] == (21.0, True)


def test_a_clock_that_is_set_back_does_not_hide_a_stop(
    tmp_path: Path, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the end of the SLURM job depends on the wall clock."""
    wall = [1e9]
    monkeypatch.setattr(stops.time, "time", lambda: wall[0])
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(1e9))
    stop = Stop(tmp_path, 100.0)
    wall[0] -= 3600
    assert stop.agreed() == ""
    (tmp_path / "STOP").touch()
    assert stop.agreed() == ""  # looked a moment ago
    clock[0] += 1.1
    assert stop.agreed() == "the file STOP"

    (tmp_path / "STOP").unlink()
    stop = Stop(tmp_path, 100.0)
    wall[0] = 1e9 - 99
    assert stop.agreed() == "the end of the SLURM job"


def test_an_invalid_end_of_the_job_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for odd in ("soon", "nan", "-1", "", "Unknown", "1_0", "inf"):
        monkeypatch.setenv("SLURM_JOB_END_TIME", odd)
        assert Stop(tmp_path, 100.0).until == float("inf")


def test_only_what_a_launcher_began_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert process.launcher() == 0
    monkeypatch.setenv("RANK", "0")
    assert process.launcher() > 0


def test_the_slowest_rank_is_measured_by_the_median_of_the_others() -> None:
    assert slowest([Work(0.0, 0.2), Work(0.3, 0.2), Work(0.0, 0.1), Work(0.1, 0.1)]) == (1, pytest.approx(2.5))
    assert slowest([Work(1.0, 2.0)]) == (0, 1.0)
    assert slowest([Work(0.0, 0.0), Work(0.0, 0.0)])[1] == 0


def test_a_slow_rank_is_named_once_and_once_when_it_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    others = [0.1, 0.1]
    waits = [0.15, 0.31, 0.5, 0.17, 0.14, 0.4]
    found = []
    one = Pace(nn.Identity(), torch.device("cpu"))
    for wait in waits:
        table = torch.tensor([[0.0, own] for own in others] + [[wait, 0.0]])
        monkeypatch.setattr(pace.distributed, "gather", lambda _, table=table: table)
        found += [one.report(0.0, 25, 25.0), one.report(0.0, 25, 25.0)]
    assert [bool(said) for said in found[1::2]] == [False, True, False, False, True, True]
    assert not any(found[::2])  # 25 steps are too few to tell by
    assert found[3].startswith("rank 2 takes 3.1 times as long as the others (0.31 s per step, 0.31 s of it waiting")
    assert found[9] == "rank 2 is as fast as the others again"


def test_what_is_lost_in_a_step_is_not_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    one = Pace(nn.Identity(), torch.device("cpu"))
    monkeypatch.setattr(pace.distributed, "gather", lambda _: torch.tensor([[0.0, 0.01], [0.0, 0.05]]))
    assert one.report(0.0, 100, 100.0) == ""
    assert one.report(0.0, 100, 30.0).startswith("rank 1 takes 5.0 times")


def test_forward_passes_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([1.0, 1.5, 4.0, 4.25])
    monkeypatch.setattr(pace.time, "monotonic", lambda: next(clock))
    given: list[list[float]] = []
    monkeypatch.setattr(pace.distributed, "gather", lambda own: given.append(own.tolist()) or own[None])
    model = nn.Identity()
    one = Pace(model, torch.device("cpu"))
    for _ in range(2):
        model(torch.zeros(1))
    one.report(2.0, 20, 10.0)
    one.report(4.0, 30, 10.0)
    one.report(0.0, 50, 10.0)
    assert given == [pytest.approx([6 / 50, 0.75 / 50]), [0.0, 0.0]]
