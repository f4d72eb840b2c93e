"""The model of the page on adding one, with a metric and features, from a file outside the package."""

import json
import re
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.conftest import Start, finish, free_port
from tests.integration.conftest import written
from tests.integration.test_launch import BIN
from tests.training.test_readme import PAGE

MORE = """
from vaescale.evaluation.metrics import METRICS
from vaescale.evaluation.metrics.metric import Metric, Number
from vaescale.nn.features import NETS
from vaescale.nn.frozen import Net
from vaescale.nn.published import FILES, Published

METRICS.append(
    Metric(
        {"brightness": Number("brightness", ".3f", "brightness")},
        {"brightness": "mean of the reconstructions"},
        lambda seen: {"brightness": seen.reconstruction.double().mean((1, 2, 3)).sum()},
    )
)
protocol = {"layer": "mean", "resize": "none", "range": "0 to 255"}
NETS["mean"] = Net(
    "FD (mean)", 3, protocol, {"scale": (3,)}, dict, lambda weights, x: (x.mean((2, 3)) * weights["scale"], None)
)
FILES["mean"] = Published("mean.pth", "abc", 0, "nowhere", "none", "a test")
"""
CONFIG = """
model: {kind: patches}
steps: 2
global_batch: 4
precision: fp32
data: {size: 16, columns: 8, workers: 0}
"""


def test_a_plugin_trains_on_two_ranks_and_is_evaluated(pictures: Path, tmp_path: Path, start: Start) -> None:
    """With DeepSpeed's launcher under run.py. Without the plug-in the run is refused."""
    code = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert code
    assert len(list(filter(None, code[1].splitlines()))) <= 30
    file, config, run = tmp_path / "patches.py", tmp_path / "patches.yaml", tmp_path / "run"
    file.write_text(code[1] + MORE)
    config.write_text(CONFIG)
    plugin = ["--plugin", str(file)]
    launcher = [str(BIN / "deepspeed"), "--num_accelerators", "2", "--master_port", str(free_port())]
    given = ["--config", str(config), *written({"data.root": pictures, "run": run})]
    command = [sys.executable, "launch/run.py", *launcher, "launch/train.py", *plugin, *given]
    status, output = finish(start(command))
    assert status == 0, output
    assert json.loads((run / "run_status.json").read_text())["step"] == 2
    assert str(file) not in (run / "config.yaml").read_text()

    save_file({"scale": torch.ones(3)}, tmp_path / "mean.safetensors", {"kind": "mean", "sha256": "abcdef"})
    evaluate = [sys.executable, "launch/evaluate.py", "--run", str(run)]
    more = ["--metrics", "rfd", "--features", "mean", *plugin]
    status, output = finish(start([*evaluate, *more], VAESCALE_WEIGHTS=str(tmp_path)))
    assert status == 0, output
    result = json.loads((run / "evaluation.json").read_text())
    assert result["model"] == "patches"
    assert 0 < result["brightness"] < 255
    assert result["rfd_mean"] >= 0

    sentence = "model.kind=patches is not one of the models: "
    for words in (evaluate, [sys.executable, "launch/sample.py", "--run", str(run)]):
        status, output = finish(start(words))
        assert status == 2
        assert sentence in output
        assert "needs --plugin FILE.py" in output
