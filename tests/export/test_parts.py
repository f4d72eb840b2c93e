"""The views of a sample: crops as Pillow makes them, and draws that depend on nothing else."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from tests.conftest import jpeg
from vaescale.data import decode, stream
from vaescale.data.shards import Sample, write
from vaescale.export.parts import Parts, centre, draws, ten


@pytest.mark.parametrize(("size", "side"), [(8, 9), (16, 17), (30, 33), (64, 70), (128, 140), (256, 281)])
def test_ten_crops(size: int, side: int) -> None:
    """The centre and the corners of a square of 1.1 sides, then the same five flipped."""
    data = jpeg(0, 400, 330)
    square = Image.fromarray(decode.validation_image(data, side))
    rest = side - size
    half = round(rest / 2)
    corners = [(half, half), (0, 0), (rest, 0), (0, rest), (rest, rest)]
    crops = [square.crop((x, y, x + size, y + size)) for x, y in corners]
    found = ten(stream.Config(size=size))(data, 3)
    assert len(found) == 10
    for view, expected in zip(found, [*crops, *map(ImageOps.mirror, crops)], strict=True):
        np.testing.assert_array_equal(view, expected)


def test_draws_depend_on_seed_sample_and_view_alone() -> None:
    """More views begin with the same ones. No two of a few are equal, and each is a crop of training."""
    data = jpeg(0, 200, 150)
    reader = stream.pictures(stream.Config(size=16))
    few, many = draws(reader, 2, 5)(data, 7), draws(reader, 6, 5)(data, 7)
    for one, other in zip(few, many, strict=False):
        np.testing.assert_array_equal(one, other)
    others = [*many, *draws(reader, 3, 5)(data, 8), *draws(reader, 3, 6)(data, 7)]
    assert len({view.tobytes() for view in others}) == len(others)
    plain = stream.pictures(stream.Config(size=16, augment=False))
    for view in draws(plain, 2, 5)(data, 7):
        np.testing.assert_array_equal(view, decode.validation_image(data, 16))


def test_a_part_has_each_sample_in_all_views(tmp_path: Path) -> None:
    """Next to one another, each with its label. Damaged ones are left out, even all."""
    images = [Sample(f"{i}", jpeg(i)[: -200 if i in (1, 4, 5) else None], i) for i in range(6)]
    write(tmp_path / "train", images, 4, [])
    slices = stream.TrainingOnce(stream.Config(root=str(tmp_path), size=8))
    part = Parts(slices, draws(slices.reader, 2, 0))[range(3)]
    assert part.keys == ["0", "2"]
    assert part.batch.label.tolist() == part.batch.sample.tolist() == [0, 0, 2, 2]
    expected = np.stack([view for i in (0, 2) for view in draws(slices.reader, 2, 0)(jpeg(i), i)])
    assert torch.equal(part.batch.x, torch.from_numpy(expected).permute(0, 3, 1, 2))
    assert [(one.g, one.shard, one.key, one.cause) for one in part.damage] == [(1, "000000.tar", "1", "cut or corrupt")]
    none = Parts(slices, centre(slices.reader))[range(4, 6)]
    assert (none.keys, len(none.batch.x), len(none.damage)) == ([], 0, 2)
