"""Every kind of quantiser and how they combine, against brute force, float64 and scikit-learn."""

from itertools import product
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from torch.utils._python_dispatch import TorchDispatchMode

from tests.nn.test_quantize import batches
from vaescale import distributed
from vaescale.nn import quantize
from vaescale.nn.quantize import FSQ, LFQ, Config, SimVQ, VectorQuantizer, build
from vaescale.nn.quantizer import MOST, pass_through

DIM = 12
FSQ_LEVELS = [5, 4, 3]
KINDS = {
    "vq": Config(codebook_size=20, dim=DIM),
    "vq by gradient": Config(codebook_size=20, dim=DIM, learning="gradient"),
    "cosine": Config(codebook_size=20, dim=DIM, metric="cosine"),
    "k-means": Config(codebook_size=20, dim=DIM, init="kmeans"),
    "uniform": Config(codebook_size=20, dim=DIM, init="uniform"),
    "simvq": Config(kind="simvq", codebook_size=20, dim=DIM),
    "fsq": Config(kind="fsq", codebook_size=60, dim=DIM, levels=FSQ_LEVELS, codebook_dim=3),
    "fsq in groups": Config(kind="fsq", codebook_size=60, dim=DIM, levels=FSQ_LEVELS, codebook_dim=6, groups=2),
    "lfq": Config(kind="lfq", codebook_size=2**DIM, dim=DIM, entropy_weight=0.1),
    "lfq in groups": Config(kind="lfq", codebook_size=8, dim=DIM, codebook_dim=6, groups=2, entropy_weight=0.1),
    "vq with entropy": Config(codebook_size=20, dim=DIM, entropy_weight=0.1, entropy_temperature=2.0),
    "cosine with entropy": Config(codebook_size=20, dim=DIM, metric="cosine", entropy_weight=0.1),
    "simvq with entropy": Config(kind="simvq", codebook_size=20, dim=DIM, entropy_weight=0.1),
    "rotation": Config(codebook_size=20, dim=DIM, gradient="rotation"),
    "projected cosine": Config(codebook_size=20, dim=DIM, codebook_dim=4, metric="cosine"),
    "groups": Config(codebook_size=20, dim=DIM, groups=3),
    "residual": Config(codebook_size=20, dim=DIM, depth=3),
    "residual simvq": Config(kind="simvq", codebook_size=20, dim=DIM, depth=2),
    "groups of residuals": Config(codebook_size=20, dim=DIM, groups=2, depth=3, codebook_dim=8, metric="cosine"),
}


def trained(config: Config, steps: int = 6, micro_batches: int = 1, rows: int = 240) -> quantize.Quantizer:
    torch.manual_seed(0)
    quantizer = build(config, seed=3)
    for step, z in enumerate(batches(steps, rows, DIM)):
        for part in z.chunk(micro_batches):
            quantizer(part)
        quantizer.update(step, lr=0.01)
    return quantizer


@pytest.mark.parametrize("kind", KINDS)
def test_lookup_gives_what_forward_gave(kind: str) -> None:
    quantizer = trained(KINDS[kind]).eval()
    z = 2 * torch.randn(2, 3, 5, DIM)
    out = quantizer(z)
    places = len(quantizer.sizes)
    assert out.codes.shape == ((2, 3, 5) if places == 1 else (2, 3, 5, places))
    assert out.codes.dtype == torch.int64
    assert out.z.dtype == torch.float32
    torch.testing.assert_close(quantizer.lookup(out.codes), out.z, rtol=1e-5, atol=2e-5)
    for size, codes in zip(quantizer.sizes, out.codes.view(30, -1).T, strict=True):
        assert 0 <= int(codes.min()) <= int(codes.max()) < size


