"""The collectives that the plan assumes, counted in real steps of two ranks."""

import json

import pytest

from tests.conftest import ROOT
from tests.integration.conftest import forked
from tests.integration.traffic import BUCKET_BYTES, COUNTED, load
from vaescale import settings
from vaescale.advice.traffic import GATHER, SUM, traffic
from vaescale.training import average

CRITIC = "adversarial={weight: 0.1, critic_start: 0, start: 0, width: 8, layers: 2}"
CASES = [
    *(("tiny", zero, accumulation, "fp32") for zero in (0, 1, 2) for accumulation in (1, 2)),
    *(("tiny", zero, 2, precision) for zero in (0, 2) for precision in ("bf16", "fp16")),
    *(("tiny_vae", zero, 1, "fp32") for zero in (0, 1)),
    ("tiny_hvae", 2, 2, "fp32"),
    *(("tiny", zero, 2, "fp32", CRITIC, "adversarial.adaptive=true") for zero in (0, 1, 2)),
    ("tiny", 0, 1, "bf16", CRITIC, "adversarial.lecam=0"),
    ("tiny", 0, 2, "fp32", "deepspeed.zero_optimization.reduce_bucket_size=1000"),  # ignored at stage 0
    ("tiny", 0, 2, "fp32", "deepspeed.prescale_gradients=true"),  # DeepSpeed reduces the gradients
]
KINDS = {"allreduce": SUM, "allgather_base": GATHER}


def command(model: str, zero: int, accumulation: int, precision: str, *passed: str) -> list[str]:
    given = {"zero_stage": zero, "accumulation": accumulation, "precision": precision}
    file = ROOT / "tests" / "integration" / f"{model}.yaml"
    return [str(file), *(f"{key}={value}" for key, value in given.items()), *passed]


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> list[list[tuple[str, int]]]:
    folder = tmp_path_factory.mktemp("traffic")
    job = {"task": "traffic", "world": 2, "out": str(folder / "counted"), "cases": [command(*case) for case in CASES]}
    forked(folder, [job])
    return json.loads((folder / "counted" / "traffic.json").read_text())


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_steps_of_two_ranks_move_what_the_plan_says(
    counted: list[list[tuple[str, int]]], case: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(average, "BUCKET_BYTES", BUCKET_BYTES)
    config = load(*command(*case))
    expected = traffic(settings.build(config), config, 2)
    found = counted[CASES.index(case)]
    for kind in (SUM, GATHER):
        own = [size for name, size in found if KINDS[name] == kind]
        assert sum(own) == COUNTED * sum(one.bytes for one in expected if one.kind == kind)
        assert len(own) == COUNTED * sum(one.calls for one in expected if one.kind == kind)
