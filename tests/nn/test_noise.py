"""Noise that depends only on the seed and the sample number."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import Start
from tests.nn.triton_kernels import compile_for, interpret
from vaescale.data import order
from vaescale.nn import noise


def test_the_hash_is_that_of_the_data_order() -> None:
    g = np.array([0, 1, 7, 2**40, 2**62])
    words = noise.mix(3, 1, torch.from_numpy(g)[:, None], torch.arange(9)).numpy()
    assert np.array_equal(words.view(np.uint64), order.mix(3, 1, g[:, None], np.arange(9)))


def test_a_sample_draws_the_same_in_any_batch() -> None:
    together = noise.normal(torch.arange(100, 112), (3, 4), 5, 0)
    for part in (slice(0, 1), slice(4, 12), slice(11, 12)):
        torch.testing.assert_close(noise.normal(torch.arange(100, 112)[part], (3, 4), 5, 0), together[part])


def test_it_is_normal_and_independent_over_samples_places_and_keys() -> None:
    stats = pytest.importorskip("scipy.stats")
    draws = torch.stack([noise.normal(torch.arange(2000), (8,), seed, key) for seed in (0, 1) for key in (0, 1)])
    assert stats.kstest(draws.flatten().numpy(), "norm").pvalue > 1e-3
    columns = draws.permute(0, 2, 1).reshape(32, 2000)
    correlations = torch.corrcoef(torch.cat([columns[:, 1:], columns[:, :-1]])) - torch.eye(64)
    assert correlations.abs().max() < 5.5 / 2000**0.5  # 2016 pairs of independent numbers stay below 4.5 of 1/√n


def reference(sample: np.ndarray, count: int, *keys: int) -> np.ndarray:
    """Box–Muller of the hash's halves in float64."""
    pairs = -(-count // 2)
    words = order.mix(*keys, sample[:, None], np.arange(pairs))
    radius = np.sqrt(-2 * np.log(((words >> np.uint64(32)) + 0.5) / 2**32))
    angle = 2 * np.pi * ((words & np.uint64(2**32 - 1)) / 2**32)
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], 1)[:, :count]


SAMPLES = np.array([0, 1, 7, 2**40, 2**62])


@pytest.mark.parametrize("size", [(), (1,), (7,), (5, 4, 4)])
def test_it_is_box_muller_in_float64(size: tuple[int, ...]) -> None:
    drawn = noise.normal(torch.from_numpy(SAMPLES), size, 3, 0, 2)
    assert drawn.shape == (5, *size)
    wanted = reference(SAMPLES, drawn[0].numel(), 3, 0, 2)
    assert np.abs(drawn.numpy().reshape(5, -1) - wanted).max() < 5e-6  # the fp32 angle is off by up to 6e-7, times 6.8


def test_a_begun_run_keeps_its_noise() -> None:
    special = pytest.importorskip("scipy.special")
    drawn = noise.normal(torch.from_numpy(SAMPLES), (40,), 3, 1, version=1)
    words = order.mix(3, 1, SAMPLES[:, None], np.arange(40))
    quantiles = special.ndtri(((words >> np.uint64(11)) + 0.5) / 2**53)
    assert np.abs(drawn.numpy() - quantiles).max() < 1e-6


def test_both_numbers_of_a_word_are_independent_also_in_size() -> None:
    """And so are levels, draws and samples: correlations of the numbers and of their squares."""
    draws = [noise.normal(torch.arange(g, g + 400), (500,), 0, draw, level) for g, draw, level in
             [(0, 0, 0), (0, 0, 1), (0, 1, 0), (400, 0, 0)]]  # fmt: skip
    halves = torch.stack([half.flatten() for draw in draws for half in draw.chunk(2, dim=1)]).double()
    for powers in (halves, halves.square(), halves.abs()):
        correlations = torch.corrcoef(torch.cat([powers, powers.roll(1, 1)]))
        off = correlations - torch.eye(len(correlations))
        assert off.abs().max() < 5.5 / halves.shape[1] ** 0.5


