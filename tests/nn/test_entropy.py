"""Entropies of soft codes against the dense formula, finite differences and a measure of memory."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.nn.memory import MIB, growth
from vaescale.nn import nearest
from vaescale.nn.entropy import entropies
from vaescale.nn.quantize import Config, SimVQ, VectorQuantizer


def dense(z: Tensor, codebook: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The definition, with all N×K distances, and by logarithms: the derivative of entr at 0 is none."""
    log_soft = (-(z[:, None] - codebook).square().sum(2) / temperature).log_softmax(1)
    log_mean = log_soft.logsumexp(0) - math.log(len(z))
    return -(log_soft.exp() * log_soft).sum(1).mean(), -(log_mean.exp() * log_mean).sum()


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nearest, "CPU", nearest.Tile(12, 4))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("of", [0, 1])
def test_gradients_are_finite_differences(of: int) -> None:
    torch.manual_seed(0)
    z = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    codebook = torch.randn(10, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z, codebook: entropies(z, codebook, 0.8)[of], (z, codebook))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("temperature", [5.0, 0.5, 0.01])
@pytest.mark.parametrize("cosine", [False, True])
def test_values_and_gradients_are_those_of_the_dense_formula(temperature: float, cosine: bool) -> None:
    torch.manual_seed(0)
    z, codebook = torch.randn(50, 6, dtype=torch.float64), torch.randn(33, 6, dtype=torch.float64)
    results = []
    for formula in (entropies, dense):
        leaves = [tensor.clone().requires_grad_() for tensor in (z, codebook)]
        points = [F.normalize(leaf, dim=1) if cosine else leaf for leaf in leaves]
        sure, varied = formula(*points, temperature)
        (1.3 * sure - 0.4 * varied).backward()
        results.append([sure.detach(), varied.detach(), *(leaf.grad for leaf in leaves)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def test_far_from_the_origin_they_are_what_they_were() -> None:
    """A thousand times the codes' spread, in fp32, against float64."""
    torch.manual_seed(0)
    z, codebook = torch.randn(50, 6) + 1000.0, torch.randn(33, 6) + 1000.0
    torch.testing.assert_close(
        torch.stack(entropies(z, codebook, 0.5)).double(),
        torch.stack(dense(z.double(), codebook.double(), 0.5)),
        rtol=1e-4,
        atol=1e-5,
    )


def test_fp32_over_whole_tiles() -> None:
    """5000 codes in two tiles of their full size against float64."""
    torch.manual_seed(0)
    z, codebook = torch.randn(600, 4), torch.randn(5000, 4)
    results = []
    for formula, kind in ((entropies, torch.float32), (dense, torch.float64)):
        leaves = [tensor.to(kind).requires_grad_() for tensor in (z.clone(), codebook.clone())]
        sure, varied = formula(*leaves, 0.1)
        (sure - varied).backward()
        results.append([sure.detach(), varied.detach(), *(leaf.grad for leaf in leaves)])
    for found, expected in zip(*results, strict=True):
        # Scores reach some 300, which fp32 rounds to 3e-5, as it does the logarithms of p; the gradients are sums of
        # p times 2 ‖e‖ / (τ N), 0.13 at most.
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


def test_extremes() -> None:
    codebook = torch.eye(16)
    sure, varied = entropies(torch.zeros(5, 16), codebook, 1.0)  # equally far from all codes
    assert float(sure) == pytest.approx(math.log(16))
    assert float(varied) == pytest.approx(math.log(16))
    sure, varied = entropies(codebook, codebook, 1e-3)  # each row on a code of its own
    assert float(sure) == pytest.approx(0, abs=1e-6)
    assert float(varied) == pytest.approx(math.log(16))
    z = codebook[:1].repeat(5, 1).requires_grad_()  # all on one code, the others' shares being 0 in fp32
    sure, varied = entropies(z, codebook, 1e-3)
    (sure - varied).backward()
    assert float(varied.detach()) == pytest.approx(0, abs=1e-6)
    assert z.grad is not None
    assert z.grad.isfinite().all()


def test_holds_no_matrix_of_rows_times_codes() -> None:
    """128 MiB would be needed for each, and the dense formula's backward needs several."""
    z, codebook = torch.randn(1024, 4, requires_grad=True), torch.randn(32768, 4, requires_grad=True)

    def both(rows: int) -> None:
        sure, varied = entropies(z[:rows], codebook, 0.1)
        (sure - varied).backward()

    both(1)  # what is done once, the gradients' memory among it
    assert growth(lambda: both(len(z))) <= 64 * MIB


def test_quantizers_add_the_entropy_loss() -> None:
    """Against the same quantiser without it; the gradient reaches SimVQ's map."""
    z = torch.randn(40, 6)
    for kind in (VectorQuantizer, SimVQ):
        torch.manual_seed(0)
        plain = kind(Config(codebook_size=20, dim=6))
        weighted = kind(Config(codebook_size=20, dim=6, entropy_weight=0.3, entropy_temperature=0.5))
        weighted.load_state_dict(plain.state_dict())
        leaves = [z.clone().requires_grad_() for _ in range(2)]
        codebook = plain._codebook() if isinstance(plain, SimVQ) else plain.codebook
        sure, varied = dense(leaves[0], codebook, 0.5)
        expected, found = plain(leaves[0]).loss + 0.3 * (sure - varied), weighted(leaves[1]).loss
        expected.backward()
        found.backward()
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(leaves[1].grad, leaves[0].grad)
        for a, b in zip(weighted.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad)


def test_entropy_spreads_collapsed_rows_over_the_codes() -> None:
    """Rows that crowd around one of 16 codes, moved by the gradient of the loss alone, come to use half of them."""
    torch.manual_seed(0)
    codebook = torch.randn(16, 2)
    z = (codebook[3] + 0.1 * torch.randn(256, 2)).requires_grad_()
    optimizer = torch.optim.Adam([z], lr=0.05)
    assert len(torch.cdist(z, codebook).argmin(1).unique()) <= 3
    for _ in range(200):
        sure, varied = entropies(z, codebook, 0.5)
        optimizer.zero_grad()
        (sure - varied).backward()
        optimizer.step()
    assert len(torch.cdist(z, codebook).argmin(1).unique()) >= 8
