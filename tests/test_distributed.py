"""The place of a process: the variables of launchers, and their leftovers; the groups of ranks."""

import mmap
import os
import pty
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT, Start, finish, free_port
from vaescale.distributed import Misplaced, Place, place

MEET = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
STEP = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "2", "SLURM_LOCALID": "1", "SLURM_NTASKS": "4"}


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("SLURM_", "MASTER_")) or name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            monkeypatch.delenv(name)


def found(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> Place:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return place()


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, Place(0, 0, 1)),
        ({"WORLD_SIZE": "1"}, Place(0, 0, 1)),
        ({"LOCAL_RANK": "3"}, Place(0, 0, 1)),
        ({"RANK": "0", "WORLD_SIZE": "1"}, Place(0, 0, 1)),
        ({"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", **MEET}, Place(3, 1, 4)),
        ({**STEP, **MEET}, Place(2, 1, 4)),
        ({**STEP, **MEET, "SLURM_PTY_PORT": "40000"}, Place(2, 1, 4)),  # srun inside of an interactive shell
        ({**STEP, "SLURM_STEP_NUM_TASKS": "1"}, Place(0, 0, 1)),  # the one shell of salloc
        ({**STEP, "SLURM_NTASKS": "1"}, Place(0, 0, 1)),
        ({name: value for name, value in STEP.items() if name != "SLURM_STEP_ID"}, Place(0, 0, 1)),  # a batch shell
    ],
)
def test_the_place_is_read_from_the_launchers_variables(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: Place
) -> None:
    assert found(monkeypatch, variables) == expected


TWO = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", **MEET}


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"RANK": "0"}, "RANK=0 is set, but WORLD_SIZE is not: "),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 is set, but RANK is not: "),
        ({"WORLD_SIZE": ""}, "but RANK is not: "),
        (TWO | {"MASTER_ADDR": ""}, "WORLD_SIZE=2 is set, but MASTER_ADDR, where the ranks meet, is not: "),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "h"}, "MASTER_PORT, where the ranks meet, is not: "),
        (TWO | {"MASTER_PORT": "http"}, "MASTER_PORT='http' is not a whole number of at least 1: "),
        (TWO | {"MASTER_PORT": "65536"}, "MASTER_PORT=65536 is not a port"),
        (TWO | {"RANK": "2"}, "RANK=2 must be below WORLD_SIZE=2: "),
        (TWO | {"RANK": "-1"}, "RANK='-1' is not a whole number of at least 0: "),
        (TWO | {"RANK": "one"}, "RANK='one' is not a whole number"),
        (TWO | {"RANK": ""}, "RANK='' is not a whole number"),
        (TWO | {"RANK": "1\n2"}, r"RANK='1\n2' is not a whole number"),
        (TWO | {"LOCAL_RANK": "x"}, "LOCAL_RANK='x' is not a whole number"),
        (TWO | {"WORLD_SIZE": "0"}, "WORLD_SIZE='0' is not a whole number of at least 1: "),
        (TWO | {"WORLD_SIZE": "2.0"}, "WORLD_SIZE='2.0' is not a whole number"),
        (STEP, "SLURM_NTASKS=4 is set, but MASTER_ADDR, where the ranks meet, is not: "),
        (STEP | MEET | {"SLURM_NTASKS": "4(x2)"}, "SLURM_NTASKS='4(x2)' is not a whole number"),
        (STEP | MEET | {"SLURM_PROCID": "4"}, "SLURM_PROCID=4 must be below SLURM_NTASKS=4: "),
        ({"SLURM_STEP_ID": "0", "SLURM_NTASKS": "4", **MEET}, "SLURM_NTASKS=4 is set, but SLURM_PROCID is not: "),
    ],
)
def test_variables_that_give_no_place_are_refused_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], words: str
) -> None:
    with pytest.raises(Misplaced) as error:
        found(monkeypatch, variables)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert " for one process" in str(error.value)


def test_an_interactive_shell_is_no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pty.openpty()
    with os.fdopen(ours), os.fdopen(theirs) as terminal:
        monkeypatch.setattr(sys, "stdin", terminal)
        with pytest.raises(Misplaced, match="SLURM_NTASKS=4 belongs to an interactive shell"):
            found(monkeypatch, {**STEP, **MEET, "SLURM_PTY_PORT": "40000"})


def test_training_refuses_them_in_one_sentence(start: Start) -> None:
    """A wrong setting is given, too; to report it, each rank would first need to know its place."""
    command = [sys.executable, "launch/train.py", "--config", "tests/integration/tiny.yaml", "no=setting"]
    code, output = finish(start(command, RANK="0"))
    assert code == 2
    assert output.startswith("error: RANK=0 is set, but WORLD_SIZE is not: ")
    assert output.count("\n") == 1


RECORDER = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_DUMP_ON_TIMEOUT", "TORCH_FR_DUMP_TEMP_FILE")
FORMER = ("TORCH_NCCL_TRACE_BUFFER_SIZE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")
RECORDED = """
import os, sys
from datetime import timedelta
from pathlib import Path
import torch.distributed as dist
from vaescale import distributed
whole = dist.init_process_group
def init(*arguments, **options):
    print([os.environ.get(name) for name in %r])
    whole(*arguments, **options)
dist.init_process_group = init
distributed.init(1000.0, Path(sys.argv[1]))
for group in (distributed.side_group(), dist.new_group(range(2))):
    print(group._get_backend(distributed._device()).options._timeout)
"""


@pytest.mark.parametrize("given", [False, True])
def test_nccl_records_collectives_before_the_group_is_made_and_all_groups_wait_as_long(
    tmp_path: Path, start: Start, given: bool
) -> None:
    names = (*RECORDER, *FORMER)
    users = {FORMER[0]: "7", RECORDER[1]: "0", FORMER[1]: "theirs"} if given else {}
    command = [sys.executable, "-c", RECORDED % (names,), str(tmp_path / "stacks")]
    variables = {**users, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    ranks = [start(command, **variables, PYTHONPATH=str(ROOT), RANK=str(rank)) for rank in range(2)]
    for rank in ranks:
        code, output = finish(rank, 120)
        assert code == 0, output
        wanted = (
            [None, "0", None, "7", "theirs"] if given else ["2000", "1", f"{tmp_path}/stacks/nccl-rank-", None, None]
        )
        lines = [line for line in output.splitlines() if "is deprecated" not in line]
        assert lines == [str(wanted), "3:20:00", "3:20:00"]


def test_torch_knows_the_variables_of_the_recorder() -> None:
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        assert all(text.find(name.encode()) >= 0 for name in (RECORDER[0], RECORDER[2], *FORMER))


SOCKETS = """
import psutil
from vaescale import distributed
def count():
    return sum(one.status == "ESTABLISHED" for one in psutil.Process().net_connections("tcp"))
distributed.init()
distributed.barrier()
before = count()
group = distributed.side_group()
distributed.barrier()
print(count() - before)
distributed.barrier()
"""


def test_the_side_group_connects_each_rank_to_its_neighbours_only(start: Start) -> None:
    """Four ranks in a ring have two each, and would have three if all were connected with all."""
    variables = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": "4",
        "PYTHONPATH": str(ROOT),
    }
    ranks = [start([sys.executable, "-c", SOCKETS], **variables, RANK=str(rank)) for rank in range(4)]
    assert [finish(rank, 120) for rank in ranks] == [(0, "2\n")] * 4
