"""A linear codec, of which every picture is known: latents are read back from the images that a grid shows."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from vaescale.evaluation import drawing, sample
from vaescale.evaluation.drawing import Unsupported
from vaescale.evaluation.sample import MODES, Subject
from vaescale.interfaces import Batch, Condition, Shape
from vaescale.models.vqvae import VQVAE, Config
from vaescale.nn import conv, noise

SIDE, M = 8, 4
W = torch.linalg.qr(torch.randn(SIDE**2, M + 2, generator=torch.Generator().manual_seed(0)))[0]
SCALE = torch.tensor([0.1, 1.2, 0.4, 0.8])  # standard deviations of the posterior means over images
NOISE = 0.3  # that of q(z|x)
CONTRAST = 0.1  # of a latent of 1: pixels stay inside [0, 1]
CLOSE = 0.08  # of latents read back from pixels of 8 bits


def pixels(z: Tensor) -> Tensor:
    """[B, m] → [B, 1, H, W]; beyond the latents there are two directions, of the class and of the attribute."""
    return 0.5 + CONTRAST * (z @ W[:, : z.shape[1]].T).view(-1, 1, SIDE, SIDE)


def read(images: Tensor) -> Tensor:
    """uint8 [..., 1, H, W] → [..., M + 2]."""
    return (images.flatten(-3).float() / 255 - 0.5) @ W / CONTRAST


class Linear:
    """Latents of one level, or of one and then M − 1; a draw is a mean and a little brighter; noise is drawn for it."""

    def __init__(self, levels: int = 1, prior: bool = True) -> None:
        self.sizes = [M] if levels == 1 else [1, M - 1]
        self.prior = prior

    def encode(self, batch: Batch, temperature: float = 0.0) -> list[Tensor]:
        z = read(batch.x)[:, :M]
        z = z + NOISE * temperature * torch.randn(z.shape) if temperature else z
        return list(z.split(self.sizes, dim=1))

    def decode(
        self,
        latents: list[Tensor],
        condition: Condition | None = None,
        temperature: float = 1.0,
        draw: bool = False,
        sample: Tensor | None = None,
    ) -> Tensor:
        assert condition is not None
        assert sample is None or len(sample) == len(condition.label)
        if not self.prior and len(latents) < len(self.sizes):
            raise ValueError("an autoencoder has no prior")
        drawn = []
        for level in range(len(latents), len(self.sizes)):
            assert sample is not None
            drawn.append(temperature * noise.normal(sample, (self.sizes[level],), level))
        told = torch.stack([condition.label / 2, condition.attributes[:, 0]], dim=1)
        brighter = 0.1 * (1 + 0 * torch.rand(())) if draw else 0.0
        return pixels(torch.cat([*latents, *drawn, told], dim=1)) + brighter


def batch(count: int, seed: int) -> Batch:
    z = torch.randn(count, M, generator=torch.Generator().manual_seed(seed)) * SCALE
    x = (pixels(z) * 255).round().to(torch.uint8)
    return Batch(x, torch.arange(count) % 3, torch.linspace(-1, 1, count)[:, None], torch.arange(count))


def subject(codec: object = None, images: int = 5, **changes: object) -> Subject:
    """Its first image is of class 0."""
    given = {"classes": ["zero", "one", "two"], "attributes": ["age"], **changes}
    return Subject(codec or Linear(), batch(images, 1), lambda: [batch(300, 2), batch(200, 3)], **given)


class Shown(NamedTuple):
    images: Tensor
    per_row: int
    columns: Sequence[str] = ()
    rows: Sequence[str] = ()
    title: str = ""
    text: int = 0


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[Shown]:
    """Every grid that is made."""
    made: list[Shown] = []
    grid = sample.grid

    def watched(*arguments: object, **named: object) -> sample.Picture:
        made.append(Shown(*arguments, **named))
        return grid(*arguments, **named)

    monkeypatch.setattr(sample, "grid", watched)
    return made


def latents(grid: Shown) -> Tensor:
    """[rows, columns, M + 2]."""
    return read(grid.images).view(-1, grid.per_row, M + 2)


def close(a: Tensor, b: Tensor) -> None:
    np.testing.assert_allclose(a.numpy(), np.broadcast_to(b.numpy(), a.shape), atol=CLOSE)


def test_generate_shows_the_prior_at_each_temperature(shown: list[Shown]) -> None:
    sample.generate(subject(count=600, temperatures=[0.0, 0.5, 1.0], classes=[]))
    assert [grid.title for grid in shown[::2]] == [f"mean of p(x|z), temperature {t}" for t in ("0", "0.5", "1")]
    for temperature, mean in zip((0, 0.5, 1), shown[::2], strict=True):
        z = read(mean.images)[:, :M]
        assert z.std(0).numpy() == pytest.approx([temperature] * M, abs=0.09)  # 600 draws: 3 standard errors
        assert z.mean(0).numpy() == pytest.approx([0] * M, abs=0.13)


def test_a_draw_stands_beside_its_mean(shown: list[Shown]) -> None:
    """Of the same latents, over more images than are decoded at once."""
    sample.generate(subject(count=150))
    mean, draw = shown
    difference = draw.images.int() - mean.images.int()
    assert difference.float().mean() == pytest.approx(25.5, abs=0.2)
    assert int(difference.min()) >= 25
    assert int(difference.max()) <= 26


def test_generate_gives_each_class_a_column(shown: list[Shown]) -> None:
    sample.generate(subject(count=9))
    assert (shown[0].per_row, shown[0].columns) == (3, ["zero", "one", "two"])
    close(latents(shown[0])[..., M], torch.tensor([0, 0.5, 1]))
    attributes = torch.linspace(-1, 1, 5)[torch.arange(9) % 5].view(3, 3)
    close(latents(shown[0])[..., M + 1], attributes)


def test_interpolate_walks_straight_and_along_a_circle(shown: list[Shown]) -> None:
    """5 images are two pairs; the first and the last picture of a row are the images themselves."""
    one = subject(attributes=[])
    sample.interpolate(one)
    (grid,) = shown
    assert grid.rows == ["linear", "spherical"] * 2
    z, ends = latents(grid)[..., :M], read(one.shown.x)[:, :M]
    shares = np.linspace(0, 1, 9)
    for pair in (0, 1):
        a, b = ends[2 * pair].numpy().astype(float), ends[2 * pair + 1].numpy().astype(float)
        for row in (2 * pair, 2 * pair + 1):
            close(z[row, 0], ends[2 * pair])
            close(z[row, -1], ends[2 * pair + 1])
        np.testing.assert_allclose(z[2 * pair, 1:-1], a + shares[:, None] * (b - a), atol=CLOSE)
        # In the plane of a and b, with a along the first axis, a circle's points have these angles.
        along = a / np.linalg.norm(a)
        across = b - (b @ along) * along
        across /= np.linalg.norm(across)
        angle = shares * math.atan2(b @ across, b @ along)
        length = np.linalg.norm(a) + shares * (np.linalg.norm(b) - np.linalg.norm(a))
        circle = length[:, None] * (np.cos(angle)[:, None] * along + np.sin(angle)[:, None] * across)
        np.testing.assert_allclose(z[2 * pair + 1, 1:-1], circle, atol=CLOSE)


def test_interpolate_says_the_class_of_the_nearer_image(shown: list[Shown]) -> None:
    sample.interpolate(subject())
    rows = latents(shown[0])[:, 1:-1]
    close(rows[0, :, M], torch.tensor([0, 0, 0, 0, 0, 0.5, 0.5, 0.5, 0.5]))
    close(rows[0, :, M + 1], torch.linspace(-1, -0.5, 9))


@pytest.mark.parametrize("b", [[0.0, 0.0, 0.0], [2.0, 4.0, 6.0], [-1.0, -2.0, -3.0]], ids=["zero", "same", "opposite"])
def test_where_there_is_no_one_circle_the_line_is_taken(b: list[float]) -> None:
    a = torch.tensor([[1.0, 2.0, 3.0]])
    assert torch.allclose(sample.slerp(a, torch.tensor([b]), 0.3), torch.lerp(a, torch.tensor([b]), 0.3))


def test_vary_mixes_with_noise_of_the_latents_spread(shown: list[Shown]) -> None:
    """z' = m + √(1 − a²)(z − m) + a ζ: from each picture ζ is read back, the same one along a row."""
    one = subject()
    sample.vary(one)
    (grid,) = shown
    assert grid.columns == ["input", "a = 0", "a = 0.2", "a = 0.4", "a = 0.6", "a = 0.8", "a = 1"]
    z = latents(grid)[..., :M].view(4, sample.VARIATIONS, 7, M).double()
    own, mean = read(one.shown.x[:4])[:, None, :M].double(), one.spread.mean
    close(z[:, :, 0], own)
    close(z[:, :, 1], own)
    zeta = z[:, :, 6] - mean
    for column, a in enumerate(sample.STRENGTHS, start=1):
        close(z[:, :, column], mean + math.sqrt(1 - a * a) * (own - mean) + a * zeta)
    assert (zeta[:, 0] - zeta[:, 1]).abs().max() > 0.5
    expected = (SCALE**2 + NOISE**2).sqrt().numpy()
    assert one.spread.deviation.numpy() == pytest.approx(expected, rel=0.1)  # of 500 images
    normal = (zeta / one.spread.deviation).flatten()
    assert float(normal.square().mean()) == pytest.approx(1, abs=0.6)  # of 48 numbers


