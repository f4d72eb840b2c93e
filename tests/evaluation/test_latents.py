from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from tests.conftest import Start, finish, ranks
from vaescale.evaluation.latents import Moments


def test_moments_are_numpys_over_levels_and_uneven_batches() -> None:
    generator = torch.Generator().manual_seed(0)
    coarse, fine = torch.randn(20, 3, generator=generator), 5 + 2 * torch.randn(20, 2, 4, 4, generator=generator)
    coarse[:, 1] = 7  # says nothing
    moments = Moments(torch.device("cpu"))
    for part in (slice(0, 9), slice(9, 18), slice(18, 20)):
        moments.add([coarse[part], fine[part]])
    mean, variance = moments.result()
    row = np.concatenate([coarse.numpy(), fine.numpy().reshape(20, -1)], 1).astype(np.float64)
    np.testing.assert_allclose(mean, row.mean(0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(variance, row.var(0), rtol=1e-12, atol=1e-12)
    assert variance[1] == 0


SCRIPT = """
import sys, torch
from safetensors.torch import save_file
from vaescale import distributed
from vaescale.evaluation.latents import Moments
distributed.init()
moments = Moments(torch.device("cpu"))
values = torch.arange(12.0).view(6, 2).square()
for part in values.split(2)[: distributed.rank() * 2]:  # rank 0: none; rank 1: four images; rank 2: all six
    moments.add([part])
mean, variance = moments.result()
save_file({"mean": mean, "variance": variance}, f"{sys.argv[1]}/{distributed.rank()}")
distributed.finish()
"""


def test_moments_are_those_of_all_ranks_even_if_one_has_no_image(tmp_path: Path, start: Start) -> None:
    (tmp_path / "rank.py").write_text(SCRIPT)
    for process in ranks(start, 3, [str(tmp_path / "rank.py"), str(tmp_path)]):
        code, output = finish(process)
        assert code == 0, output
    values = np.arange(12.0).reshape(6, 2) ** 2
    joined = np.concatenate([values[:4], values])
    for rank in range(3):
        found = load_file(tmp_path / str(rank))
        np.testing.assert_allclose(found["mean"], joined.mean(0))
        np.testing.assert_allclose(found["variance"], joined.var(0))
