"""launch/evaluate.py and launch/sample.py: which numbers and pictures a run directory keeps."""

import json
from pathlib import Path

import pytest
from PIL import Image

from launch import evaluate, sample
from tests.conftest import Command, samples
from tests.evaluation.test_codecs import page_file, saved
from tests.test_library import untrained
from vaescale.data import DataError, index
from vaescale.data.shards import write
from vaescale.evaluation import candidate, nearest


def test_the_record_of_a_run_is_its_own(pictures: Path, tmp_path: Path, command: Command) -> None:
    run, out = untrained(tmp_path, "tiny_vae", pictures), tmp_path / "out.json"
    assert command(evaluate, "--run", run, "data.workers=0")[0] == 0
    record = (run / "evaluation.json").read_bytes()
    own = json.loads(record)
    assert (own["step"], own["draws"]) == (2, 1)
    assert "bits_per_dim_iw" not in own

    older, other = run / "checkpoints" / "step-00000001", tmp_path / "other"
    write(other / "val", samples(5, seed=2), 4, [])
    cases = {
        (older,): "step-00000001",
        (run, f"data.root={other}"): "data.root=",
        (run, "data.size=16"): "data.size=16",
    }
    for words, named in cases.items():
        code, output = command(evaluate, "--run", *words)
        assert code == 2
        assert f"evaluation.json keeps the run's own numbers and is not overwritten with those of {named}" in output
        assert "give --out DIR" in output
        assert command(evaluate, "--run", *words, "--out", out)[0] == 0
        assert json.loads(out.read_text())["step"] == (1 if words == (older,) else 2)
        assert (run / "evaluation.json").read_bytes() == record
    assert json.loads(out.read_text()) == own  # data.size as it was

    assert command(evaluate, "--run", run, "--iw", 2)[0] == 0
    code, output = command(evaluate, "--run", run)
    assert (code, "of --iw 1, because it has the tighter bound of --iw 2: give --out DIR" in output) == (2, True)
    changed = json.loads((run / "evaluation.json").read_text()) | {"fingerprint": "0", "data": "data/then/val"}
    (run / "evaluation.json").write_text(json.dumps(changed))
    code, output = command(evaluate, "--run", run, "--iw", 2)
    assert code == 2
    assert "not overwritten with those of images other than the data/then/val that it was measured on" in output
    (run / "evaluation.json").write_text("[]")
    assert command(evaluate, "--run", run)[0] == 0
    assert (run / "evaluation.json").read_bytes() == record


def test_comparisons_are_kept_until_the_run_changes(pictures: Path, tmp_path: Path, command: Command) -> None:
    """They are measured once, survive a quicker evaluation, and other checkpoints and settings have their own."""
    run, out = untrained(tmp_path, "tiny_vae", pictures), tmp_path / "out.json"
    code, output = command(evaluate, "--run", run, "--metrics", "rfd", "rpr", "--features", "random", "data.workers=0")
    assert code == 0
    assert "rFD (random)" in output
    assert "\n  FD (random): mean of the last feature map, " in output
    assert "not measured again" not in output
    first = json.loads((run / "evaluation.json").read_text())
    assert first["rfd_random"] > 0
    assert first["comparisons"]["rfd_random"]["step"] == 2
    assert "Kynkaanniemi" in first["protocol"]["precision"]
    words = ("--run", run, "--metrics", "rfd", "rkid", "--features", "random")
    code, output = command(evaluate, *words, "--format", "latex")
    assert (code, "not measured again, because the protocol is the same: rfd_random\n" in output) == (0, True)
    assert r"\begin{tabular}{llrlr" in output
    assert r" & rFD (random) & rKID (random) & r-precision (random)" in output
    assert command(evaluate, "--run", run)[0] == 0
    last = json.loads((run / "evaluation.json").read_text())
    assert [last[name] for name in first if name not in ("comparisons", "rkid_random")] == [
        value for name, value in first.items() if name != "comparisons"
    ]
    assert last["comparisons"].keys() == {"rfd_random", "rpr_random", "rkid_random"}

    write(tmp_path / "other" / "val", samples(9, seed=2), 4, [])
    for changed in ([run / "checkpoints" / "step-00000001"], [run, f"data.root={tmp_path / 'other'}"]):
        for again in (False, True):
            code, output = command(evaluate, "--run", *changed, "--out", out, *words[2:])
            assert (code, "not measured again" in output) == (0, again)
        assert json.loads(out.read_text())["comparisons"].keys() == {"rfd_random", "rkid_random"}
    assert json.loads((run / "evaluation.json").read_text()) == last


