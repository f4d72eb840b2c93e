"""Everything in a training step lies on the device, and nothing in it waits for the host."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any, get_args, get_type_hints

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException

from tests.device.kernels import Kernels
from tests.device.pretended import HostCopy, batch_on, moved, on, pretended
from vaescale import settings
from vaescale.evaluation.drawing import Unsupported, decoded, from_prior
from vaescale.evaluation.metrics import METRICS
from vaescale.evaluation.metrics.metric import Seen
from vaescale.interfaces import Bounded, Codebooks, Codec, LatentStatistics
from vaescale.models import MODELS
from vaescale.nn import features, likelihood, quantize
from vaescale.nn.covariance import Moments
from vaescale.nn.critic import Critic
from vaescale.nn.networks import NETWORKS
from vaescale.nn.reconstruction import distance_of
from vaescale.settings import Config
from vaescale.training import adversarial, descent
from vaescale.training.learner import LEARNERS, chosen

IMAGES = 4
SMALL = {  # settings that make a family small; a new one needs an entry only if its defaults are large
    "vdvae": [
        "model.width=8",
        "model.bottleneck=4",
        "model.encoder=[{size: 16, blocks: 1}, {size: 8, blocks: 1}]",
        "model.decoder=[{size: 8, blocks: 1}, {size: 16, blocks: 2}]",
    ],
    "vqvae": ["model.network.width=8", "model.quantizer.dim=8", "model.quantizer.codebook_size=24"],
}
NETWORK = {  # settings that make a network small
    "conv": ["width=8"],
    "vqgan": ["channels=32", "multipliers=[1,2]", "attention=[2]", "blocks=1"],
    "vit": ["width=16", "depth=2", "heads=2", "patch=4"],
}
KINDS = get_args(get_type_hints(quantize.Config)["kind"])
FITTING = {  # settings without which a kind of quantiser cannot be
    "fsq": ["codebook_dim=3", "levels=[4,3,3]", "codebook_size=36"],
    "lfq": ["codebook_size=256", "entropy_weight=0.1"],
}
COMBINED = {
    "gradient": ["learning=gradient"],
    "cosine": ["metric=cosine", "codebook_dim=4", "gradient=rotation"],
    "k-means": ["init=kmeans"],
    "residual": ["depth=2", "groups=2"],
    "entropy": ["entropy_weight=0.1"],
}
# Operations that raise RuntimeError on CUDA with `deterministic: true`, from the documentation of
# torch.use_deterministic_algorithms (2.13). `index_add_` and `scatter_add_`, which sum codebooks' rows, have
# deterministic implementations, which it then chooses.
REFUSED = {
    *("_adaptive_avg_pool2d_backward", "adaptive_max_pool2d_backward", "_ctc_loss_backward", "put_", "histc"),
    *("nll_loss_forward", "nll_loss2d_forward", "bincount", "median", "cumsum", "grid_sampler_2d_backward"),
    *("upsample_bilinear2d_backward", "upsample_bicubic2d_backward", "upsample_linear1d_backward"),
    *("_upsample_bilinear2d_aa_backward", "_upsample_bicubic2d_aa_backward"),
    *("reflection_pad1d_backward", "reflection_pad2d_backward", "reflection_pad3d_backward"),
}
LIKELIHOODS = get_args(get_type_hints(likelihood.Config)["kind"])


def cases() -> dict[str, list[str]]:
    # Models that are built on another have a file of their own.
    found = {kind: [f"model.kind={kind}", *SMALL.get(kind, [])] for kind in MODELS if not MODELS[kind].base}
    for kind in KINDS:
        found[f"vqvae, {kind}"] = [
            *found["vqvae"],
            *(f"model.quantizer.{one}" for one in [f"kind={kind}", *FITTING.get(kind, [])]),
        ]
    found["kl"] += [f"model.network.{one}" for one in NETWORK["vqgan"]]
    for network in NETWORKS:
        small = [f"model.network.{one}" for one in [f"kind={network}", *NETWORK[network]]]
        plain = ["model.kind=vqvae", "model.quantizer.dim=8", "model.quantizer.codebook_size=24", *small]
        found[f"vqvae, {network}"] = plain
        found[f"vqvae, {network}, checkpointing"] = [*plain, "model.checkpointing=true"]
        found[f"kl, {network}"] = ["model.kind=kl", *small, "model.checkpointing=true"]
    for name, given in COMBINED.items():
        found[f"vqvae, {name}"] = [*found["vqvae"], *(f"model.quantizer.{one}" for one in given)]
    for kind in LIKELIHOODS:
        found[f"vae, {kind}"] = [*found["vae"], f"model.likelihood.kind={kind}"]
    found["vae, conditional"] = [*found["vae"], "model.classes=3", "model.label_dropout=0.1", "data.attributes=[age]"]
    found["vae, free bits"] = [*found["vae"], "model.free_bits=0.1", "model.beta_warmup_steps=9"]
    found["hvae, top-down"] = [*found["hvae"], "model.posterior=top-down"]
    perceptual = ["model.reconstruction.perceptual.weight=1", "model.reconstruction.perceptual.trunk=random"]
    found["kl, perceptual"] = [*found["kl"], "model.reconstruction.l1=1", *perceptual]
    found["vqvae, perceptual"] = [*found["vqvae"], "model.reconstruction.l1=1", *perceptual]
    found["vdvae, checkpointing"] = [*found["vdvae"], "model.checkpointing=true"]
    return found


CASES = cases()
CRITIC = ["steps=8", "adversarial={weight: 0.1, width: 8, layers: 2, critic_start: 0, start: 0.1}"]  # term from step 1
DUELS = {  # with a critic
    f"vqvae, critic, {name}": [*CASES["vqvae"], *CRITIC, *(f"adversarial.{one}" for one in given)]
    for name, given in {
        "constant": [],
        "adaptive": ["adaptive=true", "loss=non-saturating"],
        "r1": ["r1=1", "augment=true"],
    }.items()
}
DUELS["autoencoder, critic"] = [*CASES["autoencoder"], *CRITIC]
DUELS["kl, critic"] = [*CASES["kl"], *CRITIC]
DUELS["vqvae, critic, perceptual"] = [*CASES["vqvae, perceptual"], *CRITIC, "adversarial.adaptive=true"]
TRAINED = {**{name: given for name, given in CASES.items() if MODELS[name.split(",")[0]].learner == "descent"}, **DUELS}


@pytest.fixture
def load(tmp_path: Any) -> Callable[[list[str]], Config]:
    def load(overrides: list[str]) -> Config:
        path = tmp_path / "config.yaml"
        path.write_text("model: {}\ndata: {size: 16}\n")
        return settings.load(path, ["precision=fp32", *overrides])

    return load


class PlainEngine:
    """Does what the engine does, but without DeepSpeed, which takes no pretended GPU, and keeps the weights."""

    def __init__(self, module: nn.Module, *settings: Any) -> None:
        self.forward = module
        self.parameters = list(module.parameters())
        self.device = self.parameters[0].device

    def autocast(self) -> AbstractContextManager[None]:
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def micro_step(self) -> None:
        pass

    def scaled(self, losses: Tensor) -> Tensor:
        return ~losses.isfinite().all()

    def norm(self) -> Tensor:
        return nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])

    def apply(self, lr: float, refused: Tensor, overflow: Tensor) -> None:
        torch.where(refused, 0.0, refused | overflow)
        for parameter in self.parameters:
            parameter.grad = None

    def masters(self) -> None:
        return None


@pytest.mark.parametrize("name", TRAINED)
def test_a_training_step_neither_mixes_devices_nor_waits(
    name: str, load: Callable[[list[str]], Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does it use operations without a deterministic implementation."""
    config = load(TRAINED[name])
    with pretended() as gpu, Kernels() as kernels:
        for module in (descent, adversarial):
            monkeypatch.setattr(module, "Engine", PlainEngine)
        monkeypatch.setattr(Critic, "to", moved)
        model = moved(settings.build(config), gpu).train()
        batch = batch_on(settings.blank(config, IMAGES), gpu)
        learner: Any = chosen(config)(model, config, 0)
        for step in (0, 1, 2, 10):
            learner.step([batch] * (2 if step == 1 else 1), step)
        joined = [(model, getattr(learner, "descent", learner))]
        joined += [(learner.critic, learner)] if name in DUELS else []
        for net, owner in joined:
            one = owner.buffers.untyped_storage()._cdata
            replaced = [name for name, buffer in net.named_buffers() if buffer.untyped_storage()._cdata != one]
            assert not replaced, f"changed other than in place, so that a skipped step cannot restore them: {replaced}"
    assert kernels.total() > 50
    assert not kernels.launched.keys() & REFUSED


