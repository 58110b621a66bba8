"""Kinds of branches: recurrent, Fourier, attention, the layers of PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.traps.base import DIM, Expected, Form, Trap, each, mlp, trap, two


@trap
class RecurrentBranches(Trap):
    """GRU, LSTM and a cell as branches."""

    autocast = False  # oneDNN has no bfloat16 LSTM on every processor
    expected = tuple(Expected(f"<root>:{i}", depth=3) for i in range(3))

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(DIM, DIM, batch_first=True)
        self.lstm = nn.LSTM(DIM, DIM // 2, batch_first=True, bidirectional=True)
        self.cell = nn.GRUCell(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.gru(x)[0]
        out, _ = self.lstm(x)
        x = out + x
        return x + torch.stack([self.cell(token) for token in x.unbind(1)], dim=1)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        x = x + h[0] * self.gru(x)[0]
        x = x + h[1] * self.lstm(x)[0]
        return x + h[2] * torch.stack([self.cell(token) for token in x.unbind(1)], dim=1)


@trap
class MixingWithoutAModule(Trap):
    """Branches that are functions: einsum, ``@``, attention, convolution, pooling."""

    expected = tuple(Expected(f"<root>:{i}", depth=5) for i in range(5))
    shape = (2, 5, DIM)

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.kernel = nn.Parameter(torch.randn(DIM, DIM)), nn.Parameter(torch.randn(5, 5, 3))

    def branches(self) -> list[Callable[[Tensor], Tensor]]:
        return [
            lambda x: torch.einsum("btc,cd->btd", x, self.weight),
            lambda x: x @ self.weight,
            lambda x: F.scaled_dot_product_attention(x, x, x),
            lambda x: F.conv1d(x, self.kernel, padding=1),
            lambda x: F.avg_pool1d(x, 3, 1, 1),
        ]

    def forward(self, x: Tensor) -> Tensor:
        einsum, matmul, attention, convolution, pooling = self.branches()
        x = x + einsum(x)
        x = x + matmul(x)
        x = x + attention(x)
        x = x + convolution(x)
        return x + pooling(x)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        for factor, branch in zip(h, self.branches(), strict=True):
            x = x + factor * branch(x)
        return x


@trap
class FourierBranch(Form):
    """A Fourier transform mixes the tokens (FNet)."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.fft.fft2(x).real

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        return x + h[0] * torch.fft.fft2(x).real


@trap
class ClassTokenIsTheState(Trap):
    """The state is a parameter, the class token, which attends to the image (CaiT)."""

    expected = two()

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, DIM))
        self.attention, self.mlp = nn.MultiheadAttention(DIM, 2, batch_first=True), mlp()

    def attend(self, token: Tensor, x: Tensor) -> Tensor:
        x = torch.cat((token, x), dim=1)
        return self.attention(token, x, x, need_weights=False)[0]

    def forward(self, x: Tensor) -> Tensor:
        token = self.token.expand(len(x), -1, -1)
        token = token + self.attend(token, x)
        return token + self.mlp(token)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        token = self.token.expand(len(x), -1, -1)
        token = token + h[0] * self.attend(token, x)
        return token + h[1] * self.mlp(token)


