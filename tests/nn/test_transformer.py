import math

import pytest
import torch
from torch import Tensor, nn

from vaescale.nn import noise
from vaescale.nn.transformer import Block, Cache, Dropout, Transformer, grid, rotated, turning

WIDTH, HEADS = 24, 2
DIM = WIDTH // HEADS


def test_a_rotation_is_a_product_of_complex_numbers() -> None:
    x, angles = torch.randn(2, 3, 5, 8), torch.randn(5, 4)
    turned = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones(5, 4), angles)
    torch.testing.assert_close(rotated(x, turning(angles)), torch.cat([turned.real, turned.imag], dim=-1))


def test_the_grid_has_the_rows_first_and_wavelengths_up_to_its_base() -> None:
    angles = grid(3, 4, 16, torch.device("cpu")).view(3, 4, 8)
    rates = torch.tensor([100 ** (-i / 4) for i in range(4)])
    for row in range(3):
        for column in range(4):
            expected = torch.cat([row * rates, column * rates])
            torch.testing.assert_close(angles[row, column], expected)


def test_scores_depend_on_distances_only() -> None:
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)
    angles = grid(6, 6, 16, torch.device("cpu")).view(6, 6, 8)

    def score(one: tuple[int, int], other: tuple[int, int]) -> Tensor:
        return (rotated(q, turning(angles[one][None])) * rotated(k, turning(angles[other][None]))).sum()

    torch.testing.assert_close(score((0, 0), (2, 1)), score((3, 4), (5, 5)))
    assert not torch.isclose(score((0, 0), (2, 1)), score((0, 0), (1, 2)))


def test_a_block_is_written_out() -> None:
    """Attention head by head, and SwiGLU, in float64."""
    torch.manual_seed(0)
    block = Block(WIDTH, HEADS).double()
    x, angles = torch.randn(2, 6, WIDTH, dtype=torch.float64), grid(2, 3, DIM, torch.device("cpu")).double()

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    q, k, v = (norm(x, block.norm1.weight) @ block.qkv.weight.T).split(WIDTH, dim=-1)
    heads = []
    for head in range(HEADS):
        part = slice(head * DIM, (head + 1) * DIM)
        turned = [rotated(one[:, None, :, part], turning(angles))[:, 0] for one in (q, k)]
        weights = (turned[0] @ turned[1].mT / math.sqrt(DIM)).softmax(-1)
        heads.append(weights @ v[..., part])
    h = x + torch.cat(heads, dim=-1) @ block.mix.weight.T
    gate, value = (norm(h, block.norm2.weight) @ block.gate.weight.T).chunk(2, dim=-1)
    expected = h + (gate * gate.sigmoid() * value) @ block.out.weight.T
    torch.testing.assert_close(block(x, turning(angles)), expected, rtol=0, atol=1e-5)  # angles turn in fp32


def test_the_variance_starts_independent_of_the_depth() -> None:
    torch.manual_seed(0)
    angles = grid(4, 4, 64, torch.device("cpu"))
    x = torch.randn(2, 16, 256)
    added = []
    for depth in (2, 16):
        net = Transformer(256, depth, 4)
        net.norm = nn.Identity()
        net.norm.weight = torch.zeros(())
        added.append(float((net(x, angles) - x).detach().var()))
    assert added[1] == pytest.approx(added[0], rel=0.3)


def test_it_has_as_many_parameters_as_with_a_hidden_layer_of_four_widths() -> None:
    with torch.device("meta"):
        net = Transformer(768, 12, 12)
    count = sum(p.numel() for p in net.parameters())
    assert count == 12 * (4 * 768**2 + 8 * 768**2 + 2 * 768) + 768


def test_the_sum_stays_in_fp32_inside_autocast() -> None:
    net = Transformer(WIDTH, 2, HEADS)
    seen: list[torch.dtype] = []
    for module in net.modules():
        if isinstance(module, nn.RMSNorm):
            module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        net(torch.randn(2, 6, WIDTH).bfloat16(), grid(2, 3, DIM, torch.device("cpu")))
    assert seen == [torch.float32] * 5


