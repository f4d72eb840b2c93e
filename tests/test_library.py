"""vaescale.load compared with the validation pipeline, on checkpoints of untrained models."""

import io
import math
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import vaescale
from tests.conftest import ROOT, jpeg
from vaescale import config as mechanics
from vaescale import settings, trained
from vaescale.config import FILE, ConfigError
from vaescale.data import stream
from vaescale.data.shards import Sample, write
from vaescale.evaluation.drawing import from_prior
from vaescale.evaluation.evaluate import evaluate
from vaescale.interfaces import Condition, Sampling
from vaescale.library import Trained
from vaescale.lifecycle import checkpoint
from vaescale.lifecycle.checkpoint import CheckpointError
from vaescale.monitoring.pictures import to_bytes

TINY = ROOT / "tests" / "integration"
NAMES = ("tiny", "tiny_vae", "tiny_hvae")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> dict[str, Path]:
    """The quantised one reads colours, the conditional VAE grey and the HVAE has several levels; each has two
    checkpoints with other weights."""
    return {name: untrained(tmp_path_factory.mktemp(name), name, pictures) for name in NAMES}


def untrained(run: Path, name: str, pictures: Path, *overrides: str, latents: str | None = None) -> Path:
    """A run directory with checkpoints of steps 1 and 2. latents: of a decoder that was trained alone, the hash."""
    run.mkdir(exist_ok=True)
    config = settings.load(TINY / f"{name}.yaml", [f"run={run}", f"data.root={pictures}", *overrides])
    (run / FILE).write_text(mechanics.to_yaml(config))
    for step in (1, 2):
        torch.manual_seed(step)
        model = settings.build(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        order = {"data": "0123456789abcdef", "codec": trained.read_base(model, config)}
        state = {"step": step, "version": 2, "order": {key: value for key, value in order.items() if value}}
        state |= {"latents": latents} if latents else {}
        checkpoint.save(run / "checkpoints", step, {"ema": model.state_dict()}, state, keep=2)
    return run


@pytest.fixture(params=NAMES)
def model(request: pytest.FixtureRequest, runs: dict[str, Path]) -> Trained:
    return vaescale.load(runs[request.param])


def stored(root: Path) -> list[bytes]:
    """Returns the validation images, as stored in the shards."""
    data = stream.Samples(root / "val")
    return [data.read(number)[0] for number in range(len(data.index))]


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(one, other) for one, other in zip(a, b, strict=True))


def test_pictures_become_what_validation_images_are(model: Trained, pictures: Path, tmp_path: Path) -> None:
    """Paths, PIL images, arrays and tensors give the same latents and reconstructions; 40 × 36 pixels become 16."""
    batch = stream.ValidationSlices(model.config.data)[range(11)].batch
    wanted = model.codec.encode(batch)
    assert len(wanted[0].flatten(1).unique(dim=0)) > 5  # they tell pictures apart
    label = batch.label if getattr(model.config.model, "classes", 0) else None
    paths = [tmp_path / f"{number}.jpg" for number in range(11)]
    for path, data in zip(paths, stored(pictures), strict=True):
        path.write_bytes(data)
    opened = [Image.open(path) for path in paths]
    decoded = np.stack([np.asarray(Image.open(path)) for path in paths])
    tensors = torch.from_numpy(decoded).permute(0, 3, 1, 2)
    mixture = [*paths[:3], opened[3], *decoded[4:7], tensors[7], tensors[8:]]
    for given in (paths, opened, decoded, list(decoded), tensors, tensors / 255, decoded / 255):
        assert equal(model.encode(given, label), wanted)
    assert equal(model.encode(mixture, label), wanted)
    one = None if label is None else int(label[0])
    assert equal(model.encode(opened[0], one), model.encode(paths[:1], one))
    y = model.decode(wanted, label)
    assert y.dtype == np.uint8
    assert y.shape == (11, 16, 16, model.config.data.channels)
    expected = to_bytes(model.codec.decode(wanted, batch.condition))
    assert np.array_equal(y, expected.permute(0, 2, 3, 1).numpy())


def test_a_large_jpeg_by_its_path_and_opened(runs: dict[str, Path], tmp_path: Path) -> None:
    """A path is decoded at a reduced size, as in the pipeline. EXIF turns images, transparency becomes white."""
    model = vaescale.load(runs["tiny"])
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = Image.open(io.BytesIO(jpeg(3, 160, 120)))
    turned.save(tmp_path / "a.jpg", exif=exif)
    large = Image.open(tmp_path / "a.jpg")
    png = Image.new("RGBA", (20, 30), (255, 0, 0, 128))
    png.save(tmp_path / "b.png")
    paths = [tmp_path / "a.jpg", tmp_path / "b.png"]
    write(tmp_path / "val", [Sample(path.stem, path.read_bytes(), 0, path.suffix[1:]) for path in paths], 2, [])
    config = stream.Config(root=str(tmp_path), size=16, workers=0)
    batch = stream.ValidationSlices(config)[range(2)].batch
    assert equal(model.encode(paths), model.codec.encode(batch))
    (squares,) = [list(model._squares([large, png, np.asarray(png)]))]
    np.testing.assert_array_equal(squares[1], batch.x[1].permute(1, 2, 0))
    np.testing.assert_array_equal(squares[2], squares[1])
    assert np.abs(squares[0].astype(int) - batch.x[0].permute(1, 2, 0).numpy()).max() <= 4
    assert large.size == (160, 120)  # as the caller has opened it


