"""The last affine maps of a branch: the parameters that a factor of the branch can be moved into.

Multiplying a branch by a positive number is the same as multiplying certain parameters by it: those that are reached
from the branch's end, against the direction of computation, through operations that are homogeneous of degree one, such
as views, dropout, ReLU, pooling, and products with what does not change. The path ends at weights and biases: of a
convolution, a linear map, a norm, a LayerScale.

It is sound where each tensor on the path is read by the path alone, in eval and in train mode, and each parameter only
by branches that are multiplied alike.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from eulernet._commit import Change, Write
from eulernet._errors import EulernetError
from eulernet._find.graph import StepCall
from eulernet._find.operations import CASTS, VIEWS
from eulernet._find.search import Run, Search
from eulernet._find.tensors import all_modules, attributes_of, storage_of, tensors_in
from eulernet._find.trace import Node, Ref, Trace
from eulernet._step import ROOT, Step
from eulernet.kernels._layout import span


@dataclass(frozen=True)
class _Rule:
    """Where an operation lets a factor through: to one of its `factors`, and to all of its `addends`."""

    arguments: tuple[str, ...]
    factors: tuple[str, ...]
    addends: tuple[str, ...]


_HOMOGENEOUS = """
relu leaky_relu rrelu prelu dropout dropout1d dropout2d dropout3d feature_dropout neg
max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d
adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d mean sum amax
interpolate pixel_shuffle pixel_unshuffle fold unfold roll flip repeat repeat_interleave expand expand_as
index_select gather take_along_dim
"""
_RULES = {
    op: _Rule(*(tuple(part.split()) for part in (arguments, factors, addends)))
    for ops, arguments, factors, addends in (
        # what is called so             its arguments                     a factor  each addend
        (_HOMOGENEOUS, "input", "input", ""),
        (" ".join((VIEWS | CASTS) - {"copy"}), "input", "input", ""),
        ("copy", "input source", "source", ""),
        ("mul multiply rmul imul", "input other", "input other", ""),
        ("div divide true_divide truediv itruediv idiv", "input other", "input", ""),
        ("matmul rmatmul mm bmm mv", "input other", "other input", ""),
        ("einsum", "equation *operands", "operands", ""),
        ("add iadd radd subtract sub isub rsub maximum minimum", "input other", "", "input other"),
        ("cat concat concatenate stack hstack vstack", "tensors", "", "tensors"),
        ("overwritten", "input source", "", "input source"),
        ("where", "condition input other", "", "input other"),
        ("setitem", "input index source", "", "input source"),
        ("index_add index_copy scatter scatter_add", "input dim index source", "", "input source"),
        ("index_put", "input index source", "", "input source"),
        ("masked_scatter", "input mask source", "", "input source"),
        ("pad constant_pad_nd", "input pad mode value", "input", "value"),
        ("masked_fill", "input mask value", "input", "value"),
        ("clamp clip", "input min max", "input", "min max"),
        ("clamp_min clamp_max", "input bound", "input", "bound"),
        ("linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution",
         "input weight bias", "weight input", "bias"),
        ("addmm baddbmm", "input left right", "right left", "input"),
        ("addcmul", "input left right", "left right", "input"),
        ("batch_norm instance_norm", "input running_mean running_var weight bias", "weight", "bias"),
        ("layer_norm group_norm rms_norm", "input shape weight bias", "weight", "bias"),
        ("weight_norm", "v g", "g", ""),
        ("scaled_dot_product_attention", "query key value", "value", ""),
        ("multi_head_attention_forward",
         "query key value embed_dim heads in_proj_weight in_proj_bias bias_k bias_v add_zero_attn dropout_p "
         "out_proj_weight out_proj_bias", "out_proj_weight", "out_proj_bias"),
    )
    for op in ops.split()
}  # fmt: skip
# With other values of these arguments than such they are not.
_ONLY_WITH = {"reduce": (None, "add", "sum"), "rounding_mode": (None,)}
# Times any number these are what they were.
_ZEROS = frozenset("zeros zeros_like new_zeros zero empty empty_like new_empty".split())
# Results that do not depend on the parameters of the same operation's rule: running statistics, attention weights.
_BESIDES = {"batch_norm": -1, "instance_norm": -1, "multi_head_attention_forward": 1}
_OUTPUT = -1  # who reads what the model returns
_SHOWN = 4  # the steps that an error names


class NotAbsorbable(Exception):
    """Why a factor cannot be moved into parameters."""


Path = Counter[tuple[int, int]]  # (reader, node): how often the path leads from an operation to one of its operands


class _TracedRun:
    """One run of the model, with what the rules ask of it."""

    def __init__(self, trace: Trace, run: Run, names: Mapping[nn.Module, str]) -> None:
        self.trace = trace
        self.nodes = trace.nodes
        self.run = run
        self.names = names
        self.parameters = parameters_read(trace, run)
        self.readers: dict[int, Counter[int]] = defaultdict(Counter)
        for number, node in enumerate(self.nodes):
            if _BESIDES.get(node.op) != node.output:
                for read in _refs((node.args, list(node.kwargs.values()))):
                    self.readers[read][number] += 1
        for number in trace.outputs:
            self.readers[number][_OUTPUT] += 1

    def extend(self, way: _Way, step_call: StepCall) -> None:
        """By what leads from the branch of a step back to the parameters that scale it."""
        if step_call.mixture:
            raise NotAbsorbable("it goes a part of the way from one tensor to another, and is no sum of the two")
        if step_call.addition.op == "addcdiv" and step_call.branch != step_call.addition.right[0]:
            raise NotAbsorbable("its branch is what addcdiv divides by")
        path: Path = Counter()
        for reader in self.ends(step_call):
            self.trace_back(reader, step_call.branch, path)
            way.ends.add((reader, step_call.branch))
        way.path |= path

    def ends(self, step_call: StepCall) -> list[int]:
        """What reads the branch to sum it up: the sum itself, or what stacks the two first."""
        result, branch = step_call.addition.result, step_call.branch
        before, pending = {result}, [result]
        while pending:
            new = {i for i in self.nodes[pending.pop()].inputs if i > branch} - before
            before |= new
            pending += new
        return [result] if result in self.readers[branch] else [r for r in self.readers[branch] if r in before]

    def trace_back(self, reader: int, node: int, path: Path) -> None:
        if self.nodes[node].op in _ZEROS:
            return
        new = all(n != node for _, n in path)
        path[reader, node] += 1
        if new and node not in self.parameters:
            self.through(node, path)

    def through(self, node: int, path: Path) -> None:
        rule, arguments = self._rule(node)
        for name in rule.addends:
            for value in _flat(arguments.get(name)):
                if isinstance(value, Ref):
                    self._check_numbers(node, value)
                    self.trace_back(node, value, path)
                elif value:
                    raise NotAbsorbable(f"{self.told(node)} adds or inserts a number, {value!r}")
        if not rule.factors:
            return
        candidates = [v for name in rule.factors for v in _flat(arguments.get(name)) if isinstance(v, Ref)]
        candidates.sort(key=lambda n: not self.nodes[n].constant)  # a LayerScale rather than what it scales
        reasons = []
        for candidate in candidates:
            trial = path.copy()
            try:
                self._check_numbers(node, candidate)
                self.trace_back(node, candidate, trial)
                if len(candidates) > 1:
                    self._check_alone(trial, {n for _, n in path})
            except NotAbsorbable as reason:
                reasons.append(reason)
            else:
                path.update(trial - path)
                return
        raise NotAbsorbable("; ".join(map(str, reasons)) or f"{self.told(node)} has no weight")

    def _check_numbers(self, node: int, operand: int) -> None:
        """What went through integers or truth values was rounded."""
        made = self.nodes[node]
        if operand not in made.inputs and operand not in self.parameters and made.op != "detach":
            raise NotAbsorbable(f"{self.told(node)} rounds what it is given, or takes it from whole numbers")

    def _rule(self, number: int) -> tuple[_Rule, dict[str, Any]]:
        node = self.nodes[number]
        rule = _RULES.get(node.op)
        if node.op == "input":
            raise NotAbsorbable("no map with parameters of its own lies behind it, only the input")
        if node.op == "parameter":
            raise NotAbsorbable(f"{self.told(number)} is a buffer, not a parameter")
        if rule is None or _BESIDES.get(node.op) == node.output:
            raise NotAbsorbable(f"{self.told(number)} is not homogeneous: a factor cannot be moved through it")
        bound = _bound(node, rule)
        for name, values in _ONLY_WITH.items():
            if node.kwargs.get(name) not in values:
                raise NotAbsorbable(f"{self.told(number)} is not homogeneous with {name}={node.kwargs[name]!r}")
        return rule, bound

    def _check_alone(self, path: Path, before: set[int]) -> None:
        """No other operation reads what the path passes, or the path was the wrong one of two."""
        for node in sorted({n for _, n in path} - before):
            for reader, times in self.readers[node].items():
                if path[reader, node] != times and node not in self.parameters:
                    raise NotAbsorbable(self.shared(node, reader))

    def shared(self, node: int, reader: int) -> str:
        by = "returned by the model" if reader == _OUTPUT else f"read by {self.told(reader)}"
        return f"{self.told(node)} is also {by}"

    def told(self, number: int) -> str:
        """An operation and the module that makes it, for a message."""
        node = self.nodes[number]
        calls = [c for c in self.trace.calls if c.start <= number < c.end]
        twin = calls[-1].module if calls else self.run.sandbox.copy
        name = self.names.get(self.run.sandbox.original.get(twin, twin), type(twin).__name__)
        if node.op == "parameter":
            ids = {node: key for key, node in self.trace.used.items()}
            of = ((m, n) for m in self.run.sandbox.original for n, t in _tensors_of(m) if id(t) == ids.get(number))
            module, tensor = next(of, (twin, "a tensor"))
            return f"{self.names.get(self.run.sandbox.original.get(module, module), '')}.{tensor}".lstrip(".")
        return f"{node.op} (in {name})"


def _tensors_of(module: nn.Module) -> Iterator[tuple[str, Any]]:
    yield from module._parameters.items()
    yield from module._buffers.items()


def _refs(value: Any) -> Iterator[Ref]:
    if isinstance(value, Ref):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _refs(item)


def _flat(value: Any) -> list[Any]:
    return [v for item in value for v in _flat(item)] if isinstance(value, list | tuple) else [value]


def _bound(node: Node, rule: _Rule) -> dict[str, Any]:
    """The arguments of a call by name."""
    bound: dict[str, Any] = {}
    for i, name in enumerate(rule.arguments):
        if name.startswith("*"):
            bound[name[1:]] = node.args[i:]
        elif i < len(node.args):
            bound[name] = node.args[i]
    keywords = {("input" if key == "self" else key): value for key, value in node.kwargs.items()}
    return {**bound, **keywords}


def parameters_read(trace: Trace, run: Run) -> dict[int, nn.Parameter]:
    """The nodes of a run that are parameters, each with the parameter of the model itself."""
    found = {}
    for twin, module in run.sandbox.original.items():
        own = dict(module.named_parameters(recurse=False))
        for name, parameter in twin.named_parameters(recurse=False):
            if name in own and id(parameter) in trace.used:
                found[trace.used[id(parameter)]] = own[name]
    return found


# ---- all steps together


@dataclass
class _Way:
    """What of a run leads from the sums of a step back to its parameters."""

    path: Path = field(default_factory=Counter)
    ends: set[tuple[int, int]] = field(default_factory=set)  # what reads a branch to sum it up, and the branch

    def asks(self, reader: int, node: int, of_reader: int) -> int:
        """How often a reader asks a node to be multiplied by the step's factor, when it is to be so often itself.

        A step in the branch of another call of the step asks twice.
        """
        return ((reader, node) in self.ends) + of_reader if self.path[reader, node] else 0


def absorbing(
    model: nn.Module, search: Search, factors: Mapping[int, float]
) -> tuple[dict[nn.Parameter, float], dict[int, str]]:
    """The parameters that take over the steps' factors, each with what it is multiplied by.

    Args:
        model: the model that was searched.
        search: what was found in it.
        factors: what each step's branch is to be multiplied by, by the step's index.

    Returns:
        The parameters' factors, those other than 1, and for each step that has no such parameters the reason; the
        parameters are those of the other steps.
    """
    names = {module: name or ROOT for name, module in model.named_modules()}
    memory = _Memory(model)
    traced = [_TracedRun(r, run, names) for r, run in zip(search.traces, search.runs, strict=True)]
    refused: dict[int, str] = {}
    ways: dict[int, dict[int, _Way]] = {}  # of each step, by the run
    for found in search.found:
        index = found.step.index
        if factors.get(index, 1.0) != 1.0:
            try:
                _check_reached(found.step, search.steps.unreached)
                own: dict[int, _Way] = defaultdict(_Way)
                for run, step_call in search.step_calls[index]:
                    traced[run].extend(own[run], step_call)
                for run, way in own.items():
                    memory.check(p for _, n in way.path if (p := traced[run].parameters.get(n)) is not None)
                ways[index] = own
            except NotAbsorbable as reason:
                refused[index] = str(reason)
    while True:
        scales, conflicts = _scales(traced, ways, factors)
        if not conflicts:
            return scales, refused
        refused.update(conflicts)
        for index in conflicts:
            del ways[index]


class _Memory:
    """Which tensors of a model lie in the same memory, though they are not the same tensor."""

    def __init__(self, model: nn.Module) -> None:
        self.names: dict[int, str] = {}
        self.in_storage: dict[int, dict[int, Tensor]] = defaultdict(dict)
        of_module = {module: f"{name}." if name else "" for name, module in model.named_modules()}
        for module in all_modules(model):
            prefix = of_module.get(module, f"<unregistered {type(module).__name__}>.")
            for name, value in (*_tensors_of(module), *attributes_of(module).items()):
                for tensor in tensors_in(value):
                    self.names.setdefault(id(tensor), prefix + name)
                    self.in_storage[storage_of(tensor)][id(tensor)] = tensor

    def check(self, parameters: Iterable[nn.Parameter]) -> None:
        """Raise where a write into one of these parameters would change another tensor as well."""
        for parameter in parameters:
            name = self.names.get(id(parameter), "a parameter")
            if torch._debug_has_internal_overlap(parameter) == 1:
                raise NotAbsorbable(f"{name} is expanded: several of its elements are one number in memory")
            for other in self.in_storage[storage_of(parameter)].values():
                if other is not parameter and _overlap(parameter, other):
                    raise NotAbsorbable(f"{name} lies in the same memory as {self.names[id(other)]}, another tensor")


def _overlap(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one storage have a part of it in common."""
    (a, b), (c, d) = ((t.storage_offset() * t.itemsize, t) for t in (one, other))
    return bool(a < c + span(d) and c < a + span(b))


