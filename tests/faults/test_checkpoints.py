"""What befalls checkpoints, on the commands that a user types: whatever it is, the newest valid one is taken, what was
wrong is said, and the run ends in the bits of the one that nothing befell."""

import json
import pickle
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import ROOT
from tests.integration.conftest import TINY, Case, forked, overrides
from tests.integration.test_resume import same_bits
from tests.training.test_checkpoint import POINTERS, Poison, flip, forge

TRAIN, EVALUATE, SAMPLE = (str(ROOT / "launch" / f"{name}.py") for name in ("train", "evaluate", "sample"))
POINTS = [
    "nothing is written",
    "half a file is written",
    "the manifest is half written",
    "all is written",
    "latest has not moved",
    "the old one is being removed",
]
KILLS = [*((1, point) for point in POINTS), (2, POINTS[1]), (2, POINTS[4])]
FILES = ["model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json"]


class End(NamedTuple):
    codes: list[int | None]  # of each rank; None: killed
    output: str  # of rank 0


def job(
    out: Path, command: Sequence[str], *faults: Sequence[Any], world: int = 1, killed: bool = False
) -> dict[str, Any]:
    return {
        "task": "launch",
        "world": world,
        "out": str(out),
        "command": list(command),
        "faults": faults,
        "code": -9 if killed else 0,
    }


def train(run: Path, pictures: Path, *given: str, world: int = 1) -> list[str]:
    return [TRAIN, "--config", str(TINY), *overrides(Case(world), run, pictures), *given]


