"""Priors over codes, by brute force: all maps of 2 × 2 codes, of 3 codes or of two levels of 2."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.models.codes import Tokenizer, batch_of, everything, nothing, prior
from vaescale.interfaces import Condition, Known, Prior, Sampling, Shape
from vaescale.models import code_prior
from vaescale.models.code_prior import CodePrior
from vaescale.nn.transformer import Dropout

PLACES = 4
MANY = 10_000  # samples
NETS: dict[str, dict[str, Any]] = {
    "raster": {},
    "random": {"order": "random"},
    "masked": {"order": "masked"},
    "pixelcnn": {"net": "pixelcnn"},
    "uniform": {"net": "uniform"},
}
ONE_BY_ONE = ["raster", "random", "pixelcnn"]
SIZES = [(3,), (2, 2)]


def maps(codes: Tensor) -> Tensor:
    """[..., N] → [..., 2, 2]."""
    return codes.unflatten(-1, (2, 2))


def exact(
    model: CodePrior, order: list[int] | None, sizes: tuple[int, ...], condition: Condition | None = None
) -> Tensor:
    """Returns log p of all maps in this order, fp64, in the order of `everything`."""
    codes = everything(sizes, PLACES)
    given = model._given(condition or nothing(len(codes)), len(codes))
    places = None if order is None else torch.tensor(order).expand(len(codes), -1)
    with torch.no_grad():
        return -model._in_order(codes, given, places).double().sum((1, 2))


def frequencies(drawn: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Counts maps of codes [M, L, 2, 2] in the order of `everything`."""
    number = torch.zeros(len(drawn), dtype=torch.int64)
    for place in range(PLACES):
        for level, size in enumerate(sizes):
            number = number * size + drawn.flatten(2)[:, level, place]
    return torch.bincount(number, minlength=math.prod(sizes) ** PLACES)


def chi_square(counts: Tensor, p: Tensor) -> float:
    """Returns the p-value, of bins that are joined until 5 are expected in each."""
    stats = pytest.importorskip("scipy.stats")
    order = p.argsort(descending=True)
    expected, seen = (p * counts.sum())[order].numpy(), counts[order].numpy()
    enough = int((expected >= 5).sum())
    expected = np.append(expected[:enough], expected[enough:].sum())
    seen = np.append(seen[:enough], seen[enough:].sum())
    if expected[-1] < 5:
        expected[-2] += expected[-1]
        seen[-2] += seen[-1]
        expected, seen = expected[:-1], seen[:-1]
    return float(stats.chisquare(seen, expected * (seen.sum() / expected.sum())).pvalue)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("net", ["raster", "pixelcnn", "uniform"])
