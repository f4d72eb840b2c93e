from typing import Any

import pytest
import torch
from torch import Tensor

from tests.nn.memory import MIB, growth
from vaescale.nn import nearest as module
from vaescale.nn.nearest import centre, nearest


@pytest.mark.parametrize(
    ("rows", "codes", "dim"),
    [(1, 1, 1), (3, 5, 2), (513, 512, 64), (1000, 4097, 8), (700, 5000, 16), (2049, 4096, 3), (600, 8191, 300)],
)
def test_agrees_with_brute_force_in_float64(rows: int, codes: int, dim: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    z, codebook = torch.randn(rows, dim, generator=generator), torch.randn(codes, dim, generator=generator)
    exact = torch.cdist(z.double(), codebook.double(), compute_mode="donot_use_mm_for_euclid_dist").square()
    found = nearest(z, codebook)
    distance = exact.gather(1, found[:, None]).squeeze(1)
    # Another code only where the two distances differ by less than fp32 can tell.
    assert (distance - exact.min(1).values).max() < 1e-6 * exact.max()
    assert (found == exact.argmin(1)).float().mean() > 0.999


FAR = {
    "no channel": torch.zeros(8),
    "every channel": torch.full((8,), 1000.0),
    "the other side": torch.full((8,), -1000.0),
    "one channel": 1000.0 * (torch.arange(8) == 3),
    "each channel another": 1000.0 * torch.arange(-4.0, 4.0),
}


@pytest.mark.parametrize("far", FAR)
@pytest.mark.parametrize("codes", [1, 2, 512, 5000])
@pytest.mark.parametrize("dead", [0.0, 0.3, 0.9])
def test_rows_and_codes_far_from_the_origin_keep_their_nearest(far: str, codes: int, dead: float) -> None:
    """A thousand times their spread, where ‖e‖² and z·e round by as much as distances differ; dead codes are left where
    training began."""
    generator = torch.Generator().manual_seed(codes)
    z, codebook = torch.randn(700, 8, generator=generator), torch.randn(codes, 8, generator=generator)
    offset = FAR[far]
    z, codebook = z + offset, codebook + offset
    codebook[: int(dead * codes)] = 0.0
    exact = torch.cdist(z.double(), codebook.double(), compute_mode="donot_use_mm_for_euclid_dist")
    found = nearest(z, codebook)
    assert (exact.gather(1, found[:, None]).squeeze(1) - exact.min(1).values).max() < 1e-4
    assert (found == exact.argmin(1)).float().mean() > 0.995


def test_most_codes_far_away_do_not_blur_the_others() -> None:
    """Dead ones, and all of a codebook that was never placed."""
    generator = torch.Generator().manual_seed(0)
    z, codebook = torch.randn(700, 8, generator=generator), torch.randn(500, 8, generator=generator)
    codebook[50:] += 1000.0
    for rows, codes in ((z, codebook), (z + 1000, torch.rand(500, 8, generator=generator) / 500)):
        exact = torch.cdist(rows.double(), codes.double(), compute_mode="donot_use_mm_for_euclid_dist")
        assert (nearest(rows, codes) == exact.argmin(1)).float().mean() > 0.995


def test_a_codebook_around_the_origin_is_not_moved() -> None:
    assert not centre(torch.randn(900, 64), torch.randn(512, 64)).any()
    assert torch.equal(centre(torch.randn(9, 2), torch.full((3, 2), 70.3)), torch.full((2,), 70.3))


@pytest.mark.parametrize("codes", [5, 100, 2 * module.CPU.columns + 7])
def test_ties_go_to_the_lowest_index(codes: int) -> None:
    """Every code occurs again, in its own block, in another one and in another tile."""
    half = torch.randn(-(-codes // 2), 4)
    for codebook in (half.repeat_interleave(2, 0)[:codes], half.repeat(2, 1)[:codes]):
        places = [(codebook == row).all(1).nonzero()[0] for row in half]
        assert torch.equal(nearest(half, codebook), torch.cat(places))


def test_holds_no_matrix_of_rows_times_codes() -> None:
    """4 GiB would be needed for it."""
    z, codebook = torch.randn(4096, 4), torch.randn(262144, 4)
    nearest(z[:100], codebook[:100])  # what is done once
    assert growth(lambda: nearest(z, codebook)) <= 64 * MIB
    # The same measure sees a matrix of 256 MiB.
    assert growth(lambda: torch.cdist(z, codebook[:16384]).argmin(1)) >= 250 * MIB


def test_many_rows_take_no_memory_either() -> None:
    z, codebook = torch.randn(2**20, 4), torch.randn(2, 4)
    codes = 8 * len(z)  # the result itself
    assert growth(lambda: nearest(z, codebook)) <= codes + 64 * MIB


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_products_are_fp32_whatever_is_allowed(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """TF32 and bf16 are only used on hardware that has them; so look at what is allowed during the product."""
    seen: list[str] = []
    addmm = torch.addmm

    def allowed() -> tuple[str, str]:
        return torch.backends.mkldnn.matmul.fp32_precision, torch.get_float32_matmul_precision()

    def watched(*arguments: Any, **others: Any) -> Tensor:
        seen.append(torch.backends.mkldnn.matmul.fp32_precision)
        return addmm(*arguments, **others)

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    monkeypatch.setattr(torch, "addmm", watched)
    try:
        outside = allowed()
        nearest(torch.randn(10, 4), torch.randn(20, 4))
        assert seen == ["ieee"]
        assert allowed() == outside
        assert outside[1] == precision
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_nan_gives_a_code_and_not_a_crash() -> None:
    z = torch.randn(6, 2)
    z[0], z[1, 0], z[2, 0], z[3] = torch.nan, torch.nan, torch.inf, -torch.inf
    codebook = torch.randn(5, 2)
    codes = nearest(z, codebook)
    assert ((codes >= 0) & (codes < 5)).all()
    assert torch.equal(codes[4:], torch.cdist(z[4:], codebook).argmin(1))  # the other rows are unharmed
    codebook[3] = torch.nan
    assert ((nearest(z, codebook) >= 0) & (nearest(z, codebook) < 5)).all()


def test_no_rows_have_no_codes() -> None:
    assert nearest(torch.empty(0, 3), torch.randn(5, 3)).shape == (0,)
