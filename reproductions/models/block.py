"""The residual block of both convolutional networks, on sequences and on images."""

from __future__ import annotations

from typing import TypeAlias

from torch import Tensor, nn

_Convolution: TypeAlias = nn.Conv1d | nn.Conv2d
_Layers: TypeAlias = tuple[type[_Convolution], type[nn.BatchNorm1d | nn.BatchNorm2d]]
_LAYERS: dict[int, _Layers] = {1: (nn.Conv1d, nn.BatchNorm1d), 2: (nn.Conv2d, nn.BatchNorm2d)}


class ConvBlock(nn.Module):
    """`relu(shortcut(x) + bn2(conv2(relu(bn1(conv1(x))))))`, with convolutions of width 3.

    Where the width changes, the shortcut is a 1x1 convolution, with the stride of the first one, and BN. Without
    normalisation the convolutions of the branch have a bias instead; that of the shortcut has none.

    Args:
        dimensions: 1 for sequences (N, C, L), 2 for images (N, C, H, W).
        inputs: channels of the input.
        outputs: channels of the output.
        stride: of the first convolution.
        norm: whether there is batch normalisation.
    """

    def __init__(self, dimensions: int, inputs: int, outputs: int, stride: int = 1, norm: bool = True) -> None:
        super().__init__()
        conv, batch_norm = _LAYERS[dimensions]
        self.conv1 = conv(inputs, outputs, 3, stride, padding=1, bias=not norm)
        self.bn1 = batch_norm(outputs) if norm else nn.Identity()
        self.conv2 = conv(outputs, outputs, 3, padding=1, bias=not norm)
        self.bn2 = batch_norm(outputs) if norm else nn.Identity()
        self.shortcut: nn.Module = nn.Identity()
        if inputs != outputs:
            projection = conv(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, batch_norm(outputs)) if norm else projection

    def branch(self, x: Tensor) -> Tensor:
        """F(x)."""
        y: Tensor = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return y

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = (self.shortcut(x) + self.branch(x)).relu()
        return y
