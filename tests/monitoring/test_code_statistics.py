"""What is reported of codebooks against a plain numpy count of their codes, and their pictures."""

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.nn.test_quantize import batches
from vaescale.interfaces import Batch, Shape
from vaescale.models import vqvae
from vaescale.monitoring import code_statistics, pictures
from vaescale.nn import conv, quantize
from vaescale.nn.quantize import Config, build

DIM = 12


@pytest.mark.parametrize(
    "config",
    [
        Config(codebook_size=30, dim=DIM, dead_after=3, reset_every=4),
        Config(codebook_size=30, dim=DIM, learning="gradient", groups=2, depth=2, dead_after=3, reset_every=4),
        Config(kind="fsq", codebook_size=60, dim=DIM, levels=[5, 4, 3], codebook_dim=6, groups=2),
        Config(kind="lfq", codebook_size=64, dim=DIM, groups=2),
    ],
    ids=str,
)
def test_numbers_are_those_of_a_plain_count(config: Config) -> None:
    """Each codebook's, over 60 steps of 4 micro-batches, the last report being after step 40."""
    torch.manual_seed(0)
    quantizer = build(config, seed=3)
    steps = []  # of each step the codes [N, L]
    for step, z in enumerate(batches(60, 80, DIM)):
        steps.append(torch.cat([quantizer(part).codes.view(20, -1) for part in z.chunk(4)]).numpy())
        quantizer.update(step, lr=0.01)
        if step == 39:
            quantizer.usages(clear=True)
    begin = [level % config.depth if config.kind == "vq" else -1 for level in range(len(quantizer.sizes))]
    for level, (size, usage) in enumerate(zip(quantizer.sizes, quantizer.usages(clear=False), strict=True)):
        counts = np.stack([np.bincount(codes[:, level], minlength=size) for codes in steps])
        counts[: begin[level] + 1] = 0  # the codes of before a codebook's initialisation say nothing
        average = np.zeros(size)
        for row in counts:
            average = 0.99 * average + 0.01 * row
        window = counts[40:].sum(0)
        share = window[window > 0] / window.sum()
        bits = -(share * np.log2(share)).sum()
        numbers = code_statistics.scalars(usage)
        assert numbers["usage_window"] == (window > 0).mean()
        assert numbers["usage_ever"] == (counts.sum(0) > 0).mean()
        assert numbers["usage_ema"] == (average / average.sum() >= 0.01 / size).mean()
        assert numbers["entropy"] == pytest.approx(bits)
        assert numbers["entropy_share"] == pytest.approx(bits / np.log2(size))
        assert numbers["perplexity"] == pytest.approx(2**bits)
        np.testing.assert_allclose(usage.average.numpy(), average, rtol=1e-4)
        assert int(usage.steps) == 20


def test_resets_are_a_mean_over_the_steps_of_the_window() -> None:
    """Rows at one point: of 9 codes, all but one die, and are replaced every fourth step."""
    quantizer = build(Config(codebook_size=9, dim=2, dead_after=1, reset_every=4), seed=0)
    for step in range(17):
        quantizer(torch.full((20, 2), 0.5))
        quantizer.update(step, lr=0.1)
        if step == 0:
            (first,) = quantizer.usages(clear=True)
    assert code_statistics.scalars(first)["resets_per_step"] == 9
    (usage,) = quantizer.usages(clear=False)
    assert code_statistics.scalars(usage)["resets_per_step"] == 4 * 8 / 16


@pytest.mark.parametrize("kind", ["vq", "simvq"])
def test_commitment_is_each_codebooks_own(kind: str) -> None:
    """Groups of residuals: the squared distance between what each codebook is given and the code it takes."""
    config = Config(kind=kind, codebook_size=30, dim=DIM, groups=2, depth=3)  # type: ignore[arg-type]
    torch.manual_seed(0)
    quantizer = build(config, seed=3)
    for step, z in enumerate(batches(8, 80, DIM)):
        quantizer(z)
        quantizer.update(step, lr=0.01)
    (z,) = batches(1, 80, DIM, seed=9)
    out = quantizer(z)
    expected = []
    for group, rest in enumerate(z.double().chunk(2, dim=1)):
        for level in range(3):
            e = quantizer.parts[group].parts[level].lookup(out.codes[:, 3 * group + level]).detach().double()
            rest = rest - e
            expected.append(rest.square().mean())
    torch.testing.assert_close(out.commitment.double(), torch.stack(expected), rtol=1e-5, atol=1e-6)
    assert not out.commitment.requires_grad


