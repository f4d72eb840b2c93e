"""The library interface to a trained run: pictures → latents → pictures.

import vaescale

model = vaescale.load("runs/vae_digits")
latents = model.encode(PIL.Image.open("seven.png"))
pictures = model.decode(latents)            # uint8 [1, size, size, channels]

It starts no process group, opens no port and does not import DeepSpeed.
"""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_type_hints

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from torch import Tensor

from . import settings, trained
from .data import stream
from .data.decode import Pixels, opened_image
from .evaluation.drawing import decoded, from_prior
from .evaluation.metrics.bits import bits
from .interfaces import (
    Batch,
    Bounded,
    Codebooks,
    Condition,
    Model,
    OnCodec,
    PixelLikelihood,
    Sampled,
    Sampling,
    WithPrior,
)
from .numerics import exact

AT_ONCE = 32  # pictures per forward pass, as in launch/evaluate.py
CHANNELS = (1, 3, 4)  # grey, RGB, RGBA

Picture = Image.Image | NDArray[Any] | Tensor | str | os.PathLike[str]
Label = int | ArrayLike | Tensor | None
T = TypeVar("T")


def load(run: str | os.PathLike[str], device: str | torch.device = "cpu") -> "Trained":
    place, device = Path(run), torch.device(device)
    config = trained.read_config(place, [])
    model, step = trained.read_model(place, config, device)
    return Trained(model, config, step, device)


