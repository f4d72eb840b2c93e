"""Runs of many attempts, each ended by a fault. The last attempt ends with the same bits as an undisturbed run."""

import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.faults.test_checkpoints import end, job, train
from tests.faults.test_stops import status
from tests.faults.test_watch import none_is_left
from tests.integration.conftest import forked
from tests.integration.test_resume import same_bits

STEPS, INTERVAL = 2000, 10
GIVEN = (f"steps={STEPS}", f"every.checkpoint={INTERVAL}", "every.validate=50", "data.workers=1", "hang_timeout=8")
PATIENCE = 30.0  # seconds that a launcher gives the other ranks once one has failed

pytestmark = [pytest.mark.long, pytest.mark.timeout(1800)]


class Life(NamedTuple):
    what: str
    events: list[list[Any]]  # see forked.py
    faults: list[list[Any]]  # see inject.py
    training: bool = True  # whether the seconds of the events count from the start of training


@pytest.fixture(scope="module")
def undisturbed(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    forked(folder, [job(folder, train(folder / "run", pictures, *GIVEN, world=2), world=2)], timeout=900)
    return folder


def start_up(out: Path) -> float:
    """Seconds from the start of the ranks to the start of training."""
    return (out / "run" / "config.yaml").stat().st_mtime - (out / "pid-0").stat().st_mtime


def live(folder: Path, pictures: Path, lives: Sequence[Life]) -> None:
    """Run the attempts one after another, and a last one without a fault. Each writes folder/NUMBER, see
    inject.launch."""
    run = folder / "run"
    command = train(run, pictures, *GIVEN, world=2)
    jobs = []
    for number, life in enumerate([*lives, Life("nothing", [], [])]):
        one = job(folder / str(number), command, ["keep status", 0, str(run)], *life.faults, world=2)
        how = {"events": life.events, "training": life.training, "patience": PATIENCE, "code": None}
        jobs.append({**one, **how})
    forked(folder, jobs, timeout=1500)


def reached(out: Path) -> int:
    """The last reported step of an attempt."""
    steps = re.findall(r"^step +(\d+)/", (out / "output-0.txt").read_text(), re.MULTILINE)
    return int(steps[-1]) if steps else began(out)


def began(out: Path) -> int:
    """The step at which an attempt resumed."""
    found = re.search(r"resumes at step (\d+):", (out / "output-0.txt").read_text())
    return int(found[1]) if found else 0


def losses_at_each_end(folder: Path, lives: int) -> list[int]:
    """Number of steps that had to be repeated after each attempt; one that ended before it resumed loses none."""
    lost = []
    at = 0
    for number in range(lives):
        text = (folder / str(number) / "output-0.txt").read_text()
        if "resumes at step" in text or " starts: " in text:
            assert "damaged" in text or began(folder / str(number)) <= at
            lost.append(at - began(folder / str(number)))
            at = reached(folder / str(number))
    return lost[1:]


def test_killed_at_fifty_random_moments(undisturbed: Path, pictures: Path, tmp_path: Path) -> None:
    """SIGKILL both ranks, ten times during start-up, and forty times during training, saves and validations."""
    dice = random.Random(0)
    begin = start_up(undisturbed)
    starts = [(False, dice.uniform(0, begin)) for _ in range(10)]
    moments = [*starts, *((True, dice.uniform(0, 0.7)) for _ in range(40))]
    dice.shuffle(moments)
    lives = [Life("SIGKILL to all", [[moment, "SIGKILL", "all"]], [], training) for training, moment in moments]
    live(tmp_path, pictures, lives)

    for number in range(50):
        out = tmp_path / str(number)
        assert end(out).codes == [None, None], end(out).output
        assert none_is_left(out)
        assert "damaged" not in end(out).output
    codes, output = end(tmp_path / "50")
    assert codes == [0, 0], output
    same_bits(tmp_path / "run", undisturbed / "run", STEPS)
    lost = losses_at_each_end(tmp_path, 51)
    print(f"steps lost by each of {len(lost)} kills, of intervals of {INTERVAL}: {sorted(lost)}")
    assert len(lost) >= 30
    assert max(lost) < 2 * INTERVAL  # one interval, plus the steps trained during a save
    assert sorted(lost)[len(lost) // 2] <= INTERVAL


class Fault(NamedTuple):
    codes: list[int | None] | str  # of each rank, None if killed; or a description
    status: str  # in run_status.json after that attempt


SOAK = {
    "SIGKILL to all": Fault([None, None], "running"),
    "SIGKILL to rank 0": Fault("the other one leaves by itself", "failed"),
    "SIGKILL to rank 1": Fault("the other one leaves by itself", "failed"),
    "SIGKILL to a worker": Fault("both leave by themselves", "failed"),
    "SIGTERM to rank 0": Fault([75, 75], "preempted"),
    "SIGUSR1 to rank 1, then rank 0": Fault([75, 75], "preempted"),
    "touch STOP": Fault([75, 75], "preempted"),
    "SIGSTOP to rank 1": Fault([4, None], "failed"),
    "a flipped bit": Fault([None, None], "running"),
    "an empty latest": Fault([None, None], "running"),
    "no latest": Fault([None, None], "running"),
}


def life(what: str, moment: float, run: Path) -> Life:
    if not what.startswith(("SIG", "touch")):
        return Life(what, [[moment, "SIGKILL", "all"]], [["harm", 0, str(run), what]])
    if what == "touch STOP":
        return Life(what, [[moment, "touch", str(run / "STOP")]], [])
    events: dict[str, list[list[Any]]] = {
        "SIGKILL to all": [[moment, "SIGKILL", "all"]],
        "SIGKILL to a worker": [[moment, "SIGKILL", "worker"]],
        "SIGUSR1 to rank 1, then rank 0": [[moment, "SIGUSR1", 1], [moment + 0.05, "SIGUSR1", 0]],
    }
    name, rank = what.split()[0], what.split()[-1]
    return Life(what, events[what] if what in events else [[moment, name, int(rank)]], [])


def test_thirty_random_faults(undisturbed: Path, pictures: Path, tmp_path: Path) -> None:
    """Thirty faults in random order, each at a random moment of training: each kind once, the others drawn at
    random."""
    dice = random.Random(1)
    whats = [*SOAK, *dice.choices(list(SOAK), k=29 - len(SOAK))]
    dice.shuffle(whats)
    whats.insert(0, "touch STOP")  # creates a checkpoint that can be damaged
    lives = [life(what, dice.uniform(0, 0.7), tmp_path / "run") for what in whats]
    live(tmp_path, pictures, lives)

    for number, what in enumerate(whats):
        out = tmp_path / str(number)
        codes, output = end(out)
        where = f"life {number}, {what}: {codes}\n{output[-2000:]}"
        wanted, after = SOAK[what]
        if isinstance(wanted, list):
            assert codes == wanted, where
        else:
            killed = [what[-1]] if "rank" in what else []
            assert [str(rank) for rank, code in enumerate(codes) if code is None] == killed, where
            assert 0 not in codes, where
        said = json.loads((tmp_path / str(number + 1) / "status.json").read_text())
        assert said["status"] == after, where
        assert none_is_left(out), where
        assert ("is damaged, trying the next one" in output) == (what == "a flipped bit"), where
    codes, output = end(tmp_path / "30")
    assert codes == [0, 0], output
    assert status(tmp_path / "run")["status"] == "finished"
    same_bits(tmp_path / "run", undisturbed / "run", STEPS)

    taken = sum(reached(tmp_path / str(number)) - began(tmp_path / str(number)) for number in range(31))
    whole, useful = sum(seconds(tmp_path / str(number)) for number in range(31)), seconds(undisturbed)
    print(f"goodput of 30 faults: {STEPS} of {taken} steps, {STEPS / taken:.1%}; {useful:.0f} s of {whole:.0f} s")
    assert taken < 1.5 * STEPS


def seconds(out: Path) -> float:
    """Seconds from the start of the ranks to the last output of rank 0."""
    return (out / "output-0.txt").stat().st_mtime - (out / "pid-0").stat().st_mtime


def test_a_signal_at_any_moment_of_a_save(undisturbed: Path, pictures: Path, tmp_path: Path) -> None:
    """In attempt N of twenty, SIGUSR1 arrives before the N-th file-system call of the first save."""
    run = tmp_path / "run"
    command = train(run, pictures, *GIVEN, world=2)
    times = range(1, 21)
    jobs = [job(tmp_path / str(number), command, ["pester", 0, number], world=2) for number in times]
    forked(tmp_path, [*jobs, job(tmp_path / "rest", command, world=2)], timeout=900)
    before = 0
    for number in times:
        out = tmp_path / str(number)
        codes, output = end(out)
        assert codes == [75, 75], output
        assert began(out) == before
        assert int((out / "asked.txt").read_text()) >= 20
        before = int(re.findall(r"stopped at step (\d+) \(SIGUSR1\)\. Run the same command", output)[0])
    assert end(tmp_path / "rest").codes == [0, 0]
    same_bits(run, undisturbed / "run", STEPS)