@trap
class LearnedQueriesAreTheState(Trap):
    """The state is an embedding's weight, the queries, which attend to the input (Perceiver, DETR)."""

    expected = each("layers.0", "layers.1")

    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(DIM, 2, batch_first=True)

        def attend(self, queries: Tensor, x: Tensor) -> Tensor:
            return self.attention(queries, x, x, need_weights=False)[0]

        def forward(self, queries: Tensor, x: Tensor) -> Tensor:
            return queries + self.attend(queries, x)

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Embedding(4, DIM)
        self.layers = nn.ModuleList(self.Cross() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        queries = self.queries.weight.unsqueeze(0).repeat(len(x), 1, 1)
        for layer in self.layers:
            queries = layer(queries, x)
        return queries

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        queries = self.queries.weight.unsqueeze(0).repeat(len(x), 1, 1)
        for factor, layer in zip(h, self.layers, strict=True):
            queries = queries + factor * layer.attend(queries, x)
        return queries


def encoder_reference(layer: nn.TransformerEncoderLayer, x: Tensor, h: Sequence[float]) -> Tensor:
    """``nn.TransformerEncoderLayer``, written by hand."""

    def attend(y: Tensor) -> Tensor:
        return layer.dropout1(layer.self_attn(y, y, y, need_weights=False)[0])

    def feed(y: Tensor) -> Tensor:
        return layer.dropout2(layer.linear2(layer.dropout(layer.activation(layer.linear1(y)))))

    if layer.norm_first:
        x = x + h[0] * attend(layer.norm1(x))
        return x + h[1] * feed(layer.norm2(x))
    x = layer.norm1(x + h[0] * attend(x))
    return layer.norm2(x + h[1] * feed(x))


def decoder_reference(layer: nn.TransformerDecoderLayer, x: Tensor, memory: Tensor, h: Sequence[float]) -> Tensor:
    """``nn.TransformerDecoderLayer``, post-norm, written by hand."""
    x = layer.norm1(x + h[0] * layer.dropout1(layer.self_attn(x, x, x, need_weights=False)[0]))
    x = layer.norm2(x + h[1] * layer.dropout2(layer.multihead_attn(x, memory, memory, need_weights=False)[0]))
    feed = layer.linear2(layer.dropout(layer.activation(layer.linear1(x))))
    return layer.norm3(x + h[2] * layer.dropout3(feed))


class Encoder(Trap):
    """``nn.TransformerEncoderLayer``, whose fused inference path never reaches its Python additions."""

    expected = two("layer")
    fused_inference = True
    norm_first: ClassVar[bool]

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(DIM, 2, 12, batch_first=True, norm_first=self.norm_first)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        return encoder_reference(self.layer, x, h)


@trap
class EncoderPostNorm(Encoder):
    """The default."""

    norm_first = False


@trap
class EncoderPreNorm(Encoder):
    """With ``norm_first=True``."""

    norm_first = True


@trap
class EncoderOfTwoLayers(Trap):
    """``nn.TransformerEncoder``, which has a path of its own with nested tensors."""

    expected = two("encoder.layers.0", 4) + two("encoder.layers.1", 4)
    fused_inference = True

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(DIM, 2, 12, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        for i, layer in enumerate(self.encoder.layers):
            x = encoder_reference(layer, x, h[2 * i :])
        return x


@trap
class DecoderLayer(Trap):
    """``nn.TransformerDecoderLayer``: three steps, and the memory is none of its states."""

    expected = tuple(Expected(f"layer:{i}", depth=3) for i in range(3))

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerDecoderLayer(DIM, 2, 12, batch_first=True)

    def inputs(self) -> tuple[Tensor, Tensor]:
        return torch.randn(2, 5, DIM), torch.randn(2, 5, DIM)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        return self.layer(x, memory)

    def reference(self, x: Tensor, memory: Tensor, *, h: Sequence[float]) -> Tensor:
        return decoder_reference(self.layer, x, memory, h)


@trap
class WholeTransformer(Trap):
    """``nn.Transformer``: two streams, the encoder's and the decoder's."""

    expected = two("net.encoder.layers.0") + tuple(Expected(f"net.decoder.layers.0:{i}", depth=3) for i in range(3))
    fused_inference = True

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Transformer(DIM, 2, 1, 1, 12, batch_first=True)

    def inputs(self) -> tuple[Tensor, Tensor]:
        return torch.randn(2, 5, DIM), torch.randn(2, 4, DIM)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return self.net(x, target)

    def reference(self, x: Tensor, target: Tensor, *, h: Sequence[float]) -> Tensor:
        memory = self.net.encoder.norm(encoder_reference(self.net.encoder.layers[0], x, h))
        return self.net.decoder.norm(decoder_reference(self.net.decoder.layers[0], target, memory, h[2:]))
