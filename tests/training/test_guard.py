"""Which steps are skipped, compared with a plain computation on the whole history."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import Start
from tests.nn.triton_kernels import compile_for, interpret
from vaescale.training.guard import (
    MEMORY,
    NOT_FINITE,
    OVERFLOW,
    SPIKE,
    TAKEN,
    Guard,
    Skip,
    diagnosis,
    explained,
    too_many,
)

NO, YES = torch.tensor(False), torch.tensor(True)
INFINITE = torch.tensor(math.inf)


def guard(factor: float = 10.0) -> Guard:
    return Guard(factor, torch.device("cpu"))


def judge(guard: Guard, norms: list[float], excused: torch.Tensor = NO) -> list[int]:
    given = [torch.tensor(norm) for norm in norms]
    return [int(guard.judge(norm, excused).record[0]) for norm in given]


def moments(taken: list[float]) -> tuple[float, float]:
    """Mean and variance of log ‖g‖ with each step's weight written out: the last one has 1/MEMORY, each one before it
    that of the next times 1 − 1/MEMORY, and the first MEMORY of them alike."""
    later = np.arange(len(taken))[::-1].clip(max=max(0, len(taken) - MEMORY))
    weights = (1 - 1 / MEMORY) ** later
    mean = np.average(np.log(taken), weights=weights)
    return mean, np.average(np.square(np.log(taken) - mean), weights=weights)


@pytest.mark.parametrize("deviation", [0.1, 1.0])
def test_the_limit_is_that_of_the_whole_history(deviation: float) -> None:
    """In a calm run the factor decides, in a noisy one the standard deviations. Skipped steps leave no trace."""
    generator = np.random.default_rng(0)
    watched = guard()
    taken: list[float] = []
    refused = 0
    for step, norm in enumerate(generator.lognormal(0.7, deviation, 400).tolist()):
        given = {40: math.nan, 41: math.inf, 130: 0.0, 200: 3000.0, 201: math.nan, 320: 2e4}.get(step, norm)
        limit = math.inf
        if len(taken) >= MEMORY:
            mean, variance = moments(taken)
            limit = math.exp(mean + max(math.log(10), 6 * math.sqrt(variance)))
            assert watched.limit() == pytest.approx(limit, rel=1e-4)
            assert math.exp(watched.state()["mean"]) == pytest.approx(math.exp(mean), rel=1e-5)
        expected = NOT_FINITE if not math.isfinite(given) else SPIKE if given > limit else TAKEN
        assert judge(watched, [given]) == [expected], step
        refused += expected != TAKEN
        if expected == TAKEN and given:
            taken.append(given)
    assert refused == 5


def test_nothing_is_a_spike_until_enough_steps_were_taken() -> None:
    watched = guard()
    assert judge(watched, [1.0] * (MEMORY - 1)) == [TAKEN] * (MEMORY - 1)
    assert judge(watched, [1000.0, 1e6]) == [TAKEN, SPIKE]


def test_without_a_factor_only_what_is_not_finite_is_refused() -> None:
    watched = guard(0)
    judge(watched, [1.0] * 200)
    assert judge(watched, [1e30, math.inf]) == [TAKEN, NOT_FINITE]


def test_a_lasting_change_is_refused_as_long_as_it_lasts_and_counted() -> None:
    """So `patience` ends the run: a lasting change never becomes the new normal unnoticed."""
    watched = guard()
    judge(watched, [1.0] * 150)
    assert judge(watched, [50.0] * 30) == [SPIKE] * 30
    assert watched.state()["run"] == 30
    assert judge(watched, [1.0]) == [TAKEN]
    assert watched.state()["run"] == 0


def test_rare_steps_do_not_keep_a_run_alive() -> None:
    """With one of twenty taken, twenty are never skipped in a row, but the run ends. One skip in twenty is fine."""
    for ends in (True, False):
        watched = guard()
        judge(watched, [1.0] * 150)
        stopped = None
        for step in range(1000):
            norm = torch.tensor(math.nan if (step % 20 > 0) == ends else 1.0)
            why, _, _, run, share = watched.judge(norm, NO).record.tolist()
            skip = Skip(step, int(why), math.nan, 1.0, int(run), share, [])
            if stopped is None and why != TAKEN and too_many(skip, 20):
                stopped = step
        assert watched.state()["run"] < 20
        assert (stopped is not None and stopped < 60) == ends
        if ends:
            assert "% of the last 100 steps were skipped" in diagnosis(skip, 1, 10.0)


def test_overflows_neither_count_as_steps_in_a_row_nor_end_a_row() -> None:
    watched = guard()
    assert judge(watched, [math.inf] * 3, YES) == [OVERFLOW] * 3
    assert watched.state()["run"] == 0
    assert not watched.judge(INFINITE, YES).spoilt
    assert judge(watched, [math.nan] * 2) == [NOT_FINITE] * 2
    assert judge(watched, [math.inf], YES) == [OVERFLOW]
    assert judge(watched, [math.nan]) == [NOT_FINITE]
    assert watched.state()["run"] == 3
    judge(watched, [1.0] * MEMORY, YES)
    assert judge(watched, [1e6], YES) == [SPIKE]  # finite: no overflow
    given = [(1.0, NO), (math.nan, NO), (1e6, NO), (math.inf, YES)]
    assert [bool(watched.judge(torch.tensor(norm), excused).spoilt) for norm, excused in given] == [0, 1, 1, 1]


def check_kernel(device: str) -> None:
    """The kernel judges as the operations on a CPU do, step by step, with all of its verdicts."""
    from vaescale.training.guard_triton import judge as kernel  # here, because TRITON_INTERPRET is read at its import

    generator = np.random.default_rng(2)
    for factor in (10.0, 0.0):
        watched = guard(factor)
        own, seen = watched.statistics.to(device), set()
        for step, norm in enumerate(generator.lognormal(0, 0.5, 160).tolist()):
            given = {3: math.inf, 30: math.nan, 31: 0.0, 120: 1e4, 121: math.inf, 150: math.inf}.get(step, norm)
            excused = torch.tensor(step in (3, 120, 150))
            before = own.cpu().clone()
            record, flags = kernel(own, torch.tensor(given, device=device), excused.to(device), watched.least)
            watched.statistics.copy_(before)  # so that roundings do not add up
            verdict = watched.judge(torch.tensor(given), excused)
            torch.testing.assert_close(own.cpu(), watched.statistics, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(record.cpu(), verdict.record, rtol=1e-5, atol=1e-6, equal_nan=True)
            assert torch.equal(flags.cpu(), torch.stack(verdict[1:]))
            seen.add(int(record[0]))
        assert seen == {TAKEN, NOT_FINITE, OVERFLOW, *([SPIKE] if factor else [])}


def test_the_kernel_judges_alike_in_the_interpreter(start: Start) -> None:
    interpret(start, "from tests.training.test_guard import check_kernel; check_kernel('cpu')")


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("capability", [75, 80, 90])
def test_the_kernel_compiles(capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For T4, A100 and H100."""
    pytest.importorskip("triton")
    from vaescale.training import guard_triton as kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    floats, flags = ("statistics", "norm", "record"), ("excused", "flags")
    kinds = dict.fromkeys(floats, "*fp32") | dict.fromkeys(flags, "*i1") | {"least": "fp32"}
    assert ".entry _judge" in compile_for(kernel._judge, kinds, {}, capability).asm["ptx"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_the_kernel_judges_alike_on_a_gpu() -> None:
    check_kernel("cuda")


def test_a_guard_resumes_from_its_state_with_the_same_bits() -> None:
    norms = np.random.default_rng(1).lognormal(0, 0.5, 260).tolist()
    whole, first, second = guard(), guard(), guard()
    judge(whole, norms)
    judge(first, norms[:130])
    second.load(json.loads(json.dumps(first.state())))
    judge(second, norms[130:])
    assert second.state() == whole.state()


def test_the_diagnosis_says_why_and_what_to_do() -> None:
    """Two micro-batches per rank, so micro-batch 3 is the second of rank 1."""
    assert explained(Skip(7, NOT_FINITE, math.nan, 2.0, 1, 0.1, [3]), 2) == "the loss of rank 1 is not finite"
    assert (
        explained(Skip(7, NOT_FINITE, math.nan, 2.0, 1, 0.1, [0, 1, 5]), 2)
        == "the losses of ranks 0 and 2 are not finite"
    )
    assert (
        explained(Skip(7, NOT_FINITE, math.nan, 2.0, 1, 0.1, [0, 2, 5]), 2)
        == "the losses of ranks 0, 1 and 2 are not finite"
    )
    assert (
        explained(Skip(7, NOT_FINITE, math.inf, 2.0, 1, 0.1, []), 2)
        == "the gradient is not finite, though all losses are"
    )
    assert (
        explained(Skip(7, OVERFLOW, math.inf, 2.0, 1, 0.1, []), 2)
        == "the gradient overflowed, so the loss scale is lowered"
    )
    spike = diagnosis(Skip(142, SPIKE, 1234.5, 1.25, 20, 0.1, []), 2, 10.0)
    assert spike == (
        "20 steps in a row were skipped, up to step 143 (the gradient norm is 1.23e+03, usually 1.25); "
        "skipped steps do not change the weights: lower optimizer.lr or raise optimizer.warmup_steps, and look at "
        "the samples named above; if that does not help, continue from an older checkpoint; "
        "if such large gradients are expected, raise optimizer.spike=10 (0: no limit)"
    )
    text = diagnosis(Skip(142, NOT_FINITE, math.nan, 1.25, 20, 0.1, [0]), 1, 10.0)
    assert "step 143 (the loss of rank 0 is not finite; the usual gradient norm is 1.25); skipped steps" in text
    assert "optimizer.spike" not in text
    assert "usual" not in diagnosis(Skip(19, NOT_FINITE, math.nan, math.nan, 20, 0.1, [0]), 1, 10.0)