def _check_reached(step: Step, unreached: tuple[str, ...]) -> None:
    """An expert that the example did not reach would keep its weights."""
    name = step.module_name
    inside = [n for n in unreached if not name or (n + ".").startswith(name + ".")]
    if inside:
        raise NotAbsorbable(
            f"the example inputs never reached {', '.join(inside)}, which may hold further maps of the branch"
        )


def _scales(
    traced: list[_TracedRun], ways: Mapping[int, Mapping[int, _Way]], factors: Mapping[int, float]
) -> tuple[dict[nn.Parameter, float], dict[int, str]]:
    """What each parameter is multiplied by, and the steps whose paths pass what would be multiplied in two ways."""
    scales: dict[Any, float] = {}  # of a parameter, or of the tensor at a node of a run
    passing: dict[Any, set[int]] = defaultdict(set)  # likewise, the steps whose paths pass it
    conflicts: dict[int, str] = {}
    for index, own in ways.items():
        for run, way in own.items():
            for _, node in way.path:
                passing[traced[run].parameters.get(node, (run, node))].add(index)
    for run, one in enumerate(traced):
        steps: dict[int, Counter[int]] = defaultdict(Counter)  # whose factors a node is multiplied by
        for node, readers in sorted(one.readers.items(), reverse=True):  # what reads it comes after it
            key = one.parameters.get(node, (run, node))
            here = {index: ways[index][run] for index in passing.get(key, ()) if run in ways[index]}
            for reader, times in readers.items() if key in passing else ():
                # All readers must agree, those as well that are on nobody's path and ask for 1. A parameter has one key
                # for all runs and all modules that hold it, so eval and train mode and tied weights must agree too.
                asked = Counter({i: way.asks(reader, node, steps[reader][i]) for i, way in here.items()})
                steps[node] = steps[node] or asked
                # NaN, which equals nothing, where a reader uses it several times, and some of these are on no path.
                partly = any(way.path[reader, node] not in (0, times) for way in here.values())
                # In one order: two readers must not differ by rounding.
                scale = math.nan if partly else math.prod(sorted(factors[index] for index in asked.elements()))
                if scales.setdefault(key, scale) != scale:
                    other = min(readers, key=lambda r: sum(way.path[r, node] for way in here.values()))
                    conflicts.update(dict.fromkeys(passing[key], one.shared(node, other)))
    parameters = (parameter for one in traced for _, parameter in sorted(one.parameters.items()))
    return {p: scales[p] for p in parameters if scales.get(p, 1.0) != 1.0}, conflicts


