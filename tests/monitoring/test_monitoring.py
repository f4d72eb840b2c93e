import json
import resource
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from vaescale.monitoring import code_statistics, pictures
from vaescale.monitoring.board import Board, read_lines, tag
from vaescale.monitoring.console import Console


def test_perplexity_of_known_counts() -> None:
    assert code_statistics.perplexity(torch.full((512,), 7)) == pytest.approx(512)
    assert code_statistics.perplexity(torch.tensor([9, 0, 0])) == pytest.approx(1)
    assert code_statistics.perplexity(torch.tensor([1, 1, 2])) == pytest.approx(2**1.5)
    assert code_statistics.perplexity(torch.zeros(5).long()) == 1  # an empty window says nothing, and is no NaN


def test_a_resumed_board_is_one_monotone_curve(tmp_path: Path) -> None:
    """A first process writes up to step 9 and dies; the second one resumes from 5."""
    first = Board(tmp_path, 0)
    for step in range(1, 10):
        first.scalars({"train/loss": 100.0 + step}, step)
    first.close()
    (tmp_path / "metrics.jsonl").open("a").write('{"step": 10, "train/lo')  # died while writing
    second = Board(tmp_path, 5)
    for step in range(6, 12):
        second.scalars({"train/loss": float(step)}, step)
    second.close()
    expected = [(step, 100.0 + step) for step in range(1, 6)] + [(step, float(step)) for step in range(6, 12)]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["train/loss"]) for line in lines] == expected
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("Train/Loss")] == expected


def test_tensorboard_shows_first_what_people_look_for() -> None:
    """It orders by name, capitals before small letters."""
    names = (
        "codebook/age_max codebook/counts codebook/perplexity codebook/usage_ema data/epoch optim/lr perf/memory_gib "
    )
    names += (
        "train/bits_per_dim train/loss val/perplexity val/psnr val/reconstructions rate/level0 latents/alarm config"
    )
    assert sorted(map(tag, names.split())) == [
        *("Train/Loss", "Train/bits_per_dim", "Val/Reconstructions", "Val/perplexity", "Val/psnr"),
        *("codebook/Perplexity", "codebook/Usage_ema", "codebook/age_max", "codebook/counts"),
        *("config", "data/epoch", "latents/alarm", "optim/lr", "perf/memory_gib", "rate/level0"),
    ]


def test_hparams_hold_settings_next_to_final_numbers(tmp_path: Path) -> None:
    board = Board(tmp_path, 0)
    board.compare({"model.kind": "vae", "optimizer.lr": 1e-3, "batch": 8}, ["val/psnr"])
    board.scalars({"val/psnr": 31.0}, 9)
    board.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    (content,) = (
        HParamsPluginData.FromString(data)
        for name, data in events.PluginTagToContent("hparams").items()
        if "start" in name
    )
    given = content.session_start_info.hparams
    assert {name: value.string_value or value.number_value for name, value in given.items()} == {
        **{"model.kind": "vae", "optimizer.lr": 1e-3, "batch": 8}
    }
    experiment = HParamsPluginData.FromString(events.PluginTagToContent("hparams")["_hparams_/experiment"])
    assert [info.name.tag for info in experiment.experiment.metric_infos] == ["Val/psnr"]
    assert events.Scalars("Val/psnr")[-1].value == 31.0


