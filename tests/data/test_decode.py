import io
import struct

import numpy as np
import pytest
from PIL import Image

from tests.conftest import jpeg
from vaescale.data import decode
from vaescale.data.demo import PHOTOGRAPHS, find_photographs


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(-10 * np.log10(max((((a.astype(float) - b) / 255) ** 2).mean(), 1e-12)))


def encode(image: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def test_a_crop_is_a_function_of_seed_and_g() -> None:
    data = jpeg(0, 90, 70)
    first = decode.train_image(data, 16, 0.2, True, seed=1, g=5)
    assert np.array_equal(first, decode.train_image(data, 16, 0.2, True, seed=1, g=5))
    assert not np.array_equal(first, decode.train_image(data, 16, 0.2, True, seed=1, g=6))
    assert not np.array_equal(first, decode.train_image(data, 16, 0.2, True, seed=2, g=5))


def test_crops_have_the_asked_area_and_ratio() -> None:
    boxes = []
    for g in range(2000):
        draws = decode.uniforms(0, g, np.arange(4 * decode.TRIES + 1))
        left, upper, right, lower = decode._random_box((400, 300), 0.25, draws)
        assert 0 <= left < right <= 400
        assert 0 <= upper < lower <= 300
        boxes.append((right - left, lower - upper))
    width, height = np.array(boxes).T
    # half a pixel of rounding a side
    assert (width * height >= 0.25 * 120_000 - (width + height)).all()
    assert (width / height <= (4 / 3) * 1.02).all()
    assert (height / width <= (4 / 3) * 1.02).all()
    assert (width * height).min() < 0.3 * 120_000
    assert (width * height).max() > 0.9 * 120_000


def test_half_of_the_pictures_are_flipped() -> None:
    ramp = Image.fromarray(np.tile(np.arange(64, dtype=np.uint8) * 4, (64, 1))).convert("RGB")
    data = encode(ramp, "PNG")
    flipped = sum(
        image[8, 0, 0] > image[8, -1, 0]
        for image in (decode.train_image(data, 16, 1.0, True, 0, g) for g in range(1000))
    )
    assert 420 < flipped < 580  # five standard deviations
    assert all((image := decode.train_image(data, 16, 1.0, False, 0, g))[8, 0, 0] < image[8, -1, 0] for g in range(20))


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_reduced_decoding_agrees_with_full_decoding(name: str, size: int) -> None:
    """At the photograph's own size and at ImageNet's usual one, neither a multiple of the decoder's block."""
    photograph = Image.open(find_photographs()[name]).convert("RGB")
    for picture in (photograph, photograph.resize((501, 501 * photograph.height // photograph.width))):
        data = encode(picture, "JPEG")
        full = Image.open(io.BytesIO(data)).convert("RGB")
        expected = np.asarray(full.resize((size, size), Image.Resampling.BICUBIC, box=decode._centre_box(full.size)))
        assert psnr(decode.validation_image(data, size), expected) >= 36


@pytest.mark.parametrize(
    ("kind", "mode"),
    [*(("JPEG", mode) for mode in ("L", "CMYK")), *(("PNG", mode) for mode in ("1", "L", "P", "LA", "RGBA"))],
)
def test_every_mode_becomes_rgb(kind: str, mode: str) -> None:
    data = encode(Image.open(io.BytesIO(jpeg(3))).convert(mode), kind)
    for pixels in (decode.validation_image(data, 16), decode.train_image(data, 16, 0.5, True, 0, 0)):
        assert pixels.shape == (16, 16, 3)
        assert pixels.dtype == np.uint8


def test_a_claimed_size_is_refused_from_the_header(monkeypatch: pytest.MonkeyPatch) -> None:
    """3 KB that claim 60000 × 60000: refused before `load`, where the memory would be taken."""
    data = bytearray(jpeg(0))
    marker = data.index(b"\xff\xc0")
    data[marker + 5 : marker + 9] = struct.pack(">HH", 60000, 60000)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(decode.Damaged, match="too many pixels"):
        decode.validation_image(bytes(data), 16)


@pytest.mark.parametrize("data", [b"", b"GIF89a", b"\0" * 1000, jpeg(0)[:300], jpeg(0)[:-200], jpeg(0)[:20]])
def test_bytes_that_are_no_picture_are_damaged(data: bytes) -> None:
    with pytest.raises(decode.Damaged):
        decode.validation_image(data, 16)
