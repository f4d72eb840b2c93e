"""Measures the averaged weights during a training."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..config import ConfigError
from ..data import stream
from ..evaluation.compare import GENERATED, RECONSTRUCTED, ByNet, Gathering, Refused, Request, check, chosen
from ..evaluation.evaluate import evaluate
from ..evaluation.measure import LPIPS, Drawing, Generate, generator, measure, read_distance, read_net, try_to
from ..evaluation.show import Pictures, show
from ..interfaces import Batch, Codec
from ..nn.perceptual import Distance
from ..nn.reconstruction import distance_of
from ..settings import Config


class Validator:
    """Measures all METRICS; on request also the comparisons of `evaluation`, and LPIPS if its weights are there.

    Its networks are on the device only while they are used."""

    def __init__(
        self,
        config: Config,
        averaged: Any,
        slices: stream.ValidationSlices,
        device: torch.device,
        micro: int,
    ) -> None:
        """Reads the weights of the networks that every.evaluate needs. micro: images at a time. Raises ConfigError, on
        all ranks, if one cannot be read or a comparison is impossible. Collective."""
        self.config, self.slices, self.device, self.micro = config, slices, device, micro
        self.averaged = averaged
        self.requests: list[Request] = []
        self.known: ByNet = {}  # of the validation images, which do not change
        self.lpips: Distance | None = None
        self.about = ""  # a sentence on what is measured at every.evaluate, for the log
        if config.every.evaluate and isinstance(averaged, Codec):
            self._prepare()

    def _prepare(self) -> None:
        given, total = self.config.evaluation, len(self.slices.samples.index)
        used = min(given.count, total)
        try:
            asked = chosen(given.metrics, [given.features])
            self.nets = [read_net(name) for name in asked]  # one, or none without metrics
            self.requests = [Request(*one, net.words) for net in self.nets for one in asked[net.name]]
            self._check(total)
        except Refused as error:
            raise ConfigError(f"every.evaluate={self.config.every.evaluate} is impossible: {error}") from None
        lpips = ""
        if _distance(self.averaged) is None:  # else the run's own distance is measured at every validation
            self.lpips, why = read_lpips(self.config.data.size)
            lpips = f"without LPIPS, because {why}" if why else "with LPIPS"
        of = f"{used} of {total}" if used < total else f"{total}"
        keys = ", ".join(request.key for request in self.requests)
        compared = f": {keys} on {of} validation images" if keys else ""
        parts = [f"evaluation every {self.config.every.evaluate} steps{compared}", lpips]
        self.about = "; ".join(filter(None, parts))

    def _check(self, total: int) -> None:
        """Raises Refused if a comparison is impossible."""
        blank, count = self.slices[range(1)].batch.x, self.config.evaluation.count
        images, samples = Gathering(self.nets, total, blank, count), Gathering(self.nets, count, blank)
        for side, gathering in ((RECONSTRUCTED, images), (GENERATED, samples)):
            check([request for request in self.requests if request.side == side], gathering, images.by_net)
        if any(request.side == GENERATED for request in self.requests):
            try_to(self._generator())

    def _generator(self) -> Generate:
        classes, attributes = getattr(self.config.model, "classes", 0), len(self.config.data.attributes)
        return generator(self.averaged, Drawing(), [1] * classes, attributes, self.device)

    def measure(self, compare: bool, stopped: Callable[[], object]) -> dict[str, Any]:
        """Returns the numbers of the averaged weights over the validation set; {} if `stopped`, which is called after
        each batch, returned true. compare: whether to compare images by their features, too. Collective."""
        slices, device, distance = self.slices, self.device, _distance(self.averaged)
        if not compare:
            return evaluate(self.averaged, slices, device, self.micro, stopped=stopped, distance=distance)
        if self.lpips:
            distance = self.lpips.to(device)
        nets, count = [net.to(device) for net in self.nets], self.config.evaluation.count
        found = measure(
            self.averaged, slices, device, self.requests, nets, count, self._generator(), known=self.known,
            used=count, stopped=stopped, micro=self.micro, distance=distance,
        )  # fmt: skip
        for net in nets:
            net.to("cpu")
        if self.lpips:
            self.lpips.to(torch.device("cpu"))
        return found

    def pictures(self, shown: Batch) -> Pictures:
        """Yields all pictures that the model supports. shown: the fixed images, on the device."""
        return show(self.averaged, shown)


def _distance(averaged: Codec) -> Distance | None:
    return distance_of(averaged) if isinstance(averaged, nn.Module) else None


def read_lpips(size: int) -> tuple[Distance | None, str]:
    """Returns LPIPS from the folder of weights, or None and why it cannot be had on all ranks. size: pixels per side.
    Collective."""
    try:
        return read_distance(LPIPS, size), ""
    except Refused as error:
        return None, str(error)
