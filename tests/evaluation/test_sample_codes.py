from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models.codes import prior
from vaescale.evaluation import sample_codes
from vaescale.evaluation.drawing import Unsupported
from vaescale.evaluation.sample import Subject
from vaescale.evaluation.sample_codes import MODES, complete, inpaint, neighbours
from vaescale.interfaces import Batch
from vaescale.models.generative import generative

SIDE, SIZE = 4, 200  # pixels are codes


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The arguments of every grid that is made."""
    made: list[tuple[Any, ...]] = []

    def grid(*arguments: Any, **more: Any) -> str:
        made.append((*arguments, *more.values()))
        return "picture"

    monkeypatch.setattr(sample_codes, "grid", grid)
    return made


def batch(x: Tensor | None = None) -> Batch:
    x = torch.zeros(3, 1, SIDE, SIDE, dtype=torch.uint8) if x is None else x
    return Batch(x, torch.full((len(x),), -1), torch.zeros(len(x), 0), torch.arange(len(x)))


@pytest.mark.parametrize(("mode", "order"), [("complete", "raster"), ("complete", "masked"), ("inpaint", "random")])
def test_given_codes_are_kept_and_the_others_drawn(shown: list[tuple[Any, ...]], mode: str, order: str) -> None:
    """Pixels are codes: 4 × 4 with K = 200."""
    codec = generative(prior((200,), side=4, order=order))
    x = torch.randint(200, (3, 1, 4, 4), generator=torch.Generator().manual_seed(0)).byte()
    MODES[mode](Subject(codec, batch(x), list))
    ((images, *_),) = shown
    drawn = images.unflatten(0, (3, -1))
    assert torch.equal(drawn[:, 0], x)
    assert torch.equal(drawn[:, 2], x)
    given = torch.ones(4, 4, dtype=torch.bool)
    given[(slice(2, 4), slice(None)) if mode == "complete" else (slice(1, 3), slice(1, 3))] = False
    for variation in drawn[:, 3:].unbind(1):
        assert torch.equal(variation[..., given], x[..., given])
        assert not torch.equal(variation[..., ~given], x[..., ~given])
    assert not torch.equal(drawn[:, 3], drawn[:, 4])


def test_codes_need_a_prior_to_be_completed_and_one_of_any_order_to_be_inpainted() -> None:
    with pytest.raises(Unsupported, match="no prior over codes"):
        complete(Subject(prior().codec, batch(), list))
    with pytest.raises(Unsupported, match="in raster order, so they cannot depend on those below"):
        inpaint(Subject(generative(prior()), batch(), list))


def test_the_nearest_training_images_have_the_most_equal_codes(shown: list[tuple[Any, ...]]) -> None:
    """Against all distances at once. A held-out image that was trained on is found."""
    generator = torch.Generator().manual_seed(0)
    training = torch.randint(3, (40, 1, SIDE, SIDE), generator=generator).byte()
    held_out = torch.randint(3, (3, 1, SIDE, SIDE), generator=generator).byte()
    held_out[1] = training[35]
    codec = generative(prior((3,), side=SIDE))
    batches = [batch(part) for part in training.split(16)]
    neighbours(Subject(codec, batch(held_out), list, training=lambda: batches))
    ((tiles, per_row, _, _, _, captions),) = shown
    assert per_row == 3
    samples, nearest, held, nearest_held = tiles.split(3)
    assert torch.equal(held, held_out)
    for images, found, said in ((samples, nearest, captions[3:6]), (held, nearest_held, captions[9:])):
        equal = (images[:, None] == training[None]).flatten(2).float().mean(2)
        assert said == [f"{share:.0%} equal" for share in equal.amax(1).tolist()]
        assert torch.equal((images == found).flatten(1).float().mean(1), equal.amax(1))
    assert torch.equal(nearest_held[1], training[35])