OWN = """
from torch.nn.functional import avg_pool2d, interpolate

class Thumbnails:
    def encode(self, batch, temperature=0.0):
        return [avg_pool2d(batch.x / 255, 4)]

    def decode(self, latents, condition=None, temperature=1.0, draw=False, sample=None):
        return interpolate(latents[0], scale_factor=4)

class Small(Thumbnails):
    def decode(self, latents, *others):
        return latents[0]
"""


def test_codecs_of_others_and_ours_stand_in_one_table(pictures: Path, tmp_path: Path, command: Command) -> None:
    file, folder, out = tmp_path / "own.py", tmp_path / "vq", tmp_path / "out.json"
    file.write_text(OWN)
    saved("VQModel", folder)
    run = untrained(tmp_path / "run", "tiny", pictures)
    words = ["--codec", f"diffusers:{folder}", f"python:{file}:Thumbnails", f"data.root={pictures}", "data.size=16"]
    common = ["--metrics", "rfd", "--features", "random", "--out", out, "data.workers=0"]
    code, output = command(evaluate, *words, "--run", run, *common)
    assert code == 0, output
    rows = [line.strip("|").split("|") for line in output.splitlines() if line[:1] == "|"]
    assert [row[1].strip() for row in rows[2:]] == ["vqvae", "diffusers VQModel", "Thumbnails"]
    assert "Not comparable" not in output
    ours, vq, own = json.loads(out.read_text())
    assert ours["comparisons"]["rfd_random"]["features"] == vq["comparisons"]["rfd_random"]["features"]
    assert 0 < vq["usage"] <= 1
    assert vq["latents"] == "8 × 8, K = 16"
    assert "usage_ever" not in vq
    assert own["psnr"] > vq["psnr"]
    assert own["step"] is None
    assert "parameters" not in own
    assert not (run / "evaluation.json").exists()

    # A network's numbers are kept in the file, those of an object are not: what it computes may have changed.
    code, output = command(evaluate, *words, *common)
    assert (code, output.count("not measured again")) == (0, 1)
    code, output = command(evaluate, *words[:2], *words[3:])
    assert (code, output.splitlines()[0].startswith(f"diffusers:{folder}, 11 images of")) == (0, True)
    assert not (folder / "evaluation.json").exists()


def test_codecs_are_measured_on_the_data_of_the_first_run(pictures: Path, tmp_path: Path, command: Command) -> None:
    file, out = page_file(tmp_path / "lowest.py"), tmp_path / "out.json"
    saved("AutoencoderKL", tmp_path / "kl")
    run = untrained(tmp_path / "run", "tiny", pictures, "data.size=24")
    words = ["--codec", f"diffusers:{tmp_path / 'kl'}", f"python:{file}:LowestFrequencies", "--out", out]
    code, output = command(evaluate, *words, "--run", run, "data.workers=0")
    assert code == 0, output
    with_run = json.loads(out.read_text())
    assert [one["size"] for one in with_run] == [24, 24, 24]
    assert [one["latents"] for one in with_run[1:]] == ["4 × 12 × 12", "30 × 3 × 3"]
    code, output = command(evaluate, *words, f"data.root={pictures}", "data.size=24", "data.workers=0")
    assert code == 0, output
    assert json.loads(out.read_text()) == with_run[1:]


