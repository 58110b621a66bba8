"""Train one network, or several side by side: plain PyTorch, with nothing on the way that waits for the host.

`stack` has the other way to train several: as one network by groups.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import eulernet
from reproductions.data.batches import Samples, Source
from reproductions.models import ConvBlock
from reproductions.training.network import Network, build, layers, learning_rate, make_optimizer
from reproductions.trial import CALIBRATE, Trial

WARM_UP = 3  # iterations before a CUDA graph is captured: they set up libraries and the optimiser's state
EVALUATED = 1000  # samples at once
REESTIMATED = 100  # batches of which BN statistics are estimated anew
POINTS = 150  # iterations of a log that a record keeps
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else matrix products on several streams vary


@contextlib.contextmanager
def precise(backend: Any, precision: str) -> Iterator[None]:
    """A backend of CUDA computes in float32 where the precision is fp32, else in TF32; afterwards as before.

    torch 2.8 has the older name of the setting alone, and later releases warn of that one.
    """
    new = ("fp32_precision", "ieee", "tf32")
    name, exact, fast = new if hasattr(backend, new[0]) else ("allow_tf32", False, True)
    before = getattr(backend, name)
    try:
        setattr(backend, name, exact if precision == "fp32" else fast)
        yield
    finally:
        setattr(backend, name, before)


@contextlib.contextmanager
def settings(precision: str) -> Iterator[None]:
    """Deterministic, and with TF32 convolutions where the trial allows them; afterwards all is as it was."""
    cudnn: Any = torch.backends.cudnn
    memory: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = memory.fill_uninitialized_memory
    try:
        torch.use_deterministic_algorithms(True, warn_only=True)
        memory.fill_uninitialized_memory = False  # a kernel for each new tensor
        with precise(getattr(cudnn, "conv", cudnn), precision):
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        memory.fill_uninitialized_memory = fill


class Training:
    """One training: network, optimiser and what was measured so far.

    Args:
        trial: the configuration.
        source: where the batches come from.
        device: where to train.
        start: the trained state to begin with, where the trial names one.
    """

    def __init__(self, trial: Trial, source: Source, device: torch.device, start: dict[str, Tensor] | None = None):
        self.trial, self.source, self.device = trial, source, device
        self.network: Network = build(trial, start).to(device)
        if device.type == "cuda" and trial.data == "cifar10":
            self.network.to(memory_format=torch.channels_last)
        self.drawn = source.draw(trial.seed, 0).to(device)
        if trial.h == CALIBRATE:
            batch = source.batch(self.drawn[: trial.batch_size])
            eulernet.set_h(self.network, eulernet.calibrate(self.network, batch, nn.functional.cross_entropy))
        if trial.precision == "bf16":
            keep_stream_in_fp32(self.network)
        self.optimizer = make_optimizer(trial, self.network, device)
        self.epoch, self.seconds = 0, 0.0
        self.rate = math.nan  # that the optimiser was told last
        self.curve: dict[str, list[float]] = {}
        self.log: list[Tensor] = []  # an epoch each: a row an iteration, of loss, right answers, and norms

        numbered = layers(self.network)
        self.logged = {n: numbered[n - 1].weight for n in (2, len(numbered) // 2, len(numbered))} if trial.log else {}
        self.sizes = [trial.batch_size] * (len(source) // trial.batch_size)
        self.sizes += [rest] if (rest := len(source) % trial.batch_size) else []
        self.rows = torch.empty(len(self.sizes), 2 + 2 * len(self.logged), device=device)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)  # samples that the epoch has seen
        self.iteration = torch.zeros(1, dtype=torch.int64, device=device)
        self.offsets = torch.arange(trial.batch_size, device=device)
        self.places = torch.arange(len(self.sizes), device=device)[:, None]

    # ---- an epoch
    def begin(self) -> None:
        self.drawn.copy_(self.source.draw(self.trial.seed, self.epoch))
        self.position.zero_()
        self.iteration.zero_()
        self.network.train()
        self.rate = math.nan

    def set_rate(self, iteration: int) -> None:
        """Give the optimiser the learning rate of an iteration of this epoch."""
        rate = learning_rate(self.trial, self.epoch, self.epoch * len(self.sizes) + iteration)
        if rate == self.rate:
            return
        self.rate = rate
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate * group["rate"])
            else:
                group["lr"] = rate * group["rate"]

    def step(self, size: int) -> None:
        """One iteration, on the next `size` samples."""
        inputs, labels = self.batch(size)
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(self.trial, self.device):
            logits = self.network(inputs)
        loss = nn.functional.cross_entropy(wide(logits), labels)
        torch.autograd.backward(loss)
        self.after(loss, logits, labels)

    def batch(self, size: int) -> Samples:
        """The next `size` samples of the epoch."""
        return self.source.batch(self.drawn[self.position + self.offsets[:size]])

    def after(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """What follows when the gradients are there: clip, measure, take the optimiser's step."""
        size = len(labels)
        if self.trial.clip:
            nn.utils.clip_grad_norm_(self.network.parameters(), self.trial.clip)
        with torch.no_grad():
            measured = [loss.detach() * size, (logits.argmax(dim=1) == labels).sum().float()]
            if self.logged:
                weights = list(self.logged.values())
                measured += [
                    *torch._foreach_norm(weights),
                    *torch._foreach_norm([w.grad for w in weights if w.grad is not None]),
                ]
            row = torch.stack(measured)[None].to(self.rows.dtype)
            self.rows.copy_(torch.where(self.places == self.iteration, row, self.rows))
        self.optimizer.step()
        self.position += size
        self.iteration += 1

    def finish(self, accuracies: Mapping[str, float] | None = None) -> None:
        """Wait for the epoch's end, test (where the `accuracies` are not given), and note what came out."""
        rows = self.rows.cpu()
        self.log.append(rows.clone())
        self.epoch += 1
        self._note("train_loss", rows[:, 0].sum().item() / len(self.source))
        self._note("train_accuracy", rows[:, 1].sum().item() / len(self.source))
        for name in tested(self.source):
            self._note(f"{name}_accuracy", self.accuracy(name) if accuracies is None else accuracies[name])

    def _note(self, name: str, value: float) -> None:
        self.curve.setdefault(name, []).append(value)

    @property
    def done(self) -> bool:
        """Whether all epochs are over, or the loss is not finite any more."""
        return self.epoch >= self.trial.epochs or not math.isfinite(self.curve.get("train_loss", [0.0])[-1])

    # ---- tests
    @torch.no_grad()
    def accuracy(self, name: str) -> float:
        """The share of right answers on one of the source's tests, in evaluation mode."""
        self.network.eval()
        right = torch.zeros((), dtype=torch.int64, device=self.device)
        inputs, labels = self.source.tests[name]
        for some, wanted in zip(torch.split(inputs, EVALUATED), torch.split(labels, EVALUATED), strict=True):
            with autocast(self.trial, self.device):
                right += (self.network(self.source.prepare(some)).argmax(dim=1) == wanted).sum()
        return right.item() / max(1, len(labels))

    @torch.no_grad()
    def reestimate(self) -> None:
        """Replace the running BN statistics by averages over batches as they are in training, all weighing the same."""
        norms = [m for m in self.network.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
        self.network.train()
        drawn = self.source.draw(self.trial.seed, self.trial.epochs).to(self.device)
        whole = torch.split(drawn, self.trial.batch_size)[
            : max(1, min(REESTIMATED, len(drawn) // self.trial.batch_size))
        ]
        for rows in whole:
            with autocast(self.trial, self.device):
                self.network(self.source.batch(rows)[0])
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum

    def result(self) -> dict[str, Any]:
        """What came out, when the training is done; the network's BN statistics are re-estimated on the way."""
        outcome = self.outcome()
        if not self.trial.norm:
            return self.whole(outcome, None)
        self.reestimate()
        return self.whole(outcome, self.accuracy("test"))

    def outcome(self) -> dict[str, Any]:
        """What came out but for the log, with BN as the training left it."""
        steps = eulernet.steps(self.network)
        factors = [step.h for step in steps]
        last = {name: values[-1] for name, values in self.curve.items()}
        result: dict[str, Any] = {
            "failed": failed(last["train_loss"], self.trial.class_count),
            "residual_steps": len(steps),
            "h": factors[0] if len(set(factors)) == 1 else factors,
            **last,
            "best_test_accuracy": max(self.curve["test_accuracy"]),
        }
        for name in self.source.tests.keys() - {"test", "validation"}:
            result[f"{name}_accuracy" if name == "distinct" else name] = self.accuracy(name)
        result["feature_steps"] = feature_steps(self.network, self.source)
        return result

    def whole(self, outcome: dict[str, Any], reestimated: float | None) -> dict[str, Any]:
        """An outcome with the test accuracy after BN was re-estimated, the curve, and the log."""
        result = dict(outcome)
        if reestimated is not None:
            result["test_accuracy_reestimated"] = reestimated
        result["curve"] = self.curve
        if self.logged:
            result["log"] = self._log()
        return result

    def _log(self) -> dict[str, Any]:
        """The norms of some layers: at some iterations, on the average over all, and how bumpy at the end."""
        rows = torch.cat(self.log)
        shown = torch.unique(torch.logspace(0, math.log10(len(rows)), POINTS).round().long()) - 1
        late = rows[-math.ceil(len(rows) / 10) :]
        norms: dict[str, Any] = {"iterations": shown.tolist()}
        for index, layer in enumerate(self.logged):
            weight, gradient = 2 + index, 2 + len(self.logged) + index
            norms[f"layer {layer}"] = {
                "weight": rows[shown, weight].tolist(),
                "gradient": rows[shown, gradient].tolist(),
                "mean_weight": rows[:, weight].mean().item(),
                "largest_gradient": rows[:, gradient].max().item(),
                "late_gradient": late[:, gradient].mean().item(),
                "late_variation": (late[:, gradient].std(correction=0) / late[:, gradient].mean()).item(),
            }
        return norms

    # ---- to go on after the process has ended
    def state(self) -> dict[str, Any]:
        saved = "epoch seconds curve log".split()
        return {
            "network": self.weights(),
            "optimizer": self.optimizer.state_dict(),
            **{name: getattr(self, name) for name in saved},
        }

    def weights(self) -> dict[str, Tensor]:
        """The network's state, to be saved: of views all that they are views of would be written."""
        return {name: value.clone() for name, value in self.network.state_dict().items()}

    def load(self, state: dict[str, Any]) -> None:
        """Go on where a training on any device was left."""
        self.network.load_state_dict(state.pop("network"))
        # The groups stay this device's: a captured graph is told no learning rate that is not a tensor.
        own = self.optimizer.state_dict()
        self.optimizer.load_state_dict({**own, "state": state.pop("optimizer")["state"]})
        for name, value in state.items():
            setattr(self, name, value)


def failed(train_loss: float, classes: int) -> bool:
    """Whether a training has failed: its last loss is not finite, or hardly below that of guessing.

    Example:
        >>> failed(2.1, 10), failed(2.2, 10), failed(math.nan, 10)
        (False, True, True)
    """
    return not train_loss <= 0.95 * math.log(classes)


def autocast(trial: Trial, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=trial.precision == "bf16")


def wide(logits: Tensor) -> Tensor:
    """In float32 at least."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def tested(source: Source) -> set[str]:
    """The tests that are made after each epoch."""
    return {"test", "validation"} & source.tests.keys()


@contextlib.contextmanager
def fastest_convolutions(wanted: bool) -> Iterator[None]:
    """Let cuDNN time its algorithms for the shapes that come, and keep the fastest; among the deterministic ones."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = wanted
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def keep_stream_in_fp32(network: nn.Module) -> None:
    """Under autocast, cast to fp32 what enters the residual stream; what is added to it is cast by the addition.

    In a stream in bf16 the increments of a small h would be rounded away.
    """
    for name, module in network.named_modules():
        if name in ("conv", "bn") or name.endswith("shortcut"):
            module.register_forward_hook(lambda module, inputs, output: output.float())


@torch.no_grad()
def feature_steps(network: nn.Module, source: Source, samples: int = 200) -> list[float]:
    """`||x_{n+1} - x_n|| / ||x_n||` of each block that keeps the shape: the mean over test samples."""
    ratios: list[float] = []

    def measure(block: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        if inputs[0].shape == output.shape:
            before, after = inputs[0].float().flatten(1), output.float().flatten(1)
            ratios.append(((after - before).norm(dim=1) / before.norm(dim=1)).mean().item())

    blocks = [m for m in network.modules() if isinstance(m, ConvBlock)]
    handles = [block.register_forward_hook(measure) for block in blocks]
    network.eval()
    network(source.prepare(source.tests["test"][0][:samples]))
    for handle in handles:
        handle.remove()
    return ratios


class SideBySide:
    """Trainings that go on at the same time, iteration by iteration; all have the same sizes of batches.

    On a CUDA device each has a stream of its own, and one iteration of all is captured in one CUDA graph: launching it
    costs the host as much as one kernel, and what one small network leaves idle the others use.
    """

    def __init__(self, trainings: Sequence[Training]) -> None:
        self.trainings = list(trainings)
        (self.sizes,) = {tuple(training.sizes) for training in trainings}
        self.device = trainings[0].device
        self.streams: list[Any] = []
        self.stream: Any = None  # where iterations are warmed up and captured
        self.graph: Any = None
        self.warmed = 0
        self.captures = self.device.type == "cuda" and all(t.trial.optimizer != "adagrad" for t in trainings)
        if self.device.type == "cuda":
            self.stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
            self.streams = [torch.cuda.Stream(self.device) for _ in trainings]  # type: ignore[no-untyped-call]

    def epoch(self, progress: Callable[[int], None] = lambda done: None) -> None:
        """One epoch of all; `progress` is called with the number of iterations that were begun."""
        started = time.perf_counter()
        for training in self.trainings:
            training.begin()
        for iteration, size in enumerate(self.sizes):
            for training in self.trainings:
                training.set_rate(iteration)
            self.step(size)
            progress(iteration + 1)
        self.finish()
        for training in self.trainings:
            training.seconds += (time.perf_counter() - started) / len(self.trainings)

    def finish(self) -> None:
        """The end of an epoch."""
        for training in self.trainings:
            training.finish()

    def results(self) -> list[dict[str, Any]]:
        """What came out of each, when all are done."""
        return [training.result() for training in self.trainings]

    def step(self, size: int) -> None:
        """One iteration of all."""
        if self.graph is not None and size == self.sizes[0]:
            self.graph.replay()
            return
        with fastest_convolutions(self.device.type == "cuda" and size == self.sizes[0]):
            if not self.captures or size != self.sizes[0]:
                self._each(size)
            elif self.warmed < WARM_UP:
                self._warm_up(size)
                self.warmed += 1
            else:
                self.graph = self._capture(size)
                self.graph.replay()

    def _warm_up(self, size: int) -> None:
        if self.stream is None:
            return self._each(size)
        main = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(main)
        with torch.cuda.stream(self.stream):
            self._each(size)
        main.wait_stream(self.stream)

    def _capture(self, size: int) -> Any:
        graph = torch.cuda.CUDAGraph()
        self._drop_gradients()
        with torch.cuda.graph(graph, stream=self.stream):
            self._each(size)
        return graph

    def _drop_gradients(self) -> None:
        """The gradients are to lie in the graph's memory."""
        for training in self.trainings:
            training.optimizer.zero_grad(set_to_none=True)

    def _each(self, size: int) -> None:
        if not self.streams:
            for training in self.trainings:
                training.step(size)
            return
        main = torch.cuda.current_stream(self.device)
        for stream in self.streams:  # first of all, since one of PyTorch's few streams may be `main` itself
            stream.wait_stream(main)
        for training, stream in zip(self.trainings, self.streams, strict=True):
            with torch.cuda.stream(stream):
                training.step(size)
        for stream in self.streams:
            main.wait_stream(stream)
