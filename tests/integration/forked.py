"""forked.py JOBS.json: import everything once, then do each job on freshly forked ranks, one job after another.

A job: {"task": one of TASKS, "world": W, "out": folder, …}, and "code" where its ranks do not end with 0, or a list of
each one's; what else a task reads and what each rank leaves in `out`, it says. The cheapest test on real ranks: one
import of torch and DeepSpeed serves all.
"""

import gc
import json
import os
import socket
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from deepspeed.accelerator import get_accelerator
from torch import Tensor

from tests.faults import inject
from tests.integration import probe
from vaescale import distributed
from vaescale.interfaces import Batch
from vaescale.training import settings
from vaescale.training.guard import MEMORY
from vaescale.training.trainer import Trainer

# Not every CPU has fast fp16, and DeepSpeed refuses it there; slow is good enough for a test.
get_accelerator().is_fp16_supported = lambda: True


def main() -> int:
    gc.freeze()  # what all ranks share is neither traversed nor copied
    for job in json.loads(Path(sys.argv[1]).read_text()):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        children = [fork(job, rank, port) for rank in range(job["world"])]
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        wanted = job.get("code", 0)
        if codes != (wanted if isinstance(wanted, list) else [wanted] * job["world"]):
            print(f"{job}: exit codes {codes}")
            return 1
    return 0


def fork(job: dict[str, Any], rank: int, port: int) -> int:
    child = os.fork()
    if child:
        return child
    world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job["world"], "MASTER_PORT": port}
    os.environ.update({"MASTER_ADDR": "127.0.0.1", **{key: str(value) for key, value in world.items()}})
    # Ranks that stay on their core wake one another sooner: four on two cores take half the time.
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    try:
        distributed.init()
        TASKS[job["task"]](job)
        distributed.finish()
        code = 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    os._exit(code)


def train(job: dict[str, Any]) -> None:
    """Reads "config", "overrides" [key=value …]; where codes are to be lost after the first step, "stranded" [from,
    to]; "broken" [[fault, rank, steps, micro-batches] …], see probe.broken; "omitted", the steps that the learner is
    not told of; and "settled", the step from which on the guard takes itself to have seen enough. Leaves the model's
    tensors, rank-R.safetensors, the sample numbers that the rank saw, in order, rank-R.json, and all that it said or,
    being silent, would have said, rank-R.txt."""
    out = Path(job["out"])
    trainer = Trainer(settings.load(job["config"], job["overrides"]))
    for fault, rank, *where in job.get("broken", []):
        if rank == distributed.rank():
            trainer.model.forward = probe.broken(trainer.model, fault, *where)
    seen: list[int] = []
    said: list[str] = []
    metrics: dict[str, Tensor] = {}
    step, say = trainer.learner.step, trainer.console.say

    def recording(batches: Iterable[Batch], number: int) -> dict[str, Tensor]:
        nonlocal metrics
        held = list(batches)
        seen.extend(int(g) for batch in held for g in batch.sample)
        if number in job.get("omitted", []):
            return metrics
        if number == job.get("settled"):
            trainer.learner.engine.guard.count.fill_(MEMORY)
        metrics = step(held, number)
        if number == 0 and "stranded" in job:
            probe.strand(trainer.model, slice(*job["stranded"]))
        return metrics

    def saying(line: str) -> None:
        said.append(line + "\n")
        say(line)

    trainer.learner.step, trainer.console.say = recording, saying
    trainer.train()
    probe.save(out, "", trainer.model)
    (out / f"rank-{distributed.rank()}.json").write_text(json.dumps(seen))
    (out / f"rank-{distributed.rank()}.txt").write_text("".join(said))


TASKS = {
    "train": train,
    "launch": inject.launch,
    "cases": probe.every_case,
    "resets": probe.every_reset,
    "collectives": probe.collectives,
}

if __name__ == "__main__":
    sys.exit(main())
