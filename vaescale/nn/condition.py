"""The condition that a model is given along with the image: a class label, attributes, or nothing."""

import torch
from torch import Tensor, nn

from ..interfaces import Condition


class Conditioner(nn.Module):
    """Condition → [B, dim]: an embedding of the label, concatenated with the unchanged attributes.

    Missing values (label −1, attribute NaN) are learned: an extra row of the embedding, and one value per attribute.
    """

    def __init__(self, classes: int, embedding: int, attributes: int) -> None:
        super().__init__()
        self.classes, self.attributes = classes, attributes
        self.dim = (embedding if classes else 0) + attributes
        self.label = nn.Embedding(classes + 1, embedding) if classes else None
        self.unknown = nn.Parameter(torch.zeros(attributes)) if attributes else None

    def forward(self, condition: Condition) -> Tensor:
        parts = []
        if self.label is not None:
            label = condition.label
            parts.append(self.label(torch.where(label < 0, self.classes, label)))
        if self.unknown is not None:
            attributes = condition.attributes
            parts.append(torch.where(attributes.isnan(), self.unknown, attributes))
        return torch.cat(parts, dim=1)

    def nothing_said(self, images: int) -> Condition:
        """Returns the empty condition for this number of images."""
        device = next(self.parameters()).device
        attributes = 0 if self.unknown is None else len(self.unknown)
        label = torch.full((images,), -1, device=device)
        return Condition(label, torch.full((images, attributes), torch.nan, device=device))


def dropped(condition: Condition, drop: Tensor) -> Condition:
    """Returns the condition with label and attributes missing where `drop`, bool [B], is true."""
    label = condition.label.masked_fill(drop, -1)
    return Condition(label, condition.attributes.masked_fill(drop[:, None], torch.nan))
