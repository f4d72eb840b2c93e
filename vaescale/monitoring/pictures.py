"""Pictures for people to look at: uint8 [H, W, 3] arrays of captioned images."""

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
TEXT = 11  # minimum height of a letter, in pixels
SHOWN = 40  # TensorBoard shows a picture about 400 pixels wide; text of a fortieth of the width is legible there
PAPER, INK = (250, 250, 248), (40, 40, 40)
RECONSTRUCTION = "reconstruction"
TILE = 24  # pixels per side of each code's image
LEAST = 96  # pixels per side; smaller images are enlarged
HEAT = torch.tensor([[20, 20, 60], [40, 90, 140], [60, 170, 130], [250, 230, 80]]).double()  # from none to much
SIGNED = torch.tensor([[40, 80, 200], [245, 245, 245], [200, 50, 40]]).double()  # negative, 0, positive
ERROR_GAIN = 4  # factor of the absolute error, which would look black without it


def to_bytes(images: Tensor) -> Tensor:
    """Converts float [B, 3, H, W] in [0, 1] to uint8, rounded to nearest and clamped."""
    return (images.float() * 255).round().clamp(0, 255).to(torch.uint8)


def reconstructions(x: Tensor, reconstruction: Tensor, below: Sequence[str] = (), per_row: int = 8) -> Picture:
    """Draws rows of inputs, of their reconstructions with the captions `below`, and of their errors. Both uint8
    [B, C, H, W]."""
    error = (x.int() - reconstruction.int()).abs().mul(ERROR_GAIN).clamp(max=255).to(torch.uint8)
    strips = {"input": x, RECONSTRUCTION: reconstruction, f"error x{ERROR_GAIN}": error}
    return _strips(strips, per_row, {RECONSTRUCTION: below})


def compared(
    x: Tensor, reconstructions: dict[str, Tensor], below: dict[str, Sequence[str]], per_row: int = 8
) -> Picture:
    """Draws rows of inputs and of several models' reconstructions of them, each with its name above and the captions
    `below`. All uint8 [B, C, H, W]."""
    return _strips({"input": x, **reconstructions}, per_row, below)


def code_map(x: Tensor, codes: Tensor, size: int, per_row: int = 8) -> Picture:
    """Draws rows of inputs, uint8 [B, C, H, W], and of their codes [B, h, w], with one colour for each of `size`
    codes."""
    colours = torch.tensor([_colour(code) for code in range(size)], dtype=torch.uint8)
    blocks = colours[codes.cpu()].permute(0, 3, 1, 2)
    repeat = x.shape[-1] // blocks.shape[-1]
    strips = {"input": x, "codes": blocks.repeat_interleave(repeat, 2).repeat_interleave(repeat, 3)}
    return _strips(strips, per_row)


def legible(width: int) -> int:
    """Returns the text height in pixels for a picture of this width."""
    return max(TEXT, round(width / SHOWN))


def line_height(text: int) -> int:
    """Returns the height of a caption in pixels."""
    return 4 + round(1.3 * text)


