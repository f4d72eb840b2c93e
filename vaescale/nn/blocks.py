"""The convolutional blocks that the models share."""

import torch.nn.functional as F
from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """x + conv1×1(relu(conv3×3(relu(x)))), the block of VQ-VAE (section 4.1). [B, C, H, W] → the same."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.wide = nn.Conv2d(channels, hidden, 3, padding=1)
        self.narrow = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.narrow(F.relu(self.wide(F.relu(x))))


def downsample(channels: int, out: int) -> nn.Conv2d:
    """Halves height and width."""
    return nn.Conv2d(channels, out, 4, stride=2, padding=1)


def upsample(channels: int, out: int) -> nn.ConvTranspose2d:
    """Doubles height and width."""
    return nn.ConvTranspose2d(channels, out, 4, stride=2, padding=1)