def test_an_attempt_that_ended_before_its_first_checkpoint_leaves_no_trace(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        board = Board(tmp_path, 0)
        for step in range(1, 4):
            board.scalars({"train/loss": value}, step)
        board.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("Train/Loss")
    assert [(event.step, event.value) for event in events] == [(1, 2.0), (2, 2.0), (3, 2.0)]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


DAMAGE = {
    "NULs before a line": b'\0\0\0\0{"step": 2, "train/loss": 1}\n',
    "two on one line": b'{"step": 2, "train/lo{"step": 2, "train/loss": 1}\n',
    "two whole ones": b'{"step": 2}{"step": 2}\n',
    "no step": b'{"train/loss": 1}\n',
    "no number": b'{"step": "2"}\n',
    "a negative one": b'{"step": -2}\n',
    "a true one": b'{"step": true}\n',
    "no UTF-8": b'\xff\xfe{"step": 1}\n',
    "an end": b"}\n",
    "a list": b"[2]\n",
    "depth": b'{"step": ' + b"[" * 100_000 + b"\n",
    "length": b'{"step": 2, "a": "' + b"x" * 3_000_000 + b'"}\n',
    "half a line": b'{"step": 2, "train/loss"',
    "an empty one": b"\n",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_line_is_skipped(tmp_path: Path, damage: str) -> None:
    """It is left out; those before and after it stay as they are, byte for byte."""
    path = tmp_path / "metrics.jsonl"
    before, after = b'{"step": 1, "train/loss":  0.5}\n', b'{"step": 3, "train/loss": null}\n'
    path.write_bytes(before + DAMAGE[damage] + (b"" if damage == "half a line" else after))
    found = [values for _, values in read_lines(path)]
    assert found[0] == {"step": 1, "train/loss": 0.5}
    assert found[1:] == ([] if damage == "half a line" else [{"step": 3, "train/loss": None}])
    Board(tmp_path, 2).close()
    assert path.read_bytes() == before


def test_a_step_has_one_line(tmp_path: Path) -> None:
    """What is said of it later joins it, in a later process, too; not what would say a thing twice."""
    board = Board(tmp_path, 0)
    board.scalars({"train/loss": 1.0}, 1)
    board.scalars({"val/psnr": 30.0}, 1)
    board.scalars({"train/loss": 2.0}, 2)
    board.close()
    board = Board(tmp_path, 2)
    board.scalars({"val/psnr": float("nan")}, 2)
    board.scalars({"val/psnr": 31.0}, 2)
    board.scalars({"train/loss": 3.0}, 3)
    board.close()
    wanted = [
        {"step": 1, "train/loss": 1.0, "val/psnr": 30.0},
        {"step": 2, "train/loss": 2.0, "val/psnr": None},
        {"step": 2, "val/psnr": 31.0},
        {"step": 3, "train/loss": 3.0},
    ]
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == wanted
    assert [values for _, values in read_lines(tmp_path / "metrics.jsonl")] == wanted


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's thread gives up
def test_values_that_do_not_fit_on_the_disk_leave_their_line_intact(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    board = Board(tmp_path, 0)
    board.scalars({"train/loss": 1.0}, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    whole = (tmp_path / "metrics.jsonl").read_bytes()
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 10, before[1]))
        board.scalars({"val/a_long_name": 1.0}, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "the curves will have a gap" in capsys.readouterr().out
    assert (tmp_path / "metrics.jsonl").read_bytes() == whole
    (tmp_path / "metrics.jsonl").unlink()  # by a user
    board.scalars({"val/psnr": 1.0}, 1)
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "val/psnr": 1.0}


def test_values_that_are_no_numbers_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "a": "x", "b": [1], "c": true, "d": {}, "e": 2}\n')
    assert [values for _, values in read_lines(tmp_path / "metrics.jsonl")] == [{"step": 1, "e": 2}]


def test_json_lines_are_json_whatever_happens(tmp_path: Path) -> None:
    Board(tmp_path, 0).scalars({"a": float("nan"), "b": float("inf"), "c": 1.0}, 1)
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "a": None, "b": None, "c": 1.0}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's thread gives up
def test_a_line_that_does_not_fit_on_the_disk_is_removed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The system writes half of a line; the curves then have a gap, which is reported once, and continue."""
    board = Board(tmp_path, 0)
    board.scalars({"train/loss": 1.0}, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        room = (tmp_path / "metrics.jsonl").stat().st_size + 10
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
        for step in (2, 3):
            board.scalars({"train/loss": 1.0}, step)
            board.picture("val/images", np.zeros((8, 8, 3), np.uint8), step)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    board.scalars({"train/loss": 2.0}, 4)
    board.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 4]
    assert capsys.readouterr().out.count("cannot be written") == 1
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {1, 4} <= {event.step for event in events.Scalars("Train/Loss")}


@pytest.mark.parametrize(("size", "factor"), [(16, 6), (64, 2), (100, 1)])
def test_a_grid_holds_input_reconstruction_and_error(size: int, factor: int) -> None:
    """Small images enlarged, pixel by pixel; captions take room below the reconstructions only."""
    x = torch.randint(0, 256, (3, 3, size, size), dtype=torch.uint8)
    y = torch.randint(0, 256, (3, 3, size, size), dtype=torch.uint8)
    picture = pictures.reconstructions(x, y, ["1.0 dB", "2.0 dB", "3.0 dB"], per_row=2)
    error = np.clip(4 * np.abs(x.numpy().astype(int) - y.numpy()), 0, 255)
    side = factor * size
    line = pictures.line_height(pictures.legible(2 * (side + pictures.GAP)))
    top = 0
    for row in ((0, 1), (2,)):
        for kind, images in enumerate((x.numpy(), y.numpy(), error)):
            top += line
            for place, number in enumerate(row):
                left = pictures.GAP + place * (side + pictures.GAP)
                shown = picture[top : top + side, left : left + side]
                assert np.array_equal(shown, images[number].transpose(1, 2, 0).repeat(factor, 0).repeat(factor, 1))
                inked = (picture[top + side : top + side + line - 4, left : left + side] != pictures.PAPER).any()
                assert inked == (kind == 1)
            top += side + pictures.GAP + line * (kind == 1) + 2 * pictures.GAP
    assert len(picture) == top - 2 * pictures.GAP


def test_captions_are_legible_where_tensorboard_shows_a_picture() -> None:
    """Its cards are 400 pixels wide; of letters, at least 10 pixels of height are left."""
    for size, count in ((16, 3), (64, 8), (128, 8), (256, 8)):
        x = torch.zeros(count, 3, size, size, dtype=torch.uint8)
        picture = pictures.reconstructions(x, x)
        text = pictures.legible(picture.shape[1] - pictures.GAP)
        assert text * min(1, 400 / picture.shape[1]) >= 9.5
        assert len(picture) == 3 * (pictures.factor(size) * size + pictures.line_height(text)) + 7 * pictures.GAP


def test_a_code_map_gives_each_code_one_colour() -> None:
    x = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    codes = torch.arange(16).view(1, 4, 4)
    picture = pictures.code_map(x, codes, size=16)
    side, left = 96, pictures.GAP  # 16 pixels, enlarged
    top = 2 * pictures.line_height(pictures.TEXT) + side + 3 * pictures.GAP
    shown = picture[top : top + side, left : left + side]
    assert len(np.unique(shown.reshape(-1, 3), axis=0)) == 16
    assert (shown[:24, :24] == shown[0, 0]).all()


def test_a_captioned_grid_holds_its_images_row_by_row() -> None:
    """Grey ones, too; captions change the margins only, and a row may be short."""
    images = torch.randint(0, 256, (5, 1, 48, 48), dtype=torch.uint8)
    plain = pictures.grid(images, 2)
    full = pictures.grid(images, 2, ["a", "a caption far too long for its column"], ["one", "two", "three"], "title")
    assert len(plain) == pictures.GAP + 3 * 100
    assert full.shape[0] == 2 * pictures.line_height(pictures.TEXT) + 3 * 100
    for picture in (plain, full):
        corner = picture.shape[1] - 200, picture.shape[0] - 300
        for number, image in enumerate(images[:, 0].numpy()):
            left, top = corner[0] + number % 2 * 100, corner[1] + number // 2 * 100
            shown = picture[top : top + 96, left : left + 96]
            assert np.array_equal(shown, image.repeat(2, 0).repeat(2, 1)[..., None].repeat(3, 2))
        assert (picture[-100:, -100:] == pictures.PAPER).all()
        assert (picture[:, -4:] == pictures.PAPER).all()  # no caption runs into the next column


def test_joined_pictures_are_whole() -> None:
    a, b = np.full((5, 7, 3), 10, np.uint8), np.full((6, 2, 3), 20, np.uint8)
    below, beside = pictures.joined([a, b], 0), pictures.joined([a, b], 1)
    assert below.shape == (5 + 8 + 6, 7, 3)
    assert beside.shape == (6, 7 + 8 + 2, 3)
    assert (below[:5] == 10).all()
    assert (below[13:, :2] == 20).all()
    assert (beside[:5, :7] == 10).all()
    assert (beside[:, 15:] == 20).all()
    assert (beside[5, :7] == pictures.PAPER).all()


def test_rounding_is_to_the_nearest() -> None:
    values = torch.tensor([-0.1, 0.0, 0.4999 / 255, 0.5001 / 255, 1.0, 1.2])
    assert pictures.to_bytes(values).tolist() == [0, 0, 0, 1, 255, 255]


def test_a_log_line_has_the_main_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(0, 200, loud=True)
    console.report(20, {"train/loss": 0.5, "train/psnr": 30.0, "data/wait_share": 0.012, "optim/lr": 1e-3})
    line = capsys.readouterr().out
    assert "step  20/200  loss 0.5000  PSNR 30.00  lr 1.00e-03  data wait 1.2%  elapsed 0:00:00  ETA 0:00:0" in line
    assert datetime.strptime(line[-9:-1], "%H:%M:%S")
    usage = {f"codebook{level}/usage_window": share for level, share in enumerate([0.75, 0.5, 1.0])}
    console.report(40, {**usage, "codebook0/usage_ever": 0.1, "codebook0/perplexity": 9.0, "codebook1/perplexity": 9.0})
    assert "step  40/200  usage 0.500–1.000  perplexity 9.0  elapsed" in capsys.readouterr().out
    console.report(60, {"codebook/usage_window": 0.5})
    assert "step  60/200  usage 0.500  elapsed" in capsys.readouterr().out
    Console(0, 200, loud=False).report(20, {"train/loss": 0.5})
    assert capsys.readouterr() == ("", "")
