"""Run a copy of a model on a batch, and measure what its steps do to features, gradients and noise."""

from __future__ import annotations

import copy
import random
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map

from eulernet._checks import check_model, described, short, unwrapped, whole_number
from eulernet._errors import EulernetError, EulernetWarning
from eulernet._find.apart import led_to
from eulernet._find.inputs import as_arguments
from eulernet._find.sandbox import Sandbox, measuring
from eulernet._patch.patch import assign, is_patched, patch
from eulernet._run.hooks import StepInputs, add_step_hook
from eulernet._run.patched import Patched, by_module
from eulernet._step import Step
from eulernet._tune.overwritten import Kept

# From the model's output and the targets to a tensor of one number.
LossFn = Callable[[Any, Any], Tensor]
_ITERATIONS, _TOLERANCE = 100, 1e-5  # of the power iteration


@dataclass
class MeasuredCall:
    """One run of one step, and what was measured of it; None is "not measured".

    Attributes:
        skip, increment: ||s|| and ||h F||.
        gradient: the norm of the loss's gradient with respect to the state that skip and branch come from.
        after: the norm of its gradient with respect to the step's result.
        gain: the largest singular value of the Jacobian of F.
        dimension: the number of elements of s for one sample.
    """

    step: Step
    h: float
    places: set[int] = field(default_factory=set)
    skip: float | None = None
    increment: float | None = None
    gradient: float | None = None
    after: float | None = None
    gain: float | None = None
    dimension: int = 1
    # what the measurements need while they are made
    state: GradientEdge | None = None
    result: GradientEdge | None = None
    branches: list[tuple[GradientEdge, float, Tensor]] = field(default_factory=list)  # with alpha and a tensor like it
    kept: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Noise:
    """Euclidean norms of differences between a clean and a noisy run: at x_0, at x_D, and the largest one of an F."""

    start: float
    end: float
    branch: float

    @property
    def amplification(self) -> float:
        return self.end / self.start


