"""Training against a critic: gradient descent with an adversarial term in the model's loss, and a second engine for the
critic, which learns to tell the step's images from their reconstructions."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import distributed
from ..interfaces import Batch, Model, Reconstructor, Tensors
from ..lifecycle.checkpoint import Read, Unreadable
from ..nn import critic
from ..nn.critic import accuracy, augment, build, critic_loss, lecam_penalty, model_loss, r1_penalty
from ..settings import Config, build_critic, micro_batch
from .buffers import joined
from .descent import Descent, Results, channels_last, kept_bytes, learning_rate, state_bytes
from .engine import MOMENTS, Engine
from .guard import CRITIC, Guard, Skip, Verdict

REAL, FAKE = range(2)  # draws of the augmentation
TERM = ("adversarial/loss", "adversarial/weight")
SEED = 0xC417  # added to the run's seed for the critic's first weights
SMALLEST, LARGEST = 1e-4, 1e4  # of Esser et al. 2021: added to a norm that is divided by; the largest ratio


class Adversarial:
    """A Learner for a model that returns reconstructions, and a critic. Until `critic_start` it is a Descent, then the
    critic learns as well, and from `start` on the model's loss has the adversarial term.

    One verdict holds for both: if either gradient is refused, neither network moves. Before `start` the critic has no
    influence on the model, so that its weights are those of a run without a critic.

    The critic is called without its engine, since both its gradient with respect to images and R1 need
    `torch.autograd.grad`. In the model's pass it is frozen.
    """

    def __init__(self, model: Model, config: Config, samples: int = 0) -> None:
        self.descent = Descent(model, config, samples)
        self.averaged = self.descent.averaged
        self.model, self.config, self.settings = model, config, config.adversarial
        device = self.descent.engine.device
        self.critic = build(self.settings, config.data.channels, config.seed + SEED).to(device)
        if config.compile and not self.settings.r1:  # torch.compile has no second derivatives
            self.critic.compile()
        micro = micro_batch(config, distributed.world())
        optimizer = replace(config.optimizer, betas=self.settings.betas)
        self.engine = Engine(
            *(self.critic, optimizer, config.precision, config.zero_stage, micro, config.accumulation),
            *(config.deepspeed, "critic"),
        )
        if config.channels_last:
            channels_last(self.critic)
        self.buffers = joined(self.critic)
        self.guard = Guard(config.optimizer.spike, device)
        self.descent.skipped["critic"] = 0
        self.critic_start, self.start = phases(config)
        self.names = metrics(self.settings)
        self._zero, self._no = torch.zeros((), device=device), torch.zeros((), dtype=torch.bool, device=device)
        self._refused = torch.full((1,), float(CRITIC), device=device)
        self._taken = [0, 0, 0]  # steps since the last report: all, those of the critic, those with the term
        self._input: Tensor | None = None  # of the last layer, in the forward pass
        if self.settings.adaptive:
            assert isinstance(model, Reconstructor)
            self.reconstructor: Reconstructor = model
            self.reconstructor.last_layer.register_forward_pre_hook(self._keep_input)

    @staticmethod
    def planned(config: Config, samples: Callable[[], int], step: int = 0, images: int = 0) -> int:
        return Descent.planned(config, samples, step, images)

    @staticmethod
    def memory(model: Model, config: Config, world: int) -> dict[str, float]:
        judge = build_critic(config)
        assert judge is not None
        state = state_bytes(judge, config, world)
        pair = torch.zeros(2, config.data.channels, config.data.size, config.data.size)
        held = kept_bytes(lambda: judge(pair), judge.parameters()) // (1 if config.precision == "fp32" else 2)
        return Descent.memory(model, config, world) | {
            "critic": sum(state.values()) - state["EMA"],
            "critic's activations": held * micro_batch(config, world),
        }

    def step(self, batches: Iterable[Batch], step: int) -> Tensors:
        """Takes one step, in which our code does not wait for the device."""
        self._taken = [
            n + (step >= first) for n, first in zip(self._taken, (0, self.critic_start, self.start), strict=True)
        ]
        descent = self.descent
        if step < self.critic_start:
            means = descent.step(batches, step)
            self._input = None
            return {**means, **dict.fromkeys(self.names, self._zero)}
        results, before, own_before = Results(), descent.buffers.clone(), self.buffers.clone()
        passes = descent.passes(batches, step, partial(self._term, step=step))
        for number, (batch, reconstruction, values) in enumerate(passes, start=1):
            assert reconstruction is not None
            results.add({**values, **self._train_critic(batch, reconstruction)})
            if number < self.config.accumulation:
                self.engine.micro_step()
        losses, means = results.joined()
        norm, own_norm = descent.engine.norm(), self.engine.norm()
        verdict, own = self._judge(norm, own_norm, joint=step >= self.start)
        skipped = descent.finish(step, verdict, losses, before)
        refused = verdict.refused | own.refused
        self.engine.apply(learning_rate(self.config.optimizer, step, self.config.steps), refused, self._no)
        if self.settings.lecam:
            seen = distributed.sum_(torch.stack([means["critic/real"], means["critic/fake"]])) / distributed.world()
            self.critic.observe(seen)
        torch.where(refused, own_before, self.buffers, out=self.buffers)
        means["critic/gradient_norm"] = torch.where(refused, 0.0, own_norm)
        means["critic/skipped"] = refused.float()
        of_critic = {name: means.pop(name) for name in self.names}
        norm = torch.where(verdict.refused, 0.0, norm)
        return {**means, "gradient_norm": norm, "skipped": skipped, **of_critic}

    def _term(self, batch: Batch, reconstruction: Tensor, step: int) -> tuple[Tensor, Tensors]:
        """Returns a term whose gradient with respect to the reconstruction is that of the weighted adversarial loss. So
        the critic is passed once for this gradient, also if its weight depends on it."""
        if step < self.start:
            return self._zero, dict.fromkeys(TERM, self._zero)
        images = reconstruction.detach().float().requires_grad_()
        self.critic.requires_grad_(False)
        with self.engine.autocast():
            loss = model_loss(self.settings.loss, self.critic(self._shown(images, batch, FAKE)).float())
        (gradient,) = torch.autograd.grad(loss, images)
        self.critic.requires_grad_(True)
        weight = torch.full_like(self._zero, self.settings.weight)
        if self.settings.adaptive:
            weight = weight * self._ratio(batch, images, gradient)
        term = weight * (reconstruction.float() * gradient).sum()
        return term, dict(zip(TERM, (loss.detach(), weight), strict=True))

    def _train_critic(self, batch: Batch, reconstruction: Tensor) -> Tensors:
        """Does the critic's forward and backward pass of a micro-batch. Returns its loss and metrics."""
        self._input = None  # not earlier: with activation checkpointing the backward pass sets it again
        settings = self.settings
        images = self._shown(batch.x / 255, batch, REAL)
        fakes = self._shown(reconstruction.float(), batch, FAKE)
        with self.engine.autocast():
            if settings.r1:  # in two batches: the gradient of one is needed
                images.requires_grad_()
                real, fake = self.critic(images).float(), self.critic(fakes).float()
            else:
                real, fake = self.critic(torch.cat([images, fakes])).float().chunk(2)
            terms = {"critic/loss": critic_loss(settings.loss, real, fake)}
            loss = terms["critic/loss"]
            if settings.lecam:
                terms["critic/lecam"] = lecam_penalty(real, fake, self.critic.lecam)
                loss = loss + settings.lecam * terms["critic/lecam"]
            if settings.r1:
                terms["critic/r1"] = r1_penalty(real, images)
                loss = loss + settings.r1 * terms["critic/r1"]
        self.engine.backward(loss)
        real, fake = real.detach(), fake.detach()
        terms = {name: value.detach() for name, value in terms.items()}
        return {
            **terms,
            "critic/real": real.mean(),
            "critic/fake": fake.mean(),
            "critic/accuracy": accuracy(real, fake),
        }

    def _shown(self, images: Tensor, batch: Batch, draw: int) -> Tensor:
        """Returns what the critic sees of images."""
        if not self.settings.augment:
            return images
        return augment(images, batch.sample, self.config.seed, draw)

    def _keep_input(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        del layer
        self._input = inputs[0].detach()

    def _ratio(self, batch: Batch, images: Tensor, gradient: Tensor) -> Tensor:
        """Returns fp32 []: ‖∇ reconstruction loss‖ / ‖∇ adversarial loss‖ with respect to the weight of the model's
        last layer, for this micro-batch of all ranks (Esser et al. 2021, equation 7). The gradients are summed over
        ranks first: the ratio of each rank's own would depend on the number of ranks.

        images: the reconstructions, detached; gradient: of the adversarial loss with respect to them.
        """
        model, given = self.reconstructor, self._input
        assert given is not None
        layer = model.last_layer
        weight = layer.get_parameter("weight").detach().requires_grad_()
        with self.descent.engine.autocast():
            (wanted,) = torch.autograd.grad(model.reconstruction_loss(images, batch.x), images)
            output = torch.func.functional_call(layer, {"weight": weight}, (given,))
        pulls = [
            torch.autograd.grad(output, weight, each.to(output.dtype), retain_graph=True)[0].flatten()
            for each in (wanted, gradient)
        ]
        summed = distributed.sum_(torch.stack(pulls).float()) / distributed.world()
        one, other = summed.norm(dim=1).unbind()
        return (one / (other + SMALLEST)).clamp(max=LARGEST)

    def _judge(self, norm: Tensor, own_norm: Tensor, joint: bool) -> tuple[Verdict, Verdict]:
        """Returns the verdicts on the model's gradient and on the critic's. joint: the model's step is refused, too, if
        the critic's is; its record then has the critic's norms, unless the model's own norm is not finite: then the
        critic's is not either, because it has seen such reconstructions."""
        own = self.guard.judge(own_norm, self._no)
        if not joint:
            return self.descent.guard.judge(norm, self._no), own
        verdict = self.descent.guard.judge(torch.where(own.refused, torch.nan, norm), self._no)
        critics = torch.cat([self._refused, own.record[1:3], verdict.record[3:]])
        blamed = own.refused & (norm < torch.inf)  # not if it is NaN
        return verdict._replace(record=torch.where(blamed, critics, verdict.record)), own

    def refresh(self) -> None:
        self.descent.refresh()

    def skips(self) -> list[Skip]:
        return self.descent.skips()

    def report(self, means: dict[str, float], step: int) -> dict[str, float]:
        """The critic's values are means over those steps of the window in which there are any."""
        taken, of_critic, with_term = self._taken
        self._taken = [0, 0, 0]
        found = {name: means.pop(name) for name in self.names}
        values = self.descent.report(means, step)
        for name, value in found.items():
            if steps := with_term if name in TERM else of_critic:
                values[name] = value * taken / steps
        if of_critic:  # of the steps that were taken
            values["critic/gradient_norm"] /= max(1 - values["critic/skipped"], 1e-9)
        return values

    def tensors(self) -> dict[str, Tensors]:
        return {**self.descent.tensors(), **self.engine.tensors()}

    def state(self) -> dict[str, Any]:
        return {**self.descent.state(), **self.engine.state(), "critic_gradient_norms": self.guard.state()}

    def load(self, read: Read, state: dict[str, Any]) -> None:
        self.descent.load(read, state)
        if state["critic_optimizer_steps"] is not None:
            self.engine.load(read, state)
            self.guard.load(state["critic_gradient_norms"])

    def begin(self, read: Read) -> None:
        """Starts from the other run's critic as well, if it has one."""
        self.descent.begin(read)
        try:
            weights = read("critic", self.engine.saved(0)[0])
        except Unreadable as error:
            if isinstance(error.__context__, FileNotFoundError):
                return
            raise
        self.engine.load_weights(weights)

    def size(self) -> int:
        weights = sum(p.numel() for p in self.critic.parameters())
        return self.descent.size() + 4 * weights * (1 + len(MOMENTS)) + self.critic.lecam.nbytes

    def summary(self) -> str:
        settings = self.settings
        weights = sum(p.numel() for p in self.critic.parameters())
        return (
            f"{self.descent.summary()}; a critic of {weights / 1e6:.2f} M parameters, trained from step "
            f"{self.critic_start} on, with {'an adaptive' if settings.adaptive else 'a'} weight of "
            f"{settings.weight:g} from step {self.start} on"
        )


def phases(config: Config) -> tuple[int, int]:
    """Returns the first step in which the critic is trained, and the first in which the model's loss has its term."""
    settings = config.adversarial
    return round(settings.critic_start * config.steps), round(settings.start * config.steps)


def metrics(settings: critic.Config) -> list[str]:
    """Returns the names of what a step adds to the metrics of Descent."""
    terms = [name for name, weight in (("lecam", settings.lecam), ("r1", settings.r1)) if weight]
    names = ("loss", *terms, "real", "fake", "accuracy", "gradient_norm", "skipped")
    return [*TERM, *(f"critic/{name}" for name in names)]
