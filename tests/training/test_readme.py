"""Trains the model from the page on adding a model, like any other model."""

import copy
import re
import sys
from pathlib import Path

import pytest
import torch

from vaescale import models, plugins, settings
from vaescale.interfaces import Batch, Codec
from vaescale.training.descent import Descent

PAGE = Path(models.__file__).parent / "README.md"


def test_the_model_of_the_page_trains(group: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert code
    file = tmp_path / "patches.py"
    file.write_text(code[1])
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setitem(models.MODELS, "patches", None)  # restored at the end
    plugins.load([file])

    (tmp_path / "c.yaml").write_text(
        "model: {kind: patches}\ndata: {size: 16}\nprecision: fp32\noptimizer: {lr: 1e-2}\n"
    )
    config = settings.load(tmp_path / "c.yaml", ["steps=150", "global_batch=8", "run=none"])
    settings.check(config, world=1)
    torch.manual_seed(0)
    model = settings.build(config)
    learner = Descent(model, config)
    coarse = torch.rand(8, 3, 4, 4, generator=torch.Generator().manual_seed(0)).mul(255).byte()
    x = coarse.repeat_interleave(4, 2).repeat_interleave(4, 3)
    batch = Batch(x, torch.zeros(8).long(), torch.zeros(8, 0), torch.arange(8))
    losses = [float(learner.step([batch], step)["loss"]) for step in range(config.steps)]
    assert losses[-1] < 0.2 * losses[0]
    assert isinstance(model, Codec)
    assert model.decode(model.encode(batch)).shape == x.shape
    half = copy.deepcopy(model).half()  # the weights under DeepSpeed's fp16 engine
    torch.testing.assert_close(half(batch, 0).loss, model(batch, 0).loss, rtol=0.01, atol=0)
