"""Draws images from the prior of a Codec, and decodes latents, a bounded number of images at a time."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ..data import order
from ..interfaces import Codec, Condition
from ..monitoring.pictures import to_bytes
from ..nn.noise import mix
from ..numerics import exact

AT_ONCE = 64  # images decoded together


class Unsupported(ValueError):
    """Raised if this codec has no such pictures; the message says why in one sentence."""


@torch.no_grad()
@exact()
def from_prior(
    codec: Codec,
    condition: Condition,
    seed: int,
    temperature: float = 1.0,
    draw: bool = False,
    given: Sequence[Tensor] = (),
    first: int = 0,
) -> Tensor:
    """Returns samples `first`, `first` + 1, … from the prior, uint8 [B, C, H, W], with B that of the condition. The
    latents of sample i depend only on (seed, i), whatever is drawn together; those of `draw` are the same. What `draw`
    adds is the same for the same seed, `first` and B.

    `given` fixes the coarsest levels of latents. Raises Unsupported if there is no prior.
    """
    images, device = [], condition.label.device
    numbers = mix(seed, torch.arange(first, first + len(condition.label), device=device))
    for start in range(0, len(numbers), AT_ONCE):
        part = slice(start, start + AT_ONCE)
        said = Condition(condition.label[part], condition.attributes[part])
        kept = [level[part] for level in given]
        with seeded(int(order.mix(seed, first + start)) >> 1, device):
            try:
                images.append(to_bytes(codec.decode(kept, said, temperature, draw, numbers[part])))
            except ValueError as error:
                raise Unsupported(str(error)) from None
    return torch.cat(images)


def in_turn(condition: Condition, count: int) -> Condition:
    """Repeats the conditions of the images in turn, up to `count`."""
    place = torch.arange(count, device=condition.label.device) % len(condition.label)
    return Condition(*(tensor[place] for tensor in condition))


@exact()
def decoded(codec: Codec, latents: Sequence[Tensor], condition: Condition) -> Tensor:
    """Returns the means of p(x|z), uint8 [B, C, H, W]."""
    images = []
    for start in range(0, len(condition.label), AT_ONCE):
        part = slice(start, start + AT_ONCE)
        said = Condition(condition.label[part], condition.attributes[part])
        images.append(to_bytes(codec.decode([level[part] for level in latents], said)))
    return torch.cat(images)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seeds torch's default generators inside the context, and restores their state afterwards."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
