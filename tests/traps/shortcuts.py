"""Skips that fit the shape by what has no parameters or a single map, and weights that hooks compute."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.traps.base import DIM, PROJECTION, Block, Expected, Trap, WithABlock, each, linear, trap


class Shortcut(Trap):
    """``skip(x) + branch(x)`` over images, both of which fit the shape."""

    expected = PROJECTION
    shape = (2, DIM, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.Conv2d(DIM, DIM, 3, padding=1), nn.ReLU(), nn.Conv2d(DIM, DIM, 3, padding=1))

    def skip(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def branch(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.skip(x) + self.branch(x)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        return self.skip(x) + h[0] * self.branch(x)


@trap
class InterpolationOnBothSides(Shortcut):
    def skip(self, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2.0)

    def branch(self, x: Tensor) -> Tensor:
        return self.f(F.interpolate(F.relu(x), scale_factor=2.0))


@trap
class TransposedConvolutionOnBothSides(Shortcut):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.project = nn.ConvTranspose2d(DIM, DIM, 2, 2), nn.ConvTranspose2d(DIM, DIM, 2, 2)

    def skip(self, x: Tensor) -> Tensor:
        return self.project(x)

    def branch(self, x: Tensor) -> Tensor:
        return self.up(self.f(x))


@trap
class ASumInsideABranchThatIsSizedUp(TransposedConvolutionOnBothSides):
    """The skip is sized up as well: the branch passes no resolution but its own, and the sum inside belongs to it."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.low_rank = nn.Conv2d(DIM, DIM, 1), nn.Sequential(nn.Conv2d(DIM, 2, 1), nn.Conv2d(2, DIM, 1))

    def branch(self, x: Tensor) -> Tensor:
        y = self.f(x)
        return self.up(self.base(y) + self.low_rank(y))


