"""Pictures for people: uint8 [H, W, 3] arrays of captioned images."""

import colorsys
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

Picture = NDArray[np.uint8]

GAP = 4  # pixels between images
CAPTION = 18  # pixels of the line above them
PAPER, INK = (250, 250, 248), (40, 40, 40)
TILE = 24  # pixels of each code's picture
LEAST = 96  # pixels a side; smaller images are shown enlarged
ERROR_GAIN = 4  # the absolute error is multiplied by this, or one would see black


def to_bytes(images: Tensor) -> Tensor:
    """float [B, 3, H, W] in [0, 1] up to over-shoot → uint8, rounded to the nearest."""
    return (images.float() * 255).round().clamp(0, 255).to(torch.uint8)


def reconstructions(x: Tensor, reconstruction: Tensor, per_row: int = 2) -> Picture:
    """Rows of input | reconstruction | error, `per_row` images to a row. Both uint8 [B, 3, H, W]."""
    error = (x.int() - reconstruction.int()).abs().mul(ERROR_GAIN).clamp(max=255).to(torch.uint8)
    columns = {"input": x, "reconstruction": reconstruction, f"error x{ERROR_GAIN}": error}
    return _sheet(columns, per_row)


def code_map(x: Tensor, codes: Tensor, size: int) -> Picture:
    """Rows of input | codes: each code of [B, h, w] in a colour of its own among `size`. x: uint8 [B, 3, H, W]."""
    colours = torch.tensor([_colour(code) for code in range(size)], dtype=torch.uint8)
    blocks = colours[codes.cpu()].permute(0, 3, 1, 2)
    repeat = x.shape[-1] // blocks.shape[-1]
    return _sheet({"input": x, "codes": blocks.repeat_interleave(repeat, 2).repeat_interleave(repeat, 3)}, per_row=3)