def test_codecs_that_cannot_be_measured_are_one_sentence(pictures: Path, tmp_path: Path, command: Command) -> None:
    file = tmp_path / "own.py"
    file.write_text(OWN)
    given = ["--codec", f"python:{file}:Small", f"data.root={pictures}", "data.workers=0"]
    cases = {
        (*given, "data.size=16"): "returns images of 3 × 4 × 4 instead of 3 × 16 × 16: give another data.size",
        (*given,): "error: --codec without --run needs data.root=… and data.size=…",
        ("--iw", "2"): "give --run RUN or --codec KIND:PATH",
        ("--codec", "x", f"data.root={pictures}", "data.size=16"): "--codec x is neither diffusers:FOLDER nor python:",
    }
    for words, said in cases.items():
        code, output = command(evaluate, *words)
        assert (code, said in output, output.count("\n")) == (2, True, 1), output


def test_generated_images_are_compared_with_a_reference(pictures: Path, tmp_path: Path, command: Command) -> None:
    """By default with the validation images, whose statistics in a file give the same number."""
    run, file = untrained(tmp_path, "tiny_vae", pictures), tmp_path / "val.safetensors"
    size = ["--size", 16, "--channels", 1, "--workers", 0, "--features", "random", "--out"]
    code, output = command(evaluate, "statistics", pictures, *size, file)
    assert (code, output) == (0, f"{file}: 11 images of {pictures / 'val'}, FD (random)\n")
    words = ["--run", run, "--metrics", "gfd", "gkid", "gis", "gpr", "--features", "random", "--count", 20]
    assert command(evaluate, *words)[0] == 0
    first = json.loads((run / "evaluation.json").read_text())
    assert first["gis_random"] >= 1
    assert first["comparisons"]["gpr_random"]["count"] == 20
    out = ["--out", tmp_path / "out.json"]
    code, output = command(evaluate, *words, "--reference", file, *out)
    assert (code, "against val.safetensors, xxh3 " in output) == (0, True)
    again = json.loads(out[1].read_text())
    for name in ("gfd_random", "gkid_random", "gis_random", "gcoverage_random"):
        assert again[name] == pytest.approx(first[name], rel=1e-9)
    code, output = command(evaluate, *words[:-1], 19)
    assert (code, "--count 19, because it has gfd_random of --count 20: give --out DIR" in output) == (2, True)
    code, output = command(evaluate, *words, "--reference", file)
    assert (code, "because it has gfd_random of --reference the validation images: give" in output) == (2, True)
    assert json.loads((run / "evaluation.json").read_text()) == first
    assert command(evaluate, *words, "--labels", "data", *out)[0] == 0
    drawn = json.loads(out[1].read_text())["comparisons"]["gfd_random"]
    assert drawn["training"] == index.Index(pictures / "train").fingerprint()

    training = tmp_path / "train.safetensors"
    assert command(evaluate, "statistics", pictures, *size, training, "--split", "train")[0] == 0
    assert command(evaluate, *words, "--reference", training, "--seed", 1, *out)[0] == 0
    other = json.loads(out[1].read_text())
    assert other["gfd_random"] != first["gfd_random"]
    assert "(90 images of" in other["comparisons"]["gfd_random"]["reference"]
    code, output = command(evaluate, *words, "--reference", tmp_path / "none")
    assert (code, "none cannot be read" in output) == (2, True)
    code, output = command(evaluate, "statistics", tmp_path / "none", *size, training)
    assert (code, output.count("\n")) == (2, 1)


