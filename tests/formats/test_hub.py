"""Folders for the Hugging Face Hub: what is in them, who reads them, and what is refused."""

import base64
import json
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from safetensors import safe_open

import vaescale
from launch import evaluate, export
from tests.conftest import Command
from tests.formats.test_export import VQ, make_run
from tests.test_library import untrained
from vaescale import settings, trained
from vaescale.config import FILE, ConfigError
from vaescale.formats import hub
from vaescale.hub import CONFIG
from vaescale.lifecycle import checkpoint
from vaescale.lifecycle.checkpoint import CheckpointError
from vaescale.matching import check_encoder
from vaescale.nn.frozen import latents_hash
from vaescale.training import resume

X = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)
FILES = ["README.md", "config.json", "manifest.json", "model.safetensors", "state.json"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> dict[str, Path]:
    found = {}
    for name in ("tiny", "tiny_vae", "tiny_prior", "tiny_diffusion"):
        base = [f"model.tokenizer={found['tiny']}"] if name == "tiny_prior" else []
        found[name] = untrained(tmp_path_factory.mktemp("runs") / name, name, pictures, *base)
    return found


@pytest.mark.parametrize("name", ["tiny", "tiny_vae", "tiny_prior", "tiny_diffusion"])
def test_the_folder_is_the_run(runs: dict[str, Path], tmp_path: Path, command: Command, name: str) -> None:
    """Wherever it lies; it names no other place, and a prior brings its tokenizer along."""
    first, out = tmp_path / "first", tmp_path / "out"
    code, output = command(export, "hub", runs[name], first)
    assert code == 0, output
    first.rename(out)
    tokenizer = [f"tokenizer/{file}" for file in FILES[1:]] if name == "tiny_prior" else []
    files = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    assert files == sorted([*FILES, *tokenizer])
    assert checkpoint.verify(out) == []
    for file in files:
        assert str(tmp_path.parent).encode() not in (out / file).read_bytes(), file
        assert str(runs[name].parent).encode() not in (out / file).read_bytes(), file
    ours, theirs = vaescale.load(runs[name]), vaescale.load(out)
    assert theirs.step == 2
    assert all(torch.equal(a, b) for a, b in zip(ours.encode(X), theirs.encode(X), strict=True))
    assert np.array_equal(ours.decode(ours.encode(X)), theirs.decode(theirs.encode(X)))
    if name != "tiny":
        assert np.array_equal(ours.sample(3, label=[0, 1, 2], seed=1), theirs.sample(3, label=[0, 1, 2], seed=1))
    code, output = command(export, "hub", out, first)  # again, from the folder
    assert code == 0, output
    with safe_open(first / "model.safetensors", "pt") as file:
        about = file.metadata()
    assert (about["library"], about["step"], about["data"]) == ("vaescale", "2", "0123456789abcdef")


def test_a_decoder_trained_alone_keeps_its_latents(
    runs: dict[str, Path], pictures: Path, tmp_path: Path, command: Command
) -> None:
    """So a prior over them loads with it, from a folder, too."""
    given, latents = [f"init_from={runs['tiny']}", "train=decoder"], "0123456789abcdef"
    decoder = untrained(tmp_path / "decoder", "tiny", pictures, *given, latents=latents)
    prior = untrained(tmp_path / "prior", "tiny_prior", pictures, f"model.tokenizer={decoder}")
    for run in (decoder, prior):
        out = tmp_path / f"{run.name}-hub"
        code, output = command(export, "hub", run, out)
        assert code == 0, output
        assert vaescale.load(out).step == 2
        for file in out.rglob("*.json"):
            assert str(tmp_path) not in file.read_text(), file
    for folder in (tmp_path / "decoder-hub", tmp_path / "prior-hub" / "tokenizer"):
        model, _ = trained.read_model(folder, trained.read_config(folder, []), torch.device("cpu"))
        assert latents_hash(model) == latents
    config = settings.load(decoder / FILE, [f"init_from={tmp_path}/decoder-hub"])
    check_encoder(config, trained.read_config(tmp_path / "decoder-hub", []), decoder)


def test_its_evaluation_is_that_of_the_run(runs: dict[str, Path], tmp_path: Path, command: Command) -> None:
    """The card has it in the form that the Hub reads, with the protocol. Measuring the folder gives the same."""
    given = ["data.workers=0", "--metrics", "rfd", "rkid", "--features", "random"]
    code, output = command(evaluate, "--run", runs["tiny_vae"], *given)
    assert code == 0, output
    record = json.loads((runs["tiny_vae"] / "evaluation.json").read_text())
    out = tmp_path / "out"
    assert command(export, "hub", runs["tiny_vae"], out, "--license", "apache-2.0")[0] == 0
    card = huggingface_hub.ModelCard.load(out / "README.md")
    assert card.data.license == "apache-2.0"
    assert card.data.library_name == "vaescale"
    assert card.data.tags == ["vae", "variational-autoencoder"]
    found = {one.metric_type: one for one in card.data.eval_results}
    assert {"bits_per_dim", "psnr", "ssim", "rfd_random", "rkid_random", "rkid_std_random"} <= found.keys()
    for name, one in found.items():
        assert one.metric_value == record[name]
    assert found["psnr"].metric_args == {"protocol": record["protocol"]["psnr"]}
    for name in ("rfd_random", "rkid_std_random"):
        assert found[name].metric_args == record["comparisons"][name.replace("_std", "")]
    assert found["psnr"].dataset_args["fingerprint"] == record["fingerprint"]
    for words in (record["protocol"]["psnr"], "vaescale.load", "model.sample", "11 images of pictures"):
        assert words in card.content
    with safe_open(out / "model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["evaluation"])["psnr"] == record["psnr"]
    root = trained.read_config(runs["tiny_vae"], []).data.root
    code, output = command(evaluate, "--run", out, f"data.root={root}", "--out", tmp_path / "again.json", *given)
    assert code == 0, output
    again = json.loads((tmp_path / "again.json").read_text())
    assert {**again, "run": "", "data": ""} == {**record, "run": "", "data": ""}


def test_a_card_without_an_evaluation_says_so(runs: dict[str, Path], tmp_path: Path, command: Command) -> None:
    assert command(export, "hub", runs["tiny"], tmp_path / "out")[0] == 0
    card = huggingface_hub.ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.license == "unknown"
    assert card.data.eval_results is None
    assert card.data.tags == ["vqvae", "autoencoder", "image-tokenizer"]
    assert "have not been evaluated" in card.content
    assert "model.sample" not in card.content


def test_a_training_starts_from_it_with_its_critic(tmp_path: Path, command: Command) -> None:
    model = make_run(tmp_path / "run", VQ, critic=True)
    out = tmp_path / "out"
    code, output = command(export, "hub", tmp_path / "run", out)
    assert code == 0, output
    assert "have not been evaluated" in (out / "README.md").read_text()  # evaluation.json lacks the images
    assert (out / "critic.safetensors").exists()
    assert checkpoint.verify(out) == []
    read: dict[str, dict[str, torch.Tensor]] = {}

    class Learner:
        def begin(self, reads: Callable[..., dict[str, torch.Tensor]]) -> None:
            wanted = model.state_dict()
            critic = settings.build_critic(trained.read_config(out, []))
            read.update(
                {name: reads(name, wanted) for name in ("model", "ema")}, critic=reads("critic", critic.state_dict())
            )

    config = settings.load(tmp_path / "run" / FILE, [f"init_from={out}", "run=none"])
    resume.begin(config, Learner())  # type: ignore[arg-type]
    for name in ("model", "ema"):
        assert all(torch.equal(read[name][key], value) for key, value in model.state_dict().items())
    assert len(read["critic"]) > 0


def test_a_changed_tokenizer_or_file_is_refused(runs: dict[str, Path], tmp_path: Path, command: Command) -> None:
    out = tmp_path / "out"
    assert command(export, "hub", runs["tiny_prior"], out)[0] == 0
    (out / "README.md").write_text("Another card.")  # is free to change
    vaescale.load(out)
    assert command(export, "hub", runs["tiny"] / "checkpoints" / "step-00000001", tmp_path / "other")[0] == 0
    (out / "tokenizer").rename(tmp_path / "tokenizer")
    with pytest.raises(ConfigError, match=r"model.tokenizer=.*out/tokenizer is not a run directory"):
        vaescale.load(out)
    (tmp_path / "other").rename(out / "tokenizer")
    with pytest.raises(ConfigError, match=r"the frozen model that .* was started with has changed"):
        vaescale.load(out)
    weights = out / "model.safetensors"
    *content, last = weights.read_bytes()
    weights.write_bytes(bytes([*content, last ^ 1]))
    with pytest.raises(CheckpointError, match=r"model.safetensors has changed"):
        vaescale.load(out)


def test_only_an_earlier_export_is_replaced(runs: dict[str, Path], tmp_path: Path, command: Command) -> None:
    out = tmp_path / "out"
    for _ in range(2):
        assert command(export, "hub", runs["tiny"], out)[0] == 0
    (out / "notes.txt").write_text("mine")
    code, output = command(export, "hub", runs["tiny"], out)
    assert code == 2
    assert "has notes.txt, which is not of an export: give another folder" in output
    code, output = command(export, "hub", tmp_path / "none", tmp_path / "new")
    assert code == 2
    assert "none is not a run directory" in output
    assert not (tmp_path / "new").exists()


def test_a_folder_of_another_library_is_no_run(tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_text('{"_class_name": "VQModel"}')
    with pytest.raises(ConfigError, match=r"is not a run directory: it has no config\.yaml"):
        vaescale.load(tmp_path)


class Hub:
    """The requests of an upload, and the uploaded files, of a server on loopback that speaks the Hub's protocol."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.created: dict[str, object] = {}
        self.refuse = False


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    kept = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            address = f"http://127.0.0.1:{served.server_port}/me/model"
            answer: dict[str, object] = {}
            if self.path == "/api/repos/create":
                kept.created = json.loads(body)
                answer = {"url": address}
            elif self.path.endswith("/preupload/main"):
                paths = [file["path"] for file in json.loads(body)["files"]]
                answer = {"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]}
            elif "/commit/main" in self.path:
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        kept.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                answer = {"commitUrl": f"{address}/commit/1", "commitOid": "1"}
            self.send_response(403 if kept.refuse else 200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        def log_message(self, *arguments: object) -> None:
            pass

    served = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=served.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{served.server_port}")
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    yield kept
    served.shutdown()
    thread.join()
    served.server_close()


def test_the_folder_is_uploaded(runs: dict[str, Path], tmp_path: Path, command: Command, server: Hub) -> None:
    """To a server that stands in for the Hub."""
    out = tmp_path / "out"
    code, output = command(export, "hub", runs["tiny"], out, "--push", "me/model")
    assert code == 0, output
    assert "/me/model" in output
    assert server.created["name"] == "model"
    assert server.files == {file.name: file.read_bytes() for file in out.iterdir()}
    server.refuse = True
    code, output = command(export, "hub", runs["tiny"], out, "--push", "me/model")
    assert code == 2
    assert "out is written, but cannot be uploaded to me/model (403" in output
    code, output = command(export, "hub", runs["tiny"], out, "--push", "not a name")
    assert code == 2
    assert "cannot be uploaded to not a name" in output


def test_without_a_network_the_folder_remains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    with pytest.raises(ConfigError, match=r"is written, but the Hub cannot be reached: run the command again when"):
        hub.push(tmp_path, "me/model")


def test_an_upload_needs_the_package_before_anything_is_written(
    runs: dict[str, Path], tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    code, output = command(export, "hub", runs["tiny"], tmp_path / "out", "--push", "me/model")
    assert code == 2
    assert "error: --push needs huggingface-hub: pip install 'vaescale[hf]'" in output
    assert not (tmp_path / "out").exists()
