"""Very deep networks of convolutions over characters, with the blocks in the ways in which others write them.

Conneau et al., arXiv:1606.01781. It is no package: many repositories hold one, and these are the forms of their blocks.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from tests.elsewhere.case import Call, Case, ids


class AddedInPlace(nn.Module):
    """`out += residual`, the residual through a convolution where the channels change; between levels is pooling."""

    def __init__(self, wide: int, out: int, halves: bool) -> None:
        super().__init__()
        self.pool = nn.MaxPool1d(3, 2, 1) if halves else None
        self.conv1, self.bn1 = nn.Conv1d(wide, out, 3, padding=1), nn.BatchNorm1d(out)
        self.conv2, self.bn2 = nn.Conv1d(out, out, 3, padding=1), nn.BatchNorm1d(out)
        self.downsample = None
        if wide != out:
            self.downsample = nn.Sequential(nn.Conv1d(wide, out, 1, bias=False), nn.BatchNorm1d(out))

    def forward(self, x: Tensor) -> Tensor:
        if self.pool is not None:
            x = self.pool(x)
        residual = x
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            residual = self.downsample(x)
        out += residual
        return F.relu(out)


class PooledFirst(nn.Module):
    """The branch begins with pooling, the shortcut is a convolution with a stride, and no activation follows."""

    def __init__(self, wide: int, out: int, halves: bool) -> None:
        super().__init__()
        self.halves = halves or wide != out
        self.pool = nn.MaxPool1d(3, 2, 1)
        self.body = nn.Sequential(
            nn.Conv1d(wide, out, 3, padding=1),
            nn.BatchNorm1d(out),
            nn.ReLU(inplace=True),
            nn.Conv1d(out, out, 3, padding=1),
            nn.BatchNorm1d(out),
            nn.ReLU(inplace=True),
        )
        self.shortcut = nn.Conv1d(wide, out, 1, stride=2) if self.halves else None

    def forward(self, x: Tensor) -> Tensor:
        residual = x
        if self.halves:
            x = self.pool(x)
        x = self.body(x)
        if self.shortcut is not None:
            residual = self.shortcut(residual)
        x = x + residual
        return x


class PooledLast(PooledFirst):
    """The branch ends with pooling."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.body[:-1](x)  # without the activation
        if self.shortcut is not None:
            out = self.pool(out)
            x = self.shortcut(x)
        out += x
        return F.relu(out)


class VDCNN(nn.Module):
    """Two levels of blocks, the strongest `k` of each channel, and a classifier. `shared`: blocks times a number."""

    def __init__(self, block: type[nn.Module], shared: bool = False, k: int = 4) -> None:
        super().__init__()
        self.k = k
        self.embed = nn.Embedding(20, 8, padding_idx=0)
        layers: list[nn.Module] = [nn.Conv1d(8, 8, 3, padding=1)]
        for wide, out in ((8, 8), (8, 16)):
            layers += [block(wide, out, wide != out)]
            layers += [block(out, out, False)] * 2 if shared else [block(out, out, False) for _ in range(2)]
        self.layers = nn.Sequential(*layers)
        self.fc = nn.Sequential(nn.Linear(16 * k, 16), nn.ReLU(), nn.Linear(16, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(self.embed(x).transpose(1, 2))
        return self.fc(x.topk(self.k)[0].view(len(x), -1))


# fmt: off
PACKAGES = {
    "VDCNN": [
        Case(Call("tests.elsewhere.vdcnn.VDCNN", block, shared), ids(20, 2, 32), 4 if shared else 6, name=name)
        for block, shared, name in (
            (AddedInPlace, False, "added in place"),
            (AddedInPlace, True, "with shared blocks"),
            (PooledFirst, False, "pooled first"),
            (PooledLast, False, "pooled last"),
        )
    ]
}
# fmt: on
