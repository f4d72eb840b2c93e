"""The commands that a user types, run as processes."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import Start, finish, free_port, ranks, samples
from tests.data.server import Faults, serve
from tests.integration.conftest import Case, losses, overrides
from tests.integration.test_resume import TRAIN, same_bits
from vaescale.data import shards
from vaescale.data.shards import write
from vaescale.data.tar import Fields

QUICKSTART = ["launch/train.py", "--config", "configs/quickstart.yaml"]
BIN = Path(sys.executable).parent


@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun", "srun"])
def test_every_launcher_trains_the_same_bits(
    trained: Path, pictures: Path, tmp_path: Path, start: Start, launcher: str
) -> None:
    command = [*TRAIN, *overrides(Case(2), tmp_path, pictures)]
    port = str(free_port())
    if launcher == "deepspeed":
        processes = [start([str(BIN / "deepspeed"), "--num_accelerators", "2", "--master_port", port, *command])]
    elif launcher == "torchrun":
        processes = [start([str(BIN / "torchrun"), "--nproc-per-node", "2", "--master-port", port, *command])]
    else:
        processes = ranks(start, 2, command, slurm=True)
    for process in processes:
        code, output = finish(process)
        assert code == 0, output
    same_bits(tmp_path, trained / Case(2).name / "run")


def test_a_typo_stops_the_launcher_with_2_and_a_suggestion(start: Start) -> None:
    port = str(free_port())
    command = [str(BIN / "deepspeed"), "--master_port", port, *QUICKSTART, "--model.codebook_size", "5"]
    code, output = finish(start(command))
    assert code == 2
    assert "error: --model.codebook_size is not an option: write model.quantizer.codebook_size=5\n" in output
    assert "Traceback" not in output


RECORDS = """
import os, runpy, sys
from vaescale import distributed
init = distributed.init
def shown(*given):
    device = init(*given)
    print("records:", os.environ.get("TORCH_FR_DUMP_TEMP_FILE"), flush=True)
    return device
distributed.init = shown
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_shape_that_does_not_fit_is_found_by_rank_0_and_stops_all(tmp_path: Path, start: Start) -> None:
    """When the ranks have met; NCCL's records are set up before."""
    given = [f"run={tmp_path / 'run'}", "data.root=none", "data.size=130"]
    found = [finish(rank) for rank in ranks(start, 2, ["-c", RECORDS, *QUICKSTART, *given])]
    assert [code for code, _ in found] == [2, 2]
    assert all(f"records: {tmp_path}/run/stacks/nccl-rank-\n" in output for _, output in found)
    assert "error: rank 0: data.size=130 does not fit the model, which would decode 128 px" in found[0][1]
    assert "fit the model" not in found[1][1]


def test_missing_data_are_one_sentence_that_tells_how(tmp_path: Path, start: Start) -> None:
    root = tmp_path / "data"  # next to nothing that could be meant
    root.mkdir()
    code, output = finish(start([sys.executable, *QUICKSTART, f"run={tmp_path / 'run'}", f"data.root={root}"]))
    assert code == 2
    assert f"error: there are no shards in {root}/train: run `python launch/shards.py prepare FOLDER" in output
    assert "Traceback" not in output
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert left == {".lock", "run_status.json"}  # the status is for run.py and schedulers


def test_a_dry_run_trains_nothing(tmp_path: Path, start: Start) -> None:
    code, output = finish(
        start([sys.executable, *QUICKSTART, "--dry-run", f"run={tmp_path / 'run'}", "global_batch=32"])
    )
    assert code == 0, output
    assert "32 (micro) × 1 (accumulation) × 1 (world) = 32 images" in output
    assert not (tmp_path / "run").exists()


def test_too_many_damaged_samples_stop_all_ranks(pictures: Path, tmp_path: Path, start: Start) -> None:
    """The damaged samples are named."""
    whole = samples(40)
    write(
        tmp_path / "train",
        [one._replace(image=one.image[:-200]) if i % 5 == 0 else one for i, one in enumerate(whole)],
        10,
        [],
    )
    shutil.copytree(pictures / "val", tmp_path / "val")
    command = [
        *TRAIN,
        *overrides(Case(2), tmp_path / "run", tmp_path),
        "data.damaged_allowance=2",
        "data.workers=1",
    ]
    outputs = []
    for process in ranks(start, 2, command):
        code, output = finish(process)
        assert code == 2, output
        outputs.append(output)
    assert re.search(r"error: rank 0: (\d+) damaged samples \(\1 cut or corrupt\) among", outputs[0])
    assert "damaged sample replaced (cut or corrupt): 0-000" in "".join(outputs)


def test_a_shard_that_vanishes_is_named_by_its_worker(pictures: Path, tmp_path: Path, start: Start) -> None:
    shutil.copytree(pictures, tmp_path, dirs_exist_ok=True)
    (tmp_path / "train" / "000002.tar").unlink()
    command = [*TRAIN, *overrides(Case(1), tmp_path / "run", tmp_path), "data.workers=1"]
    code, output = finish(ranks(start, 1, command)[0])
    assert code == 2, output
    assert "error: the shard" in output
    assert "000002.tar of the index cannot be read" in output
    assert "Traceback" not in output