class StepMeter:
    """A copy of a model, patched at h = 1 where the model is not, in train mode; the model itself never runs."""

    def __init__(self, model: nn.Module, batch: Any, loss_fn: LossFn | None, seed: int, caller: str) -> None:
        self.caller = caller
        model = unwrapped(model) if isinstance(model, nn.Module) else model
        check_model(model, caller)
        self.name = type(model).__name__
        if any(t.is_meta for t in (*model.parameters(), *model.buffers())):
            raise EulernetError(f"{self.name} is on the meta device and has no values to measure: give it some first")
        self.seed = whole_number(seed, "seed", "seed=0", most=2**63 - 1)  # torch takes no larger ones
        if loss_fn is not None and not (isinstance(batch, tuple | list) and len(batch) == 2):
            raise EulernetError(
                f"with loss_fn the batch is a pair: eulernet.{caller}(model, (inputs, targets), loss_fn), where inputs "
                "is a tensor, a tuple or a dict"
            )
        self.targets: Any
        inputs, self.targets = batch if loss_fn is not None else (batch, None)
        self.args, self.kwargs = as_arguments(inputs)
        self.loss_fn = loss_fn
        self.notes: list[str] = []
        self.calls: list[MeasuredCall] = []
        self.watching: Callable[[MeasuredCall, StepInputs], None] | None = None
        with measuring():
            sandbox = Sandbox(model, fake=False)
        self.model, self.copies = sandbox.copy, sandbox.original
        for module in self.model.modules():
            module._backward_hooks.clear()
            module._backward_pre_hooks.clear()
        if not is_patched(self.model):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                try:
                    with led_to(self.copies):
                        patch(self.model, h=1.0, example_inputs=inputs)
                except EulernetError as error:
                    raise EulernetError(f"eulernet.{caller} measures a copy patched at h = 1, but: {error}") from error
            self.notes += [str(w.message) for w in caught if issubclass(w.category, EulernetWarning)]
        self.model.train()
        for parameter in self.model.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        self.buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        for patched, steps in by_module(self.model).items():
            add_step_hook(patched, partial(self._see, patched, steps))

    def set_h(self, h: Any) -> None:
        assign(self.model, h)

    # ---- runs

    def _see(self, module: Patched, steps: Sequence[Step], seen: StepInputs, add: Callable[[], Any]) -> Any:
        if not self.watching:
            return add()
        step, h = steps[seen.slot], module._euler[seen.slot].bound_to(module).value
        call = next((c for c in reversed(self.calls) if c.step is step), None)
        if call is None or seen.place in call.places:  # several places are one step: parallel branches
            call = MeasuredCall(step, h)
            self.calls.append(call)
        call.places.add(seen.place)
        self.watching(call, seen)
        result = add()
        if torch.is_grad_enabled():
            call.result = _edge(result)
        elif isinstance(result, Tensor):
            call.kept["result"] = result.detach().clone()
        return result

    def _run(self, watching: Callable[[MeasuredCall, StepInputs], None], args: Any, kwargs: Any) -> Any:
        """Run the copy, always from the same buffers and random numbers."""
        _seed(self.seed)
        with torch.no_grad():
            for buffer, before in self.buffers:
                buffer.copy_(before)
        self.calls, self.watching = [], watching
        try:
            return self.model(*args, **kwargs)
        except Exception as error:
            raise EulernetError(
                f"{self.name} failed in train mode on the batch {described((self.args, self.kwargs))}: "
                f"{short(error)}. Pass what the model takes: eulernet.{self.caller}(model, batch), a tensor, a tuple "
                "of positional arguments or a dict of keyword arguments"
            ) from error
        finally:
            self.watching = None

    # ---- gradients

    def gradients(self, gains: bool = False) -> list[MeasuredCall]:
        """One forward and one backward pass: norms of skips, increments and gradients, in the order of execution."""
        backend = sdpa_kernel(SDPBackend.MATH) if gains else torch.enable_grad()  # the others have one derivative only
        with measuring(self.copies), torch.enable_grad(), backend:
            args, kwargs = tree_map(_differentiable, (self.args, self.kwargs))
            loss = self._loss(self._run(_measure, args, kwargs))
            edges = [e for c in self.calls for e in (c.state, c.result) if e is not None]
            found = self._backward(loss, edges, gains) if edges else ()
            norms = iter([None if g is None else _norm(g) for g in found])
            for call in self.calls:
                call.gradient = next(norms) if call.state is not None else None
                call.after = next(norms) if call.result is not None else None
                if gains:
                    call.gain = self._gain(call)
        calls, self.calls = self.calls, []
        for call in calls:
            call.state = call.result = None
            call.branches.clear()
        return calls

    def _backward(self, loss: Tensor, edges: list[GradientEdge], retain: bool) -> Sequence[Tensor | None]:
        try:
            return torch.autograd.grad(loss, edges, retain_graph=retain, allow_unused=True)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            kept, (args, kwargs) = Kept(self.model), tree_map(_differentiable, (self.args, self.kwargs))
            kept.during(lambda: self._run(lambda call, seen: kept.see(call.step.name, seen), args, kwargs))
            raise EulernetError(
                f"{self.name} cannot be trained on this batch, since its backward fails: "
                f"{kept.overwritten() or short(error)}. Once loss.backward() runs, call "
                f"eulernet.{self.caller}(model, batch) again"
            ) from error

    def _loss(self, output: Any) -> Tensor:
        if self.loss_fn is None:
            return self._projection(output)
        try:
            loss = self.loss_fn(output, copy.deepcopy(self.targets))
        except Exception as error:
            raise EulernetError(
                f"loss_fn(output, targets) failed: {short(error)}. The batch is (inputs, targets)"
            ) from error
        if not (isinstance(loss, Tensor) and loss.dim() == 0 and loss.requires_grad):
            raise EulernetError(
                f"loss_fn returned {repr(loss)[:80]}; it must return a loss, a tensor of one number with a graph"
            )
        return loss

    def _projection(self, output: Any) -> Tensor:
        """The scalar product of all outputs with a fixed random direction of length 1."""
        generator = torch.Generator().manual_seed(self.seed)
        outputs = [t for t in _tensors(output) if t.requires_grad]
        if not outputs:
            raise EulernetError(
                f"{self.name} returned no tensor with a gradient in a tuple, list or dict. Say what to differentiate: "
                f"eulernet.{self.caller}(model, (inputs, targets), loss_fn)"
            )
        directions = [torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in outputs]
        length = sum(d.square().sum().item() for d in directions) ** 0.5
        total = sum((t * (d / length).to(t.device, t.dtype)).sum() for t, d in zip(outputs, directions, strict=True))
        assert isinstance(total, Tensor)
        return total

    def _gain(self, call: MeasuredCall) -> float | None:
        """Power iteration: u = J v by the derivative of v -> J^T v, then v = J^T u, each scaled to length 1."""
        state = call.state
        if state is None or not call.branches:
            return None
        edges, alphas, (like, *_) = zip(*call.branches, strict=True)  # F is their sum
        direction = torch.randn_like(like).requires_grad_()
        gain = 0.0

        def transpose(w: Tensor, **options: bool) -> Tensor:
            (v,) = torch.autograd.grad(edges, [state], [alpha * w for alpha in alphas], **options)
            return v

        try:
            # J^T w, linear in w, so that its derivative in the direction of v is J v.
            transposed = transpose(direction, create_graph=True)
            v = torch.randn_like(transposed)
            for _ in range(_ITERATIONS):
                v = v / torch.linalg.vector_norm(v)
                u = torch.autograd.grad(transposed, direction, v, retain_graph=True)[0]
                last, gain = gain, torch.linalg.vector_norm(u).item()
                if gain == 0 or abs(gain - last) <= _TOLERANCE * gain:
                    break
                v = transpose(u / gain, retain_graph=True)
        except RuntimeError as error:
            self.notes.append(f"the gain of {call.step.name} was not measured: {short(error)}")
            return None
        return gain

    # ---- noise

    def noise(self, size: float) -> Noise | None:
        """Two runs without gradients, one of them with Gaussian noise of `size` times the norm of the input in it."""
        with measuring(self.copies), torch.no_grad():
            arguments = tree_map(_copied, (self.args, self.kwargs))
            self._run(_keep, *arguments)
            clean = stream(self.calls)
            generator = torch.Generator().manual_seed(self.seed)
            add = partial(_with_noise, size=size, generator=generator)
            floating = any(isinstance(t, Tensor) and t.is_floating_point() for t in tree_leaves(arguments))
            arguments = tree_map(lambda t: add(_copied(t)), (self.args, self.kwargs))
            handles = [] if floating else self._noisy_embedding(add)
            try:
                self._run(_keep, *arguments)
            finally:
                for handle in handles:
                    handle.remove()
            noisy, self.calls = stream(self.calls), []
            if len(clean) != len(noisy) or not clean or "skip" not in clean[0].kept or "result" not in clean[-1].kept:
                return None
            start = _difference(clean[0], noisy[0], "skip")
            end = _difference(clean[-1], noisy[-1], "result")
            branches = [_difference(a, b, "branch") for a, b in zip(clean, noisy, strict=True)]
        return Noise(start, end, max(branches)) if start > 0 else None

    def _noisy_embedding(self, add: Callable[[Any], Any]) -> list[Any]:
        """Tokens cannot be disturbed: what the first embedding makes of them is, in each module with its table."""
        tables: list[Any] = []

        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            tables.append(module.weight)
            return add(output) if module.weight is tables[0] else None

        return [m.register_forward_hook(hook) for m in self.model.modules() if isinstance(m, nn.Embedding)]