def test_vary_keeps_the_coarse_latents_of_several_levels(shown: list[Shown]) -> None:
    one = subject(Linear(levels=2))
    sample.vary(one)
    (grid,) = shown
    assert grid.columns == ["input", "keep 2", "keep 1", "keep 0"]
    z = latents(grid).view(4, sample.VARIATIONS, 4, M + 2)
    own = read(one.shown.x[:4])[:, None, :M]
    close(z[:, :, 2, 0], own[..., 0])
    close(z[..., 1:, M], (one.shown.label[:4] / 2)[:, None, None])
    for column, drawn in ((2, slice(1, M)), (3, slice(0, M))):
        assert ((z[:, :, column, drawn] - own[..., drawn]).abs().amax(-1) > CLOSE).all()
        assert ((z[:, 0, column, drawn] - z[:, 1, column, drawn]).abs().amax(-1) > CLOSE).all()


def test_each_level_is_moved_alone(shown: list[Shown]) -> None:
    one = subject(Linear(levels=2))
    sample.interpolate(one)
    grid = shown[1]
    assert grid.rows == ["level 0", "level 1"]
    z, (a, b) = latents(grid)[:, 1:-1], read(one.shown.x[:2])[:, :M]
    shares = torch.linspace(0, 1, 9)[:, None]
    close(z[0, :, :1], torch.lerp(a[:1], b[:1], shares))
    close(z[0, :, 1:M], a[1:])
    close(z[1, :, 1:M], torch.lerp(a[1:], b[1:], shares))
    close(z[1, :, 0], a[0])
    close(z[..., M], torch.tensor(0.0))  # the first image's class


