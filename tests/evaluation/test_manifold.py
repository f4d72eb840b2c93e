import numpy as np
import pytest
import torch

from vaescale.evaluation.metrics import manifold as module
from vaescale.evaluation.metrics.manifold import DENSITY_K, PRECISION_K, manifold


def brute(x: np.ndarray, y: np.ndarray) -> dict[str, float]:
    """With whole matrices of distances, in float64."""
    xx, yy, xy = (np.linalg.norm(a[:, None] - b[None], axis=-1) for a, b in ((x, x), (y, y), (x, y)))
    near_x, near_y = (np.sort(one, axis=1) for one in (xx, yy))  # column 0 is the image itself
    inside = xy <= near_x[:, DENSITY_K, None]
    return {
        "precision": (xy <= near_x[:, PRECISION_K, None]).any(0).mean(),
        "recall": (xy <= near_y[None, :, PRECISION_K]).any(1).mean(),
        "density": inside.sum() / (DENSITY_K * len(y)),
        "coverage": inside.any(1).mean(),
    }


@pytest.mark.parametrize("tile", [1000, 16])
def test_the_numbers_are_those_of_brute_force(monkeypatch: pytest.MonkeyPatch, tile: int) -> None:
    monkeypatch.setattr(module, "ROWS", tile)
    monkeypatch.setattr(module, "COLUMNS", 2 * tile + 3)
    generator = np.random.default_rng(0)
    x = generator.normal(size=(90, 6)).astype(np.float32) + 50
    y = 0.9 * generator.normal(size=(130, 6)).astype(np.float32) + 50.5
    found = manifold(torch.from_numpy(x), torch.from_numpy(y))
    assert found == pytest.approx(brute(x.astype(np.float64), y.astype(np.float64)), abs=1e-12)
    assert 0.2 < found["recall"] < found["precision"] < 1


def normal(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))


def test_collapse_to_one_mode_is_precise_and_covers_little() -> None:
    centres = 40 * torch.eye(8)
    reference = torch.cat([centre + normal(50, seed) for seed, centre in enumerate(centres)])
    found = manifold(reference, centres[0] + 0.3 * normal(200, 99))
    assert found["precision"] == 1
    assert found["recall"] < 0.1
    assert found["density"] > 1
    assert found["coverage"] <= 1 / 8


def test_noise_around_all_modes_is_imprecise_and_recalls_them() -> None:
    found = manifold(normal(300, 0), 4 * normal(300, 1))
    assert found["precision"] < 0.1
    assert found["recall"] > 0.9
    assert found["density"] < 0.1


def test_too_few_images_are_refused() -> None:
    with pytest.raises(ValueError, match="more than 5 images"):
        manifold(normal(5, 0), normal(100, 1))
