"""The residual network of He et al. (2016) for CIFAR-10, with projection shortcuts."""

from __future__ import annotations

from einops import reduce
from torch import Tensor, nn

from reproductions.models.block import ConvBlock

WIDTHS = (16, 32, 64)


class CifarResNet(nn.Module):
    """A residual network of depth 6n + 2: a convolution, 3 stages of n blocks with 16, 32, 64 channels, a linear map.

    The initial values are PyTorch's own; no last gamma starts at zero.

    Args:
        depth: the number of layers, 6n + 2.
        norm: whether there is batch normalisation.
        classes: the number of logits.

    Raises:
        ValueError: the depth is not 6n + 2.

    Example:
        >>> import torch
        >>> CifarResNet(20)(torch.zeros(5, 3, 32, 32)).shape
        torch.Size([5, 10])
    """

    def __init__(self, depth: int, norm: bool = True, classes: int = 10) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 2, 6)
        if blocks < 1 or rest:
            raise ValueError(f"CifarResNet has a depth of 6n + 2, such as 20, 56, 110 or 218, not {depth}")
        self.conv = nn.Conv2d(3, WIDTHS[0], 3, padding=1, bias=not norm)
        self.bn = nn.BatchNorm2d(WIDTHS[0]) if norm else nn.Identity()
        width, stages = WIDTHS[0], []
        for wider in WIDTHS:
            first = ConvBlock(2, width, wider, stride=1 if width == wider else 2, norm=norm)
            others = (ConvBlock(2, wider, wider, norm=norm) for _ in range(blocks - 1))
            stages.append(nn.Sequential(first, *others))
            width = wider
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of shape (images, classes) for images of shape (images, 3, height, width)."""
        x = self.stages(self.bn(self.conv(images)).relu())
        logits: Tensor = self.head(reduce(x, "image channel height width -> image channel", "mean"))
        return logits
