"""One rank that measures a codec and compares its images: `-m tests.integration.comparing DATA OUT MICRO…`."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from vaescale import distributed
from vaescale.data import stream
from vaescale.evaluation import compare, reference
from vaescale.evaluation.compare import Refused, Request
from vaescale.evaluation.generation import Generated
from vaescale.evaluation.measure import measure
from vaescale.evaluation.nearest import features_of, search
from vaescale.interfaces import Batch
from vaescale.nn import features


class Blur:
    """Means of 2 × 2 pixels, computed for each image alone, with codes to count."""

    def encode(self, batch: Batch, temperature: float = 0.0) -> list[Tensor]:
        return [F.avg_pool2d(batch.x.float(), 2)]

    def decode(self, latents: list[Tensor], *_: object, **__: object) -> Tensor:
        return F.interpolate(latents[0], scale_factor=2) / 255


def main(data: str, out: Path, micros: list[int]) -> None:
    """Writes OUT.MICRO.json, and OUT.MICRO.RANK with why a damaged image is refused."""
    device = distributed.init()
    for micro in micros:
        results(data, micro, out.with_suffix(f".{micro}"), device)
    distributed.finish()


def results(data: str, micro: int, out: Path, device: torch.device) -> None:
    net = features.drawn("random")
    slices = stream.ValidationSlices(stream.Config(root=data, size=16, workers=0))

    def generate(count: int, rank: int, world: int) -> Iterator[Generated]:
        for part in torch.arange(rank, count, world).split(micro):
            yield Generated(part, part, torch.stack([noise(int(one)) for one in part]))

    requests = [Request(*one, net.words) for one in compare.chosen(compare.NAMES, ["random"])["random"]]
    result = measure(Blur(), slices, device, requests, [net], 53, generate, micro=micro)
    some = measure(Blur(), slices, device, requests[:3], [net], micro=micro, used=40)  # of 101 images
    result |= {f"{name} of 40": some[name] for name in some if "random" in name}
    known = reference.gather(slices, net, device, micro=micro)
    drawn = ((part.number, part.x) for part in generate(53, distributed.rank(), distributed.world()))
    rows = features_of(net, 53, drawn, noise(0)[None])
    distances, numbers = search(rows, net, slices, device)
    for name, found in (("known", known.covariance), ("drawn", rows), ("near", distances), ("numbers", numbers)):
        weights = torch.arange(1.0, found.numel() + 1, dtype=torch.float64)  # tell the order, too
        result[name] = float(found.flatten().double() @ weights)
    damaged = stream.ValidationSlices(stream.Config(root=f"{data}/damaged", size=16, workers=0))
    try:
        reference.gather(damaged, net, device, micro=micro)
    except Refused as error:
        Path(f"{out}.{distributed.rank()}").write_text(str(error))
    if distributed.rank() == 0:
        Path(f"{out}.json").write_text(json.dumps(result))


def noise(seed: int) -> Tensor:
    return torch.randint(0, 256, (3, 16, 16), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), list(map(int, sys.argv[3:])))
