"""A tokenizer of a few lines, and priors over its codes, for tests."""

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from vaescale.interfaces import Batch, Condition, Model, Output, Shape, Usage
from vaescale.models import code_prior
from vaescale.models.code_prior import CodePrior

SIDE = 2  # codes per side, and pixels


class Tokenizer(Model):
    """The first pixels of the first channels are the codes."""

    def __init__(self, sizes: tuple[int, ...], side: int = SIDE) -> None:
        super().__init__()
        self.sizes, self.side = sizes, side
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, batch: Batch, step: int) -> Output:
        raise NotImplementedError

    def encode(self, batch: Batch, temperature: float = 0.0) -> list[Tensor]:
        return [batch.x[:, i, : self.side, : self.side].long() % size for i, size in enumerate(self.sizes)]

    def decode(self, latents: list[Tensor], *others: Any, **more: Any) -> Tensor:
        return torch.stack(latents, dim=1) / 255

    def usage(self, clear: bool) -> dict[str, Usage]:
        return {f"codebook{i}": Usage(torch.zeros(size), *[torch.zeros(1)] * 5) for i, size in enumerate(self.sizes)}

    def quantizers(self) -> dict[str, Any]:
        return {}


def prior(
    sizes: tuple[int, ...] = (3,), side: int = SIDE, attributes: int = 0, seed: int = 0, **given: Any
) -> CodePrior:
    """Builds a small prior whose weights are far from those of an untrained one, in eval mode."""
    torch.manual_seed(seed)
    config = code_prior.Config(**{"width": 16, "depth": 2, "heads": 2, "level_depth": 1, **given})
    model = code_prior.build(config, Shape(len(sizes), side, attributes), seed, Tokenizer(sizes, side))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    return model.eval()


def everything(sizes: tuple[int, ...], places: int) -> Tensor:
    """Returns all maps of codes, int64 [Π sizes^places, L, places]."""
    cells = list(itertools.product(*[range(size) for size in sizes]))
    return torch.tensor(list(itertools.product(cells, repeat=places))).transpose(1, 2)


def nothing(images: int, attributes: int = 0) -> Condition:
    return Condition(torch.full((images,), -1), torch.full((images, attributes), torch.nan))


def batch_of(codes: Tensor, label: Tensor | None = None, first: int = 0) -> Batch:
    condition = nothing(len(codes))
    return Batch(
        codes, condition.label if label is None else label, condition.attributes, first + torch.arange(len(codes))
    )