class Trained:
    """A trained model. `codec` is the model itself, or a prior over codes together with its tokenizer, for anything
    not offered here; `step` is the step of its weights.

    Labels are for models with model.classes: one integer for all pictures, or one for each; -1 or None: not given.
    Attributes are for models with data.attributes: float [A] or [B, A], standardised over the training set; NaN or
    None: not given.
    """

    def __init__(self, model: Model, config: settings.Config, step: int, device: torch.device) -> None:
        self.model, self.config, self.step, self.device = model, config, step, device
        self.codec = trained.codec_of(model)
        self.reader = stream.pictures(config.data)

    @torch.no_grad()
    @exact()
    def encode(
        self, pictures: Picture | Sequence[Picture], label: Label = None, attributes: ArrayLike | Tensor | None = None
    ) -> list[Tensor]:
        """Returns latents [B, …] for each level, coarse to fine, on the model's device: int64 codes if they are
        discrete, else the mean of q(z|x).

        pictures: one picture, or a list of any mixture and sizes. A picture is a PIL image, the path of a file, or
        pixels in a numpy array or tensor: [H, W], [H, W, C], [C, H, W], or several of one size, [B, H, W, C] or
        [B, C, H, W]; C is 1, 3 or 4. If the shape is ambiguous, channels are last in an array and first in a tensor.
        Pixels are uint8, or floats in [0, 1], which are rounded to 8 bits. Raises ValueError for anything else.

        Each picture is preprocessed like a validation image: turned upright, composited onto white if transparent,
        cropped to the largest centred square, resized to data.size (bicubic), grey if data.channels=1. Only a JPEG of
        several times that size, given as a PIL image, may differ by a few grey levels, because the data pipeline
        decodes it at a reduced size. Its path gives the pipeline's pixels.
        """
        parts = self._each(self.codec.encode, pictures, label, attributes)
        return [torch.cat(level) for level in zip(*parts, strict=True)]

    def codes(
        self, pictures: Picture | Sequence[Picture], label: Label = None, attributes: ArrayLike | Tensor | None = None
    ) -> Tensor:
        """Returns the codes of pictures, such as `encode` takes, in one tensor, int64 [B, L, h, w] of L codebooks, as
        priors and exported files hold them. `decode(codes.unbind(1))` decodes them. Raises ValueError if the latents of
        this model are no codes."""
        if not isinstance(self.codec, Codebooks):
            raise ValueError(f"a model of kind {self.config.model.kind} has no codes: use encode, which returns floats")
        return torch.stack(self.encode(pictures, label, attributes), dim=1)

    @torch.no_grad()
    @exact()
    def bits(
        self,
        pictures: Picture | Sequence[Picture],
        label: Label = None,
        attributes: ArrayLike | Tensor | None = None,
        draws: int = 1,
    ) -> NDArray[np.float64]:
        """Returns the bound on −log2 p(x) of each picture, as preprocessed, in bits per dimension (subpixel of the
        8-bit image): fp64 [B], as launch/evaluate.py measures it. A tokenizer has the uniform prior over its codes.

        draws: latents drawn from q(z|x) for each picture. With several it is the importance-weighted bound, which is
        tighter; codes are not drawn. The noise depends only on the numbers of the picture, from 0, and of the draw.

        Raises ValueError if the model has no such bound.
        """
        if draws < 1:
            raise ValueError(f"the number of draws must be at least 1, not {draws}")
        codec = trained.measured_codec(self.model, self.config)
        if not isinstance(codec, Bounded):
            raise ValueError(self._without_bits())
        if isinstance(codec, WithPrior):
            draws = 1
        parts = self._each(lambda batch: bits(codec, batch, draws), pictures, label, attributes)
        name = "bits_per_dim_iw" if "bits_per_dim_iw" in parts[0] else "bits_per_dim"
        return torch.cat([part[name] for part in parts]).cpu().numpy()

    @torch.no_grad()
    def decode(
        self, latents: Tensor | Sequence[Tensor], label: Label = None, attributes: ArrayLike | Tensor | None = None
    ) -> NDArray[np.uint8]:
        """Returns the pictures of latents such as `encode` returns: uint8 [B, size, size, C], C = 3 or 1, the means of
        p(x|z).

        Finer levels that are left out are drawn from the prior with torch's global generator. Raises ValueError for
        latents that do not fit this model, and if levels are left out and there is no prior.
        """
        levels = self._latents([latents] if isinstance(latents, Tensor) else [torch.as_tensor(one) for one in latents])
        condition = self._condition(label, attributes, len(levels[0]))
        return _channels_last(decoded(self.codec, levels, condition))

    @torch.no_grad()
    def sample(
        self,
        count: int,
        label: Label = None,
        attributes: ArrayLike | Tensor | None = None,
        seed: int = 0,
        temperature: float = 1.0,
        guidance: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        passes: int = 12,
        positions: Literal["confidence", "halton"] = "confidence",
    ) -> NDArray[np.uint8]:
        """Returns pictures of latents drawn from the prior: uint8 [count, size, size, C], the means of p(x|z). The same
        seed gives the same pictures: picture i depends only on (seed, i).

        guidance and what follows it say how codes are drawn, see interfaces.Sampling; they are for priors over codes,
        and guidance for diffusions.
        Raises ValueError if there is no prior, or for what it cannot do."""
        if count < 1:
            raise ValueError(f"the number of samples must be at least 1, not {count}")
        sampling = Sampling(top_k, top_p, guidance, passes, positions)
        _check_sampling(sampling, temperature)
        if sampling != Sampling() and not isinstance(self.codec, Sampled):
            raise ValueError(
                f"guidance, top_k, top_p, passes and positions are for priors over codes, and guidance for diffusions, "
                f"not for a model of kind {self.config.model.kind}"
            )
        condition = self._condition(label, attributes, count)
        return _channels_last(from_prior(trained.codec_of(self.model, sampling), condition, seed, temperature))

    def _each(
        self,
        apply: Callable[[Batch], T],
        pictures: Picture | Sequence[Picture],
        label: Label,
        attributes: ArrayLike | Tensor | None,
    ) -> list[T]:
        """Applies a function to AT_ONCE pictures at a time, numbered from 0."""
        images = list(self._squares(pictures))
        if not images:
            raise ValueError("there are no images to encode")
        condition = self._condition(label, attributes, len(images))
        results = []
        for start in range(0, len(images), AT_ONCE):
            part = slice(start, start + AT_ONCE)
            x = self.reader.stack(images[part])
            numbers = torch.arange(start, start + len(x))
            batch = Batch(x, condition.label[part], condition.attributes[part], numbers)
            results.append(apply(batch.to(self.device)))
        return results

    def _without_bits(self) -> str:
        """Returns a sentence on why there is no bound."""
        if reason := settings.without_bound(self.config):
            return reason
        codec = self.model.codec if isinstance(self.model, OnCodec) else self.model
        if isinstance(codec, PixelLikelihood):
            return (
                "the bits/dim of a tokenizer need its error, which is measured when its training ends: run the "
                "training to its end"
            )
        kind = (settings.base_of(self.config) or self.config).model.kind
        return f"a model of kind {kind} has no likelihood, hence no bits/dim"

    def _squares(self, pictures: Any) -> Iterator[Pixels]:
        """Yields each picture as uint8 [size, size, 3]."""
        size = self.config.data.size
        match pictures:
            case list() | tuple():
                for one in pictures:
                    yield from self._squares(one)
            case Image.Image():
                if pictures.mode in ("I", "F") or pictures.mode.startswith("I;"):
                    raise ValueError(
                        f"a PIL image of mode {pictures.mode} does not have 8 bits a channel: give the path of its "
                        "file, or convert it to L or RGB"
                    )
                yield opened_image(pictures, size)
            case str() | os.PathLike():
                yield self.reader.validation(Path(pictures).read_bytes())
            case Tensor() | np.ndarray():
                for pixels in _pixels(pictures):
                    yield opened_image(Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels), size)
            case _:
                raise ValueError(
                    f"an image must be a PIL image, a path, a numpy array or a tensor, not {type(pictures).__name__}"
                )

    def _condition(self, label: Label, attributes: ArrayLike | Tensor | None, count: int) -> Condition:
        classes, names = getattr(self.config.model, "classes", 0), self.config.data.attributes
        if label is not None and not classes:
            raise ValueError("this model takes no label: it was trained with model.classes=0")
        if attributes is not None and not names:
            raise ValueError("this model takes no attributes: it was trained without data.attributes")
        labels = torch.as_tensor(-1 if label is None else label).cpu()
        if labels.is_floating_point() or not ((labels == -1) | ((labels >= 0) & (labels < classes))).all():
            raise ValueError(
                f"labels are whole numbers from 0 to {classes - 1}, or -1 for none: found {labels.tolist()}"
            )
        values = torch.as_tensor(float("nan") if attributes is None else attributes).float().cpu()
        try:
            condition = Condition(labels.long().expand(count), values.expand(count, len(names)))
        except RuntimeError:
            raise ValueError(
                f"{count} images need one label or {count}, and attributes [{len(names)}] or "
                f"[{count}, {len(names)}]: found {tuple(labels.shape)} and {tuple(values.shape)}"
            ) from None
        return Condition(*(tensor.to(self.device) for tensor in condition))

    @cached_property
    def _levels(self) -> list[Tensor]:
        """The latents of a blank image, for their shapes and types."""
        return self.codec.encode(settings.blank(self.config, 1).to(self.device))

    def _latents(self, given: list[Tensor]) -> list[Tensor]:
        """Returns the latents on the device and of the right type. Raises ValueError if this model cannot decode
        them."""
        wanted = self._levels
        found = [tuple(level.shape) for level in given]
        alike = all(
            level.ndim and level.shape[1:] == other.shape[1:] and level.is_floating_point() == other.is_floating_point()
            for level, other in zip(given, wanted, strict=False)
        )
        if not given or len(given) > len(wanted) or not alike or len({shape[0] for shape in found} - {0}) != 1:
            shapes = ", ".join(f"[B, {', '.join(map(str, level.shape[1:]))}]" for level in wanted)
            kind = "floats" if wanted[0].is_floating_point() else "whole numbers"
            raise ValueError(f"the latents of this model are {kind} {shapes}, coarse to fine; found {found}")
        if isinstance(self.codec, Codebooks):
            for level, usage in zip(given, self.codec.usage(clear=False).values(), strict=False):
                if len(level) and not 0 <= int(level.min()) <= int(level.max()) < len(usage.window):
                    raise ValueError(
                        f"codes are from 0 to {len(usage.window) - 1}: found {level.min()} to {level.max()}"
                    )
        return [level.to(self.device, other.dtype) for level, other in zip(given, wanted, strict=False)]