def test_the_nearest_training_images_are_drawn(
    pictures: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nearest, "QUERIES", 20)
    widths = []
    for name, words in (("tiny_vae", "is a generated image in "), ("tiny", "has no prior to generate")):
        run, file = untrained(tmp_path / name, name, pictures), tmp_path / f"{name}.png"
        code, output = command(evaluate, "--run", run, "--nearest", file, "--features", "random", "data.workers=0")
        assert (code, words in output) == (0, True), output
        found = json.loads((run / "evaluation.json").read_text())["nearest"]
        assert found["features"]["words"] == "FD (random)"
        assert ("nearer" in found) == (name == "tiny_vae")
        with Image.open(file) as picture:
            widths.append(picture.width)
    assert widths[0] > 1.5 * widths[1]
    assert 0 <= json.loads((tmp_path / "tiny_vae" / "evaluation.json").read_text())["nearest"]["nearer"] <= 1
    assert command(evaluate, "--run", run, "data.workers=0")[0] == 0
    assert json.loads((run / "evaluation.json").read_text())["nearest"] == found  # a quick evaluation keeps it
    monkeypatch.setattr(candidate, "training_fingerprint", lambda data: "other")
    assert command(evaluate, "--run", run, "data.workers=0")[0] == 0
    assert "nearest" not in json.loads((run / "evaluation.json").read_text())
    code, output = command(evaluate, "--run", run, run, "--nearest", file)
    assert (code, "--nearest draws the images of one model" in output) == (2, True)