@trap
class PixelsIntoChannels(Shortcut):
    """The way down of a deep-compression autoencoder."""

    def skip(self, x: Tensor) -> Tensor:
        return F.pixel_unshuffle(x, 2).unflatten(1, (-1, 2)).mean(2)

    def branch(self, x: Tensor) -> Tensor:
        return F.pixel_unshuffle(self.f(x)[:, : DIM // 2], 2)


@trap
class ChannelsIntoPixels(Shortcut):
    """The way up of a deep-compression autoencoder."""

    def skip(self, x: Tensor) -> Tensor:
        return F.pixel_shuffle(x.repeat_interleave(4, dim=1), 2)

    def branch(self, x: Tensor) -> Tensor:
        return F.pixel_shuffle(self.f(x).repeat_interleave(4, dim=1), 2)


@trap
class RepeatedChannels(Shortcut):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Conv2d(DIM, 2 * DIM, 3, padding=1)

    def skip(self, x: Tensor) -> Tensor:
        return x.repeat(1, 2, 1, 1)

    def branch(self, x: Tensor) -> Tensor:
        return self.f(x)


@trap
class TiledChannels(RepeatedChannels):
    def skip(self, x: Tensor) -> Tensor:
        return torch.tile(x, (1, 2, 1, 1))


@trap
class SelectedRows(Shortcut):
    def rows(self, x: Tensor) -> Tensor:
        return x.index_select(2, torch.arange(0, 8, 2))

    def skip(self, x: Tensor) -> Tensor:
        return self.rows(x)

    def branch(self, x: Tensor) -> Tensor:
        return self.rows(self.f(x))


@trap
class GatheredRows(SelectedRows):
    def rows(self, x: Tensor) -> Tensor:
        return x.gather(2, torch.arange(0, 8, 2).view(1, 1, 4, 1).expand(x.shape[0], DIM, 4, 8))


@trap
class FlippedChannels(SelectedRows):
    def rows(self, x: Tensor) -> Tensor:
        return x.flip(1)


@trap
class RolledRows(SelectedRows):
    def rows(self, x: Tensor) -> Tensor:
        return x.roll(1, 2)


@trap
class SummedGroups(Shortcut):
    """As FishNet squeezes channels: neighbours are added up."""

    shape = (2, 2 * DIM, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2 * DIM, DIM, 1)

    def skip(self, x: Tensor) -> Tensor:
        return x.view(len(x), DIM, 2, *x.shape[2:]).sum(dim=2)

    def branch(self, x: Tensor) -> Tensor:
        return self.f(self.first(x))


@trap
class CutToTheSizeOfTheBranch(Shortcut):
    """A U-Net without padding: the skip is cut to what the convolutions leave, at another resolution between."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(DIM, DIM, 2, 2), nn.ConvTranspose2d(DIM, DIM, 2, 2)
        self.deep = nn.Conv2d(DIM, DIM, 3)

    def skip(self, x: Tensor) -> Tensor:
        return F.pad(x, (-2, -2, -2, -2))

    def branch(self, x: Tensor) -> Tensor:
        return self.up(self.deep(self.down(x)))


@trap
class GatedByALowerResolution(Shortcut):
    """The branch is no other level: only what gates it was sized up."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.gate, self.last = (nn.Conv2d(DIM, DIM, 1) for _ in range(3))

    def skip(self, x: Tensor) -> Tensor:
        return self.project(x)

    def branch(self, x: Tensor) -> Tensor:
        gate = torch.sigmoid(F.interpolate(self.gate(F.max_pool2d(x, 2)), scale_factor=2.0))
        return self.last(self.f(x) * gate)


@trap
class LevelsAreFused(Trap):
    """Levels of a pyramid, made larger and summed up: none of these sums is a step."""

    expected = each("blocks.0", "blocks.1")
    shape = (2, DIM, 8, 8)

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Conv2d(DIM, DIM, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.f(x)

        def reference(self, x: Tensor, h: float) -> Tensor:
            return x + h * self.f(x)

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([self.Layer(), self.Layer()])
        self.down = nn.ModuleList(nn.Conv2d(DIM, DIM, 3, 2, 1) for _ in range(2))
        self.lateral = nn.ModuleList(nn.Conv2d(DIM, DIM, 1) for _ in range(3))

    def fuse(self, levels: list[Tensor]) -> Tensor:
        up = [F.interpolate(f(x), size=(8, 8)) for f, x in zip(self.lateral, levels, strict=True)]
        return up[0] + up[1] + up[2]

    def forward(self, x: Tensor) -> Tensor:
        levels = [x]
        for block, down in zip(self.blocks, self.down, strict=True):
            levels.append(block(down(levels[-1])))
        return self.fuse(levels)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        levels = [x]
        for factor, block, down in zip(h, self.blocks, self.down, strict=True):
            levels.append(block.reference(down(levels[-1]), factor))
        return self.fuse(levels)


class AddNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(DIM)

    def forward(self, x: Tensor, skip: Tensor, h: float | None = None) -> Tensor:
        if h is not None:
            return self.norm(skip + h * x)
        return self.norm(x + skip)


class GatedAddNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.add_norm = nn.Linear(DIM, 2 * DIM), AddNorm()

    def forward(self, x: Tensor, skip: Tensor, *h: float) -> Tensor:
        return self.add_norm(F.glu(self.gate(x)), skip, *h)


@trap
class TheBranchBeginsTwoCallsAbove(Trap):
    """A gated residual network as forecasters build it: the sum stands two calls below the branch's first map."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2, self.gated = linear(), linear(), GatedAddNorm()

        def forward(self, x: Tensor, *h: float) -> Tensor:
            return self.gated(self.fc2(F.elu(self.fc1(x))), x, *h)

    expected = each("layers.0.gated.add_norm", "layers.1.gated.add_norm")

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([self.Layer(), self.Layer()])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        for factor, layer in zip(h, self.layers, strict=True):
            x = layer(x, factor)
        return x


@trap
class ABranchUnderVmap(Trap):
    def __init__(self) -> None:
        super().__init__()
        self.a = linear()

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.func.vmap(self.a)(x)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        return x + h[0] * self.a(x)


class Coupling(nn.Module):
    """One half is shifted by a map of the other; between two couplings the halves change places."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(DIM // 2, DIM // 2)

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.flip(-1).chunk(2, dim=-1)
        return torch.cat((a, b + self.f(torch.tanh(a))), dim=-1)


@trap
class HalvesOfAFlow(Trap):
    """The shift of a flow is made of the other half only: no step."""

    expected = each("block")

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()
        self.flows = nn.Sequential(Coupling(), Coupling())

    def forward(self, x: Tensor) -> Tensor:
        return self.flows(self.block(x))

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        return self.flows(self.block.reference(x, h[0]))


class Modulated(nn.Module):
    """SPADE: a norm whose scale and shift are made of a map of labels, and may be normed themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.shared = nn.InstanceNorm2d(DIM), nn.Conv2d(3, DIM, 3, padding=1)
        self.scale = nn.Sequential(nn.Conv2d(DIM, DIM, 3, padding=1), nn.InstanceNorm2d(DIM))
        self.shift = nn.Conv2d(DIM, DIM, 3, padding=1)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        x = self.norm(x.contiguous())
        labels = torch.relu(self.shared(F.interpolate(labels, size=x.shape[2:])))
        return x * (1 + self.scale(labels)) + self.shift(labels)


class ModulatedBlock(nn.Module):
    """A block of a GauGAN whose shortcut is modulated too."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(Modulated() for _ in range(3))
        self.a, self.b, self.shortcut = (nn.Conv2d(DIM, DIM, n, padding=n // 2) for n in (3, 3, 1))

    def operands(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        branch = self.a(F.leaky_relu(self.norms[0](x, labels)))
        branch = self.b(F.leaky_relu(self.norms[1](branch, labels)))
        return self.shortcut(self.norms[2](x, labels)), branch

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        skip, branch = self.operands(x, labels)
        return skip + branch


@trap
class AModulatedShortcut(Trap):
    """The state passes a norm that labels modulate, of which it was computed itself at the start."""

    expected = (Expected("blocks.0", "projection", depth=2), Expected("blocks.1", "projection", depth=2))
    shape = (2, 3, 16, 16)

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, DIM, 3, padding=1)
        self.blocks = nn.ModuleList(ModulatedBlock() for _ in range(2))

    def forward(self, labels: Tensor) -> Tensor:
        x = self.first(F.interpolate(labels, size=(4, 4)))
        for block in self.blocks:
            x = F.interpolate(block(x, labels), scale_factor=2.0)
        return x

    def reference(self, labels: Tensor, *, h: Sequence[float]) -> Tensor:
        x = self.first(F.interpolate(labels, size=(4, 4)))
        for factor, block in zip(h, self.blocks, strict=True):
            skip, branch = block.operands(x, labels)  # type: ignore[operator]
            x = F.interpolate(skip + factor * branch, scale_factor=2.0)
        return x


@trap
class SeparableShortcut(Shortcut):
    """GhostNet: a depthwise convolution and one of size 1, with norms and without an activation, are one map."""

    def __init__(self) -> None:
        super().__init__()
        depthwise, pointwise = nn.Conv2d(DIM, DIM, 3, 2, 1, groups=DIM), nn.Conv2d(DIM, DIM, 1)
        self.fit = nn.Sequential(depthwise, nn.BatchNorm2d(DIM), pointwise, nn.BatchNorm2d(DIM))
        self.down = nn.Conv2d(DIM, DIM, 3, 2, 1, groups=DIM)

    def skip(self, x: Tensor) -> Tensor:
        return self.fit(x)

    def branch(self, x: Tensor) -> Tensor:
        return self.f(self.down(x))


@trap
class TwoMapsAreNoShortcut(WithABlock):
    """With an activation between them they are a branch of their own, as the towers of an Inception are."""

    shape = (2, DIM, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(DIM, DIM, 3, padding=1, groups=DIM), nn.ReLU(), nn.Conv2d(DIM, DIM, 1))
        self.other = nn.Sequential(*(nn.Conv2d(DIM, DIM, 3, padding=1) for _ in range(3)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(x)
        return self.one(x) + self.other(x)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        x = self.block.reference(x, h[0])
        return self.one(x) + self.other(x)


@trap
class ValuesAreNoShortcut(WithABlock):
    """EfficientFormerV2: attention whose values have a depthwise convolution of their own is one branch."""

    expected = each("block", "<root>")
    shape = (2, DIM, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.stride = nn.Conv2d(DIM, DIM, 3, 2, 1, groups=DIM)
        self.query, self.key, self.value, self.out = (nn.Conv2d(DIM, DIM, 1) for _ in range(4))
        self.local = nn.Conv2d(DIM, DIM, 3, 1, 1, groups=DIM)

    def attend(self, x: Tensor) -> Tensor:
        x = self.stride(x)
        value = self.value(x)
        scores = self.query(x).flatten(2).mT @ self.key(x).flatten(2)
        attended = (scores.softmax(-1) @ value.flatten(2).mT).mT.view_as(value)
        return self.out(F.relu(F.interpolate(attended + self.local(value), scale_factor=2.0)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(x)
        return x + self.attend(x)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        x = self.block.reference(x, h[0])
        return x + h[1] * self.attend(x)


@trap
class TokenAndOthers(WithABlock):
    """ViViT with MOSS: the class token is the skip, and the branch is pooled from all other tokens."""

    expected = (Expected("block", depth=2), Expected(kind="projection", depth=2))
    shape = (2, 5, DIM)

    def __init__(self) -> None:
        super().__init__()
        self.f = linear()

    def operands(self, x: Tensor) -> tuple[Tensor, Tensor]:
        token, others = x[:, :1], x[:, 1:]
        return token.squeeze(1), F.relu(self.f(others)).mean(1)

    def forward(self, x: Tensor) -> Tensor:
        token, pooled = self.operands(self.block(x))
        return token + pooled

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        token, pooled = self.operands(self.block.reference(x, h[0]))
        return token + h[1] * pooled


@trap
class HalvesOfOneConvolution(WithABlock):
    """DEIMv2's CSP layer: one convolution gives the shortcut and what the branch begins with; two would be the same."""

    expected = (Expected("block", depth=2), Expected(kind="projection", depth=2))
    shape = (2, DIM, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.both, self.f = nn.Conv2d(DIM, 2 * DIM, 1), nn.Conv2d(DIM, DIM, 3, padding=1)
        self.out = nn.Conv2d(DIM, DIM, 1)

    def operands(self, x: Tensor) -> tuple[Tensor, Tensor]:
        shortcut, x = self.both(x).chunk(2, dim=1)
        return shortcut, F.relu(self.f(x))

    def forward(self, x: Tensor) -> Tensor:
        shortcut, x = self.operands(self.block(x))
        return self.out(shortcut + x)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        shortcut, x = self.operands(self.block.reference(x, h[0]))
        return self.out(shortcut + h[1] * x)
