"""Trainings of the study `transfer`: small, many, independent, each by one thread of a process of its own."""

from __future__ import annotations

import copy
import math
import multiprocessing
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

import eulernet
from reproductions.data import load_cifar10
from reproductions.records import FILE, Record, append_record, environment, read_records
from reproductions.texts import load_ag_news
from reproductions.transfer import MARGIN, Cell

WIDTH, HEADS, WARM_UP = 64, 4, 15
CONTEXT, TEXTS, HELD_OUT_TEXTS = 64, 8, 128  # bytes of a text, texts of a batch
SIDE, PATCH, IMAGES, TRAIN_IMAGES, HELD_OUT_IMAGES = 16, 4, 32, 10_000, 2_000
PART = 64  # of what is held out at a time
MEAN_OVER = 10  # iterations a point of a curve
SHRUNK = "cifar-10-16x16.npz"
Show = Callable[[str, float], None]  # what is trained, the share of all work that is done
Samples = tuple[Tensor, Tensor]  # what the network takes, and the labels of what it says


# ---- data
class Data(Protocol):
    """What one kind of network is trained and tested on."""

    @property
    def chance(self) -> float:
        """The loss that the frequencies of the labels give: that of a network that looks at nothing."""

    def batch(self, generator: torch.Generator) -> Samples: ...
    def held_out(self) -> Samples: ...


class Bytes:
    """The bytes of AG-NEWS, in pieces of 64 from anywhere; each is to say the next one."""

    def __init__(self, data_root: str) -> None:
        news = zip(load_ag_news(data_root), (20_000, 2_000), strict=True)
        train, test = (np.frombuffer("\n".join(part.texts[:count]).encode(), np.uint8) for part, count in news)
        counts = np.bincount(train, minlength=256) + 1
        self.chance = -float(np.log(counts / counts.sum())[test].mean())
        self.train, self.test = (torch.from_numpy(part.copy()) for part in (train, test))

    def batch(self, generator: torch.Generator) -> Samples:
        return self._pieces(self.train, TEXTS, generator)

    def held_out(self) -> Samples:
        return self._pieces(self.test, HELD_OUT_TEXTS, torch.Generator().manual_seed(7))

    def _pieces(self, data: Tensor, count: int, generator: torch.Generator) -> Samples:
        starts = torch.randint(0, len(data) - CONTEXT, (count, 1), generator=generator)
        pieces = data[starts + torch.arange(CONTEXT + 1)].long()
        return pieces[:, :-1], pieces[:, 1:]


class Pictures:
    """10,000 images of CIFAR-10 to train on and 2,000 to test, shrunk to 16 x 16."""

    chance = math.log(10)

    def __init__(self, data_root: str) -> None:
        with np.load(shrunk(Path(data_root))) as parts:
            self.parts = {name: torch.from_numpy(parts[name]) for name in parts}

    def batch(self, generator: torch.Generator) -> Samples:
        chosen = torch.randint(0, TRAIN_IMAGES, (IMAGES,), generator=generator)
        return self._normalised(self.parts["train"][chosen]), self.parts["train_labels"][chosen]

    def held_out(self) -> Samples:
        return self._normalised(self.parts["test"]), self.parts["test_labels"]

    def _normalised(self, pixels: Tensor) -> Tensor:
        return (pixels / 255 - 0.45) / 0.25


def shrunk(data_root: Path) -> Path:
    """The file of the shrunk images, made beside the data where it is missing."""
    path = data_root / SHRUNK
    if not path.exists():
        arrays: dict[str, Any] = {}
        for name, images, count in zip(
            ("train", "test"), load_cifar10(data_root), (TRAIN_IMAGES, HELD_OUT_IMAGES), strict=True
        ):
            small = nn.functional.adaptive_avg_pool2d(images.pixels[:count].float(), SIDE)
            arrays |= {name: small.round().byte().numpy(), f"{name}_labels": images.labels[:count].numpy()}
        np.savez(path, **arrays)
    return path


@lru_cache(maxsize=2)
def data(model: str, data_root: str) -> Data:
    return Bytes(data_root) if model == "gpt" else Pictures(data_root)


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
        n_positions=CONTEXT,
        n_embd=WIDTH,
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
        img_size=SIDE, patch_size=PATCH, num_classes=10, embed_dim=WIDTH, depth=cell.depth, num_heads=HEADS
    )
    return network, "blocks.", ("attn.proj.weight", "fc2.weight")


