"""Faults of checkpoints, with the commands that a user types. In every case the newest valid checkpoint is used, the
fault is reported, and the run ends with the same bits as an undisturbed one.

Each test follows the function that returns its jobs. The fixture `befallen` runs all jobs together.
"""

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
from tests.lifecycle.test_checkpoint import POINTERS, Poison, flip, forge

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
Jobs = list[dict[str, Any]]


class End(NamedTuple):
    codes: list[int | None]  # of each rank; None: killed
    output: str  # of rank 0


def job(
    out: Path, command: Sequence[str], *faults: Sequence[Any], world: int = 1, killed: bool = False
) -> dict[str, Any]:
    out.mkdir(parents=True, exist_ok=True)
    given = {"world": world, "out": str(out), "command": list(command), "faults": faults}
    return {"task": "launch", **given, "code": -9 if killed else None}


def train(run: Path, pictures: Path, *given: str, world: int = 1) -> list[str]:
    return [TRAIN, "--config", str(TINY), *overrides(Case(world), run, pictures), *given]


def end(out: Path) -> End:
    codes: list[int | None] = []
    for rank, code in enumerate(json.loads((out / "codes.json").read_text())):
        file = out / f"code-{rank}"  # missing if the rank was killed, or left at once
        codes.append(int(file.read_text()) if file.exists() else code if code > 0 else None)
    return End(codes, (out / "output-0.txt").read_text())


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def twins(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Undisturbed runs, N/run on N ranks."""
    folder = tmp_path_factory.mktemp("twins")
    outs = {world: folder / str(world) for world in (1, 2)}
    forked(folder, [job(out, train(out / "run", pictures, world=world), world=world) for world, out in outs.items()])
    for world, out in outs.items():
        assert end(out).codes == [0] * world, end(out).output
    return folder


@pytest.fixture(scope="module")
def befallen(twins: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("befallen")
    prepare = (kills, a_flip, hints, poisons, a_nan, other_files, beginnings)
    forked(folder, [one for jobs in prepare for one in jobs(folder, twins, pictures)])
    return folder


def kills(folder: Path, twins: Path, pictures: Path) -> Jobs:
    jobs = []
    for world, point in KILLS:
        out = folder / f"{world}-{point}"
        command = train(out / "run", pictures, "keep_last=1", world=world)
        jobs.append(job(out, command, ["die", 0, point, 8], world=world, killed=True))
        jobs.append(job(out / "again", command, world=world))
    return jobs


@pytest.mark.parametrize(("world", "point"), KILLS)
def test_killed_in_a_save(befallen: Path, twins: Path, world: int, point: str) -> None:
    """All ranks are killed while the checkpoint of step 8 is written. At most one interval is lost, plus the steps
    trained during the save."""
    out = befallen / f"{world}-{point}"
    assert end(out).codes == [None] * world
    codes, output = end(out / "again")
    assert codes == [0] * world, output
    assert f"resumes at step {8 if point == POINTS[5] else 4}:" in output
    assert "damaged" not in output
    same_bits(out / "run", twins / str(world) / "run")
    assert names(out / "run" / "checkpoints") == ["latest", "step-00000012"]


def a_flip(folder: Path, twins: Path, pictures: Path) -> Jobs:
    run = folder / "flip" / "run"
    shutil.copytree(twins / "2" / "run", run)
    flip(run / "checkpoints" / "step-00000012" / "optimizer.safetensors", 5000, 16)
    return [job(folder / "flip", train(run, pictures, world=2), world=2)]


def test_a_flipped_bit_costs_one_interval(befallen: Path, twins: Path) -> None:
    codes, output = end(befallen / "flip")
    assert codes == [0, 0], output
    words = r"step-00000012 is damaged, trying the next one: optimizer\.safetensors has changed"
    assert re.search(words, output)
    assert "resumes at step 8:" in output
    same_bits(befallen / "flip" / "run", twins / "2" / "run")


HINTS = ["empty", "missing", "dangling"]


def hints(folder: Path, twins: Path, pictures: Path) -> Jobs:
    jobs = []
    for harm in [*HINTS, "none"]:
        run = folder / harm / "run"
        shutil.copytree(twins / "1" / "run", run)
        if harm == "none":
            for path in run.glob("checkpoints/step-*"):
                flip(path / "state.json", 7)
        else:
            POINTERS[harm][0](run / "checkpoints" / "latest")
        jobs.append(job(folder / harm, train(run, pictures)))
    return jobs


@pytest.mark.parametrize("harm", HINTS)
def test_latest_is_a_hint(befallen: Path, harm: str) -> None:
    codes, output = end(befallen / harm)
    assert codes == [0], output
    assert POINTERS[harm][1] in output.splitlines()[0]
    assert "resumes at step 12:" in output


def test_a_run_without_a_valid_checkpoint_does_not_begin_again(befallen: Path, twins: Path) -> None:
    codes, output = end(befallen / "none")
    assert codes == [2]
    words = (
        r"error: none of the 2 checkpoint\(s\) in .* is valid \(step-00000012 is damaged: state\.json has changed.*\n"
    )
    assert re.fullmatch(words, output)
    assert (befallen / "none/run/metrics.jsonl").read_bytes() == (twins / "1/run/metrics.jsonl").read_bytes()


POISONS = [
    (kind, name)
    for kind in ("newest", "all", "config")
    for name in ("train", "evaluate", "sample")
    if (kind, name) != ("config", "train")  # training writes it
]


def poisons(folder: Path, twins: Path, pictures: Path) -> Jobs:
    poison = pickle.dumps(Poison(folder / "ran"))
    jobs = []
    for kind, name in POISONS:
        out = folder / f"{kind}-{name}"
        run = out / "run"
        shutil.copytree(twins / "1" / "run", run)
        (run / "checkpoints" / "latest").write_bytes(poison)
        if kind == "config":
            (run / "config.yaml").write_text(f"run: !!python/object/apply:os.mkdir ['{folder / 'ran'}']\n")
        for path in sorted(run.glob("checkpoints/step-*"))[0 if kind == "all" else 1 :]:
            for file in FILES:
                forge(path, file, poison)
        command = {
            "train": train(run, pictures),
            "evaluate": [EVALUATE, "--run", str(run), "--iw", "1", "data.workers=0"],
            "sample": [SAMPLE, "--run", str(run), "data.workers=0"],
        }
        jobs.append(job(out, command[name]))
    return jobs


@pytest.mark.parametrize(("kind", "name"), POISONS)
def test_a_poisoned_pickle_never_runs(befallen: Path, kind: str, name: str) -> None:
    """The pickle replaces every file of the newest checkpoint, or of all, with a matching manifest, and `latest`. A tag
    in config.yaml is not run either."""
    codes, output = end(befallen / f"{kind}-{name}")
    assert not (befallen / "ran").exists()
    assert codes == [0 if kind == "newest" and name != "sample" else 2], output  # a VQ-VAE draws no samples
    assert "Traceback" not in output
    if kind == "config":
        assert "config.yaml, line 1: tags such as !!python/object/apply:os.mkdir are not supported" in output
        return
    for file in FILES:
        assert f"{file} cannot be read" in output, file
    if kind == "newest":
        assert "latest names" in output
        words = {"train": "resumes at step 8:", "evaluate": "at step 8,", "sample": "has no pictures to show"}
        assert words[name] in output


def a_nan(folder: Path, twins: Path, pictures: Path) -> Jobs:
    return [job(folder / "nan", train(folder / "nan" / "run", pictures, world=2), ["spoil", 0, 6], world=2)]


def test_what_is_not_finite_is_not_committed(befallen: Path) -> None:
    codes, output = end(befallen / "nan")
    assert codes == [3, 3], output
    assert re.search(
        r"error: rank 0: the checkpoint of step 8 is not written, because \S+ of ema\.safetensors is not finite", output
    )
    assert names(befallen / "nan" / "run" / "checkpoints") == ["latest", "step-00000004"]


SEES = {
    0: "the checkpoint run/checkpoints/step-00000012, but rank 1 does not",
    1: "no checkpoint in run, but rank 1 finds some",
}


def other_files(folder: Path, twins: Path, pictures: Path) -> Jobs:
    jobs = []
    for sees in SEES:
        out = folder / f"only-{sees}"
        nodes = [out / "0", out / "1"]
        for node in nodes:
            node.mkdir(parents=True)
        shutil.copytree(twins / "2" / "run", nodes[sees] / "run")
        faults = [["elsewhere", rank, str(node)] for rank, node in enumerate(nodes)]
        jobs.append(job(out, train(Path("run"), pictures, world=2), *faults, world=2))
    return jobs


@pytest.mark.parametrize("sees", SEES)
def test_ranks_that_see_other_files_stop(befallen: Path, sees: int) -> None:
    codes, output = end(befallen / f"only-{sees}")
    assert codes == [2, 2], output
    assert SEES[sees] in output


def beginnings(folder: Path, twins: Path, pictures: Path) -> Jobs:
    other = twins / "1" / "run"
    given = [f"init_from={other}", "zero_stage=1", "optimizer.lr=1e-30", "every.checkpoint=1"]
    command = train(folder / "new" / "run", pictures, *given, world=2)
    one = f"init_from={other / 'checkpoints' / 'step-00000008'}"
    return [
        job(folder / "new", [*command, "steps=1"], world=2),
        job(folder / "new" / "again", [*command, "steps=2"], world=2),
        job(folder / "one", train(folder / "one" / "run", pictures, one, "steps=1")),
        job(folder / "wide", train(folder / "wide" / "run", pictures, one, "model.network.width=16")),
        job(folder / "nowhere", train(folder / "nowhere" / "run", pictures, f"init_from={folder}")),
    ]


def test_a_new_run_may_begin_with_the_weights_of_another(befallen: Path, twins: Path) -> None:
    """It takes only the weights, and its own checkpoints have precedence. Runs at ZeRO 1, where the optimiser has its
    own copy of the weights."""
    other = twins / "1" / "run" / "checkpoints"
    codes, output = end(befallen / "new")
    assert codes == [0, 0], output
    assert f"starts from the weights of {other / 'step-00000012'}" in output
    begun = befallen / "new" / "run" / "checkpoints" / "step-00000001"
    state = json.loads((begun / "state.json").read_text())
    assert (state["step"], state["images"], state["optimizer_steps"]) == (1, 12, 1)
    model, averaged = (load_file(other / "step-00000012" / f"{name}.safetensors") for name in ("model", "ema"))
    moved, mean = (load_file(begun / f"{name}.safetensors") for name in ("model", "ema"))
    for name in [name for name in model if not name.startswith(("quantizer", "error_std"))]:
        assert torch.equal(moved[name], model[name]), name
        torch.testing.assert_close(mean[name], 0.1 * averaged[name] + 0.9 * model[name])  # one step of averaging

    codes, output = end(befallen / "new" / "again")
    assert codes == [0, 0], output
    assert "resumes at step 1:" in output
    assert "begins with" not in output
    assert f"starts from the weights of {other / 'step-00000008'}" in end(befallen / "one").output


def test_weights_that_do_not_fit_are_one_sentence(befallen: Path) -> None:
    codes, output = end(befallen / "wide")
    assert codes == [2]
    words = (
        r"error: .*step-00000008 belongs to another model: \S+ is [0-9×]+ instead of [0-9×]+, .* and \d+ more; "
        r"restore .*\n"
    )
    assert re.fullmatch(words, output)
    codes, output = end(befallen / "nowhere")
    assert codes == [2]
    assert re.fullmatch(r"error: init_from=.* is neither a checkpoint nor a run directory with one: .*\n", output)


# $0: size of the disk, $1: its folder. FOLDER-after is a copy of its content after the command has ended.
ON_A_DISK = """
disk="$1"; shift; mount -t tmpfs -o size="$0" tmpfs "$disk" || exit 77
mkdir "$disk/passing" "$disk/lasting" "$disk/small"
"$@"; code=$?; cp -r "$disk" "$disk-after"; exit $code
"""


def test_a_full_disk_costs_a_checkpoint_not_the_run(pictures: Path, tmp_path: Path) -> None:
    """A real disk, which fills when the save of step 8 begins: completely, with the whole run on it, or up to 40 KiB,
    where a checkpoint takes 80."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system may be mounted here")
    for name in ("lasting", "small"):
        (tmp_path / name / "run").mkdir(parents=True)
        (tmp_path / name / "run" / "checkpoints").symlink_to(disk / name)
    passing = train(disk / "passing", pictures, "keep_last=1", "steps=20", world=2)
    lasting = train(tmp_path / "lasting" / "run", pictures, "keep_last=1", "steps=20", world=2)
    jobs = [
        job(tmp_path / "passing", passing, ["fill", 0, 8, str(disk), 0], ["free", 0, 12, str(disk)], world=2),
        job(tmp_path / "lasting", lasting, ["fill", 0, 8, str(disk), 40960], world=2),
        job(tmp_path / "still", lasting, world=2),
        job(tmp_path / "freed", lasting, ["free", 0, 0, str(disk)], world=2),
        job(tmp_path / "small", train(tmp_path / "small" / "run", pictures, "keep_last=50")),
    ]
    forked(tmp_path, jobs, within=["unshare", "-m", "sh", "-c", ON_A_DISK, "3m", str(disk)])

    after = tmp_path / "disk-after"
    codes, output = end(tmp_path / "passing")
    assert codes == [0, 0], output
    said = "the checkpoint of step 8 could not be written (No space left on device); earlier checkpoints are intact"
    assert output.count(said) == 1
    assert output.count("tensorboard cannot be written (No space left on device): the curves will have a gap") == 1
    assert output.count("Traceback") == output.count("Exception in thread") <= 1  # TensorBoard's own
    assert (tmp_path / "passing" / "seen.txt").read_text().split() == ["latest", "step-00000004"]
    assert names(after / "passing" / "checkpoints") == ["latest", "step-00000020"]
    lines = [json.loads(line) for line in (after / "passing" / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "train/loss" in line]
    assert set(steps) >= {*range(1, 9), *range(17, 21)}

    codes, output = end(tmp_path / "lasting")
    assert codes == [2, 2], output
    assert said in output
    assert re.search(
        r"error: rank 0: the checkpoint of step 12 could not be written \(No space left on device\), and 2 saves in a "
        r"row have failed: free disk space in .*, then run the same command\n",
        output,
    )
    assert "error" not in (tmp_path / "lasting" / "output-1.txt").read_text()
    codes, output = end(tmp_path / "still")
    assert codes == [2, 2], output
    assert re.search(
        r"error: .*2 checkpoints of .* KiB \(keep_last=1, one being written\) do not fit into .* KiB are", output
    )
    codes, output = end(tmp_path / "freed")
    assert codes == [0, 0], output
    assert "resumes at step 4:" in output
    assert names(after / "lasting") == ["latest", "step-00000020"]
    codes, output = end(tmp_path / "small")
    assert codes == [2], output
    assert "error: 51 checkpoints of " in output