def test_progressive_keeps_ever_fewer_levels(shown: list[Shown]) -> None:
    one = subject(Linear(levels=2))
    sample.progressive(one.codec, one.shown)
    (grid,) = shown
    assert grid.columns == ["input", "keep 2", "keep 1", "keep 0"]
    z, own = latents(grid)[..., :M], read(one.shown.x)[:, :M]
    close(z[:, 1], own)
    close(z[:, 2, 0], own[:, 0])
    assert ((z[:, 2, 1:] - own[:, 1:]).abs().amax(-1) > CLOSE).all()


def test_samples_of_higher_temperatures_come_from_the_same_noise(shown: list[Shown]) -> None:
    one = subject()
    sample.at_temperatures(one.codec, one.shown.condition)
    assert [grid.title for grid in shown] == [f"samples, temperature {t:g}" for t in sample.TEMPERATURES]
    first, *others = (read(grid.images)[:, :M] for grid in shown)
    for temperature, z in zip(sample.TEMPERATURES[1:], others, strict=True):
        close(z, first * temperature / sample.TEMPERATURES[0])


def test_samples_are_numbered() -> None:
    """Which others are drawn with a sample does not matter."""
    told = drawing.in_turn(batch(5, 0).condition, 150)
    whole = drawing.from_prior(Linear(), told, seed=7)
    for part in (slice(0, 3), slice(63, 150), slice(149, 150)):
        said = Condition(told.label[part], told.attributes[part])
        assert torch.equal(drawing.from_prior(Linear(), said, seed=7, first=part.start), whole[part])
    assert not torch.equal(drawing.from_prior(Linear(), told, seed=8), whole)