@lru_cache(maxsize=8)
def _patched(model: Literal["gpt", "vit"], depth: int) -> nn.Module:
    """A patched network to copy, since to trace one of 64 blocks takes seconds."""
    inputs = torch.zeros(1, 8, dtype=torch.int64) if model == "gpt" else torch.zeros(1, 3, SIDE, SIDE)
    with torch.random.fork_rng(devices=[]):  # the cell's random numbers stay its own
        network = plain(Cell(model=model, depth=depth))
    return eulernet.patch(network, h=1.0, example_inputs=inputs)


def build(cell: Cell) -> nn.Module:
    """The patched network of a cell, before training."""
    torch.manual_seed(cell.seed)
    network = plain(cell)
    patched = copy.deepcopy(_patched(cell.model, cell.depth))
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


def train(cell: Cell, data_root: str, until: float = math.inf) -> Record | None:
    """The record of a training; None if it was not done at the time `until` (seconds since the epoch)."""
    started, started_cpu = time.perf_counter(), time.process_time()
    samples = data(cell.model, data_root)
    network = build(cell)
    optimizer = make_optimizer(cell, network)
    rates = [group["lr"] for group in optimizer.param_groups]
    generator = torch.Generator().manual_seed(cell.seed + 1000)
    losses: list[float] = []
    for iteration in range(cell.iterations):
        if time.time() > until:
            return None
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * min(1.0, (iteration + 1) / WARM_UP)
        loss = loss_of(network, *samples.batch(generator))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
        if not losses[-1] < 1e3:
            break
    network.eval()
    with torch.no_grad():
        parts = zip(*(torch.split(part, PART) for part in samples.held_out()), strict=True)
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
        "environment": environment(),
    }


# ---- all of them
def work(cell: Cell) -> float:
    """How much there is to do, roughly in block iterations on 8 texts; a batch of images is as much."""
    return (cell.depth + 1) * (cell.iterations + 30)


def _start(models: frozenset[str], data_root: str) -> None:
    """A process of the pool: one thread, and what its first training would else wait for."""
    torch.set_num_threads(1)
    for model in models:
        data(model, data_root)
    plain(Cell(depth=1))


def run(
    cells: Sequence[Cell],
    folder: Path,
    data_root: Path,
    workers: int,
    minutes: float = math.inf,
    show: Show = lambda label, share: None,
) -> list[Record]:
    """Train what has no record yet, in the order given, and return the records of all that have one.

    Each finished training is appended at once. Nothing is begun that would not be done in time, judged by the slowest
    training so far; where that is so of a cell, a later one that is shorter is taken.
    """
    until = time.time() + 60 * minutes
    done = {record["key"] for record in recorded(cells, folder)}
    left = [cell for cell in cells if cell.key not in done]
    total, finished = sum(map(work, cells)), sum(work(cell) for cell in cells if cell.key in done)
    slowest = 0.0  # seconds a unit of work
    flight: dict[Future[Record | None], Cell] = {}
    models = frozenset(cell.model for cell in left)
    if "vit" in models:
        shrunk(data_root)  # once, before many want it
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        workers, mp_context=context, initializer=_start, initargs=(models, str(data_root))
    ) as pool:
        while True:
            while len(flight) < workers:
                fits = (cell for cell in left if time.time() + slowest * work(cell) < until)
                if (cell := next(fits, None)) is None:
                    break
                left.remove(cell)
                flight[pool.submit(train, cell, str(data_root), until)] = cell
            if not flight:
                break
            for future in wait(flight, return_when=FIRST_COMPLETED).done:
                cell = flight.pop(future)
                if (record := future.result()) is None:
                    continue
                append_record(folder, record)
                slowest = max(slowest, record["seconds"] / work(cell))
                finished += work(cell)
                show(label(cell), finished / total)
    return recorded(cells, folder)


def recorded(cells: Iterable[Cell], folder: Path) -> list[Record]:
    """The records that there are of some cells, in their order."""
    found = {r["key"]: r for r in read_records(folder)} if (folder / FILE).exists() else {}
    return [found[cell.key] for cell in cells if cell.key in found]


def label(cell: Cell) -> str:
    """What the progress bar calls a training."""
    return f"{cell.model}-{cell.depth}, h = {cell.h:.3g}, {cell.optimizer} {cell.learning_rate:g}, seed {cell.seed}"
