"""Nearest training images: a picture of them next to generated images and reconstructions, and a test for copying.

Distances are between the features of a network. The test is that of Meehan, Chaudhuri, Dasgupta 2020, "A non-parametric
test to detect data-copying in generative models", section 3, without its division of the space into cells.
"""

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .. import distributed
from ..data import stream
from ..interfaces import Codec
from ..monitoring.pictures import Picture, grid, joined
from ..nn.features import Features
from .candidate import Candidate, generator_of
from .compare import Gathering, Refused
from .evaluate import reconstruct
from .measure import Drawing, Generate, try_to

QUERIES = 1000  # images whose nearest training images are searched, of each kind
SHOWN = 8  # of them in a picture
NEIGHBOURS = 3
MICRO = 32  # images at a time
HOW = (
    "nearer: share of pairs of a generated and a held-out image of which the generated one is nearer to its nearest "
    "training image, by features (Meehan et al. 2020, without cells); 0.5 if nothing is copied; nearer_reconstruction: "
    "the same of reconstructions of the held-out images"
)


def share_nearer(ours: Tensor, others: Tensor) -> float:
    """Returns the share of pairs of which the first distance is smaller, with half of the equal ones. ours [N], others
    [M]. It is the Mann-Whitney statistic divided by N · M."""
    ordered, ours = others.sort().values, ours.contiguous()
    below = len(others) - torch.searchsorted(ordered, ours, right=True)
    not_above = len(others) - torch.searchsorted(ordered, ours)
    return float((below + not_above).double().mean()) / (2 * len(others))


def require_enough(training: stream.TrainingOnce) -> None:
    """Raises Refused if there are too few training images."""
    if len(training.samples.index) < NEIGHBOURS:
        raise _too_few(training)


def _too_few(training: stream.ValidationSlices) -> Refused:
    return Refused(
        f"{training.samples.index.folder} has fewer than the {NEIGHBOURS} images that are searched for each image: "
        "give a data.root with more of them, or leave out --nearest"
    )


def features_of(net: Features, count: int, batches: Iterable[tuple[Tensor, Tensor]], blank: Tensor) -> Tensor:
    """Returns the features of `count` images, fp32 [count, D] on the CPU, from this rank's batches of numbers and
    images. Collective."""
    gathering = Gathering([net], count, blank)
    for numbers, x in batches:
        gathering.add(numbers, x)
    return gathering.result()[net.words].rows


def search(
    queries: Tensor, net: Features, slices: stream.ValidationSlices, device: torch.device, watched: bool = False
) -> tuple[Tensor, Tensor]:
    """Returns the distances to the NEIGHBOURS nearest images of `slices`, fp64 [Q, NEIGHBOURS], ascending, and their
    numbers, int64. queries: fp32 [Q, D], the same on all ranks; net: on the device. Raises Refused if there are fewer
    images, without the damaged ones. Collective."""
    rows = queries.to(device).double()
    best = rows.new_full((len(rows), NEIGHBOURS), torch.inf)
    numbers = torch.full_like(best, -1)  # exact up to 2⁵³
    for decoded in filter(None, stream.once(slices, MICRO, device, "nearest", watched)):
        x, sample = decoded.batch.x, decoded.batch.sample
        found = torch.cdist(rows, net(x)[0].double(), compute_mode="donot_use_mm_for_euclid_dist")
        best, numbers = _nearest(torch.cat([best, found], 1), torch.cat([numbers, sample.expand_as(found)], 1))
    of_all = distributed.gather(torch.stack([best, numbers]))  # [W, 2, Q, NEIGHBOURS]
    best, numbers = _nearest(*of_all.permute(1, 2, 0, 3).flatten(2))
    if (numbers < 0).any():
        raise _too_few(slices)
    return best, numbers.long()


