"""What a training would cost on more accelerators than one has: time, bandwidths, storage.

A step of W = N·G ranks, N nodes of G accelerators, each with its share of the batch:

    step      = compute + latency + straggler + exposed · sums
    compute   = what one accelerator needs for its share, measured
    latency   = what a step takes longer among ranks however little they sum, measured with a tiny model
    straggler = jitter · compute · sqrt(2 ln W): how far the largest of W normal times lies above their mean; jitter is
                their standard deviation as a share of it
    sums      = 2 (G − 1)/G · bytes/inside + 2 (N − 1)/N · bytes/between: reduce-scatter and all-gather by a ring within
                each node, and between nodes an all-reduce by a ring of each accelerator's share, all of which pass
                through the node's network (Patarasuk, Yuan 2009, "Bandwidth optimal all-reduce algorithms for
                clusters of workstations")
    bytes     = fp32 gradients, and fp32 buffers for codebooks, whose statistics are summed once a step

DeepSpeed's ZeRO 0 sums after the backward pass: exposed is 1. Validation and saving are not counted.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from ..data import DataError
from ..data.index import Index
from ..files import readable_size
from ..settings import Config, build, micro_batch

IMAGE = 110_000  # bytes of an image of ImageNet, on average
DECODE = 2.2e-3  # seconds of a core for each, decoded and cropped to 128 px: README, Speed


@dataclass(frozen=True)
class Cluster:
    nodes: int
    accelerators: int  # a node
    inside: float  # bytes a second through each accelerator when those of a node sum
    between: float  # bytes a second into and out of a node
    jitter: float = 0.02
    latency: float = 0.0  # seconds a step
    exposed: float = 1.0  # share of the sums that nothing hides

    @property
    def world(self) -> int:
        return self.nodes * self.accelerators


def summed_bytes(model: nn.Module) -> int:
    """Of which ranks make sums in a step."""
    return sum(4 * p.numel() for p in model.parameters()) + sum(b.nbytes for b in model.buffers())


def sums(size: float, cluster: Cluster) -> float:
    """Seconds."""
    n, g = cluster.nodes, cluster.accelerators
    return 2 * (g - 1) / g * size / cluster.inside + 2 * (n - 1) / n * size / cluster.between


def step_seconds(compute: float, size: float, cluster: Cluster) -> float:
    straggler = cluster.jitter * compute * math.sqrt(2 * math.log(cluster.world))
    return compute + cluster.latency + straggler + cluster.exposed * sums(size, cluster)


def plan(config: Config, cluster: Cluster, compute: float) -> list[str]:
    """compute: seconds of a step of one accelerator alone, with the images that it would have. Raises ConfigError."""
    micro = micro_batch(config, cluster.world)
    model = build(config)
    size = summed_bytes(model)
    buffers = sum(b.nbytes for b in model.buffers())
    seconds = step_seconds(compute, size, cluster)
    exposed = cluster.exposed * sums(size, cluster)
    saved = 4 * (size - buffers) + 2 * buffers
    speed = config.batch / seconds
    hours = config.steps * seconds / 3600
    try:
        index = Index(Path(config.data.root) / "train")
        image, source = sum(shard.bytes for shard in index.shards) / len(index), "the index"
    except DataError:
        image, source = float(IMAGE), "ImageNet, there being no index"
    node = speed / cluster.nodes
    return [
        f"ranks       {cluster.nodes} × {cluster.accelerators} = {cluster.world}, "
        f"{micro} × {config.accumulation} images each a step",
        f"step        {seconds:.4g} s = {compute:.4g} compute + {cluster.latency:.4g} latency + "
        f"{seconds - compute - cluster.latency - exposed:.4g} straggler + "
        f"{exposed:.4g} exposed sums of {readable_size(size)}",
        f"speed       {speed:.1f} images/s, efficiency {compute / seconds:.1%}",
        f"loading     {node:.1f} images/s a node: {node * DECODE:.1f} cores, "
        f"{readable_size(node * image)}/s from storage, {readable_size(speed * image)}/s in all "
        f"(images of {readable_size(image)}, from {source})",
        f"length      {hours:.3g} hours, {hours * cluster.world:.3g} device-hours, for {config.steps} steps, "
        f"{config.steps * config.batch} images",
        f"checkpoint  {readable_size(saved)}: weights, their average, AdamW's two moments, buffers",
    ]
