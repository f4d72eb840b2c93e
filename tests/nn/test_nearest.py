import pytest
import torch

from vaescale.nn import nearest as module
from vaescale.nn.nearest import nearest


@pytest.mark.parametrize(
    ("rows", "codes", "dim"),
    [(1, 1, 1), (3, 5, 2), (513, 512, 64), (1000, 2049, 8), (700, 5000, 16), (2048, 4096, 3)],
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


def test_ties_go_to_the_lowest_index() -> None:
    """Equal codes within a tile and across the border between two."""
    codebook = torch.randn(2 * module.COLUMNS + 7, 4)
    for first, second in ((5, 9), (3, module.COLUMNS + 3), (module.COLUMNS - 1, 2 * module.COLUMNS)):
        codebook[second] = codebook[first]
        assert nearest(codebook[[second]], codebook).item() == first


def test_holds_no_matrix_of_rows_times_codes() -> None:
    """The largest single allocation is one tile, where N×K would take 512 MiB."""
    rows, codes = 16384, 8192
    z, codebook = torch.randn(rows, 4), torch.randn(codes, 4)
    with torch.profiler.profile(profile_memory=True, record_shapes=True) as profile:
        nearest(z, codebook)
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest <= 2 * module.ROWS * module.COLUMNS * 4


def test_a_nan_gives_a_code_and_not_a_crash() -> None:
    codes = nearest(torch.full((3, 2), float("nan")), torch.randn(5, 2))
    assert ((codes >= 0) & (codes < 5)).all()