def check_kernel(device: str) -> None:
    """The kernel's numbers are those of the operations on a CPU."""
    from vaescale.nn.noise_triton import normal  # here, because TRITON_INTERPRET is read at its import

    for count in (0, 1, 2, 7, 2048, 5000):
        kernel = normal(torch.from_numpy(SAMPLES).to(device), count, noise._mixed(3, 0, count)).cpu()
        assert kernel.shape == (5, count)
        torch.testing.assert_close(
            kernel, noise.normal(torch.from_numpy(SAMPLES), (count,), 3, 0, count), rtol=0, atol=1e-6
        )


def test_the_kernel_draws_the_same_in_the_interpreter(start: Start) -> None:
    interpret(start, "from tests.nn.test_noise import check_kernel; check_kernel('cpu')")


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("capability", [75, 80, 90])
def test_the_kernel_compiles(capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For T4, A100 and H100."""
    pytest.importorskip("triton")
    from vaescale.nn import noise_triton as kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kinds = {"sample": "*i64", "numbers": "*fp32", "state": "i64", "count": "i32", "pairs": "i32", "block": "constexpr"}
    assert ".entry _normal" in compile_for(kernel._normal, kinds, {"block": kernel.PAIRS}, capability).asm["ptx"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_the_kernel_draws_the_same_on_a_gpu() -> None:
    check_kernel("cuda")


def test_uniform_is_uniform_and_never_an_end() -> None:
    stats = pytest.importorskip("scipy.stats")
    draws = noise.uniform(torch.arange(50_000), (), 2, 1)
    assert draws.shape == (50_000,)
    assert 0 < draws.min() < draws.max() < 1
    assert stats.kstest(draws.numpy(), "uniform").pvalue > 1e-3


def test_dropout_keeps_its_share_independently_over_samples_places_and_keys() -> None:
    for share in (0.0, 0.1, 0.5):
        kept = torch.stack(
            [noise.kept(torch.arange(500), (6, 7), share, seed, key) for seed in (0, 1) for key in (0, 1)]
        )
        assert kept.dtype == torch.bool
        assert kept.shape == (4, 500, 6, 7)
        assert float(kept.double().mean()) == pytest.approx(1 - share, abs=4.5 * (share * (1 - share) / 84_000) ** 0.5)
    columns = kept.flatten(2).permute(0, 2, 1).reshape(168, 500).double()
    correlations = torch.corrcoef(torch.cat([columns[:, 1:], columns[:, :-1]])) - torch.eye(336)
    assert correlations.abs().max() < 6 / 500**0.5  # 56,280 pairs of independent numbers stay below 5.2 of 1/√n


def check_kept(device: str) -> None:
    """The kernel's choice is that of the operations on a CPU."""
    from vaescale.nn.noise_triton import kept  # here, because TRITON_INTERPRET is read at its import

    for count in (0, 1, 6, 4099):
        kernel = kept(torch.from_numpy(SAMPLES).to(device), count, noise._mixed(3, 0, count), 1234 - 2**15).cpu()
        assert torch.equal(kernel, noise.kept(torch.from_numpy(SAMPLES), (count,), 1234 / 2**16, 3, 0, count))


def test_the_kernel_of_dropout_chooses_the_same_in_the_interpreter(start: Start) -> None:
    interpret(start, "from tests.nn.test_noise import check_kept; check_kept('cpu')")


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("capability", [75, 90])
def test_the_kernel_of_dropout_compiles(capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from vaescale.nn import noise_triton as kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kinds = {"sample": "*i64", "chosen": "*i1", "state": "i64", "count": "i32", "least": "i32", "block": "constexpr"}
    assert ".entry _kept" in compile_for(kernel._kept, kinds, {"block": kernel.NUMBERS}, capability).asm["ptx"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_the_kernel_of_dropout_chooses_the_same_on_a_gpu() -> None:
    check_kept("cuda")