def test_training_from_a_url_is_training_from_a_folder(
    trained: Path, pictures: Path, tmp_path: Path, start: Start
) -> None:
    """Two ranks with one worker each share a cache, and the server fails every fifth request."""
    with serve(pictures, Faults(fail=5)) as url:
        for split, count in (("train", 5), ("val", 3)):
            pattern = f"{{000000..{count - 1:06d}}}.tar"
            shards.index(f"{url}/{split}", tmp_path / "index" / split, pattern, Fields(), 1)
        changes = ["data.workers=1", f"data.cache={tmp_path / 'cache'}", "data.cache_gib=0.1"]
        command = [*TRAIN, *overrides(Case(2), tmp_path / "run", tmp_path / "index"), *changes]
        for process in ranks(start, 2, command):
            code, output = finish(process)
            assert code == 0, output
    assert losses(tmp_path / "run") == losses(trained / Case(2).name / "run")
    assert len(list((tmp_path / "cache" / "shards").glob("*.tar"))) == 8


@pytest.mark.parametrize(
    "quantizer",
    [["kind=simvq", "gradient=rotation"], ["metric=cosine", "codebook_dim=3", "depth=2", "init=kmeans"]],
    ids=" ".join,
)
def test_kinds_of_quantizer_train_alike_on_one_and_two_ranks(
    pictures: Path, tmp_path: Path, start: Start, quantizer: list[str]
) -> None:
    """Linear maps under ZeRO 1, and several codebooks, each of which the evaluation names."""
    for world in (1, 2):
        given = [f"model.quantizer.{override}" for override in quantizer]
        command = [*TRAIN, *overrides(Case(world, zero=world - 1), tmp_path / str(world), pictures), *given, "steps=6"]
        for process in ranks(start, world, command):
            code, output = finish(process)
            assert code == 0, output
    # After a few steps a latent between two codes may get the other one, because sums are rounded differently.
    assert losses(tmp_path / "2") == pytest.approx(losses(tmp_path / "1"), rel=1e-3)
    code, output = finish(start([sys.executable, "launch/evaluate.py", "--run", str(tmp_path / "2")]))
    assert code == 0, output
    wanted = ["codes used, codebook0", "perplexity, codebook1"] if "depth=2" in quantizer else ["codes used"]
    assert all(one in output for one in wanted)


def test_evaluation_is_the_same_on_one_and_two_ranks(trained: Path, tmp_path: Path, start: Start) -> None:
    results = []
    for world in (1, 2):
        run = tmp_path / str(world)
        shutil.copytree(trained / Case(2).name / "run", run)
        for process in ranks(start, world, ["launch/evaluate.py", "--run", str(run)]):
            code, output = finish(process)
            assert code == 0, output
        results.append(json.loads((run / "evaluation.json").read_text()))
        with Image.open(run / "reconstructions.png") as picture:
            assert picture.width > 100
    one, two = results
    assert one["images"] == 11
    assert one["step"] == 12
    assert "8 bits" in one["protocol"]["rounding"]
    assert one.keys() == two.keys()
    for name in ("psnr", "ssim", "mse", "usage", "usage_ever", "perplexity", "images"):
        assert one[name] == pytest.approx(two[name], rel=1e-6), name


def test_several_runs_are_evaluated_into_one_table(trained: Path, tmp_path: Path, start: Start) -> None:
    runs = [tmp_path / "ema", tmp_path / "gradient"]
    for run, learning in zip(runs, ("ema", "gradient"), strict=True):
        shutil.copytree(trained / Case(1, learning=learning).name / "run", run)
    command = ["launch/evaluate.py", "--run", *map(str, runs), "--iw", "2", "data.workers=0"]
    code, output = finish(start([sys.executable, *command]))
    assert code == 0, output
    rows = [line for line in output.splitlines() if line.startswith(f"| {tmp_path}")]
    assert len(rows) == 2
    for run, row in zip(runs, rows, strict=True):
        result = json.loads((run / "evaluation.json").read_text())
        # no column of IW-2, because codes are not drawn
        bits = " | ".join(f"{result[name]:.4f}" for name in ("bits_per_dim", "rate", "distortion"))
        assert f"| 4 × 4, K = 24 | {bits} |" in " ".join(row.split())
        assert f"{result['psnr']:.2f}" in row
    assert "are not comparable" not in output


def test_evaluating_what_is_not_there_is_one_sentence(tmp_path: Path, start: Start) -> None:
    code, output = finish(start([sys.executable, "launch/evaluate.py", "--run", str(tmp_path / "none")]))
    assert code == 2
    assert "none is not a run directory" in output
    assert "Traceback" not in output


def test_sampling_from_what_has_no_prior_says_why(trained: Path, tmp_path: Path, start: Start) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained / Case(1).name / "run", run)
    sample = [sys.executable, "launch/sample.py", "--run", str(run)]
    cases = {
        (): "error: .* has no pictures to show",
        ("generate",): "error: .* cannot generate: a VQ-VAE has no prior of its own",
        ("interpolate", "--images", "3", "11"): "error: --images 11: the validation images are 0 to 10",
        ("vary", "data.syze=3"): r"unknown key data\.syze: did you mean data\.size",
        ("dream",): "error: dream is not one of the modes: generate, interpolate, vary, traverse, swap",
        ("generate", "--temperature", "1", "-1"): "--temperature",
    }
    for arguments, words in cases.items():
        code, output = finish(start([*sample, *arguments]))
        assert code == 2, output
        assert re.search(words, output), output
        assert "Traceback" not in output
        if not arguments:
            for mode in ("generate", "interpolate", "vary", "traverse", "swap"):
                assert f"skipped {mode}: " in output
    assert not list(run.glob("sample_*"))