def test_probabilities_sum_to_1_in_raster_order(net: str, sizes: tuple[int, ...]) -> None:
    codes = everything(sizes, PLACES)
    assert len(codes) == (81 if sizes == (3,) else 256)
    model = prior(sizes, **NETS[net])
    rates = model.rates(maps(codes), nothing(len(codes)), torch.arange(len(codes)))
    assert rates.shape == (len(codes), len(sizes), 2, 2)
    assert float((-rates.detach().double().sum((1, 2, 3))).exp().sum()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("sizes", SIZES)
def test_probabilities_sum_to_1_in_each_random_order(sizes: tuple[int, ...]) -> None:
    model = prior(sizes, order="random")
    sums = []
    for order in itertools.permutations(range(PLACES)):
        log_p = exact(model, list(order), sizes)
        assert float(log_p.exp().sum()) == pytest.approx(1, abs=1e-5)
        sums.append(log_p)
    assert torch.stack(sums).std(0).min() > 1e-3  # each order is another distribution


def test_the_rates_of_random_orders_belong_to_their_places() -> None:
    """The rates of an image are the conditionals of one order, at the places of the codes."""
    model, codes = prior(order="random"), everything((3,), PLACES)[:20]
    rates = model.rates(maps(codes), nothing(20), torch.arange(20)).detach().flatten(2)[:, 0]
    found = set()
    for i in range(20):
        fits = []
        for order in itertools.permutations(range(PLACES)):
            expected = model._in_order(codes[i : i + 1], model._given(nothing(1), 1), torch.tensor([order]))[0, 0]
            fits += [order] if torch.allclose(rates[i][list(order)], expected, atol=1e-5) else []
        assert len(fits) == 1
        found.update(fits)
    assert len(found) > 6


@pytest.mark.parametrize("net", ONE_BY_ONE)
@pytest.mark.parametrize("sizes", SIZES)
def test_a_rate_depends_on_no_later_code_by_gradients(net: str, sizes: tuple[int, ...]) -> None:
    """The first level of a place depends on all places before it, the second one on the first one, too."""
    model = prior(sizes, **NETS[net])
    codes = torch.zeros(1, len(sizes), PLACES, dtype=torch.int64)
    order = None if net != "random" else torch.tensor([[2, 0, 3, 1]])
    embedded = model.levels.embedded(codes).detach().requires_grad_()
    h = model.trunk(embedded.sum(2), model._given(nothing(1), 1), order)
    for level, logits in enumerate(model.levels(h, embedded)):
        for place in range(PLACES):
            (gradient,) = torch.autograd.grad(logits[0, place].square().sum(), embedded, retain_graph=True)
            seen = gradient[0].abs().amax(-1) > 0
            expected = torch.zeros(PLACES, len(sizes), dtype=torch.bool)
            expected[:place] = True
            expected[place, :level] = True
            assert torch.equal(seen, expected)


@pytest.mark.parametrize("net", ["raster", "random"])
def test_cached_logits_are_those_of_a_whole_pass(net: str) -> None:
    model = prior((5,), side=4, **NETS[net])
    codes = torch.randint(5, (3, 1, 16))
    given = model._given(nothing(3), 3)
    order = None if net == "raster" else torch.stack([torch.randperm(16) for _ in range(3)])
    embedded = model.levels.embedded(codes)
    whole = model.levels(model.trunk(embedded.sum(2), given, order), embedded)[0]
    read = model.trunk.reader(given, order)
    parts = [read(i, embedded[:, i - 1].sum(1) if i else None) for i in range(16)]
    cached = torch.stack([model.levels.next(h, []) for h in parts], dim=1)
    torch.testing.assert_close(cached, whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("net", ["raster", "pixelcnn", "uniform"])
def test_samples_have_their_probabilities(net: str, sizes: tuple[int, ...]) -> None:
    model = prior(sizes, **NETS[net])
    drawn = model.draw(nothing(MANY), torch.arange(MANY))
    log_p = -model.rates(maps(everything(sizes, PLACES)), nothing(256 if len(sizes) > 1 else 81), torch.zeros(1))
    assert chi_square(frequencies(drawn, sizes), log_p.detach().double().sum((1, 2, 3)).exp()) > 1e-3


def test_samples_in_random_order_have_the_mean_probability_of_all_orders() -> None:
    model = prior(order="random")
    orders = [exact(model, list(order), (3,)).exp() for order in itertools.permutations(range(PLACES))]
    drawn = model.draw(nothing(MANY), torch.arange(MANY))
    assert chi_square(frequencies(drawn, (3,)), torch.stack(orders).mean(0)) > 1e-3
    assert chi_square(frequencies(drawn, (3,)), orders[0]) < 1e-6  # the test sees the difference


def tempered(model: CodePrior, temperature: float, top_k: int) -> Tensor:
    """Returns the probability of each map if each code is drawn with top-k and a temperature, from all conditionals."""
    codes = everything((3,), PLACES)
    given = model._given(nothing(81), 81)
    embedded = model.levels.embedded(codes)
    logits = model.levels(model.trunk(embedded.sum(2), given), embedded)[0].detach().double() / temperature
    if top_k:
        least = logits.topk(top_k).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    return logits.log_softmax(-1).gather(-1, codes.transpose(1, 2)).sum((1, 2)).exp()


@pytest.mark.parametrize(("temperature", "top_k"), [(0.5, 0), (2.0, 0), (1.0, 2), (1.5, 2)])
def test_samples_with_temperature_and_top_k_have_theirs(temperature: float, top_k: int) -> None:
    model = prior()
    p = tempered(model, temperature, top_k)
    drawn = model.draw(nothing(MANY), torch.arange(MANY), temperature, Sampling(top_k=top_k))
    counts = frequencies(drawn, (3,))
    assert counts[p == 0].sum() == 0
    assert chi_square(counts, p) > 1e-3
    assert chi_square(counts, tempered(model, 1.0, 0)) < 1e-6


@pytest.mark.parametrize("net", ["raster", "random", "pixelcnn"])
def test_temperature_0_takes_the_most_probable_codes(net: str) -> None:
    model = prior((5,), **NETS[net])
    drawn = model.draw(nothing(9), torch.arange(9), 0.0)
    assert torch.equal(drawn, model.draw(nothing(9), torch.arange(9), 1.0, Sampling(top_k=1)))
    assert len(drawn.unique(dim=0)) == (1 if net != "random" else len(drawn.unique(dim=0)))


@pytest.mark.parametrize("net", NETS)
def test_samples_depend_on_their_number_only(net: str) -> None:
    model = prior((6,), classes=3, **NETS[net])
    label, sample = torch.arange(12) % 3, 2**40 + torch.arange(12)
    attributes = torch.zeros(12, 0)
    together = model.draw(Condition(label, attributes), sample, 0.9, Sampling(guidance=2.0))
    for part in (slice(0, 1), slice(3, 10), slice(11, 12)):
        alone = model.draw(Condition(label[part], attributes[part]), sample[part], 0.9, Sampling(guidance=2.0))
        assert torch.equal(alone, together[part])
    assert len(together.unique(dim=0)) > 6


@pytest.mark.parametrize("net", ["raster", "random", "masked", "pixelcnn"])
def test_guidance_0_and_1_are_without_and_with_the_condition(net: str) -> None:
    model = prior((5,), side=4, classes=4, attributes=2, **NETS[net])
    condition = Condition(torch.arange(8) % 4, torch.randn(8, 2))
    sample = torch.arange(8)
    given = model.draw(condition, sample)
    without = model.draw(nothing(8, 2), sample)
    assert torch.equal(model.draw(condition, sample, sampling=Sampling(guidance=0.0)), without)
    assert torch.equal(model.draw(condition, sample, sampling=Sampling(guidance=1 + 1e-9)), given)
    assert not torch.equal(given, without)
    assert not torch.equal(model.draw(condition, sample, sampling=Sampling(guidance=4.0)), given)


def test_guided_samples_have_the_probabilities_of_guided_logits() -> None:
    model = prior(classes=2)
    condition = Condition(torch.ones(81, dtype=torch.int64), torch.zeros(81, 0))
    codes = everything((3,), PLACES)
    embedded = model.levels.embedded(codes)

    def logits_of(condition: Condition) -> Tensor:
        return model.levels(model.trunk(embedded.sum(2), model._given(condition, 81)), embedded)[0].detach().double()

    logits = logits_of(nothing(81)) + 1.5 * (logits_of(condition) - logits_of(nothing(81)))
    p = logits.log_softmax(-1).gather(-1, codes.transpose(1, 2)).sum((1, 2)).exp()
    many = Condition(torch.ones(MANY, dtype=torch.int64), torch.zeros(MANY, 0))
    drawn = model.draw(many, torch.arange(MANY), sampling=Sampling(guidance=1.5))
    assert chi_square(frequencies(drawn, (3,)), p) > 1e-3


def test_rates_depend_on_the_condition() -> None:
    for net in ("raster", "random", "masked", "pixelcnn"):
        model = prior(classes=3, attributes=2, **NETS[net])
        codes, sample = maps(torch.zeros(2, 1, 4, dtype=torch.int64)), torch.zeros(2, dtype=torch.int64)
        for condition in (
            Condition(torch.tensor([0, 2]), torch.zeros(2, 2)),
            Condition(torch.tensor([1, 1]), torch.tensor([[0.0, 1.0], [0.0, torch.nan]])),
        ):
            one, other = model.rates(codes, condition, sample)
            assert (one - other).abs().max() > 1e-4, net


@pytest.mark.parametrize("net", NETS)
def test_known_codes_stay_and_the_others_depend_on_them(net: str) -> None:
    model = prior((5,), side=4, **NETS[net])
    where = torch.zeros(1, 4, 4, dtype=torch.bool)
    where[:, :2] = True
    sample = torch.arange(64)
    drawn = []
    for value in (0, 4):
        known = Known(torch.full((64, 1, 4, 4), value), where)
        drawn.append(model.draw(nothing(64), sample, known=known))
        assert (drawn[-1][:, :, :2] == value).all()
        assert len(drawn[-1][:, :, 2:].unique()) > 2
    assert torch.equal(drawn[0][:, :, 2:], drawn[1][:, :, 2:]) == (net == "uniform")


@pytest.mark.parametrize("net", ["raster", "random", "masked"])
def test_known_codes_that_come_last_in_raster_order(net: str) -> None:
    """The last code is known. Samples in raster order do not see it; the others are conditioned on it."""
    model = prior(**NETS[net])
    where = torch.zeros(1, 2, 2, dtype=torch.bool)
    where[0, 1, 1] = True
    known = Known(torch.full((MANY, 1, 2, 2), 2), where)
    drawn = model.draw(nothing(MANY), torch.arange(MANY), sampling=Sampling(passes=4, positions="halton"), known=known)
    assert (drawn[:, 0, 1, 1] == 2).all()
    free = drawn.flatten(2)[:, 0, 0]
    codes = everything((3,), PLACES)
    if net == "raster":
        p = exact(model, None, (3,)).exp()
        expected = torch.stack([p[codes[:, 0, 0] == code].sum() for code in range(3)])
    elif net == "random":
        shares = []
        for rest in itertools.permutations(range(3)):
            log_p = exact(model, [3, *rest], (3,)).exp()
            chosen = torch.stack([log_p[(codes[:, 0, 3] == 2) & (codes[:, 0, 0] == code)].sum() for code in range(3)])
            shares.append(chosen / chosen.sum())
        expected = torch.stack(shares).mean(0)
    else:  # place 3 is visible from the beginning; by rank, places are drawn in Halton's order
        order = [3, *[place for place in model.halton.tolist() if place != 3]]
        p = chain(model, order)
        chosen = torch.stack([p[(codes[:, 0, 3] == 2) & (codes[:, 0, 0] == code)].sum() for code in range(3)])
        expected = chosen / chosen.sum()
    assert chi_square(torch.bincount(free, minlength=3), expected) > 1e-3


def test_levels_may_be_known_in_part() -> None:
    model = prior((3, 4), order="masked")
    where = torch.zeros(2, 2, 2, dtype=torch.bool)
    where[0] = True
    drawn = model.draw(nothing(50), torch.arange(50), known=Known(torch.full((50, 2, 2, 2), 2), where))
    assert (drawn[:, 0] == 2).all()
    assert drawn[:, 1].unique().tolist() == [0, 1, 2, 3]


def conditional(model: CodePrior, masked: Tensor) -> Tensor:
    """Returns −log p of the masked codes of all maps given the others, fp64 [maps, N], and 0 for these."""
    codes = everything(model.sizes, PLACES)
    with torch.no_grad():
        return (
            model._of_masked(codes, model._given(nothing(len(codes)), len(codes)), masked.expand(len(codes), -1))
            .double()
            .sum(1)
        )


def chain(model: CodePrior, order: list[int]) -> Tensor:
    """Returns the probability of all maps if a masked prior draws one code after the other."""
    nats = torch.zeros(len(everything(model.sizes, PLACES)), dtype=torch.float64)
    masked = torch.ones(PLACES, dtype=torch.bool)
    for place in order:
        nats += conditional(model, masked)[:, place]
        masked[place] = False
    return (-nats).exp()


@pytest.mark.parametrize("sizes", SIZES)
def test_the_masked_estimate_over_all_masks_is_the_mean_over_all_orders(sizes: tuple[int, ...]) -> None:
    """Uria et al. 2014: numbers of visible codes 0 … N − 1 and all sets of them, each weighted N / (N − t)."""
    model = prior(sizes, order="masked")
    orders = torch.stack([chain(model, list(order)).log() for order in itertools.permutations(range(PLACES))]).mean(0)
    by_count = []
    for visible in range(PLACES):
        parts = []
        for seen in itertools.combinations(range(PLACES), visible):
            masked = torch.ones(PLACES, dtype=torch.bool)
            masked[list(seen)] = False
            parts.append(conditional(model, masked).sum(1) * PLACES / (PLACES - visible))
        by_count.append(torch.stack(parts).mean(0))
    torch.testing.assert_close(-torch.stack(by_count).mean(0), orders, rtol=0, atol=1e-5)
    # and `rates` are such terms, each number of visible codes as often as any other
    code, draws = maps(everything(sizes, PLACES)[5:6]).expand(4000, -1, -1, -1), torch.arange(4000)
    rates = model.rates(code, nothing(4000), draws).detach().double()
    visible = (rates.sum(1) == 0).flatten(1).sum(1)
    assert chi_square(torch.bincount(visible, minlength=4), torch.full((4,), 0.25)) > 1e-3
    sums = rates.sum((1, 2, 3))
    assert abs(float(sums.mean() + orders[5])) < 4 * float(sums.std()) / 4000**0.5
    other = model.rates(code, nothing(4000), draws, draw=1).detach()
    assert (other != rates).any()


def test_masked_samples_one_by_one_have_the_probabilities_of_their_order() -> None:
    model = prior(order="masked")
    drawn = model.draw(nothing(MANY), torch.arange(MANY), sampling=Sampling(passes=PLACES, positions="halton"))
    assert chi_square(frequencies(drawn, (3,)), chain(model, model.halton.tolist())) > 1e-3


@pytest.mark.parametrize("steps", [1, 3, 12, 40])
@pytest.mark.parametrize("positions", ["confidence", "halton"])
def test_masked_samples_need_any_number_of_steps(steps: int, positions: Any) -> None:
    model = prior((5,), side=4, order="masked")
    passes: list[int] = []
    model.trunk.register_forward_hook(lambda _, inputs, output: passes.append(int(inputs[2].sum())))
    model.draw(nothing(1), torch.arange(1), sampling=Sampling(passes=steps, positions=positions))
    left = [math.floor(16 * math.cos(math.pi / 2 * step / steps)) for step in range(steps)]
    for step in range(1, steps):
        left[step] = min(left[step], left[step - 1] - 1)
    assert passes == left[:16]


def test_in_one_step_codes_are_independent() -> None:
    model = prior(order="masked")
    drawn = model.draw(nothing(MANY), torch.arange(MANY), sampling=Sampling(passes=1))
    p = (-conditional(model, torch.ones(PLACES, dtype=torch.bool)).sum(1)).exp()
    assert chi_square(frequencies(drawn, (3,)), p) > 1e-3


def test_without_noise_the_most_certain_codes_come_first() -> None:
    model = prior((5,), side=4, order="masked")
    seen: list[tuple[Tensor, Tensor]] = []
    model.trunk.register_forward_hook(lambda _, inputs, output: seen.append((inputs[2], output)))
    found = model.draw(nothing(3), torch.arange(3), 0.0, Sampling(passes=4)).flatten(2)
    p = model.levels.next(seen[0][1], []).softmax(-1).amax(-1)
    for image in range(3):
        visible = ~seen[1][0][image]
        assert 0 < visible.sum() < 16
        assert p[image][visible].min() >= p[image][~visible].max()
        most = model.levels.next(seen[0][1], [])[image].argmax(-1)
        assert torch.equal(found[image, 0][visible], most[visible])


def trained(model: CodePrior, count: int = 6, first: int = 0, step: int = 0, label: int = -1) -> Any:
    codes = torch.arange(count * 4).view(count, 1, 2, 2) % 3
    with torch.no_grad():
        return model.train()(batch_of(codes, torch.full((count,), label), first), step)


@torch.no_grad()
@pytest.mark.parametrize("net", ["raster", "random", "masked", "pixelcnn"])
def test_a_step_depends_on_samples_not_on_the_batch(net: str) -> None:
    """The loss of a batch is the mean of those of its parts, dropout and orders included."""
    model = prior(classes=2, label_dropout=0.5, **NETS[net])
    codes = torch.randint(3, (6, 1, 2, 2))
    whole = batch_of(codes, torch.arange(6) % 2)
    parts = [model.train()(type(whole)(*(one[i : i + 2] for one in whole)), 3) for i in (0, 2, 4)]
    output = model(whole, 3)
    assert float(output.loss) == pytest.approx(sum(float(part.loss) for part in parts) / 3, abs=1e-5)
    bits = [float(part.metrics["bits_per_code"]) for part in parts]
    assert float(output.metrics["bits_per_code"]) == pytest.approx(sum(bits) / 3, abs=1e-5)
    assert float(model(whole, 3).loss) == float(output.loss)


@torch.no_grad()
def test_dropout_is_that_of_the_seed_and_off_in_eval() -> None:
    for net in ("raster", "masked", "pixelcnn"):
        one, other = prior(seed=0, dropout=0.2, **NETS[net]), prior(seed=0, dropout=0.2, **NETS[net])
        other.seed = 1
        assert float(trained(one).loss) == float(trained(one).loss)
        assert float(trained(one).loss) != float(trained(other).loss)
        none = prior(dropout=0.0, **NETS[net])
        if net != "masked":
            codes = torch.arange(24).view(6, 1, 2, 2) % 3
            rates = one.eval().rates(codes, nothing(6), torch.arange(6))
            assert float(one.eval()(batch_of(codes), 0).loss) == pytest.approx(float(rates.mean()))
            assert float(trained(none).loss) == pytest.approx(float(rates.mean()), abs=1e-6)


def test_the_conditions_share_is_dropped_by_seed_and_sample() -> None:
    model = prior(classes=2, label_dropout=0.3)
    seen: list[Tensor] = []
    model.conditioner.register_forward_hook(lambda _, inputs, output: seen.append(inputs[0].label))
    trained(model, 4000, label=1)
    share = float((seen[0] < 0).double().mean())
    assert share == pytest.approx(0.3, abs=4.5 * (0.21 / 4000) ** 0.5)
    trained(model, 1000, first=2000, step=7, label=1)  # a resumed run
    assert torch.equal(seen[1], seen[0][2000:3000])
    model.eval()(batch_of(torch.zeros(9, 1, 2, 2, dtype=torch.int64), torch.ones(9, dtype=torch.int64)), 0)
    assert (seen[2] == 1).all()


def test_orders_are_random_and_become_raster() -> None:
    model = prior(order="random", anneal_start=10, anneal_steps=100)
    sample = torch.arange(24_000)
    for step, share in ((0, 0.0), (10, 0.0), (60, 0.5), (110, 1.0), (500, 1.0)):
        order = model._training_order(sample, model._raster_share(step))
        kinds = torch.unique(order, dim=0, return_counts=True)
        expected = torch.full((24,), (1 - share) / 24, dtype=torch.float64)
        expected[0] += share
        if share < 1:
            assert len(kinds[0]) == 24
            assert chi_square(kinds[1], expected) > 1e-3
        else:
            assert kinds[0].tolist() == [[0, 1, 2, 3]]
    assert model._raster
    codes = maps(everything((3,), PLACES))
    log_p = -model.rates(codes, nothing(81), torch.arange(81)).detach().double().sum((1, 2, 3))
    torch.testing.assert_close(log_p, exact(model, [0, 1, 2, 3], (3,)), rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_loss_and_metrics_of_masked_training_have_their_expectations() -> None:
    """Of one map: the loss that of m = ⌈N cos(πu/2)⌉ masked codes per expected one, the metric that of the bound."""
    model = prior(order="masked", dropout=0.0)
    code = everything((3,), PLACES)[7:8]
    by_count = []
    for count in range(1, PLACES + 1):
        sums = []
        for hidden in itertools.combinations(range(PLACES), count):
            masked = torch.zeros(PLACES, dtype=torch.bool)
            masked[list(hidden)] = True
            sums.append(float(conditional(model, masked)[7].sum()))
        by_count.append(sum(sums) / len(sums))
    below = [2 / math.pi * math.acos(m / PLACES) for m in range(PLACES + 1)]
    chances = [below[m - 1] - below[m] for m in range(1, PLACES + 1)]
    expected = sum(p * nats for p, nats in zip(chances, by_count, strict=True))
    expected /= sum(p * m for m, p in enumerate(chances, start=1))
    bound = sum(nats / m for m, nats in enumerate(by_count, start=1)) / PLACES
    output = model.train()(batch_of(maps(code).expand(MANY, -1, -1, -1)), 0)
    assert float(output.loss) == pytest.approx(expected, rel=0.03)
    assert float(output.metrics["bits_per_code"]) * math.log(2) == pytest.approx(bound, rel=0.03)


@torch.no_grad()
def test_rates_of_levels_are_reported() -> None:
    model = prior((3, 2))
    codes = torch.randint(2, (5, 2, 2, 2))
    output = model(batch_of(codes), 0)
    rates = model.rates(codes, nothing(5), torch.arange(5)) / math.log(2)
    for level in (0, 1):
        torch.testing.assert_close(output.metrics[f"rate/level{level}"], rates[:, level].mean())
    torch.testing.assert_close(output.metrics["bits_per_code"], rates.mean())
    torch.testing.assert_close(output.loss, rates.mean() * math.log(2))
    assert set(prior()(batch_of(codes[:, :1]), 0).metrics) == {"bits_per_code"}


def test_the_uniform_prior_costs_log_k_and_has_no_weights() -> None:
    model = prior((3, 8), net="uniform")
    assert not list(model.parameters())
    output = model.train()(batch_of(torch.zeros(2, 2, 2, 2, dtype=torch.int64)), 0)
    assert float(output.metrics["rate/level0"]) == pytest.approx(math.log2(3))
    assert float(output.metrics["rate/level1"]) == pytest.approx(3)
    assert not output.loss.requires_grad


@torch.no_grad()
def test_pictures_are_encoded_by_the_tokenizer() -> None:
    model = prior((3, 4))
    assert isinstance(model, Prior)
    assert isinstance(model.codec, Tokenizer)
    pictures = torch.randint(256, (5, 2, 2, 2), dtype=torch.uint8)
    codes = torch.stack([pictures[:, 0] % 3, pictures[:, 1] % 4], dim=1).long()
    batch = batch_of(pictures)
    assert torch.equal(model.codes(batch), codes)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.codes(batch), codes)
    assert torch.equal(model.codes(batch_of(codes)), codes)
    assert float(model(batch, 0).loss) == float(model(batch_of(codes), 0).loss)
    assert not any("codec" in name or "frozen" in name for name in model.state_dict())
    assert not model.codec.weight.requires_grad


def test_training_in_bf16_is_close_to_fp32() -> None:
    for net in ("raster", "random", "masked", "pixelcnn"):
        model = prior((5,), **NETS[net])
        exactly = float(trained(model).loss)
        with torch.autocast("cpu", torch.bfloat16):
            assert float(trained(model).loss) == pytest.approx(exactly, rel=0.05)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"net": "pixelcnn", "order": "random"}, "model.order=random needs model.net=transformer"),
        ({"net": "uniform", "order": "masked"}, "model.order=masked needs model.net=transformer"),
        ({"anneal_steps": 5}, "model.anneal_steps=5 needs model.order=random"),
        ({"width": 20, "heads": 2}, "model.width=20 must be a multiple of 4 times model.heads=2"),
        ({"dropout": 1.0}, "model.dropout=1.0 must be below 1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        prior(**given)


def test_tokenizers_that_do_not_fit_are_refused() -> None:
    class Uneven(Tokenizer):
        def encode(self, batch: Any, temperature: float = 0.0) -> list[Tensor]:
            return [code[..., : 1 + i] for i, code in enumerate(super().encode(batch))]

    shape = Shape(2, 2, 0)
    with pytest.raises(ValueError, match="several sizes"):
        code_prior.build(code_prior.Config(), shape, 0, Uneven((3, 3)))
    with pytest.raises(ValueError, match=r"model\.tokenizer=here has no codes"):
        code_prior.build(code_prior.Config(tokenizer="here"), shape, 0, prior())


def test_dropout_of_the_trunk_reaches_each_branch() -> None:
    """With all but nothing dropped, h depends on no code."""
    model = prior(dropout=0.0)
    dropout = Dropout(1 - 2**-16, torch.arange(4), (0, 0))
    h = model.trunk(torch.randn(4, 4, 16), model._given(nothing(4), 4), None, dropout)
    assert h.abs().median() < 1e-6


@pytest.mark.parametrize("net", ["raster", "random"])
def test_compiled_it_is_one_graph_for_all_steps(net: str) -> None:
    model = prior((3, 2), dropout=0.1, **NETS[net], **({"anneal_steps": 9} if net == "random" else {})).train()
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    expected = [
        float(model(batch_of(torch.zeros(4, 2, 2, 2, dtype=torch.int64)), step).loss.detach()) for step in range(4)
    ]
    model.compile(backend=backend)
    for step in range(4):
        loss = model(batch_of(torch.zeros(4, 2, 2, 2, dtype=torch.int64)), step).loss
        assert float(loss.detach()) == pytest.approx(expected[step], abs=1e-5)
    assert len(graphs) == 1


def test_the_tokenizer_follows_the_prior_to_its_device() -> None:
    model = prior().to("meta")
    assert {one.device.type for one in model.codec.parameters()} == {"meta"}  # type: ignore[attr-defined]
