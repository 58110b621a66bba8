"""Run a model once and trace which tensor came from which.

The trace is a graph: one node a torch function call, with the nodes of the tensors it read. Additions are kept with
the Python frames that made them, module calls with the span of nodes they made. What any of it means is decided in
`classify.py`; nothing here knows what a residual step is.

The model that runs is a copy whose tensors are fake (shapes and dtypes without values), so that neither the model nor
its caches nor the random number generators change, and a model of any size is traced in a moment.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial, update_wrapper
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from eulernet._errors import EulernetError
from eulernet._find.frames import Frame, codes_of, forwards, frames_calling, frames_of
from eulernet._find.tensors import (
    ADDING,
    adds,
    all_modules,
    attributes_of,
    deepcopied,
    is_float,
    is_made,
    is_wrapped,
    layers_of,
    name_of,
    own_tensors,
    plain,
    storage_of,
    tensors_in,
    version_of,
)

# These read a tensor for its shape, dtype or device only: the values of their result do not come from it.
_SHAPE_ONLY = frozenset(
    "zeros_like ones_like empty_like full_like rand_like randn_like randint_like new_zeros new_ones new_empty new_full "
    "new_tensor new_empty_strided empty_strided detach".split()
)
# The second tensor of these gives a shape, dtype or device only.
_SHAPE_FROM_SECOND = frozenset("to type_as expand_as view_as reshape_as".split())
# The same slice of the same tensor, written twice, is one node, and so is the same join of the same tensors.
SLICES = frozenset("getitem narrow select slice chunk split unbind".split())
# An addition, and what else can add a branch to a skip in one call.
ADDITIONS = frozenset("add sub subtract radd iadd isub".split())
# These multiply what they add by a matrix.
PRODUCTS = frozenset("addmm baddbmm addbmm addmv addr linear sparse_addmm sspaddmm".split())
FUSED_ADDITIONS = PRODUCTS | ADDING.keys() | frozenset("addcmul addcdiv index_add scatter_add lerp rsub".split())
CELLS = frozenset(("gru_cell",))  # these take a state and give what it becomes
HANDED_ON = "handed on"
_CONTROL = frozenset("cond while_loop scan associative_scan map".split())
_TO_NUMBERS = frozenset("numpy array tolist".split())
_READING = _TO_NUMBERS | frozenset("item bool int float complex index".split())  # a tensor's values, and give no tensor
# These sum over an axis, along which two tensors may have been stacked, or mix what was stacked by a matrix.
CONTRACTIONS = frozenset("sum mean nansum einsum matmul rmatmul bmm mm tensordot".split())
RUNNING = frozenset("cumsum diff".split())  # likewise, one of the parts after the other
JOINS = frozenset("cat concat concatenate".split())
_STACKS = JOINS | frozenset("stack hstack vstack dstack".split())
_EXPANDING = frozenset("unsqueeze getitem view reshape".split())
_VIEWS_OF_STACKS = frozenset("view reshape unflatten flatten unsqueeze squeeze permute transpose movedim mul".split())


class Ref(int):
    """A tensor among the arguments of an operation: the node that made it."""


@dataclass(slots=True)
class Node:
    """One operation: its name, the nodes of floating tensors that it read, the shape of its result, and its call.

    It is constant where no input of the model, such as the ids of tokens, had a part in it.
    """

    op: str
    inputs: tuple[int, ...]
    shape: tuple[int, ...]
    constant: bool
    args: Any = ()  # with a `Ref` for each tensor whose values are read
    kwargs: Any = field(default_factory=dict)
    output: int = 0  # which of the results it is; -1 where it is a tensor that the operation wrote into besides


@dataclass(slots=True)
class Addition:
    """`result = left + right`, two floating tensors, or what sums them in its own way: fused with a product, over the
    axis of a stack, in a custom operator."""

    op: str
    result: int
    left: int
    right: tuple[int, ...]
    call: int
    frames: list[Frame]
    in_place: bool
    function: str | None = None  # the torch.autograd.Function that it is made in
    inside: int = 0  # how many of the frames are inside of that


@dataclass(slots=True)
class ModuleCall:
    """One call of a module: the nodes made within it are those from `start` up to `end`."""

    module: nn.Module
    parent: int
    start: int
    end: int = sys.maxsize
    frames: list[Frame] = field(default_factory=list)  # from the one that called it up to the module's before it


@dataclass
class Trace:
    """What one run of a model did."""

    nodes: list[Node] = field(default_factory=list)
    additions: list[Addition] = field(default_factory=list)
    calls: list[ModuleCall] = field(default_factory=list)
    used: dict[int, int] = field(default_factory=dict)  # ids of the parameters and buffers that were read -> nodes
    outputs: list[int] = field(default_factory=list)  # what the model returned
    operations: Counter[str] = field(default_factory=Counter)  # what was computed, see `sandbox.Operations`
    forward: int = 0  # where the backward was run as well: how many additions came before it
    breaks: dict[str, None] = field(default_factory=dict)  # where what was computed left the trace, in words


_Called: TypeAlias = tuple[Any, Any, int]  # the last three entries of a node


class Tracer(TorchFunctionMode):
    """Writes the trace: names come from the torch functions that Python calls, the rest from what they dispatch."""

    def __init__(self, model: nn.Module, look: Callable[[Any], None] | None = None) -> None:
        """`look` sees the frame of each operation before it is done."""
        super().__init__()
        self.look = look
        self.trace = Trace()
        self.stack: list[int] = []
        self.inside = False
        self._of: dict[int, int] = {}  # id of a tensor -> its node
        self.alive: list[Tensor] = []  # keeps those ids from being used again
        self._held: list[Tensor] = []  # likewise, for a model may drop a tensor that it has kept
        self._of_samples: set[int] = set()  # what vmap runs on: nodes of one sample each
        self._writes: dict[int, int] = {}  # storage -> the node that last wrote into it
        self._views: dict[Any, int] = {}  # the same view of the same node is one node
        self.functions = forwards()
        modules = list(all_modules(model))
        self.parameters: set[int] = set()
        self.kept: set[int] = set()
        self._hold(self.parameters, (t for module in modules for t in own_tensors(module)))
        self.keep(t for module in modules for t in tensors_in(attributes_of(module)))

    def keep(self, tensors: Iterable[Tensor]) -> None:
        """The model has these before it runs, and no parameters are among them."""
        self._hold(self.kept, (t for t in tensors if id(t) not in self.parameters))

    def _hold(self, ids: set[int], tensors: Iterable[Tensor]) -> None:
        new = list(tensors)
        ids.update(map(id, new))
        self._held += new

    def __deepcopy__(self, memo: Any) -> Tracer:
        return self  # whom the hooks of a module lead to that is copied as it runs

    # ---- nodes

    def new(
        self, op: str, inputs: tuple[int, ...], shape: tuple[int, ...], constant: bool, called: _Called = ((), {}, 0)
    ) -> int:
        self.trace.nodes.append(Node(op, inputs, shape, constant, *called))
        return len(self.trace.nodes) - 1

    def set(self, tensor: Tensor, node: int) -> None:
        if is_wrapped(tensor):
            self._of_samples.add(node)
        for one in layers_of(tensor):
            if id(one) not in self._of:
                self.alive.append(one)
            self._of[id(one)] = node

    def peek(self, tensor: Tensor) -> int | None:
        """The node that a tensor has the value of, None where it was written into or is not known."""
        node = next((self._of[id(t)] for t in layers_of(tensor) if id(t) in self._of), None)
        return None if node is None or self._writes.get(storage_of(tensor), -1) > node else node

    def handed_on(self, tensor: Tensor) -> Tensor:
        """The same as another object with a node of its own, so that who has kept the first is seen to read it."""
        inside, self.inside = self.inside, True
        try:
            other = tensor.view_as(tensor)
            node = self.node(tensor)
            self.set(other, self.new(HANDED_ON, (node,), tuple(tensor.shape), False, ((Ref(node),), {}, 0)))
        finally:
            self.inside = inside
        return other

    def node(self, tensor: Tensor) -> int:
        """The node that made the value that `tensor` has now, writes through views of it included."""
        node = next((self._of[id(t)] for t in layers_of(tensor) if id(t) in self._of), None)
        if node is None:
            node = self._first(tensor)
            self.set(tensor, node)
        elif (node in self._of_samples) != is_wrapped(tensor) and self.trace.nodes[node].shape != tensor.shape:  # vmap
            given: _Called = ((Ref(node),), {}, 0)
            node = self.new("alias", (node,), tuple(tensor.shape), self.trace.nodes[node].constant, given)
            self._of[id(tensor)] = node
            self.alive.append(tensor)
            if is_wrapped(tensor):
                self._of_samples.add(node)
        write = self._writes.get(storage_of(tensor), -1)
        if write > node:
            constant = self.trace.nodes[node].constant and self.trace.nodes[write].constant
            called: _Called = ((Ref(node), Ref(write)), {}, 0)
            node = self.new("overwritten", (node, write), tuple(tensor.shape), constant, called)
            self.set(tensor, node)
        return node

    def _first(self, tensor: Tensor) -> int:
        """A node for a tensor that nothing in the trace has made: a parameter, an attribute, an input."""
        of_model = next((t for t in layers_of(tensor) if id(t) in self.parameters), None)
        if of_model is not None:
            self.trace.used[id(of_model)] = len(self.trace.nodes)
            return self.new("parameter", (), tuple(tensor.shape), True)
        if self.stack and id(tensor) not in self.kept and is_float(tensor) and is_made(tensor):
            name = type(self.trace.calls[self.stack[-1]].module).__name__
            self.trace.breaks[f"{name} reads a tensor that was computed out of sight, in a thread or an extension"] = (
                None
            )
        return self.new("input", (), tuple(tensor.shape), id(tensor) in self.kept)

    # ---- operations

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__:  # a copy is not made of the other copies in the memo
            func, args = update_wrapper(partial(deepcopied, memo=args[1]), func), args[:1]
        return self.observe(func, args, kwargs or {}, sys._getframe(1))

    def observe(self, func: Any, args: Any, kwargs: Any, frame: Any) -> Any:
        if self.inside:  # dispatched by a torch function that is being recorded
            return func(*args, **kwargs)
        self.inside = True
        if self.look is not None:
            self.look(frame)
        try:
            return self.write(func, args, kwargs, frame)
        finally:
            self.inside = False

    def write(self, func: Any, args: Any, kwargs: Any, frame: Any) -> Any:
        name = name_of(func)
        tensors = list(tensors_in((args, kwargs)))
        if not tensors and name in ("size", "dim", "get"):
            return func(*args, **kwargs)
        before = [(t, self.node(t), version_of(t)) for t in tensors]
        out = func(*args, **kwargs)
        results = list(tensors_in(out))
        if name in _TO_NUMBERS and any(is_float(t) and self._is_computed(n) for t, n, _ in before):
            where = next(frames_of(frame), None)
            line = where and list(where.code.co_positions())[where.lasti // 2][0]
            at = f" at {where.code.co_filename}:{line}" if where else ""
            self.trace.breaks[f"Tensor.{name}{at} takes the values out of PyTorch"] = None
        if name.removeprefix("quantized::").startswith("add") and any(t.is_quantized for t in results) and self.stack:
            by = type(self.trace.calls[self.stack[-1]].module).__name__
            self.trace.breaks[f"{by} adds integers (patch before torch.ao.quantization.convert)"] = None
        if isinstance(func, torch._ops.HigherOrderOperator) and name in _CONTROL and self.stack:
            by = type(self.trace.calls[self.stack[-1]].module).__name__
            self.trace.breaks[f"{by} calls torch.{name}, into whose functions eulernet does not look"] = None
        if not results and not any(version_of(t) != v for t, _, v in before):
            if name in _READING:
                read = {id(t): n for t, n, _ in before}
                self.new(name, (), (), True, (_referring(args, read), _referring(kwargs, read), 0))
            return out

        nodes = {id(t): n for t, n, _ in before}
        if name in _SHAPE_ONLY:
            inputs: tuple[int, ...] = ()
            read = nodes if name == "detach" else {}
        elif name in _SHAPE_FROM_SECOND:
            inputs = tuple(n for _, n, _ in before[:1])
            read = {id(t): n for t, n, _ in before[:1]}
        else:
            inputs = tuple(dict.fromkeys(n for t, n, _ in before if is_float(t)))
            read = nodes
        called = _referring(args, read), _referring(kwargs, read)

        values = before[:1] if name in _SHAPE_FROM_SECOND else before
        constant = name in _SHAPE_ONLY or all(self.trace.nodes[n].constant for _, n, _ in values)

        written = [t for t, _, v in before if version_of(t) != v]
        seen = set(nodes)
        for i, result in enumerate(results):
            if id(result) not in seen:
                seen.add(id(result))
                self.set(result, self.result(name, inputs, constant, (args, kwargs, i), result, (*called, i)))
        for target in written:
            output = next((i for i, result in enumerate(results) if result is target), -1)
            of = inputs if is_float(target) else ()
            node = self.new(name, of, tuple(target.shape), constant, (*called, output))
            self.set(target, node)
            self._writes[storage_of(target)] = node
        for operands, result in self._sums(name, args, kwargs, nodes, results or written):
            if len(operands) > 1:
                self._addition(name, operands, result, bool(written), frame)
        return out

    def _is_computed(self, node: int) -> bool:
        """Whether the model's input has a part in a node, detached or not."""
        made = self.trace.nodes[node]
        if made.op == "detach":
            return any(isinstance(a, Ref) and self._is_computed(a) for a in made.args)
        return not made.constant

    def result(
        self, name: str, inputs: tuple[int, ...], constant: bool, arguments: Any, result: Tensor, called: _Called
    ) -> int:
        shape = tuple(result.shape)
        if not is_float(result):  # what went through integers is no longer a function to be trained
            return self.new(name, (), shape, constant, called)
        if (len(inputs) == 1 and name in SLICES) or name in JOINS:
            key = (name, inputs, repr(called if name in JOINS else plain(arguments)), shape)
            if key not in self._views:
                self._views[key] = self.new(name, inputs, shape, constant, called)
            return self._views[key]
        return self.new(name, inputs, shape, constant, called)

    def _sums(
        self, op: str, args: Any, kwargs: Any, nodes: dict[int, int], results: list[Tensor]
    ) -> Iterator[tuple[tuple[int, ...], Tensor]]:
        """What an operation sums up: the operands and the result, several times where it takes lists of them."""
        if op.startswith("foreach_"):
            lists = zip(*(a for a in args if isinstance(a, (list, tuple))), strict=False)
            calls = zip(lists, results, strict=False)
            yield from ((self._operands(op.removeprefix("foreach_"), a, kwargs, nodes), r) for a, r in calls)
        elif "::" in op:
            yield from ((self._operands(op, args, kwargs, nodes), r) for r in results if is_float(r))
        elif results and is_float(results[0]):
            yield self._operands(op, args, kwargs, nodes), results[0]

    def _operands(self, op: str, args: Any, kwargs: Any, nodes: dict[int, int]) -> tuple[int, ...]:
        """The nodes that an operation may sum: the left operand, then those that may be the right one."""
        if op in ADDITIONS:
            tensors = [*args[:2], *(kwargs[k] for k in ("input", "other") if k in kwargs)]
        elif op == "linear":
            tensors = [*tensors_in((args, kwargs))][::-1]  # the bias first, which may be a state
            tensors = tensors if len(tensors) == 3 and not self.trace.nodes[nodes[id(tensors[0])]].constant else []
        elif (op in FUSED_ADDITIONS and adds(op, args, kwargs)) or "::" in op:
            tensors = [*tensors_in(args), *tensors_in(kwargs)]
            tensors = tensors[::-1] if op == "rsub" else tensors
        elif op in CELLS:
            tensors = [args[1], args[0]]  # the state first
        elif op in CONTRACTIONS | RUNNING:
            tensors = [*tensors_in(args), *tensors_in(kwargs)]
            return next((parts for t in tensors if len(parts := self._stacked(nodes[id(t)])) > 1), ())
        else:
            return ()
        if not all(isinstance(t, Tensor) and is_float(t) for t in tensors):
            tensors = [] if op in ADDITIONS else [t for t in tensors if is_float(t)]
        return tuple(nodes[id(t)] for t in tensors)

    def _stacked(self, node: int) -> tuple[int, ...]:
        """The parts, of one shape, that a tensor was stacked or concatenated of."""
        nodes = self.trace.nodes
        while nodes[node].op in _VIEWS_OF_STACKS and nodes[node].inputs:
            node = nodes[node].inputs[0]
        parts = nodes[node].inputs if nodes[node].op in _STACKS else ()
        if nodes[node].op in JOINS and all(self._is_expanded(part) for part in parts):
            parts = tuple(nodes[part].inputs[0] for part in parts)
        return parts if len({nodes[part].shape for part in parts}) == 1 else ()

    def _is_expanded(self, node: int) -> bool:
        """Whether it is another tensor with one more axis, of one place: what is joined along that is stacked."""
        nodes = self.trace.nodes
        made = nodes[node]
        if made.op not in _EXPANDING or len(made.inputs) != 1:
            return False
        shape = nodes[made.inputs[0]].shape
        return any((*shape[:i], 1, *shape[i:]) == made.shape for i in range(len(made.shape)))

    def _addition(self, op: str, operands: tuple[int, ...], result: Tensor, in_place: bool, frame: Any) -> None:
        frames = list(frames_of(frame))
        function = next((self.functions[c] for c in codes_of(frame) if c in self.functions), None)
        ends = [i + 1 for i, f in enumerate(frames) if f.code in self.functions]
        self.trace.additions.append(
            Addition(
                op=op,
                result=self._of[id(result)],
                left=operands[0],
                right=operands[1:],
                call=self.stack[-1] if self.stack else 0,
                frames=frames,
                in_place=in_place,
                function=function,
                inside=0 if function is None else max(ends, default=len(frames)),
            )
        )

    # ---- module calls

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        inside, self.inside = self.inside, True
        for tensor in tensors_in((args, kwargs)):
            self.node(tensor)  # what comes from the caller is older than the call
        self.inside = inside
        parent, frames = self.stack[-1] if self.stack else -1, list(frames_calling(sys._getframe(1)))
        self.trace.calls.append(ModuleCall(module, parent, len(self.trace.nodes), frames=frames))
        self.stack.append(len(self.trace.calls) - 1)

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        while self.stack:
            call = self.trace.calls[self.stack.pop()]
            call.end = len(self.trace.nodes)
            if call.module is module:
                return


