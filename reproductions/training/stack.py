"""K trainings as one network by groups: each layer of it is the K layers of the trials beside each other.

The trials' own parameters, gradients and BN statistics are views of the stacked ones. Forward and backward are done
once, for all; the rest (optimiser, clipping, logs, tests, checkpoints) is each trial's own, as if it were alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import eulernet
from reproductions.models import ConvBlock
from reproductions.training.loop import (
    REESTIMATED,
    SideBySide,
    Training,
    autocast,
    fastest_convolutions,
    keep_stream_in_fp32,
    tested,
    wide,
)
from reproductions.training.network import Network

_KINDS = ("weight", "bias", "running_mean", "running_var")


# ---- the layers
class Linears(nn.Module):
    """K linear maps: (N, K * inputs) or (N, K, inputs) -> (N, K, outputs)."""

    def __init__(self, k: int, like: nn.Linear) -> None:
        super().__init__()
        self.k = k
        self.weight = nn.Parameter(like.weight.new_empty(k, *like.weight.shape))
        self.bias = nn.Parameter(like.bias.new_empty(k, *like.bias.shape))

    def forward(self, x: Tensor) -> Tensor:
        x = x.reshape(len(x), self.k, -1).transpose(0, 1)
        return torch.baddbmm(self.bias[:, None], x, self.weight.transpose(1, 2)).transpose(0, 1)


class Embeddings(nn.Module):
    """K tables: letters (N, K, L) -> (N, L, K * width); row 0 of each is padding, zero and without a gradient."""

    def __init__(self, k: int, like: nn.Embedding) -> None:
        super().__init__()
        self.weight = nn.Parameter(like.weight.new_empty(k, *like.weight.shape))

    def forward(self, letters: Tensor) -> Tensor:
        k, rows, width = self.weight.shape
        index = letters + torch.arange(k, device=letters.device)[:, None] * rows
        x = F.embedding(index, self.weight.reshape(k * rows, width)) * (letters != 0)[..., None]
        return x.transpose(1, 2).flatten(2)


def layer(k: int, m: nn.Module) -> nn.Module:
    """The layer that is K of this one; itself, if it has no parameters."""
    if isinstance(m, nn.Conv1d | nn.Conv2d):
        shape: Any = (k * m.in_channels, k * m.out_channels, m.kernel_size, m.stride, m.padding)
        conv: Any = type(m)
        stacked: nn.Module = conv(*shape, groups=k, bias=m.bias is not None)
        return stacked
    if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d):
        norm = type(m)(k * m.num_features, m.eps, m.momentum)
        norm.num_batches_tracked = None
        return norm
    return Linears(k, m) if isinstance(m, nn.Linear) else Embeddings(k, m) if isinstance(m, nn.Embedding) else m


# ---- the block
Map = tuple[Tensor | None, ...]  # weight and bias of a convolution; weight, bias, mean and variance of its BN


def convolve(
    x: Tensor, layers: Map, h: Tensor | None, stride: int, groups: int, training: bool, momentum: float
) -> Tensor:
    """A convolution of width 3 and its BN; the last affine map of them is multiplied by h, a number a channel."""
    weight, bias, scale, shift, mean, variance = layers
    if h is not None and scale is None and weight is not None and bias is not None:
        weight, bias = weight * h.view(-1, *[1] * (weight.dim() - 1)), bias * h
    conv: Any = F.conv1d if x.dim() == 3 else F.conv2d
    y: Tensor = conv(x, weight, bias, stride, 1, 1, groups)
    if scale is None or shift is None:
        return y
    if h is not None:
        scale, shift = scale * h, shift * h
    return F.batch_norm(y, mean, variance, scale, shift, training, momentum)


def step(
    x: Tensor,
    skip: Tensor,
    first: Map,
    second: Map,
    h: Tensor,
    stride: int,
    groups: int,
    training: bool,
    momentum: float,
) -> Tensor:
    """`relu(skip + h F(x))` of K blocks; h costs no pass over the features, since the last affine map takes it up."""
    y = convolve(x, first, None, stride, groups, training, momentum).relu_()
    y = convolve(y, second, h, 1, groups, training, momentum)
    return (skip + y).relu_()


class Blocks(nn.Module):
    """K blocks whose layers are stacked already; h holds a number a channel."""

    def __init__(self, k: int, block: ConvBlock, h: Tensor) -> None:
        super().__init__()
        self.k, self.stride = k, block.conv1.stride[0]
        self.conv1, self.bn1, self.conv2, self.bn2 = block.conv1, block.bn1, block.conv2, block.bn2
        self.shortcut = block.shortcut
        self.h: Tensor
        self.register_buffer("h", h, persistent=False)
        self.compute: Callable[..., Tensor] = step

    def forward(self, x: Tensor) -> Tensor:
        maps: list[Any] = []
        for conv, norm in ((self.conv1, self.bn1), (self.conv2, self.bn2)):
            there = norm if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d) else None
            maps.append((conv.weight, conv.bias, *(getattr(there, kind, None) for kind in _KINDS)))
        momentum = getattr(self.bn1, "momentum", 0.1)
        compute = self.compute if isinstance(self.shortcut, nn.Identity) else step
        return compute(x, self.shortcut(x), maps[0], maps[1], self.h, self.stride, self.k, self.training, momentum)


def stack(networks: Sequence[Network]) -> nn.Module:
    """One network that computes what all do, which become views of it: (N, K * C, ...) -> (N, K, classes).

    Args:
        networks: patched networks of one shape, on one device, in their final dtype; they must not be moved afterwards.

    Returns:
        The network: of images (N, K * 3, height, width) it makes logits of shape (N, K, classes), of letters those of
        (N, K, places). Its gradients are zeros, allocated once.
    """
    k, first = len(networks), networks[0]
    one: nn.Module = eulernet.unpatch(copy.deepcopy(first))
    for name, old in first.named_modules():
        new = layer(k, old)
        if new is old:
            continue
        like = next(old.parameters())
        new.to(like.device, like.dtype)
        if like.dim() == 4:
            new.to(memory_format=torch.channels_last)
        one.set_submodule(name, new)
        for kind in _KINDS:
            if (whole := getattr(new, kind, None)) is not None:
                _share(whole, [getattr(network.get_submodule(name), kind) for network in networks])
    factors = [{found.name: found.h for found in eulernet.steps(network)} for network in networks]
    for name, old in first.named_modules():
        if isinstance(old, ConvBlock):
            like = old.conv2.weight
            h = torch.tensor([of[name] for of in factors], dtype=like.dtype, device=like.device)
            stacked: Any = one.get_submodule(name)
            one.set_submodule(name, Blocks(k, stacked, h.repeat_interleave(old.conv2.out_channels)))
    return one


def _share(whole: Tensor, parts: Sequence[Tensor]) -> None:
    """Copy the parts into the whole, and make them views of it; their gradients too."""
    with torch.no_grad():
        whole.copy_(torch.cat([part.detach() for part in parts]).view_as(whole))
    if isinstance(whole, nn.Parameter):
        whole.grad = torch.zeros_like(whole)
    for index, part in enumerate(parts):
        rows = index if whole.dim() > part.dim() else slice(index * len(part), (index + 1) * len(part))
        part.grad = None
        part.data = whole.detach()[rows]
        if whole.grad is not None:
            part.grad = whole.grad[rows]


# ---- the engine
class Stacked(SideBySide):
    """Trainings that go on as one network; their networks must not be moved while they are here.

    Args:
        trainings: of one model and depth, with batches of the same sizes and tests of the same sizes.
        compiled: let torch.compile fuse what lies between the convolutions of blocks that keep the shape.
    """

    def __init__(self, trainings: Sequence[Training], compiled: bool = False) -> None:
        super().__init__(trainings)
        self.network = stack([training.network for training in trainings])
        if self.trainings[0].trial.precision == "bf16":
            keep_stream_in_fp32(self.network)
        self.parameters = list(self.network.parameters())
        self.gradients = [p.grad for p in self.parameters if p.grad is not None]
        self.blocks = [m for m in self.network.modules() if isinstance(m, Blocks)]
        self.fast: Callable[..., Tensor] = torch.compile(step, dynamic=False) if compiled else step

    def _each(self, size: int) -> None:
        losses, logits, labels = self.differentiate(size)
        for index, training in enumerate(self.trainings):
            training.after(losses[index], logits[:, index], labels[:, index])

    def differentiate(self, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Forward and backward on the next batch of each: the losses (K), the logits, the labels (N, K)."""
        self._compute_by(self.fast if size == self.sizes[0] else step)
        self.network.train()
        batches = [training.batch(size) for training in self.trainings]
        labels = torch.stack([batch[1] for batch in batches], dim=1)
        with self._autocast():
            logits = self.network(_join([batch[0] for batch in batches]))
        losses = F.cross_entropy(wide(logits).flatten(0, 1), labels.flatten(), reduction="none").view_as(labels).mean(0)
        # The sum may be NaN; its gradients are not, but for those of the trial that is.
        torch._foreach_copy_(self.gradients, torch.autograd.grad(losses.sum(), self.parameters))
        return losses, logits, labels

    def _compute_by(self, compute: Callable[..., Tensor]) -> None:
        for block in self.blocks:
            block.compute = compute

    def _autocast(self) -> torch.autocast:
        return autocast(self.trainings[0].trial, self.device)

    def _drop_gradients(self) -> None:
        """They have been where they are from the start."""

    def finish(self) -> None:
        found = {name: self.accuracies(name) for name in tested(self.trainings[0].source)}
        for index, training in enumerate(self.trainings):
            training.finish({name: values[index] for name, values in found.items()})

    @torch.no_grad()
    def accuracies(self, name: str) -> list[float]:
        """The share of right answers of each trial on one of the tests."""
        self._compute_by(step)
        self.network.eval()
        tests = [training.source.tests[name] for training in self.trainings]
        right = torch.zeros(len(tests), dtype=torch.int64, device=self.device)
        count = len(tests[0][1])
        size = self.sizes[0]  # of which cuDNN knows the fastest algorithms by now
        for start in range(0, count, size):
            rows = slice(start, start + size)
            inputs = [t.source.prepare(part[0][rows]) for t, part in zip(self.trainings, tests, strict=True)]
            with self._autocast(), fastest_convolutions(self.device.type == "cuda" and len(inputs[0]) == size):
                answers = self.network(_join(inputs)).argmax(dim=-1)
            right += (answers == torch.stack([part[1][rows] for part in tests], dim=1)).sum(dim=0)
        return [n / max(1, count) for n in right.tolist()]

    def results(self) -> list[dict[str, Any]]:
        """As each trial's own `result`, with BN re-estimated in one go."""
        outcomes = [training.outcome() for training in self.trainings]
        found: list[float] | list[None] = [None] * len(outcomes)
        if self.trainings[0].trial.norm:
            self.reestimate()
            found = self.accuracies("test")
        return [t.whole(o, again) for t, o, again in zip(self.trainings, outcomes, found, strict=True)]

    @torch.no_grad()
    def reestimate(self) -> None:
        """As `Training.reestimate`: the mean over batches, by a momentum of 1, 1/2, 1/3, ..."""
        norms: list[Any] = [m for m in self.network.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.running_mean.zero_()  # else a NaN would stay
            norm.running_var.zero_()
        self._compute_by(step)
        self.network.train()
        size = self.trainings[0].trial.batch_size
        drawn = [t.source.draw(t.trial.seed, t.trial.epochs).to(self.device) for t in self.trainings]
        for number in range(max(1, min(REESTIMATED, len(drawn[0]) // size))):
            rows = slice(number * size, (number + 1) * size)
            for norm in norms:
                norm.momentum = 1 / (number + 1)
            with self._autocast(), fastest_convolutions(self.device.type == "cuda"):
                batches = [t.source.batch(d[rows])[0] for t, d in zip(self.trainings, drawn, strict=True)]
                self.network(_join(batches))
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def _join(inputs: Sequence[Tensor]) -> Tensor:
    """Images beside each other on the channels, in channels_last; texts on an axis of their own."""
    if inputs[0].dim() == 4:
        return torch.cat(list(inputs), dim=1).contiguous(memory_format=torch.channels_last)
    return torch.stack(list(inputs), dim=1)


WAYS = ("stacked", "compiled", "separate")


def together(trainings: Sequence[Training], way: str) -> SideBySide:
    """Trainings at once in one of the WAYS; one alone is the plain network."""
    if len(trainings) == 1 or way == "separate":
        return SideBySide(trainings)
    return Stacked(trainings, compiled=way == "compiled")