def codebook(tiles: Tensor, codes: Tensor, in_use: Tensor, per_row: int = 24) -> Picture:
    """The middle of what each of `codes` decodes to, row by row; those not in use are struck out.

    tiles: uint8 [N, 1 or 3, H, W]; codes: int64 [N], most used first; in_use: bool [K].
    """
    caption = f"{len(codes)} of {len(in_use)} codes, most used first; {int((~in_use).sum())} not in use (struck out)"
    side = min(TILE, *tiles.shape[-2:])
    top, left = ((length - side) // 2 for length in tiles.shape[-2:])
    tiles = _coloured(tiles)[:, :, top : top + side, left : left + side].permute(0, 2, 3, 1).cpu()
    per_row, pitch = min(per_row, len(tiles)), side + 2
    font = ImageFont.load_default(size=11)
    width = max(per_row * pitch + 2, math.ceil(font.getlength(caption)) + 2 * GAP)
    sheet = Image.new("RGB", (width, CAPTION + -(-len(tiles) // per_row) * pitch + 2), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((GAP, 3), caption, INK, font)
    for number, (tile, alive) in enumerate(zip(tiles.numpy(), in_use[codes].tolist(), strict=True)):
        y, x = (pitch * place + 2 for place in divmod(number, per_row))
        sheet.paste(Image.fromarray(tile), (x, y + CAPTION))
        if not alive:
            stroke = (x, y + CAPTION + side - 1, x + side - 1, y + CAPTION)
            for colour, thickness in ((INK, 3), (PAPER, 1)):  # seen on any tile
                draw.line(stroke, colour, thickness)
    return np.asarray(sheet)


def grid(
    images: Tensor, per_row: int, columns: Sequence[str] = (), rows: Sequence[str] = (), title: str = ""
) -> Picture:
    """Images row by row under a title, captions above the columns and before the rows. uint8 [N, 1 or 3, H, W]."""
    images = enlarged(_coloured(images)).cpu()
    height, width = images.shape[-2:]
    font = ImageFont.load_default(size=11)
    left = max((math.ceil(font.getlength(row)) + GAP for row in rows), default=0) + GAP
    top = CAPTION * (bool(title) + bool(columns)) or GAP
    lines = -(-len(images) // per_row)
    wide = max(left + per_row * (width + GAP), math.ceil(font.getlength(title)) + 2 * GAP)
    sheet = Image.new("RGB", (wide, top + lines * (height + GAP)), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((GAP, 3), title, INK, font)
    for column, caption in enumerate(columns):
        draw.text((left + column * (width + GAP), top - CAPTION + 3), _cut(caption, width, font), INK, font)
    for row, caption in enumerate(rows):
        draw.text((GAP, top + row * (height + GAP) + height // 2 - 7), caption, INK, font)
    for number, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
        row, column = divmod(number, per_row)
        sheet.paste(Image.fromarray(image), (left + column * (width + GAP), top + row * (height + GAP)))
    return np.asarray(sheet)


def bars(values: Sequence[float], title: str) -> Picture:
    """Vertical bars from 0, numbered from 0."""
    font = ImageFont.load_default(size=11)
    pitch, height, most = max(8, min(40, 640 // len(values))), 160, max([*values, 1e-9])
    width = max(pitch * len(values), math.ceil(font.getlength(title))) + 4 * GAP
    sheet = Image.new("RGB", (width, height + 3 * CAPTION), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((GAP, 3), title, INK, font)
    draw.text((GAP, CAPTION), f"highest bar {most:.3g}", INK, font)
    base = 2 * CAPTION + height
    for number, value in enumerate(values):
        left = 2 * GAP + number * pitch
        draw.rectangle((left, base - round(height * max(value, 0) / most), left + pitch - 3, base), (70, 110, 160))
        if number % math.ceil(24 / pitch) == 0:
            draw.text((left, base + 2), str(number), INK, font)
    return np.asarray(sheet)


def joined(pictures: Sequence[Picture], axis: int) -> Picture:
    """One below the other (axis 0) or side by side (axis 1)."""
    size = [max(picture.shape[0] for picture in pictures), max(picture.shape[1] for picture in pictures)]
    size[axis] = sum(picture.shape[axis] for picture in pictures) + 2 * GAP * (len(pictures) - 1)
    sheet = np.empty((*size, 3), np.uint8)
    sheet[:] = PAPER
    begin = 0
    for picture in pictures:
        height, width, _ = picture.shape
        top, left = (begin, 0) if axis == 0 else (0, begin)
        sheet[top : top + height, left : left + width] = picture
        begin += picture.shape[axis] + 2 * GAP
    return sheet


def enlarged(images: Tensor) -> Tensor:
    """Each pixel repeated by the smallest whole factor that makes the images at least LEAST pixels wide."""
    factor = max(1, -(-LEAST // images.shape[-1]))
    return images.repeat_interleave(factor, -2).repeat_interleave(factor, -1)


def save(picture: Picture, path: Any) -> None:
    Image.fromarray(picture).save(path)


def _colour(code: int) -> tuple[int, ...]:
    """Hues a golden angle apart, in three brightnesses, so that neighbouring numbers differ."""
    hue = code * 0.6180339887 % 1.0
    return tuple(round(255 * part) for part in colorsys.hsv_to_rgb(hue, 0.65, (1.0, 0.8, 0.6)[code % 3]))


def _coloured(images: Tensor) -> Tensor:
    """[B, 1 or 3, H, W] → [B, 3, H, W]."""
    return images.expand(-1, 3, -1, -1)


def _sheet(columns: dict[str, Tensor], per_row: int) -> Picture:
    """The columns side by side under their captions, again and again until a row holds `per_row` images."""
    stacked = torch.stack([enlarged(_coloured(images)) for images in columns.values()], dim=1).cpu()
    count, kinds, _, height, width = stacked.shape
    per_row = min(per_row, count)
    rows = -(-count // per_row)
    group = kinds * (width + GAP) + 2 * GAP
    sheet = Image.new("RGB", (per_row * group - GAP, CAPTION + rows * (height + GAP) + GAP), PAPER)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=11)
    for number in range(count):
        row, place = divmod(number, per_row)
        for kind, caption in enumerate(columns):
            left = place * group + GAP + kind * (width + GAP)
            if row == 0:
                draw.text((left, 3), caption, INK, font)
            image = Image.fromarray(stacked[number, kind].permute(1, 2, 0).numpy())
            sheet.paste(image, (left, CAPTION + row * (height + GAP)))
    return np.asarray(sheet)


def _cut(text: str, width: int, font: Any) -> str:
    """As much of it as fits."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
