"""Compressed bytes → uint8 [size, size, 3]; all of it pure functions of the bytes and of (seed, g)."""

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
CONVERTIBLE = ("TIFF", "BMP", "GIF")  # what `converted` reads, and HEIF with the package pillow-heif
MOST_MEGAPIXELS = 100  # the largest ImageNet picture has 40 megapixels; a decompression bomb claims far more
# (scale, headroom): the JPEG decoder divides the sides by `scale` if they stay `headroom` times the wanted size or
# more. Each is the smallest step of 0.1 at which every demo photograph keeps 36 dB against full decoding: the decoder
# cuts frequencies off block by block, and the more it cuts, the further below its own limit the wanted size must stay.
HEADROOM = ((8, 1.5), (4, 1.4), (2, 1.3))
PNG = b"\x89PNG\r\n\x1a\n"
DARK = 64  # of 256: the lower 14 of 16 bits
LONGEST_SIDE = 65_500  # that of a JPEG
TRIES = 10  # random-resized-crop: draws before falling back to the centre, as in torchvision
WIDEST = 4 / 3  # side ratio of a crop; its inverse is the narrowest
DRAWS = 4 * TRIES + 1  # the last one decides the flip
BLOCK = 64  # samples whose draws are hashed at once: numpy needs as long for one, and neighbours are asked for together

Decoder = Literal["pillow", "turbo"]  # turbo: simplejpeg for whatever it decodes without complaint, else Pillow
Pixels = NDArray[np.uint8]
Box = tuple[int, int, int, int]  # left, upper, right, lower
Turn = tuple[bool, bool, bool]  # transpose, then mirror left and right, then mirror top and bottom

# EXIF orientation → how the stored picture becomes upright
TURNS = {o: (o > 4, o in (2, 3, 6, 7), o in (3, 4, 7, 8)) for o in range(1, 9)}


TOO_LARGE = "too many pixels"
DEPTH = "values of neither 8 nor 16 bits"
CAUSES = ("not a picture", TOO_LARGE, "cut or corrupt", "changed since it was indexed")


class Damaged(ValueError):
    """These bytes are no picture that may be decoded; the text is one of CAUSES; of `converted`, also DEPTH."""


def require(decoder: Decoder) -> None:
    """Raises DataError if this decoder is not installed."""
    if decoder == "turbo" and importlib.util.find_spec("simplejpeg") is None:
        raise DataError("data.decoder=turbo needs the package simplejpeg: `pip install 'vaescale[turbo]'` brings it")


