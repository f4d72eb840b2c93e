"""The kit for GPUs on a CPU: what does not need CUDA works, and what fails is reported."""

import json
import sys
from pathlib import Path

import pytest

from tests.conftest import begin, finish
from tests.gpu import kit
from tests.gpu.parts import Part, environment


def test_the_kit_reports_its_parts(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.gpu.kit", "--pretend", "--out", str(tmp_path), "--parts", "reference"]
    code, output = finish(begin(command))
    assert code == 0, output
    report = json.loads((tmp_path / "report.json").read_text())
    assert all(losses[-1] < losses[0] for key, losses in report["reference"].items() if key != "seconds")
    assert "## reference" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(("name", "limit", "words"), [("unknown", 60, "exit code 1"), ("environment", 0, "within 0 s")])
def test_a_part_that_fails_or_hangs_is_reported(tmp_path: Path, name: str, limit: int, words: str) -> None:
    assert words in kit.run(Part(name, limit, environment), tmp_path, pretend=True)["error"]
