"""What launch/slurm/train.sbatch hands on of what launch/slurm/submit.py gives to sbatch; here bash takes sbatch's
place, and the tests in cluster/ have a real controller."""

import os
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.integration.conftest import TINY

SHOW = "#!/bin/sh\nprintf '%s\\0' \"$@\"\n"


@pytest.fixture
def submitted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., list[str]]:
    """Returns submitted(argument …) → the words of the sbatch command."""

    def submitted(*arguments: str) -> list[str]:
        monkeypatch.chdir(ROOT)
        fixed = ["submit.py", str(TINY), "--time=1", "--cpu", "--print", "--accelerators=1"]
        monkeypatch.setattr(sys, "argv", [*fixed, *arguments])
        with pytest.raises(SystemExit, match=r"^0$"):
            runpy.run_path(str(ROOT / "launch" / "slurm" / "submit.py"), run_name="__main__")
        return shlex.split(capsys.readouterr().out)

    return submitted


def executed(folder: Path, words: list[str], **variables: str) -> list[str]:
    """Returns the arguments that launch/train.py would get."""
    for path, text in ((".venv/bin/python", SHOW), ("bin/scontrol", "#!/bin/sh\necho node1\n")):
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        file.chmod(0o755)
    (folder / "match.1").touch()  # what a glob would find
    script = next(place for place, word in enumerate(words) if word.endswith("train.sbatch"))
    slurm = {"SLURM_SUBMIT_DIR": str(folder), "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node1", **variables}
    done = subprocess.run(
        ["bash", ROOT / words[script], *words[script + 1 :]],
        env={**slurm, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    given = done.stdout.partition("\n")[2].split("\0")[:-1]
    return given[given.index("launch/train.py") + 1 :]


Submitted = Callable[..., list[str]]
COMMON = ["data.root=/a b/*", "optimizer.warmup_steps=3"]


@pytest.mark.parametrize("run", ["runs/one", "it's a run=1", "a  b/*/?"])
def test_a_run_is_passed_on_unchanged(tmp_path: Path, submitted: Submitted, run: str) -> None:
    words = submitted(*COMMON, f"run={run}")
    assert executed(tmp_path, words) == ["--config", str(TINY), *COMMON, f"run={run}"]


@pytest.mark.parametrize(
    ("sweep", "values"),
    [
        ("seed=1,2,3", ["1", "2", "3"]),
        ("optimizer.betas=[0.9, 0.95],[0.8, 0.9]", ["[0.9, 0.95]", "[0.8, 0.9]"]),
        ("data.cache=/a b/*,match.?,it's `pwd`", ["/a b/*", "match.?", "it's `pwd`"]),
    ],
)
def test_each_task_of_a_sweep_gets_its_own_settings_unchanged(
    tmp_path: Path, submitted: Submitted, sweep: str, values: list[str]
) -> None:
    key = sweep.partition("=")[0]
    words = submitted(*COMMON, "run=a run", "--sweep", sweep)
    assert f"--array=0-{len(values) - 1}" in words
    for task, value in enumerate(values):
        array = {"SLURM_ARRAY_TASK_ID": str(task), "SLURM_ARRAY_TASK_COUNT": str(len(values))}
        own = [f"{key}={value}", f"run=a run/{key}={value}"]
        assert executed(tmp_path, words, **array) == ["--config", str(TINY), *COMMON, "run=a run", *own]