def end(out: Path) -> End:
    ranks = range(len(list(out.glob("pid-*"))))
    files = [out / f"code-{rank}" for rank in ranks]
    codes = [int(file.read_text()) if file.exists() else None for file in files]
    return End(codes, (out / "output-0.txt").read_text())


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def twins(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs that nothing befell, N/run on N ranks."""
    folder = tmp_path_factory.mktemp("twins")
    jobs = [
        job(folder / str(world), train(folder / str(world) / "run", pictures, world=world), world=world)
        for world in (1, 2)
    ]
    forked(folder, jobs)
    for world in (1, 2):
        assert end(folder / str(world)).codes == [0] * world, end(folder / str(world)).output
    return folder


@pytest.fixture(scope="module")
def killed(twins: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("killed")
    jobs = []
    for world, point in KILLS:
        out = folder / f"{world}-{point}"
        command = train(out / "run", pictures, "keep=1", world=world)
        jobs.append(job(out, command, ["die", 0, point, 8], world=world, killed=True))
        jobs.append(job(folder / f"{world}-{point}-again", command, world=world))
    forked(folder, jobs)
    return folder


@pytest.mark.parametrize(("world", "point"), KILLS)
def test_killed_in_a_save(killed: Path, twins: Path, world: int, point: str) -> None:
    """All ranks, and the save of step 8 was under way: no more than one interval is lost."""
    first, again = end(killed / f"{world}-{point}"), end(killed / f"{world}-{point}-again")
    assert first.codes == [None] * world
    assert again.codes == [0] * world, again.output
    run = killed / f"{world}-{point}" / "run"
    assert f"resumes at step {8 if point == POINTS[5] else 4}:" in again.output
    assert "damaged" not in again.output
    same_bits(run, twins / str(world) / "run")
    assert names(run) == ["latest", "step-00000012"]


def test_a_flipped_byte_costs_one_interval(twins: Path, pictures: Path, tmp_path: Path) -> None:
    """On two ranks, of which one reads it first."""
    run = tmp_path / "run"
    shutil.copytree(twins / "2" / "run", run)
    flip(run / "checkpoints" / "step-00000012" / "optimizer.safetensors", 5000, 16)
    forked(tmp_path, [job(tmp_path / "out", train(run, pictures, world=2), world=2)])
    codes, output = end(tmp_path / "out")
    assert codes == [0, 0], output
    assert re.search(
        r"step-00000012 is damaged, and the next one looked for: optimizer\.safetensors has changed", output
    )
    assert "resumes at step 8:" in output
    same_bits(run, twins / "2" / "run")


def test_latest_is_a_hint_and_nothing_valid_stops(twins: Path, pictures: Path, tmp_path: Path) -> None:
    harms = ["empty", "missing", "dangling"]
    jobs = []
    for harm in [*harms, "none"]:
        run = tmp_path / harm / "run"
        shutil.copytree(twins / "1" / "run", run)
        if harm == "none":
            for path in run.glob("checkpoints/step-*"):
                flip(path / "state.json", 7)
        else:
            POINTERS[harm][0](run / "checkpoints" / "latest")
        jobs.append(job(tmp_path / harm, train(run, pictures)))
    forked(tmp_path, jobs)
    for harm in harms:
        codes, output = end(tmp_path / harm)
        assert codes == [0], output
        assert POINTERS[harm][1] in output.splitlines()[0]
        assert "resumes at step 12:" in output
    codes, output = end(tmp_path / "none")
    assert codes == [2]
    assert re.fullmatch(
        r"error: none of the 2 checkpoint\(s\) in .* is valid \(step-00000012 is damaged: state\.json .*\n", output
    )
    assert (tmp_path / "none" / "run" / "metrics.jsonl").read_bytes() == (twins / "1/run/metrics.jsonl").read_bytes()


def test_a_poisoned_pickle_never_runs(twins: Path, pictures: Path, tmp_path: Path) -> None:
    """In place of every file of the newest checkpoint, or of all, the manifest vouching for it; in `latest`, and in
    config.yaml as a tag. By resuming, evaluating and sampling."""
    poison = pickle.dumps(Poison(tmp_path / "ran"))
    jobs = []
    for kind in ("newest", "all", "config"):
        for name in ("train", "evaluate", "sample"):
            run = tmp_path / f"{kind}-{name}" / "run"
            shutil.copytree(twins / "1" / "run", run)
            (run / "checkpoints" / "latest").write_bytes(poison)
            if kind == "config":
                (run / "config.yaml").write_text(f"run: !!python/object/apply:os.mkdir ['{tmp_path / 'ran'}']\n")
            for path in sorted(run.glob("checkpoints/step-*"))[0 if kind == "all" else 1 :]:
                for file in FILES:
                    forge(path, file, poison)
            arguments = {
                "train": train(run, pictures, "init_from="),
                "evaluate": [EVALUATE, "--run", str(run), "--iw", "1", "data.workers=0"],
                "sample": [SAMPLE, "--run", str(run), "data.workers=0"],
            }
            if kind != "config" or name != "train":  # which writes it
                jobs.append(job(run.parent, arguments[name]))
    forked(tmp_path, jobs)
    assert not (tmp_path / "ran").exists()
    for one in jobs:
        kind, _, name = Path(one["out"]).name.partition("-")
        codes, output = end(Path(one["out"]))
        wanted = 2 if kind in ("all", "config") or name == "sample" else 0  # a VQ-VAE has nothing to sample from
        assert codes == [wanted], output
        assert "Traceback" not in output
        if kind == "config":
            assert "config.yaml is not valid YAML" in output
            continue
        for file in FILES:
            assert f"{file} cannot be read" in output, file
        if kind == "newest":
            assert "latest names" in output
            assert {"train": "resumes at step 8:", "evaluate": "at step 8,", "sample": "no pictures to show"}[
                name
            ] in output


# $0: bytes, $1: the folder; what is on it when the command has ended lies in FOLDER-after.
ON_A_DISK = """
disk="$1"; shift; mount -t tmpfs -o size="$0" tmpfs "$disk" || exit 77
mkdir "$disk/passing" "$disk/lasting" "$disk/small"
"$@"; code=$?; cp -r "$disk" "$disk-after"; exit $code
"""


def test_a_full_disk_costs_a_checkpoint_not_the_run(pictures: Path, tmp_path: Path) -> None:
    """A real one, of 400 KiB: a checkpoint takes 80. It fills when the save of step 8 begins."""
    if subprocess.run(
        ["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", str(tmp_path)], capture_output=True
    ).returncode:
        pytest.skip("no file system may be mounted here")
    disk = tmp_path / "disk"
    for name in ("passing", "lasting", "small"):
        (disk / name).mkdir(parents=True)
        (tmp_path / name).mkdir()
        (tmp_path / name / "run").mkdir()
        (tmp_path / name / "run" / "checkpoints").symlink_to(disk / name)
    passing = train(tmp_path / "passing" / "run", pictures, "keep=1", world=2)
    lasting = train(tmp_path / "lasting" / "run", pictures, "keep=1", "steps=20", world=2)
    full = ["fill", 0, 8, str(disk), 40960]
    jobs = [
        job(tmp_path / "passing", passing, full, ["free", 0, 12, str(disk)], world=2),
        job(tmp_path / "lasting", lasting, full, world=2),
        job(tmp_path / "again", lasting, ["free", 0, 8, str(disk)], world=2),
        job(tmp_path / "small", train(tmp_path / "small" / "run", pictures, "keep=9")),
    ]
    within = ["unshare", "-m", "sh", "-c", ON_A_DISK, "400k", str(disk)]
    forked(tmp_path, jobs, within=within)

    codes, output = end(tmp_path / "passing")
    assert codes == [0, 0], output
    said = "the checkpoint of step 8 could not be written (No space left on device); those before are untouched"
    assert output.count(said) == 1
    assert (tmp_path / "passing" / "seen.txt").read_text().split() == ["latest", "step-00000004"]
    assert sorted(path.name for path in (tmp_path / "disk-after/passing").iterdir()) == ["latest", "step-00000012"]

    codes, output = end(tmp_path / "lasting")
    assert codes == [2, 2], output
    assert said in output
    assert re.search(
        r"error: rank 0: the checkpoint of step 12 could not be written \(No space left on device\), and 2 saves "
        r"in a row have failed: make room in .*, then run the same command\n",
        output,
    )
    assert "error" not in (tmp_path / "lasting" / "output-1.txt").read_text()
    codes, output = end(tmp_path / "again")
    assert codes == [0, 0], output
    assert "resumes at step 4:" in output
    codes, output = end(tmp_path / "small")
    assert codes == [2], output
    assert re.search(
        r"error: 10 checkpoints of .* GiB \(keep=9, one being written\) do not fit into .*: .* GiB are free", output
    )


def test_what_is_not_finite_is_not_committed(pictures: Path, tmp_path: Path) -> None:
    command = train(tmp_path / "run", pictures, world=2)
    forked(tmp_path, [job(tmp_path / "out", command, ["spoil", 0, 6], world=2)])
    codes, output = end(tmp_path / "out")
    assert codes == [3, 3], output
    assert re.search(
        r"error: rank 0: the checkpoint of step 8 is not written, for \S+ of ema\.safetensors is not finite", output
    )
    assert names(tmp_path / "run") == ["latest", "step-00000004"]


@pytest.mark.parametrize("sees", [0, 1])
def test_ranks_that_see_other_files_stop(twins: Path, pictures: Path, tmp_path: Path, sees: int) -> None:
    folders = [tmp_path / "one", tmp_path / "other"]
    for folder in folders:
        folder.mkdir()
    shutil.copytree(twins / "2" / "run", folders[sees] / "run")
    faults = [["elsewhere", rank, str(folder)] for rank, folder in enumerate(folders)]
    forked(tmp_path, [job(tmp_path / "out", train(Path("run"), pictures, world=2), *faults, world=2)])
    codes, output = end(tmp_path / "out")
    assert codes == [2, 2], output
    words = [
        "the checkpoint run/checkpoints/step-00000012, and rank 1 does not",
        "no checkpoint in run, and rank 1 finds some",
    ]
    assert words[sees] in output


def test_a_new_run_may_begin_with_the_weights_of_another(twins: Path, pictures: Path, tmp_path: Path) -> None:
    """And nothing else of it; its own checkpoints come first. At ZeRO 1, whose optimiser has its own copy of them."""
    other = twins / "1" / "run"
    given = [f"init_from={other}", "zero=1", "optimizer.lr=1e-30", "every.checkpoint=1"]
    command = train(tmp_path / "run", pictures, *given, world=2)
    one = f"init_from={other / 'checkpoints' / 'step-00000008'}"
    jobs = [
        job(tmp_path / "new", [*command, "steps=1"], world=2),
        job(tmp_path / "again", [*command, "steps=2"], world=2),
        job(tmp_path / "one", train(tmp_path / "one" / "run", pictures, one, "steps=1")),
        job(tmp_path / "wide", train(tmp_path / "wide" / "run", pictures, one, "model.width=16")),
        job(tmp_path / "nowhere", train(tmp_path / "nowhere" / "run", pictures, f"init_from={tmp_path}")),
    ]
    forked(tmp_path, jobs)
    codes, output = end(tmp_path / "new")
    assert codes == [0, 0], output
    assert f"begins with the weights of {other / 'checkpoints' / 'step-00000012'}" in output
    begun, held = (path / "checkpoints" / f"step-{step:08d}" for path, step in ((tmp_path / "run", 1), (other, 12)))
    state = json.loads((begun / "state.json").read_text())
    assert (state["step"], state["images"], state["optimizer_steps"]) == (1, 12, 1)
    model, averaged = (load_file(held / f"{name}.safetensors") for name in ("model", "ema"))
    moved, mean = (load_file(begun / f"{name}.safetensors") for name in ("model", "ema"))
    for name in [name for name in model if not name.startswith("quantizer")]:
        assert torch.equal(moved[name], model[name]), name
        torch.testing.assert_close(mean[name], 0.1 * averaged[name] + 0.9 * model[name])  # one step of averaging

    codes, output = end(tmp_path / "again")
    assert codes == [0, 0], output
    assert "resumes at step 1:" in output
    assert "begins with" not in output
    assert f"begins with the weights of {other / 'checkpoints' / 'step-00000008'}" in end(tmp_path / "one").output
    codes, output = end(tmp_path / "wide")
    assert codes == [2]
    assert re.search(
        r"error: .*step-00000008 is of another model: \S+ is [0-9×]+ instead of [0-9×]+, .* and \d+ more; set", output
    )
    codes, output = end(tmp_path / "nowhere")
    assert codes == [2]
    assert "is neither a checkpoint nor a run directory that has one" in output
