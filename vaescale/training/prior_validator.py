"""Measures the averaged weights of a prior during its training."""

from collections.abc import Callable

import torch
from torch import Tensor

from .. import distributed
from ..config import ConfigError
from ..data import stream
from ..evaluation.metrics.rate import RATE, rate_sums
from ..evaluation.show import Pictures, of_prior
from ..interfaces import Batch, Model, Prior, Tensors
from ..models.generative import generative
from ..numerics import exact
from ..settings import Config
from .validator import Validator


class PriorValidator:
    """Measures the rate of the codes of validation images, and that of as many training images, whose difference shows
    overfitting first. Also draws samples."""

    def __init__(
        self,
        config: Config,
        averaged: Model,
        training: stream.TrainSlices,
        slices: stream.ValidationSlices,
        device: torch.device,
        micro: int,
    ) -> None:
        """micro: images at a time. Raises ConfigError, on all ranks. Collective."""
        assert isinstance(averaged, Prior)
        self.prior, self.training, self.slices, self.device, self.micro = averaged, training, slices, device, micro
        self.codec = generative(averaged)
        self.maps: Tensors = {}  # bits of each place, fp64 [L, h, w], at the last validation
        if config.every.evaluate and slices.samples.index.codes:
            raise ConfigError(
                f"every.evaluate={config.every.evaluate} compares pictures, but data.root={config.data.root} holds "
                f"codes: set it to 0, or data.root to pictures"
            )
        self.comparing = Validator(config, self.codec, slices, device, micro)
        self.about = self.comparing.about

    def measure(self, compare: bool, stopped: Callable[[], object]) -> dict[str, float]:
        """Returns the rates of the codes, as Validator.measure returns its numbers. Collective."""
        index, trained = self.slices.samples.index, self.training.samples.index
        count = min(len(index), len(trained))
        validation = self._sums(self.slices, len(index), stopped)
        training = self._sums(self.training, count, stopped) if validation else {}
        if not training:
            return {}
        self.maps = {"validation": validation["rates"] / len(index), "training": training["rates"] / count}
        found = RATE.result(validation, len(index))
        found["bits_per_code_train"] = RATE.result(training, count)["bits_per_code"]
        if compare:
            compared = self.comparing.measure(True, stopped)
            return found | compared if compared else {}
        return found

    def pictures(self, shown: Batch) -> Pictures:
        """Yields samples, and the maps of the last validation."""
        return of_prior(self.prior, shown, self.maps)

    @torch.no_grad()
    @exact()
    def _sums(
        self, slices: stream.TrainSlices | stream.ValidationSlices, total: int, stopped: Callable[[], object]
    ) -> Tensors:
        """The sums of RATE over the first `total` samples and all ranks; {} if it was stopped."""
        sums = self._of(stream.blank(slices).to(self.device), empty=True)
        for decoded in stream.once(slices, self.micro, self.device, "rates", watched=False, total=total):
            if decoded:
                for name, part in self._of(decoded.batch).items():
                    sums[name] += part
            if stopped():
                return {}
        return {name: distributed.sum_(part) for name, part in sums.items()}

    def _of(self, batch: Batch, empty: bool = False) -> dict[str, Tensor]:
        """The sums of a batch; `empty`: zeros of their shape, for a rank without samples."""
        sums = rate_sums(self.prior, self.prior.codes(batch), batch.condition, batch.sample)
        return {name: torch.zeros_like(part) for name, part in sums.items()} if empty else sums
