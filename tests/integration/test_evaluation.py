"""Numbers are the same on any number of ranks."""

import json
import sys
from pathlib import Path

import pytest
import torch

from launch import evaluate
from tests.conftest import Start, finish, ranks, samples
from tests.evaluation.test_reference import damage
from tests.integration.conftest import TINY, forked, training
from tests.integration.test_resume import same_bits
from vaescale import distributed
from vaescale.data.shards import write

NUMBERS = {"rfd_random", "rkid_random", "rkid_std_random", "gkid_random", "gkid_std_random"}


def test_all_numbers_are_equal_on_one_two_and_three_ranks(tmp_path: Path, start: Start) -> None:
    """With 101 images, of which the ranks have unequal shares, and micro-batches that divide no share."""
    write(tmp_path / "data" / "val", samples(101), 20, [])
    write(tmp_path / "data" / "damaged" / "val", samples(19), 20, [])
    damage(tmp_path / "data" / "damaged" / "val", 18)  # the last rank alone reads it
    results = []
    for world in (1, 2, 3):
        out = tmp_path / str(world)
        command = ["-m", "tests.integration.comparing", str(tmp_path / "data"), str(out), "7", "32"]
        for process in ranks(start, world, command):
            code, output = finish(process)
            assert code == 0, output
        for micro in (7, 32):
            results.append(json.loads(Path(f"{out}.{micro}.json").read_text()))
            refused = [Path(f"{out}.{micro}.{rank}").read_text() for rank in range(world)]
            why = "validation sample 0-00018 in 000000.tar is damaged: changed since it was indexed"
            assert refused == [why] * world
    assert len(results[0]) == 4 + 7 + 9 + 7 + 4
    assert results[0]["images"] == 101
    assert results[0]["rfd_random of 40"] != results[0]["rfd_random"]
    assert results[0]["rfd_random"] < results[0]["gfd_random"]
    for other in results[1:]:
        assert other == pytest.approx(results[0], rel=1e-9)


def test_numbers_of_a_training_are_those_of_the_command(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the training has the same bits without them."""
    given = ["evaluation.features=random", "evaluation.metrics=[rfd,rkid,gkid]", "evaluation.count=20"]
    jobs = []
    for every in (5, 0):
        run = tmp_path / f"{every}" / "run"
        settings = [f"run={run}", f"data.root={pictures}", f"every.evaluate={every}", *given]
        jobs.append(training(run.parent, TINY.with_name("tiny_vae.yaml"), settings, world=2))
    output = forked(tmp_path, jobs)
    run, plain = tmp_path / "5" / "run", tmp_path / "0" / "run"
    assert "evaluation every 5 steps: rfd_random, rkid_random, gkid_random on 11 validation images" in output
    assert output.count("  rKID (random) ") == 3
    same_bits(run, plain)

    lines = {path: list(map(json.loads, (path / "metrics.jsonl").open())) for path in (run, plain)}
    found = {
        line["step"]: {name[4:]: value for name, value in line.items() if name.startswith("val/")}
        for line in lines[run]
    }
    assert [step for step, values in found.items() if values.keys() >= NUMBERS] == [5, 10, 12]
    assert not any(name.startswith("val/rkid") for line in lines[plain] for name in line)
    monkeypatch.setattr(distributed, "init", lambda: torch.device("cpu"))
    words = ["--metrics", "rfd", "rkid", "gkid", "--features", "random", "--count", "20", "data.workers=0"]
    monkeypatch.setattr(sys, "argv", ["evaluate", "--run", str(run), *words])
    assert evaluate.main(evaluate.parse()) == 0
    expected = json.loads((run / "evaluation.json").read_text())
    assert found[12] == pytest.approx({name: expected[name] for name in found[12]}, rel=1e-6)