def test_shapes_and_types(runs: dict[str, Path]) -> None:
    model = vaescale.load(runs["tiny_vae"])
    x = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)
    wanted = model.encode(x)
    colours_first = np.ascontiguousarray(x.transpose(0, 3, 1, 2))
    for same in (
        colours_first,
        torch.from_numpy(x),
        torch.from_numpy(colours_first).double() / 255,
        x.astype(np.float16) / 255,
    ):
        assert equal(model.encode(same), wanted)
    half = (torch.from_numpy(x) / 255).to(torch.bfloat16)  # 8 bits of mantissa: pixels up to a grey level off
    assert model.encode(half)[0] == pytest.approx(wanted[0], abs=0.1)
    grey = np.array(Image.fromarray(x[0]).convert("L"))
    for same in (grey, grey[None], grey[..., None], torch.from_numpy(grey)[None], Image.fromarray(grey), grey / 255):
        assert equal(model.encode(same), model.encode(np.repeat(grey[..., None], 3, -1)))
    last = np.zeros((3, 5, 3), np.uint8)
    last[..., 0] = 255  # red in an array; in a tensor, a picture 5 × 3 whose left column is white
    assert not equal(model.encode(last), model.encode(torch.from_numpy(last)))
    assert equal(model.encode(torch.from_numpy(last)), model.encode(last.transpose(1, 2, 0)))


