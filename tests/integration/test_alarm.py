"""A real run whose codebook cannot but collapse: eight codes for each row of the first batch, and no resets."""

import json
import shutil
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.conftest import Start, finish, ranks

OVERRIDES = "model.quantizer.codes=1500 model.quantizer.reset_every=0 every.report=10 every.validate=1000"


def test_a_collapse_is_in_the_log_once_whatever_happens(pictures: Path, tmp_path: Path, start: Start) -> None:
    command = ["launch/train.py", "--config", "tests/integration/tiny.yaml", *OVERRIDES.split()]
    command += [f"run={tmp_path}", f"data.root={pictures}", "every.checkpoint=215", "steps=230"]
    outputs = []
    for _ in range(2):
        (process,) = ranks(start, 1, command)
        code, output = finish(process)
        assert code == 0, output
        outputs.append(output)
        # As if the first life had been killed right after the checkpoint of step 215.
        shutil.rmtree(tmp_path / "checkpoints" / "step-00000230")
        (tmp_path / "checkpoints" / "latest").write_text("step-00000215\n")
    (sentence,) = (line for line in outputs[0].splitlines() if "has collapsed" in line)
    assert sentence.startswith("codebook has collapsed at step 210: ")
    assert "resumes at step 215" in outputs[1]
    assert "collapsed" not in outputs[1]
    assert json.loads((tmp_path / "checkpoints" / "step-00000215" / "state.json").read_text())["alarms"] == ["codebook"]

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    alarms = {event.step: event.value for event in events.Scalars("codebook/alarm")}
    assert alarms == {step: float(step > 200) for step in range(10, 231, 10)}
    (text,) = events.Tensors("codebook/alarm/text_summary")
    assert text.step == 210
    assert sentence in text.tensor_proto.string_val[0].decode()
