"""Forty attempts of one run under `launch/run.py torchrun`, each ended by a signal at any moment from its first second
on. The signal goes to a rank, a loader worker, the launcher, the wrapper, or the launcher and all its ranks.

Thirty more faults, on forked ranks without a launcher, are in test_lives.py.
"""

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from tests.conftest import ROOT, free_port
from tests.faults.test_checkpoints import job, train
from tests.faults.test_stops import status
from tests.integration.conftest import forked
from tests.integration.test_resume import same_bits
from vaescale.advice.postmortem import read_metrics

FAULTS, STEPS, INTERVAL = 40, 1500, 20
GIVEN = (f"steps={STEPS}", "zero_stage=1", f"every.checkpoint={INTERVAL}", "every.validate=100")
GIVEN += ("data.workers=1", "hang_timeout=10")
SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGKILL", "SIGSTOP")
TARGETS = ("rank 0", "rank 1", "worker", "launcher", "wrapper", "group")
SOON = 60.0  # seconds after the wrapper by which all processes must end; torchrun waits 30 s for a stopped rank
START = 20.0  # seconds from the start in which a start-up fault occurs
PATIENCE = 400.0  # maximum seconds of an attempt

pytestmark = [pytest.mark.long, pytest.mark.timeout(7200)]


class Fault(NamedTuple):
    name: str  # a signal
    target: str
    training: bool  # whether the seconds count from the start of training
    moment: float  # seconds
    twice: bool = False

    @property
    def asks(self) -> bool:
        return self.name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")

    @property
    def harmless(self) -> bool:
        """Whether it ends nothing, so that SIGTERM to the wrapper ends the attempt afterwards."""
        if self.name == "SIGSTOP":
            return self.target not in ("rank 0", "rank 1", "worker") or not self.training
        return self.target == "worker" and (self.asks or not self.training)

    def codes(self) -> set[int]:
        """The exit codes that the wrapper may return."""
        number = signal.Signals[self.name]
        if self.harmless:
            return {75} if self.training or self.target != "worker" else {75, 2}
        if self.training:
            if self.name == "SIGKILL":
                return {"worker": {2}, "launcher": {75}, "wrapper": {-9}, "group": {137}}.get(self.target, {1})
            if self.name == "SIGSTOP":
                return {4}
            if self.twice:
                return {130}
            # ^C to the launcher and the ranks reaches the ranks twice, the second time late under load.
            return {75, 130} if self.name == "SIGINT" and self.target == "group" else {75}
        trained = self._replace(training=True).codes()
        before = {  # before training begins, which cannot be distinguished from outside
            "wrapper": {130 if number == signal.SIGINT else 75, -number},
            "launcher": {1, 128 + number},
            "group": {1, 128 + number},
        }
        return trained | before.get(self.target, {1})


def draw(dice: random.Random) -> list[Fault]:
    """Each signal to each target, and some again, during training or start-up."""
    pairs = [(name, target) for target in TARGETS for name in SIGNALS]
    pairs += dice.choices([pair for pair in pairs if pair[0] != "SIGSTOP"], k=FAULTS - len(pairs) - 1)
    faults = [Fault("SIGINT", "wrapper", True, 0.5, twice=True)]
    for name, target in pairs:
        training = dice.random() < 0.5
        faults.append(Fault(name, target, training, dice.uniform(0, 0.5 if training else START)))
    dice.shuffle(faults)
    return faults


def until(found: Callable[[], object], life: "subprocess.Popen[bytes]") -> None:
    """Wait until `found` is true or the attempt has ended."""
    end = time.monotonic() + PATIENCE
    while not found() and life.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.02)


def family(wrapper: int) -> dict[str, list[psutil.Process]]:
    """The processes of each target that exist."""
    with suppress(psutil.NoSuchProcess):
        launchers = psutil.Process(wrapper).children()[:1]
        ranks = [one for launcher in launchers for one in launcher.children() if "train.py" in " ".join(one.cmdline())]
        ranks.sort(key=lambda one: one.environ().get("RANK", ""))
        found = {f"rank {number}": [one] for number, one in enumerate(ranks)}
        workers = ranks[0].children()[:1] if ranks else []
        group = [*launchers, *ranks] if len(ranks) == 2 else []
        return {**found, "worker": workers, "launcher": launchers, "wrapper": [psutil.Process(wrapper)], "group": group}
    return {}


def send(name: str, processes: list[psutil.Process]) -> None:
    for one in processes:
        with suppress(psutil.NoSuchProcess):
            one.send_signal(signal.Signals[name])


def befall(fault: Fault, life: "subprocess.Popen[bytes]", trains: Callable[[], bool]) -> None:
    begun = time.monotonic()
    if fault.training:
        until(trains, life)
        begun = time.monotonic()
    time.sleep(fault.moment)
    if fault.target != "worker" or fault.training:
        until(lambda: time.monotonic() > begun + fault.moment and family(life.pid).get(fault.target), life)
    victims = family(life.pid).get(fault.target, [])
    send(fault.name, victims)
    if fault.twice:
        time.sleep(1)
        send(fault.name, victims)
    if fault.harmless:
        time.sleep(2)
        send("SIGCONT", victims)
        send("SIGTERM", family(life.pid).get("wrapper", []))


def left(mark: str) -> list[psutil.Process]:
    """The remaining processes of the attempt with this mark in its environment."""
    found = []
    for one in psutil.process_iter():
        with suppress(psutil.Error):
            if one.environ().get("SOAK") == mark and one.status() != psutil.STATUS_ZOMBIE:
                found.append(one)
    return found


def test_forty_random_signals(pictures: Path, tmp_path: Path) -> None:
    """The run has the same bits as an undisturbed one, no process remains, and each attempt's exit code is as
    promised."""
    reference, run = tmp_path / "reference", tmp_path / "run"
    forked(tmp_path, [job(reference, train(reference / "run", pictures, *GIVEN, world=2), world=2)], timeout=2000)
    torchrun = [str(Path(sys.executable).parent / "torchrun"), "--nproc-per-node", "2", "--master-port"]
    codes: Counter[int] = Counter()
    begun = time.monotonic()
    for number, fault in enumerate([*draw(random.Random(2)), None]):
        log, mark = tmp_path / f"{number}.txt", f"{os.getpid()}-{number}"
        command = [*torchrun, str(free_port()), *train(run, pictures, *GIVEN, world=2)]
        with log.open("wb") as out:
            life = subprocess.Popen(
                [sys.executable, str(ROOT / "launch" / "run.py"), *command],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "SOAK": mark},
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        try:
            if fault:
                befall(fault, life, lambda log=log: b"\nstep " in log.read_bytes())  # type: ignore[misc]
            code = life.wait(PATIENCE)
            end = time.monotonic() + SOON
            while left(mark) and time.monotonic() < end:
                time.sleep(0.2)
            where = f"life {number}, {fault}: {code}\n{log.read_text()[-3000:]}"
            assert not left(mark), where
            assert code in (fault.codes() if fault else {0}), where
            codes[code] += 1
            print(f"{number:2} {fault}: {code}, step {status(run)['step'] if run.exists() else 0}", flush=True)
        finally:
            for one in left(mark):
                one.kill()
            life.wait()
    print(f"{FAULTS} faults in {time.monotonic() - begun:.0f} s; codes: {dict(codes)}")
    assert status(run)["status"] == "finished"
    same_bits(run, reference / "run", STEPS)
    steps = [line["step"] for line in read_metrics(run) if "train/loss" in line]
    assert steps == list(range(1, STEPS + 1))
