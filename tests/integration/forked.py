"""forked.py CASES.json: import everything once, then train each case in freshly forked ranks, one case after another.

A case: {"world": W, "out": folder, "config": file, "overrides": [key=value …]}. Each rank leaves in `out` its
model's tensors as rank-R.safetensors and the sample numbers it saw, in order, as rank-R.json. The cheapest test on real
ranks: one import of torch and DeepSpeed serves all.
"""

import json
import os
import socket
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path

from deepspeed.accelerator import get_accelerator
from safetensors.torch import save_file

from vaescale import distributed
from vaescale.interfaces import Batch
from vaescale.training import settings
from vaescale.training.trainer import Trainer

# Not every CPU has fast fp16, and DeepSpeed refuses it there; slow is good enough for a test.
get_accelerator().is_fp16_supported = lambda: True


def main() -> int:
    for case in json.loads(Path(sys.argv[1]).read_text()):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        children = [fork(case, rank, port) for rank in range(case["world"])]
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        if any(codes):
            print(f"{case}: exit codes {codes}")
            return 1
    return 0


def fork(case: dict, rank: int, port: int) -> int:
    child = os.fork()
    if child:
        return child
    world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": case["world"], "MASTER_PORT": port}
    os.environ.update({"MASTER_ADDR": "127.0.0.1", **{key: str(value) for key, value in world.items()}})
    try:
        train(case, rank)
        code = 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    os._exit(code)


def train(case: dict, rank: int) -> None:
    out = Path(case["out"])
    trainer = Trainer(settings.load(case["config"], case["overrides"]))
    seen: list[int] = []
    step = trainer.learner.step

    def recording(batches: Iterable[Batch], number: int) -> dict:
        held = list(batches)
        seen.extend(int(g) for batch in held for g in batch.sample)
        return step(held, number)

    trainer.learner.step = recording
    trainer.train()
    save_file(
        {name: value.contiguous() for name, value in trainer.model.state_dict().items()},
        out / f"rank-{rank}.safetensors",
    )
    (out / f"rank-{rank}.json").write_text(json.dumps(seen))
    distributed.finish()


if __name__ == "__main__":
    sys.exit(main())
