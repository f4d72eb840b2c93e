"""Pictures of a prior over codes: what it draws where some codes are given, and the training images nearest to what it
draws."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..interfaces import Batch, Known, WithPrior
from ..monitoring.pictures import Picture, grid
from ..nn.noise import mix
from .drawing import Unsupported, decoded
from .sample import IMAGES, PER_ROW, Subject

REDRAWN = 5  # variations with some codes given


def complete(subject: Subject) -> dict[str, Picture]:
    """Draws the lower half of the codes of images from the prior, given the upper half. Raises Unsupported without a
    prior over codes."""
    return {"complete": _drawn_again(subject, lambda y, _: y < 0.5, "codes of the upper half given, the others drawn")}


def inpaint(subject: Subject) -> dict[str, Picture]:
    """Draws the central quarter of the codes of images from the prior, given the others. Raises Unsupported without a
    prior over codes, and if its order is fixed, so that places depend on earlier ones only."""
    if isinstance(subject.codec, WithPrior) and not subject.codec.prior.any_order:
        raise Unsupported("the prior draws codes in raster order, so they cannot depend on those below")
    title = "codes of the central quarter drawn, the others given"
    return {"inpaint": _drawn_again(subject, lambda y, x: ((y - 0.5).abs() > 0.25) | ((x - 0.5).abs() > 0.25), title)}


@torch.no_grad()
def neighbours(subject: Subject) -> dict[str, Picture]:
    """Draws samples, and images held out from training, next to the training images with the most equal codes. If the
    prior copies training images, its samples have more equal codes than held-out images have. Raises Unsupported
    without a prior over codes."""
    codec, shown = subject.codec, Batch(*(tensor[:PER_ROW] for tensor in subject.shown))
    if not isinstance(codec, WithPrior):
        raise Unsupported("the model has no prior over codes")
    number = mix(subject.seed, torch.arange(len(shown.x), device=subject.device))
    drawn = codec.prior.draw(shown.condition, number, subject.temperatures[0], codec.sampling)
    wanted = torch.cat([drawn, codec.prior.codes(shown)])
    found, most = wanted.clone(), torch.full((len(wanted),), -1.0, device=subject.device)
    for batch in subject.training():
        codes = codec.prior.codes(batch)
        shares, place = torch.stack([(codes == one).flatten(1).float().mean(1) for one in wanted]).max(1)
        found = torch.where((shares > most)[:, None, None, None], codes[place], found)
        most = torch.maximum(shares, most)
    parts = slice(len(drawn)), slice(len(drawn), None)
    pairs = [codes[part] for part in parts for codes in (wanted, found)]
    tiles = [decoded(codec, list(codes.unbind(1)), shown.condition) for codes in pairs]
    blank, equal = [""] * len(drawn), [f"{share:.0%} equal" for share in most.tolist()]
    captions = [text for part in parts for text in (*blank, *equal[part])]
    names = ["samples", "nearest", "held out", "nearest"]
    title = "training images with the most equal codes"
    return {"neighbours": grid(torch.cat(tiles), len(drawn), [], names, title, captions)}


MODES: dict[str, Callable[[Subject], dict[str, Picture]]] = {"complete": complete, "inpaint": inpaint}
# Modes that read all training images.
SLOW: dict[str, Callable[[Subject], dict[str, Picture]]] = {"neighbours": neighbours}


@torch.no_grad()
def _drawn_again(subject: Subject, given: Callable[[Tensor, Tensor], Tensor], title: str) -> Picture:
    """Draws images next to variations in which only the codes at the given places are kept. given: (y, x) of the
    centres of the places in 0 … 1 → bool."""
    codec, x = subject.codec, Batch(*(tensor[:IMAGES] for tensor in subject.shown))
    if not isinstance(codec, WithPrior):
        raise Unsupported("the model has no prior over codes")
    codes = codec.prior.codes(x)
    sides = ((torch.arange(side, device=subject.device) + 0.5) / side for side in codes.shape[2:])
    where = given(*torch.meshgrid(*sides, indexing="ij"))
    known = Known(codes, where.expand(codes.shape[1:]))
    shown = where
    for axis in (0, 1):
        shown = shown.repeat_interleave(x.x.shape[axis + 2] // where.shape[axis], axis)
    columns = [x.x, torch.where(shown, x.x, 200).to(torch.uint8), decoded(codec, list(codes.unbind(1)), x.condition)]
    for variation in range(REDRAWN):
        number = mix(subject.seed, variation, torch.arange(len(x.x), device=subject.device))
        drawn = codec.prior.draw(x.condition, number, subject.temperatures[0], codec.sampling, known)
        columns.append(decoded(codec, list(drawn.unbind(1)), x.condition))
    names = ["input", "given", "all codes", *(f"draw {number}" for number in range(1, REDRAWN + 1))]
    return grid(torch.stack(columns, dim=1).flatten(0, 1), len(names), names, title=title)
