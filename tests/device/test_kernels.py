"""How many kernels a GPU is given where sizes decide it. On a CPU tiles are small, to stay in its cache."""

import pytest
import torch

from tests.device.kernels import Kernels
from tests.device.pretended import pretended
from vaescale.nn import nearest as module
from vaescale.nn.entropy import entropies
from vaescale.nn.nearest import nearest

N = K = 16384


def test_an_entropy_loss_takes_few_large_tiles() -> None:
    """336 kernels at the time of writing; with the tiles of a CPU they were 8189."""
    with pretended() as gpu, Kernels() as kernels:
        z = torch.empty(N, 8, device=gpu, requires_grad=True)
        codebook = torch.empty(K, 8, device=gpu, requires_grad=True)
        sure, varied = entropies(z, codebook, 0.1)
        (sure - varied).backward()
    assert kernels.total() <= 350


@pytest.mark.parametrize(("rows", "codes"), [(8192, 512), (N, K), (2**18, 8192)])
def test_a_search_is_one_kernel_and_those_of_its_centre(rows: int, codes: int) -> None:
    with pretended() as gpu, Kernels() as kernels:
        found = nearest(torch.empty(rows, 8, device=gpu), torch.empty(codes, 8, device=gpu))
    assert found.shape == (rows,)
    assert kernels.launched["vaescale::nearest"] == 1
    assert kernels.total() <= 20


def test_a_search_without_triton_takes_few_large_tiles() -> None:
    with pretended() as gpu, Kernels() as kernels:
        z, codebook = torch.empty(N, 8, device=gpu), torch.empty(K, 8, device=gpu)
        module._tiled(z, codebook, codebook[0], torch.empty(K, device=gpu))
    assert kernels.total() <= 150
