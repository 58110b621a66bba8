"""The residual network of He et al. (2016) for CIFAR-10, with projection shortcuts."""

from __future__ import annotations

from einops import reduce
from torch import Tensor, nn

WIDTHS = (16, 32, 64)


class ConvBlock2d(nn.Module):
    """`relu(shortcut(x) + bn2(conv2(relu(bn1(conv1(x))))))`.

    Where the width changes, the first convolution has stride 2, and so has the shortcut: a 1x1 convolution and BN.
    Without normalisation the convolutions of the branch have a bias instead; that of the shortcut has none.

    Args:
        inputs: channels of the input.
        outputs: channels of the output.
        norm: whether there is batch normalisation.
    """

    def __init__(self, inputs: int, outputs: int, norm: bool = True) -> None:
        super().__init__()
        stride = 1 if inputs == outputs else 2
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=not norm)
        self.bn1 = nn.BatchNorm2d(outputs) if norm else nn.Identity()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=not norm)
        self.bn2 = nn.BatchNorm2d(outputs) if norm else nn.Identity()
        self.shortcut: nn.Module = nn.Identity()
        if inputs != outputs:
            projection = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(outputs)) if norm else projection

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x)).relu()
        y = self.bn2(self.conv2(y))
        z: Tensor = (self.shortcut(x) + y).relu()
        return z


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
            stages.append(nn.Sequential(*(ConvBlock2d(wider if n else width, wider, norm) for n in range(blocks))))
            width = wider
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of shape (images, classes) for images of shape (images, 3, height, width)."""
        x = self.stages(self.bn(self.conv(images)).relu())
        logits: Tensor = self.head(reduce(x, "image channel height width -> image channel", "mean"))
        return logits
