"""The very deep convolutional network of Conneau et al. (2017) for texts, read letter by letter, with shortcuts."""

from __future__ import annotations

from einops import rearrange
from torch import Tensor, nn

from reproductions.models.block import ConvBlock

WIDTHS = (64, 128, 256, 512)
BLOCKS = {9: (1, 1, 1, 1), 17: (2, 2, 2, 2), 29: (5, 5, 2, 2), 49: (8, 8, 5, 3)}  # a level, by depth
LETTERS = 70  # padding, the 68 of the alphabet, and one for all others
KEPT = 8  # places that the last pooling leaves of a text


class LargestInOrder(nn.Module):
    """k-max pooling: the k largest values of each channel, in the order in which they stand."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k

    def forward(self, x: Tensor) -> Tensor:
        """A tensor of shape (texts, channels, k) for one of shape (texts, channels, places)."""
        places = x.topk(self.k, dim=-1).indices.sort(dim=-1).values
        return x.gather(-1, places)


class VDCNN(nn.Module):
    """An embedding of letters, a convolution, four levels with 64 to 512 channels, and three linear maps.

    Max pooling halves the length between the levels. The paper's authors pool the last level to 8 maxima, one of each
    eighth of the text, have linear maps of width 1,024 and PyTorch's initial values; the original network keeps the 8
    largest values, has linear maps of width 2,048 and He's initial values.

    Args:
        depth: 9, 17, 29 or 49, the number of convolutions between embedding and linear maps.
        norm: whether there is batch normalisation.
        classes: the number of logits.
        original: build the original network, not the authors' variant.

    Raises:
        ValueError: the depth is none of the four.

    Example:
        >>> import torch
        >>> VDCNN(9)(torch.zeros(5, 256, dtype=torch.int64)).shape
        torch.Size([5, 4])
    """

    def __init__(self, depth: int, norm: bool = True, classes: int = 4, original: bool = False) -> None:
        super().__init__()
        if depth not in BLOCKS:
            raise ValueError(f"VDCNN has a depth of {', '.join(map(str, BLOCKS))}, not {depth}")
        self.embedding = nn.Embedding(LETTERS, 16, padding_idx=0)
        self.conv = nn.Conv1d(16, WIDTHS[0], 3, padding=1)
        width, levels = WIDTHS[0], []
        for level, (wider, blocks) in enumerate(zip(WIDTHS, BLOCKS[depth], strict=True)):
            pool = [nn.MaxPool1d(3, stride=2, padding=1)] if level else []
            levels.append(
                nn.Sequential(*pool, *(ConvBlock(1, wider if n else width, wider, norm=norm) for n in range(blocks)))
            )
            width = wider
        self.levels = nn.Sequential(*levels)
        self.pool = LargestInOrder(KEPT) if original else nn.AdaptiveMaxPool1d(KEPT)
        hidden = 2048 if original else 1024
        self.head = nn.Sequential(
            nn.Linear(width * KEPT, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, classes)
        )
        if original:
            for module in self.modules():
                if isinstance(module, nn.Conv1d):
                    nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")

    def forward(self, letters: Tensor) -> Tensor:
        """Logits of shape (texts, classes) for letters 0 to 69, integers of shape (texts, places)."""
        x = rearrange(self.embedding(letters), "text place channel -> text channel place")
        x = self.pool(self.levels(self.conv(x)))
        logits: Tensor = self.head(rearrange(x, "text channel place -> text (channel place)"))
        return logits
