"""Trainings that SLURM starts, stops, loses and restarts, under a real controller; all end with the same bits."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from tests.cluster.conftest import STEPS, Slurm, given
from tests.cluster.hosts import wait
from tests.conftest import free_port
from tests.faults.test_stops import status
from tests.faults.test_watch import last_step
from tests.integration.conftest import TINY
from tests.integration.test_resume import same_bits
from vaescale.advice import postmortem
from vaescale.lifecycle.checkpoint import verify

pytestmark = pytest.mark.timeout(900)


def one_curve(run: Path) -> None:
    steps = [line["step"] for line in postmortem.read_metrics(run) if "train/loss" in line]
    assert steps == list(range(1, STEPS + 1))


def test_a_submitted_training_is_that_of_one_machine(slurm: Slurm, alone: Path, pictures: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = slurm.submit(TINY, *given(run, pictures))
    assert slurm.wait_for(job) == "COMPLETED", slurm.log(job)
    assert slurm.job(job, "NodeList") == "node[1-2]"
    assert "2 rank(s)" in slurm.log(job)
    same_bits(run, alone, STEPS)


@pytest.mark.long
def test_other_launchers_on_two_nodes_train_the_same_bits(
    slurm: Slurm, alone: Path, pictures: Path, tmp_path: Path
) -> None:
    """torchrun within a job, and `deepspeed --launcher slurm`, which starts one."""
    run = tmp_path / "torchrun"
    train = shlex.join(["launch/train.py", "--config", str(TINY), *given(run, pictures)])
    port = free_port()
    torchrun = (
        f"srun torchrun --nnodes 2 --nproc-per-node 1 --rdzv-backend c10d --rdzv-endpoint node1:{port} "
        f"--rdzv-id $SLURM_JOB_ID {train}"
    )
    log = slurm.folder / "torchrun.log"
    done = slurm.run("sbatch", "--parsable", "-N2", "--ntasks-per-node=1", f"--output={log}", f"--wrap={torchrun}")
    assert slurm.wait_for(done.stdout.strip()) == "COMPLETED", log.read_text()
    same_bits(run, alone, STEPS)

    run = tmp_path / "deepspeed"
    (tmp_path / "hostfile").write_text("node1 slots=1\nnode2 slots=1\n")
    slurm.environment.update(MASTER_ADDR="node1", MASTER_PORT=str(free_port()))
    how = ["--hostfile", str(tmp_path / "hostfile"), "--no_ssh_check", "--master_addr", "node1", "--launcher", "slurm"]
    how += ["--launcher_args", "--nodes 2 --ntasks-per-node 1"]
    done = slurm.run("deepspeed", *how, "launch/train.py", "--config", str(TINY), *given(run, pictures))
    assert done.returncode == 0, done.stdout + done.stderr
    same_bits(run, alone, STEPS)


def test_a_signal_requeues_the_job_and_the_bits_are_the_same(
    slurm: Slurm, alone: Path, pictures: Path, tmp_path: Path
) -> None:
    """USR1 is sent to the tasks, as SLURM does before the time limit."""
    run = tmp_path / "run"
    job = slurm.submit(TINY, *given(run, pictures))
    wait(lambda: last_step(run) > 20, "training")
    slurm.run("scancel", "--signal=USR1", job)
    wait(lambda: (run / "run_status.json").exists() and status(run)["status"] == "preempted", "the stop")
    assert status(run)["why"] == "SIGUSR1"
    assert slurm.wait_for(job) == "COMPLETED", slurm.log(job)
    assert slurm.job(job, "Restarts") == "1"
    log = slurm.log(job)
    assert [int(attempt) for attempt in re.findall(r"^== attempt (\d) of job", log, re.MULTILINE)] == [0, 1]
    assert "(SIGUSR1). Run the same command to continue." in log
    assert "resumes at step" in log
    one_curve(run)
    same_bits(run, alone, STEPS)


@pytest.mark.long
def test_a_node_that_dies_costs_an_interval(slurm: Slurm, alone: Path, pictures: Path, tmp_path: Path) -> None:
    """The node's slurmd and everything on it are killed. SLURM gives the job a third node."""
    run = tmp_path / "run"
    job = slurm.submit(TINY, *given(run, pictures))
    wait(lambda: last_step(run) > 60, "training")
    slurm.hosts.kill("node2")
    try:
        wait(lambda: slurm.job(job, "Restarts") == "1", "the requeue", 120)
        assert slurm.wait_for(job) == "COMPLETED", slurm.log(job)
        assert slurm.job(job, "NodeList") == "node[1,3]"
    finally:
        slurm.start_node("node2")
        slurm.wait_until_idle(120)
    (resumed,) = re.findall(r"resumes at step (\d+):", slurm.log(job))
    assert 50 <= int(resumed) < STEPS
    assert int(resumed) % 25 == 0
    one_curve(run)
    same_bits(run, alone, STEPS)


