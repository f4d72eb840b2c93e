"""Estimates the cost of a training on more accelerators than are at hand: time, bandwidths, storage.

The model of a step on W = N·G ranks, N nodes of G accelerators, each with its share of the batch:

    step      = compute + latency + straggler + exposed · sums
    compute   = time of one accelerator for its share, measured
    latency   = extra time of a step on several ranks that does not depend on the size of the sums, measured with a
                tiny model
    straggler = jitter · compute · sqrt(2 ln W): how far the largest of W normally distributed times lies above their
                mean; jitter is their standard deviation as a share of the mean
    sums      = 2 (G − 1)/G · bytes/inside + 2 (N − 1)/N · bytes/between: within each node a ring reduce-scatter and
                all-gather; between nodes a ring all-reduce of each accelerator's share, where all shares of a node go
                through its network (Patarasuk, Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of
                workstations")
    bytes     = fp32 gradients and all buffers (codebooks, whose statistics are summed once a step)

At ZeRO 0 sums overlap with the backward pass; exposed = 1 assumes that none do. Validation and saving do not count.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from ..data import DataError
from ..data.index import Index
from ..files import readable_size
from ..settings import Config, build, micro_batch

IMAGE = 110_000  # mean bytes of an ImageNet image
DECODE = 2.2e-3  # seconds of one core to decode an image and crop it to 128 px: vaescale/data/README.md, Speed


@dataclass(frozen=True)
class Cluster:
    nodes: int
    accelerators: int  # per node
    inside: float  # bytes per second through each accelerator in an all-reduce within a node
    between: float  # bytes per second into and out of a node
    jitter: float = 0.02  # standard deviation of the compute time, as a share of it
    latency: float = 0.0  # seconds per step
    exposed: float = 1.0  # share of the sums that does not overlap with computation

    @property
    def world(self) -> int:
        return self.nodes * self.accelerators


def summed_bytes(model: nn.Module) -> int:
    """Returns the bytes that ranks sum in a step."""
    return sum(4 * p.numel() for p in model.parameters()) + sum(b.nbytes for b in model.buffers())


def sums(size: float, cluster: Cluster) -> float:
    """Returns the seconds to sum `size` bytes over all ranks."""
    n, g = cluster.nodes, cluster.accelerators
    return 2 * (g - 1) / g * size / cluster.inside + 2 * (n - 1) / n * size / cluster.between


def step_seconds(compute: float, size: float, cluster: Cluster) -> float:
    straggler = cluster.jitter * compute * math.sqrt(2 * math.log(cluster.world))
    return compute + cluster.latency + straggler + cluster.exposed * sums(size, cluster)


def plan(config: Config, cluster: Cluster, compute: float) -> list[str]:
    """Returns the plan, one line per topic. compute: seconds of a step on a single accelerator with its share of the
    batch. Raises ConfigError if the batch does not divide evenly."""
    micro = micro_batch(config, cluster.world)
    model = build(config)
    size = summed_bytes(model)
    buffers = sum(b.nbytes for b in model.buffers())
    seconds = step_seconds(compute, size, cluster)
    exposed = cluster.exposed * sums(size, cluster)
    saved = 4 * (size - buffers) + 2 * buffers
    speed = config.global_batch / seconds
    hours = config.steps * seconds / 3600
    try:
        index = Index(Path(config.data.root) / "train")
        image, source = sum(shard.bytes for shard in index.shards) / len(index), "the index"
    except DataError:
        image, source = float(IMAGE), "ImageNet, because there is no index"
    node = speed / cluster.nodes
    return [
        f"ranks       {cluster.nodes} × {cluster.accelerators} = {cluster.world}, "
        f"{micro} × {config.accumulation} images per rank and step",
        f"step        {seconds:.4g} s = {compute:.4g} compute + {cluster.latency:.4g} latency + "
        f"{seconds - compute - cluster.latency - exposed:.4g} straggler + "
        f"{exposed:.4g} exposed sums of {readable_size(size)}",
        f"speed       {speed:.1f} images/s, efficiency {compute / seconds:.1%}",
        f"loading     {node:.1f} images/s per node: {node * DECODE:.1f} cores, "
        f"{readable_size(node * image)}/s from storage, {readable_size(speed * image)}/s in all "
        f"(images of {readable_size(image)}, from {source})",
        f"length      {hours:.3g} hours, {hours * cluster.world:.3g} device-hours, for {config.steps} steps, "
        f"{config.steps * config.global_batch} images",
        f"checkpoint  {readable_size(saved)}: weights, their average, AdamW's two moments, buffers",
    ]