def test_a_hundredth_of_the_even_share_is_in_use() -> None:
    """K = 4: shares of 1/400 and below."""
    average = torch.tensor([397.0, 1.0, 1.01, 0.99])
    assert code_statistics.in_use(average / 7).tolist() == [True, True, True, False]
    assert not code_statistics.in_use(torch.zeros(4)).any()


class Painter:
    """Decodes codes (red, green) to uniform colours; counts what it is asked at once."""

    largest = 0

    def encode(self, batch: Batch) -> list[Tensor]:
        raise NotImplementedError

    def decode(self, latents: list[Tensor], label: Tensor | None = None, temperature: float = 1.0) -> Tensor:
        del label, temperature
        red, green = latents
        assert (red.shape[1:], green.shape[1:]) == ((2, 2), (4, 4))
        self.largest = max(self.largest, len(red))
        assert (red == red[:, :1, :1]).all()
        assert (green == green[:, :1, :1]).all()
        colours = torch.stack([red[:, 0, 0], green[:, 0, 0], torch.full_like(red[:, 0, 0], 128)], dim=1) / 255
        return colours[:, :, None, None].expand(-1, -1, 8, 8)


def test_codes_are_decoded_alone() -> None:
    """The first codebook with the other at its most used code, 7; the second with the first at its greyest in use."""
    painter = Painter()
    averages = [torch.arange(200.0), torch.zeros(90).index_fill_(0, torch.tensor([7]), 5.0)]
    averages[0][128] = 0  # the greyest of all is not in use
    (reds, red), (greens, green) = code_statistics.decoded(painter, averages, [torch.Size([2, 2]), torch.Size([4, 4])])
    assert reds[:3].tolist() == [199, 198, 197]
    assert sorted(reds.tolist()) == list(range(200))
    assert red[:, :, 3, 3].tolist() == [[code, 7, 128] for code in reds.tolist()]
    assert greens[0] == 7
    assert green[:, :, 3, 3].tolist() == [[127, code, 128] for code in greens.tolist()]
    assert painter.largest <= code_statistics.CHUNK


def test_of_many_codes_evenly_spread_ones_are_shown() -> None:
    codes = code_statistics.most_used_first(-torch.arange(5000.0))
    assert len(codes) == len(codes.unique()) == code_statistics.SHOWN
    assert (codes[0], codes[-1]) == (0, 4999)
    assert 9 <= int(codes.diff().min()) <= int(codes.diff().max()) <= 10


@pytest.mark.parametrize(
    "config",
    [
        Config(codebook_size=20, dim=6, depth=2),
        Config(codebook_size=20, dim=6, groups=2),
        Config(kind="fsq", codebook_size=60, dim=6, levels=[5, 4, 3], codebook_dim=3),
        Config(kind="lfq", codebook_size=64, dim=6),
    ],
    ids=str,
)
def test_every_kind_shows_its_codes(config: quantize.Config) -> None:
    model = vqvae.VQVAE(vqvae.Config(network=conv.Config(width=8, residual_width=4), quantizer=config), Shape()).eval()
    averages = [torch.rand(size) for size in model.quantizer.sizes]
    shapes = [torch.Size([4, 4])] * len(averages)
    shown = list(code_statistics.decoded(model, averages, shapes))
    assert [len(codes) for codes, _ in shown] == list(model.quantizer.sizes)
    codes, tiles = shown[0]
    others = [average.argmax().expand(1, 4, 4) for average in averages[1:]]
    for place in (0, len(codes) - 1):
        whole = model.decode([codes[place].expand(1, 4, 4), *others])
        # one picture at a time may round otherwise than 32 at once
        assert (tiles[place].int() - pictures.to_bytes(whole)[0].int()).abs().max() <= 1


@pytest.mark.parametrize("channels", [1, 3])
def test_the_picture_strikes_out_what_is_not_in_use(channels: int) -> None:
    tiles = torch.arange(5, dtype=torch.uint8).mul(40).view(5, 1, 1, 1).expand(5, channels, 48, 48)
    codes = torch.tensor([4, 0, 3, 1, 2])
    sheet = pictures.codebook(tiles, codes, torch.tensor([True, True, False, True, True]), per_row=3)
    side = pictures.TILE
    for number, code in enumerate(codes.tolist()):
        row, place = divmod(number, 3)
        top, left = pictures.line_height(pictures.TEXT) + row * (side + 2) + 2, place * (side + 2) + 2
        shown = sheet[top : top + side, left : left + side]
        assert (shown[2, 2] == 40 * number).all()
        assert (shown == 40 * number).all() == (code != 2)
