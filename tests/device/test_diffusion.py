"""A diffusion's training step, its bound and its samples on a pretended GPU: nothing waits for the host."""

from typing import Any

import pytest
import torch

from tests.device.kernels import Kernels
from tests.device.pretended import batch_on, moved, pretended
from tests.device.test_step import REFUSED
from vaescale.interfaces import Batch, Sampling, Shape
from vaescale.models import diffusion, kl, vdvae
from vaescale.nn import conv

IMAGES, SHAPE = 4, Shape(3, 16, 2)
DEPTH = 2
CASES: dict[str, dict[str, Any]] = {  # name → settings
    "transformer": {},
    "unet": {"net": "unet", "width": 32},
    "flow": {"weighting": "flow", "sampler": "heun"},
    "levels": {"timesteps": 10, "learned_ends": True, "sampler": "ancestral"},
    "latents": {"over": "kl"},
    "coarsest": {"over": "vdvae"},
    "fixed": {"over": "kl", "encoder_noise": 5.0, "weighting": "flow"},
}
MOST = {  # kernels of a step
    "transformer": 740,
    "unet": 1000,
    "flow": 660,
    "levels": 880,
    "latents": 740,
    "coarsest": 800,
    "fixed": 680,
}


def base(kind: str) -> Any:
    if kind == "kl":
        return kl.build(kl.Config(latent_dim=3, network=conv.Config(width=8)), SHAPE)
    down, up = [vdvae.Stage(16, 1), vdvae.Stage(4, 1)], [vdvae.Stage(4, 2), vdvae.Stage(16, 1)]
    return vdvae.build(vdvae.Config(width=8, bottleneck=4, latent_dim=3, encoder=down, decoder=up), SHAPE)


def build(depth: int = DEPTH, **given: Any) -> Any:
    codec = base(given["over"]) if "over" in given else None
    settings = {"width": 16, "depth": depth, "heads": 2, "classes": 3, "dropout": 0.1, "sample_steps": 3, **given}
    return diffusion.build(diffusion.Config(**settings), SHAPE, 0, codec)


def on_gpu(model: Any, gpu: torch.device) -> Any:
    if model.codec is not None:
        moved(model.codec, gpu)
    return moved(model, gpu)


def batch(gpu: torch.device, images: int = IMAGES) -> Batch:
    x = torch.zeros(images, SHAPE.channels, SHAPE.size, SHAPE.size, dtype=torch.uint8)
    label = torch.zeros(images, dtype=torch.int64)
    return batch_on(Batch(x, label, torch.zeros(images, SHAPE.attributes), label), gpu)


@pytest.mark.parametrize("name", CASES)
def test_steps_bounds_and_samples_neither_mix_devices_nor_wait(name: str) -> None:
    """Nor do steps use operations without a deterministic implementation."""
    with pretended() as gpu:
        model, given = on_gpu(build(**CASES[name]), gpu), batch(gpu)
        with Kernels() as kernels:
            for training in (True, False):
                output = model.train(training)(given, 3)
                assert output.loss.device.type == gpu.type
                output.loss.backward()
        assert not kernels.launched.keys() & REFUSED
        with torch.no_grad():
            bound = model.bound(given, 2)
            assert bound.rate.device.type == bound.distortion.device.type == gpu.type
            for codec in (model, model.with_sampling(Sampling(guidance=2.0))):
                for latents in ([], model.encode(given)):
                    images = codec.decode(latents, given.condition, sample=given.sample)
                    assert images.shape == given.x.shape
                    assert images.device.type == gpu.type


@pytest.mark.parametrize("name", CASES)
def test_the_kernels_of_a_step_depend_on_its_depth_alone(name: str) -> None:
    """Not on the batch. On CUDA there are fewer: here norms and attention are several kernels."""
    totals = []
    for depth, images in ((DEPTH, IMAGES), (DEPTH, 2 * IMAGES), (DEPTH + 1, IMAGES)):
        with pretended() as gpu:
            model, given = on_gpu(build(depth, **CASES[name]), gpu).train(), batch(gpu, images)
            with Kernels() as kernels:
                model(given, 3).loss.backward()
        totals.append(kernels.total())
    assert totals[1] == totals[0] <= MOST[name]
    assert totals[2] - totals[0] <= 240
