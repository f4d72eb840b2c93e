"""Codebook reports of real runs."""

import json
import shutil
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.conftest import Start, finish, ranks
from tests.integration.conftest import Case

# A codebook that must collapse: eight codes for each row of the first batch, and no resets.
OVERRIDES = "model.quantizer.codebook_size=1500 model.quantizer.reset_every=0 every.report=10 every.validate=1000"


@pytest.mark.parametrize("case", [Case(2), Case(2, zero=1), Case(4, accumulation=3)], ids=str)
def test_numbers_are_those_of_all_ranks(trained: Path, case: Case) -> None:
    """The numbers equal those of one process in the first steps, before the encoder amplifies rounding differences."""
    found, alone = codebook_lines(trained / case.name / "run"), codebook_lines(trained / Case(1).name / "run")
    assert len(alone) == 3
    for line, expected in zip(found, alone, strict=True):
        assert "codebook/commitment" in line
        assert line == pytest.approx(expected, rel=1e-4)


def codebook_lines(run: Path) -> list[dict[str, float]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines()[:3])
    return [{name: value for name, value in line.items() if name.startswith("codebook/")} for line in lines]


def test_a_collapse_is_in_the_log_once_whatever_happens(pictures: Path, tmp_path: Path, start: Start) -> None:
    command = ["launch/train.py", "--config", "tests/integration/tiny.yaml", *OVERRIDES.split()]
    command += [f"run={tmp_path}", f"data.root={pictures}", "every.checkpoint=215", "steps=230"]
    outputs = []
    for _ in range(2):
        (process,) = ranks(start, 1, command)
        code, output = finish(process)
        assert code == 0, output
        outputs.append(output)
        # As if the first attempt had been killed right after the checkpoint of step 215.
        shutil.rmtree(tmp_path / "checkpoints" / "step-00000230")
        (tmp_path / "checkpoints" / "latest").write_text("step-00000215\n")
    (sentence,) = (line for line in outputs[0].splitlines() if "has collapsed" in line)
    assert sentence.startswith("codebook has collapsed at step 210: ")
    assert json.loads((tmp_path / "alarms.json").read_text()) == {"codebook": sentence}
    assert "resumes at step 215" in outputs[1]
    assert "collapsed" not in outputs[1]
    assert json.loads((tmp_path / "checkpoints" / "step-00000215" / "state.json").read_text())["alarms"] == ["codebook"]

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    alarms = {event.step: event.value for event in events.Scalars("codebook/alarm")}
    assert alarms == {step: float(step > 200) for step in range(10, 231, 10)}
    (text,) = events.Tensors("codebook/alarm/text_summary")
    assert text.step == 210
    assert sentence in text.tensor_proto.string_val[0].decode()
