import numpy as np
import pytest
import torch

from vaescale.evaluation import feature_statistics
from vaescale.evaluation.feature_statistics import Gatherer, Statistics, factor, spaced


def gathered(x: torch.Tensor, logits: torch.Tensor | None = None, micro: int = 7) -> Statistics:
    """Statistics of rows x [N, D] that come in batches, in another order."""
    gatherer = Gatherer(len(x), x.shape[1], 0 if logits is None else logits.shape[1], x.device)
    for numbers in torch.arange(len(x)).flip(0).split(micro):
        gatherer.add(numbers, x[numbers], None if logits is None else logits[numbers])
    return gatherer.result()


@pytest.mark.parametrize("kept", [1000, 16])
def test_moments_are_numpys(monkeypatch: pytest.MonkeyPatch, kept: int) -> None:
    """Whether all rows are kept or not, although the mean is large next to the deviation."""
    monkeypatch.setattr(feature_statistics, "KEPT", kept)
    x = torch.randn(101, 5, generator=torch.Generator().manual_seed(0)) + 100
    found = gathered(x)
    assert found.count == 101
    assert found.mean.numpy() == pytest.approx(x.double().mean(0).numpy(), rel=1e-14)
    assert found.covariance.numpy() == pytest.approx(np.cov(x.double().numpy().T), rel=1e-9)


@pytest.mark.parametrize(("count", "kept"), [(101, 16), (16, 16), (5, 16), (17, 16), (1000, 7)])
def test_kept_rows_are_evenly_spaced_and_in_sample_order(
    monkeypatch: pytest.MonkeyPatch, count: int, kept: int
) -> None:
    monkeypatch.setattr(feature_statistics, "KEPT", kept)
    found = gathered(torch.arange(count)[:, None].float()).rows[:, 0].long().tolist()
    most = min(count, kept)
    assert found == [k * count // most for k in range(most)]
    steps = set(np.diff(found).tolist())
    assert max(steps) - min(steps) <= 1


def test_the_splits_of_the_classes_are_in_sample_order() -> None:
    logits = torch.randn(23, 4, generator=torch.Generator().manual_seed(0))
    found = gathered(torch.zeros(23, 1), logits).classes
    assert found is not None
    assert found[:, -1].sum() == 23
    for split, sums in enumerate(found):
        mine = [number for number in range(23) if number * 10 // 23 == split]
        shares = torch.softmax(logits[mine].double(), 1)
        assert sums[:4].numpy() == pytest.approx(shares.sum(0).numpy(), rel=1e-12)
        assert float(sums[4]) == pytest.approx(float((shares * shares.log()).sum()), rel=1e-12)


@pytest.mark.parametrize(("count", "kept"), [(5, 100), (50, 100), (50, 8)])
def test_a_factor_is_a_root_of_the_covariance(monkeypatch: pytest.MonkeyPatch, count: int, kept: int) -> None:
    monkeypatch.setattr(feature_statistics, "KEPT", kept)
    found = gathered(torch.randn(count, 9, generator=torch.Generator().manual_seed(0)))
    a = factor(found)
    assert len(a) <= 9
    assert (a.T @ a).numpy() == pytest.approx(found.covariance.numpy(), abs=1e-12)


@pytest.mark.parametrize(("count", "kept"), [(1, 1), (7, 7), (10, 3), (11, 4), (50_000, 2000), (101, 100)])
def test_evenly_spaced_places_are_those_of_the_formula(count: int, kept: int) -> None:
    chosen = [place * count // kept for place in range(kept)]
    expected = torch.full((count,), kept)
    expected[chosen] = torch.arange(kept)
    assert torch.equal(spaced(torch.arange(count), count, kept), expected)
