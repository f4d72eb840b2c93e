"""The formulas of the plan against step-by-step simulations."""

import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from tests.conftest import ROOT
from vaescale import settings
from vaescale.advice.plan import (
    IMAGE,
    IMAGES,
    Cluster,
    checkpoint_bytes,
    data_of,
    moved,
    step_seconds,
    sums,
    table,
    terms,
)
from vaescale.advice.traffic import traffic
from vaescale.files import readable_size
from vaescale.nn.critic import build


def ring(ranks: int, size: float, speed: float) -> float:
    """Returns the seconds of a ring all-reduce: each rank forwards one piece at a time until all ranks have all."""
    held = [[{rank} for _ in range(ranks)] for rank in range(ranks)]  # rank, piece → whose parts are in the sum
    seconds = 0.0
    while any(len(piece) < ranks for own in held for piece in own):
        turn = round(seconds * speed / (size / ranks))
        sent = [(rank, (rank - turn) % ranks, set(held[rank][(rank - turn) % ranks])) for rank in range(ranks)]
        for rank, piece, parts in sent:
            held[(rank + 1) % ranks][piece] |= parts
        seconds += size / ranks / speed
    return seconds


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_a_ring_takes_what_the_formula_says(ranks: int) -> None:
    assert sums(1e9, Cluster(1, ranks, inside=2e9, between=1.0)) == pytest.approx(ring(ranks, 1e9, 2e9))
    assert sums(1e9, Cluster(ranks, 1, inside=1.0, between=2e9)) == pytest.approx(ring(ranks, 1e9, 2e9))


def test_two_levels_are_a_ring_within_and_rings_between() -> None:
    """Each of 4 accelerators all-reduces a quarter with its peers on other nodes, over a quarter of the network."""
    within = 2 * 3 / 4 * 1e9 / 2e9
    assert sums(1e9, Cluster(3, 4, 2e9, 5e8)) == pytest.approx(within + ring(3, 1e9 / 4, 5e8 / 4))


@pytest.mark.parametrize("world", [16, 256])
def test_the_slowest_of_many_is_about_as_late_as_said(world: int) -> None:
    """The formula bounds the expected maximum of normal values; at these sizes the bound is within a fifth of it."""
    times = 1 + 0.05 * np.random.default_rng(0).standard_normal((4000, world))
    late = step_seconds(1.0, 0.0, Cluster(1, world, 1.0, 1.0, jitter=0.05)) - 1
    assert late == pytest.approx(0.05 * math.sqrt(2 * math.log(world)))
    assert 0.7 * late < times.max(1).mean() - 1 < late


CONFIG = ["run=none", "data.root=none", "global_batch=16"]
NODE = Cluster(1, 8, inside=2e11, between=1.25e10)


def load(*given: str) -> settings.Config:
    return settings.load("tests/integration/tiny.yaml", [*CONFIG, *given])


def rows(*given: str) -> dict[str, list[str]]:
    """What → its values at 8, 64 and 1024 ranks."""
    config = load(*given)
    lines = [line.split(" | ") for line in table(config, NODE, 0.1, [8, 64, 1024])]
    return {line[1]: line[2:5] for line in lines[2:]}


def test_the_table_has_every_term_at_each_number_of_ranks() -> None:
    found = rows("zero_stage=1")
    for what in (
        "gradients",
        "weights",
        "gradient norm",
        "codebooks, rates",
        "gather weights, moments",
        "pictures on rank 0",
    ):
        assert len(found[what]) == 3
    assert found["compute"] == ["100 ms"] * 3
    assert found["stop requests"] == ["0.42 ms", "3.78 ms", "61.4 ms"]  # 2 (W − 1) · 30 µs
    assert "weights" not in rows("zero_stage=0")


def test_a_rank_has_sockets_only_to_its_neighbours() -> None:
    columns = [terms(load(), settings.build(load()), NODE.of(world), 0.1, data_of(load())) for world in (1, 2, 4, 8)]
    values = [one.value for column in columns for one in column if one.what == "stop requests: sockets"]
    assert values == ["0 per rank", "1 per rank", "2 per rank", "2 per rank"]


def test_ranks_that_do_not_fill_their_nodes_are_refused() -> None:
    command = "launch/plan.py --config tests/integration/tiny.yaml --step-time 1 --inside 1 --ranks 4,12"
    done = subprocess.run([sys.executable, *command.split()], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "12 ranks do not fill nodes of 8 accelerators: use 8 or 16 ranks, or set --accelerators" in done.stderr


def test_every_node_fetches_the_columns_that_it_needs() -> None:
    """A node of 128 reads 16 images of a step from the same quarter of 64 columns; a single one reads all in turn."""
    one, _, many = rows("data.columns=64")["fetched in all"]
    assert one == readable_size(IMAGE * IMAGES[0])
    assert many == readable_size(128 * IMAGE * IMAGES[0] / 4)


def test_the_plan_counts_gathered_weights_as_half_a_sum() -> None:
    config = load("zero_stage=1")
    model = settings.build(config)
    plain = moved(model, load(), NODE)
    weights = 4 * math.ceil(sum(p.numel() for p in model.parameters()) / 16) * 16
    assert moved(model, config, NODE) == plain + weights / 2 + 4


def test_only_gradients_that_we_average_overlap_with_the_backward_pass() -> None:
    hidden = replace(NODE, exposed=0.0)
    model = settings.build(load())
    (codebooks,) = (one.bytes for one in traffic(model, load(), 8) if one.what == "codebooks, rates")
    assert moved(model, load(), hidden) == codebooks > 0
    for given in ("zero_stage=1", "zero_stage=2", "deepspeed.prescale_gradients=true"):
        assert moved(model, load(given), hidden) == moved(model, load(given), NODE), given
    config, data = load("zero_stage=1"), data_of(load())
    assert terms(config, model, hidden, 0.1, data) == terms(config, model, NODE, 0.1, data)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize(("zero", "entries"), [(0, 0), (1, 3), (2, 3)])
def test_a_save_gathers_the_masters_and_both_moments(precision: str, zero: int, entries: int) -> None:
    """At every precision, as tests/integration/test_gather.py counts."""
    config = load(f"precision={precision}", f"zero_stage={zero}")
    model = settings.build(config)
    (row,) = (one for one in terms(config, model, NODE, 0.1, data_of(config)) if one.what == "gather weights, moments")
    size = 4 * entries * sum(p.numel() for p in model.parameters())
    assert row.formula.startswith(f"{readable_size(size)} of")


def test_a_critic_is_saved_with_its_moments() -> None:
    config = load("adversarial.weight=0.1")
    model, critic = settings.build(config), build(config.adversarial, 3, 0)
    more = checkpoint_bytes(model, config) - checkpoint_bytes(model, load())
    assert more == 12 * sum(p.numel() for p in critic.parameters())
