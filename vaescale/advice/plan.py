"""Estimates the cost of a training on more accelerators than are at hand: time, bandwidths, storage.

W = N·G ranks on N nodes of G accelerators, each with its share of the batch. A step takes

    compute   = time of one accelerator for its share, measured
    latency   = extra time of a step on several ranks that does not depend on the size of the sums, measured with a
                tiny model
    straggler = jitter · compute · sqrt(2 ln W): how far the largest of W normally distributed times lies above their
                mean; jitter is their standard deviation as a share of the mean
    exposed   = the collectives below; of the gradients that average.py sums during the backward pass, at ZeRO 0, only
                a share, which is assumed: 1, the default, means that nothing overlaps

    all-reduce = 2 (G − 1)/G · bytes/inside + 2 (N − 1)/N · bytes/between: within each node a ring reduce-scatter and
                 all-gather; between nodes a ring all-reduce of each accelerator's share, where all shares of a node go
                 through its network (Patarasuk, Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of
                 workstations")
    all-gather = half of that

traffic.py says which collectives a step has. `terms` lists everything that grows with the number of ranks, each with
its formula and assumption; rarer costs have their own row and are not part of a step's time.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from torch import nn

from ..data import DataError
from ..data.index import RECORD, Index
from ..files import readable_size
from ..settings import Config, build, build_critic, micro_batch
from .traffic import GATHER, SUM, Collective, traffic

IMAGE = 110_000  # mean bytes of an ImageNet image
IMAGES, SHARDS = (1_281_167, 50_000), 1_282  # of ImageNet's training and validation sets; shards of 1,000 images
DECODE = 2.2e-3  # seconds of one core to decode an image and crop it to 128 px: vaescale/data/README.md, Speed
HOP = 5e-6  # seconds of a small message between devices; assumed
SIDE_HOP = 30e-6  # seconds of a small message between hosts over TCP; assumed
HOST = 10e9  # bytes per second from a device to its host; assumed
DISK = 1e9  # bytes per second to and from the disk of checkpoints and the index; assumed
# Measured on one CPU core of 2, with `vqvae_imagenet128` at width 8:
REPORT = 4.3e-3  # seconds in which rank 0 writes 60 numbers
PICTURES = 1.5  # seconds in which rank 0 draws and writes the pictures of a validation
HASH = 5e-9  # seconds per record to check the index


@dataclass(frozen=True)
class Cluster:
    nodes: int
    accelerators: int  # per node
    inside: float  # bytes per second through each accelerator in an all-reduce within a node
    between: float  # bytes per second into and out of a node
    jitter: float = 0.02  # standard deviation of the compute time, as a share of it
    latency: float = 0.0  # seconds per step
    exposed: float = 1.0  # share of the gradients' sums at ZeRO 0 that does not overlap with the backward pass

    @property
    def world(self) -> int:
        return self.nodes * self.accelerators

    def of(self, world: int) -> "Cluster":
        """Returns as many of these nodes as have this many ranks, or a part of one. `world` fills them."""
        inside = min(world, self.accelerators)
        return replace(self, nodes=math.ceil(world / inside), accelerators=inside)


class Term(NamedTuple):
    """One cost. value: seconds, or another quantity, as text."""

    when: str
    what: str
    value: str
    formula: str


class Data(NamedTuple):
    images: tuple[int, int]  # of the training and the validation set
    bytes: float  # of the training set
    shards: int
    source: str


def summed_bytes(model: nn.Module) -> int:
    """Returns the bytes that ranks sum in a step at ZeRO 0, with all buffers."""
    return sum(4 * p.numel() for p in model.parameters()) + sum(b.nbytes for b in model.buffers())


def sums(size: float, cluster: Cluster) -> float:
    """Returns the seconds to sum `size` bytes over all ranks."""
    n, g = cluster.nodes, cluster.accelerators
    return 2 * (g - 1) / g * size / cluster.inside + 2 * (n - 1) / n * size / cluster.between


def small(cluster: Cluster) -> float:
    """Returns the seconds of a collective of a few bytes, up and down a binary tree of all ranks."""
    return 2 * math.ceil(math.log2(cluster.world)) * HOP


def straggler(compute: float, cluster: Cluster) -> float:
    return cluster.jitter * compute * math.sqrt(2 * math.log(cluster.world))


def step_seconds(compute: float, size: float, cluster: Cluster) -> float:
    """size: bytes summed that do not overlap with computation, see `moved`."""
    return compute + cluster.latency + straggler(compute, cluster) + sums(size, cluster)


def exposed(one: Collective, cluster: Cluster) -> float:
    """Returns the bytes of a collective that do not overlap with computation, as those of an all-reduce that takes as
    long: gathered ones count half."""
    return one.bytes * (0.5 if one.kind == GATHER else 1) * (cluster.exposed if one.overlaps else 1)


def moved(model: nn.Module, config: Config, cluster: Cluster) -> float:
    """Returns the `exposed` bytes of a step."""
    return sum(exposed(one, cluster) for one in traffic(model, config, cluster.world))


def data_of(config: Config) -> Data:
    try:
        train, val = (Index(Path(config.data.root) / part) for part in ("train", "val"))
    except DataError:
        return Data(IMAGES, float(IMAGE * IMAGES[0]), SHARDS, "ImageNet, because there is no index")
    size = float(sum(shard.bytes for shard in train.shards))
    return Data((len(train), len(val)), size, len(train.shards), "the index")


def terms(config: Config, model: nn.Module, cluster: Cluster, compute: float, data: Data) -> list[Term]:
    """Returns all costs on this cluster. compute: seconds of a step on one accelerator with its share of the batch."""
    micro = micro_batch(config, cluster.world)
    step = step_seconds(compute, moved(model, config, cluster), cluster)
    found = [
        Term("step", "compute", time(compute), "measured on one accelerator"),
        Term("step", "straggler", time(straggler(compute, cluster)), f"{cluster.jitter:g} · compute · sqrt(2 ln W)"),
    ]
    for one in traffic(model, config, cluster.world):
        seconds = sums(exposed(one, cluster), cluster) + one.calls * small(cluster)
        share = f", {cluster.exposed:.0%} exposed" if one.overlaps else ""
        formula = f"{one.kind} of {readable_size(one.bytes)} in {one.calls:g} call(s){share}; + 2 log2 W · hop"
        found.append(Term("step", one.what, time(seconds), formula))
    found += [Term("step", "other latency", time(cluster.latency), "as given")]
    return [
        *found,
        *_between_steps(config, model, cluster, compute, step, data, micro),
        *_start(config, cluster, data, micro),
    ]


def _between_steps(
    config: Config, model: nn.Module, cluster: Cluster, compute: float, step: float, data: Data, micro: int
) -> list[Term]:
    every, world = config.every, cluster.world
    nets = [model, *filter(None, [build_critic(config)])]
    weights = sum(p.numel() for net in nets for p in net.parameters() if p.requires_grad)
    saved = checkpoint_bytes(model, config)
    gathered = 12 * weights if config.zero_stage else 0
    tell, exchange = 2 * small(cluster), 2 * (world - 1) * SIDE_HOP
    batches = math.ceil(math.ceil(data.images[1] / world) / micro)

    def share(seconds: float, steps: int) -> str:
        return f"{time(seconds)} ({seconds / (steps * step):.1%})"

    return [
        Term(
            *("1 s", "stop requests", time(exchange)),
            "2 (W − 1) messages over TCP, in the background: no device waits",
        ),
        Term(
            *("report", "rank 0 writes", share(REPORT + 5 * small(cluster) + tell, every.report)),
            "measured on a CPU; 5 small sums, 1 hand-over from rank 0 of 2 broadcasts",
        ),
        Term(
            *("validation", "images", share(batches * compute / config.accumulation / 3, every.validate)),
            f"{data.images[1]} images / W, rounded up to batches; forward is a third of compute",
        ),
        Term(
            *("validation", "pictures on rank 0", share(PICTURES, every.validate)),
            "measured on a CPU; W − 1 ranks wait",
        ),
        Term(
            *("save", "gather weights, moments", share(sums(gathered, cluster) / 2 + tell, every.checkpoint)),
            f"{readable_size(gathered)} of ZeRO's shards to rank 0, in buckets; 1 hand-over",
        ),
        Term(
            *("save", "copy to the host", share(saved / HOST, every.checkpoint)),
            f"{readable_size(saved)} at an assumed {HOST / 1e9:g} GB/s; W − 1 ranks wait",
        ),
        Term(
            *("save", "write and verify", share(2 * saved / DISK, every.checkpoint)),
            f"in the background, at an assumed {DISK / 1e9:g} GB/s; above 100 % the next save waits",
        ),
    ]


def _start(config: Config, cluster: Cluster, data: Data, micro: int) -> list[Term]:
    index = RECORD.itemsize * sum(data.images)
    columns = min(config.data.columns, data.shards)
    # A node's images of a step lie in neighbouring columns. From step to step they move by the global batch.
    covered = min(1.0, micro * config.accumulation * cluster.accelerators / math.gcd(config.global_batch, columns))
    fetched = covered * data.bytes
    return [
        Term(
            *("start", "check of the index", time(index / DISK + HASH * sum(data.images))),
            f"{readable_size(index)} read once per node; processes share its memory",
        ),
        Term(
            *("start", "stop requests: sockets", f"{min(2, cluster.world - 1)} per rank"),
            "each rank connects to its neighbours in the ring only",
        ),
        Term(
            *("epoch", "fetched per node", readable_size(fetched)),
            f"if the shards lie behind a URL: min(1, images per node / gcd(batch, {columns} columns)) of the data",
        ),
        Term(
            *("epoch", "fetched in all", readable_size(fetched * cluster.nodes)),
            "fetched per node · nodes; once for the whole run if data.cache_gib holds a node's part",
        ),
    ]


def checkpoint_bytes(model: nn.Module, config: Config) -> int:
    buffers = sum(b.nbytes for b in model.buffers())
    critic = build_critic(config)  # it has no average
    of_critic = 12 * sum(p.numel() for p in critic.parameters()) if critic else 0
    return 16 * sum(p.numel() for p in model.parameters()) + 2 * buffers + of_critic


def time(seconds: float) -> str:
    if not seconds:
        return "0"
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def plan(config: Config, cluster: Cluster, compute: float) -> list[str]:
    """Returns the plan, one line per topic. compute: seconds of a step on a single accelerator with its share of the
    batch. Raises ConfigError if the batch does not divide evenly."""
    micro = micro_batch(config, cluster.world)
    model, data = build(config), data_of(config)
    size = moved(model, config, cluster)
    seconds = step_seconds(compute, size, cluster)
    speed = config.global_batch / seconds
    hours = config.steps * seconds / 3600
    image = data.bytes / data.images[0]
    node = speed / cluster.nodes
    kinds = [
        (kind, [one for one in traffic(model, config, cluster.world) if one.kind == kind]) for kind in (SUM, GATHER)
    ]
    calls = ", ".join(
        f"{sum(one.calls for one in ones):g} {kind}(s) of {readable_size(sum(one.bytes for one in ones))}"
        for kind, ones in kinds
        if ones
    )
    return [
        f"ranks       {cluster.nodes} × {cluster.accelerators} = {cluster.world}, "
        f"{micro} × {config.accumulation} images per rank and step",
        f"step        {seconds:.4g} s = {compute:.4g} compute + {cluster.latency:.4g} latency + "
        f"{straggler(compute, cluster):.4g} straggler + {sums(size, cluster):.4g} exposed collectives",
        f"collectives {calls or 'none'} per step and rank, ZeRO {config.zero_stage}",
        f"speed       {speed:.1f} images/s, efficiency {compute / seconds:.1%}",
        f"loading     {node:.1f} images/s per node: {node * DECODE:.1f} cores, "
        f"{readable_size(node * image)}/s from storage, {readable_size(speed * image)}/s in all "
        f"(images of {readable_size(image)}, from {data.source})",
        f"length      {hours:.3g} hours, {hours * cluster.world:.3g} device-hours, for {config.steps} steps, "
        f"{config.steps * config.global_batch} images",
        f"checkpoint  {readable_size(checkpoint_bytes(model, config))}: weights, their average, AdamW's two moments, "
        f"buffers",
    ]


def table(config: Config, cluster: Cluster, compute: float, worlds: Sequence[int]) -> list[str]:
    """Returns all terms at these numbers of ranks as a Markdown table. Every rank keeps its share of the batch, so the
    global batch grows with the ranks."""
    share, model, data = config.global_batch // cluster.world, build(config), data_of(config)
    columns = []
    for world in worlds:
        scaled = replace(config, global_batch=share * world)
        columns.append(terms(scaled, model, cluster.of(world), compute, data))
    lines = [f"| per | what | {' | '.join(f'{world} ranks' for world in worlds)} | formula, assumption |"]
    lines.append("|---|---|" + "---:|" * len(worlds) + "---|")
    for row in zip(*columns, strict=True):
        values = " | ".join(one.value for one in row)
        lines.append(f"| {row[0].when} | {row[0].what} | {values} | {row[-1].formula} |")
    return lines
