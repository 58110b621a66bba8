"""Trainings of small transformers over depth: independent, a minute each, in one thread or on a GPU."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import time
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

import eulernet
from reproductions.data.pieces import SIDE, pieces
from reproductions.records import Record, environment
from reproductions.training.loop import precise

BASE = 4  # blocks of the shallow network
HEADS, PATCH, WARM_UP = 4, 4, 15
PART = 64  # of what is held out at a time
MEAN_OVER = 10  # iterations a point of a curve
MARGIN = 0.05  # nats by which the loss must be below that of the labels' frequencies, or the training has failed


@dataclass(frozen=True)
class Cell:
    """The configuration of one training.

    Attributes:
        model: `gpt`, on bytes of AG-NEWS, or `vit`, on CIFAR-10 shrunk to 16 x 16.
        depth: blocks; each adds twice.
        h: what `eulernet.patch` is given.
        projections: how the output projections start: `plain` as all other maps, `gpt2` smaller by sqrt(2 depth) as in
            GPT-2, or `zero`.
        initial: standard deviation of the initial weights.
        optimizer: `adamw` with betas 0.9 and 0.95 and no decay, or `sgd` with momentum 0.9.
        learning_rate: after a warm-up over the first tenth of 150 iterations; then constant.
        hidden_rate: factor on the learning rate of the blocks.
        hidden_epsilon: factor on Adam's epsilon of the blocks.
        iterations: so many batches.
        seed: of the initial weights and of the order of the data.
        width: of the stream.
        texts: of a batch; a batch of images has 32.
        context: bytes of a text.
        precision: of matrix products on a GPU, `fp32` or `tf32`.
    """

    model: Literal["gpt", "vit"] = "gpt"
    depth: int = BASE
    h: float = 1.0
    projections: Literal["plain", "gpt2", "zero"] = "plain"
    initial: float = 0.125
    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = 4e-3
    hidden_rate: float = 1.0
    hidden_epsilon: float = 1.0
    iterations: int = 150
    seed: int = 0
    width: int = 64
    texts: int = 8
    context: int = 64
    precision: Literal["fp32", "tf32"] = "fp32"

    @property
    def key(self) -> str:
        """The hash of the configuration; what is as it is by default has no part in it."""
        changed = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return hashlib.sha256(json.dumps({"study": "transfer", **changed}, sort_keys=True).encode()).hexdigest()[:12]

    def config(self) -> dict[str, Any]:
        """As a record has it."""
        return asdict(self)


# ---- network and optimiser
def plain(cell: Cell) -> nn.Module:
    """The network of a cell, as its library makes it, with the cell's initial weights; no patch, no dropout."""
    network, blocks, projections = _vit(cell) if cell.model == "vit" else _gpt(cell)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if blocks in name and parameter.dim() == 2:
                scale = 1.0
                if name.endswith(projections):
                    scale = {"plain": 1.0, "zero": 0.0, "gpt2": (2 * cell.depth) ** -0.5}[cell.projections]
                parameter.normal_(0.0, cell.initial).mul_(scale)
    return network


def _gpt(cell: Cell) -> tuple[nn.Module, str, tuple[str, ...]]:
    """The network, what the names of its blocks' parameters hold, how those of output projections end."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=256,
        n_positions=cell.context,
        n_embd=cell.width,
        n_layer=cell.depth,
        n_head=HEADS,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
        initializer_range=cell.initial,
    )
    return GPT2LMHeadModel(config), ".h.", ("c_proj.weight",)


def _vit(cell: Cell) -> tuple[nn.Module, str, tuple[str, ...]]:
    from timm.models import VisionTransformer

    network = VisionTransformer(
        img_size=SIDE, patch_size=PATCH, num_classes=10, embed_dim=cell.width, depth=cell.depth, num_heads=HEADS
    )
    return network, "blocks.", ("attn.proj.weight", "fc2.weight")


@lru_cache(maxsize=8)
def _patched(shape: Cell) -> nn.Module:
    """A patched network to copy, since to trace one of 64 blocks takes seconds."""
    inputs = torch.zeros(1, 8, dtype=torch.int64) if shape.model == "gpt" else torch.zeros(1, 3, SIDE, SIDE)
    with torch.random.fork_rng(devices=[]):  # the cell's random numbers stay its own
        network = plain(shape)
    return eulernet.patch(network, h=1.0, example_inputs=inputs)


def build(cell: Cell) -> nn.Module:
    """The patched network of a cell, before training."""
    torch.manual_seed(cell.seed)
    network = plain(cell)
    shape = Cell(model=cell.model, depth=cell.depth, width=cell.width, context=cell.context)
    patched = copy.deepcopy(_patched(shape))
    patched.load_state_dict(network.state_dict())
    eulernet.set_h(patched, cell.h)
    return patched


def make_optimizer(cell: Cell, network: nn.Module) -> torch.optim.Optimizer:
    """The optimiser; the blocks are a group of their own."""
    named = list(network.named_parameters())
    where = ".h." if cell.model == "gpt" else "blocks."
    blocks = [p for name, p in named if where in name]
    rest = [p for name, p in named if where not in name]
    groups: list[dict[str, Any]] = [
        {"params": rest, "lr": cell.learning_rate},
        {"params": blocks, "lr": cell.learning_rate * cell.hidden_rate},
    ]
    if cell.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=0.9)
    groups[0]["eps"], groups[1]["eps"] = 1e-8, 1e-8 * cell.hidden_epsilon
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0, fused=True)


# ---- one training
def loss_of(network: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    out = network(inputs)
    logits: Tensor = out if isinstance(out, Tensor) else out.logits
    return nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten())


def train(cell: Cell, data_root: str, until: float = math.inf, device: str = "cpu") -> Record | None:
    """The record of a training; None if it was not done at the time `until` (seconds since the epoch)."""
    with precise(torch.backends.cuda.matmul, cell.precision):
        return _train(cell, data_root, until, device)


def _train(cell: Cell, data_root: str, until: float, device: str) -> Record | None:
    started, started_cpu = time.perf_counter(), time.process_time()
    samples = pieces(cell.model, data_root, cell.texts, cell.context)
    network = build(cell).to(device)
    optimizer = make_optimizer(cell, network)
    rates = [group["lr"] for group in optimizer.param_groups]
    generator = torch.Generator().manual_seed(cell.seed + 1000)
    losses: list[float] = []
    for iteration in range(cell.iterations):
        if time.time() > until:
            return None
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * min(1.0, (iteration + 1) / WARM_UP)
        loss = loss_of(network, *(part.to(device) for part in samples.batch(generator)))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
        if not losses[-1] < 1e3:
            break
    network.eval()
    with torch.no_grad():
        parts = zip(*(torch.split(part.to(device), PART) for part in samples.held_out()), strict=True)
        tests = [(loss_of(network, *part).item(), len(part[0])) for part in parts]
    test_loss = sum(loss * count for loss, count in tests) / sum(count for _, count in tests)
    failed = not test_loss < samples.chance - MARGIN
    curve = [float(np.mean(losses[i : i + MEAN_OVER])) for i in range(0, len(losses), MEAN_OVER)]
    return {
        "study": "transfer",
        "key": cell.key,
        "config": cell.config(),
        "result": {
            "test_loss": test_loss,
            "failed": failed,
            "iterations": len(losses),
            "curve": curve,
            "chance": samples.chance,
        },
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - started_cpu,
        "environment": environment(device),
    }