REFUSED: dict[str, tuple[Any, str]] = {
    "0 to 255": (np.full((8, 8, 3), 255.0), r"floats must be in \[0, 1\]: found 255 to 255"),
    "-1 to 1": (torch.linspace(-1, 1, 192).view(3, 8, 8), r"floats must be in \[0, 1\]: found -1 to 1"),
    "NaN": (np.full((8, 8, 3), np.nan), r"floats must be in \[0, 1\]: found nan"),
    "int64": (torch.zeros(3, 8, 8).long(), r"must be uint8, or floats in \[0, 1\], not int64"),
    "uint16": (np.zeros((8, 8), np.uint16), "not uint16"),
    "bool": (np.zeros((8, 8), bool), "not bool"),
    "complex": (np.zeros((8, 8), complex), "not complex128"),
    "channels": (np.zeros((8, 8, 5), np.uint8), r"pixels of shape \(8, 8, 5\): give"),
    "a row": (np.zeros(8, np.uint8), r"pixels of shape \(8,\): give"),
    "no width": (np.zeros((8, 0, 3), np.uint8), r"pixels of shape \(8, 0, 3\): give"),
    "none": ([], "there are no images to encode"),
    "16 bits": (Image.new("I;16", (8, 8)), "a PIL image of mode I;16 does not have 8 bits a channel"),
    "a number": (3, "an image must be a PIL image, a path, a numpy array or a tensor, not int"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_inputs_that_are_no_image_are_refused_in_a_sentence(runs: dict[str, Path], name: str) -> None:
    given, words = REFUSED[name]
    with pytest.raises(ValueError, match=words):
        vaescale.load(runs["tiny"]).encode(given)


def test_labels_and_latents_are_checked(runs: dict[str, Path]) -> None:
    quantised, vae = vaescale.load(runs["tiny"]), vaescale.load(runs["tiny_vae"])
    x = np.zeros((2, 16, 16, 3), np.uint8)
    codes, z = quantised.encode(x), vae.encode(x)
    for call, words in {
        lambda: quantised.encode(x, label=1): "takes no label",
        lambda: vae.encode(x, label=7): "labels are whole numbers from 0 to 6, or -1 for none: found 7",
        lambda: vae.encode(x, label=[0, 1, 2]): r"2 images need one label or 2",
        lambda: vae.encode(x, label=[0.5, 1.0]): "labels are whole numbers",
        lambda: vae.encode(x, attributes=[0.5]): "takes no attributes",
        lambda: quantised.decode(z): r"latents of this model are whole numbers \[B, 4, 4\], coarse to fine; found",
        lambda: quantised.decode([]): "the latents of this model are",
        lambda: quantised.decode([codes[0].float()]): "whole numbers",
        lambda: quantised.decode([codes[0] + 24]): "codes are from 0 to 23: found",
        lambda: quantised.sample(2): "has no prior of its own",
        lambda: vae.sample(0): "at least 1",
        lambda: vae.sample(1, guidance=2): "guidance, top_k, .* are for priors over codes, .*, not for .* kind vae",
        lambda: vae.sample(1, temperature=-1.0): "temperature=-1.0 must be a number, 0 or more",
        lambda: vae.sample(1, top_p=0.0): "top_p=0.0 must be above 0",
        lambda: vae.sample(1, positions="centre"): "positions=centre must be one of confidence, halton",
        lambda: vae.codes(x): "a model of kind vae has no codes",
        lambda: vae.bits(x, draws=0): "draws must be at least 1, not 0",
        lambda: quantised.bits(x): "bits/dim of a tokenizer need its error, which is measured when its training ends",
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=words):
            call()
    assert not np.array_equal(vae.decode(z, label=[0, 1]), vae.decode(z, label=[1, 0]))
    assert np.array_equal(vae.decode(z[0], label=1), vae.decode([z[0].numpy()], label=torch.tensor([1, 1])))


def test_samples_are_those_of_the_prior(runs: dict[str, Path]) -> None:
    model = vaescale.load(runs["tiny_vae"])
    images = model.sample(5, label=[0, 1, 2, 3, -1], seed=3, temperature=0.5)
    condition = Condition(torch.tensor([0, 1, 2, 3, -1]), torch.zeros(5, 0))
    wanted = from_prior(model.codec, condition, 3, 0.5)
    assert np.array_equal(images, wanted.permute(0, 2, 3, 1).numpy())
    levels = vaescale.load(runs["tiny_hvae"])
    coarse = levels.encode(np.zeros((2, 16, 16, 3), np.uint8))[:1]
    assert levels.decode(coarse).shape == (2, 16, 16, levels.config.data.channels)


def test_samples_of_a_prior_over_codes(runs: dict[str, Path], pictures: Path, tmp_path: Path) -> None:
    """Guidance and the other ways to draw are those of the command line; a prior has the codes of its tokenizer."""
    model = vaescale.load(untrained(tmp_path / "prior", "tiny_prior", pictures, f"model.tokenizer={runs['tiny']}"))
    guided = model.sample(3, label=[0, 1, 2], seed=5, guidance=3, top_k=7)
    condition = Condition(torch.tensor([0, 1, 2]), torch.zeros(3, 0))
    wanted = from_prior(trained.codec_of(model.model, Sampling(guidance=3, top_k=7)), condition, 5)
    assert np.array_equal(guided, wanted.permute(0, 2, 3, 1).numpy())
    assert not np.array_equal(guided, model.sample(3, label=[0, 1, 2], seed=5, top_k=7))
    x = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)
    assert torch.equal(model.codes(x), vaescale.load(runs["tiny"]).codes(x))
    with pytest.raises(ValueError, match="bits/dim of a tokenizer need its error"):
        model.bits(x)


def test_codes_are_those_that_exports_hold(runs: dict[str, Path]) -> None:
    model = vaescale.load(runs["tiny"])
    x = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)
    codes = model.codes(x)
    assert codes.dtype == torch.int64
    assert codes.shape == (3, 1, 4, 4)
    assert np.array_equal(model.decode(codes.unbind(1)), model.decode(model.encode(x)))


@pytest.mark.parametrize("draws", [1, 3])
def test_bits_are_those_of_evaluation(model: Trained, pictures: Path, tmp_path: Path, draws: int) -> None:
    """The mean over the validation images. Of a tokenizer they are those with the uniform prior, without draws."""
    model = vaescale.load(trained.run_of(Path(model.config.run)))
    quantised = model.config.model.kind == "vqvae"
    if quantised:
        model.model.error_std.fill_(0.2)
    codec, slices = trained.measured_codec(model.model, model.config), stream.ValidationSlices(model.config.data)
    found = evaluate(codec, slices, model.device, micro=4, draws=1 if quantised else draws)
    paths = [tmp_path / f"{number}.jpg" for number in range(11)]
    for path, data in zip(paths, stored(pictures), strict=True):
        path.write_bytes(data)
    batch = slices[range(11)].batch
    label = batch.label if getattr(model.config.model, "classes", 0) else None
    bits = model.bits(paths, label, draws=draws)
    assert bits.dtype == np.float64
    assert bits.shape == (11,)
    assert bits.mean() == pytest.approx(found["bits_per_dim" if quantised or draws == 1 else "bits_per_dim_iw"])
    some = model.bits(paths[:2], None if label is None else label[:2], draws=draws)
    assert some == pytest.approx(bits[:2])  # whatever is measured together


