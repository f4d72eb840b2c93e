"""`launch/shards.py` run as a command, on shards written by plain webdataset."""

import os
import re
import runpy
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
import webdataset

from tests.conftest import Start, finish, jpeg
from tests.data.test_tar import HOSTILE, form_of, tar
from vaescale.data import stream
from vaescale.data.index import Index
from vaescale.data.order import Order

COUNT = 45
EPOCHS = 3
BATCH = 24


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 7 samples in the layout of timm/imagenet-1k-wds, in a read-only folder."""
    folder = tmp_path_factory.mktemp("foreign")
    with webdataset.ShardWriter(str(folder / "imagenet1k-train-%04d.tar"), maxcount=7, verbose=0) as writer:
        for i in range(COUNT):
            record = {"label": i % 5, "width": 40, "class_name": "cat"}
            writer.write({"__key__": f"n0144/{i:05d}", "jpg": jpeg(i), "cls": i % 5, "json": record})
    folder.chmod(0o555)
    return folder


def command(start: Start, *arguments: str | Path | int) -> tuple[int, str]:
    return finish(start([sys.executable, "launch/shards.py", *map(str, arguments)]))


def test_the_order_from_outside(start: Start, foreign: Path, tmp_path: Path) -> None:
    """Each of three epochs holds each key once, and every world size and worker count prints the same batches."""
    given = ["--pattern", "imagenet1k-train-{0000..0006}.tar", "--processes", 1]
    code, output = command(start, "index", foreign, "--out", tmp_path, *given)
    assert code == 0, output
    assert f"{COUNT} samples in 7 shards, labels 0 to 4" in output
    assert "attributes: label, width" in output
    steps = -(-EPOCHS * COUNT // BATCH)
    batches = {}
    for world, workers, first in ((1, 0, 0), (2, 1, 0), (4, 2, 0), (8, 4, 0), (2, 2, 2)):
        given = ["--seed", 3, "--batch", BATCH, "--columns", 8, "--world", world, "--workers", workers]
        code, output = command(start, "order", tmp_path, *given, "--from", first, "--steps", steps - first)
        assert code == 0, output
        rows = [line.split(maxsplit=3) for line in output.splitlines()]
        assert {int(rank) for _, rank, _, _ in rows} == set(range(world))
        assert all(int(worker) < max(1, workers) for _, _, worker, _ in rows)
        keys = [key for _, _, _, key in rows]
        batches[world, workers, first] = keys
        assert keys == batches[1, 0, 0][first * BATCH :]
        for step in range(first, steps):
            assert [int(row[0]) for row in rows].count(step) == BATCH
    given = ["--seed", 3, "--batch", BATCH, "--columns", 8, "--order-version", 1]
    code, output = command(start, "order", tmp_path, *given, "--steps", steps)
    assert code == 0, output
    older = Order(Index(tmp_path).sizes, 8, 3, version=1)(np.arange(steps * BATCH)).tolist()
    assert [line.split(maxsplit=3)[3] for line in output.splitlines()] == [f"n0144/{i:05d}" for i in older]
    keys = batches[1, 0, 0]
    for epoch in range(EPOCHS):
        expected = Counter(f"n0144/{i:05d}" for i in range(COUNT))
        assert Counter(keys[epoch * COUNT : (epoch + 1) * COUNT]) == expected


def test_verify_from_outside(start: Start, foreign: Path, tmp_path: Path) -> None:
    for path in foreign.glob("*.tar"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert command(start, "index", tmp_path, "--processes", 1)[0] == 0
    code, output = command(start, "verify", tmp_path, "--decode", "--processes", 2)
    assert (code, output.splitlines()[-1]) == (0, "no damage found")
    path = tmp_path / "imagenet1k-train-0002.tar"
    path.write_bytes(path.read_bytes()[:5000])
    code, output = command(start, "verify", tmp_path, "--processes", 1)
    assert code == 1
    assert "imagenet1k-train-0002.tar: " in output
    assert "of 7 samples lost: 5000 bytes instead of" in output
    assert "1 damaged shards" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["index", "{folder}"], "no file in"),
        (["index", "pipe:cat x.tar", "--out", "{folder}"], "pipes and chained protocols"),
        (["index", "https://host/shards"], "give --out, the folder"),
        (["verify", "{folder}"], "there are no shards"),
        (["order", "{folder}", "--batch", "4"], "there are no shards"),
        (["prepare", "{folder}/none", "--out", "{folder}"], "does not exist"),
        (["index", "https://me:hunter2@host/shards"], "the URL on host contains credentials"),
        (["index", "{folder}", "--pattern", "{{0..3"], "no file in|has an unmatched brace"),
    ],
)
def test_errors_are_one_sentence(start: Start, tmp_path: Path, arguments: list[str], message: str) -> None:
    code, output = command(start, *(argument.format(folder=tmp_path) for argument in arguments))
    assert code == 2
    assert len(output.splitlines()) == 1, output
    assert output.startswith("error: ")
    assert re.search(message, output)
    assert "hunter2" not in output


@pytest.mark.parametrize(
    "arguments",
    [
        *(["order", "x", "--batch", "8", name, "0"] for name in ("--world", "--columns", "--accumulation", "--steps")),
        *(["order", "x", "--batch", "8", name, "-1"] for name in ("--workers", "--from", "--seed")),
        *(["order", "x", "--batch", value] for value in ("0", "-4", "1e3")),
        *(["prepare", "x", "--out", "y", "--shard-mib", value] for value in ("0", "-1", "nan", "inf")),
        *(["prepare", "x", "--out", "y", *rest] for rest in (["--quality", "0"], ["--short-side", "-1"])),
        ["verify", "x", "--processes", "0"],
    ],
    ids=" ".join,
)
def test_wrong_numbers_are_refused(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["shards.py", *arguments])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path("launch/shards.py")["parse"]()


def test_the_defaults_are_those_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The parser repeats them, to avoid importing the modules that define them."""
    parse = runpy.run_path("launch/shards.py")["parse"]
    monkeypatch.setattr(sys, "argv", ["shards.py", "order", "x", "--batch", "8"])
    order, run = parse(), stream.Config()
    for name in ("columns", "workers", "cache", "cache_gib"):
        assert getattr(order, name) == getattr(run, name)
    monkeypatch.setattr(sys, "argv", ["shards.py", "verify", "x"])
    assert parse().max_megapixels == run.max_megapixels


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_preparation_leaves_no_process(start: Start, tmp_path: Path, number: int) -> None:
    """Ctrl-C reaches all processes of the command, the other signals only the main one. All processes end, and the same
    command continues, here in one process."""
    tree = tmp_path / "tree"
    for i in range(27):
        (tree / f"n{i % 3}").mkdir(parents=True, exist_ok=True)
        (tree / f"n{i % 3}" / f"{i}.JPEG").write_bytes(jpeg(i))
    given = ["prepare", tree, "--out", tmp_path / "out", "--shard-mib", "0.002", "--short-side", 24, "--processes"]
    process = start([sys.executable, "launch/shards.py", *map(str, given), "2"])
    wait_for(lambda: list((tmp_path / "out").glob("*.tar")) or process.poll() is not None)
    children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    code, output = finish(process)
    assert code in (0, 130, -number), output  # 0: it finished before the signal
    assert "Traceback" not in output
    _, left = psutil.wait_procs(children, timeout=30)
    assert not left
    code, output = command(start, *given, 1)
    assert code == 0, output
    assert "27 samples" in output


