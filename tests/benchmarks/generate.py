"""Times how codes are drawn, and a training step: `python tests/benchmarks/generate.py [--rounds 5]`.

A transformer draws maps of codes at temperature 0 and is timed in turns with others that draw the same codes from the
same weights: without a cache, and as LlamaGen does, with a cache of full length of which a mask hides the empty part
(Sun et al. 2024). x-transformers has its own network of the same size. A training step of vaescale's learner is timed
with a loop of plain torch around the same network. Ratios are medians over rounds. On one thread of a CPU the times are
those of the process, so that other processes hardly change them.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from paired import Work, clock_of, paired
from plain import plain_learner
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.models.codes import Tokenizer, batch_of, nothing
from vaescale import distributed
from vaescale.interfaces import Batch, Shape
from vaescale.models import code_prior, vqvae
from vaescale.models.code_prior import CodePrior
from vaescale.nn.transformer import rotated, turning
from vaescale.settings import Config, Optimizer
from vaescale.training.descent import Descent

CODES = 1024  # K


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--side", type=int, default=16, help="codes per side of a map")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    device = distributed.init()
    cpu_time = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if cpu_time else clock_of(device.type)
    model = build(given, device).eval()
    count = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}, {count:.1f} M parameters, ", end="")
    print(f"{given.side}² codes of {CODES}, batch {given.batch}, {given.rounds} rounds\n")
    print("| what | beside | ms | ours, ms | ratio | aim |\n|---|---|---:|---:|---:|---|")
    ours = drawing(model, given.batch, device)
    codes = ours()
    others: dict[str, tuple[Work | None, float]] = {
        "LlamaGen's cache": (compared(with_masked_cache(model, given.batch), codes), 1.15),
        "x-transformers": (x_transformers(given, device), 2.0),
        "no cache": (compared(without_cache(model, given.batch), codes), 15.0),
    }
    for name, (theirs, aim) in others.items():
        if theirs is None:
            print(f"| drawing | {name} | not installed | | | ≥ {aim} |")
            continue
        times = paired(theirs, ours, 1, 1 if name == "no cache" else given.rounds, clock)
        print("| drawing | {} | {:.0f} | {:.0f} | {:.2f} | ≥ {} |".format(name, *times, aim), flush=True)
    theirs, own, ratio = paired(plain_step(given, device), our_step(given, device), 1, 3 * given.rounds, clock)
    print(f"| a training step | plain torch | {theirs:.0f} | {own:.0f} | {1 / ratio:.2f} | ≤ 1.05 |")
    distributed.finish()


def build(given: argparse.Namespace, device: torch.device) -> CodePrior:
    torch.manual_seed(0)
    config = code_prior.Config(width=given.width, depth=given.depth, heads=given.width // 32, classes=10)
    return code_prior.build(config, Shape(1, given.side, 0), 0, Tokenizer((CODES,), given.side)).to(device)


def drawing(model: CodePrior, images: int, device: torch.device) -> Callable[[], Tensor]:
    condition, sample = nothing(images), torch.arange(images, device=device)
    label = condition.label.to(device)
    return lambda: model.draw(type(condition)(label, condition.attributes.to(device)), sample, 0.0).flatten(1)


def compared(theirs: Callable[[], Tensor], codes: Tensor) -> Work:
    """Returns the other side, with a check that it draws the same codes."""

    def work() -> None:
        same = (theirs() == codes).float().mean()
        assert same > 0.99, f"only {same:.1%} of the codes are the same"  # rounding decides between close ones

    return work


def most_probable(model: CodePrior, images: int, last: Callable[[int, Tensor], Tensor]) -> Tensor:
    """last: (i, codes so far) → h of code i."""
    codes = torch.zeros(images, 0, dtype=torch.int64, device=model.trunk.places.device)
    for i in range(model.places):
        logits = model.levels.outputs[0](last(i, codes))
        codes = torch.cat([codes, logits.argmax(-1, keepdim=True)], dim=1)
    return codes


def inputs(model: CodePrior, images: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the condition [B, width], and the vectors and angles of the positions."""
    device = model.trunk.places.device
    condition = nothing(images)
    given = model._given(type(condition)(condition.label.to(device), condition.attributes.to(device)), images)
    targets, angles, _ = model.trunk._positions(None)
    return given, targets, angles


def without_cache(model: CodePrior, images: int) -> Callable[[], Tensor]:
    @torch.no_grad()
    def work() -> Tensor:
        given, targets, angles = inputs(model, images)

        def last(i: int, codes: Tensor) -> Tensor:
            x = torch.cat([given[:, None], model.levels.embeddings[0](codes)], dim=1) + targets[: i + 1]
            return model.trunk.transformer(x, angles[: i + 1], causal=True)[:, -1]

        return most_probable(model, images, last)

    return work