def train_image(
    data: bytes,
    size: int,
    least_area: float,
    flip: bool,
    seed: int,
    g: int,
    decoder: Decoder = "pillow",
    most_megapixels: int = MOST_MEGAPIXELS,
) -> Pixels:
    """Random-resized-crop (Szegedy et al. 2015, section 6) to `size` and a fair flip, drawn from (seed, g).

    The crop covers between `least_area` and 1 of the picture at a side ratio between 3/4 and 4/3; of a picture so wide
    or high that no such crop exists it is the largest of ratio 4/3 or 3/4. With `least_area` 1 it is the centred
    square, as of validation images. Raises Damaged.
    """
    draws = _draws(seed, g // BLOCK)[g % BLOCK]
    image, turn, (width, height) = _open(data, most_megapixels)
    left, upper, right, lower = _random_box((width, height), least_area, draws)
    scale = _reduction(image, min(right - left, lower - upper), size)
    # In whole pixels of the reduced picture: the crop is random, a few pixels more or less to the left are no loss.
    box = (left // scale, upper // scale, right // scale, lower // scale)
    stored = _stored_box(box, (width // scale, height // scale), turn)
    crop = _turbo_crop(data, image, scale, stored) if decoder == "turbo" else None
    if crop is None:
        _decode(image, scale)
        crop = np.array(_rgb(image, stored))
    pixels = _turned(_resized(crop, size), turn)
    if flip and draws[-1] < 0.5:
        return torch.from_numpy(pixels).flip(1).numpy()  # numpy takes eight times as long to copy what is reversed
    return pixels


def validation_image(data: bytes, size: int, most_megapixels: int = MOST_MEGAPIXELS) -> Pixels:
    """The largest centred square, resized to `size`: "short side to `size`, centre crop" in one resampling.

    Raises Damaged.
    """
    image, turn, _ = _open(data, most_megapixels)
    stored = image.size
    scale = _reduction(image, min(stored), size)
    _decode(image, scale)
    return _turned(_square(image, stored, scale, size), turn)


def opened_image(image: Image.Image, size: int) -> Pixels:
    """What `validation_image` makes of a picture, of one that Pillow has opened; but a JPEG is decoded in full, however
    much smaller `size` is. Raises Damaged."""
    _decode(image)
    return _turned(_square(image, image.size, 1, size), _turn(image))


def _square(image: Image.Image, stored: tuple[int, int], scale: int, size: int) -> Pixels:
    """The centred square, which is the same one however the picture is turned. stored: the picture's size before the
    decoder divided it by `scale`."""
    (width, height), side = stored, min(stored)
    left, upper = (width - side) / 2, (height - side) / 2
    # In fractions of a pixel, and by the exact scale: reduced sizes are rounded up, their quotient would be off.
    box = (left / scale, upper / scale, (left + side) / scale, (upper + side) / scale)
    return np.asarray(_rgb(image).resize((size, size), Image.Resampling.BICUBIC, box=box))


def prepared(data: bytes, short_side: int, quality: int, most_megapixels: int = MOST_MEGAPIXELS) -> bytes:
    """A JPEG of the upright picture in RGB, its short side `short_side` pixels or as it is if smaller; no metadata.

    Colour is kept at full resolution: a training crop of these pixels is hardly reduced any more, so half of it would
    be missed. The same bytes give the same bytes. Raises Damaged.
    """
    image, turn, _ = _open(data, most_megapixels)
    _decode(image)
    factor = min(1.0, short_side / min(image.size))
    size = (round(image.width * factor), round(image.height * factor))
    return _jpeg(_turned(np.asarray(_rgb(image).resize(size, Image.Resampling.LANCZOS)), turn), quality)


def converted(data: bytes, quality: int, most_megapixels: int = MOST_MEGAPIXELS) -> bytes:
    """TIFF, BMP, GIF and HEIF → the first picture of the file, upright, in 8 bits or 16-bit grey, without metadata.

    It is a PNG, which loses nothing; HEIF, which is lossy itself, becomes a JPEG of this quality, or a PNG if it is 0.
    Bytes of FORMATS are returned as they are. Raises Damaged.
    """
    try:
        _header(data, most_megapixels)
        return data
    except Damaged as error:
        if str(error) == TOO_LARGE:
            raise
    image = _header(data, most_megapixels, _convertible())
    lossy = image.format == "HEIF"
    with _damaged("cut or corrupt", (Exception,)):  # these decoders raise whatever they stumble over
        image.load()  # of TIFF and HEIF this also turns the picture upright
        if image.mode not in ("I", "F"):
            pixels = np.asarray(_of_8_or_16_bits(image))
    if image.mode in ("I", "F"):  # nothing says which value is white
        raise Damaged(DEPTH)
    if lossy and quality:
        return _jpeg(pixels, quality)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def check(data: bytes, most_megapixels: int = MOST_MEGAPIXELS, pixels: bool = False) -> None:
    """Raises Damaged for what is no picture by its header, or, with `pixels`, does not decode."""
    if pixels:
        validation_image(data, 1, most_megapixels)  # all of it is read, at the least size that the decoder offers
    else:
        _header(data, most_megapixels)


def is_dark(data: bytes, most_megapixels: int = MOST_MEGAPIXELS) -> bool:
    """Whether these bytes are a PNG of 16 bits that decodes to values below DARK only: probably the 8 to 14 bits of a
    camera, stored without scaling. Raises Damaged."""
    if not data.startswith(PNG) or data[24:25] != b"\x10":  # the bit depth in IHDR
        return False
    return int(np.asarray(_rgb(_open(data, most_megapixels)[0])).max()) < DARK


def grey(pixels: Pixels) -> Pixels:
    """[H, W, 3] → its luma [H, W, 1] (ITU-R BT.601)."""
    return np.asarray(Image.fromarray(pixels).convert("L"))[..., None]


# What some 200,000 cut and changed files gave; TypeError is from PNG text that calls itself EXIF or transparency.
RAISED = (OSError, SyntaxError, ValueError, TypeError)


@contextmanager
def _damaged(cause: str, raised: tuple[type[Exception], ...] = RAISED) -> Iterator[None]:
    """What Pillow raises for hostile bytes becomes Damaged, and what it warns of does not reach the user."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except raised:
        raise Damaged(cause) from None


def _header(data: bytes, most_megapixels: int, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """The picture, not decoded yet: a size that is refused allocates nothing. Raises Damaged."""
    most = most_megapixels * 1_000_000
    if Image.MAX_IMAGE_PIXELS is not None:  # Pillow refuses twice as many
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
        return CONVERTIBLE
    importlib.import_module("pillow_heif").register_heif_opener()
    return (*CONVERTIBLE, "HEIF")


def _of_8_or_16_bits(image: Image.Image) -> Image.Image:
    """16-bit grey as it is, in the machine's byte order; other grey in 8 bits; everything else in RGB on white."""
    if image.mode.startswith("I;16"):
        return Image.fromarray(np.asarray(image).astype(np.uint16))
    return image.convert("L") if image.mode in ("1", "L") and "transparency" not in image.info else _rgb(image)


def _jpeg(pixels: Pixels, quality: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality, subsampling="4:4:4")
    return file.getvalue()


def _open(data: bytes, most_megapixels: int) -> tuple[Image.Image, Turn, tuple[int, int]]:
    """(the picture, how to turn it, its upright size)."""
    image = _header(data, most_megapixels)
    if image.format == "PNG":
        _decode(image)  # an orientation may follow the pixels
    turn = _turn(image)
    if image.mode == "I;16":  # Pillow would clip at 255; of 16-bit colour it takes the upper byte, as here
        image = Image.fromarray((_full_range(np.asarray(image), data) >> 8).astype(np.uint8))
    return image, turn, (image.size[::-1] if turn[0] else image.size)


def _full_range(values: NDArray[np.uint16], data: bytes) -> NDArray[np.uint16]:
    """The values of a PNG of 16-bit grey, 0 to 65535.

    The standard wants samples of fewer significant bits (sBIT) scaled to all 16. Files of 12-bit cameras often hold
    them as they are, in the lower bits: there all are below 2 ** bits, and not all are multiples of 2 ** (16 - bits).
    """
    bits = _significant_bits(data)
    if 0 < bits < 16 and values.max() < 1 << bits and (values & ((1 << 16 - bits) - 1)).any():
        return values << np.uint16(16 - bits)
    return values


def _significant_bits(data: bytes) -> int:
    """The number in a PNG's sBIT chunk, which stands before the pixels (PNG specification, 11.3.2.7); 0 without one."""
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
    return TURNS[1]  # cameras and editors write odd EXIF around sound pixels


def _reduction(image: Image.Image, side: int, size: int) -> int:
    """By how much the decoder may divide the sides of a picture of which `side` pixels will become `size`."""
    if not isinstance(image, JpegImagePlugin.JpegImageFile):
        return 1
    return next((scale for scale, headroom in HEADROOM if side >= scale * headroom * size), 1)


@_damaged("cut or corrupt")
def _decode(image: Image.Image, scale: int = 1) -> None:
    image.draft(None, (image.width // scale, image.height // scale))
    image.load()


@_damaged("cut or corrupt")
def _rgb(image: Image.Image, box: Box | None = None) -> Image.Image:
    """The picture or a box of it; white shows through what is transparent."""
    image = image.crop(box) if box else image
    if image.mode in ("RGBA", "LA") or "transparency" in image.info:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image if image.mode == "RGB" else image.convert("RGB")


def _turbo_crop(data: bytes, image: Image.Image, scale: int, box: Box) -> Pixels | None:
    """Pillow's very pixels for less, as simplejpeg wraps the same library; None where Pillow has to decide."""
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
    """Bicubic with antialiasing: what Pillow computes to a grey level or two, in a third of the time or less."""
    x = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)
    x = torch.nn.functional.interpolate(x, (size, size), mode="bicubic", antialias=True)
    return x.permute(0, 2, 3, 1)[0].numpy()


def _turned(pixels: Pixels, turn: Turn) -> Pixels:
    transpose, mirror, flip = turn
    pixels = pixels.transpose(1, 0, 2) if transpose else pixels
    return np.ascontiguousarray(pixels[:: -1 if flip else 1, :: -1 if mirror else 1])


def _stored_box(box: Box, size: tuple[int, int], turn: Turn) -> Box:
    """A box of the upright picture of `size`, where it lies in the stored one."""
    (left, upper, right, lower), (width, height) = box, size
    transpose, mirror, flip = turn
    if mirror:
        left, right = width - right, width - left
    if flip:
        upper, lower = height - lower, height - upper
    return (upper, left, lower, right) if transpose else (left, upper, right, lower)


@lru_cache(4)
def _draws(seed: int, block: int) -> NDArray[np.float64]:
    """[BLOCK, DRAWS] uniform numbers for the samples of a block."""
    return uniforms(seed, np.arange(block * BLOCK, (block + 1) * BLOCK)[:, None], np.arange(DRAWS))


def _random_box(size: tuple[int, int], least_area: float, draws: NDArray[np.float64]) -> Box:
    """As torchvision's RandomResizedCrop: the first of TRIES boxes that fits; else, in the centre, the largest box of
    an allowed ratio, which covers less than `least_area` only where every allowed box does. Of 1: no crop is drawn."""
    width, height = size
    if least_area == 1:
        side = min(size)
        x, y = (width - side) // 2, (height - side) // 2
        return x, y, x + side, y + side
    for area, ratio, left, top in draws[:-1].reshape(4, TRIES).T.tolist():
        area = (least_area + (1 - least_area) * area) * width * height
        ratio = WIDEST ** (2 * ratio - 1)
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 1 <= w <= width and 1 <= h <= height:
            x, y = int(left * (width - w + 1)), int(top * (height - h + 1))
            return x, y, x + w, y + h
    w, h = min(width, round(height * WIDEST)), min(height, round(width * WIDEST))
    x, y = (width - w) // 2, (height - h) // 2
    return x, y, x + w, y + h
