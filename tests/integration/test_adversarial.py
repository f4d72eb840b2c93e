"""Runs with a critic: on two ranks against a loop of plain torch on the joined batch, against a run without a critic,
and resumed."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import Start, finish, ranks
from tests.integration.conftest import STEPS, TINY, forked, losses, training, written
from tests.integration.test_resume import TRAIN, each_continued_the_last, kill_at, same_bits
from tests.training import duel

# The critic is trained from step 3 on, the term begins at step 6.
CRITIC = {
    "adversarial.weight": 0.1,
    "adversarial.width": 8,
    "adversarial.layers": 2,
    "adversarial.critic_start": 0.25,
    "adversarial.start": 0.5,
}
WAYS = {  # world, settings; the first is the same as none until the start
    "none": (2, {}),
    "plain": (1, CRITIC),
    "never": (2, {**CRITIC, "adversarial.start": 1, "adversarial.adaptive": True}),
    "zero1": (2, {**CRITIC, "zero_stage": 1, "adversarial.adaptive": True, "adversarial.r1": 1}),
    "zero2": (2, {**CRITIC, "zero_stage": 2, "accumulation": 2, "adversarial.augment": True}),
}


def given(run: Path, pictures: Path, settings: dict[str, object]) -> list[str]:
    return written({"run": run, "data.root": pictures, "keep_last": 99, "every.checkpoint": 2, **settings})


@pytest.fixture(scope="module")
def duels(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("duels")
    jobs = [
        training(folder / name, TINY, given(folder / name / "run", pictures, settings), world)
        for name, (world, settings) in WAYS.items()
    ]
    forked(folder, [{"task": "duel", "world": 2, "out": str(folder)}, *jobs])
    return folder


@pytest.mark.parametrize(("zero", "accumulation", "way", "loss"), duel.CASES)
def test_two_ranks_learn_what_plain_torch_does_on_the_joined_batch(
    duels: Path, zero: int, accumulation: int, way: str, loss: str
) -> None:
    case = (zero, accumulation, way, loss)
    theirs, expected = duel.plain(duel.load(*case, 2), duel.batches(accumulation, 2))
    ranks = [load_file(duels / duel.file(case, rank)) for rank in range(2)]
    for ours in ranks:
        assert ours.pop("weights").tolist() == pytest.approx(expected, rel=1e-5)
        assert max(duel.off(ours, theirs).values()) < 1e-5
    assert all((ranks[0][name] == value).all() for name, value in ranks[1].items())


def test_a_critic_changes_nothing_before_its_start(duels: Path) -> None:
    """It is trained from step 3 on, and the model, its moments and averages have the bits of a run without one."""
    last = f"run/checkpoints/step-{STEPS:08d}"
    for name in ("model", "ema", "optimizer"):
        file = f"{last}/{name}.safetensors"
        assert (duels / "never" / file).read_bytes() == (duels / "none" / file).read_bytes(), name
    assert losses(duels / "never" / "run") == losses(duels / "none" / "run")
    first, third, final = (critic(duels / "never" / "run", step) for step in (2, 4, STEPS))
    assert any(not torch.equal(first[name], third[name]) for name in first)
    assert final["lecam"][2] == STEPS - 3


def test_the_term_changes_the_model_from_its_start_on(duels: Path) -> None:
    begun = losses(duels / "zero1" / "run")
    without = losses(duels / "none" / "run")
    assert begun[:7] == pytest.approx(without[:7], rel=1e-5)  # the loss of a step is that before its update
    assert begun[7:] != pytest.approx(without[7:], rel=1e-5)


def critic(run: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"step-{step:08d}" / "critic.safetensors")


def same_critic(run: Path, twin: Path) -> None:
    for name in ("critic", "critic_optimizer"):
        file = f"checkpoints/step-{STEPS:08d}/{name}.safetensors"
        assert (run / file).read_bytes() == (twin / file).read_bytes(), name


@pytest.mark.long
@pytest.mark.parametrize(("way", "step"), [("plain", 3), ("zero1", 5), ("zero2", 9), ("zero1", 7)])
def test_killed_before_between_and_after_the_start(
    duels: Path, pictures: Path, tmp_path: Path, start: Start, way: str, step: int
) -> None:
    world, settings = WAYS[way]
    command = [*TRAIN, *given(tmp_path, pictures, settings)]
    kill_at(ranks(start, world, command), step)
    assert not (tmp_path / "checkpoints" / f"step-{STEPS:08d}").exists()
    for process in ranks(start, world, command):
        code, output = finish(process)
        assert code == 0, output
    same_bits(tmp_path, duels / way / "run")
    same_critic(tmp_path, duels / way / "run")


def test_the_world_may_change(duels: Path, pictures: Path, tmp_path: Path) -> None:
    """2 → 1 → 2 ranks: each loads what was saved, no sample is repeated or left out, and the losses are those of 2."""
    run, worlds = tmp_path / "run", {5: 2, 8: 1, STEPS: 2}
    jobs = []
    for step, world in worlds.items():
        fault = [] if step == STEPS else [["touch", 0, step - (world > 1), str(run / "STOP")]]
        more = {**WAYS["zero1"][1], "every.checkpoint": 100}
        jobs.append({**training(tmp_path / str(step), TINY, given(run, pictures, more), world), "faults": fault})
    forked(tmp_path, jobs)
    each_continued_the_last(tmp_path, worlds, ("model", "critic", "critic_optimizer"))
    twin = duels / "zero1" / "run"
    for name in ("train/loss", "critic/loss", "adversarial/weight"):
        assert curve(run, name) == pytest.approx(curve(twin, name), rel=1e-5)


def curve(run: Path, name: str) -> list[float]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [value[name] for value in map(json.loads, lines) if name in value]