def with_masked_cache(model: CodePrior, images: int) -> Callable[[], Tensor]:
    """Attention reads all places of a zeroed cache, under rows of a causal mask."""
    net = model.trunk.transformer
    heads, dim, places = net.blocks[0].heads, model.trunk.dim, model.places

    def attended(block: Any, x: Tensor, rotation: Any, i: int, cache: Tensor, mask: Tensor) -> Tensor:
        q, k, v = rearrange(block.qkv(block.norm1(x)), "b n (three h d) -> three b h n d", three=3, h=heads)
        q, k = rotated(block.norm_q(q), rotation), rotated(block.norm_k(k), rotation)
        place = torch.tensor([i], device=x.device)
        cache[0][:, :, place] = k
        cache[1][:, :, place] = v
        mixed = F.scaled_dot_product_attention(q, cache[0], cache[1], attn_mask=mask[None, None, place])
        x = x + block.mix(rearrange(mixed, "b h n d -> b n (h d)"))
        gate, value = block.gate(block.norm2(x)).chunk(2, dim=-1)
        return x + block.out(F.silu(gate) * value)

    @torch.no_grad()
    def work() -> Tensor:
        given, targets, angles = inputs(model, images)
        caches = [given.new_zeros(2, images, heads, places, dim) for _ in net.blocks]
        mask = torch.ones(places, places, dtype=torch.bool, device=given.device).tril()

        def last(i: int, codes: Tensor) -> Tensor:
            x = (model.levels.embeddings[0](codes[:, -1]) if i else given)[:, None] + targets[i : i + 1]
            rotation = turning(angles[i : i + 1])
            for block, cache in zip(net.blocks, caches, strict=True):
                x = attended(block, x, rotation, i, cache, mask)
            return net.norm(x)[:, 0]

        return most_probable(model, images, last)

    return work


def x_transformers(given: argparse.Namespace, device: torch.device) -> Work | None:
    """A decoder of the same width, depth and number of heads."""
    try:
        from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper
    except ImportError:
        return None
    places = given.side**2
    layers = Decoder(
        dim=given.width,
        depth=given.depth,
        heads=given.width // 32,
        attn_dim_head=32,
        use_rmsnorm=True,
        ff_glu=True,
        ff_swish=True,
        ff_no_bias=True,
        ff_mult=8 / 3,
        rotary_pos_emb=True,
        attn_qk_norm=True,
        attn_flash=True,
    )
    net = AutoregressiveWrapper(TransformerWrapper(num_tokens=CODES, max_seq_len=places + 1, attn_layers=layers))
    net = net.to(device).eval()
    start = torch.zeros(given.batch, 1, dtype=torch.int64, device=device)
    return lambda: net.generate(start, places, temperature=0.0, cache_kv=True)


def batches(given: argparse.Namespace, device: torch.device) -> Batch:
    codes = torch.randint(CODES, (given.batch, 1, given.side, given.side))
    return batch_of(codes, torch.arange(given.batch) % 10).to(device)


def settings_of(given: argparse.Namespace) -> Config:
    optimizer = Optimizer(lr=4e-4, betas=(0.9, 0.96), weight_decay=0.03, grad_clip=1.0)
    return Config(vqvae.Config(), global_batch=given.batch, precision="fp32", optimizer=optimizer)


def our_step(given: argparse.Namespace, device: torch.device) -> Work:
    learner, batch = Descent(build(given, device).train(), settings_of(given)), batches(given, device)
    return lambda: learner.step([batch], 0)


def plain_step(given: argparse.Namespace, device: torch.device) -> Work:
    """As one would write it by hand, with torch's dropout and cross-entropy, and averaged weights."""
    model, batch, config = build(given, device).train(), batches(given, device), settings_of(given)
    learn = plain_learner(model, config)
    codes = batch.x.flatten(2)[:, 0]

    def dropout(x: Tensor, place: int) -> Tensor:
        return F.dropout(x, model.config.dropout)

    def work() -> None:
        label = batch.label.masked_fill(torch.rand(len(codes), device=device) < model.config.label_dropout, -1)
        condition = model.projected(model.conditioner(batch.condition._replace(label=label)))
        h = model.trunk(model.levels.embeddings[0](codes), condition, None, dropout)
        learn(F.cross_entropy(model.levels.outputs[0](h).flatten(0, 1), codes.flatten()))

    return work


if __name__ == "__main__":
    main()
