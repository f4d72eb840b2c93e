"""Codes exported by the command, on several ranks, interrupted, with damaged images, and decoded again."""

import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image, ImageOps

from launch import export
from tests.conftest import ROOT, Start, finish, jpeg, ranks
from tests.integration.conftest import forked, losses, training, written
from vaescale import config as mechanics
from vaescale import distributed, settings, trained
from vaescale.data import DataError, decode, stream
from vaescale.data.index import Index
from vaescale.data.order import mix
from vaescale.data.shards import Sample, write
from vaescale.evaluation.evaluate import reconstruct
from vaescale.interfaces import Batch
from vaescale.lifecycle import checkpoint
from vaescale.nn.frozen import weights_hash

TINY = ROOT / "tests" / "integration" / "tiny.yaml"
COUNTS = {"train": 45, "val": 11}
NAMES = ["a", "b", "c"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images with three classes and an attribute that every fourth lacks, in shards of 20."""
    root = tmp_path_factory.mktemp("images")
    for split, count in COUNTS.items():
        attributes = [{"odd/x": i / 7} if i % 4 else {} for i in range(count)]
        images = [Sample(f"{split}/{i:03d}", jpeg(i), i % 3, "jpg", attributes[i]) for i in range(count)]
        write(root / split, images, 20, NAMES)
    return root


def make_run(run: Path, data: Path, *given: str, seed: int = 0) -> Path:
    """Saves a run that was not trained: random networks, and codebooks with the spread of features of images, of which
    images use most codes."""
    overrides = [f"run={run}", f"data.root={data}", f"seed={seed}", "model.quantizer.depth=2", *given]
    config = settings.load(TINY, overrides)
    torch.manual_seed(seed)  # an unlucky network would use few codes
    model = settings.build(config).eval()
    images = np.stack([decode.validation_image(jpeg(1000 + i), config.data.size) for i in range(24)])
    with torch.no_grad():
        rest = model.encoder(torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - 0.5).movedim(1, -1).flatten(0, -2)
        tensors = model.state_dict()
        generator = torch.Generator().manual_seed(seed)
        for level in range(2):
            codebook = rest.mean(0) + rest.std(0) * torch.randn(24, 4, generator=generator)
            tensors[f"quantizer.parts.{level}.codebook"] = codebook
            rest = rest - codebook[torch.cdist(rest, codebook).argmin(1)]
    run.mkdir()
    mechanics.save(config, run / mechanics.FILE)
    checkpoint.save(run / "checkpoints", 1, {"ema": tensors}, {"step": 1, "noise": 1}, keep=1)
    return run


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With two codebooks, one after the other."""
    return make_run(tmp_path_factory.mktemp("run") / "run", data)


def call(*words: str | Path) -> int:
    """Runs the command in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["export", *map(str, words)])
        patch.setattr(distributed, "init", lambda: torch.device("cpu"))
        return export.main(export.parse())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def read(folder: Path) -> list[dict[str, object]]:
    """Reads shards by plain webdataset."""
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    return list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).decode())


def test_ranks_write_the_same_files(run: Path, tmp_path: Path, start: Start) -> None:
    """One to three ranks; a killed export continues, whatever it left, with other ranks."""
    words = ["launch/export.py", "codes", "--run", str(run), "--per-shard", "7", "data.workers=1"]
    for world in (1, 2, 3):
        for process in ranks(start, world, [*words, "--out", str(tmp_path / str(world))]):
            code, output = finish(process)
            assert code == 0, output
    made = contents(tmp_path / "1")
    assert sorted(made) == sorted(
        f"{split}/{name}"
        for split, count in (("train", 7), ("val", 2))
        for name in ["attributes.npy", "classes.json", "export.json", "index.json", "samples.npy"]
        + [f"{number:06d}.tar" for number in range(count)]
    )
    assert made == contents(tmp_path / "2") == contents(tmp_path / "3")


def test_a_rank_that_cannot_write_ends_all(run: Path, tmp_path: Path, start: Start) -> None:
    """After the shard that the others are at. Its own sentence says why, and theirs which rank it is."""
    words = ["codes", "--run", str(run), "--split", "train", "--out", str(tmp_path), "--per-shard", "7"]
    assert call(*words) == 0
    for name in ("index.json", *(f"00000{number}.tar" for number in range(2, 7))):
        (tmp_path / "train" / name).unlink()
    (tmp_path / "train" / "000003.tar").mkdir()
    first, second = map(finish, ranks(start, 2, ["launch/export.py", *words, "data.workers=0"]))
    assert first == (2, "error: rank 1 cannot write its shard: see its error\n")
    assert second[0] == 2
    assert second[1].startswith(f"error: {tmp_path}/train/")
    assert second[1].count("\n") == 1
    assert sorted(path.name for path in (tmp_path / "train").glob("*.tar")) == [f"00000{i}.tar" for i in range(4)]


def test_an_interrupted_export_continues(run: Path, tmp_path: Path, start: Start) -> None:
    """It is killed after its third shard. The shards that are there are not written again."""
    words = ["codes", "--run", str(run), "--split", "train", "--per-shard", "1"]
    assert call(*words, "--out", tmp_path / "whole") == 0
    out = tmp_path / "killed" / "train"
    process = start([sys.executable, "launch/export.py", *words, "--out", str(out.parent)])
    while not (out / "000002.tar").exists():
        assert process.poll() is None
        os.sched_yield()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    there = {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert 3 <= len(there) < COUNTS["train"]
    (out / ".000040.tar.partial").write_bytes(b"half")
    assert call(*words, "--out", out.parent) == 0
    assert contents(out.parent) == contents(tmp_path / "whole")
    assert all(path.stat().st_mtime_ns == time for path, time in there.items())
    before = contents(out)
    assert call(*words, "--out", out.parent) == 0  # nothing is left to do
    assert contents(out) == before


def test_a_prior_learns_the_same_from_codes_as_from_images(run: Path, data: Path, tmp_path: Path) -> None:
    """In the same order, because the shards have the same sizes."""
    assert call("codes", "--run", run, "--out", tmp_path / "codes", "--per-shard", "20") == 0
    small = {"steps": 12, "global_batch": 12, "optimizer.warmup_steps": 2, "every.report": 1, "every.validate": 3}
    small |= {"model.width": 16, "model.depth": 1, "model.heads": 2, "model.classes": 3, "every.checkpoint": 12}
    small |= {"data.channels": 3, "data.augment": False, "data.columns": 8, "data.workers": 0}
    jobs = []
    for name, root in (("images", data), ("codes", tmp_path / "codes")):
        given = {**small, "model.tokenizer": run, "run": tmp_path / name / "run", "data.root": root}
        jobs.append(training(tmp_path / name, ROOT / "configs" / "prior_digits.yaml", written(given)))
    forked(tmp_path, jobs)
    assert losses(tmp_path / "codes" / "run") == pytest.approx(losses(tmp_path / "images" / "run"), abs=1e-6)
    weights = "run/checkpoints/step-00000012/ema.safetensors"
    assert (tmp_path / "codes" / weights).read_bytes() == (tmp_path / "images" / weights).read_bytes()


def test_what_is_lost_is_made_again(run: Path, tmp_path: Path) -> None:
    """A cut shard, and then the index, whose error says how."""
    words = ["codes", "--run", run, "--split", "train", "--per-shard", "20", "--out", tmp_path]
    assert call(*words) == 0
    before, (shard, head) = contents(tmp_path), (tmp_path / "train" / name for name in ("000001.tar", "index.json"))
    for path in (shard, head):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        if path == head:
            with pytest.raises(DataError, match=r"damaged.*: run the `launch/export\.py` command that made its shards"):
                Index(head.parent)
        assert call(*words) == 0
        assert contents(tmp_path) == before


@pytest.mark.parametrize("crops", ["center", "ten", "random:3"])
def test_codes_are_those_of_each_view(run: Path, data: Path, tmp_path: Path, crops: str) -> None:
    """Compared with the codes of one image after another, whose crops are made by torchvision or as for training."""
    assert call("codes", "--run", run, "--crops", crops, "--out", tmp_path, "--per-shard", "20", "data.workers=1") == 0
    settings_ = trained.read_config(run, [])
    codec, _ = trained.read_model(run, settings_, torch.device("cpu"))
    for split, count in COUNTS.items():
        rule = crops if split == "train" else "center"
        found, source = Index(tmp_path / split), stream.Samples(data / split)
        found.check()
        assert found.codes is not None
        assert (found.codes.tokenizer, found.codes.crops) == (weights_hash(codec), rule)
        assert (found.codes.sizes, found.codes.shape) == ([24, 24], [2, 4, 4])
        assert (found.codes.source, found.classes) == (source.index.fingerprint(), NAMES)
        assert (found.records["label"] == source.index.records["label"]).all()
        np.testing.assert_array_equal(found.attributes, source.index.attributes)
        samples = read(tmp_path / split)
        used = [len(np.unique(np.stack([one["codes.npy"][..., level, :, :] for one in samples]))) for level in (0, 1)]
        assert min(used) > 12  # of 24
        assert [one["__key__"] for one in samples] == [f"{split}/{i:03d}" for i in range(count)]
        for number in (0, 3, count - 1):
            views = expected_views(source.read(number)[0], number, rule)
            x = torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2)
            nothing = torch.zeros(len(x), dtype=torch.int64)
            codes = codec.encode(Batch(x, nothing, torch.zeros(len(x), 0), nothing))
            np.testing.assert_array_equal(
                np.reshape(samples[number]["codes.npy"], (len(views), 2, 4, 4)), torch.stack(codes, 1)
            )
            assert samples[number]["cls"] == number % 3
            assert ("json" in samples[number]) == bool(number % 4)


def expected_views(data: bytes, number: int, rule: str) -> list[np.ndarray]:
    if rule == "center":
        return [decode.validation_image(data, 16)]
    if rule == "ten":
        square = Image.fromarray(decode.validation_image(data, 17))
        corners = [(0, 0), (0, 0), (1, 0), (0, 1), (1, 1)]  # left, upper; the first is the centre, rounded to even
        crops = [square.crop((x, y, x + 16, y + 16)) for x, y in corners]
        return [np.asarray(one) for one in [*crops, *map(ImageOps.mirror, crops)]]
    return [decode.train_image(data, 16, 0.25, True, int(mix(0, number)), view) for view in range(3)]


def test_decoded_codes_are_the_reconstructions(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In a data.root of PNGs. The codes of another run are refused."""
    codes, images = tmp_path / "codes", tmp_path / "images"
    assert call("codes", "--run", run, "--out", codes) == 0
    assert call("decode", codes, "--run", run, "--out", images, "--per-shard", "4") == 0
    config = trained.read_config(run, [f"data.root={images}"])
    codec, _ = trained.read_model(run, config, torch.device("cpu"))
    for split, slices in stream.SPLITS.items():
        numbers = range(COUNTS[split])
        expected, _ = reconstruct(codec, slices(trained.read_config(run, []).data)[numbers].batch)
        found = slices(config.data)[numbers].batch
        assert torch.equal(found.x, expected)
        assert found.label.tolist() == [number % 3 for number in numbers]
        assert Index(images / split).attribute_names == ["odd/x"]
    other = make_run(tmp_path / "other", tmp_path, seed=1)
    capsys.readouterr()
    assert call("decode", codes, "--run", other, "--out", tmp_path / "none") == 2
    assert "train holds codes of another tokenizer (" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_all_views_are_decoded(run: Path, tmp_path: Path) -> None:
    for words in (["codes", "--crops", "random:2", "--out", tmp_path / "codes"], ["decode", tmp_path / "codes"]):
        out = [] if words[0] == "codes" else ["--out", tmp_path / "images"]
        assert call("--local_rank=0", *words, "--run", run, "--split", "train", *out) == 0
    keys = [str(one["__key__"]) for one in read(tmp_path / "images" / "train")]
    assert keys == [f"train/{number:03d}-{view}" for number in range(45) for view in range(2)]


def test_damaged_images_are_left_out_and_named(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Until there are too many. Equal keys of different shards of the source are told apart."""
    images = [Sample(f"{i % 5}.x", jpeg(i) if i % 5 != 3 else jpeg(i)[:-200], 0) for i in range(10)]
    write(tmp_path / "data" / "train", images, 5, [])
    words = ["codes", "--run", run, "--split", "train", "--out", tmp_path / "out", f"data.root={tmp_path / 'data'}"]
    assert call(*words, "data.damaged_allowance=1") == 2
    shown = capsys.readouterr()
    assert "2 samples of " in shown.err
    assert "are damaged, more than data.max_damaged_ratio=0.001 allows" in shown.err
    assert call(*words) == 0
    shown = capsys.readouterr()
    assert shown.out.endswith("8 samples in 1 shard, 2 damaged ones left out\n")
    keys = [str(one["__key__"]) for one in read(tmp_path / "out" / "train")]
    assert keys == ["0_x", "1_x", "2_x", "4_x", "0_x-5", "1_x-6", "2_x-7", "4_x-9"]


def test_what_cannot_be_exported_is_one_sentence(
    run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert call("codes", "--run", run, "--out", out, "--split", "val") == 0
    head = (out / "val" / "export.json").read_bytes()
    other = make_run(tmp_path / "other", data, seed=1)
    vae = tmp_path / "vae"
    config = settings.load(TINY.with_name("tiny_vae.yaml"), [f"run={vae}", f"data.root={data}"])
    vae.mkdir()
    mechanics.save(config, vae / mechanics.FILE)
    tensors = {"ema": settings.build(config).state_dict()}
    checkpoint.save(vae / "checkpoints", 1, tensors, {"step": 1, "noise": 1}, keep=1)
    new = ["--out", tmp_path / "new"]
    wrong = {
        "(tokenizer was ": ["codes", "--run", other, "--out", out],
        "(per_shard was 10000 and is now 5)": ["codes", "--run", run, "--out", out, "--per-shard", "5"],
        "val already contains shards that no export made": ["codes", "--run", run, "--out", data],
        "vae has no codes to export: its model, vae, has no codebooks": ["codes", "--run", vae, *new],
        "val already holds codes: give data.root=… of images": ["codes", "--run", run, *new, f"data.root={out}"],
        "--crops must be center, ten, or random:V": ["codes", "--run", run, *new, "--crops", "five"],
        "--per-shard 0 must be at least 1": ["codes", "--run", run, *new, "--per-shard", "0"],
        "none is not a run directory": ["codes", "--run", tmp_path / "none", *new],
        "data.size": ["codes", "--run", run, *new, "data.sise=8"],
        "there are no shards in ": ["codes", "--run", run, *new, f"data.root={tmp_path / 'none'}"],
        "val holds no codes: give the --out": ["decode", data, "--run", run, *new],
        "none holds no codes: give the --out": ["decode", tmp_path / "none", "--run", run, *new],
    }
    for message, words in wrong.items():
        split = ["--split", "val"] if words[1] != tmp_path / "none" else []
        assert call(*words, *split) == 2
        error = capsys.readouterr().err
        assert (message in error, error.count("error: "), error.count("\n")) == (True, 1, 1), (message, error)
    assert (out / "val" / "export.json").read_bytes() == head
    assert not (tmp_path / "new").exists()
