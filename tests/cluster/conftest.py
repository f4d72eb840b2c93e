"""A real SLURM controller with three nodes, and two hosts with real ssh daemons, removed after the tests."""

import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.hosts import SOON, Hosts, end, need, wait
from tests.conftest import ROOT, begin, finish, free_port
from tests.integration.conftest import TINY, forked, training

STEPS = 120

CONF = """
ClusterName=t
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmctldPort={port}
AuthType=auth/munge
# cred_expire is also the delay before a requeued job may start; 120 s as a rule
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0
MpiDefault=none
ReturnToService=2
SlurmctldTimeout=10
SlurmdTimeout=5
InactiveLimit=0
KillWait=30
SlurmdParameters=config_overrides
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Slurm:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.hosts = Hosts(folder, "node", "127.7.0", 3)
        for name in ("munge", "state"):
            (folder / name).mkdir(mode=0o755)
        host = socket.gethostname().split(".")[0]
        nodes = [
            f"NodeName={name} NodeHostname={host} NodeAddr={address} Port={free_port()} CPUs=2 RealMemory=2000"
            for name, address in self.hosts.addresses.items()
        ]
        text = CONF.format(host=host, port=free_port(), folder=folder)
        (folder / "slurm.conf").write_text("\n".join([text, *nodes]) + "\n")
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "OMP_NUM_THREADS": "1"}
        self.environment["PATH"] += ":/usr/sbin"

    def start(self) -> None:
        munge = self.folder / "munge"
        (munge / "key").touch(mode=0o600)
        (munge / "key").write_bytes(os.urandom(128))
        files = [f"--{name}-file={munge / name}" for name in ("key", "pid", "seed", "log")]
        self.daemons = [self.begin("munged", "--foreground", "--force", f"--socket={munge / 'socket'}", *files)]
        wait((munge / "socket").exists, "munged")
        self.daemons.append(self.begin("slurmctld", "-D"))
        for node in self.hosts.addresses:
            self.start_node(node)
        self.wait_until_idle()

    def wait_until_idle(self, seconds: float = SOON) -> None:
        wait(lambda: self.said("sinfo", "-h", "-N", "-t", "idle", "-o", "%N").count("\n") == 3, "idle nodes", seconds)

    def begin(self, *command: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"{command[0]}.out").open("ab") as out:
            return subprocess.Popen(command, stdout=out, stderr=out, env=self.environment, start_new_session=True)

    def start_node(self, node: str) -> None:
        variables = [f"SLURM_CONF={self.environment['SLURM_CONF']}", f"PATH={self.environment['PATH']}"]
        self.hosts.start(node, ["env", *variables, "slurmd", "-D", "-N", node])

    def stop(self) -> None:
        self.said("scancel", "--user", "root")
        self.hosts.kill_all()
        for daemon in reversed(self.daemons):
            end(daemon)

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=120)

    def said(self, *command: str) -> str:
        return self.run(*command).stdout

    def submit(self, config: Path, *arguments: str) -> str:
        """Submits with launch/slurm/submit.py, on two CPU nodes with one rank each. Returns the job's number."""
        given = ["--nodes=2", "--accelerators=1", "--cpu", "--cpus-per-task=1", "--time=10"]
        output = f"output={self.folder}/job-%j.log"
        command = [sys.executable, "launch/slurm/submit.py", str(config), *given, "--option", output, *arguments]
        code, printed = finish(begin(command, **self.environment))
        assert code == 0, printed
        return re.findall(r"^job (\d+): ", printed, re.MULTILINE)[0]

    def job(self, number: str, key: str) -> str:
        """Returns the value of this key in `scontrol show job`."""
        found = re.search(rf"\b{key}=(\S+)", self.said("scontrol", "show", "job", number))
        return found[1] if found else ""

    def wait_for(self, number: str, states: str = "COMPLETED|FAILED|CANCELLED", seconds: float = 180) -> str:
        """Waits until the job is in one of these states, and returns it."""
        wait(lambda: re.fullmatch(states, self.job(number, "JobState")), f"job {number} {states}", seconds)
        return self.job(number, "JobState")

    def log(self, number: str) -> str:
        return (self.folder / f"job-{number}.log").read_text()


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    need("slurmctld", "slurmd", "sbatch", "munged", "unshare")
    cluster = Slurm(tmp_path_factory.mktemp("slurm"))
    cluster.start()
    yield cluster
    cluster.stop()


SSHD = """
Port {port}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
StrictModes no
PermitRootLogin prohibit-password
PasswordAuthentication no
UsePAM no
PidFile none
"""
SSH = """
Host *
  IdentityFile {folder}/key
  IdentitiesOnly yes
  Port {port}
  User root
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
"""


class Ssh:
    """Hosts that `deepspeed --hostfile` reaches with `environment`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.hosts = Hosts(folder, "host", "127.8.0", 2)
        port = free_port()
        for key in ("key", "host_key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)], check=True)
        (folder / "sshd_config").write_text(SSHD.format(folder=folder, port=port))
        names = [f"Host {name}\n  HostName {address}\n" for name, address in self.hosts.addresses.items()]
        (folder / "ssh_config").write_text("".join(names) + SSH.format(folder=folder, port=port))
        (folder / "bin").mkdir()
        wrapper = folder / "bin" / "ssh"
        wrapper.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/ssh_config "$@"\n')
        wrapper.chmod(0o755)
        (folder / "hostfile").write_text("".join(f"{name} slots=1\n" for name in self.hosts.addresses))
        (folder / "variables").write_text("OMP_NUM_THREADS=1\nTORCHDYNAMO_DISABLE=1\n")
        path = f"{folder}/bin:{os.environ['PATH']}"
        self.environment = {"PATH": path, "DS_ENV_FILE": str(folder / "variables")}

    def start(self) -> None:
        sshd = f"mkdir -p /run/sshd && exec /usr/sbin/sshd -D -e -f {self.folder}/sshd_config"
        for name, address in self.hosts.addresses.items():
            self.hosts.start(name, ["sh", "-c", f"{sshd} -o ListenAddress={address}"])
            wait(lambda name=name: self.reaches(name), f"sshd of {name}")

    def reaches(self, name: str) -> bool:
        return not subprocess.run([self.folder / "bin" / "ssh", name, "true"], capture_output=True).returncode


@pytest.fixture(scope="session")
def ssh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ssh]:
    need("ssh", "sshd", "ssh-keygen", "pdsh", "unshare")
    cluster = Ssh(tmp_path_factory.mktemp("ssh"))
    cluster.start()
    yield cluster
    cluster.hosts.kill_all()


@pytest.fixture(scope="session")
def alone(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run with two ranks on one machine."""
    folder = tmp_path_factory.mktemp("alone")
    forked(folder, [training(folder, TINY, given(folder / "run", pictures), 2)])
    return folder / "run"


def given(run: Path, pictures: Path) -> list[str]:
    """The settings of the runs in these tests."""
    return [f"run={run}", f"data.root={pictures}", f"steps={STEPS}", "every.checkpoint=25", "every.validate=100"]
