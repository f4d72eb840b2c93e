"""Codes of images: the header of their index, the reader, and what it refuses."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset

from tests.conftest import samples as picture_samples
from tests.data.test_hostile import refused
from tests.data.test_stream import config
from vaescale.data import index, shards, stream
from vaescale.data.codes import EXTENSION, Codes, Header, array, views_of
from vaescale.data.decode import Damaged
from vaescale.data.index import Index
from vaescale.data.order import mix
from vaescale.data.tar import Fields

HASHES = "0123456789abcdef", "fedcba9876543210"
ONE = Header(HASHES[0], [8, 5], [2, 3, 4], "center", 1, HASHES[1])
THREE = ONE._replace(crops="random:3", views=3)
LARGE = ONE._replace(sizes=[2**16 + 1, 5])


def drawn(header: Header, count: int, seed: int = 0) -> torch.Tensor:
    """Returns codes of `count` samples, int64 [N, V, L, h, w], the largest one of each codebook among them."""
    random = np.random.default_rng(seed)
    shape = (count, header.views, 1, *header.shape[1:])
    codes = np.concatenate([random.integers(0, size, shape) for size in header.sizes], 2)
    codes[:, 0, :, 0, 0] = np.array(header.sizes) - 1
    return torch.from_numpy(codes)


def write(folder: Path, header: Header, codes: torch.Tensor, per_shard: int = 4) -> Index:
    """Writes codes as shards. The label of sample i is i modulo 3, and its attribute `a` is i / 2."""
    folder.mkdir(parents=True)
    written = [
        shards.Sample(f"k/{i:03d}", array(one, header), i % 3, EXTENSION, {"a": i / 2}) for i, one in enumerate(codes)
    ]
    names = []
    for first in range(0, len(written), per_shard):
        names.append(shards.name(len(names)))
        shards.write_shard(folder / names[-1], written[first : first + per_shard])
    return index.build(folder, str(folder), names, Fields((EXTENSION,)), ["x", "y", "z"], 1, header)


@pytest.mark.parametrize(("header", "kind"), [(ONE, np.uint16), (THREE, np.uint16), (LARGE, np.int32)])
def test_a_file_of_codes_is_a_plain_array(header: Header, kind: type) -> None:
    codes = drawn(header, 1)[0]
    read = np.load(io.BytesIO(array(codes, header)), allow_pickle=False)
    assert read.dtype == kind
    np.testing.assert_array_equal(read, codes if header.views > 1 else codes[0])
    np.testing.assert_array_equal(Codes(header).views(array(codes, header)), codes)


def test_the_index_has_the_header_and_the_stream_reads_the_codes(tmp_path: Path) -> None:
    """By its own reader, in training and validation, with labels and attributes; an index of pictures has none."""
    for split, seed in (("train", 0), ("val", 1)):
        assert write(tmp_path / split, THREE, drawn(THREE, 10, seed)).codes == THREE
    settings = config(tmp_path, attributes=["a"], columns=4, workers=0)
    slices = stream.TrainSlices(settings, 3)
    batch = slices[range(40)].batch
    assert (batch.x.shape, batch.x.dtype) == ((40, 2, 3, 4), torch.int64)
    chosen = slices.order(np.arange(40))
    views = mix(3, np.arange(40)) % np.uint64(3)
    assert len(np.unique(views)) == 3
    expected = drawn(THREE, 10)[torch.from_numpy(chosen), torch.from_numpy(views.astype(np.int64))]
    assert torch.equal(batch.x, expected)
    assert batch.label.tolist() == (chosen % 3).tolist()
    validation = stream.ValidationSlices(settings)[range(10)].batch
    assert torch.equal(validation.x, drawn(THREE, 10, 1)[:, 0])
    assert torch.equal(validation.attributes, batch.attributes[np.argsort(chosen[:10])])
    shards.write(tmp_path / "pictures", picture_samples(2), 2, [])
    assert Index(tmp_path / "pictures").codes is None


def test_workers_and_ranks_get_the_same_codes(tmp_path: Path) -> None:
    write(tmp_path / "train", THREE, drawn(THREE, 10))
    whole = stream.TrainSlices(config(tmp_path, columns=4), 3)[range(24)].batch.x
    slices = stream.TrainSlices(config(tmp_path, columns=4, workers=2), 3)
    halves = []
    for rank in range(2):
        loader = stream.train_loader(slices, 0, 12, 1, rank, 2, pin=False)
        halves.append([next(loader).batch.x for _ in range(2)])
    assert torch.equal(torch.cat([halves[rank][step] for step in range(2) for rank in range(2)]), whole)


def test_damaged_codes_are_replaced_and_named(tmp_path: Path) -> None:
    """One that its codebook does not have, in an otherwise valid shard. Verify finds it, too, but only if it looks."""
    codes = drawn(ONE, 10)
    codes[6, 0, 1, 2, 2] = 5
    write(tmp_path / "train", ONE, codes)
    found = stream.TrainSlices(config(tmp_path, columns=4), 0)[range(10)]
    assert [(one.shard, one.key, one.cause) for one in found.damage] == [("000001.tar", "k/006", "cut or corrupt")]
    assert found.batch.x.shape == (10, 2, 3, 4)
    assert list(shards.verify(tmp_path / "train", False, 1)) == []
    assert list(shards.verify(tmp_path / "train", True, 1)) == [
        shards.Finding("000001.tar", 1, 4, "codes are not those of the tokenizer")
    ]


def test_plain_webdataset_reads_them(tmp_path: Path) -> None:
    codes = drawn(THREE, 10)
    write(tmp_path / "train", THREE, codes)
    urls = [str(path) for path in sorted((tmp_path / "train").glob("*.tar"))]
    read = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).decode())
    assert [(one["__key__"], one["cls"], one["json"]) for one in read] == [
        (f"k/{i:03d}", i % 3, {"a": i / 2}) for i in range(10)
    ]
    np.testing.assert_array_equal(np.stack([one[EXTENSION] for one in read]), codes)


def npy(codes: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, codes, **options)
    return file.getvalue()


GOOD = np.zeros((2, 3, 4), np.uint16)
LIES = npy(GOOD).replace(b"(2, 3, 4), }    ", b"(2**40, 3, 4), }")
WRONG = {
    "nothing": b"",
    "no array": b"x" * 300,
    "cut": npy(GOOD)[:-1],
    "longer": npy(GOOD) + b"\0",
    "shape": npy(GOOD.reshape(2, 4, 3)),
    "more dimensions": npy(GOOD[None]),
    "type": npy(GOOD.astype(np.int16)),
    "wider": npy(GOOD.astype(np.int32)),
    "big-endian": npy(GOOD.astype(">u2")),
    "columns": npy(np.asfortranarray(np.arange(24).reshape(2, 3, 4).astype(np.uint16) % 5)),
    "code of another codebook": npy(GOOD + np.array([7, 5], np.uint16)[:, None, None]),
    "objects": npy(np.array([1, "a", None], object), allow_pickle=True),
    "expression": LIES,
    "deep": npy(GOOD).replace(b"(2, 3, 4)", b"((((((((("),
}


@pytest.mark.parametrize("data", WRONG.values(), ids=WRONG)
def test_other_arrays_are_damaged(data: bytes) -> None:
    Codes(ONE).validation(npy(GOOD))
    with pytest.raises(Damaged, match="cut or corrupt"):
        Codes(ONE).validation(data)


def test_negative_codes_are_damaged() -> None:
    with pytest.raises(Damaged):
        Codes(LARGE).validation(npy(np.full((2, 3, 4), -1, np.int32)))


def test_views_of_rules() -> None:
    assert [views_of(one) for one in ("center", "ten", "random:1", "random:1024")] == [1, 10, 1, 1024]
    for other in ("", "five", "random", "random:", "random:0", "random:1025", "random:02", "random:-1", "random:9999"):
        with pytest.raises(ValueError, match="crops must be center, ten, or random:V with V from 1 to 1024, not"):
            views_of(other)


HOSTILE: list[tuple[str, object, str]] = [
    *(("tokenizer", one, "codes.tokenizer is not 16") for one in (None, 7, "", HASHES[0].upper(), HASHES[0] + "\n")),
    *(("source", one, "codes.source is not 16") for one in (None, [HASHES[0]], HASHES[0][1:])),
    *(("sizes", one, "codes.sizes|wrong type") for one in (None, 8, [], [8], [8, 0], [8, 2**31 + 1], [8, True])),
    *(("sizes", one, "codes.sizes") for one in ([8, 5.0], ["8", "5"], [8, 5, 5], {"8": 5})),
    *(("shape", one, "codes.shape") for one in (None, [], [2, 3], [2, 3, 4, 1], [2, 0, 4], [2, -3, 4], "234")),
    ("shape", [1, 3, 4], "other numbers of codebooks"),
    ("shape", [2, 2**12, 2**12], "a sample has more than 16777216 codes"),
    *(("crops", one, "codes.views|crops must be") for one in (None, 3, "ten", "random:2", "\x1b]0;owned\x07", ["ten"])),
    *(("views", one, "codes.views") for one in (None, 1, 0, -3, 3.0, "3", True, 10**9)),
]


@pytest.mark.parametrize(("field", "value", "message"), HOSTILE, ids=range(len(HOSTILE)))
def test_a_hostile_header(tmp_path: Path, field: str, value: object, message: str) -> None:
    folder = tmp_path / "data" / "train"
    write(folder, THREE, drawn(THREE, 2))
    Index(folder).check()
    head = json.loads((folder / "index.json").read_text())
    head["codes"][field] = value
    (folder / "index.json").write_text(json.dumps(head))
    refused(folder, message)
    del head["codes"][field]
    (folder / "index.json").write_text(json.dumps(head))
    refused(folder, r"index\.json is damaged \(fields are missing or of the wrong type\)")
    for other in (None, 7, [], "center", [1, 2, 3, 4, 5, 6]):
        (folder / "index.json").write_text(json.dumps(head | {"codes": other}))
        refused(folder, "damaged")
