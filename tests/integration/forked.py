"""forked.py JOBS.json: import everything once, then run each job on freshly forked ranks, one job after another.

This is the cheapest test on real ranks, because torch and DeepSpeed are imported only once. A job is {"task": one of
TASKS, "world": W, "out": folder, …}. "code" is the expected exit code, if not 0: one for all ranks, a list with one per
rank, or None for any. codes.json in `out` has the actual ones. The docstring of a task says which other keys it reads
and what each rank writes to `out`. "events" are faults from outside: [seconds after the start, what, to whom], see
`happen`. With "patience", once a rank has failed, the others are killed after that many seconds, as launchers do.
"""

import gc
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch
from deepspeed.accelerator import get_accelerator
from safetensors.torch import save_file
from torch import Tensor

from tests import strict
from tests.faults import inject
from tests.integration import averaging, gathering, measuring, probe, traffic
from tests.training import duel
from vaescale import distributed, settings
from vaescale.interfaces import Batch
from vaescale.training.guard import MEMORY
from vaescale.training.trainer import Trainer

# DeepSpeed refuses fp16 on CPUs without fast fp16; slow is good enough for a test.
get_accelerator().is_fp16_supported = lambda: True


def main() -> int:
    gc.freeze()  # shared objects are then neither traversed nor copied
    for job in json.loads(Path(sys.argv[1]).read_text()):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        children = [fork(job, rank, port) for rank in range(job["world"])]
        over = threading.Event()
        events = threading.Thread(target=happen, args=(job, children, over))
        events.start()
        codes = ended(children, job.get("patience"))
        over.set()
        events.join()
        (Path(job["out"]) / "codes.json").write_text(json.dumps(codes))
        wanted = job.get("code", 0)
        if wanted is not None and codes != (wanted if isinstance(wanted, list) else [wanted] * job["world"]):
            print(f"{job}: exit codes {codes}")
            return 1
    return 0


def happen(job: dict[str, Any], children: list[int], over: threading.Event) -> None:
    """Apply the events of a job. An event sends a signal to a rank, to "all" or to a "worker" of rank 0's loader, or
    does "touch" on a file. The seconds count from the fork or, if "training" is true, from the first step that rank 0
    of a `launch` reports."""
    output = Path(job["out"]) / "output-0.txt"
    while job.get("training") and not (output.exists() and b"\nstep " in output.read_bytes()):
        if over.wait(0.01):
            return
    begun = time.monotonic()
    for seconds, what, whom in sorted(job.get("events", []), key=lambda event: event[0]):
        if over.wait(max(0.0, begun + seconds - time.monotonic())):
            return
        if what == "touch":
            Path(whom).touch()
            continue
        with suppress(ProcessLookupError, psutil.NoSuchProcess):
            for pid in targets(children, whom):
                os.kill(pid, signal.Signals[what])


def targets(children: list[int], whom: int | str) -> list[int]:
    if whom == "worker":
        return [child.pid for child in psutil.Process(children[0]).children()[:1]]
    return children if isinstance(whom, str) else [children[whom]]


def ended(children: list[int], patience: float | None) -> list[int]:
    """Wait for all children and return their exit codes."""
    codes: dict[int, int] = {}
    launcher: threading.Timer | None = None
    while len(codes) < len(children):
        pid, status = os.wait()
        codes[pid] = os.waitstatus_to_exitcode(status)
        if codes[pid] and patience is not None and not launcher:
            launcher = threading.Timer(patience, end, [[child for child in children if child != pid]])
            launcher.start()
    if launcher:
        launcher.cancel()
        launcher.join()
    return [codes[child] for child in children]


def end(children: list[int]) -> None:
    for child in children:
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)


