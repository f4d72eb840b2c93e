"""Runs that are asked to stop, and runs that fail: what they write, and that they resume to the same bits."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest

from tests.faults.test_checkpoints import end, job, names, train, twins  # noqa: F401
from tests.integration.conftest import forked
from tests.integration.test_resume import same_bits
from vaescale.advice.postmortem import read_metrics
from vaescale.lifecycle import stops
from vaescale.lifecycle.checkpoint import verify


class Asked(NamedTuple):
    how: str
    why: str  # in run_status.json
    faults: list[list[Any]]  # see inject.py
    world: int = 1
    step: int = 6  # the last one trained
    given: tuple[str, ...] = ()


# A rank learns at the end of the next step that another one was asked to stop.
ASKED = [
    Asked("SIGTERM to one of two, and SIGUSR1 after it", "SIGTERM", [["ask", 1, 5, "SIGTERM", "SIGUSR1"]], 2),
    Asked("SIGTERM to one of two, then the other", "SIGTERM", [["ask", 0, 5, "SIGTERM"], ["ask", 1, 6, "SIGTERM"]], 2),
    Asked("SIGUSR1, over and over", "SIGUSR1", [["ask", 0, 6, "SIGUSR1", "SIGUSR1"]]),
    Asked("SIGHUP", "SIGHUP", [["ask", 0, 6, "SIGHUP"]]),
    Asked(
        "^C to both, as a terminal sends it", "SIGINT", [["ask", rank, 5, "SIGINT", "SIGTERM"] for rank in (0, 1)], 2
    ),
    Asked("a file", "the file STOP", [["touch", 0, 6, "STOP"]]),
    Asked("the job ends", "the end of the SLURM job", [["ends", 0, 100]], step=1, given=("stop_before=200",)),
]
LONG = ("accumulation=6", "every.validate=6")  # validations of five and of six batches
# Where a run of ten samples per step and nine steps per epoch is stopped, one after another, and how.
EPOCHS = ("global_batch=10", "accumulation=2", "optimizer.warmup_steps=4", "data.columns=5")
PLACES = {
    2: "touch",  # while the learning rate rises
    5: "touch",  # right after codes were reset
    6: "between",  # between two micro-batches
    8: "touch",  # one step before the end of the epoch
    9: "touch",  # at its end
    10: "touch",  # one step after it
}
FAILING = ("optimizer.lr=1e30", "optimizer.max_skipped_steps=3")


@pytest.fixture(scope="module")
def stopped(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stopped")
    jobs = []
    for one in ASKED:
        out = folder / one.how
        command = train(out / "run", pictures, *one.given, world=one.world)
        faults = [[str(out / "run" / "STOP") if part == "STOP" else part for part in fault] for fault in one.faults]
        jobs.append(job(out, command, *faults, world=one.world))
        jobs.append(job(out / "again", [*command, "stop_before=0"], world=one.world))
    jobs.append(job(folder / "whole", train(folder / "whole" / "run", pictures, *LONG, world=2), world=2))
    command = train(folder / "cut" / "run", pictures, *LONG, world=2)
    jobs.append(job(folder / "cut", command, *(["interrupt", rank, 1] for rank in (0, 1)), world=2))
    jobs.append(job(folder / "cut" / "again", command, world=2))
    jobs.append(job(folder / "straight", train(folder / "straight" / "run", pictures, *EPOCHS)))
    run = folder / "crooked"
    for step, how in PLACES.items():
        fault = [how, 0, step, *([str(run / "STOP")] if how == "touch" else [])]
        jobs.append(job(folder / f"crooked-{step}", train(run, pictures, *EPOCHS), fault))
    jobs.append(job(folder / "crooked-12", train(run, pictures, *EPOCHS)))
    for life in range(3):
        command = train(folder / "impatient", pictures, "data.workers=1", world=2)
        one = job(folder / f"impatient-{life}", command, ["insist", 0, 6], world=2)
        jobs.append({**one, "code": None, "patience": 30.0})
    endless = ("steps=1000000", "every.checkpoint=1000000", "every.validate=1000000", "every.report=1")
    out = folder / "seldom"
    seldom = job(out, train(out / "run", pictures, *endless, world=2), world=2)
    jobs.append({**seldom, "every": stops.EVERY, "training": True, "events": [[3, "SIGTERM", 1]]})
    for life in range(4):
        out = folder / f"failing-{life}"
        jobs.append(job(out, train(folder / "failing", pictures, *FAILING, world=2), world=2))
    forked(folder, jobs)
    return folder


def status(run: Path) -> dict[str, Any]:
    return json.loads((run / "run_status.json").read_text())


@pytest.mark.parametrize("one", ASKED, ids=lambda one: one.how)
def test_a_run_that_is_asked_to_stop_saves_and_goes_on_to_the_same_bits(stopped: Path, twins: Path, one: Asked) -> None:  # noqa: F811
    out = stopped / one.how
    codes, output = end(out)
    assert codes == [75] * one.world, output
    assert f"stopped at step {one.step} ({one.why}). Run the same command to continue." in output
    assert not (out / "run" / "STOP").exists()
    codes, output = end(out / "again")
    assert codes == [0] * one.world, output
    assert f"resumes at step {one.step}:" in output
    same_bits(out / "run", twins / str(one.world) / "run")
    found = status(out / "run")
    assert (found["status"], found["step"], found["why"]) == ("finished", 12, "")


def test_ranks_that_exchange_requests_seldom_stop_at_the_same_step(stopped: Path) -> None:
    """As in production, and not after each step as in the other tests."""
    codes, output = end(stopped / "seldom")
    assert codes == [75, 75], output
    found = status(stopped / "seldom" / "run")
    assert (found["status"], found["why"]) == ("preempted", "SIGTERM")
    assert found["step"] > 10
    assert verify(stopped / "seldom" / "run" / "checkpoints" / f"step-{found['step']:08d}") == []


def test_it_may_be_stopped_at_any_place(stopped: Path) -> None:
    before = 0
    for step in PLACES:
        codes, output = end(stopped / f"crooked-{step}")
        assert codes == [75], output
        assert (f"resumes at step {before}:" if before else "starts:") in output
        assert f"stopped at step {step} (" in output
        before = step
    assert end(stopped / "crooked-12").codes == [0]
    straight = stopped / "straight" / "run"
    same_bits(stopped / "crooked", straight)
    lines = {line["step"]: line for line in read_metrics(straight)}
    assert lines[5]["codebook/resets_per_step"] > 0
    assert lines[3]["optim/lr"] < lines[4]["optim/lr"]
    assert lines[9]["data/epoch"] == 1


def test_a_stop_does_not_wait_for_a_validation(stopped: Path) -> None:
    """The next attempt validates instead, and measures the same as an uninterrupted run."""
    out = stopped / "cut"
    codes, output = end(out)
    assert codes == [75, 75], output
    assert "stopped at step 6 (SIGTERM). Run the same command to continue." in output
    assert [(out / f"batches-{rank}").read_text() for rank in (0, 1)] == ["2", "2"]
    assert not [line for line in measured(out / "run") if line["step"] < 6]
    codes, output = end(out / "again")
    assert codes == [0, 0], output
    assert [line["step"] for line in measured(out / "run")] == [6, 12]
    assert measured(out / "run") == measured(stopped / "whole" / "run")
    same_bits(out / "run", stopped / "whole" / "run")


def measured(run: Path) -> list[dict[str, Any]]:
    """The validation results in the log."""
    lines = [line for line in read_metrics(run) if "val/psnr" in line]
    return [{key: line[key] for key in line if key == "step" or key.startswith("val/")} for line in lines]


def test_a_second_interrupt_leaves_at_once_and_is_no_failure(stopped: Path) -> None:
    """This holds for repeated attempts, even though the other rank fails because the first is missing."""
    for life in range(3):
        out = stopped / f"impatient-{life}"
        codes, output = end(out)
        assert codes[0] == 130, output
        assert codes[1] not in (0, 93), output
        assert "rank 0: a second ^C: ended at once, the steps since the last checkpoint are lost\n" in output
        assert not psutil.pid_exists(int((out / "pid-0").read_text()))
    found = status(stopped / "impatient")
    assert (found["status"], found["code"], found["step"]) == ("preempted", 130, 5)
    assert found["failures"] == []


def test_the_same_failure_three_times_in_a_row_is_no_progress(stopped: Path) -> None:
    """The fourth attempt does not start a new count."""
    codes = [end(stopped / f"failing-{life}").codes for life in range(4)]
    assert codes == [[3, 3], [3, 3], [93, 93], [93, 93]]
    found = status(stopped / "failing")
    assert (found["status"], found["step"]) == ("no-progress", found["failures"][-1]["step"])
    assert found["why"].startswith("Diverged: 3 steps in a row were skipped")
    assert "error: rank 0: the run has failed 3 times in a row at step" in end(stopped / "failing-2").output
    assert "Traceback" not in end(stopped / "failing-2").output
    assert "run_status.json" in names(stopped / "failing")
