"""Runs the benchmarks at their smallest scale; their numbers are not used."""

import json
import sys
from pathlib import Path

from tests.conftest import ROOT, begin, finish
from tests.test_library import untrained


def run(name: str, *arguments: str) -> str:
    code, output = finish(begin([sys.executable, f"tests/benchmarks/{name}", *arguments]))
    assert code == 0, output
    return output


def test_collapse(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "study.jsonl"
    cells = ["--codes", "512", "--remedies", "first batch, resets", "--steps", "2"]
    printed = run("collapse.py", "--data", str(pictures), "--out", str(out), *cells)
    (line,) = map(json.loads, out.read_text().splitlines())
    assert 0 < line["usage"] <= 1
    assert 1 <= line["perplexity"] <= line["codes"]
    assert line["psnr"] > 5
    assert line["latents"] == 256 * (512 + 11)
    assert f"| {line['usage']:.1%}, {line['perplexity']:.0f}, {line['psnr']:.2f}" in printed


def test_hvae() -> None:
    config = str(ROOT / "configs" / "hvae_photos32.yaml")
    held = [
        float(run("hvae.py", "--config", config, "--batch", "1", "--only", side).split()[-1])
        for side in ("ours", "plain torch")
    ]
    assert all(1 < one < 4096 for one in held)


def test_overhead(pictures: Path) -> None:
    lines = run("overhead.py", "--data", str(pictures), "--builds", "1", "--rounds", "1", "global_batch=1").splitlines()
    rows = [line.split(" | ") for line in lines if "≤" in line]
    assert [row[0] for row in rows] == [
        "| a training step",
        "| guards, alone",
        "| watch and stops, alone",
        "| hashing, alone",
    ]
    for _, ours, _, theirs, ratio, _ in rows:
        assert 0.3 < float(ratio) * float(theirs) / float(ours) < 3


def test_save() -> None:
    rows = [line.split("|")[1:-1] for line in run("save.py", "--mib", "24", "--rounds", "1").splitlines()[2:]]
    assert [name.strip() for name, *_ in rows] == ["ours", "safetensors.torch.save"]
    for _, copied, called, gap, _, seconds, *_ in rows:
        assert float(copied) >= 0
        assert 0 < float(called) <= float(gap) + 0.01 <= float(seconds) + 0.02


def test_adversarial() -> None:
    given = ["--rounds", "1", "adversarial.width=8", "adversarial.layers=2", "data.size=32", "global_batch=2"]
    rows = [line.split(" | ") for line in run("adversarial.py", *given).splitlines() if line.startswith("| ")]
    del rows[0], rows[-2]  # the heads of the tables
    assert [row[0] for row in rows] == [
        "| a step, constant weight",
        "| a step, adaptive weight",
        "| a step, adaptive weight, perceptual distance",
        "| the critic, one batch",
        "| with checkpointing",
    ]
    for _, ours, _, theirs, ratio, *_ in rows:
        assert 0.3 < float(ratio.rstrip(" |")) * float(theirs) / float(ours) < 3


def test_evaluation() -> None:
    given = ["--rounds", "1", "--dim", "16", "--images", "300", "--pictures", "2"]
    printed = run("evaluation.py", *given)
    rows = [line.split(" | ") for line in printed.splitlines()[4:] if line[:1] == "|"]
    names = ["| Fréchet distance", "| precision", "| features of Inception and their moments"]
    assert [row[0].split(",")[0] for row in rows] == names[: 2 if "were not compared" in printed else 3]
    for _, theirs, ours, ratio, *_ in rows:
        assert float(ours) >= 0
        assert float(theirs) >= 0
        assert float(ratio) > 0
    cells = [line.split(" | ") for line in run("evaluation.py", "bias", "--rounds", "1").splitlines()[2:]]
    distances = [float(row[1].split(" ± ")[0]) for row in cells]
    assert distances == sorted(distances, reverse=True)
    assert distances[0] > 50 * distances[-1] > 0


def test_export(pictures: Path) -> None:
    given = [f"data.root={pictures}", "data.size=16", "model.network.width=8", "--rounds", "1", "--images", "40"]
    rows = [line.split(" | ") for line in run("export.py", *given).splitlines() if line.startswith("| ")][1:]
    assert [row[0] for row in rows] == 2 * ["| wall-clock time"] + 2 * ["| CPU time of all processes"]
    for _, _, bare, export, ratio, _ in rows:
        assert float(bare) > 0
        assert 0.3 < float(ratio) * float(bare) / float(export) < 3


def test_generate() -> None:
    given = ["--width", "32", "--depth", "1", "--side", "3", "--batch", "2", "--rounds", "1"]
    rows = [line.split(" | ") for line in run("generate.py", *given).splitlines() if line.startswith("| ")]
    assert [row[1] for row in rows] == ["beside", "LlamaGen's cache", "x-transformers", "no cache", "plain torch"]
    for row in (rows[1], rows[3], rows[4]):
        assert all(float(value) >= 0 for value in row[2:5])


def test_diffusion() -> None:
    given = ["--width", "32", "--depth", "1", "--size", "8", "--batch", "2", "--rounds", "1"]
    printed = run("diffusion.py", *given)
    (row,) = [line.split(" | ") for line in printed.splitlines() if line.startswith("| training step")]
    assert 0.2 < float(row[3]) < 5
    assert "images/s" in printed


def test_classes(pictures: Path, tmp_path: Path) -> None:
    name = str(untrained(tmp_path / "run", "tiny_vae", pictures))
    held, drawn = run("classes.py", name, "--count", "20").splitlines()
    assert held.startswith("held-out images: ")
    assert drawn.startswith("20 samples, guidance 1: ")
    assert all(0 <= float(line.split()[-1].rstrip("%")) <= 100 for line in (held, drawn))