def test_numbers_are_written_before_the_nearest_images_are_drawn(
    pictures: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What can be known to be missing is refused before; what fails later loses no numbers."""
    run = untrained(tmp_path, "tiny", pictures)
    words = ["--run", run, "--nearest", tmp_path / "x.png", "data.workers=0", "--features"]
    code, output = command(evaluate, *words, "vgg")
    assert (code, "--features vgg is not one of" in output, output.count("\n")) == (2, True, 1)
    write(tmp_path / "other" / "val", samples(5, seed=2), 4, [])
    out = tmp_path / "out.json"
    code, output = command(evaluate, *words, "random", f"data.root={tmp_path / 'other'}", "--out", out)
    assert (code, str(tmp_path / "other" / "train") in output, output.count("\n")) == (2, True, 1)
    assert not (run / "evaluation.json").exists()
    assert not out.exists()

    def fails(*_: object) -> None:
        raise DataError("damaged")

    monkeypatch.setattr(nearest, "of", fails)
    code, output = command(evaluate, *words, "random")
    assert (code, "error: damaged" in output, "PSNR (dB)" in output) == (2, True, True)
    assert json.loads((run / "evaluation.json").read_text())["psnr"] > 0


def test_a_file_of_several_runs_keeps_the_comparisons_of_each(pictures: Path, tmp_path: Path, command: Command) -> None:
    """Until the settings change."""
    runs = [untrained(tmp_path / name, "tiny_vae", pictures) for name in ("a", "b")]
    out = tmp_path / "out.json"
    words = ["--run", *runs, "--metrics", "rfd", "--features", "random", "--out", out, "data.workers=0"]
    for again in (0, 2):
        code, output = command(evaluate, *words)
        assert (code, output.count("not measured again")) == (0, again), output
    assert len(json.loads(out.read_text())) == 2
    code, output = command(evaluate, *words, "model.free_bits=0.5")
    assert (code, output.count("not measured again")) == (0, 0), output
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


def test_the_results_of_each_run_go_into_a_folder_of_its_own(pictures: Path, tmp_path: Path, command: Command) -> None:
    runs = [untrained(tmp_path / name, "tiny_vae", pictures) for name in ("a", "b")]
    out = tmp_path / "out"
    own = ["--metrics", "psnr", "rfd", "--features", "random", "--out"]
    assert command(evaluate, "--run", runs[0], *own, out / "one")[0] == 0
    assert {path.name for path in (out / "one").iterdir()} == {"evaluation.json", "reconstructions.png"}
    assert command(evaluate, "--run", *runs, *own, out / "all")[0] == 0
    records = [path / "evaluation.json" for path in sorted((out / "all").iterdir())]
    assert [json.loads(record.read_text())["run"] for record in records] == list(map(str, runs))
    assert all(record.with_name("reconstructions.png").exists() for record in records)
    code, output = command(evaluate, "--run", *runs, *own, out / "all")
    assert (code, output.count("not measured again")) == (0, 2)
    assert not any((run / "evaluation.json").exists() for run in runs)
    for words in ([runs[0], "--out", runs[1]], [*runs, "--out", tmp_path]):
        code, output = command(evaluate, "--run", *words)
        assert (code, "would replace the evaluation.json of the run" in output) == (2, True)


def test_a_model_without_a_prior_generates_nothing(pictures: Path, tmp_path: Path, command: Command) -> None:
    run = untrained(tmp_path, "tiny", pictures)
    code, output = command(evaluate, "--run", run, "--metrics", "gfd", "--features", "random")
    assert (code, "error: no images can be generated: " in output) == (2, True)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["gfd", "--count", "0"], "--count 0 must be at least 1"),
        (["gfd", "--seed", "-1"], "--seed -1 must be at least 0"),
        (["gfd", "--temperature", "nan"], "--temperature nan must be a number"),
        (["fid", "--features", "random"], "--metrics fid is not one of rfd, rkid, rpr, "),
        (["fd-dinov2", "--features", "random"], "dinov2.safetensors does not exist: fetch dinov2_vitl14_pretrain.pth"),
        (["lpips"], "lpips_vgg.safetensors does not exist: fetch vgg16-397923af.pth"),
        (["lpips", "--perceptual", "x"], "--metrics lpips and --perceptual measure one distance"),
        (["rfd", "--features", "vgg"], "--features vgg is not one of "),
    ],
)
def test_comparisons_that_cannot_be_measured_are_one_sentence(
    pictures: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch, words: list[str], said: str
) -> None:
    monkeypatch.setenv("VAESCALE_WEIGHTS", str(tmp_path))
    run = untrained(tmp_path, "tiny_vae", pictures)
    code, output = command(evaluate, "--run", run, "--metrics", *words)
    assert code == 2
    assert said in output
    assert output.count("\n") == 1
    assert not (run / "evaluation.json").exists()


def test_the_reconstructions_of_several_runs_are_drawn_beside_one_another(
    pictures: Path, tmp_path: Path, command: Command
) -> None:
    """Each run adds a row of the same height. Runs that show other images, and a file of another kind, are refused."""
    runs = [untrained(tmp_path / name, "tiny", pictures) for name in ("a", "b")]
    heights = []
    for count in (1, 2):
        out = tmp_path / f"{count}.png"
        assert command(evaluate, "--run", *runs[:count], "--picture", out)[0] == 0
        with Image.open(out) as picture:
            heights.append(picture.height)
    assert 16 < heights[1] - heights[0] < heights[0]
    grey = untrained(tmp_path / "grey", "tiny_vae", pictures)
    code, output = command(evaluate, "--run", runs[0], grey, "--picture", out)
    assert (code, f"{grey} shows other images than {runs[0]}" in output) == (2, True)
    code, output = command(evaluate, "--run", runs[0], "--picture", tmp_path / "a.txt")
    assert (code, "a.txt cannot be written" in output) == (2, True)


def test_a_checkpoint_is_sampled_into_a_folder_of_its_own(pictures: Path, tmp_path: Path, command: Command) -> None:
    run, out = untrained(tmp_path / "run", "tiny_vae", pictures), tmp_path / "out"
    older = run / "checkpoints" / "step-00000001"
    code, output = command(sample, "--run", older, "generate")
    assert (code, "give --out FOLDER for its images" in output) == (2, True)
    assert command(sample, "--run", older, "generate", "--count", 7, "--out", out)[0] == 0
    assert command(sample, "--run", run, "generate", "--count", 7)[0] == 0
    assert (out / "sample_generate.png").read_bytes() != (run / "sample_generate.png").read_bytes()
    assert not list(older.glob("*.png"))