def test_queries_and_keys_have_length_one_per_channel() -> None:
    """Doubling the weights of both changes nothing."""
    torch.manual_seed(0)
    block = Block(WIDTH, HEADS, qk_norm=True)
    x, rotation = torch.randn(2, 6, WIDTH), turning(grid(2, 3, DIM, torch.device("cpu")))
    before = block(x, rotation)
    with torch.no_grad():
        block.qkv.weight[: 2 * WIDTH] *= 2
    torch.testing.assert_close(block(x, rotation), before, rtol=0, atol=1e-4)
    with torch.no_grad():
        block.norm_q.weight *= 2
    assert (block(x, rotation) - before).abs().max() > 1e-3


def test_weights_of_published_runs_keep_their_names() -> None:
    parts = {f"blocks.0.{part}.weight" for part in ("norm1", "qkv", "mix", "norm2", "gate", "out")}
    assert set(Transformer(WIDTH, 1, HEADS).state_dict()) == parts | {"norm.weight"}


def test_causal_attention_sees_no_later_token() -> None:
    torch.manual_seed(0)
    net = Transformer(WIDTH, 2, HEADS, qk_norm=True)
    x, angles = torch.randn(1, 6, WIDTH, requires_grad=True), grid(2, 3, DIM, torch.device("cpu"))
    for i in range(6):
        (gradient,) = torch.autograd.grad(net(x, angles, causal=True)[0, i].square().sum(), x)
        assert gradient[0, : i + 1].abs().amax(1).min() > 0
        assert gradient[0, i + 1 :].abs().sum() == 0


@pytest.mark.parametrize("each", [False, True])
def test_a_cache_gives_what_all_tokens_give(each: bool) -> None:
    """With angles for all images, or for each."""
    torch.manual_seed(0)
    net = Transformer(WIDTH, 3, HEADS, qk_norm=True)
    x, angles = torch.randn(2, 6, WIDTH), grid(2, 3, DIM, torch.device("cpu"))
    if each:
        angles = torch.stack([angles, angles.flip(0)])
    caches = [Cache(6) for _ in net.blocks]
    parts = [net(x[:, i : i + 1], angles[..., i : i + 1, :], caches=caches) for i in range(6)]
    torch.testing.assert_close(torch.cat(parts, 1), net(x, angles, causal=True), rtol=0, atol=1e-5)


def test_dropout_is_written_out() -> None:
    torch.manual_seed(0)
    net = Transformer(WIDTH, 2, HEADS)
    x, angles, sample = torch.randn(3, 6, WIDTH), grid(2, 3, DIM, torch.device("cpu")), torch.tensor([5, 9, 2**40])
    dropout = Dropout(0.3, sample, (7, 1))

    def dropped(branch: Tensor, place: int) -> Tensor:
        return branch * noise.kept(sample, (6, WIDTH), 0.3, 7, 1, place) / 0.7

    found = net(x, angles, dropout=dropout)
    for number, block in enumerate(net.blocks):
        for place, last in enumerate((block.mix, block.out), start=2 * number + 1):
            last.register_forward_hook(lambda _, inputs, branch, place=place: dropped(branch, place))
    torch.testing.assert_close(found, net(dropped(x, 0), angles))
    assert (found - net(x, angles)).abs().max() > 1e-3


def test_recomputed_blocks_drop_the_same() -> None:
    torch.manual_seed(0)
    net = Transformer(WIDTH, 2, HEADS)
    x, angles = torch.randn(3, 6, WIDTH), grid(2, 3, DIM, torch.device("cpu"))
    dropout = Dropout(0.3, torch.arange(3), (7, 1))
    gradients = []
    for net.checkpointing in (False, True):
        loss = net(x, angles, causal=True, dropout=dropout).square().sum()
        gradients.append(torch.autograd.grad(loss, list(net.parameters())))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_queries_may_have_angles_of_their_own() -> None:
    """If all of both are turned alike, nothing changes; if queries are turned further, distances are others."""
    torch.manual_seed(0)
    net = Transformer(WIDTH, 2, HEADS, qk_norm=True)
    x, angles = torch.randn(2, 6, WIDTH), grid(2, 3, DIM, torch.device("cpu"))
    before = net(x, angles)
    torch.testing.assert_close(net(x, angles, queries=angles), before)
    torch.testing.assert_close(net(x, angles + 1, queries=angles + 1), before, rtol=0, atol=1e-5)
    assert (net(x, angles, queries=angles + 1) - before).abs().max() > 1e-3