class DispatchTracer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """What no torch function announced: the inside of scripted functions, views made by autograd."""

    supports_higher_order_operators = True

    def __init__(self, tracer: Tracer, owned: dict[int, str]) -> None:
        """`owned` are the model's own tensors, by id, into which nothing is to be written."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.tracer = tracer
        self.owned = owned

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if isinstance(func, OpOverload) and func._schema.is_mutable:
            self._spare(func, args)
        return self.tracer.observe(func, args, kwargs or {}, sys._getframe(1))

    def _spare(self, func: Any, args: Any) -> None:
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.is_write and id(value) in self.owned:
                raise EulernetError(
                    f"{self.owned[id(value)]} would be written into: a copy of the model is run, and it reaches the "
                    "model itself, past what is copied with it (by a weak reference, a class, a global variable or a "
                    "closure). Let the module that writes hold it as an attribute: self.part = part"
                )


def _referring(value: Any, nodes: dict[int, int]) -> Any:
    """Arguments with a `Ref` for each tensor in `nodes`, and without the others."""
    if isinstance(value, Tensor):
        return Ref(nodes[id(value)]) if id(value) in nodes else None
    if isinstance(value, (tuple, list)):
        return [_referring(item, nodes) for item in value]
    if isinstance(value, dict):
        return {key: _referring(item, nodes) for key, item in value.items()}
    return value
