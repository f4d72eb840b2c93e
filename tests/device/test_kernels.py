"""How many kernels a GPU is given where sizes decide it. On a CPU tiles are small, to stay in its cache."""

import pytest
import torch

from tests.device.kernels import Kernels
from tests.device.pretended import on, pretended
from vaescale.nn import nearest as module
from vaescale.nn.entropy import entropies
from vaescale.nn.nearest import nearest
from vaescale.nn.perceptual import drawn

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


def test_the_kernels_of_a_perceptual_distance_depend_on_its_trunk_alone() -> None:
    """243 at the time of writing, forward and backward; 13 convolutions and 13 ReLUs are run three times."""
    with pretended() as gpu, Kernels() as kernels:
        distance = drawn("perceptual_random")
        distance.tensors = {name: on(tensor, gpu) for name, tensor in distance.tensors.items()}
        kernels.launched.clear()
        x = torch.empty(4, 3, 64, 64, device=gpu, requires_grad=True)
        distance(x, torch.empty(4, 3, 64, 64, device=gpu)).mean().backward()
    assert kernels.total() <= 300
