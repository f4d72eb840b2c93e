"""The kit for GPUs on a CPU: what does not need CUDA works, and what fails is reported."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, begin, finish
from tests.gpu import kit
from tests.gpu.common import ALONE, Part, Results, tried


def test_the_kit_reports_its_parts(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "tests.gpu.kit",
        "--pretend",
        "--out",
        str(tmp_path),
        "--parts",
        "search",
        "reference",
    ]
    code, output = finish(begin(command))
    assert code == 0, output
    report = json.loads((tmp_path / "report.json").read_text())
    assert all(losses[-1] < losses[0] for key, losses in report["reference"].items() if key != "seconds")
    page = (tmp_path / "report.md").read_text()
    assert "| reference | ok |" in page
    assert "| search | left out |" in page


@pytest.mark.long
def test_every_part_but_those_for_cuda_runs(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.gpu.kit", "--pretend", "--out", str(tmp_path)]
    code, output = finish(begin(command), timeout=580)
    assert code == 0, output
    report = json.loads((tmp_path / "report.json").read_text())
    cuda = ("search", "compiled")
    assert {name for name, entry in report.items() if kit.state(entry) == "left out"} == {*cuda}
    assert {kit.state(entry) for name, entry in report.items() if name not in cuda} == {"ok"}
    assert report["families"]["tiny_hvae, fp32, ZeRO 2"] < 1e-5
    assert report["resume"]["weights"] == "the same bits"


def results(out: Path, pretend: bool) -> Results:
    raise NotImplementedError  # the part's own process looks it up by its name


@pytest.mark.parametrize(("name", "limit", "words"), [("unknown", 60, "exit code 1"), ("environment", 0, "within 0 s")])
def test_a_part_that_fails_or_hangs_is_reported(tmp_path: Path, name: str, limit: int, words: str) -> None:
    assert words in kit.run(Part(name, limit, results, "", ALONE), tmp_path, True, limit)["error"]


def test_a_failed_result_costs_no_other() -> None:
    assert tried(lambda: [][0]).startswith("failed: IndexError")
    assert kit.state({"one": 1, "other": tried(lambda: [][0])}) == "FAILED"
    assert kit.state({"one": 1, "error": "not done within 5 s"}) == "FAILED"


def test_the_bundle_has_all_requirements_of_each_python() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    (listed,) = re.findall(r"\ndependencies = \[(.*?)\n\]", project, re.DOTALL)
    wanted = set(re.findall(r'^ +"([a-z-]+)', listed, re.MULTILINE)) - {"torch", "numpy"}
    assert len(wanted) > 10
    for python in ("3.10", "3.11", "3.12"):
        command = ["bash", "launch/bundle.sh", "--list", python]
        pins = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=True).stdout.split()
        names = {pin.partition("==")[0] for pin in pins}
        assert {*wanted, "simplejpeg", "pytest", "pydantic-core"} <= names
        assert not names & {"torch", "numpy", "triton", "scipy"}
        assert len(names) == len(pins)
        assert ("tomli" in names) == (python == "3.10")
