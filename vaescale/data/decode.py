"""Compressed bytes → uint8 [size, size, 3]; all of it pure functions of the bytes and of (seed, g)."""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .order import uniforms

FORMATS = ("JPEG", "PNG", "WEBP")
MOST_PIXELS = 100_000_000  # the largest ImageNet picture has 40 megapixels; a decompression bomb claims far more
# The decoder's cheap halvings stop this far above the wanted size: measured on the demo photographs at 64 and 128 px,
# 1.5 keeps every one of them at 36 dB or more against full decoding, 1.25 lets some fall to 27.
HEADROOM = 1.5
TRIES = 10  # random-resized-crop: draws before falling back to the centre, as in torchvision

Pixels = NDArray[np.uint8]
Box = tuple[float, float, float, float]  # left, upper, right, lower, in pixels


class Damaged(ValueError):
    """These bytes are no picture that may be decoded; the text is the cause."""


def train_image(data: bytes, size: int, least_area: float, flip: bool, seed: int, g: int) -> Pixels:
    """Random-resized-crop (Szegedy et al. 2015, section 6) to `size` and a fair flip, drawn from (seed, g).

    The crop covers between `least_area` and 1 of the picture at a side ratio between 3/4 and 4/3.
    """
    draws = uniforms(seed, g, np.arange(4 * TRIES + 1))
    image = _open(data)
    pixels = _resize(image, _random_box(image.size, least_area, draws), size)
    return pixels[:, ::-1] if flip and draws[-1] < 0.5 else pixels


def validation_image(data: bytes, size: int) -> Pixels:
    """The largest centred square, resized to `size`: "short side to `size`, centre crop" in one resampling."""
    image = _open(data)
    return _resize(image, _centre_box(image.size), size)


def _open(data: bytes) -> Image.Image:
    """Reads the header only, so that nothing is allocated for a size that is refused."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError:
        raise Damaged("too many pixels") from None
    except (OSError, SyntaxError, ValueError):
        raise Damaged("not a JPEG, PNG or WebP picture") from None
    if image.width * image.height > MOST_PIXELS:
        raise Damaged(f"{image.width}×{image.height} are too many pixels")
    return image


def _resize(image: Image.Image, box: Box, size: int) -> Pixels:
    width, height = image.size
    reduction = max(1, int(min(box[2] - box[0], box[3] - box[1]) / (HEADROOM * size)))
    try:
        # The JPEG decoder can halve while it decodes. Asked with anything but the floor it decodes in full.
        drafted = image.draft("RGB", (width // reduction, height // reduction))
        image.load()
        if image.mode != "RGB":
            image = image.convert("RGB")
    except (OSError, SyntaxError, ValueError):
        raise Damaged("the picture's data are cut or corrupt") from None
    # Its exact scale, 1/2, 1/4 or 1/8: sizes are rounded up, and their quotient would shift the picture.
    scale = drafted[1][2] / width if drafted else 1.0
    scaled = (box[0] * scale, box[1] * scale, box[2] * scale, box[3] * scale)
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=scaled))


def _random_box(size: tuple[int, int], least_area: float, draws: NDArray[np.float64]) -> Box:
    width, height = size
    area, ratio, left, top = draws[: 4 * TRIES].reshape(4, TRIES)
    area = (least_area + (1 - least_area) * area) * width * height
    ratio = np.exp((2 * ratio - 1) * np.log(4 / 3))
    w, h = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = np.flatnonzero((w >= 1) & (h >= 1) & (w <= width) & (h <= height))
    if not len(fits):
        return _centre_box(size)
    k = fits[0]
    x, y = np.floor(left[k] * (width - w[k] + 1)), np.floor(top[k] * (height - h[k] + 1))
    return float(x), float(y), float(x + w[k]), float(y + h[k])


def _centre_box(size: tuple[int, int]) -> Box:
    width, height = size
    side = min(width, height)
    x, y = (width - side) / 2, (height - side) / 2
    return x, y, x + side, y + side