def fork(job: dict[str, Any], rank: int, port: int) -> int:
    child = os.fork()
    if child:
        return child
    world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job["world"], "MASTER_PORT": port}
    os.environ.update({"MASTER_ADDR": "127.0.0.1", **{key: str(value) for key, value in world.items()}})
    # Ranks pinned to a core wake one another sooner: four on two cores take half the time.
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    try:
        distributed.init()
        strict.arm()
        TASKS[job["task"]](job)
        distributed.finish()
        code = 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    os._exit(code)


def train(job: dict[str, Any]) -> None:
    """Train a run in this process.

    Reads "config"; "overrides" [key=value …]; "stranded" [from, to], codes to be lost after the first step; "broken"
    [[fault, rank, steps, micro-batches] …], see probe.broken; "faults", see inject.py; "omitted", steps that the
    learner does not run; "settled", the step at which the guard is made to believe that it has seen enough steps.

    Writes taken-NAME.safetensors, the learner's tensors before the first step; rank-R.safetensors, the model's tensors;
    rank-R.json, the numbers of the samples that the rank saw, in order; and rank-R.txt, its log lines, including those
    that silent ranks do not print.
    """
    out = Path(job["out"])
    inject.arm(job)
    trainer = Trainer(settings.load(job["config"], job["overrides"]))
    for fault, rank, *where in job.get("broken", []):
        if rank == distributed.rank():
            trainer.model.forward = probe.broken(trainer.model, fault, *where)
    for name, tensors in trainer.learner.tensors().items():
        if distributed.rank() == 0:
            save_file({key: value.contiguous() for key, value in tensors.items()}, out / f"taken-{name}.safetensors")
    seen: list[int] = []
    said: list[str] = []
    metrics: dict[str, Tensor] = {}
    step, say = trainer.learner.step, trainer.console.say

    def recording(batches: Iterable[Batch], number: int) -> dict[str, Tensor]:
        nonlocal metrics
        held = list(batches)
        seen.extend(int(g) for batch in held for g in batch.sample)
        if number in job.get("omitted", []):
            # The averages do not change; only their copies of the buffers follow what a report has cleared.
            learner = trainer.learner
            learner.ema.update(trainer.model, learner.buffers, number, metrics["skipped"].new_ones(()))
            return {**metrics, "skipped": metrics["skipped"].new_ones(())}
        if number == job.get("settled"):
            trainer.learner.guard.load({"count": float(MEMORY)})
        metrics = step(held, number)
        if number == 0 and "stranded" in job:
            probe.strand(trainer.model, slice(*job["stranded"]))
        return metrics

    def saying(line: str) -> None:
        said.append(line + "\n")
        say(line)

    trainer.learner.step, trainer.console.say = recording, saying
    trainer.train()
    assert not gc.get_freeze_count(), "what the trainer froze would never be collected"
    probe.save(out, "", trainer.model)
    (out / f"rank-{distributed.rank()}.json").write_text(json.dumps(seen))
    (out / f"rank-{distributed.rank()}.txt").write_text("".join(said))


def violate(job: dict[str, Any]) -> None:
    """Break the rule "how" of the strict process group on rank 1, or on both ranks where one alone cannot."""
    other = distributed.rank() == 1
    breaches: dict[str, Callable[[], object]] = {
        "none": lambda: distributed.sum_(torch.ones(3)),
        "type": lambda: distributed.sum_(torch.ones(3, dtype=torch.int16)),
        "stride": lambda: distributed.sum_(torch.ones(3, 2).t()),
        "shape": lambda: distributed.sum_(torch.ones(3 + other)),
        "order": lambda: distributed.barrier() if other else distributed.sum_(torch.ones(3)),
    }
    breaches[job["how"]]()


TASKS = {
    "train": train,
    "launch": inject.launch,
    "cases": probe.every_case,
    "resets": probe.every_reset,
    "collectives": probe.collectives,
    "averaged": averaging.averaged,
    "gathered": gathering.gathered,
    "measured": measuring.measured,
    "traffic": traffic.counted,
    "duel": duel.duelled,
    "violate": violate,
}

if __name__ == "__main__":
    sys.exit(main())