def wait_for(happened: Callable[[], object]) -> None:
    until = time.monotonic() + 120
    while not happened():
        assert time.monotonic() < until
        time.sleep(0.001)


def test_a_hostile_tar_from_outside(start: Start, tmp_path: Path) -> None:
    """All hostile tars at once, indexed by several processes: each is counted in the error, and no index is written."""
    (tmp_path / "shards").mkdir()
    for number, (members, _) in enumerate(HOSTILE.values()):
        tar(tmp_path / "shards" / f"{number:02d}.tar", *members, form=form_of(members))
    code, output = command(start, "index", tmp_path / "shards", "--out", tmp_path / "index", "--processes", 2)
    assert code == 2
    assert f"error: {len(HOSTILE)} of {len(HOSTILE)} shards cannot be indexed: " in output
    assert sorted(path.name for path in tmp_path.rglob("*.json")) == []
    assert not (tmp_path / "k.jpg").exists()


def test_output_that_is_full_costs_no_shards(start: Start, tmp_path: Path) -> None:
    (tmp_path / "d/a").mkdir(parents=True)
    (tmp_path / "d/a/1.jpg").write_bytes(jpeg(0))
    words = ["prepare", str(tmp_path / "d"), "--out", str(tmp_path / "out"), "--processes", "1"]
    full = ["bash", "-c", '"$0" launch/shards.py "$@" > /dev/full 2>&1', sys.executable, *words]
    assert finish(start(full))[0] == 0
    assert len(Index(tmp_path / "out")) == 1
