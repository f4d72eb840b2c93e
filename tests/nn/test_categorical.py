import math

import numpy as np
import pytest
import torch

from vaescale.nn.categorical import UNIT, drawn, guided, nats, weights


def remaining(logits: np.ndarray, top_k: int, top_p: float) -> np.ndarray:
    """The probabilities that remain, in float64, one code after the other."""
    p = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    ranked = np.argsort(-p, kind="stable")[: top_k or len(p)]
    whole, kept, sum_ = p[ranked].sum(), np.zeros_like(p), 0.0
    for code in ranked:
        if sum_ >= top_p * whole:
            break
        kept[code] = p[code]
        sum_ += p[code]
    return kept / kept.sum()


@pytest.mark.parametrize("top_k", [0, 1, 3, 50])
@pytest.mark.parametrize("top_p", [1.0, 0.6, 1e-9])
def test_what_remains_is_that_of_a_loop(top_k: int, top_p: float) -> None:
    torch.manual_seed(0)
    logits = 2 * torch.randn(20, 9)
    found = weights(logits, top_k, top_p).double()
    found = found / found.sum(-1, keepdim=True)
    expected = np.stack([remaining(row, top_k, top_p) for row in logits.double().numpy()])
    assert np.abs(found.numpy() - expected).max() < 1e-6


def test_top_k_keeps_k_codes_also_of_equal_ones() -> None:
    assert (weights(torch.zeros(4, 7), 3, 1.0) > 0).sum(-1).tolist() == [3] * 4


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.6, 0, 1.0), (1.0, 3, 1.0), (1.3, 4, 0.7)]
)
def test_draws_have_their_frequencies(temperature: float, top_k: int, top_p: float) -> None:
    """χ² of 40,000 draws at evenly spread numbers, which come closer than random ones would."""
    torch.manual_seed(0)
    logits, count = 1.5 * torch.randn(6), 40_000
    uniform = (torch.arange(count).double() + 0.5) / count
    codes = drawn(logits.expand(count, -1), uniform, temperature, top_k, top_p)
    frequencies = torch.bincount(codes, minlength=6).double() / count
    expected = remaining(logits.double().numpy() / temperature, top_k, top_p)
    assert np.abs(frequencies.numpy() - expected).max() < 2 / count


def test_the_ends_of_the_unit_interval_draw_codes_that_have_a_probability() -> None:
    logits = torch.tensor([[-math.inf, 0.0, -200.0, 0.0, -math.inf]]).expand(2, -1)
    assert drawn(logits, torch.tensor([2.0**-54, 1.0]).double()).tolist() == [1, 3]


def test_temperature_0_takes_the_most_probable_code() -> None:
    logits = torch.randn(50, 8)
    assert torch.equal(drawn(logits, torch.rand(50).double(), 0.0, top_k=2), logits.argmax(-1))


def test_many_codes_keep_their_probability() -> None:
    counts = weights(torch.randn(1, 2**16), 0, 1.0)
    assert float(counts.sum()) / UNIT == pytest.approx(1, abs=1e-5)
    assert (counts > 0).all()


def test_nats_are_those_of_torch() -> None:
    logits, codes = torch.randn(3, 4, 7), torch.randint(7, (3, 4))
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), codes.flatten(), reduction="none")
    torch.testing.assert_close(nats(logits, codes).flatten(), expected)
    assert nats(logits.bfloat16(), codes).dtype == torch.float32


def test_guidance_0_and_1_are_the_two_sides() -> None:
    logits = torch.randn(6, 5)
    torch.testing.assert_close(guided(logits, 1.0), logits[:3])
    torch.testing.assert_close(guided(logits, 0.0), logits[3:])
    torch.testing.assert_close(guided(logits, 2.0), 2 * logits[:3] - logits[3:])
