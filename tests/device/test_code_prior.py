"""A prior's training step, its rates and its samples on a pretended GPU: nothing waits for the host."""

from typing import Any

import pytest
import torch

from tests.device.kernels import Kernels
from tests.device.pretended import batch_on, moved, on, pretended
from tests.device.test_step import REFUSED
from vaescale.evaluation.metrics.rate import rate_sums
from vaescale.interfaces import Batch, Bounded, Known, Sampling, Shape
from vaescale.models import code_prior, vqvae
from vaescale.models.code_prior import CodePrior
from vaescale.models.generative import GenerativeWithBound
from vaescale.nn import conv, quantize

IMAGES, SHAPE = 4, Shape(3, 16, 2)
DEPTH = 3
NETS: dict[str, dict[str, Any]] = {  # name → settings
    "raster": {},
    "random": {"order": "random", "anneal_steps": 5},
    "masked": {"order": "masked"},
    "pixelcnn": {"net": "pixelcnn"},
}
MOST = {"raster": 670, "random": 810, "masked": 820, "pixelcnn": 270}  # kernels of a step with DEPTH blocks


def build(levels: int = 1, depth: int = DEPTH, **given: Any) -> CodePrior:
    quantizer = quantize.Config(dim=8, codebook_size=24, depth=levels)
    codec = vqvae.VQVAE(vqvae.Config(network=conv.Config(width=8), quantizer=quantizer), SHAPE)
    config = code_prior.Config(width=16, depth=depth, heads=2, level_depth=1, classes=3, **given)
    return code_prior.build(config, SHAPE, 0, codec)


def on_gpu(model: CodePrior, gpu: torch.device) -> CodePrior:
    moved(model.frozen.model, gpu)
    return moved(model, gpu)


def batch(gpu: torch.device, x: torch.Tensor) -> Batch:
    label = torch.zeros(IMAGES, dtype=torch.int64)
    return batch_on(Batch(x, label, torch.zeros(IMAGES, SHAPE.attributes), label), gpu)


def pictures() -> torch.Tensor:
    return torch.zeros(IMAGES, SHAPE.channels, SHAPE.size, SHAPE.size, dtype=torch.uint8)


@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("name", NETS)
def test_a_step_neither_mixes_devices_nor_waits(name: str, levels: int) -> None:
    """From pictures and from codes, in training and validation. Nor does it use operations without a deterministic
    implementation."""
    with pretended() as gpu, Kernels() as kernels:
        model = on_gpu(build(levels, **NETS[name]), gpu)
        codes = torch.zeros(IMAGES, levels, 4, 4, dtype=torch.int64)
        for x in (pictures(), codes):
            for training in (True, False):
                output = model.train(training)(batch(gpu, x), 3)
                assert output.loss.device.type == gpu.type
                output.loss.backward()
    assert not kernels.launched.keys() & REFUSED


@pytest.mark.parametrize("name", [*NETS, "uniform"])
def test_rates_and_samples_neither_mix_devices_nor_wait(name: str) -> None:
    with pretended() as gpu, torch.no_grad():
        model = on_gpu(build(2, **NETS.get(name, {"net": name})), gpu).eval()
        given = batch(gpu, pictures())
        codes = model.codes(given)
        assert codes.shape == (IMAGES, 2, 4, 4)
        assert model.rates(codes, given.condition, given.sample, 3).device.type == gpu.type
        known = Known(codes, on(torch.zeros(2, 4, 4, dtype=torch.bool), gpu))
        guided = Sampling(top_k=5, top_p=0.9, guidance=2.0, passes=4)
        for sampling in (Sampling(), guided, Sampling(passes=3, positions="halton")):
            drawn = model.draw(given.condition, given.sample, 0.7, sampling, known)
            assert drawn.shape == codes.shape
            assert drawn.device.type == gpu.type


@pytest.mark.parametrize("name", NETS)
def test_the_kernels_of_a_step_depend_on_its_depth_alone(name: str) -> None:
    """Not on the batch. On CUDA there are fewer: here norms and attention are several kernels. The choice of dropout is
    one for each branch and one for the embedded codes."""
    totals = []
    for depth, images in ((DEPTH, IMAGES), (DEPTH, 2 * IMAGES), (DEPTH + 1, IMAGES)):
        with pretended() as gpu:
            model = on_gpu(build(depth=depth, **NETS[name]), gpu).train()
            given = batch(gpu, torch.zeros(IMAGES, 1, 4, 4, dtype=torch.int64))
            given = Batch(*(torch.cat([one] * (images // IMAGES)) for one in given))
            with Kernels() as kernels:
                model(given, 3).loss.backward()
        totals.append(kernels.total())
        assert kernels.launched["vaescale::kept"] == (1 + (1 if name == "pixelcnn" else 2) * depth)
    assert totals[1] == totals[0] <= MOST[name]
    assert totals[2] - totals[0] <= 175


@pytest.mark.parametrize("name", ["raster", "uniform"])
def test_images_and_bounds_are_computed_on_the_device(name: str) -> None:
    with pretended() as gpu, torch.no_grad():
        model = on_gpu(build(2, **NETS.get(name, {"net": name})), gpu).eval()
        codec, given = GenerativeWithBound(model, Sampling()), batch(gpu, pictures())
        latents = codec.encode(given)
        for some in (latents, latents[:1], []):
            assert codec.decode(some, given.condition, sample=given.sample).device.type == gpu.type
        assert isinstance(codec, Bounded)
        assert all(part.device.type == gpu.type for part in codec.bound(given))
        sums = rate_sums(model, model.codes(given), given.condition, given.sample)
        assert all(part.device.type == gpu.type for part in sums.values())
