"""Runs without progress: a rank that hangs, is stopped or slow, or a launcher that is gone; and some false alarms."""

import json
import os
import re
import runpy
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import ROOT, Start, finish, free_port
from tests.faults.test_checkpoints import end, job, names, train
from tests.faults.test_stops import status
from tests.integration.conftest import TINY, forked
from vaescale.advice import postmortem
from vaescale.lifecycle.checkpoint import verify
from vaescale.lifecycle.status import HUNG_CODE, Status

TIMEOUT = 3.0
RUN = [sys.executable, "launch/run.py"]
SOON = 30.0  # seconds within which all processes of a run end after its launcher is gone
GONE = 10.0  # seconds within which all ranks end after an error of one of them


LOST: dict[str, list[Any]] = {
    "a rank": ["kill", 1, 6],
    "a worker": ["kill worker", 1, 6],
    "an error": ["fail", 1, 6],
}
RANK_0 = {"pictures": "draw slowly", "a report": "report slowly"}


@pytest.fixture(scope="module")
def befallen(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("watched")
    given = f"hang_timeout={TIMEOUT}"
    slow = ("steps=120", "every.report=20", "every.validate=1000", "every.checkpoint=1000")
    commands = {
        "hung": train(folder / "hung" / "run", pictures, given, world=2),
        "standing": train(folder / "standing" / "run", pictures, given, world=2),
        "slow": train(folder / "slow" / "run", pictures, *slow, world=2),
    }
    faults: dict[str, list[Any]] = {
        "hung": ["hang", 1, 6],
        "standing": ["stand", 1, 6],
        "slow": ["starve", 1, 0.15, 40],
    }
    jobs = [job(folder / name, command, faults[name], world=2) for name, command in commands.items()]
    several = (*slow[:1], "data.workers=1", "hang_timeout=60")
    for name, fault in LOST.items():
        command = train(folder / name / "run", pictures, *several, world=2)
        jobs.append({**job(folder / name, command, fault, world=2), "code": None, "patience": 60.0})
    doctor = [str(ROOT / "launch" / "doctor.py"), *train(folder / "new" / "run", pictures, world=2)[1:]]
    jobs.append(job(folder / "well", doctor, world=2))
    jobs.append(job(folder / "ill", [*doctor, "init_from=nowhere"], world=2))
    long = train(folder / "long" / "run", pictures, given)
    jobs.append(job(folder / "long", long, ["dawdle", 0, 2 * TIMEOUT]))
    for name, fault in RANK_0.items():
        command = train(folder / name / "run", pictures, given, world=2)
        jobs.append(job(folder / name, command, [fault, 0, 2 * TIMEOUT], world=2))
    jobs[0]["code"] = HUNG_CODE
    jobs[1]["code"] = [HUNG_CODE, -signal.SIGKILL]
    forked(folder, jobs)
    return folder


def test_a_rank_that_hangs_ends_the_run_and_leaves_all_stacks(befallen: Path) -> None:
    out = befallen / "hung"
    found = status(out / "run")
    assert (found["status"], found["code"], found["step"]) == ("failed", HUNG_CODE, 5)
    assert found["why"].startswith("Hang: step 6 did not end; ")
    assert names(out / "run" / "stacks") == ["rank-0.txt", "rank-1.txt"]
    waiting, hung = ((out / "run" / "stacks" / f"rank-{rank}.txt").read_text() for rank in (0, 1))
    assert re.search(r"it is at inject\.py:\d+, <lambda>, called from trainer\.py:\d+, loop$", hung.splitlines()[0])
    assert re.search(r"it is at .*, called from \w+\.py:\d+, \w+$", waiting.splitlines()[0])
    assert "inject.py" not in waiting.splitlines()[0]
    for text in (waiting, hung):
        silent, limit = map(float, re.search(r"for (\d+) s in step 6 \(limit (\d+) s\);", text).groups())
        assert TIMEOUT <= limit <= silent <= 2 * limit, text
    output = (out / "output-1.txt").read_text()
    assert "error: rank 1 of 2: no progress for" in output
    assert "left no stacks" not in output + (out / "output-0.txt").read_text()
    assert none_is_left(out)
    sick = "\n".join(map(str, postmortem.diagnose(out / "run")))
    assert "FAIL: failed at step 5 on rank" in sick
    assert re.search(r"warn: it hung: rank 1 of 2: no progress for .* in step 6 .*; it is at inject\.py", sick)
    assert "is the likely cause" in sick
    assert "ok: the same command continues from step-00000004" in sick


def test_a_rank_that_is_stopped_is_named_by_the_others(befallen: Path) -> None:
    out = befallen / "standing"
    assert names(out / "run" / "stacks") == ["rank-0.txt"]
    assert "error: rank 1 left no stacks" in (out / "output-0.txt").read_text()
    assert status(out / "run")["code"] == HUNG_CODE
    assert "warn: rank 1 left no stacks" in "\n".join(map(str, postmortem.diagnose(out / "run")))
    assert none_is_left(out)


@pytest.mark.parametrize("what", LOST)
def test_a_rank_or_a_worker_that_is_killed_or_fails_ends_the_run(befallen: Path, what: str) -> None:
    """The others end on their own, long before a launcher would kill them, though their process groups could not be
    destroyed, and the status says why."""
    out = befallen / what
    codes, output = end(out)
    found = status(out / "run")
    assert found["status"] == "failed"
    assert found["step"] >= 5
    assert none_is_left(out)
    assert (out / "codes.json").stat().st_mtime - (out / "pid-0").stat().st_mtime < SOON
    if what == "a rank":
        assert codes == [1, None], output
        assert found["rank"] == 0
    elif what == "an error":
        assert codes == [1, 1], output
        assert "RuntimeError: nobody foresaw this" in (out / "output-1.txt").read_text()
        assert (found["rank"], found["why"]) == (1, "RuntimeError: nobody foresaw this")
        seconds = (out / "codes.json").stat().st_mtime - (out / "failed").stat().st_mtime
        print(f"both ranks were gone {seconds:.1f} s after the error")
        assert seconds < GONE
    else:
        assert codes[1] == 2
        assert codes[0] not in (0, None)
        said = (out / "output-1.txt").read_text()
        assert re.search(
            r"error: rank 1: DataLoader worker \(pid \d+\) was killed: if memory ran out, lower data.workers", said
        )
        assert "Traceback" not in said
        assert found["rank"] == 1


def test_a_long_validation_is_no_hang(befallen: Path) -> None:
    codes, output = end(befallen / "long")
    assert codes == [0], output
    assert not (befallen / "long" / "run" / "stacks").exists()


@pytest.mark.parametrize("what", RANK_0)
def test_slow_work_on_rank_0_is_no_hang_on_the_others(befallen: Path, what: str) -> None:
    codes, output = end(befallen / what)
    assert codes == [0, 0], output
    assert not (befallen / what / "run" / "stacks").exists()


def test_a_slow_rank_is_named(befallen: Path) -> None:
    codes, output = end(befallen / "slow")
    assert codes == [0, 0], output
    named = re.findall(r"rank (\d) takes [\d.]+ times as long as the others \((\S+) s .*, (\S+) s of it", output)
    assert [rank for rank, *_ in named] == ["1"], output
    assert all(0.15 <= float(seconds) < 0.5 for seconds in named[0][1:]), named
    assert output.count("rank 1 is as fast as the others again") == 1
    lines = [json.loads(line) for line in (befallen / "slow" / "run" / "metrics.jsonl").read_text().splitlines()]
    assert max(line.get("perf/slowest_rank", 0) for line in lines) >= 2


def test_the_doctor_takes_a_step_on_all_ranks_and_leaves_nothing(befallen: Path) -> None:
    codes, output = end(befallen / "well")
    assert codes == [0, 0], output
    assert "FAIL" not in output
    assert "ok: 90 training and 11 validation images can be read" in output
    assert "ok: 2 rank(s) exchanged a number in" in output
    assert "ok: all ranks have the same settings and versions" in output
    assert re.search(r"ok: 2 step\(s\) taken and a checkpoint of \d+\.\d KiB saved", output)
    codes, output = end(befallen / "ill")
    assert codes == [1, 1], output
    assert "FAIL: a trial step and its checkpoint failed (CheckpointError: init_from=nowhere is neither" in output
    assert names(befallen / "new") == []


def none_is_left(out: Path) -> bool:
    return not any(psutil.pid_exists(int(path.read_text())) for path in out.glob("pid-*"))


def soon(condition: Callable[[], bool], seconds: float = SOON) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if condition():
            return True
        time.sleep(0.1)
    return False


ENDLESS = ("steps=1000000", "every.checkpoint=1000000", "every.validate=1000000", "every.report=50")


def last_step(run: Path) -> int:
    metrics = postmortem.read_metrics(run)
    return metrics[-1]["step"] if metrics else 0


def test_a_launcher_that_is_killed_leaves_a_saved_run_and_no_orphan(
    pictures: Path, tmp_path: Path, start: Start
) -> None:
    """run.py, whose child was killed, returns the exit code of the ranks."""
    run = tmp_path / "run"
    torchrun = [str(Path(sys.executable).parent / "torchrun"), "--nproc-per-node", "2", "--master-port"]
    command = [*RUN, *torchrun, str(free_port()), *train(run, pictures, *ENDLESS, world=2)]
    process = start(command, cold=True)
    assert soon(lambda: last_step(run) > 0, 120)
    (launcher,) = psutil.Process(process.pid).children()
    ranks = launcher.children()
    assert len(ranks) == 2
    killed = time.monotonic()
    launcher.kill()
    code, output = finish(process, SOON)
    assert time.monotonic() - killed < SOON
    assert code == 75, output
    assert not any(rank.is_running() for rank in ranks)
    assert "(the death of its launcher). Run the same command to continue." in output
    found = status(run)
    assert (found["status"], found["why"]) == ("preempted", "the death of its launcher")
    assert verify(run / "checkpoints" / f"step-{found['step']:08d}") == []


def test_the_wrapper_passes_a_signal_on_and_does_not_die_alone(pictures: Path, tmp_path: Path, start: Start) -> None:
    run = tmp_path / "run"
    process = start([*RUN, sys.executable, *train(run, pictures, *ENDLESS)])
    assert soon(lambda: last_step(run) > 0, 120)
    os.kill(process.pid, signal.SIGTERM)
    code, output = finish(process, SOON)
    assert code == 75, output
    assert status(run)["status"] == "preempted"
    assert not (run / "STOP").exists()

    before = status(run)
    process = start([*RUN, sys.executable, *train(run, pictures, *ENDLESS)])
    assert soon(lambda: last_step(run) > before["step"], 120)
    (rank,) = psutil.Process(process.pid).children()
    process.kill()
    assert soon(lambda: not rank.is_running())
    found = status(run)
    assert (found["status"], found["why"]) == ("preempted", "SIGTERM")
    assert found["step"] > before["step"]


def test_the_wrapper_wants_to_know_the_run(start: Start) -> None:
    code, output = finish(start([*RUN, "deepspeed", "launch/train.py"], PYTHONPATH=str(ROOT)), SOON)
    assert (code, output) == (2, "error: write launch/run.py LAUNCHER … launch/train.py --config C [key=value …]\n")


# A launcher that loses exit codes: its only rank writes the status, leaves a process behind and exits with another one.
LAUNCHER = """
import shutil, subprocess, sys
from pathlib import Path
run, written, code = sys.argv[3].removeprefix("run="), Path(sys.argv[4]), int(sys.argv[5])
if written.exists():
    shutil.copytree(written, run)
print(subprocess.Popen(["sleep", "1"], start_new_session=True).pid)
sys.exit(code)
"""


def written(folder: Path, how: str) -> Path:
    """A run directory with the status of a run that has ended so, or none. A launcher that copies it need not import
    torch."""
    status = Status(folder, 0)
    if how != "never begun":
        folder.mkdir()
        status.begin(3)
    if how == "failed":
        status.fail("nan", 3, 3)
    elif how in ("finished", "preempted"):
        status.end(how, "", 3)
    return folder


@pytest.mark.parametrize(
    ("how", "launcher", "code"),
    [
        ("finished", 1, 0),
        ("preempted", 0, 75),
        ("failed", 1, 3),
        ("killed", 0, 1),
        ("killed", 9, 9),
        ("never begun", 2, 2),
    ],
)
def test_the_wrapper_returns_what_the_run_says(
    tmp_path: Path, start: Start, how: str, launcher: int, code: int
) -> None:
    script = tmp_path / "train.py"
    script.write_text(LAUNCHER)
    config = tmp_path / "config.yaml"
    config.write_text("run: none\nmodel: {kind: pca}\n")
    command = [sys.executable, str(script), "--config", str(config), f"run={tmp_path / 'run'}"]
    command += [str(written(tmp_path / "written", how)), str(launcher)]
    found, output = finish(start([*RUN, *command], PYTHONPATH=str(ROOT)), SOON)
    assert found == code, output
    assert not psutil.pid_exists(int(output.splitlines()[0]))
    if how == "failed":  # again: the old status does not count for a new attempt
        command[-2:] = [str(tmp_path / "nothing"), "2"]
        assert finish(start([*RUN, *command], PYTHONPATH=str(ROOT)), SOON)[0] == 2


# A launcher that does not end on its own, nor does its child process; and ranks that ignore the STOP file.
STUBBORN = """
import shutil, signal, subprocess, sys, time
from pathlib import Path
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
if Path(sys.argv[-1]).exists():
    shutil.copytree(sys.argv[-1], sys.argv[3].removeprefix("run="))
print(subprocess.Popen(["sleep", "1000"], start_new_session=True).pid, flush=True)
time.sleep(1000)
"""


@pytest.mark.parametrize("how", ["begun", "never begun"])
def test_the_wrapper_ends_all_at_once_at_the_second_interrupt(tmp_path: Path, start: Start, how: str) -> None:
    """Before training begins, it does so at the first interrupt."""
    script, run = tmp_path / "train.py", tmp_path / "run"
    script.write_text(STUBBORN)
    command = [*RUN, sys.executable, str(script), "--config", str(TINY), f"run={run}", "data.root=none"]
    command.append(str(written(tmp_path / "written", how)))
    process = start(command, PYTHONPATH=str(ROOT))
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    process.send_signal(signal.SIGINT)
    if how == "begun":
        assert soon((run / "STOP").exists)
        time.sleep(1)  # two interrupts within half a second count as one
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
    code, output = finish(process, SOON)
    assert (code, output) == (130, "")
    assert not psutil.pid_exists(pid)
    assert not (run / "STOP").exists()


def test_what_is_put_back_into_the_queue() -> None:
    worth = runpy.run_path(RUN[1])["worth_another_attempt"]

    def stopped(why: str, code: int = 75) -> dict[str, Any]:
        return {"status": "preempted", "why": why, "code": code}

    for why in ("SIGTERM", "SIGUSR1", "the end of the SLURM job", "the death of its launcher"):
        assert worth(75, stopped(why))
    for why in ("SIGINT", "the file STOP"):
        assert not worth(75, stopped(why))
    assert not worth(130, stopped("a second ^C: ended at once, the steps since the last checkpoint are lost", 130))
    assert worth(75, {})  # SLURM's signal before training began
    assert worth(75, {"status": "running", "code": None})
    assert not worth(130, {})
    assert not worth(1, {})
    assert worth(1, {"status": "failed", "code": 4})
    assert not worth(1, {"status": "failed", "code": 2})