def stream(calls: Sequence[MeasuredCall]) -> list[MeasuredCall]:
    """The calls in the deepest residual stream."""
    deepest = most_frequent([c.step.stream for c in calls])
    return [c for c in calls if c.step.stream == deepest]


def most_frequent(numbers: Sequence[int]) -> int | None:
    return max(numbers, key=numbers.count, default=None)


def growth(calls: Sequence[MeasuredCall]) -> float | None:
    """||dL/dx_0|| / ||dL/dx_D|| in the deepest stream, as in Proposition 1."""
    mine = stream(calls)
    if not mine or mine[0].gradient is None or not mine[-1].after:
        return None
    return mine[0].gradient / mine[-1].after


# ---- what is done at an addition


def _measure(call: MeasuredCall, seen: StepInputs) -> None:
    skip, branch = seen.skip, seen.branch
    if isinstance(skip, Tensor) and len(call.places) == 1:
        call.skip = _norm(skip)
        call.dimension = skip[:1].numel() if skip.dim() > 1 else skip.numel()
        call.state = _state(skip, branch) if isinstance(branch, Tensor) else None
    if isinstance(branch, Tensor):
        increment = branch.detach() * (call.h * seen.alpha)
        if "increment" in call.kept:
            increment = call.kept["increment"] + increment
        if len(call.step.places) > 1:
            call.kept["increment"] = increment
        call.increment = _norm(increment)
        if (edge := _edge(branch)) is not None:
            call.branches.append((edge, seen.alpha, torch.zeros_like(branch.detach())))


