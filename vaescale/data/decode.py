"""Decoding: compressed bytes → uint8 [size, size, 3]. The results depend only on the bytes and on (seed, g)."""

import importlib
import importlib.util
import io
import math
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, JpegImagePlugin

from . import DataError, names
from .order import uniforms

FORMATS = ("JPEG", "PNG", "WEBP")
CONVERTIBLE_FORMATS = ("TIFF", "BMP", "GIF")  # read by `converted`, which also reads HEIF if pillow-heif is installed
MAX_MEGAPIXELS = 100  # the largest ImageNet picture has 40 megapixels; a decompression bomb claims far more
# (scale, headroom): the JPEG decoder divides the sides by `scale` if the result is at least `headroom` times the
# target size. Each headroom is the smallest multiple of 0.1 at which every demo photograph keeps a PSNR of 36 dB
# against full decoding. The decoder drops high frequencies block by block; dropping more needs more headroom.
HEADROOM = ((8, 1.5), (4, 1.4), (2, 1.3))
PNG = b"\x89PNG\r\n\x1a\n"
DARK = 64  # of 256: the lower 14 of 16 bits
LONGEST_SIDE = 65_500  # pixels; the limit of JPEG
TRIES = 10  # random-resized-crop: draws before falling back to the centre, as in torchvision
WIDEST = 4 / 3  # largest aspect ratio of a crop; the smallest is its inverse
DRAWS = 4 * TRIES + 1  # per sample; the last one decides the flip
BLOCK = 64  # samples hashed in one call: numpy takes as long for one, and neighbouring samples are read together

Decoder = Literal["pillow", "turbo"]  # turbo: simplejpeg where it decodes without an error, else Pillow
Pixels = NDArray[np.uint8]
Box = tuple[int, int, int, int]  # left, upper, right, lower
Turn = tuple[bool, bool, bool]  # transpose, then flip horizontally, then flip vertically

# EXIF orientation → the operations that make the stored picture upright
TURNS = {o: (o > 4, o in (2, 3, 6, 7), o in (3, 4, 7, 8)) for o in range(1, 9)}


TOO_LARGE = "too many pixels"
DEPTH = "bit depth is neither 8 nor 16"
CAUSES = ("not a picture", TOO_LARGE, "cut or corrupt", "changed since it was indexed")


class Damaged(ValueError):
    """The bytes cannot or must not be decoded. The text is one of CAUSES or, from `converted`, DEPTH."""


def require(decoder: Decoder) -> None:
    """Raises DataError if `decoder` is not installed."""
    if decoder == "turbo" and importlib.util.find_spec("simplejpeg") is None:
        raise DataError("data.decoder=turbo needs the package simplejpeg: run `pip install 'vaescale[turbo]'`")


