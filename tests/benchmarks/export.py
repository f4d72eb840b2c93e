"""Measures the export of codes: `python tests/benchmarks/export.py [--rounds 5] [--images 640] [key=value …]`.

It is compared with plain loops that encode the same batches with the same network and keep the codes in memory: one
over images that were decoded beforehand, and one over images that the same number of workers decode. So the ratio to
the first says how much reading, decoding, writing and hashing slow an export down, that to the second how much writing
and hashing do. Both sides take turns in this process; a ratio is the median over rounds of theirs ÷ ours in seconds. On
a busy machine only CPU time says something; on an idle one wall-clock time hides what the workers and the writing
thread do.
"""

import argparse
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from paired import clock_of, paired

from vaescale import distributed, numerics, settings
from vaescale.data import shards, stream
from vaescale.data.index import Index
from vaescale.export import jobs
from vaescale.export.write import AT_ONCE, write
from vaescale.interfaces import Batch

CONFIG = Path(__file__).parents[2] / "configs" / "quickstart.yaml"


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default=str(CONFIG))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=640)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    given = parser.parse_intermixed_args()
    device = distributed.init()
    numerics.choose(tf32=False, deterministic=False)
    config = settings.load(given.config, given.overrides)
    codec = settings.build(config).to(device).eval()
    with tempfile.TemporaryDirectory() as folder:
        data = replace(config.data, root=copied(config.data, given.images, Path(folder) / "images"))
        config = replace(config, data=data)
        slices = stream.TrainingOnce(data)
        count = len(slices.samples.index)
        batches = [slices[range(i, min(i + AT_ONCE, count))].batch for i in range(0, count, AT_ONCE)]
        out = Path(folder) / "codes"

        def encode(given: Iterable[Batch]) -> list[torch.Tensor]:
            with numerics.exact(), numerics.repeatable():
                return [torch.stack(codec.encode(batch.to(device)), 1).cpu() for batch in given]

        def loaded() -> Iterator[Batch]:
            loader = stream.validation_loader(slices, AT_ONCE, 0, 1, device.type == "cuda")
            return (decoded.batch for decoded in loader)

        loops = {"decoded beforehand": lambda: encode(batches), "decoded by workers": lambda: encode(loaded())}

        def export() -> None:
            shutil.rmtree(out, ignore_errors=True)
            job = jobs.of_codes(codec, Path("run"), config, "train", "center", out, 10_000, device)
            write(job, device)

        print(f"{device}, torch {torch.__version__}, {given.rounds} rounds, {count} images of {data.size} px, ", end="")
        print(f"{torch.get_num_threads()} threads, {data.workers} workers\n")
        print("| images/s, by | images are | encoding alone | export | ratio | aim |\n|---|---|---:|---:|---:|---|")
        for what, clock in (("wall-clock time", clock_of(device.type)), ("CPU time of all processes", cpu)):
            for name, loop in loops.items():
                theirs, ours, ratio = paired(loop, export, count, given.rounds, clock)
                aim = f"≥ 0.9, {'met' if ratio >= 0.9 else 'missed'}"
                cells = f"{1000 / theirs:.1f} | {1000 / ours:.1f} | {ratio:.3f} | {aim}"
                print(f"| {what} | {name} | {cells} |", flush=True)
        print(f"\n{Index(out).shards[0].bytes / count:.0f} bytes per image")
    distributed.finish()


def cpu() -> float:
    """Returns the CPU time of this process and of the loader's, which have ended, in seconds."""
    return sum(os.times()[:4])


def copied(data: stream.Config, count: int, root: Path) -> str:
    """Writes the first `count` training images, repeated if there are fewer, to root/train. Returns the root."""
    source = stream.Samples(Path(data.root) / "train")
    samples = (shards.Sample(f"{i:06d}", *source.read(i % len(source.index))) for i in range(count))
    shards.write(root / "train", samples, 250, [])
    return str(root)


if __name__ == "__main__":
    main()