def test_every_learner_is_covered(load: Callable[[list[str]], Config]) -> None:
    covered = {chosen(load(given)) for given in {**CASES, **DUELS}.values()}
    assert covered == set(LEARNERS.values())


@pytest.mark.parametrize("name", CASES)
def test_evaluation_neither_mixes_devices_nor_waits(name: str, load: Callable[[list[str]], Config]) -> None:
    config = load(CASES[name])
    with pretended() as gpu, torch.no_grad():
        model = moved(settings.build(config), gpu).eval()
        batch = batch_on(settings.blank(config, IMAGES), gpu)
        assert isinstance(model, Codec)
        model.encode(batch, 1.0)
        latents = model.encode(batch)
        images = model.decode(latents, batch.condition)
        with suppress(ValueError):  # it has no prior
            model.decode([], batch.condition, 0.7, draw=True)
        with suppress(Unsupported):
            from_prior(model, batch.condition, seed=0)
        decoded(model, latents, batch.condition)
        if isinstance(model, Bounded):
            model.bound(batch, 3)
        if isinstance(model, LatentStatistics):
            model.posterior(batch)
        if isinstance(model, Codebooks):
            model.usage(clear=True)
        seen = Seen(
            model, batch, (images.clamp(0, 1) * 255).to(torch.uint8), latents, draws=2, distance=distance_of(model)
        )
        for metric in METRICS:
            metric.sums(seen)


