"""The names of layers are unambiguous, complete, and the same in both directions."""

import pytest
import torch
from torch import Tensor

from vaescale.config import ConfigError
from vaescale.formats import keys
from vaescale.formats.keys import COLUMNS, Library, Net, inferred, rows, to_ours, to_theirs
from vaescale.interfaces import Shape
from vaescale.models import kl, vqvae
from vaescale.nn import quantize, vqgan

NETS = [
    Net(vqgan.Config(channels=32, multipliers=[1], blocks=1, attention=[]), channels=1, dim=3, codes=7),
    Net(vqgan.Config(channels=32, multipliers=[1, 2], blocks=1, attention=[1]), channels=3, dim=4),
    Net(vqgan.Config(channels=32, multipliers=[1, 2, 2], blocks=3, attention=[2, 4], z_channels=5), 3, dim=8, codes=9),
    Net(vqgan.Config(channels=64, multipliers=[1, 1, 2, 2, 4], blocks=2, attention=[16]), channels=4, dim=16),
]
SMALL = NETS[2]


def state(net: Net) -> dict[str, Tensor]:
    """Random weights of a model with this network, without its statistics."""
    torch.manual_seed(0)
    shape = Shape(net.channels, 32)
    if net.codes:
        quantizer = quantize.Config(codebook_size=net.codes, dim=net.dim)
        model = vqvae.VQVAE(vqvae.Config(network=net.network, quantizer=quantizer), shape).state_dict()
        return {
            name: one for name, one in model.items() if name.startswith(("encoder", "decoder", "quantizer.codebook"))
        }
    model = kl.build(kl.Config(network=net.network, latent_dim=net.dim), shape).state_dict()
    return {name: one for name, one in model.items() if name.startswith("net.")}


@pytest.mark.parametrize("library", COLUMNS)
@pytest.mark.parametrize("net", NETS, ids=["one", "kl", "attention", "deep"])
def test_each_tensor_has_one_name_on_either_side(net: Net, library: Library) -> None:
    table, ours = rows(net, library), state(net)
    assert {row.ours: row.shape for row in table} == {name: tuple(tensor.shape) for name, tensor in ours.items()}
    assert len({row.theirs for row in table}) == len({row.ours for row in table}) == len(table)
    theirs = to_theirs(ours, table)
    assert {name: tuple(tensor.shape) for name, tensor in theirs.items()} == {
        row.theirs: row.their_shape for row in table
    }
    back = to_ours(theirs, table)
    assert back.keys() == ours.keys()
    assert all(torch.equal(back[name], ours[name]) for name in ours)
    assert inferred(theirs, library) == net


@pytest.mark.parametrize("table", [keys.ENDS, keys.PARTS, keys.BLOCKS], ids=["ends", "parts", "blocks"])
@pytest.mark.parametrize("column", range(3))
def test_no_name_stands_twice_in_a_column(table: dict[str, tuple[str, ...]], column: int) -> None:
    sides = [f"{ours.split('.')[0]}." if table is keys.BLOCKS else "" for ours in table]
    names = [f"{side}{theirs[column]}" for side, theirs in zip(sides, table.values(), strict=True)]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("library", COLUMNS)
def test_a_missing_an_extra_and_a_misshapen_tensor_are_named(library: Library) -> None:
    table, ours = rows(SMALL, library), state(SMALL)
    theirs = to_theirs(ours, table)
    named = {row.ours: row.theirs for row in table}
    bias, weight = "decoder.blocks.1.q.bias", "encoder.blocks.0.conv1.weight"
    for given, convert, name, other, where in (
        (ours, to_theirs, lambda ours: ours, lambda ours: named[ours], "there"),
        (theirs, to_ours, lambda ours: named[ours], lambda ours: ours, "here"),
    ):
        changed = {**given, name(weight): torch.zeros(32, 32, 1, 1), "loss.logvar": torch.zeros(())}
        del changed[name(bias)]
        with pytest.raises(ConfigError) as caught:
            convert(changed, table)
        shapes = "is 32×32×1×1 instead of 32×32×3×3"
        assert str(caught.value) == (
            f"the weights do not fit: {name(bias)} ({other(bias)} {where}) is missing, "
            f"loss.logvar has no counterpart {where}, "
            f"{name(weight)} ({other(weight)} {where}) {shapes}; give all weights of one network"
        )
    few = dict(list(theirs.items())[:4])
    with pytest.raises(ConfigError, match=f"and {len(table) - 4 - 3} more"):
        to_ours(few, table)


def test_attention_is_a_convolution_in_taming_and_a_linear_map_in_diffusers() -> None:
    ours = state(SMALL)
    for library, size in (("diffusers", (64, 64)), ("taming", (64, 64, 1, 1))):
        theirs = to_theirs(ours, rows(SMALL, library))
        assert tuple(next(one for name, one in theirs.items() if "mid" in name and "k.weight" in name).shape) == size


@pytest.mark.parametrize("library", COLUMNS)
def test_other_weights_are_refused(library: Library) -> None:
    theirs = to_theirs(state(SMALL), rows(SMALL, library))
    first = keys.ENDS["encoder.first"][COLUMNS.index(library)] + ".weight"
    for changed, sentence in (
        ({}, f"not weights of such a network of {library}: the convolution {first} is missing"),
        ({**theirs, first: torch.zeros(32)}, f"the convolution {first} is 32$"),
        (
            {**theirs, first: torch.zeros(48, 3, 3, 3)},
            r"have \[32, 64, 64\] channels: model.network.channels is the 48",
        ),
        ({name: one for name, one in theirs.items() if name != keys.CODEBOOK}, "post_quant_conv maps 8 channels to 5"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            inferred(changed, library)


def test_settings_that_no_network_has_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.network\.channels=48 must be a multiple of the 32 groups"):
        rows(Net(vqgan.Config(channels=48), 3, 4), "taming")
