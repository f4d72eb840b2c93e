"""DeepSpeed's own launcher over ssh, on two hosts."""

from pathlib import Path

import pytest

from tests.cluster.conftest import STEPS, Ssh, given
from tests.cluster.hosts import wait
from tests.conftest import Start, finish, free_port
from tests.faults.test_watch import last_step
from tests.integration.conftest import TINY
from tests.integration.test_resume import same_bits

pytestmark = pytest.mark.timeout(900)


def command(ssh: Ssh, *settings: str) -> list[str]:
    how = ["--hostfile", f"{ssh.folder}/hostfile", "--master_addr", "127.8.0.1", "--master_port", str(free_port())]
    return ["deepspeed", *how, "launch/train.py", "--config", str(TINY), *settings]


def test_two_hosts_train_the_same_bits(ssh: Ssh, alone: Path, pictures: Path, tmp_path: Path, start: Start) -> None:
    code, output = finish(start(command(ssh, *given(tmp_path / "run", pictures)), **ssh.environment))
    assert code == 0, output
    assert "host2: " in output
    same_bits(tmp_path / "run", alone, STEPS)


def test_a_host_that_dies_ends_the_job(ssh: Ssh, pictures: Path, tmp_path: Path, start: Start) -> None:
    run = tmp_path / "run"
    process = start(command(ssh, *given(run, pictures), "steps=100000"), **ssh.environment)
    wait(lambda: last_step(run) > 20, "training", 120)
    assert ssh.hosts.running("launch/train.py")
    ssh.hosts.kill("host2")
    code, output = finish(process)
    assert code != 0, output
    wait(lambda: not ssh.hosts.running("launch/train.py"), "no process is left")
