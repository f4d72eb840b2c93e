"""Pictures of what a Codec has learned: samples from its prior, and the effect of its latents and conditions.

Standard deviations of latents are those of draws from q(z|x) over validation images. They are about 1 if the draws fit
a prior N(0, I). `vary` and `traverse` use them in place of the prior, which a Codec does not expose.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..interfaces import Batch, Codec, Condition, Diffused, Sampled, Sampling, over_pixels
from ..monitoring.pictures import Picture, factor, grid, joined, legible
from .drawing import Unsupported, decoded, from_prior, in_turn, seeded
from .latents import moments, sums

PER_ROW = 8
WIDEST = 16  # classes, attributes or levels in one picture
IMAGES = 4  # images that the rows of one picture start from
VARIATIONS = 3
STRENGTHS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
DEVIATIONS = (-3, -2, -1, 0, 1, 2, 3)
ATTRIBUTE_VALUES = (-2, -1, 0, 1, 2)
TRAVERSED = 10  # latents
SAMPLES = 16  # per temperature, in a picture
TEMPERATURES = (0.7, 0.85, 1.0)
GUIDANCES = (1.0, 2.0, 4.0)


class Spread:
    """Statistics of each latent over images, all levels concatenated: fp64 [M] each."""

    def __init__(self, codec: Codec, batches: Iterable[Batch]) -> None:
        means: Tensor | float = 0.0
        draws: Tensor | float = 0.0
        images = 0
        for batch in batches:
            means = means + sums(codec.encode(batch))
            draws = draws + sums(codec.encode(batch, temperature=1.0))
            images += len(batch.x)
        assert isinstance(means, Tensor)
        assert isinstance(draws, Tensor)
        _, self.activity = moments(means, images)  # variance of the posterior mean
        self.mean, variance = moments(draws, images)
        self.deviation = variance.sqrt()


@dataclass(frozen=True)
class Subject:
    """A codec, and the images and settings that its pictures are made with."""

    codec: Codec
    shown: Batch  # images to start from, on the device
    several: Callable[[], Iterable[Batch]]  # returns many validation images, on the device
    # returns all training images, or their codes, on the device
    training: Callable[[], Iterable[Batch]] = list
    classes: Sequence[str] = ()  # names; empty if the codec has no class input
    attributes: Sequence[str] = ()
    seed: int = 0
    count: int = 64  # samples
    temperatures: Sequence[float] = (1.0,)

    @property
    def device(self) -> torch.device:
        return self.shown.x.device

    @cached_property
    def spread(self) -> Spread:
        with seeded(self.seed, self.device):
            return Spread(self.codec, self.several())


@torch.no_grad()
def generate(subject: Subject) -> dict[str, Picture]:
    """Samples z ~ p(z), and draws the mean of p(x|z) next to one draw from it for each z, with temperatures one below
    the other.

    The classes take turns, one per column; so do the attributes of the shown images.
    """
    classes = _some(subject.classes)
    per_row = len(classes) or PER_ROW
    condition = in_turn(subject.shown.condition, subject.count)
    if classes:
        labels = torch.tensor(list(classes), device=subject.device)
        condition = condition._replace(label=labels[torch.arange(subject.count, device=subject.device) % len(labels)])
    kinds = [(False, "mean of p(x|z)"), (True, "one draw from p(x|z)")]
    if isinstance(subject.codec, Sampled):
        kinds = [(False, "samples")]  # what is drawn from a prior is decoded to images, not to a distribution
    rows = []
    for temperature in subject.temperatures:
        blocks = []
        for draw, name in kinds:
            images = from_prior(subject.codec, condition, subject.seed, temperature, draw)
            title = name if isinstance(subject.codec, Diffused) else f"{name}, temperature {temperature:g}"
            blocks.append(grid(images, per_row, list(classes.values()), title=title))
        rows.append(joined(blocks, axis=1))
    return {"generate": joined(rows, axis=0)}


@torch.no_grad()
def interpolate(subject: Subject) -> dict[str, Picture]:
    """Interpolates between pairs of images, linearly and along a great circle (Shoemake 1985, "Animating rotation with
    quaternion curves"). Both ends are reconstructions. The class is that of the nearer image. Raises Unsupported for
    fewer than two images, or latents that are codes."""
    x = subject.shown
    if len(x.x) < 2:
        raise Unsupported("interpolate needs two images")
    latents = _continuous(subject, "cannot be interpolated")
    shares = torch.linspace(0, 1, PER_ROW + 1).tolist()
    images, rows = [], []
    for a in range(0, min(len(x.x), 2 * IMAGES) - 1, 2):
        for name, path in (("linear", torch.lerp), ("spherical", slerp)):
            ends = [(level[a : a + 1], level[a + 1 : a + 2]) for level in latents]
            between = [torch.cat([path(one, two, share) for share in shares]) for one, two in ends]
            nearer = torch.tensor([a + (share > 0.5) for share in shares], device=subject.device)
            attributes = torch.cat([torch.lerp(x.attributes[a], x.attributes[a + 1], share)[None] for share in shares])
            y = decoded(subject.codec, between, Condition(x.label[nearer], attributes))
            images += [x.x[a : a + 1], y, x.x[a + 1 : a + 2]]
            rows.append(name)
    columns = ["input", *(f"{share:g}" for share in shares), "input"]
    result = {"interpolate": grid(torch.cat(images), len(columns), columns, rows, "from one image to another")}
    if len(latents) > 1:
        result["interpolate_levels"] = _each_level(subject, latents, shares)
    return result


@torch.no_grad()
def vary(subject: Subject) -> dict[str, Picture]:
    """Draws variations of an image. One level of latents becomes μ + √(1 − a²) (z − μ) + a ζ, with the latents' mean μ
    and ζ of their standard deviations around 0, which preserves both. Of several levels the first k are kept and the
    others drawn from the prior. Raises Unsupported for latents that are codes."""
    latents = [level[:IMAGES] for level in _continuous(subject, "cannot be mixed with noise")]
    x = Batch(*(tensor[:IMAGES] for tensor in subject.shown))
    if len(latents) == 1:
        variations, columns = _mixed(subject, latents[0], x.condition)
        title = "latents of an image mixed with noise, other noise in each row"
    else:
        seeds = range(subject.seed, subject.seed + VARIATIONS)
        variations, columns = _redrawn(subject.codec, latents, x.condition, seeds)
        title = "coarse latents of an image kept, the finer ones drawn again in each row"
    images = []
    for number in range(len(x.x)):
        for row in variations:
            images += [x.x[number : number + 1], row[number]]
    return {"vary": grid(torch.cat(images), len(columns) + 1, ["input", *columns], title=title)}


@torch.no_grad()
def at_temperatures(codec: Codec, condition: Condition) -> Picture:
    """Draws samples from the prior under these conditions, at increasing temperatures one below the other, from the
    same noise. Raises Unsupported if there is no prior."""
    blocks = []
    for temperature in [1.0] if isinstance(codec, Diffused) else TEMPERATURES:
        images = from_prior(codec, in_turn(condition, SAMPLES), 0, temperature)
        # The blocks are almost as high as wide.
        text = 2 * legible(PER_ROW * factor(images.shape[-1]) * images.shape[-1])
        title = "samples" if isinstance(codec, Diffused) else f"samples, temperature {temperature:g}"
        blocks.append(grid(images, PER_ROW, title=title, text=text))
    return joined(blocks, axis=0)


@torch.no_grad()
def guided(drawn: Callable[[Sampling], Codec], condition: Condition) -> Picture | None:
    """Draws samples under these conditions with increasing guidance one below the other, from the same random numbers.
    Returns None if there is no condition, so that all are the same, or no guidance. drawn: the codec by its samples."""
    blocks, images = [], []
    for guidance in GUIDANCES:
        try:
            images.append(from_prior(drawn(Sampling(guidance=guidance)), in_turn(condition, SAMPLES), 0))
        except Unsupported:
            return None
        text = 2 * legible(PER_ROW * factor(images[0].shape[-1]) * images[0].shape[-1])
        blocks.append(grid(images[-1], PER_ROW, title=f"samples, guidance {guidance:g}", text=text))
    return None if torch.equal(images[0], images[1]) else joined(blocks, axis=0)


@torch.no_grad()
def progressive(codec: Codec, x: Batch) -> Picture:
    """Draws reconstructions from all levels of latents, from fewer and fewer, and from none; the finer levels are drawn
    from the prior. A level has the same noise in every column."""
    latents = codec.encode(x)
    (y,), columns = _redrawn(codec, latents, x.condition, [0])
    images = torch.cat([x.x[:, None], y], dim=1).flatten(0, 1)
    title = f"the coarsest of {len(latents)} levels kept, the finer ones drawn"
    return grid(images, len(columns) + 1, ["input", *columns], title=title)


@torch.no_grad()
def traverse(subject: Subject) -> dict[str, Picture]:
    """Moves one latent per row, the most active first (by the variance of its posterior mean, Burda et al. 2016), in
    steps of standard deviations away from the mean latents, and from those of the first image. Both use the condition
    of the first image. Raises Unsupported for latents that are codes."""
    latents = _continuous(subject, "cannot be moved in steps")
    spread, sizes = subject.spread, [level[0].numel() for level in latents]
    most = spread.activity.argsort(descending=True, stable=True)[:TRAVERSED].tolist()
    image = torch.cat([level[0].flatten() for level in latents]).double()
    blocks = []
    for begin, title in ((spread.mean, "around the mean latents, by standard deviations"), (image, "around an image")):
        row = begin.repeat(len(most), len(DEVIATIONS), 1)
        for number, latent in enumerate(most):
            steps = torch.tensor(DEVIATIONS, device=subject.device) * spread.deviation[latent]
            row[number, :, latent] += steps
        levels = row.flatten(0, 1).to(latents[0].dtype).split(sizes, dim=1)
        changed = [part.unflatten(1, level.shape[1:]) for part, level in zip(levels, latents, strict=True)]
        count = len(most) * len(DEVIATIONS)
        same = Condition(*(tensor[:1].expand(count, *tensor.shape[1:]) for tensor in subject.shown.condition))
        images = decoded(subject.codec, changed, same)
        names = [f"z{latent}, var {float(spread.activity[latent]):.2g}" for latent in most]
        blocks.append(grid(images, len(DEVIATIONS), [f"{step:+d}" for step in DEVIATIONS], names, title))
    return {"traverse": joined(blocks, axis=1)}


@torch.no_grad()
def swap(subject: Subject) -> dict[str, Picture]:
    """Decodes the same latents under other conditions: every class, and each attribute at several standard deviations
    from its mean. Raises Unsupported if the model has no condition or ignores it."""
    if not subject.classes and not subject.attributes:
        raise Unsupported("the model has neither class nor attributes as input, so there is nothing to swap")
    below = getattr(subject.codec, "codec", None)  # of a prior
    if isinstance(subject.codec, Sampled) and getattr(below, "conditioner", None) is None:
        raise Unsupported("the condition decides which latents are drawn, not how they are decoded")
    x = subject.shown
    latents = subject.codec.encode(x)
    result = {}
    if subject.classes:
        classes = _some(subject.classes)
        said = [x.condition._replace(label=torch.full_like(x.label, label)) for label in classes]
        columns = ["input", *classes.values()]
        images = torch.stack([x.x, *_under(subject, latents, said)], dim=1).flatten(0, 1)
        result["swap_classes"] = grid(
            images, len(columns), columns, title="the latents of the input decoded with every class"
        )
    if subject.attributes:
        columns = [f"{value:+d}" for value in ATTRIBUTE_VALUES]
        blocks = []
        for number, name in enumerate(subject.attributes[:WIDEST]):
            said = []
            for value in ATTRIBUTE_VALUES:
                attributes = x.attributes.clone()
                attributes[:, number] = value
                said.append(x.condition._replace(attributes=attributes))
            images = torch.stack([x.x, *_under(subject, latents, said)], dim=1)[:IMAGES].flatten(0, 1)
            blocks.append(grid(images, len(columns) + 1, ["input", *columns], title=f"{name}, in standard deviations"))
        result["swap_attributes"] = joined(blocks, axis=0)
    return result


MODES: dict[str, Callable[[Subject], dict[str, Picture]]] = {
    "generate": generate,
    "interpolate": interpolate,
    "vary": vary,
    "traverse": traverse,
    "swap": swap,
}


def slerp(a: Tensor, b: Tensor, share: float) -> Tensor:
    """Interpolates from a to b, one pair [1, …], along a great circle around 0, with linearly changing length."""
    one, two = a.double(), b.double()
    lengths = one.norm(), two.norm()
    cosine = ((one * two).sum() / (lengths[0] * lengths[1])).clamp(-1, 1)
    angle = cosine.acos()
    if not angle.sin() > 1e-6:  # collinear or of length 0: no unique circle
        return torch.lerp(a, b, share)
    parts = ((1 - share) * angle).sin() * one / lengths[0], (share * angle).sin() * two / lengths[1]
    return (sum(parts) / angle.sin() * torch.lerp(*lengths, share)).to(a.dtype)


def _continuous(subject: Subject, why: str) -> list[Tensor]:
    latents = subject.codec.encode(subject.shown)
    if over_pixels(subject.codec):
        raise Unsupported("the latents of this model are the images themselves")
    if not all(level.is_floating_point() for level in latents):
        raise Unsupported(f"the latents of this model are discrete codes, which {why}")
    return latents


def _mixed(subject: Subject, z: Tensor, condition: Condition) -> tuple[list[Tensor], list[str]]:
    """(uint8 [B, columns, C, H, W] for each variation, captions of the columns)."""
    mean, deviation = (values.view(z.shape[1:]) for values in (subject.spread.mean, subject.spread.deviation))
    generator = torch.Generator().manual_seed(subject.seed)
    variations = []
    for _ in range(VARIATIONS):
        noise = deviation * torch.randn(z.shape, generator=generator, dtype=torch.float64).to(z.device)
        mixed = [mean + (1 - a * a) ** 0.5 * (z - mean) + a * noise for a in STRENGTHS]
        y = [decoded(subject.codec, [one.to(z.dtype)], condition) for one in mixed]
        variations.append(torch.stack(y, dim=1))
    return variations, [f"a = {a:g}" for a in STRENGTHS]


def _each_level(subject: Subject, latents: Sequence[Tensor], shares: Sequence[float]) -> Picture:
    """Interpolates from the first image to the second in one level per row. The other levels and the condition stay
    those of the first image."""
    x = subject.shown
    levels, count = _some(range(len(latents))), len(shares)
    same = Condition(*(tensor[:1].expand(count, *tensor.shape[1:]) for tensor in x.condition))
    images = []
    for moved in levels:
        between = [level[:1].expand(count, *level.shape[1:]) for level in latents]
        one, two = latents[moved][:1], latents[moved][1:2]
        between[moved] = torch.cat([torch.lerp(one, two, share) for share in shares])
        images += [x.x[:1], decoded(subject.codec, between, same), x.x[1:2]]
    columns = ["input", *(f"{share:g}" for share in shares), "other"]
    rows = [f"level {level}" for level in levels]
    return grid(torch.cat(images), len(columns), columns, rows, "one level of latents at a time, coarse to fine")


def _redrawn(
    codec: Codec, latents: Sequence[Tensor], condition: Condition, seeds: Sequence[int]
) -> tuple[list[Tensor], list[str]]:
    """Like `_mixed`, with levels drawn again; one seed per variation."""
    fewer = list(reversed(_some(range(len(latents) + 1))))
    variations = []
    for seed in seeds:
        y = [from_prior(codec, condition, seed, given=latents[:kept]) for kept in fewer]
        variations.append(torch.stack(y, dim=1))
    return variations, [f"keep {kept}" for kept in fewer]


def _under(subject: Subject, latents: list[Tensor], conditions: list[Condition]) -> list[Tensor]:
    """Decodes the latents under each condition, uint8 [B, C, H, W] each. Raises Unsupported if all images are equal."""
    images = [decoded(subject.codec, latents, condition) for condition in conditions]
    if len(images) > 1 and all(torch.equal(images[0], other) for other in images[1:]):
        raise Unsupported("the images are the same for every condition: the model ignores it")
    return images


def _some(names: Sequence[object]) -> dict[int, str]:
    """At most WIDEST evenly spaced names, by index."""
    places = torch.linspace(0, len(names) - 1, min(WIDEST, len(names))).long().tolist()
    return {place: str(names[place]) for place in places}