def refusal(search: Search, refused: Mapping[int, str], instead: str) -> EulernetError:
    """The error that names the steps without a last affine map, and says what to call instead."""
    steps = [f.step for f in search.found if f.step.index in refused]
    lines = [f"  {s.name} ({s.module_class}): {refused[s.index]}" for s in steps[:_SHOWN]]
    more = [f"  and {len(steps) - _SHOWN} more"] if len(steps) > _SHOWN else []
    count = f"{len(steps)} of the {len(search.step_calls)} steps have" if len(steps) > 1 else "one step has"
    return EulernetError(
        "\n".join((f"{count} no last affine map of the branch's own that can take over h:", *lines, *more, instead))
    )


# ---- changing the parameters


def check_scalable(model: nn.Module, scales: Mapping[nn.Parameter, float]) -> None:
    """Raise where a parameter could not be multiplied, or would leave the range of its dtype."""
    with _disable_current_modes():  # one of the caller's may have no values
        _check_scalable(model, scales)


def _check_scalable(model: nn.Module, scales: Mapping[nn.Parameter, float]) -> None:
    names = {parameter: name for name, parameter in model.named_parameters()}
    for parameter, scale in scales.items():
        name = names.get(parameter, "a parameter of an unregistered module")
        dtype = str(parameter.dtype).removeprefix("torch.")
        if parameter.device.type == "meta":
            raise EulernetError(
                f"{name} is on the meta device: it has no values that could be multiplied by {scale:.4g}. Give the "
                "model its weights first: model.to_empty(device=...), then load_state_dict"
            )
        if type(parameter.data) is not torch.Tensor or not (parameter.is_floating_point() or parameter.is_complex()):
            kind = dtype if type(parameter.data) is torch.Tensor else type(parameter.data).__name__
            raise EulernetError(
                f"{name} is quantised or packed ({kind}) and cannot be multiplied by {scale:.4g}. Patch, preserve or "
                "fold before quantising"
            )
        if parameter.is_inference():
            raise EulernetError(f"{name} was made under torch.inference_mode, so that it cannot be changed; clone it")
        range_ = torch.finfo(parameter.dtype)
        largest = parameter.detach().abs()[parameter.detach().isfinite()].max().item() if parameter.numel() else 0.0
        if largest and not range_.tiny <= largest * scale <= range_.max:
            raise EulernetError(
                f"{name}, with values up to {largest:.3g}, leaves the range of {dtype} when it is multiplied by "
                f"{scale:.4g}. Do it in float32: model.float() first"
            )


def scale_parameters(scales: Mapping[nn.Parameter, float]) -> list[Change]:
    """The changes that multiply each parameter, in place."""
    return [Write(parameter, partial(torch.Tensor.mul_, other=scale)) for parameter, scale in scales.items()]