def _nearest(distances: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """The NEIGHBOURS smallest of each row, ascending."""
    found, places = distances.topk(NEIGHBOURS, largest=False)
    return found, numbers.gather(1, places)


def of(candidate: Candidate, net: Features, drawing: Drawing, device: torch.device) -> tuple[Picture, dict[str, Any]]:
    """Returns the picture, and for evaluation.json the shares of nearer images with how they were measured. net: on the
    device. Collective."""
    generate = generator_of(candidate, drawing, device)
    watched = distributed.rank() == 0 and sys.stderr.isatty()
    possible: Generate | None = generate
    try:
        try_to(generate)
    except Refused:
        possible = None
    picture, found = compare_with_training(candidate.codec, candidate.data, net, device, possible, watched)
    how: dict[str, Any] = {"labels": drawing.labels, "seed": drawing.seed, "temperature": drawing.temperature}
    how["training"] = stream.TrainingOnce(candidate.data).samples.index.fingerprint()
    return picture, {**found, "how": HOW, "queries": QUERIES, "features": {"words": net.words, **net.protocol}, **how}


def in_words(found: dict[str, Any]) -> str:
    """Describes the second result of `of`."""
    share = f"a reconstruction in {found['nearer_reconstruction']:.1%} (50%: nothing is copied)"
    if "nearer" in found:
        share = f"a generated image in {found['nearer']:.1%} of pairs, {share}"
    else:
        share += "; the codec has no prior to generate images from"
    return f"nearest training images; nearer to one than a held-out image is {share}"


@torch.no_grad()
def compare_with_training(
    codec: Codec, data: stream.Config, net: Features, device: torch.device, generate: Generate | None, watched: bool
) -> tuple[Picture, dict[str, float]]:
    """Returns the picture of generated images (without `generate`, of none) and reconstructions next to their nearest
    training images, and as "nearer" the share of pairs of a generated and a held-out image of which the generated one
    is nearer to a training image: 0.5 if the model copies nothing, 1 if it only copies. "nearer_reconstruction" is that
    of the reconstructions of the held-out images. Raises Refused. Collective."""
    rank, world = distributed.rank(), distributed.world()
    held_out, training = stream.ValidationSlices(data), stream.TrainingOnce(data)
    require_enough(training)
    total = len(held_out.samples.index)
    chosen = [k * total // min(QUERIES, total) for k in range(min(QUERIES, total))]
    blank = torch.zeros(1, data.channels, data.size, data.size, dtype=torch.uint8, device=device)
    of_x, of_y = (Gathering([net], len(chosen), blank) for _ in range(2))
    for part in torch.arange(rank, len(chosen), world).split(MICRO):
        batch = stream.chosen_images(held_out, [chosen[k] for k in part.tolist()]).to(device)
        of_x.add(part.to(device), batch.x)
        of_y.add(part.to(device), reconstruct(codec, batch)[0])
    y, _ = reconstruct(codec, stream.fixed_images(held_out).to(device))
    queries = [*(one.result()[net.words].rows for one in (of_x, of_y)), net(y)[0].cpu()]
    images = {"reconstruction": y}
    if generate:
        drawn = ((batch.number, batch.x) for batch in generate(QUERIES, rank, world))
        queries.append(features_of(net, QUERIES, drawn, blank))
        images = {"generated": torch.cat([batch.x for batch in generate(SHOWN, 0, 1)]), **images}
    distances, numbers = search(torch.cat(queries), net, training, device, watched)
    sizes = [len(one) for one in queries]
    of_held_out, of_reconstruction, *_, of_last = (part[:, 0] for part in distances.split(sizes))
    found = {"nearer": share_nearer(of_last, of_held_out)} if generate else {}
    found["nearer_reconstruction"] = share_nearer(of_reconstruction, of_held_out)
    places = {"reconstruction": numbers.split(sizes)[2], "generated": numbers.split(sizes)[-1]}
    blocks = [_block(training, name, x, places[name][: len(x)]) for name, x in images.items()]
    return joined(blocks, axis=1), found


def _block(training: stream.ValidationSlices, name: str, x: Tensor, numbers: Tensor) -> Picture:
    neighbours = stream.chosen_images(training, numbers.flatten().tolist()).x.unflatten(0, numbers.shape)
    images = torch.cat([x.cpu()[:, None], neighbours], dim=1).flatten(0, 1)
    return grid(images, 1 + NEIGHBOURS, [name, "nearest", "second", "third"], title=f"{name} and training images")