def _check_sampling(sampling: Sampling, temperature: float) -> None:
    """Raises ValueError for values that the command line refuses, too."""
    for name, value in {"temperature": temperature, "guidance": sampling.guidance, "top_k": sampling.top_k}.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name}={value} must be a number, 0 or more")
    if not 0 < sampling.top_p <= 1:
        raise ValueError(f"top_p={sampling.top_p} must be above 0 and at most 1")
    if sampling.passes < 1:
        raise ValueError(f"passes={sampling.passes} must be at least 1")
    if sampling.positions not in (known := get_args(get_type_hints(Sampling)["positions"])):
        raise ValueError(f"positions={sampling.positions} must be one of {', '.join(known)}")


def _pixels(pictures: NDArray[Any] | Tensor) -> NDArray[np.uint8]:
    """Returns pixels as [B, H, W, C]. Raises ValueError for other shapes, and for types other than uint8 and floats in
    [0, 1]."""
    shape, kind = tuple(pictures.shape), str(pictures.dtype).removeprefix("torch.")
    first = isinstance(pictures, Tensor)
    if isinstance(pictures, Tensor):
        pictures = pictures.detach().cpu()
        pictures = (pictures.double() if pictures.is_floating_point() else pictures).numpy()
    if np.issubdtype(pictures.dtype, np.floating):
        low, high = (float(end) for end in (pictures.min(), pictures.max())) if pictures.size else (0.0, 0.0)
        if not (low >= 0 and high <= 1):
            raise ValueError(f"pixels that are floats must be in [0, 1]: found {low:g} to {high:g}")
        pictures = np.rint(pictures.astype(np.float64) * 255).astype(np.uint8)
    if pictures.dtype != np.uint8:
        raise ValueError(f"pixels must be uint8, or floats in [0, 1], not {kind}")
    if pictures.ndim == 2:
        pictures = pictures[..., None]
    places = [axis for axis in (-1, -3) if pictures.ndim in (3, 4) and pictures.shape[axis] in CHANNELS]
    if not places or not pictures.size:
        raise ValueError(
            f"pixels of shape {shape}: give [H, W], [H, W, C], [C, H, W], [B, H, W, C] or [B, C, H, W] with C 1, 3 or 4"
        )
    pictures = np.moveaxis(pictures, places[-1] if first and len(shape) > 2 else places[0], -1)
    return np.ascontiguousarray(pictures if pictures.ndim == 4 else pictures[None])


def _channels_last(images: Tensor) -> NDArray[np.uint8]:
    return images.permute(0, 2, 3, 1).contiguous().cpu().numpy()
