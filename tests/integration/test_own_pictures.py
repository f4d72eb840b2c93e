"""Two commands lead from 500 pictures, as users have them, to a training."""

import io
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import Start, finish, jpeg
from tests.data.test_listing import command
from tests.integration.conftest import losses
from tests.integration.test_resume import TRAIN
from vaescale.data.index import Index
from vaescale.data.stream import Samples

CLASSES = ["cats", "dogs", "St. Bernards"]


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def pictures(root: Path, kind: str) -> None:
    """Write 503 files that count as pictures, three of them unreadable or truncated, and seven that do not."""
    drawn = np.random.default_rng(0)
    files = {f"IMG_{number:04d}.jpg": jpeg(number, 24, 20) for number in range(490)}
    files |= {f"DSC{number}.JPG": jpeg(500 + number, 20, 24) for number in range(4)}
    files |= {
        "IMG_0001.png": png(drawn.integers(0, 256, (20, 20, 3), np.uint8)),  # in addition to IMG_0001.jpg
        "grey.jpeg": jpeg(600, 1, 1),
        "clear.png": png(drawn.integers(0, 256, (9, 30, 4), np.uint8)),
        "deep.png": png(drawn.integers(0, 1 << 16, (20, 20), np.uint16)),
        "a png.jpg": png(drawn.integers(0, 256, (20, 20), np.uint8)),
        "Shot 2025-01-01 at 10.00\u202fAM.png": png(drawn.integers(0, 256, (20, 20, 3), np.uint8)),
        "error.jpg": b"<html>404</html>",
        "empty.jpg": b"",
        "cut.jpg": jpeg(601)[:-200],
        **{f"scan{number}.tiff": b"II*\0" for number in range(3)},
        **{"notes.txt": b"", "more.TXT": b"", "README": b"", "Makefile": b""},
        **{".hidden.jpg": b"", "._IMG_0001.jpg": b"", "Thumbs.db": b""},
    }
    for number, (name, data) in enumerate(files.items()):
        folder = root / (CLASSES[number % 3] if kind == "classes" else "")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def prepared(source: Path, mine: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Run the first command, and check its output and the shards that it writes."""
    pictures(source, kind)
    assert command("prepare", source, "--out", mine, "--val", 0.1, *(["--unlabelled"] if kind == "flat" else []))
    output = capsys.readouterr().out.splitlines()
    assert output[0] == f"{source}: 510 files: 503 images, 7 skipped: 3 tiff, 2 txt, 2 without an extension"
    assert output[1] == "add --convert to include the 3 tiff"
    assert output[-1] == f"train on them with data.root={mine}"
    left_out = {line.rpartition("/")[2].removeprefix("left out: ") for line in output if line.startswith("left out")}
    unreadable = {"error (not a picture)", "empty (empty)"}
    assert unreadable <= left_out <= {*unreadable, "cut (cut or corrupt)"}
    training, validation = Index(mine / "train"), Index(mine / "val")
    assert len(training) + len(validation) == 503 - len(left_out)
    assert 30 < len(validation) < 70
    assert training.classes == validation.classes == (sorted(CLASSES) if kind == "classes" else [])
    for split in (training, validation) if kind == "classes" else ():
        samples = Samples(split.folder)
        labels = {(samples.name(n)[1].partition("/")[0], samples.read(n)[1]) for n in range(len(split))}
        assert labels == {("St_ Bernards", 0), ("cats", 1), ("dogs", 2)}


def test_two_commands_from_a_folder_to_a_training(
    tmp_path: Path, start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    """The two trainings run at the same time."""
    trainings = {}
    for kind in ("flat", "classes"):
        prepared(tmp_path / f"my {kind}", tmp_path / kind, kind, capsys)
        settings = ["steps=4", "every.validate=2", f"run={tmp_path / 'runs' / kind}", f"data.root={tmp_path / kind}"]
        trainings[kind] = start([sys.executable, *TRAIN, *settings])
    for kind, process in trainings.items():
        code, output = finish(process)
        assert code == 0, output
        assert len(losses(tmp_path / "runs" / kind)) == 4
