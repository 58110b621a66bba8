"""The trace as the rules of `classify.py` and `streams.py` ask of it: what a node is, and what it was made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import permutations
from typing import Any, Literal, NamedTuple

from torch.utils._pytree import tree_leaves

from eulernet._find.operations import (
    DRAWS,
    HANDING_ON,
    LINEAR,
    MAPS,
    MATCHING,
    NORMS,
    NOT_LINEAR,
    PADS,
    POOLS,
    PUTS,
    RECURRENT,
    REPEATS,
    SAME,
    SCALES,
    SCATTERS,
    SQUASHES,
    TURNS,
    UPSAMPLES,
    VIEWS,
    WRITES,
)
from eulernet._find.parts import apart, part_of, same_part
from eulernet._find.trace import ADDITIONS, CONTRACTIONS, FUSED_ADDITIONS, JOINS, SLICES, Addition, Node, Ref, Trace
from eulernet._step import Reason

# A decomposition, x - pool(x), is seen here and is no step.
MatchKind = Literal["identity", "projection", "parallel", "gated", "decomposition"]


@dataclass(eq=False)
class StepCall:
    """One addition that is a step, as it ran once."""

    addition: Addition
    kind: MatchKind
    skip: int  # the node of the skip operand
    branch: int
    skip_is_left: bool
    state: int  # the node that skip and branch come from
    within: set[int] = field(default_factory=set)  # the nodes on the way from the state to the branch
    long: bool = False
    mixture: bool = False  # of skip and branch, no sum of them: scaled by the difference of the whole to the skip
    sums: bool = True  # whether the operation does nothing else
    coupled: bool = False  # with the step whose branch it is in, and which is in its branch
    reason: Reason | None = None  # why it is no step after all
    first: StepCall | None = None  # parallel: the call of the first place
    before: tuple[StepCall, ...] = ()  # the calls before it in its stream
    position: int = 1  # in its stream, from 1
    stream: int = 0
    depth: int = 1
    end: int = -1  # where the whole sum ends that it is a part of
    source: int = -1  # what the stream comes from; the skip, but in a mixture of several states

    def __post_init__(self) -> None:
        self.end, self.source = self.addition.result, self.skip

    @property
    def head(self) -> StepCall:
        """The call of the first place, which may be this one."""
        return self.first or self

    def made_as(self, other: StepCall) -> bool:
        """Whether both are made by one addition of one module, in two calls of it."""
        mine, its = self.addition.frames[:1], other.addition.frames[:1]
        return [(f.code, f.lasti, f.module) for f in mine] == [(f.code, f.lasti, f.module) for f in its]

    @property
    def supported(self) -> bool:
        return self.sums and not self.coupled

    @property
    def left_alone(self) -> bool:
        """Whether it is scaled only where it is asked for."""
        return self.long or self.kind == "gated"


class Match(NamedTuple):
    """What an addition is found to be; the fields are those of `StepCall`."""

    kind: MatchKind
    state: int
    within: set[int]
    first: StepCall | None = None


class Graph:
    """The trace's nodes with what the rules ask of them."""

    def __init__(self, trace: Trace) -> None:
        self.nodes = trace.nodes
        self.sums = {addition.result for addition in trace.additions}
        self.constant = [node.constant for node in self.nodes]  # made of parameters, buffers and new tensors only
        self.outputs = frozenset(trace.outputs)
        self.readers = self._readers()
        self.chains: dict[tuple[int, int, float], dict[int, int]] = {}
        self.bare: list[bool] = []  # a mask, a learned scale: neither given, nor looked up in a table, nor mapped
        for index, node in enumerate(self.nodes):
            made = node.op in ("input", "embedding") or self.is_map(index)
            self.bare.append(not made and all(self.bare[i] for i in node.inputs))

    def _readers(self) -> dict[int, set[int]]:
        """For each node that the output comes from those that were computed from it, on the way to the output."""
        readers: dict[int, set[int]] = {}
        pending = list(self.outputs)
        while pending:
            node = pending.pop()
            for i in self.nodes[node].inputs:
                if i not in readers and i not in self.outputs:
                    pending.append(i)
                readers.setdefault(i, set()).add(node)
        return readers

    def state_inputs(self, node: int) -> tuple[int, ...]:
        """What it was made of, without the constants, scales and masks where there is a state beside them."""
        inputs = self.nodes[node].inputs if not _is_zero(self.nodes[node]) else ()
        states = [i for i in inputs if not self.constant[i]] or inputs
        return tuple(i for i in states if not self.bare[i]) or tuple(states)

    def reads(self, node: int) -> set[int]:
        """All tensors that it was made of, integers and masks too."""
        made = self.nodes[node]
        return {*made.inputs, *(int(a) for a in tree_leaves((made.args, made.kwargs)) if isinstance(a, Ref))}

    def is_map(self, node: int) -> bool:
        return bool(MAPS.search(self.nodes[node].op))

    def is_diagonal(self, node: int) -> bool:
        """Whether it is a product with a learned vector: a map of each channel by itself."""
        made = self.nodes[node]
        return made.op in SCALES and any(self.constant[i] and self.size(i) > 1 for i in made.inputs)

    def is_noise(self, node: int) -> bool:
        """Whether it is a random draw around zero, or one that is spread by what was computed."""
        pending = [node]
        while pending:
            made = self.nodes[n := pending.pop()]
            if self.constant[n] and made.op in DRAWS:
                numbers = [a for a in (*made.args, made.kwargs.get("mean")) if type(a) in (int, float)]
                return not (made.op == "normal" and numbers and numbers[0])
            if made.op in SCALES or (self.keeps_resolution(n) and len(made.inputs) == 1):
                pending += made.inputs
        return False

    def is_detached(self, node: int) -> bool:
        """Whether it is computed from the model's input, and does not hand on its gradient."""
        return any(not self.constant[i] for n in self.ancestors(node, 0, -1) for i in self.detached(n))

    def detached(self, node: int) -> list[int]:
        """What a node is cut off from."""
        made = self.nodes[node]
        return [int(i) for i in made.args if isinstance(i, Ref)] if made.op == "detach" else []

    def is_of_features(self, part: int, whole: int) -> bool:
        """Whether a part of what a map gave is some of its features, at all places."""
        axis = 1 if "conv" in self.nodes[whole].op else len(self.nodes[whole].shape) - 1
        sizes = zip(self.nodes[part].shape, self.nodes[whole].shape, strict=False)
        return [n for n, (one, other) in enumerate(sizes) if one != other] == [axis]

    def is_depthwise(self, node: int) -> bool:
        """Whether it is a convolution of each channel by itself: with the convolution behind it, it is one map."""
        kernels = [self.nodes[i].shape for i in self.nodes[node].inputs[1:2]]
        return "conv" in self.nodes[node].op and any(len(k) > 2 and k[1] == 1 < k[0] for k in kernels)

    def keeps_resolution(self, node: int) -> bool:
        """Whether it is its input as it is, but for what is padded or cut off."""
        return self.nodes[node].op in SAME | PADS

    def other_resolutions(self, path: Collection[int], skipped: Collection[int]) -> set[int]:
        """The nodes of a branch that are sized up from, or to, a resolution that its skip has nowhere."""
        sizes = {self.nodes[node].shape[2:] for node in skipped}
        ups = (n for n in path if n not in skipped and UPSAMPLES.search(self.nodes[n].op))
        return {
            n for n in ups if any(self.nodes[m].shape[2:] not in sizes for m in (n, *self.nodes[n].inputs) if m in path)
        }

    def leaves_resolution(self, skipped: Sequence[int]) -> bool:
        """Whether a skip is sized up again from less than its state: a context that was pooled."""
        state = self.nodes[skipped[-1]].shape
        for node in skipped:
            op, shape = self.nodes[node].op, self.nodes[node].shape
            if UPSAMPLES.search(op) or op in REPEATS:
                sources = [self.nodes[i].shape for i in self.nodes[node].inputs if i in skipped]
                spread = (zip(s, shape, state, strict=False) for s in sources if len(s) == len(shape) == len(state))
                pooled = any(one == 1 < min(more, whole) for axes in spread for one, more, whole in axes)
                if pooled or any(math.prod(s[2:]) < math.prod(state[2:]) for s in sources):
                    return True
        return False

    def size(self, node: int) -> int:
        return math.prod(self.nodes[node].shape)

    def same(self, node: int, start: int, *, scaled: bool = False) -> Iterator[int]:
        """`node` and what it is a mere view, cast, dropout or activation (or multiple) of, back to the call's start."""
        yield node
        while node >= start:
            inputs = self.state_inputs(node)
            # Adding a number keeps a tensor what it is: sum((x, f)) begins with 0 + x.
            op = self.nodes[node].op
            same = op in SAME or (op in ADDITIONS and len(self.nodes[node].inputs) == 1) or (scaled and op in SCALES)
            same = same or self._is_put(node)
            if not same or len(inputs) != 1 or self.size(inputs[0]) != self.size(node):
                return
            node = inputs[0]
            yield node

    def handed_on(self, node: int, start: int) -> Iterator[int]:
        """A node and what it is the same as, a multiple or a part of or normed from, back to the call's start."""
        while True:
            chain = list(self.same(node, start, scaled=True))
            yield from chain
            last = chain[-1]
            inputs = self.state_inputs(last)
            if last < start or len(inputs) != 1 or self.nodes[last].op not in NORMS | SLICES:
                return
            node = inputs[0]

    def raw(self, node: int, *, scaled: bool = False, by_hand: bool = False) -> Iterator[int]:
        """A node and what it is the same as, a multiple of or normed from; by a norm that is written out, too."""
        source: int | None = node
        while source is not None:
            chain = list(self.same(source, 0, scaled=scaled))
            yield from chain
            inputs = self.state_inputs(chain[-1])
            if len(inputs) == 1:
                source = inputs[0] if self.nodes[chain[-1]].op in NORMS else None
            else:
                source = self._normed(chain[-1]) if by_hand else None

    def gives_sum(self, addition: Addition, skip: int) -> bool:
        """Whether the value of an operation is the sum of its skip and its branch, and no other mixture."""
        node = self.nodes[addition.result]
        if addition.op in FUSED_ADDITIONS:
            return (
                node.kwargs.get("beta", 1) == 1
                and len(node.args) <= 4
                and (skip == addition.left or addition.op == "lerp")
            )
        if addition.op != "sum" or len(node.inputs) != 1:
            return addition.op in ADDITIONS
        made = self.nodes[node.inputs[0]]
        axes = [_axis(each, len(made.shape)) for each in (made, node)]
        shape = made.shape[: axes[0]] + made.shape[axes[0] + 1 :]
        stacked = made.op in JOINS | {"stack"} and made.shape[axes[0]] == 2 == len(made.inputs)
        return stacked and axes[0] == axes[1] and node.shape == shape == self.nodes[skip].shape

    def fits(self, skip: int, result: int) -> bool:
        """Whether a sum has the shape of its skip; of parameters, and no bias, it may be spread over the batch."""
        mine, whole = self.nodes[skip].shape, self.nodes[result].shape
        if mine == whole or not self.constant[skip] or len(mine) < 2:
            return mine == whole
        mine = (1,) * (len(whole) - len(mine)) + mine
        axes = [axis for axis, (one, other) in enumerate(zip(mine, whole, strict=False)) if one != other]
        return len(mine) == len(whole) > 1 and axes == [0] and mine[0] == 1

    def keeps(self, node: int) -> bool:
        """Whether it is one state as it is, or a multiple of it."""
        return len(self.state_inputs(node)) == 1 and (self.keeps_resolution(node) or self.nodes[node].op in SCALES)

    def is_state(self, node: int) -> bool:
        """Whether a node is handed on, no result of a map: given, a part or a join of what was, or a sum."""
        last = list(self.same(node, 0))[-1]
        made = self.nodes[last]
        gathered = made.op == "getitem" and len(self.reads(last)) > 1
        return last in self.sums or (made.op in SLICES and not gathered) or made.op in JOINS or not made.inputs

    def uses(self, node: int) -> set[int]:
        """What is made of a node as it is, masked, scaled or shifted by a constant: the first other nodes."""
        found: set[int] = set()
        pending = [node]
        while pending:
            for reader in self.readers.get(pending.pop(), ()):
                op = self.nodes[reader].op
                passes = op in HANDING_ON and len(self.state_inputs(reader)) == 1
                (pending.append if passes else found.add)(reader)
        return found

    def weights(self, node: int) -> bool:
        """Whether a node goes on as a gate or a score alone: what it is squashed to is multiplied with other states."""
        squashed = self.uses(node)
        made = {n for s in squashed for n in self.uses(s)}
        products = (self.nodes[n].op in SCALES | CONTRACTIONS and len(self.state_inputs(n)) > 1 for n in made)
        return bool(made) and all(self.nodes[n].op in SQUASHES for n in squashed) and all(products)

    def matched(self, node: int, start: int, most: float = 1) -> Iterator[tuple[int, int]]:
        """`node` and what it comes from by a shape-matching map only, each with the number of maps (at `most`)."""
        maps = 0
        last: int | None = None  # the map that takes what comes from this node, as it is or normed
        part: int | None = None  # the part of a tensor that is followed
        yield node, maps
        while node >= start:
            op = self.nodes[node].op
            inputs = self.state_inputs(node)
            if self.is_map(node):
                maps += last is None or not self.is_depthwise(node)
                last = node if last is None else None
            elif op not in NORMS and op not in VIEWS:
                last = None
            if op in SLICES:
                part = node
            elif op in TURNS:  # whose axes are others
                part = None
            elif op in WRITES and (part is not None or self._is_view(node)) and self._spares(node, part):
                node = inputs[0]
                yield node, maps
                continue
            if (op in JOINS or self._is_filled(node)) and len(inputs) > 1:
                whole = self._whole(inputs, start, most)
                if whole is None or maps + whole[1] > most:
                    return
                node, maps = whole[0], maps + whole[1]
                yield node, maps
                continue
            if len(inputs) > 1 and op in ADDITIONS and (one := self._sum_of_maps(inputs, start)) is not None:
                if maps + 1 > most:
                    return
                node, maps, last = one, maps + 1, None
                yield node, maps
                continue
            # Beside a constant a sum keeps what it is: a frozen batch norm is x * scale + bias.
            if len(inputs) > 1 and op in CONTRACTIONS:  # a mixture of streams, by a matrix that may depend on them
                inputs = tuple(i for i in inputs if self.nodes[i].shape == self.nodes[node].shape)
            elif op == "bilinear":  # what it is given first, by a matrix that what it is given next makes
                inputs = inputs[:1]
            elif len(inputs) > 1 and op in ADDITIONS and (modulated := self._modulated(node)) is not None:
                inputs = (modulated,)
            simple = op in MATCHING or op in ADDITIONS or self._is_put(node) or POOLS.search(op) or UPSAMPLES.search(op)
            if maps > most or not (simple or self.is_map(node)):
                return
            source = inputs[0] if len(inputs) == 1 else self._normed(node)
            if source is None:
                return
            node = source
            yield node, maps

    def _is_put(self, node: int) -> bool:
        """Whether a state is put into a new tensor, or numbers into a state, at places that no tensor names."""
        made = self.nodes[node]
        index = made.args[1] if made.op == "setitem" else None
        return made.op in PUTS and len(self.state_inputs(node)) == 1 and not any(map(_is_ref, tree_leaves(index)))

    def _is_filled(self, node: int) -> bool:
        """Whether a new tensor was filled, part by part."""
        while self.nodes[node].op in PUTS and self.nodes[node].inputs:
            node = self.nodes[node].inputs[0]
            if self.constant[node]:
                return True
        return False

    def _is_view(self, node: int) -> bool:
        """Whether it is a view that was made before a write into the tensor that it is a part of."""
        made = self.nodes[node]
        return made.op == "overwritten" and self.nodes[made.inputs[0]].op in SLICES | {"as_strided"}

    def _spares(self, node: int, part: int | None) -> bool:
        """Whether what was written at a node adds to what was there, or leaves the part as it was that is read."""
        made, read = self.nodes[node], part
        if made.op == "overwritten":
            view, written = made.inputs
            if written in self.sums:
                return True
            made, read = self.nodes[written], view if part is None else part
            while made.op not in PUTS | SLICES and made.inputs:  # operations in place on a part
                made = self.nodes[made.inputs[0]]
        if not made.inputs or made.op not in PUTS | SLICES:
            return False
        shape = self.nodes[made.inputs[0]].shape
        addends = self.nodes[made.inputs[-1]].inputs if made.op in PUTS and made.inputs[-1] in self.sums else ()
        before = set(self._versions(made.inputs[0]))  # what stood there, and not what another tensor has there
        parts = [self.nodes[i] for i in addends if self.nodes[i].inputs and self.nodes[i].inputs[0] in before]
        if any(same_part(self._part(made), self._part(part), shape) for part in parts):
            return True
        other = None if read is None or self.nodes[read].op not in SLICES else self.nodes[read]
        if (
            made.op in PUTS
            and len(made.inputs) == 1
            and not (other and same_part(self._part(made), self._part(other), shape))
        ):
            return True  # numbers, as a mask
        of = other and other.inputs and self.nodes[other.inputs[0]].shape
        return other is not None and of == shape and apart(self._part(made), self._part(other), shape)

    def _versions(self, node: int) -> Iterator[int]:
        """A tensor as it is, and as it was before each write into it."""
        while True:
            *chain, last = self.same(node, 0)
            yield from (*chain, last)
            if self.nodes[last].op not in WRITES or not self.nodes[last].inputs:
                return
            node = self.nodes[last].inputs[0]

    def _part(self, made: Node) -> Any:
        """The index at which an operation reads or writes the first of its inputs."""
        args = [a for a in made.args if not (made.op in SCATTERS and isinstance(a, Ref) and a == made.inputs[-1])]
        op = "getitem" if made.op == "setitem" else made.op.removesuffix("_scatter")
        return part_of(op, args, made.kwargs, made.output, self.nodes[made.inputs[0]].shape) if made.inputs else None

    def is_linear(self, node: int, path: Collection[int] = ()) -> bool:
        """Whether it is linear in the one state that it was made of; in what is on a path, where that is given."""
        op = self.nodes[node].op
        linear = op in LINEAR or (self.is_map(node) and not NOT_LINEAR.search(op))
        if linear and path and op in ADDITIONS | PADS:
            return True
        return linear and len([i for i in self.state_inputs(node) if i in path or not path]) == 1

    def _sum_of_maps(self, parts: tuple[int, ...], start: int) -> int | None:
        """What two linear maps that are summed up were given, which are one: a map and its low-rank update."""
        chains: list[set[int]] = []
        for one, other in permutations(parts, 2):
            states = set(self.same(one, start))
            if not states.isdisjoint(self.ancestors(other, start, min(states))):
                return None  # a sum of a state and its own map
        for node in parts:
            chains.append(set())
            mapped = False
            while node >= start and self.is_linear(node):
                mapped |= self.is_map(node)
                (node,) = self.state_inputs(node)
                if mapped:
                    chains[-1].add(node)
        return max(set.intersection(*chains), default=None)

    def _normed(self, node: int) -> int | None:
        """What a norm written by hand was given: a product of it with statistics of its own."""

        def is_none(made: int) -> bool:
            shapes = {self.nodes[i].shape for i in self.state_inputs(made)}
            return bool(POOLS.search(self.nodes[made].op)) or (made in self.sums and len(shapes) == 1)

        return self.one_source(node, is_none) if self.nodes[node].op in SCALES else None

    def one_source(self, node: int, stops: Callable[[int], bool], most: int = 64) -> int | None:
        """The one node that all inputs of a node come from without a map, as `x` and its mean do in a norm by hand."""
        frontier = set(self.state_inputs(node))
        for _ in range(most):
            if len(frontier) <= 1:
                return next(iter(frontier), None)
            last = max(frontier)  # the nodes are in the order of execution: the latest comes from the others
            made = self.nodes[last]
            if not made.inputs or self.is_map(last) or made.op == "embedding" or stops(last):
                return None
            frontier.remove(last)
            frontier.update(self.state_inputs(last))
        return None

    def _modulated(self, node: int) -> int | None:
        """The norm in `norm(x) * (1 + gamma) + beta`, where gamma and beta are not made of `x`.

        A branch that ends in a norm is none: `s + norm(f(s))`, or `s + gate * norm(f(s))`.
        """
        norms: list[int] = []
        others: list[int] = []
        for addend in self.state_inputs(node):
            factors = self.state_inputs(addend) if self.nodes[addend].op in SCALES else (addend,)
            for factor in factors:
                *_, source = self.same(factor, 0)
                (norms if self.nodes[source].op in NORMS and len(factors) > 1 else others).append(source)
        if not norms:
            return None
        norm = min(norms, key=lambda n: self.state_inputs(n)[0])  # of what was there first: gamma may be normed as well
        (given, *_), others = self.state_inputs(norm), [*others, *(n for n in norms if n != norm)]
        made_of, shape = self.ancestors(given, 0, min(others, default=0)), self.nodes[node].shape
        sums = {n for n in others if n in self.sums and len(self.state_inputs(n)) > 1}
        if not others or any(self.nodes[n].shape == shape for n in others if n in made_of or n in sums):
            return None
        return None if any(given in self.ancestors(other, 0, given) for other in others) else norm

    def _whole(self, parts: tuple[int, ...], start: int, most: float) -> tuple[int, int] | None:
        """What all parts come from by shape-matching maps only, as where the class token is taken apart for pooling."""
        for part in parts:  # kept, since what was joined may be joined again, and again
            if (part, start, most) not in self.chains:
                self.chains[part, start, most] = dict(self.matched(part, start, most))
        chains = [self.chains[part, start, most] for part in parts]
        common = set(chains[0]).intersection(*chains[1:])
        return (max(common), max(chain[max(common)] for chain in chains)) if common else None

    def ancestors(self, node: int, start: int, floor: int, without: Collection[int] = ()) -> set[int]:
        """The nodes that `node` was computed from, within a call that began at `start`, none older than `floor`.

        `without`: beside these.
        """
        found = {node}
        pending = [node]
        while pending:
            current = pending.pop()
            if current >= start and current > floor:
                for i in self.nodes[current].inputs:
                    if i >= floor and i not in found and i not in without:
                        found.add(i)
                        pending.append(i)
        return found

    def path(self, state: int, branch: int, ancestors: set[int]) -> dict[int, int]:
        """The nodes on the way from `state` to `branch`, each with the largest number of maps passed so far."""
        maps = {state: 0}
        for node in sorted(ancestors):
            if node > state:
                passed = [maps[i] for i in self.nodes[node].inputs if i in maps]
                if passed:
                    maps[node] = max(passed) + self.is_map(node) + (self.nodes[node].op in RECURRENT)
        if branch not in maps:
            return {}
        back = {branch}  # keep only what leads on to the branch
        for node in sorted(maps, reverse=True):
            if node in back and node != state:
                back.update(i for i in self.nodes[node].inputs if i in maps)
        return {node: maps[node] for node in maps if node in back}

    def mixes(self, path: dict[int, int], state: int) -> bool:
        return any(
            n != state and (self.is_map(n) or POOLS.search(self.nodes[n].op) or self._is_product(n)) for n in path
        )

    def _is_product(self, node: int) -> bool:
        """Whether it is a product with a parameter, or with what is made of those, that is summed over an axis."""
        made = self.nodes[node]
        if made.op != "sum" or not made.inputs:
            return False
        product = self.nodes[made.inputs[0]]
        return product.op in SCALES and [self.constant[i] for i in sorted(product.inputs)].count(True) == 1


def _is_ref(value: Any) -> bool:
    return isinstance(value, Ref)


def _is_zero(made: Node) -> bool:
    """Whether it is a product with the number zero."""
    return made.op in SCALES and "mul" in made.op and any(type(a) in (bool, int, float) and a == 0 for a in made.args)


def _axis(made: Node, dims: int) -> int:
    """Along which axis, of so many, tensors were stacked, joined or summed up; -1 for none or several."""
    given = made.kwargs.get("dim", made.kwargs.get("axis", made.args[1] if len(made.args) > 1 else None))
    given = given[0] if isinstance(given, list) and len(given) == 1 else given
    if given is None and made.op != "sum":
        given = 0
    return given % dims if isinstance(given, int) else -1
