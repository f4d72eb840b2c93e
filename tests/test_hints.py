import random
import string

import pytest

from vaescale.hints import MOST, either, known_keys, nearest
from vaescale.models import MODELS
from vaescale.settings import Config


@pytest.fixture(params=MODELS)
def known(request: pytest.FixtureRequest) -> list[str]:
    """Returns the keys of a Config, for each kind of model."""
    return list(known_keys(Config(model=MODELS[request.param].config())))


def test_every_key_is_found_by_its_last_part(known: list[str]) -> None:
    assert {"steps", "optimizer", "optimizer.lr", "model.kind"} <= set(known)
    for key in known:
        last = key.rpartition(".")[2]
        same = [other for other in known if other.rpartition(".")[2] == last]
        expected = [last] if last in known else same
        assert set(expected) <= set(nearest(last, known)), key  # and perhaps others: weights, too, for weight
        assert len(expected) <= MOST
        for section in ("optimiser", "x"):
            assert set(same) & set(nearest(f"{section}.{last}", known)), key


def test_every_key_is_found_by_a_wrong_spelling(known: list[str]) -> None:
    """One letter omitted, doubled, replaced or swapped with the next, at any position of a key."""
    draw = random.Random(0)
    for key in known:
        place = draw.randrange(len(key) - 1)
        before, letter, following, after = key[:place], key[place], key[place + 1], key[place + 2 :]
        other = draw.choice(string.ascii_lowercase)
        wrong = draw.choice(["", 2 * letter, other, following + letter])
        wrong = before + wrong + ("" if wrong == following + letter else following) + after
        if len(wrong) > 4 and "." not in letter + following and wrong not in known:
            assert key in nearest(wrong, known), wrong


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("steps", ["steps"]),
        ("LR", ["optimizer.lr"]),
        ("learning_rate", ["optimizer.lr"]),
        ("optimizer.beta", ["model.beta", "optimizer.betas"]),
        ("wd", ["optimizer.weight_decay"]),
        ("weightdecay", ["optimizer.weight_decay"]),
        ("data_root", ["data.root"]),
        ("data-root", ["data.root"]),
        ("max_steps", ["steps"]),
        ("num-workers", ["data.workers"]),
        ("warmup", ["optimizer.warmup_steps", "model.beta_warmup_steps"]),
        ("optimiser.warmup", ["optimizer.warmup_steps"]),
        ("modle.warmup", ["model.beta_warmup_steps"]),
        ("accum", ["accumulation"]),
        ("checkpoint_every", ["every.checkpoint"]),
        ("zzz", []),
        ("epochs", []),
        ("x" * 10**6, []),
        ("", []),
    ],
    ids=lambda value: str(value)[:20],
)
def test_hints_for_common_mistakes(key: str, meant: list[str]) -> None:
    known = list(known_keys(Config(model=MODELS["vae"].config())))
    assert sorted(nearest(key, known)) == sorted(meant)


def test_a_list_in_words() -> None:
    assert [either(["a"]), either(["a", "b"]), either(["a", "b", "c"])] == ["a", "a or b", "a, b or c"]
