"""The data types and interfaces that the packages share, and nothing else.

Images are uint8 [B, C, H, W], C = 3 or 1, in a Batch, and float in [0, 1] in `decode` and `Output`. Information is in
nats; only reports to people are in bits.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn


class Shape(NamedTuple):
    """The shape of a model's input; known before any data are read."""

    channels: int = 3  # C
    size: int = 128  # H = W
    attributes: int = 0  # A


class Condition(NamedTuple):
    """What the images are conditioned on."""

    label: Tensor  # int64 [B]; −1: not given
    attributes: Tensor  # fp32 [B, A], standardised over the training set; NaN: not given


class Batch(NamedTuple):
    x: Tensor  # from the Reader; pictures are uint8 [B, C, H, W]
    label: Tensor  # int64 [B]
    attributes: Tensor  # fp32 [B, A]
    sample: Tensor  # int64 [B]: the number g in the endless sequence (training) or the number in the index (validation)

    @property
    def condition(self) -> Condition:
        return Condition(self.label, self.attributes)

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in self))


class Output(NamedTuple):
    loss: Tensor  # scalar, fp32
    # Scalars, detached, means over the batch, by "group/name", or "name" for group "train". The names and their order
    # are the same in all steps.
    metrics: dict[str, Tensor]
    reconstruction: Tensor | None  # [B, C, H, W], in [0, 1] up to overshoot


class Bound(NamedTuple):
    """The bound on log p(x), the probability of the 8-bit image, from one draw z ~ q(z|x), in nats.

    ELBO = −distortion − Σ rate. log p(x|z) + log p(z) − log q(z|x) = −distortion + log_ratio is a log-weight of the
    importance-weighted bound (IWAE).
    """

    distortion: Tensor  # fp32 [B]: −log p(x|z)
    rate: Tensor  # fp32 [L, B]: KL(q‖p) of each level, coarse to fine, in closed form if it has one
    # fp32 [B]: log p(z) − log q(z|x) of the draw, over all levels; None: the rate is a random estimate, without weights
    log_ratio: Tensor | None

    @staticmethod
    def exact(distortion: Tensor) -> "Bound":
        """Returns that of an image whose latents are all given."""
        nothing = torch.zeros_like(distortion)
        return Bound(distortion, nothing[None][:0], nothing)


T = TypeVar("T")
Tensors = dict[str, Tensor]


def by_level(name: str, values: Sequence[T]) -> dict[str, T]:
    """Returns values, given coarse to fine, by the names "name/level0" …, padded so that they sort in this order."""
    width = len(str(len(values) - 1))
    return {f"{name}/level{number:0{width}}": value for number, value in enumerate(values)}


class Quantized(NamedTuple):
    z: Tensor  # [..., D] input of the decoder; the gradient passes straight through to the encoder
    codes: Tensor  # int64 [...]
    loss: Tensor  # scalar: the terms that the codebook and the commitment add to the loss
    commitment: Tensor  # fp32 [L], detached: mean squared distance between each codebook's input and its code


class Usage(NamedTuple):
    """Usage statistics of a codebook, summed over ranks and therefore equal on all of them."""

    window: Tensor  # int64 [K] uses since the last report
    ever: Tensor  # bool [K] whether the code has ever been used
    age: Tensor  # int64 [K] steps since the last use or reset
    average: Tensor  # fp32 [K] uses per step, exponentially averaged over about 100 steps, starting at zero
    resets: Tensor  # int64 [] dead codes replaced since the last report
    steps: Tensor  # int64 [] steps since the last report


@runtime_checkable
class Codec(Protocol):
    """A model that maps images to latents and back. Evaluation needs no more than this."""

    def encode(self, batch: Batch, temperature: float = 0.0) -> list[Tensor]:
        """Returns latents, coarse to fine; discrete ones are int64 codes. From a distribution q(z|x) it returns a draw
        with the standard deviation multiplied by `temperature`, hence the mean at 0."""
        ...

    def decode(
        self,
        latents: list[Tensor],
        condition: Condition | None = None,
        temperature: float = 1.0,
        draw: bool = False,
        sample: Tensor | None = None,
    ) -> Tensor:
        """Returns float [B, C, H, W] in [0, 1] up to overshoot: the mean of p(x|z), or with `draw` a draw from it.

        Levels left out, the finer ones or all, are drawn from the prior with standard deviations multiplied by
        `temperature`. Without latents, B is that of the condition. Raises ValueError if there is no prior for them.

        sample: int64 [B], numbers of the images, any of 64 bits. The latents drawn for an image then depend only on its
        number; without them they come from torch's default generator, from which `draw` draws in any case.
        """
        ...