def codebook(tiles: Tensor, codes: Tensor, in_use: Tensor, per_row: int = 36) -> Picture:
    """Draws the centre of the image that each code decodes to, row by row. Codes not in use are struck out.

    tiles: uint8 [N, 1 or 3, H, W]; codes: int64 [N], most used first; in_use: bool [K].
    """
    caption = f"{len(codes)} of {len(in_use)} codes, most used first; {int((~in_use).sum())} not in use (struck out)"
    side = min(TILE, *tiles.shape[-2:])
    above, left = ((length - side) // 2 for length in tiles.shape[-2:])
    tiles = _coloured(tiles)[:, :, above : above + side, left : left + side].permute(0, 2, 3, 1).cpu()
    per_row, pitch = min(per_row, len(tiles)), side + 2
    text = legible(per_row * pitch)
    top, font = line_height(text), ImageFont.load_default(size=text)
    width = max(per_row * pitch + 2, math.ceil(font.getlength(caption)) + 2 * GAP)
    sheet = Image.new("RGB", (width, top + -(-len(tiles) // per_row) * pitch + 2), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((GAP, 3), caption, INK, font)
    for number, (tile, alive) in enumerate(zip(tiles.numpy(), in_use[codes].tolist(), strict=True)):
        y, x = (pitch * place + 2 for place in divmod(number, per_row))
        sheet.paste(Image.fromarray(tile), (x, y + top))
        if not alive:
            stroke = (x, y + top + side - 1, x + side - 1, y + top)
            for colour, thickness in ((INK, 3), (PAPER, 1)):  # visible on any tile
                draw.line(stroke, colour, thickness)
    return np.asarray(sheet)


def grid(
    images: Tensor,
    per_row: int,
    columns: Sequence[str] = (),
    rows: Sequence[str] = (),
    title: str = "",
    below: Sequence[str] = (),
    text: int = TEXT,
) -> Picture:
    """Draws images, uint8 [N, 1 or 3, H, W], row by row under a title, with captions above the columns, to the left of
    the rows and below the images. `text` is the letter height in pixels."""
    images = enlarged(_coloured(images)).cpu()
    height, width = images.shape[-2:]
    font, caption = ImageFont.load_default(size=text), line_height(text)
    left = max((math.ceil(font.getlength(row)) + GAP for row in rows), default=0) + GAP
    top = caption * (bool(title) + bool(columns)) or GAP
    lines, pitch = -(-len(images) // per_row), height + caption * bool(below) + GAP
    wide = max(left + per_row * (width + GAP), math.ceil(font.getlength(title)) + 2 * GAP)
    sheet = Image.new("RGB", (wide, top + lines * pitch), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((GAP, 3), title, INK, font)
    for column, label in enumerate(columns):
        draw.text((left + column * (width + GAP), top - caption + 3), _cut(label, width, font), INK, font)
    for row, label in enumerate(rows):
        draw.text((GAP, top + row * pitch + (height - text) // 2 - 1), label, INK, font)
    for number, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
        row, column = divmod(number, per_row)
        corner = left + column * (width + GAP), top + row * pitch
        sheet.paste(Image.fromarray(image), corner)
        if below:
            draw.text((corner[0], corner[1] + height), _cut(below[number], width, font), INK, font)
    return np.asarray(sheet)


def bars(values: Sequence[float], title: str) -> Picture:
    """Draws vertical bars that start at 0 and are numbered from 0."""
    text = legible(640)
    font, caption = ImageFont.load_default(size=text), line_height(text)
    pitch, height, most = max(8, min(40, 640 // len(values))), 160, max([*values, 1e-9])
    width = max(pitch * len(values), math.ceil(font.getlength(title))) + 4 * GAP
    sheet = Image.new("RGB", (width, height + 3 * caption), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((GAP, 3), title, INK, font)
    draw.text((GAP, caption), f"highest bar {most:.3g}", INK, font)
    base = 2 * caption + height
    for number, value in enumerate(values):
        left = 2 * GAP + number * pitch
        draw.rectangle((left, base - round(height * max(value, 0) / most), left + pitch - 3, base), (70, 110, 160))
        if number % math.ceil(2 * text / pitch) == 0:
            draw.text((left, base + 2), str(number), INK, font)
    return np.asarray(sheet)


def heat_maps(maps: dict[str, Tensor], difference: str, title: str) -> Picture:
    """Draws maps [L, h, w], one column each, on one scale from 0 to their largest value, and the difference of the
    first two in red where it is positive and blue where it is negative. Below each are its mean and its range."""
    one, other = list(maps.values())[:2]
    most, far = max(float(max(map_.max() for map_ in maps.values())), 1e-9), max(float((one - other).abs().max()), 1e-9)
    columns = [*((values / most, HEAT) for values in maps.values()), ((one - other) / (2 * far) + 0.5, SIGNED)]
    tiles = torch.stack([_heat(values, colours) for values, colours in columns], dim=1)  # [L, columns, 3, h, w]
    text = legible(len(columns) * max(LEAST, one.shape[-1]))
    below = [
        f"{values.mean():.3g} ({values.min():.2g} to {values.max():.2g})"
        for level in zip(*maps.values(), one - other, strict=True)
        for values in level
    ]
    rows = [f"level {level}" for level in range(len(one))] if len(one) > 1 else []
    names = [*maps, difference]
    times = max(1, -(-2 * LEAST // one.shape[-1]))
    large = tiles.flatten(0, 1).repeat_interleave(times, -2).repeat_interleave(times, -1)
    return grid(large, len(columns), names, rows, title, below, text)


def _heat(values: Tensor, colours: Tensor) -> Tensor:
    """Values [L, h, w] in 0 … 1 → uint8 [L, 3, h, w], between evenly spaced colours."""
    place = values.cpu().double().clamp(0, 1) * (len(colours) - 1)
    low = place.long().clamp(max=len(colours) - 2)
    mixed = torch.lerp(colours[low], colours[low + 1], (place - low)[..., None])
    return mixed.round().to(torch.uint8).movedim(-1, 1)


def joined(pictures: Sequence[Picture], axis: int) -> Picture:
    """Joins pictures vertically (axis 0) or side by side (axis 1)."""
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
    """Enlarges small images by repeating each pixel `factor` times in both directions."""
    times = factor(images.shape[-1])
    return images.repeat_interleave(times, -2).repeat_interleave(times, -1)


def factor(width: int) -> int:
    """Returns the smallest integer factor that makes images of this width at least LEAST pixels wide."""
    return max(1, -(-LEAST // width))


def save(picture: Picture, path: Any) -> None:
    Image.fromarray(picture).save(path)


def _colour(code: int) -> tuple[int, ...]:
    """A colour per code: hues a golden angle apart in three brightnesses, so that neighbouring numbers differ."""
    hue = code * 0.6180339887 % 1.0
    return tuple(round(255 * part) for part in colorsys.hsv_to_rgb(hue, 0.65, (1.0, 0.8, 0.6)[code % 3]))


def _coloured(images: Tensor) -> Tensor:
    """[B, 1 or 3, H, W] → [B, 3, H, W]."""
    return images.expand(-1, 3, -1, -1)


def _strips(strips: dict[str, Tensor], per_row: int, below: dict[str, Sequence[str]] | None = None) -> Picture:
    """Draws each strip as one row, or as several rows that alternate. below: captions of some strips' images."""
    count, _, _, width = next(iter(strips.values())).shape
    per_row = min(per_row, count)
    text = legible(per_row * (factor(width) * width + GAP))
    blocks = []
    for begin in range(0, count, per_row):
        part = slice(begin, begin + per_row)
        for name, images in strips.items():
            captions = (below or {}).get(name, ())[part]
            blocks.append(grid(images[part], per_row, title=name, below=captions, text=text))
    return joined(blocks, axis=0)


def _cut(text: str, width: int, font: Any) -> str:
    """The text, truncated to this width in pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