def train_image(
    data: bytes,
    size: int,
    min_crop_area: float,
    flip: bool,
    seed: int,
    g: int,
    decoder: Decoder = "pillow",
    max_megapixels: int = MAX_MEGAPIXELS,
) -> Pixels:
    """Decodes one training image: random-resized-crop (Szegedy et al. 2015, section 6) to uint8 [size, size, 3].

    The crop covers a share of the picture between `min_crop_area` and 1, at an aspect ratio between 3/4 and 4/3. If no
    draw fits, it is the largest centred crop in that range of ratios. With `min_crop_area` 1 it is the centred square,
    as in validation. With `flip` the image is mirrored with probability 1/2. All draws are functions of (seed, g).
    Raises Damaged.
    """
    draws = _draws(seed, g // BLOCK)[g % BLOCK]
    image, turn, (width, height) = _open(data, max_megapixels)
    left, upper, right, lower = _random_box((width, height), min_crop_area, draws)
    scale = _reduction(image, min(right - left, lower - upper), size)
    # Rounded to whole pixels of the reduced picture: the crop is random, so an offset of a few pixels does no harm.
    box = (left // scale, upper // scale, right // scale, lower // scale)
    stored = _stored_box(box, (width // scale, height // scale), turn)
    crop = _turbo_crop(data, image, scale, stored) if decoder == "turbo" else None
    if crop is None:
        _decode(image, scale)
        crop = np.array(_rgb(image, stored))
    pixels = _turned(_resized(crop, size), turn)
    if flip and draws[-1] < 0.5:
        return torch.from_numpy(pixels).flip(1).numpy()  # numpy takes eight times as long to copy a reversed array
    return pixels


def validation_image(data: bytes, size: int, max_megapixels: int = MAX_MEGAPIXELS) -> Pixels:
    """Decodes one validation image: the largest centred square, resized to uint8 [size, size, 3].

    This equals "resize the short side to `size`, then crop the centre", in one resampling. Raises Damaged.
    """
    image, turn, _ = _open(data, max_megapixels)
    stored = image.size
    scale = _reduction(image, min(stored), size)
    _decode(image, scale)
    return _turned(_square(image, stored, scale, size), turn)


def opened_image(image: Image.Image, size: int) -> Pixels:
    """Does as `validation_image` does with a picture that Pillow has already opened. uint8 [size, size, 3].

    A JPEG is always decoded at full resolution, however small `size` is. Raises Damaged.
    """
    _decode(image)
    return _turned(_square(image, image.size, 1, size), _turn(image))


def _square(image: Image.Image, stored: tuple[int, int], scale: int, size: int) -> Pixels:
    """Crops and resizes the centred square, which does not depend on the orientation.

    stored: the size of the picture before the decoder divided it by `scale`.
    """
    (width, height), side = stored, min(stored)
    left, upper = (width - side) / 2, (height - side) / 2
    # Divide by `scale`, not by the ratio of the two sizes: the decoder rounds reduced sizes up.
    box = (left / scale, upper / scale, (left + side) / scale, (upper + side) / scale)
    return np.asarray(_rgb(image).resize((size, size), Image.Resampling.BICUBIC, box=box))


def prepared(data: bytes, short_side: int, quality: int, max_megapixels: int = MAX_MEGAPIXELS) -> bytes:
    """Re-encodes a picture as an upright RGB JPEG without metadata, its short side at most `short_side` pixels.

    Chroma is not subsampled: training crops of so small a picture are hardly reduced, so the loss would show. The
    output is deterministic. Raises Damaged.
    """
    image, turn, _ = _open(data, max_megapixels)
    _decode(image)
    factor = min(1.0, short_side / min(image.size))
    size = (round(image.width * factor), round(image.height * factor))
    return _jpeg(_turned(np.asarray(_rgb(image).resize(size, Image.Resampling.LANCZOS)), turn), quality)


def converted(data: bytes, quality: int, max_megapixels: int = MAX_MEGAPIXELS) -> bytes:
    """Converts the first picture of a TIFF, BMP, GIF or HEIF file: upright, 8 bits or 16-bit grey, no metadata.

    The result is a PNG. HEIF, which is lossy itself, becomes a JPEG of this quality, or a PNG if `quality` is 0.
    Bytes in one of FORMATS are returned unchanged. Raises Damaged.
    """
    try:
        _header(data, max_megapixels)
        return data
    except Damaged as error:
        if str(error) == TOO_LARGE:
            raise
    image = _header(data, max_megapixels, _convertible())
    lossy = image.format == "HEIF"
    with _damaged("cut or corrupt", (Exception,)):  # these decoders raise any kind of exception
        image.load()  # for TIFF and HEIF this also turns the picture upright
        if image.mode not in ("I", "F"):
            pixels = np.asarray(_of_8_or_16_bits(image))
    if image.mode in ("I", "F"):  # the value of white is unknown
        raise Damaged(DEPTH)
    if lossy and quality:
        return _jpeg(pixels, quality)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def check(data: bytes, max_megapixels: int = MAX_MEGAPIXELS, pixels: bool = False) -> None:
    """Raises Damaged if the header is not that of a picture or, with `pixels`, if the picture does not decode."""
    if pixels:
        validation_image(data, 1, max_megapixels)  # reads all of it, at the smallest size that the decoder offers
    else:
        _header(data, max_megapixels)


def is_dark(data: bytes, max_megapixels: int = MAX_MEGAPIXELS) -> bool:
    """Returns whether the bytes are a 16-bit PNG that decodes to values below DARK only. Raises Damaged.

    Such a file probably holds the 8 to 14 bits of a camera, stored without scaling.
    """
    if not data.startswith(PNG) or data[24:25] != b"\x10":  # the bit depth in IHDR
        return False
    return int(np.asarray(_rgb(_open(data, max_megapixels)[0])).max()) < DARK


def grey(pixels: Pixels) -> Pixels:
    """uint8 [H, W, 3] → luma (ITU-R BT.601), uint8 [H, W, 1]."""
    return np.asarray(Image.fromarray(pixels).convert("L"))[..., None]


# The exceptions that some 200,000 cut or altered files raised. TypeError came from PNG text chunks named as EXIF or
# transparency.
RAISED = (OSError, SyntaxError, ValueError, TypeError)


@contextmanager
def _damaged(cause: str, raised: tuple[type[Exception], ...] = RAISED) -> Iterator[None]:
    """Turns Pillow's exceptions into Damaged, and suppresses its warnings."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except raised:
        raise Damaged(cause) from None


def _header(data: bytes, max_megapixels: int, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """Opens a picture without decoding it, so a refused size allocates nothing. Raises Damaged."""
    most = max_megapixels * 1_000_000
    if Image.MAX_IMAGE_PIXELS is not None:  # Pillow refuses more than twice as many
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, most)
    try:
        with _damaged("not a picture"):
            image = Image.open(io.BytesIO(data), formats=formats)
    except Image.DecompressionBombError:
        raise Damaged(TOO_LARGE) from None
    if image.width * image.height > most or max(image.size) > LONGEST_SIDE:
        raise Damaged(TOO_LARGE)
    return image


@lru_cache(1)
def _convertible() -> tuple[str, ...]:
    if not names.has_heif():
        return CONVERTIBLE_FORMATS
    importlib.import_module("pillow_heif").register_heif_opener()
    return (*CONVERTIBLE_FORMATS, "HEIF")


def _of_8_or_16_bits(image: Image.Image) -> Image.Image:
    """Keeps 16-bit grey, in the machine's byte order; converts other grey to 8 bits, all else to RGB on white."""
    if image.mode.startswith("I;16"):
        return Image.fromarray(np.asarray(image).astype(np.uint16))
    return image.convert("L") if image.mode in ("1", "L") and "transparency" not in image.info else _rgb(image)


def _jpeg(pixels: Pixels, quality: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality, subsampling="4:4:4")
    return file.getvalue()


def _open(data: bytes, max_megapixels: int) -> tuple[Image.Image, Turn, tuple[int, int]]:
    """Returns (the picture, how to turn it upright, its upright size)."""
    image = _header(data, max_megapixels)
    if image.format == "PNG":
        _decode(image)  # the orientation may follow the pixels
    turn = _turn(image)
    if image.mode == "I;16":  # Pillow would clip at 255; for 16-bit colour it takes the upper byte, as done here
        image = Image.fromarray((_full_range(np.asarray(image), data) >> 8).astype(np.uint8))
    return image, turn, (image.size[::-1] if turn[0] else image.size)


def _full_range(values: NDArray[np.uint16], data: bytes) -> NDArray[np.uint16]:
    """Scales the values of a 16-bit grey PNG to 0 … 65535.

    The standard wants samples with fewer significant bits (sBIT) scaled to all 16. Files from 12-bit cameras often
    keep them unscaled in the lower bits. Then all values are below 2 ** bits, and not all are multiples of
    2 ** (16 - bits).
    """
    bits = _significant_bits(data)
    if 0 < bits < 16 and values.max() < 1 << bits and (values & ((1 << 16 - bits) - 1)).any():
        return values << np.uint16(16 - bits)
    return values


def _significant_bits(data: bytes) -> int:
    """Returns the first number of a PNG's sBIT chunk, which must precede the pixels (IDAT), or 0 if it has none."""
    place = len(PNG)
    while place + 9 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, place)
        if kind == b"sBIT":
            return data[place + 8]
        if kind == b"IDAT":
            break
        place += length + 12
    return 0


def _turn(image: Image.Image) -> Turn:
    with suppress(Damaged), _damaged("cut or corrupt"):
        return TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1), TURNS[1])
    return TURNS[1]  # cameras and editors write invalid EXIF next to valid pixels


def _reduction(image: Image.Image, side: int, size: int) -> int:
    """Returns the factor by which the decoder may divide the sides if `side` pixels will be resized to `size`."""
    if not isinstance(image, JpegImagePlugin.JpegImageFile):
        return 1
    return next((scale for scale, headroom in HEADROOM if side >= scale * headroom * size), 1)


@_damaged("cut or corrupt")
def _decode(image: Image.Image, scale: int = 1) -> None:
    image.draft(None, (image.width // scale, image.height // scale))
    image.load()


@_damaged("cut or corrupt")
def _rgb(image: Image.Image, box: Box | None = None) -> Image.Image:
    """Converts the picture, or a box of it, to RGB. Transparent pixels are composited on white."""
    image = image.crop(box) if box else image
    if image.mode in ("RGBA", "LA") or "transparency" in image.info:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image if image.mode == "RGB" else image.convert("RGB")


def _turbo_crop(data: bytes, image: Image.Image, scale: int, box: Box) -> Pixels | None:
    """Decodes with simplejpeg, which wraps the same library and gives the same pixels as Pillow in less time.

    Returns None if Pillow must decode: for other formats and modes, and where simplejpeg raises.
    """
    import simplejpeg

    if not isinstance(image, JpegImagePlugin.JpegImageFile) or image.mode != "RGB":
        return None
    left, upper, right, lower = box
    width, height = math.ceil(image.width / scale), math.ceil(image.height / scale)
    try:
        return simplejpeg.decode_jpeg(data, min_height=height, min_width=width)[upper:lower, left:right]
    except ValueError:
        return None


def _resized(pixels: Pixels, size: int) -> Pixels:
    """Resizes bicubically with antialiasing: to within one or two grey levels of Pillow, in a third of its time."""
    x = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)
    x = torch.nn.functional.interpolate(x, (size, size), mode="bicubic", antialias=True)
    return x.permute(0, 2, 3, 1)[0].numpy()


def _turned(pixels: Pixels, turn: Turn) -> Pixels:
    transpose, mirror, flip = turn
    pixels = pixels.transpose(1, 0, 2) if transpose else pixels
    return np.ascontiguousarray(pixels[:: -1 if flip else 1, :: -1 if mirror else 1])


def _stored_box(box: Box, size: tuple[int, int], turn: Turn) -> Box:
    """Maps a box of the upright picture, which has this `size`, to the stored picture."""
    (left, upper, right, lower), (width, height) = box, size
    transpose, mirror, flip = turn
    if mirror:
        left, right = width - right, width - left
    if flip:
        upper, lower = height - lower, height - upper
    return (upper, left, lower, right) if transpose else (left, upper, right, lower)


@lru_cache(4)
def _draws(seed: int, block: int) -> NDArray[np.float64]:
    """Returns float64 [BLOCK, DRAWS]: uniform numbers in [0, 1) for the samples of a block."""
    return uniforms(seed, np.arange(block * BLOCK, (block + 1) * BLOCK)[:, None], np.arange(DRAWS))


def _random_box(size: tuple[int, int], min_crop_area: float, draws: NDArray[np.float64]) -> Box:
    """Draws a box as torchvision's RandomResizedCrop does: the first of TRIES boxes that fits.

    If none fits, the box is the largest centred one with an allowed ratio. It covers less than `min_crop_area` only if
    every allowed box does. If `min_crop_area` is 1, the box is the centred square.
    """
    width, height = size
    if min_crop_area == 1:
        side = min(size)
        x, y = (width - side) // 2, (height - side) // 2
        return x, y, x + side, y + side
    for area, ratio, left, top in draws[:-1].reshape(4, TRIES).T.tolist():
        area = (min_crop_area + (1 - min_crop_area) * area) * width * height
        ratio = WIDEST ** (2 * ratio - 1)
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 1 <= w <= width and 1 <= h <= height:
            x, y = int(left * (width - w + 1)), int(top * (height - h + 1))
            return x, y, x + w, y + h
    w, h = min(width, round(height * WIDEST)), min(height, round(width * WIDEST))
    x, y = (width - w) // 2, (height - h) // 2
    return x, y, x + w, y + h