def _keep(call: MeasuredCall, seen: StepInputs) -> None:
    if isinstance(seen.skip, Tensor) and "skip" not in call.kept:
        call.kept["skip"] = seen.skip.clone()
    if isinstance(seen.branch, Tensor):
        before = call.kept.get("branch")
        call.kept["branch"] = seen.branch * seen.alpha if before is None else before + seen.branch * seen.alpha


def _edge(tensor: Any) -> GradientEdge | None:
    return get_gradient_edge(tensor) if isinstance(tensor, Tensor) and tensor.requires_grad else None


def _state(skip: Tensor, branch: Tensor) -> GradientEdge | None:
    """The tensor that skip and branch come from: of those that the skip was made from, the nearest that the branch was
    made from too."""
    first, end = _edge(skip), _edge(branch)
    if first is None or end is None:
        return None
    pending = deque([first])
    while pending:
        edge = pending.popleft()
        if _reaches(end, edge):
            return edge
        before = [GradientEdge(node, number) for node, number in edge.node.next_functions if node is not None]
        pending += [e for e in before if not _is_leaf(e.node)]
    return None


def _is_leaf(node: Any) -> bool:
    return type(node).__name__ == "AccumulateGrad"


def _reaches(end: GradientEdge, start: GradientEdge) -> bool:
    """Whether the tensor at `end` was computed from the one at `start`; nodes are numbered as they were made."""
    oldest = start.node._sequence_nr()
    pending, seen = [end.node], {end.node}
    while pending:
        for node, number in pending.pop().next_functions:
            if node is start.node and number == start.output_nr:
                return True
            if node is None or node in seen or _is_leaf(node):
                continue
            if node._sequence_nr() > oldest:
                seen.add(node)
                pending.append(node)
    return False


# ---- tensors


def _tensors(output: Any) -> Iterator[Tensor]:
    yield from (t for t in tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point())


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)


def _differentiable(value: Any) -> Any:
    """A copy through which gradients flow; no leaf, since some models write into their input."""
    value = _copied(value)
    return value.requires_grad_().clone() if isinstance(value, Tensor) and value.is_floating_point() else value


def _with_noise(value: Any, size: float, generator: torch.Generator) -> Any:
    if not (isinstance(value, Tensor) and value.is_floating_point()):
        return value
    noise = torch.randn(value.shape, generator=generator).to(value)
    length = _norm(value) or value.numel() ** 0.5
    return value + noise * (size * length / _norm(noise))


def _norm(tensor: Tensor) -> float:
    dtype = torch.float32 if tensor.dtype in (torch.float16, torch.bfloat16) else None
    return float(torch.linalg.vector_norm(tensor.detach(), dtype=dtype))


def _difference(clean: MeasuredCall, noisy: MeasuredCall, name: str) -> float:
    a, b = clean.kept.get(name), noisy.kept.get(name)
    return 0.0 if a is None or b is None else _norm(b - a)


def _seed(seed: int) -> None:
    """Begin all numbers anew: while something is measured, those of generators of its own."""
    random.seed(seed)
    torch.manual_seed(seed)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(seed % 2**32)
