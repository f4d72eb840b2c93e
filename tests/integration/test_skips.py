"""Skipped steps, on real ranks under real DeepSpeed."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.conftest import Start, finish, ranks
from tests.integration.conftest import BATCH, SEED, TINY, Case, forked, overrides
from tests.integration.test_resume import TRAIN, rewind, same_bits
from vaescale.data.order import Order
from vaescale.data.stream import Samples

CASES = [Case(2, precision, zero) for precision in ("fp32", "bf16", "fp16") for zero in (0, 1, 2)]
TWINS = [Case(2), Case(2, zero=2), Case(2, "fp16", 1)]
SPLIT = Case(2, zero=1, accumulation=3)
STEPS, NAN, SETTLED = 16, 7, 11


def spike(case: Case) -> int:
    """The step of the spike. In fp16 it is the last step, because a gradient a thousand times as large overflows, and
    the new loss scale would change the rounding of later steps."""
    return STEPS - 1 if case.precision == "fp16" else STEPS - 3


def job(case: Case, out: Path, pictures: Path, *given: str, **more: Any) -> dict[str, Any]:
    return {
        "task": "train",
        "world": case.world,
        "out": str(out),
        "config": str(TINY),
        "overrides": [*overrides(case, out / "run", pictures), *given],
        **more,
    }


def twin(folder: Path, case: Case) -> Path:
    return folder / f"{case.name}-twin"


@pytest.fixture(scope="module")
def skipped(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each case with a NaN image on rank 1 and a spike on rank 0; twins of some cases, whose learner does not run those
    steps; and a run with accumulation that has NaN images before and after its checkpoint of step 8."""
    folder = tmp_path_factory.mktemp("skipped")
    jobs = []
    for case in CASES:
        given = [f"steps={STEPS}", "every.validate=1000", "every.checkpoint=1000"]
        faults = [["nan", 1, [NAN]], ["spike", 0, [spike(case)]]]
        jobs.append(job(case, folder / case.name, pictures, *given, settled=SETTLED, broken=faults))
        if case in TWINS:
            omitted = [NAN, spike(case)]
            jobs.append(job(case, twin(folder, case), pictures, *given, settled=SETTLED, omitted=omitted))
    jobs.append(job(SPLIT, folder / SPLIT.name, pictures, "every.report=12", broken=[["nan", 1, [6, 7, 8, 10], [1]]]))
    forked(folder, jobs)
    return folder


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_fault_on_one_rank_reaches_nothing_on_any(skipped: Path, case: Case) -> None:
    for name in ("model", "ema", "optimizer"):
        for key, value in load_file(saved(skipped / case.name) / f"{name}.safetensors").items():
            # the error is measured for the averaged weights only
            assert value.double().isfinite().all() or (name, key) == ("model", "error_std"), key
    ranks = [(skipped / case.name / f"rank-{rank}.safetensors").read_bytes() for rank in (0, 1)]
    assert ranks[0] == ranks[1]