def test_given_latents_are_kept_however_many_images_there_are() -> None:
    coarse = torch.linspace(-2, 2, 150)[:, None]
    told = drawing.in_turn(batch(5, 0).condition, 150)
    z = read(drawing.from_prior(Linear(levels=2), told, seed=0, given=[coarse]))
    close(z[:, 0], coarse[:, 0])
    close(z[:, M], told.label / 2)
    assert z[:, 1:M].std(0).numpy() == pytest.approx([1] * (M - 1), abs=0.18)  # 150 draws: 3 standard errors


def test_traverse_changes_one_latent_a_row_the_most_active_first(shown: list[Shown]) -> None:
    one = subject()
    sample.traverse(one)
    around_mean, around_image = shown
    order = [1, 3, 2, 0]
    assert [row.split(",")[0] for row in around_mean.rows] == [f"z{latent}" for latent in order]
    assert [float(row.split()[-1]) for row in around_mean.rows] == pytest.approx([1.44, 0.64, 0.16, 0.01], rel=0.2)
    assert around_mean.columns == ["-3", "-2", "-1", "+0", "+1", "+2", "+3"]
    for grid, middle in ((around_mean, one.spread.mean), (around_image, read(one.shown.x[0])[:M].double())):
        z = latents(grid)[..., :M].double()
        for row, latent in enumerate(order):
            expected = middle.repeat(7, 1)
            expected[:, latent] += torch.arange(-3, 4) * one.spread.deviation[latent]
            close(z[row], expected)


def test_swap_changes_the_condition_and_nothing_else(shown: list[Shown]) -> None:
    one = subject()
    assert list(sample.swap(one)) == ["swap_classes", "swap_attributes"]
    classes, age = shown
    own = read(one.shown.x)[:, :M]
    assert classes.columns == ["input", "zero", "one", "two"]
    z = latents(classes)[:, 1:]
    close(z[..., :M], own[:, None])
    close(z[..., M], torch.tensor([0, 0.5, 1]))
    close(z[..., M + 1], one.shown.attributes)
    z = latents(age)[:, 1:]
    close(z[..., :M], own[:4, None])
    close(z[..., M], one.shown.label[:4, None] / 2)
    close(z[..., M + 1], torch.arange(-2, 3).float())
    assert age.title == "age, in standard deviations"


@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("mode", MODES)
def test_the_same_seed_gives_the_same_picture_and_leaves_torchs_alone(mode: str, levels: int) -> None:
    state = torch.get_rng_state()
    pictures = []
    for seed in (3, 3, 4):
        torch.manual_seed(len(pictures))
        before = torch.get_rng_state()
        pictures.append(MODES[mode](subject(Linear(levels), seed=seed, count=16)))
        assert torch.equal(torch.get_rng_state(), before)
    torch.set_rng_state(state)
    first, again, other = ([picture.tobytes() for picture in made.values()] for made in pictures)
    assert first == again
    if mode in ("generate", "vary"):
        assert first != other


def refusals() -> list[tuple[str, Callable[[], Subject], str]]:
    def codes() -> Subject:
        model = VQVAE(Config(network=conv.Config(width=4, residual_width=2, downsample_factor=2)), Shape(1, SIDE))
        return subject(model, classes=[], attributes=[])

    no_prior = Linear(prior=False)
    return [
        ("generate", lambda: subject(no_prior), "an autoencoder has no prior"),
        ("generate", codes, "a VQ-VAE has no prior of its own"),
        ("interpolate", codes, "latents of this model are discrete codes"),
        ("vary", codes, "latents of this model are discrete codes"),
        ("traverse", codes, "latents of this model are discrete codes"),
        ("vary", lambda: subject(Linear(2, prior=False)), "an autoencoder has no prior"),
        ("interpolate", lambda: subject(images=1), "needs two images"),
        ("swap", lambda: subject(classes=[], attributes=[]), "neither class nor attributes"),
        ("swap", lambda: subject(Deaf()), "the model ignores it"),
    ]


class Deaf(Linear):
    def decode(self, latents: list[Tensor], condition: Condition | None = None, *rest: object) -> Tensor:
        return pixels(latents[0])


@pytest.mark.parametrize(("mode", "make", "why"), refusals())
def test_what_a_codec_has_not_is_one_sentence(mode: str, make: Callable[[], Subject], why: str) -> None:
    with pytest.raises(Unsupported, match=why):
        MODES[mode](make())


def test_an_autoencoder_can_do_the_rest() -> None:
    one = subject(Linear(prior=False))
    for mode in ("interpolate", "vary", "traverse", "swap"):
        assert MODES[mode](one)