def test_wrong_settings_fail_once(slurm: Slurm, pictures: Path, tmp_path: Path) -> None:
    """A typo is not submitted; missing data are found by the job."""
    jobs = slurm.said("squeue", "-h", "-o", "%i")
    done = slurm.run(sys.executable, "launch/slurm/submit.py", str(TINY), "--time=1", "stesp=3")
    assert (done.returncode, done.stdout) == (2, "")
    assert "did you mean steps?" in done.stderr
    assert slurm.said("squeue", "-h", "-o", "%i") == jobs
    job = slurm.submit(TINY, f"run={tmp_path / 'run'}", f"data.root={tmp_path}")
    assert slurm.wait_for(job) == "FAILED"
    assert slurm.job(job, "ExitCode") == "2:0"
    assert slurm.job(job, "Restarts") == "0"
    assert re.search(r"^error: rank 0: .*train", slurm.log(job), re.MULTILINE)


@pytest.mark.long
def test_a_run_without_progress_is_not_requeued(slurm: Slurm, pictures: Path, tmp_path: Path) -> None:
    """The run has failed twice with the same error at the same step, and does so again."""
    run = tmp_path / "run"
    failing = [*given(run, pictures), "optimizer.lr=1e30", "optimizer.max_skipped_steps=3"]
    job = slurm.submit(TINY, *failing)
    assert slurm.wait_for(job) == "FAILED"
    assert (slurm.job(job, "ExitCode"), slurm.job(job, "Restarts")) == ("3:0", "0")
    said = status(run)
    said["failures"] *= 2
    (run / "run_status.json").write_text(json.dumps(said))
    job = slurm.submit(TINY, *failing)
    assert slurm.wait_for(job) == "FAILED"
    assert (slurm.job(job, "ExitCode"), slurm.job(job, "Restarts")) == ("93:0", "0")


@pytest.mark.long
def test_a_cancelled_run_saves_and_is_not_requeued(slurm: Slurm, pictures: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = slurm.submit(TINY, *given(run, pictures), "steps=100000")
    wait(lambda: last_step(run) > 20, "training")
    slurm.run("scancel", job)
    assert slurm.wait_for(job) == "CANCELLED"
    wait(lambda: not slurm.hosts.running("launch/train.py"), "no process is left")
    assert (status(run)["status"], status(run)["why"]) == ("preempted", "SIGTERM")
    assert verify(run / "checkpoints" / f"step-{status(run)['step']:08d}") == []
    assert not (run / "STOP").exists()
    assert slurm.job(job, "Restarts") == "0"


@pytest.mark.long
def test_a_sweep_and_what_follows_it(slurm: Slurm, pictures: Path, tmp_path: Path) -> None:
    """Each value has its own run; the evaluation waits for all of them."""
    run = tmp_path / "run"
    sweep = ["--sweep=seed=1,2", "--evaluate", "--nodes=1"]
    job = slurm.submit(TINY, *sweep, f"run={run}", f"data.root={pictures}", "every.validate=12")
    runs = [run / f"seed={seed}" for seed in (1, 2)]
    wait(lambda: all((one / "evaluation.json").exists() for one in runs), f"the evaluation after job {job}", 180)
    assert [status(one)["status"] for one in runs] == ["finished"] * 2
    assert all(f"seed: {seed}\n" in (one / "config.yaml").read_text() for seed, one in zip((1, 2), runs, strict=True))


@pytest.mark.long
def test_the_time_limit_requeues_the_job(slurm: Slurm, pictures: Path, tmp_path: Path) -> None:
    """A time limit of a minute, with the signal 40 s before; SLURM checks the time every 30 s."""
    run = tmp_path / "run"
    times = ("--time=1", "--option", "signal=USR1@40", "stop_before=0")
    job = slurm.submit(TINY, *given(run, pictures), "steps=100000", *times)
    wait(lambda: slurm.job(job, "Restarts") == "1", "the requeue", 120)
    assert (status(run)["status"], status(run)["why"]) == ("preempted", "SIGUSR1")
    before = status(run)["step"]
    wait(lambda: f"resumes at step {before}:" in slurm.log(job), "the next attempt", 60)
    slurm.run("scancel", job)
    assert slurm.wait_for(job) == "CANCELLED"
