"""Compares the formula of launch/plan.py with runs of two ranks on this machine: `python tests/benchmarks/plan.py`.

Each rank has one core, so compute time is that of one rank alone on one thread. The bandwidth is the one that the run
of two logs at its start. The latency is the additional time of a step of two ranks over one rank with a tiny model.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from vaescale import settings
from vaescale.advice.plan import Cluster, step_seconds, summed_bytes, sums

ROOT = Path(__file__).parents[2]
CASES = {
    "quickstart, 4 images a rank": (8, []),
    "quickstart, 1 image a rank": (2, []),
    "quickstart at width 256, 1 image a rank": (2, ["model.network.width=256", "model.network.residual_width=256"]),
}
TINY = ["model.network.width=8", "model.network.residual_width=8", "model.quantizer.codebook_size=16"]
UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default=str(ROOT / "data" / "photos"))
    parser.add_argument("--steps", type=int, default=80)
    arguments = parser.parse_args()
    print("| run | compute, ms | latency, ms | sums, ms | predicted, ms | measured, ms | predicted ÷ measured |")
    print("|---|---|---|---|---|---|---|")
    common = [f"data.root={arguments.data}", f"steps={arguments.steps}", "data.workers=0", "every.report=10"]
    common += ["every.validate=100000", "every.checkpoint=100000"]
    config = str(ROOT / "configs" / "quickstart.yaml")
    alone, _ = measured(1, config, [*common, *TINY, "global_batch=1"])
    together, _ = measured(2, config, [*common, *TINY, "global_batch=2"])
    for name, (batch, given) in CASES.items():
        given = [*common, *given]
        compute, _ = measured(1, config, [*given, f"global_batch={batch // 2}"])
        found, output = measured(2, config, [*given, f"global_batch={batch}"])
        number, unit = re.findall(r"([\d.]+) (\w+)/s per rank", output)[0]
        size = summed_bytes(settings.build(settings.load(config, given)))
        cluster = Cluster(1, 2, float(number) * UNITS[unit], 1.0, latency=together - alone)
        predicted = step_seconds(compute, size, cluster)
        parts = (compute, cluster.latency, sums(size, cluster), predicted, found)
        times = " | ".join(f"{1000 * seconds:.2f}" for seconds in parts)
        print(f"| {name} | {times} | {predicted / found:.3f} |", flush=True)


def measured(world: int, config: str, given: list[str]) -> tuple[float, str]:
    """Returns (seconds of a step without waiting for data, the median over all reports but the first; the output)."""
    with tempfile.TemporaryDirectory() as folder:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
        command = [
            sys.executable,
            *launcher,
            str(ROOT / "launch" / "train.py"),
            "--config",
            config,
            f"run={folder}",
            *given,
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, text=True)
        lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    reports = [line for line in lines if "perf/seconds_per_step" in line][1:]
    return statistics.median(
        one["perf/seconds_per_step"] * (1 - one["data/wait_share"]) for one in reports
    ), done.stdout


if __name__ == "__main__":
    main()