@pytest.mark.parametrize("name", [name for name in CASES if MODELS[name.split(",")[0]].learner == "closed_form"])
def test_counting_neither_mixes_devices_nor_waits(name: str, load: Callable[[list[str]], Config]) -> None:
    config = load(CASES[name])
    with pretended() as gpu, torch.no_grad():
        model = moved(settings.build(config), gpu)
        batch = batch_on(settings.blank(config, IMAGES), gpu)
        moments = moved(Moments(len(model.mean)), gpu)
        model.count(moments, batch, batch.label >= 0)


@pytest.mark.parametrize("name", features.NETS)
def test_features_neither_mix_devices_nor_wait(name: str) -> None:
    with pretended() as gpu:
        net = features.drawn(name)
        net.tensors = {key: on(tensor, gpu) for key, tensor in net.tensors.items()}
        for channels, height, width in ((1, 20, 30), (3, 320, 240)):
            found, logits = net(torch.empty(IMAGES, channels, height, width, dtype=torch.uint8, device=gpu))
            assert found.shape == (IMAGES, net.dim)
            assert found.device.type == gpu.type
            assert logits is None or (logits.device.type == gpu.type and len(logits) == IMAGES)


class Mixed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.float() + torch.arange(16)


class Waiting(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / 2 if x.float().mean() > 3 else x


class Copied(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.float() + torch.arange(16.0).to(x.device)


@pytest.mark.parametrize(
    ("fault", "error", "words"),
    [
        (Mixed, RuntimeError, "gpu"),
        (Waiting, DataDependentOutputException, "_local_scalar_dense"),
        (Copied, HostCopy, "cpu → gpu"),
    ],
)
def test_planted_faults_are_found(fault: type[nn.Module], error: type[Exception], words: str) -> None:
    with pretended() as gpu, pytest.raises(error, match=words):
        fault()(torch.empty(2, 3, 16, 16, dtype=torch.uint8, device=gpu))