@pytest.mark.parametrize("case", TWINS, ids=lambda case: case.name)
def test_a_skipped_step_leaves_no_trace(skipped: Path, case: Case) -> None:
    """Weights, codebook, moments and averages have the same bits as the twin that never ran those steps."""
    one, other = saved(skipped / case.name), saved(twin(skipped, case))
    for name in ("model", "ema", "optimizer"):
        file = f"{name}.safetensors"
        assert (one / file).read_bytes() == (other / file).read_bytes(), name
    states = [json.loads((path / "state.json").read_text()) for path in (one, other)]
    shares = [state["gradient_norms"].pop("share") for state in states]
    assert shares[0] > shares[1] == 0  # only this records that steps were skipped
    assert states[0]["gradient_norms"] == states[1]["gradient_norms"]
    counts = states[1]["skipped"]
    counts["not finite"] += 1
    counts["overflow" if case.precision == "fp16" else "spike"] += 1
    assert states[0]["skipped"] == counts


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_log_names_the_step_the_reason_and_the_samples(skipped: Path, pictures: Path, case: Case) -> None:
    """For a loss that is not finite the samples are those of its rank, for a spike those of all. All ranks log the
    same."""
    *overflows, nan, large = skips(skipped / case.name)
    assert skips(skipped / case.name, rank=1) == [*overflows, nan, large]
    assert bool(overflows) == (case.precision == "fp16")
    theirs = ", ".join(keys(pictures, NAN * BATCH + np.arange(BATCH // 2, BATCH)))
    assert nan == f"step {NAN + 1} skipped: the loss of rank 1 is not finite; its samples: {theirs}"
    eight = ", ".join(keys(pictures, spike(case) * BATCH + np.arange(8)))
    found = re.fullmatch(rf"step {spike(case) + 1} skipped: (.*); its samples: {eight} and 4 more", large)
    assert found
    if case.precision == "fp16":
        assert found[1] == "the gradient overflowed, so the loss scale is lowered"
    else:
        norms = re.fullmatch(r"the gradient norm is (\S+), usually (\S+)", found[1])
        assert norms
        assert float(norms[1]) > 100 * float(norms[2])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_board_counts_what_was_skipped(skipped: Path, case: Case) -> None:
    events = EventAccumulator(str(skipped / case.name / "run" / "tensorboard")).Reload()

    def curve(name: str) -> dict[int, float]:
        return {event.step: event.value for event in events.Scalars(f"optim/{name}")}

    said = [int(line.split()[1]) for line in skips(skipped / case.name)]
    assert [step for step, share in curve("skipped").items() if share] == said
    last = spike(case) + 1
    assert curve("skipped_not_finite") == {step: float(step > NAN) for step in range(1, STEPS + 1)}
    spikes = {step: float(step >= last and case.precision != "fp16") for step in range(1, STEPS + 1)}
    assert curve("skipped_spike") == spikes
    overflows = [step for step in said if step != NAN + 1 and (case.precision == "fp16" or step != last)]
    assert curve("skipped_overflow")[STEPS] == len(overflows)
    limits, norms = curve("norm_limit"), curve("gradient_norm")
    assert list(limits) == list(range(SETTLED + 1, STEPS + 1))
    assert all(limit > 5 * norms[step] for step, limit in limits.items())


def test_a_run_resumed_between_skipped_steps_ends_in_the_same_bits(
    skipped: Path, pictures: Path, tmp_path: Path
) -> None:
    """The count of consecutive skipped steps continues across the checkpoint, and no log line is lost."""
    whole = skipped / SPLIT.name
    said = skips(whole)
    assert len(said) == 4
    micro = keys(pictures, 6 * BATCH + np.arange(8, 10))  # rank 1 has samples 6 to 11, two per micro-batch
    assert said[0] == f"step 7 skipped: the loss of rank 1 is not finite; its samples: {', '.join(micro)}"
    state = json.loads((whole / "run" / "checkpoints" / "step-00000008" / "state.json").read_text())
    assert state["gradient_norms"]["run"] == 2
    assert state["skipped"]["not finite"] == 2

    rewind(whole / "run", tmp_path / "again" / "run")
    again = job(SPLIT, tmp_path / "again", pictures, "every.report=12", broken=[["nan", 1, [6, 7, 8, 10], [1]]])
    forked(tmp_path, [again])
    same_bits(tmp_path / "again" / "run", whole / "run")
    assert skips(tmp_path / "again") == said[2:]


def test_a_run_that_diverges_stops_with_3_and_a_diagnosis(pictures: Path, tmp_path: Path, start: Start) -> None:
    """A real divergence: the first step of this size moves the weights so far that no loss is finite."""
    given = ["optimizer.lr=1e30", "every.report=10", "every.checkpoint=10", "every.validate=1000", "steps=60"]
    command = [*TRAIN, *overrides(Case(2), tmp_path / "run", pictures), *given]
    outputs = []
    for process in ranks(start, 2, command):
        code, output = finish(process)
        assert code == 3, output
        assert "Traceback" not in output
        outputs.append(output)
    assert outputs[0].count(" skipped: ") == 20
    assert re.search(
        r"error: rank 0: 20 steps in a row were skipped, up to step \d+ \(the losses of ranks 0 and 1 are not finite; "
        r"the usual gradient norm is .*lower optimizer\.lr",
        outputs[0],
    )
    assert outputs[1].count("error") == 0


def saved(out: Path) -> Path:
    return out / "run" / "checkpoints" / f"step-{STEPS:08d}"


def skips(out: Path, rank: int = 0) -> list[str]:
    lines = (out / f"rank-{rank}.txt").read_text().splitlines()
    return [line for line in lines if " skipped: " in line]


def keys(pictures: Path, g: np.ndarray) -> list[str]:
    samples = Samples(pictures / "train")
    order = Order(samples.index.sizes, columns=8, seed=SEED)
    return [samples.name(sample)[1] for sample in order(g).tolist()]