@runtime_checkable
class Bounded(Protocol):
    """A codec with a bound on the likelihood of images."""

    def bound(self, batch: Batch, draw: int = 0) -> Bound:
        """Returns the bound from the draw numbered `draw`. Its noise depends only on this number and each image's
        `batch.sample`, not on the rest of the batch."""
        ...


@runtime_checkable
class Codebooks(Protocol):
    """A codec whose latents are codes: level i of `encode` holds the codes of codebook i."""

    def usage(self, clear: bool) -> dict[str, Usage]:
        """Returns the usage of each codebook by name, coarse to fine; `clear` starts a new window."""
        ...

    def quantizers(self) -> dict[str, Any]:
        """Returns the settings of each codebook's quantiser, by the same names."""
        ...


@runtime_checkable
class PixelLikelihood(Protocol):
    """A codec with the probability p(x|z) of images: with any prior of its latents, it has a bound on p(x)."""

    def bound_given(self, batch: Batch, latents: list[Tensor], draw: int = 0) -> Bound:
        """Returns the bound on log p(x|latents), given the latents of all levels or the coarsest; its distortion is
        infinite until it is measured. Its rates are those of the levels that are not given: L = 0 if all are, and the
        bound is exact. draw: as in `Bounded.bound`."""
        ...


@runtime_checkable
class Posterior(Protocol):
    """A codec whose coarsest latents are continuous and depend on the image alone: z ~ q(z|x) = N(mean, diag std²)."""

    def posterior(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Returns mean and std, fp32 [B, D] or [B, D, h, w] each."""
        ...


@runtime_checkable
class OnCodec(Protocol):
    """A model that may be built on the frozen codec of another run."""

    @property
    def codec(self) -> Any:
        """The codec; None if there is none."""
        ...


@dataclass(frozen=True)
class Sampling:
    """How samples are drawn from a prior; all but `guidance` is for codes. The defaults draw from its distribution."""

    top_k: int = 0  # only the k most probable codes are drawn; 0: all
    top_p: float = 1.0  # only the most probable codes that together have this probability
    # g: logits are those without the condition + g · (those with it − those without it) (Ho, Salimans 2022,
    # "Classifier-free diffusion guidance"); 1: no guidance, 0: no condition
    guidance: float = 1.0
    passes: int = 12  # of a prior with masked order, in which all codes are drawn
    # of such a prior, which codes are drawn first: those of which it is most certain, or a fixed order, spread evenly
    positions: Literal["confidence", "halton"] = "confidence"


class Known(NamedTuple):
    """Codes that are given when others are drawn."""

    codes: Tensor  # int64 [B, L, h, w]
    where: Tensor  # bool [L, h, w]: whether the code is given


@runtime_checkable
class Prior(Protocol):
    """A model of the codes of a frozen codec, maps [B, L, h, w] of L codebooks, coarse to fine."""

    @property
    def codec(self) -> Codec: ...

    @property
    def code_shape(self) -> tuple[int, int, int]:
        """L, h, w."""
        ...

    @property
    def any_order(self) -> bool:
        """Whether codes that are drawn depend on given codes wherever these are, not only at earlier places."""
        ...

    def codes(self, batch: Batch) -> Tensor:
        """Returns codes int64 [B, L, h, w]: `batch.x`, if it holds codes, else those of its pictures."""
        ...

    def rates(self, codes: Tensor, condition: Condition, sample: Tensor, draw: int = 0) -> Tensor:
        """Returns −log p of each code in nats, fp32 [B, L, h, w], in eval mode. Their sum over an image is −log p of
        its codes; for a prior with random or masked order it is an unbiased estimate of a bound on it, from the draw
        numbered `draw`, which depends only on this number and each image's `sample`."""
        ...

    def draw(
        self,
        condition: Condition,
        sample: Tensor,
        temperature: float = 1.0,
        sampling: Sampling = Sampling(),
        known: Known | None = None,
    ) -> Tensor:
        """Draws codes int64 [B, L, h, w]. Those of an image depend only on its condition and its number in `sample`,
        int64 [B], up to rounding. The logits are divided by the temperature; at 0 the most probable codes are taken."""
        ...


@runtime_checkable
class Sampled(Protocol):
    """A codec whose samples depend on Sampling."""

    sampling: Sampling


@runtime_checkable
class Diffused(Protocol):
    """Such a codec that is a diffusion: its samples have no temperature."""

    sampling: Sampling

    @property
    def codec(self) -> Any:
        """The codec over whose latents it is; None over pixels."""
        ...

    def with_sampling(self, sampling: Sampling) -> Codec:
        """Returns the same codec with other samples. Raises ValueError for what it does not have."""
        ...

    def sampling_protocol(self) -> dict[str, Any]:
        """Returns how samples are drawn, by name."""
        ...


def over_pixels(codec: Codec) -> bool:
    """Returns whether the latents are the images themselves, so that reconstructions say nothing."""
    return isinstance(codec, Diffused) and codec.codec is None


@runtime_checkable
class WithPrior(Protocol):
    """A codec whose latents have a trained prior, which other latents are drawn from."""

    @property
    def prior(self) -> Prior: ...

    @property
    def sampling(self) -> Sampling: ...


@runtime_checkable
class Calibrated(Protocol):
    """A model with statistics of the training set that are measured once, at the end of training, with the averaged
    weights: over all training images, each as validation would see it. They are buffers, infinite until then, and
    nothing in the model's own training depends on them."""

    def calibration(self) -> dict[str, Tensor]:
        """Returns the statistics by name, for people: fp32 [D], one for each channel."""
        ...

    def calibration_sums(self, batch: Batch) -> Tensor:
        """Returns what the statistics are computed from: sums over the images of the batch, fp64 [S]."""
        ...

    def calibrate(self, sums: Tensor) -> None:
        """Sets the statistics from the sums over all images, fp64 [S]."""
        ...


def calibrated(model: Calibrated) -> bool:
    """Returns whether the statistics of the model have been measured."""
    return all(bool(each.isfinite().all()) for each in model.calibration().values())


@runtime_checkable
class LatentStatistics(Protocol):
    """A codec whose coarsest latents have a mean and a standard deviation that are measured for each channel. A prior
    of these latents, such as a diffusion model, is trained on (z − mean) / std."""

    def latent_statistics(self) -> tuple[Tensor, Tensor]:
        """Returns the mean and the standard deviation of each channel over the draws z ~ q(z|x), all places of maps and
        all training images, fp32 [D]: the statistics of Calibrated."""
        ...


@runtime_checkable
class KLWeighted(Protocol):
    """A codec whose loss contains a weighted KL. It reports "rate", or a rate for each level."""

    def kl_settings(self) -> Any:
        """Returns the settings that decide whether the latents collapse: beta, beta_warmup_steps, free_bits and
        likelihood."""
        ...


@runtime_checkable
class Reconstructor(Protocol):
    """A model whose loss compares a reconstruction with the image."""

    @property
    def last_layer(self) -> nn.Module:
        """The layer with the parameter "weight" whose output is the reconstruction, up to a factor and a constant."""
        ...

    def reconstruction_loss(self, reconstruction: Tensor, x: Tensor) -> Tensor:
        """Returns the part of the loss that compares them, fp32 []. Both [B, C, H, W], x in uint8."""
        ...


@runtime_checkable
class SeparateDecoder(Protocol):
    """A codec whose decoder can be trained alone, because it shares no parameters with what latents depend on."""

    def freeze_encoder(self) -> None:
        """Freezes all that latents depend on, codebooks included: no later step changes the latents of an image."""
        ...


@runtime_checkable
class Basis(Protocol):
    """A codec with a linear decoder."""

    def basis(self) -> Tensor:
        """Returns the mean image, then the first directions, each scaled to deviate from 0.5 by at most 0.5: fp32
        [K, C, H, W] in [0, 1]."""
        ...


class Model(nn.Module, ABC):
    """A trainable torch module that computes its own loss. Its other capabilities are the protocols above that it
    implements. Callers test for a protocol, never for a class."""

    noise_version: int | None = None  # of nn.noise.normal, as the run began with it; None: the newest
    # The hash of the codec whose encoder this model has, if its decoder alone was trained; None: it has its own.
    latents_of: str | None = None

    @abstractmethod
    def forward(self, batch: Batch, step: int) -> Output: ...

    def update(self, step: int, lr: float) -> None:
        """Updates what the optimiser does not train. Called on all ranks, once after each optimiser step."""
