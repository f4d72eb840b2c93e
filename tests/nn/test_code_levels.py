import pytest
import torch

from vaescale.nn.code_levels import Levels

WIDTH = 8


def test_one_codebook_is_a_linear_map() -> None:
    torch.manual_seed(0)
    levels = Levels((5,), WIDTH, 1, 2)
    assert {name.split(".")[0] for name in levels.state_dict()} == {"embeddings", "outputs"}
    h, codes = torch.randn(3, 4, WIDTH), torch.randint(5, (3, 1, 4))
    (logits,) = levels(h, levels.embedded(codes))
    torch.testing.assert_close(logits, h @ levels.outputs[0].weight.T + levels.outputs[0].bias)
    torch.testing.assert_close(levels.embedded(codes)[:, 2, 0], levels.embeddings[0].weight[codes[:, 0, 2]])


@pytest.mark.parametrize("sizes", [(5,), (3, 4), (4, 2, 6, 3)])
def test_level_by_level_the_logits_are_the_same(sizes: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    levels = Levels(sizes, WIDTH, 2, 2)
    h = torch.randn(3, 4, WIDTH)
    codes = torch.stack([torch.randint(size, (3, 4)) for size in sizes], dim=1)
    embedded = levels.embedded(codes)
    assert embedded.shape == (3, 4, len(sizes), WIDTH)
    whole = levels(h, embedded)
    for level, size in enumerate(sizes):
        found = levels.next(h, list(embedded[..., :level, :].unbind(-2)))
        assert found.shape == (3, 4, size)
        torch.testing.assert_close(found, whole[level], rtol=0, atol=1e-5)


def test_positions_do_not_mix() -> None:
    """The transformer goes through the levels of each place alone."""
    torch.manual_seed(0)
    levels = Levels((3, 4), WIDTH, 1, 2)
    h, codes = torch.randn(2, 4, WIDTH), torch.zeros(2, 2, 4, dtype=torch.int64)
    before = levels(h, levels.embedded(codes))
    codes[0, 0, 1] = 2
    after = levels(h, levels.embedded(codes))
    changed = (after[1] - before[1]).abs().amax(-1) > 1e-6
    assert changed.nonzero().tolist() == [[0, 1]]
    torch.testing.assert_close(after[0], before[0])