@pytest.mark.parametrize("kind", KINDS)
def test_the_encoder_gets_a_gradient(kind: str) -> None:
    quantizer = trained(KINDS[kind])
    z = torch.randn(50, DIM, requires_grad=True)
    out = quantizer(z)
    (F.mse_loss(out.z, torch.randn(50, DIM)) + out.loss).backward()
    assert z.grad is not None
    assert z.grad.isfinite().all()
    assert (z.grad.abs().sum(1) > 0).all()
    assert all(parameter.grad is not None for parameter in quantizer.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_one_all_reduce_a_step(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    quantizer = trained(KINDS[kind])
    calls: list[int] = []
    monkeypatch.setattr(distributed, "sum_", lambda tensor: calls.append(tensor.numel()) or tensor)
    for step in (10, 11):  # with a reset and without
        quantizer(torch.randn(50, DIM))
        quantizer.update(step, lr=0.01)
        assert len(calls) == step - 9


@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_are_one_batch(kind: str) -> None:
    """Up to the rounding of sums; rows of equal distance to two codes do not occur in these."""
    whole, parts = trained(KINDS[kind]), trained(KINDS[kind], micro_batches=4)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[name], value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_usage_counts_each_codebook(kind: str) -> None:
    quantizer = trained(KINDS[kind])
    quantizer.usages(clear=True)
    codes = quantizer(torch.randn(500, DIM)).codes.view(500, -1)
    quantizer.update(7, lr=0.0)
    for size, column, usage in zip(quantizer.sizes, codes.T, quantizer.usages(clear=False), strict=True):
        assert usage.window.tolist() == np.bincount(column.numpy(), minlength=size).tolist()
        assert not usage.age[column].any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_frozen_quantiser_counts_and_does_not_learn(kind: str) -> None:
    """In steps with and without a reset of dead codes; one that learns changes in them."""
    quantizer = trained(KINDS[kind])
    quantizer.freeze()
    quantizer.usages(clear=True)
    before = {name: value.clone() for name, value in quantizer.state_dict().items() if ".tally." not in f".{name}"}
    seen = []
    for step in range(6, 12):
        for part in (2 * torch.randn(2, 250, DIM)).unbind():
            out = quantizer(part)
            seen.append(out.codes.view(250, -1))
            assert not out.z.requires_grad
            assert not out.loss.requires_grad
        quantizer.update(step, lr=0.1)
    after = quantizer.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    for size, column, usage in zip(quantizer.sizes, torch.cat(seen).T, quantizer.usages(clear=False), strict=True):
        assert usage.window.tolist() == np.bincount(column.numpy(), minlength=size).tolist()
        assert (usage.steps, usage.resets) == (6, 0)


def test_cosine_is_the_largest_cosine() -> None:
    quantizer = trained(KINDS["cosine"])
    assert isinstance(quantizer, VectorQuantizer)
    torch.testing.assert_close(quantizer.codebook.norm(dim=1), torch.ones(20))
    z = 5 * torch.randn(300, DIM)
    cosine = F.normalize(z.double(), dim=1) @ quantizer.codebook.double().T
    assert torch.equal(quantizer(z).codes, cosine.argmax(1))


def test_simvq_learns_its_map_as_autograd_does() -> None:
    """Against the loss written out for a codebook C W^T that is looked up row by row."""
    quantizer = SimVQ(Config(kind="simvq", codebook_size=20, dim=6, beta=0.3))
    z = torch.randn(40, 6, requires_grad=True)
    quantizer(z).loss.backward()
    basis, weight = quantizer.basis.clone(), quantizer.map.weight.detach().clone().requires_grad_()
    z2 = z.detach().clone().requires_grad_()
    e = (basis @ weight.T)[torch.cdist(z2, basis @ weight.T).argmin(1)]
    loss = F.mse_loss(e, z2.detach()) + 0.3 * F.mse_loss(z2, e.detach())
    loss.backward()
    torch.testing.assert_close(quantizer.map.weight.grad, weight.grad)
    torch.testing.assert_close(z.grad, z2.grad)
    assert "basis" not in dict(quantizer.named_parameters())


@pytest.mark.parametrize("levels", [[8, 5, 5, 5], [3, 4], [7, 4, 3]])
def test_fsq_is_the_grid_of_the_paper(levels: list[int]) -> None:
    """All products of the levels' integers, halved as in the paper's code; each code is one point and is reached."""
    count = int(np.prod(levels))
    quantizer = FSQ(Config(kind="fsq", codebook_size=count, dim=len(levels), levels=levels))
    points = quantizer.lookup(torch.arange(count))
    grid = [[(i - level // 2) / (level // 2) for i in range(level)] for level in levels]
    assert sorted(map(tuple, points.tolist())) == sorted(
        tuple(np.float32(x) for x in point) for point in product(*grid)
    )
    out = quantizer(1.5 * torch.randn(200_000, len(levels)))
    assert len(out.codes.unique()) == count
    assert quantizer(torch.zeros(1, len(levels))).z.abs().max() == 0  # the middle level is 0


def test_fsq_gradient_is_that_of_its_bound() -> None:
    """Rounding passes the gradient on; what is left is d/dz of the tanh, here by finite differences in float64."""
    quantizer = FSQ(Config(kind="fsq", codebook_size=60, dim=3, levels=FSQ_LEVELS))
    z = torch.randn(30, 3, requires_grad=True)
    quantizer(z).z.sum().backward()
    step = 1e-5
    above, below = (quantizer._bounded(z.detach().double() + sign * step) for sign in (1, -1))
    expected = (above - below) / (2 * step) / (quantizer.levels // 2)
    torch.testing.assert_close(z.grad.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("levels", [3, 4, 5, 8, 16])
def test_every_fsq_channel_learns_where_training_begins(levels: int) -> None:
    """Two levels do not: their gradient at z = 0 is 0.001, and one of their codes is used."""
    quantizer = FSQ(Config(kind="fsq", codebook_size=levels**2, dim=2, levels=[levels] * 2))
    z = torch.zeros(1, 2, requires_grad=True)
    quantizer(z).z.sum().backward()
    assert z.grad.min() > 0.6
    used = quantizer(torch.randn(50_000, 2)).codes.unique()
    assert len(used) == levels**2


@pytest.mark.parametrize("bits", [1, 5, 6])
def test_lfq_entropies_are_those_over_all_codes(bits: int) -> None:
    """Softmax over every code written out in float64, and its gradient."""
    quantizer = LFQ(Config(kind="lfq", codebook_size=2**bits, dim=bits, entropy_temperature=0.7))
    z = torch.randn(50, bits, dtype=torch.float64, requires_grad=True)
    z2 = z.detach().clone().requires_grad_()
    every = quantizer.lookup(torch.arange(2**bits)).double()
    soft = (2 * z2 @ every.T / 0.7).softmax(1)
    expected = torch.special.entr(soft).sum(1).mean(), torch.special.entr(soft.mean(0)).sum()
    found = quantizer.entropies(z)
    torch.testing.assert_close(found, expected)
    (found[0] - 0.3 * found[1]).backward()
    (expected[0] - 0.3 * expected[1]).backward()
    torch.testing.assert_close(z.grad, z2.grad)


def test_lfq_of_two_to_the_eighteen_codes_holds_no_large_matrix() -> None:
    quantizer = LFQ(Config(kind="lfq", codebook_size=2**18, dim=18, entropy_weight=0.1))
    largest = [0]

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest[0] = max(largest[0], out.numel())
            return out

    z = torch.randn(1000, 18, requires_grad=True)
    with Watch():
        quantizer(z).loss.backward()
    assert largest[0] <= 1000 * 2**9


def test_rotation_turns_the_gradient() -> None:
    """Forward gives e; backward multiplies by the transpose of the rotation that takes z's direction to e's, scaled."""
    z = torch.randn(40, 7, dtype=torch.float64, requires_grad=True)
    e, gradient = torch.randn(40, 7, dtype=torch.float64), torch.randn(40, 7, dtype=torch.float64)
    out = pass_through(z, e, "rotation")
    torch.testing.assert_close(out, e)
    out.backward(gradient)
    for row in range(40):
        a, b = F.normalize(z[row].detach(), dim=0), F.normalize(e[row], dim=0)
        r = F.normalize(a + b, dim=0)
        rotation = torch.eye(7, dtype=torch.float64) - 2 * torch.outer(r, r) + 2 * torch.outer(b, a)
        torch.testing.assert_close(rotation @ rotation.T, torch.eye(7, dtype=torch.float64))
        torch.testing.assert_close(rotation @ a, b)
        scale = e[row].norm() / z[row].detach().norm()
        torch.testing.assert_close(z.grad[row], scale * rotation.T @ gradient[row])


@pytest.mark.parametrize("length", [0.0, 1e-30, 1e-9, 1e-4, 1e-2])
def test_rotation_has_a_bounded_gradient_near_zero(length: float) -> None:
    """Where it had one of 2e6; and the value is e for every z."""
    direction = F.normalize(torch.randn(40, 7), dim=1)
    z, e, gradient = (
        (length * direction).requires_grad_(),
        2 * F.normalize(torch.randn(40, 7), dim=1),
        torch.randn(40, 7),
    )
    e[0] = 0.0
    out = pass_through(z, e, "rotation")
    assert torch.equal(out, e)
    out.backward(gradient)
    assert (z.grad.norm(dim=1) <= 1.001 * MOST * gradient.norm(dim=1)).all()
    if length == 0:
        torch.testing.assert_close(z.grad[1:], MOST * gradient[1:])
    elif length > 1e-10:
        # Still turned, as in float64.
        far = (100 * direction).double().requires_grad_()
        pass_through(far, e.double(), "rotation").backward(gradient.double())
        cosine = F.cosine_similarity(z.grad[1:].double(), far.grad[1:])
        torch.testing.assert_close(cosine, torch.ones_like(cosine), rtol=1e-4, atol=0)


def fitted(config: Config, z: torch.Tensor) -> quantize.Quantizer:
    """Codes learned from the same rows in each of 30 steps."""
    torch.manual_seed(0)
    quantizer = build(config, seed=3)
    for step in range(30):
        quantizer(z)
        quantizer.update(step, lr=0.02)
    return quantizer.eval()


@pytest.mark.parametrize(("learning", "init"), [("ema", "samples"), ("gradient", "kmeans"), ("ema", "uniform")])
def test_depth_serves_cosine_as_it_serves_euclidean(learning: Any, init: Any) -> None:
    """On rows of length 1 both are one quantiser, so that the error falls with the depth; on others the length is all
    that is lost."""
    (z,) = batches(1, 300, 8)
    unit = F.normalize(z, dim=1)
    errors = []
    for depth in (1, 2, 4):
        common = {"codebook_size": 32, "dim": 8, "depth": depth, "init": init, "learning": learning, "ema_decay": 0.8}
        cosine, euclidean = fitted(Config(metric="cosine", **common), z), fitted(Config(**common), unit)
        out = cosine(z)
        if depth > 1:
            torch.testing.assert_close(out.z, euclidean(unit).z, rtol=1e-4, atol=1e-5)
        assert torch.equal(cosine.lookup(out.codes), out.z)
        assert torch.equal(cosine(7 * z).codes, out.codes)
        errors.append(float((out.z - unit).norm() / unit.norm()))
    assert errors[1] < 0.8 * errors[0]
    assert errors[2] < 0.8 * errors[1]


@pytest.mark.parametrize("gradient", ["straight-through", "rotation"])
def test_the_gradient_of_a_cosine_stack_is_that_of_its_normalisation(gradient: Any) -> None:
    config = Config(codebook_size=20, dim=8, depth=3, metric="cosine", gradient=gradient, beta=0.0)
    z = (3 * torch.randn(50, 8)).requires_grad_()
    quantizer = fitted(config, z.detach())
    weight = torch.randn(50, 8)
    (quantizer(z).z * weight).sum().backward()
    z2 = z.detach().clone().requires_grad_()
    unit = F.normalize(z2, dim=1)
    (pass_through(unit, quantizer.lookup(quantizer(z).codes), gradient) * weight).sum().backward()
    torch.testing.assert_close(z.grad, z2.grad)
    torch.testing.assert_close((z.grad * z.detach()).sum(1), torch.zeros(50), rtol=0, atol=1e-4)  # length is free


def test_residual_levels_quantise_the_rest() -> None:
    quantizer = trained(KINDS["residual"], steps=12).eval()
    z = torch.randn(200, DIM)
    rest, codes = z.double(), quantizer(z).codes
    errors = []
    for level, part in enumerate(quantizer.parts):
        chosen = torch.cdist(rest, part.codebook.double()).argmin(1)
        assert torch.equal(codes[:, level], chosen)
        rest = rest - part.codebook.double()[chosen]
        errors.append(float(rest.square().mean()))
    assert errors == sorted(errors, reverse=True)


def test_groups_are_independent() -> None:
    quantizer = trained(KINDS["groups"]).eval()
    z = torch.randn(200, DIM)
    out = quantizer(z)
    for group, (part, piece) in enumerate(zip(quantizer.parts, z.split(4, dim=1), strict=True)):
        assert torch.equal(out.codes[:, group], torch.cdist(piece, part.codebook).argmin(1))


def test_kmeans_is_that_of_scikit_learn() -> None:
    """From the same beginning, the rows that are drawn, after the same number of rounds."""
    rows = torch.cat(batches(1, 400, DIM))
    drawn = VectorQuantizer(Config(codebook_size=10, dim=DIM), seed=5)
    drawn(rows)
    drawn.update(0, lr=0.0)
    clustered = VectorQuantizer(Config(codebook_size=10, dim=DIM, init="kmeans"), seed=5)
    for part in rows.chunk(4):
        clustered(part)
    clustered.update(0, lr=0.0)
    reference = KMeans(10, init=drawn.codebook.double().numpy(), n_init=1, max_iter=quantize.KMEANS, tol=0)
    reference.fit(rows.double().numpy())
    np.testing.assert_allclose(clustered.codebook.numpy(), reference.cluster_centers_, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("learning", ["ema", "gradient"])
def test_a_uniform_codebook_is_neither_replaced_nor_idle(learning: Literal["ema", "gradient"]) -> None:
    """From the first step on it learns what torch or the EMA's recursion would, and codes without rows stay."""
    config = Config(codebook_size=50, dim=DIM, init="uniform", learning=learning, dead_after=3)
    quantizer = VectorQuantizer(config, begin=2)  # as a third level, which would wait for two others
    e = quantizer.codebook.clone()
    assert e.abs().max() <= 1 / 50
    (z,) = batches(1, 20, DIM)
    codes = quantizer(z).codes
    assert torch.equal(codes, torch.cdist(z, e).argmin(1))
    quantizer.update(0, lr=0.01)
    used = torch.zeros(50, dtype=torch.bool).index_fill_(0, codes, True)
    assert not used.all()
    if learning == "ema":
        n = torch.bincount(codes, minlength=50)[:, None]
        s = torch.zeros(50, DIM).index_add_(0, codes, z)
        expected = (0.99 * e + 0.01 * s) / (0.99 + 0.01 * n)
    else:
        parameter = torch.nn.Parameter(e.clone())
        F.mse_loss(parameter[codes], z).backward()
        torch.optim.Adam([parameter], lr=0.01).step()
        expected = parameter.detach()
    torch.testing.assert_close(quantizer.codebook[used], expected[used], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(quantizer.codebook[~used], e[~used], rtol=1e-4, atol=1e-8)
    assert torch.equal(quantizer.tally.ever, used)
    assert not quantizer.tally.resets


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": 5}, "groups=5 must divide the 12 channels"),
        ({"kind": "fsq"}, "set codebook_dim=4 and codebook_size=1000"),
        ({"kind": "fsq", "groups": 2}, "set codebook_dim=8 and codebook_size=1000"),
        ({"kind": "lfq", "groups": 2}, "must be 2 to the power of the 6 channels: set codebook_dim=18"),
        ({"kind": "lfq", "codebook_size": 500}, "give a power of two, such as 256"),
        ({"kind": "fsq", "depth": 2}, "leaves no residual to quantise"),
        ({"codebook_dim": -1}, "codebook_dim=-1 must be at least 0"),
        ({"depth": 0}, "depth=0 must be at least 1"),
        ({"entropy_weight": -0.1}, "entropy_weight=-0.1 must be at least 0"),
        ({"entropy_temperature": 0.0}, "entropy_temperature=0.0 must be above 0"),
        ({"kind": "fsq", "entropy_weight": 0.1}, "set entropy_weight=0"),
        ({"kind": "fsq", "levels": [2] * DIM, "codebook_size": 2**DIM}, r"levels=\[2, .* must be 3 or more each"),
        ({"kind": "fsq", "levels": [5, 1], "codebook_size": 5, "codebook_dim": 2}, "must be 3 or more each"),
    ],
)
def test_what_cannot_be_built_is_one_sentence(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(Config(dim=DIM, **change), 0)  # type: ignore[arg-type]


def test_dead_codes_of_every_level_return() -> None:
    """Levels begin one after the other; 60 steps on nearly all codes of all of them are in use."""
    config = Config(codebook_size=32, dim=DIM, depth=3, dead_after=5, reset_every=5)
    torch.manual_seed(0)
    quantizer = build(config, seed=3)
    for step, z in enumerate(batches(60, 1000, DIM)):
        quantizer(z)
        quantizer.update(step, lr=0.01)
        if step == 50:
            quantizer.usages(clear=True)
    for usage in quantizer.usages(clear=False):
        assert float((usage.window > 0).float().mean()) > 0.9