def test_bits_of_a_tokenizer_by_hand(runs: dict[str, Path]) -> None:
    """log2 K bits a code, and the probability of a pixel's bin under a Gaussian, in float64."""
    model = vaescale.load(runs["tiny"])
    model.model.error_std.fill_(0.2)
    x = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
    pixels = torch.from_numpy(x).permute(0, 3, 1, 2).double()
    with torch.no_grad():
        mean = model.codec.decode(model.encode(x)).double()
    low = torch.where(pixels == 0, -torch.inf, ((pixels - 0.5) / 255 - mean) / 0.2)
    high = torch.where(pixels == 255, torch.inf, ((pixels + 0.5) / 255 - mean) / 0.2)
    share = torch.special.ndtr(high) - torch.special.ndtr(low)
    wanted = (16 * math.log2(24) - share.log2().sum((1, 2, 3))) / 768
    assert model.bits(x) == pytest.approx(wanted.numpy(), rel=1e-5)


def test_a_run_and_its_checkpoints(runs: dict[str, Path]) -> None:
    run = runs["tiny"]
    newest, first = vaescale.load(str(run)), vaescale.load(run / "checkpoints" / "step-00000001", "cpu")
    assert (newest.step, first.step) == (2, 1)
    x = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), np.uint8)
    assert not np.array_equal(newest.decode(newest.encode(x)), first.decode(first.encode(x)))
    with pytest.raises(ConfigError, match=r"step-00000003 is not a checkpoint: .* has step-00000001, step-00000002"):
        vaescale.load(run / "checkpoints" / "step-00000003")
    with pytest.raises(ConfigError, match="checkpoints is not a run directory"):
        vaescale.load(run / "checkpoints")
    with pytest.raises(ConfigError, match="none is not a run directory"):
        vaescale.load(run / "none")


def test_a_damaged_checkpoint_is_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    copy = tmp_path / "run"
    (copy / "checkpoints").mkdir(parents=True)
    (copy / FILE).write_bytes((runs["tiny"] / FILE).read_bytes())
    step = copy / "checkpoints" / "step-00000001"
    step.mkdir()
    for file in (runs["tiny"] / "checkpoints" / step.name).iterdir():
        (step / file.name).write_bytes(file.read_bytes()[: -1 if file.suffix == ".safetensors" else None])
    with pytest.raises(CheckpointError, match=r"ema.safetensors has \d+ bytes instead of"):
        vaescale.load(step)


def test_the_lines_of_the_front_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On an untrained run of the quickstart, with the error measured as at the end of a training."""
    section = (ROOT / "README.md").read_text().partition("## Python\n")[2].partition("\n## ")[0]
    lines = textwrap.dedent(section).strip().splitlines()
    assert len(lines) == 5
    run = tmp_path / "runs" / "quickstart"
    run.mkdir(parents=True)
    config = settings.load(ROOT / "configs" / "quickstart.yaml", [f"run={run}"])
    (run / FILE).write_text(mechanics.to_yaml(config))
    weights = settings.build(config).state_dict()
    weights["error_std"].fill_(0.1)
    checkpoint.save(run / "checkpoints", 1, {"ema": weights}, {"step": 1, "version": 2}, keep=1)
    (tmp_path / "picture.jpg").write_bytes(jpeg(0, 200, 150))
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec("\n".join(lines), names)
    (latents,) = names["latents"]
    assert (latents.dtype, latents.shape) == (torch.int64, (1, 32, 32))
    assert (names["images"].dtype, names["images"].shape) == (np.uint8, (1, 128, 128, 3))
    assert torch.equal(names["codes"], latents[:, None])
    assert names["bits"].shape == (1,)
    assert 0 < names["bits"][0] < 20


ALONE = """
import sys
import vaescale
model = vaescale.load(sys.argv[1])
import numpy as np, psutil, torch
images = np.zeros((2, 16, 16, 3), np.uint8)
assert model.decode(model.encode(images)).shape == (2, 16, 16, 3)
assert "deepspeed" not in sys.modules
assert not torch.distributed.is_initialized()
assert not psutil.Process().net_connections()
"""


def test_loading_starts_nothing(runs: dict[str, Path]) -> None:
    """No DeepSpeed, no process group and no socket, hence no port, in a fresh process; nor Dynamo before a model is
    used, whose import takes seconds."""
    subprocess.run([sys.executable, "-c", ALONE, str(runs["tiny"])], cwd=ROOT, check=True)
    code = "import sys, vaescale; vaescale.load(sys.argv[1]); assert 'torch._dynamo' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, str(runs["tiny"])], cwd=ROOT, check=True)


def test_the_package_is_imported_at_once() -> None:
    """Without torch, because `import vaescale` is also the first line of every command."""
    code = "import sys, vaescale; assert callable(vaescale.load); assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
