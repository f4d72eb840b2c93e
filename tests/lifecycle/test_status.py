"""run_status.json: what each attempt of a run writes there."""

import json
from pathlib import Path

import pytest

from vaescale.config import ConfigError
from vaescale.lifecycle.status import NoProgress, Status


def said(run: Path) -> tuple[str, int, int, str]:
    found = json.loads((run / "run_status.json").read_text())
    return found["status"], found["rank"], found["step"], found["why"]


def attempt(run: Path, step: int, why: str, rank: int = 0) -> bool:
    Status(run, 0).begin(step - 1)
    return Status(run, rank).fail(why, step)


def test_only_the_same_failure_at_the_same_step_counts(tmp_path: Path) -> None:
    attempts = [(7, "full"), (7, "full"), (8, "full"), (8, "nan"), (8, "nan"), (8, "nan")]
    assert [attempt(tmp_path, step, why) for step, why in attempts] == [False] * 5 + [True]
    assert said(tmp_path) == ("no-progress", 0, 8, "nan")


def test_a_successful_attempt_resets_the_count(tmp_path: Path) -> None:
    for status in ("finished", "preempted"):
        assert not attempt(tmp_path, 7, "nan")
        assert not attempt(tmp_path, 7, "nan")
        Status(tmp_path, 0).begin(6)
        Status(tmp_path, 0).end(status, "", 9)
        assert said(tmp_path) == (status, 0, 9, "")


def test_the_first_rank_that_fails_writes_the_status(tmp_path: Path) -> None:
    other = Status(tmp_path, 0)
    assert not attempt(tmp_path, 7, "killed for lack of memory", rank=3)
    assert not other.fail("rank 3 has gone", 7)
    assert said(tmp_path) == ("failed", 3, 7, "killed for lack of memory")


def test_the_status_includes_the_exit_code(tmp_path: Path) -> None:
    """launch/run.py returns this code; it is None if the run was killed."""
    status = Status(tmp_path, 0)
    codes = []
    for how in ("running", "failed", "failed", "failed", "finished", "preempted"):
        status.begin(7)
        if how == "failed":
            status.fail("nan", 7, 3)
        elif how != "running":
            status.end(how, "", 9)
        codes.append(status.read()["code"])
    assert codes == [None, 3, 3, 93, 0, 75]


def test_a_status_that_cannot_be_read_is_none(tmp_path: Path) -> None:
    (tmp_path / "run_status.json").write_text("[")
    assert Status(tmp_path, 0).read() == {}
    assert not attempt(tmp_path, 7, "nan")


@pytest.mark.parametrize(
    "odd", [{"status": 3}, {"status": "fine"}, {"failures": 3}, {"failures": [3]}, {"step": "7"}, {"why": None}]
)
def test_an_invalid_status_is_none(tmp_path: Path, odd: dict[str, object]) -> None:
    status = Status(tmp_path, 0)
    status.begin(7)
    found = json.loads((tmp_path / "run_status.json").read_text())
    (tmp_path / "run_status.json").write_text(json.dumps({**found, **odd}))
    assert status.read() == {}
    assert not status.fail("nan", 8)
    assert said(tmp_path) == ("failed", 0, 8, "nan")


def test_errors_that_the_user_must_fix_are_not_counted(tmp_path: Path) -> None:
    """Not even after no-progress."""
    for _ in range(3):
        attempt(tmp_path, 7, "nan")
    for _ in range(4):
        assert not Status(tmp_path, 0).fail("there are no data", 0, ConfigError.exit_code)
    assert said(tmp_path) == ("failed", 0, 0, "there are no data")


def test_a_status_that_cannot_be_written_hides_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="there are no data"), Status(tmp_path / "file", 0).recording(lambda: 0):
        raise ConfigError("there are no data")


def test_an_attempt_that_fails_before_training_writes_its_status(tmp_path: Path) -> None:
    """It replaces the status of an earlier attempt; the third time it is no-progress."""
    Status(tmp_path, 0).end("preempted", "SIGTERM", 7)
    results = []
    for _ in range(3):
        status = Status(tmp_path, 1)
        error: type[Exception] = OSError
        try:
            with status.recording(lambda: 7):
                raise OSError("no device")
        except (OSError, NoProgress) as caught:
            error = type(caught)
        results.append((error, *said(tmp_path)))
    assert results[:2] == [(OSError, "failed", 1, 7, "OSError: no device")] * 2
    assert results[2] == (NoProgress, "no-progress", 1, 7, "OSError: no device")
