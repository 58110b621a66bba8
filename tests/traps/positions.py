"""What is not a step: positions, masks and scores that are added."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tests.traps.base import DIM, Expected, Trap, WithABlock, each, linear, mlp, trap


@trap
class PositionEmbedding(WithABlock):
    """Learned and fixed position embeddings, and a bias, all of the state's own shape."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = linear()
        self.position = nn.Parameter(torch.randn(2, 5, DIM))
        self.register_buffer("fixed", torch.randn(2, 5, DIM))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x) + self.position
        x += self.fixed
        return self.block(x) + self.position

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        return self.block.reference(self.patch(x) + self.position + self.fixed, h[0]) + self.position


@trap
class Embeddings(WithABlock):
    """The sum of a word's, a position's and a segment's embedding (BERT), then a timestep's projection."""

    def __init__(self) -> None:
        super().__init__()
        self.word, self.position, self.segment = (nn.Embedding(10, DIM) for _ in range(3))
        self.time = linear()

    def inputs(self) -> tuple[Tensor, Tensor]:
        return torch.randint(10, (2, 5)), torch.randn(2, 1, DIM)

    def embed(self, ids: Tensor, time: Tensor) -> Tensor:
        positions = torch.arange(5).expand(2, 5)
        x = self.word(ids) + self.segment(torch.zeros_like(ids))
        return x + self.position(positions) + self.time(time).expand(2, 5, DIM)

    def forward(self, ids: Tensor, time: Tensor) -> Tensor:
        return self.block(self.embed(ids, time))

    def reference(self, ids: Tensor, time: Tensor, *, h: Sequence[float]) -> Tensor:
        return self.block.reference(self.embed(ids, time), h[0])


@trap
class PositionsInEveryLayer(Trap):
    """DETR: the layers add the positions to queries and keys again; by then the state derives from the positions."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.value = linear(), linear()

        def attend(self, x: Tensor, position: Tensor) -> Tensor:
            query = self.query(x + position)
            return torch.softmax(query @ (x + position).mT, dim=-1) @ self.value(x)

        def forward(self, x: Tensor, position: Tensor) -> Tensor:
            return x + self.attend(x, position)

    expected = each("layers.0", "layers.1", "layers.2")

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(2, 5, DIM))
        self.layers = nn.ModuleList(self.Layer() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, self.position)
        return x

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        for factor, layer in zip(h, self.layers, strict=True):
            x = x + factor * layer.attend(x, self.position)
        return x


@trap
class PositionsInEveryTurn(Trap):
    """The same in one forward, where no argument separates state and positions."""

    expected = (Expected(calls=3, depth=3),)

    def __init__(self) -> None:
        super().__init__()
        self.position, self.a = nn.Parameter(torch.randn(2, 5, DIM)), mlp()

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            y = x + self.position
            x = x + self.a(y)
        return x

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        for _ in range(3):
            x = x + h[0] * self.a(x + self.position)
        return x


class Scores(nn.Module):
    """Attention scores and whatever is added to them, of one shape."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = linear(), linear(), linear()

    def attend(self, x: Tensor, bias: Tensor) -> Tensor:
        scores = self.query(x) @ self.key(x).mT
        scores = scores + bias
        return torch.softmax(scores, dim=-1) @ self.value(x)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        return x + self.attend(x, bias)


@trap
class AttentionMask(Trap):
    """A mask of the scores' own shape that was computed from the input."""

    expected = (Expected("attention"),)

    def __init__(self) -> None:
        super().__init__()
        self.attention = Scores()

    def mask(self, x: Tensor) -> Tensor:
        empty = x.sum(-1).lt(-1e3)
        return torch.zeros_like(x[..., :1].expand(-1, -1, 5)).masked_fill(empty.unsqueeze(1), -1e4)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, self.mask(x))

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        return x + h[0] * self.attention.attend(x, self.mask(x))


@trap
class RelativePositionsPassedDown(Trap):
    """T5: the first layer's bias goes to all layers as an argument; by then the state derives from it."""

    expected = each("layers.0", "layers.1", "layers.2")

    def __init__(self) -> None:
        super().__init__()
        self.relative = nn.Embedding(9, 1)
        self.layers = nn.ModuleList(Scores() for _ in range(3))

    def bias(self) -> Tensor:
        distance = torch.arange(5).unsqueeze(1) - torch.arange(5) + 4
        return self.relative(distance).squeeze(-1).expand(2, 5, 5)

    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias()
        for layer in self.layers:
            x = layer(x, bias)
        return x

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        for factor, layer in zip(h, self.layers, strict=True):
            x = x + factor * layer.attend(x, self.bias())
        return x


@trap
class ScoresPassedDown(Trap):
    """RealFormer: the scores of one layer are added to the next layer's, a stream of siblings beside the state."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.value = linear(), linear()

        def attend(self, x: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
            scores = self.query(x) @ x.mT + before
            return torch.softmax(scores, dim=-1) @ self.value(x), scores

        def forward(self, x: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
            branch, scores = self.attend(x, before)
            return x + branch, scores

    expected = each("first", "second")

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = self.Layer(), self.Layer()

    def forward(self, x: Tensor) -> Tensor:
        x, scores = self.first(x, x.new_zeros(2, 5, 5))
        return self.second(x, scores)[0]

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        branch, scores = self.first.attend(x, x.new_zeros(2, 5, 5))
        x = x + h[0] * branch
        return x + h[1] * self.second.attend(x, scores)[0]


@trap
class Rotary(Trap):
    """Rotary embeddings: ``q * cos + rotate(q) * sin``."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.value = linear(), linear()
        angle = torch.arange(5.0).unsqueeze(1) * torch.ones(DIM)
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())

    def rotate(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=-1)
        return x * self.cos + torch.cat((-right, left), dim=-1) * self.sin

    def attend(self, x: Tensor) -> Tensor:
        query, key = self.rotate(self.query(x)), self.rotate(x)
        return torch.softmax(query @ key.mT, dim=-1) @ self.value(x)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attend(x)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        return x + h[0] * self.attend(x)
