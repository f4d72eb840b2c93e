"""Unusual uses of a run directory: a second training, the same command again, other settings, paths that cannot be
written, and remains of a stop. All with the commands that a user types.

Each test follows the function that returns its jobs. The fixture `borne` runs all jobs together.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults.test_checkpoints import EVALUATE, Jobs, end, job, names, train
from tests.integration.conftest import forked
from tests.integration.test_resume import same_bits
from vaescale.lifecycle.lock import Lock

STEPS = 4
Make = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def borne(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("borne")

    def make(name: str, *given: str, run: str = "", faults: list[list[Any]] | None = None, world: int = 1) -> Any:
        """A training in folder/runs/RUN with its output in folder/NAME. RUN defaults to NAME."""
        where = folder / "runs" / (run or name)
        command = train(where, pictures, f"steps={STEPS}", "every.checkpoint=2", *given, world=world)
        return {**job(folder / name, command, *(faults or []), world=world), "code": None}

    (folder / "runs").mkdir()
    (folder / "runs" / "file").touch()
    parts = (again, other_settings, others, in_use, impossible, stops, ends, states, measured)
    with Lock(folder / "runs" / "held") as lock:
        lock.acquire()  # by this process
        forked(folder, [one for part in parts for one in part(make, folder)])
    return folder


def files(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}


def again(make: Make, folder: Path) -> Jobs:
    keep = ["keep", 0, str(folder / "runs" / "whole")]
    return [
        make("whole"),
        make("same", run="whole", faults=[keep]),
        make("lowered", "optimizer.lr=1e-4", "steps=3", run="whole", faults=[keep]),
        make("whole-after", run="whole", faults=[keep]),
    ]


def test_a_finished_run_run_again_is_left_as_it_is(borne: Path) -> None:
    """It is unchanged byte for byte, including config.yaml, although settings have changed."""
    before = files(borne / "same" / "kept")
    assert "config.yaml" in before
    for name in ("same", "lowered"):
        codes, output = end(borne / name)
        assert codes == [0], output
        assert "nothing is left to do" in output
        assert f"finished at step {STEPS}" in output
    assert "changed settings: steps 4 → 3, optimizer.lr 0.01 → 0.0001" in end(borne / "lowered").output
    assert "have changed" not in end(borne / "same").output
    assert files(borne / "whole-after" / "kept") == before


def other_settings(make: Make, folder: Path) -> Jobs:
    return [
        make("longer-begin", run="longer"),
        make("longer-size", "data.size=32", run="longer", world=2),
        make("longer-model", "model.quantizer.codebook_size=32", run="longer"),
        make("longer-end", "steps=6", "optimizer.lr=1e-3", run="longer"),
    ]


def test_what_the_weights_depend_on_may_not_change(borne: Path) -> None:
    codes, output = end(borne / "longer-size")
    assert codes == [2, 2], output
    assert output.startswith(
        f"error: rank 0: {borne / 'runs' / 'longer'} has been trained with other settings (data.size 16"
    )
    assert output.count("\n") == 1
    codes, output = end(borne / "longer-model")
    assert codes == [2], output
    assert "(model.quantizer.codebook_size 24 → 32), which its weights depend on: set model.quantizer." in output


def test_what_may_change_is_said_and_kept(borne: Path) -> None:
    run = borne / "runs" / "longer"
    codes, output = end(borne / "longer-end")
    assert codes == [0], output
    assert "resumes at step 4:" in output
    assert "changed settings: steps 4 → 6, optimizer.lr 0.01 → 0.001" in output
    (line,) = (run / "config_history.jsonl").read_text().splitlines()
    assert json.loads(line) == {"step": 4, "changes": {"steps": [4, 6], "optimizer.lr": [0.01, 0.001]}}
    assert "lr: 0.001" in (run / "config.yaml").read_text()
    state = json.loads((run / "checkpoints" / "step-00000006" / "state.json").read_text())
    assert (state["version"], state["since"]) == (3, {"batch": 12, "step": 0, "images": 0})


FSQ = [f"model.quantizer.{given}" for given in ("kind=fsq", "codebook_size=60", "levels=[5,4,3]", "codebook_dim=3")]
LFQ = [f"model.quantizer.{given}" for given in ("kind=lfq", "codebook_size=16")]


def others(make: Make, folder: Path) -> Jobs:
    return [
        make(f"{name}-{steps}", *given, f"steps={steps}", run=name)
        for name, given in (("fsq", FSQ), ("lfq", LFQ))
        for steps in (2, STEPS)
    ]


@pytest.mark.parametrize("name", ["fsq", "lfq"])
def test_quantisers_without_a_codebook_go_on(borne: Path, name: str) -> None:
    codes, output = end(borne / f"{name}-{STEPS}")
    assert codes == [0], output
    assert "resumes at step 2:" in output


def in_use(make: Make, folder: Path) -> Jobs:
    return [make("held", world=2), make("held-over", "--take-over", run="held")]


@pytest.mark.parametrize("name", ["held", "held-over"])
def test_a_second_training_is_refused_on_all_ranks(borne: Path, name: str) -> None:
    """It leaves no trace in the run directory of the first."""
    codes, output = end(borne / name)
    assert codes == [2] * len(codes), output
    assert f"held is in use by another training, process {os.getpid()} on " in output
    assert "or give another run=…\n" in output
    assert output.count("\n") == 1
    assert names(borne / "runs" / "held") == [".lock"]


IMPOSSIBLE = {
    "file": "cannot be used as the run directory (File exists)",
    "file/under": "cannot be used as the run directory (Not a directory)",
    "lock": "lock/.lock: Is a directory",
    "board": "tensorboard",
    "metrics": "metrics.jsonl: it is not a regular file",
    "status": "run_status.json",
    "checkpoints": "checkpoints cannot be saved in",
    "nowhere": "checkpoints cannot be saved in",
}


def impossible(make: Make, folder: Path) -> Jobs:
    runs = folder / "runs"
    for name, path in (("lock", ".lock"), ("metrics", "metrics.jsonl"), ("status", "run_status.json")):
        (runs / name / path).mkdir(parents=True)
    for name, path in (("board", "tensorboard"), ("checkpoints", "checkpoints")):
        (runs / name).mkdir()
        (runs / name / path).touch()
    (runs / "nowhere").mkdir()
    (runs / "nowhere" / "checkpoints").symlink_to("gone")
    return [make(f"at-{name.replace('/', '-')}", run=name) for name in IMPOSSIBLE]


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_a_run_directory_that_cannot_be_used_is_one_sentence(borne: Path, name: str) -> None:
    codes, output = end(borne / f"at-{name.replace('/', '-')}")
    assert codes == [2], output
    assert "Traceback" not in output
    assert IMPOSSIBLE[name] in output.splitlines()[-1]
    assert not (borne / "runs" / name / "config.yaml").exists()


def stops(make: Make, folder: Path) -> Jobs:
    stop = str(folder / "runs" / "asked" / "STOP")
    return [
        make("asked", faults=[["touch unseen", 0, STEPS, stop]]),
        make("asked-on", "steps=8", run="asked"),
        make("cut", faults=[["interrupt", 0, 0]]),
        make("cut-again", run="cut"),
        make("cut-third", run="cut", faults=[["keep", 0, str(folder / "runs" / "cut")]]),
        make("cut-on", "steps=6", run="cut"),
    ]


def test_a_stop_asked_for_in_the_last_step_ends_no_later_run(borne: Path) -> None:
    for name in ("asked", "asked-on"):
        codes, output = end(borne / name)
        assert codes == [0], output
    assert "finished at step 8" in end(borne / "asked-on").output
    assert not (borne / "runs" / "asked" / "STOP").exists()


def validations(run: Path) -> list[int]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if "val/psnr" in line]


def test_a_validation_that_a_stop_has_cut_short_is_made_up_for_once(borne: Path) -> None:
    codes, output = end(borne / "cut")
    assert codes == [75], output
    codes, output = end(borne / "cut-again")
    assert codes == [0], output
    assert "validation at step 4:" in output
    codes, output = end(borne / "cut-third")
    assert codes == [0], output
    assert "validation at step" not in output
    assert "nothing is left to do" in output
    assert validations(borne / "cut-third" / "kept") == [4]
    codes, output = end(borne / "cut-on")
    assert codes == [0], output
    assert validations(borne / "runs" / "cut") == [4, 6]
    state = json.loads((borne / "runs" / "cut" / "checkpoints" / "step-00000006" / "state.json").read_text())
    assert state["validation_due"] is False


def ends(make: Make, folder: Path) -> Jobs:
    run = folder / "runs"
    return [
        make("mute", faults=[["block", 0, STEPS, str(run / "mute" / "run_status.json")]]),
        make(
            "mute-stop", faults=[["block", 0, 2, str(run / "mute-stop" / "run_status.json")], ["ask", 0, 2, "SIGTERM"]]
        ),
        make("stuck", faults=[[what, 0, STEPS, str(run / "stuck" / "STOP")] for what in ("touch unseen", "block")]),
    ]


def test_a_status_that_cannot_be_written_at_the_end_fails_no_run(borne: Path) -> None:
    """Everything is saved by then. A STOP file that cannot be removed does not fail the run either."""
    codes, output = end(borne / "mute")
    assert codes == [0], output
    assert "run_status.json cannot be written (Is a directory); it should say finished at step 4\n" in output
    same_bits(borne / "runs" / "mute", borne / "runs" / "whole", STEPS)
    codes, output = end(borne / "mute-stop")
    assert codes == [75], output
    assert "it should say preempted at step" in output
    codes, output = end(borne / "stuck")
    assert codes == [0], output
    assert "STOP cannot be removed (Is a directory): remove it, or the next start will stop again" in output


STATES: dict[str, tuple[dict[str, Any], str]] = {
    "new": ({}, ""),
    "old": ({"version": None, "since": None, "validation_due": None}, ""),
    "negative": ({"step": -4}, "step is -4 instead of a whole number, 0 or more: use another"),
    "images": ({"images": 47}, "47 images do not match step 4"),
    "elsewhere": ({"step": 3, "images": 36, "optimizer_steps": 3}, "step-00000004 contains the state of step 3"),
    "moments": ({"optimizer_steps": 0}, "optimizer.safetensors does not fit the model: the model has no "),
}


def states(make: Make, folder: Path) -> Jobs:
    runs = folder / "runs"
    return [
        make(name, "steps=6", faults=[["rewrite", 0, str(runs / "whole"), str(runs / name), changes]])
        for name, (changes, _) in STATES.items()
    ]


@pytest.mark.parametrize("name", STATES)
def test_an_old_state_goes_on_and_an_odd_one_is_one_sentence(borne: Path, name: str) -> None:
    _, words = STATES[name]
    codes, output = end(borne / name)
    assert codes == [2 if words else 0], output
    assert "Traceback" not in output
    if words:
        assert words in output.splitlines()[-1]
        return
    saved, twin = (borne / "runs" / run / "checkpoints" / "step-00000006" for run in (name, "new"))
    for file in ("model", "ema", "optimizer"):
        assert (saved / f"{file}.safetensors").read_bytes() == (twin / f"{file}.safetensors").read_bytes()


def measured(make: Make, folder: Path) -> Jobs:
    run, out = folder / "runs" / "whole", folder / "numbers" / "there.json"
    blocked = str(run / "evaluation.json")
    measure = [EVALUATE, "--run", str(run), "--iw", "1", "data.workers=0"]
    jobs = [
        job(folder / "blocked", measure, ["block", 0, 0, blocked]),
        job(folder / "out", [*measure, "--out", str(out)]),
    ]
    return [{**one, "code": None} for one in jobs]


def test_numbers_are_printed_before_they_are_written(borne: Path) -> None:
    codes, output = end(borne / "blocked")
    assert codes == [2], output
    assert "PSNR (dB)" in output
    assert "evaluation.json cannot be written (Is a directory): make it writable, or give --out DIR" in output
    codes, output = end(borne / "out")
    assert codes == [0], output
    assert json.loads((borne / "numbers" / "there.json").read_text())["step"] == STEPS
