"""The text of a network: a template with its classes, the two sources made from it, and the steps by their names."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import count

import torch

from tests.helpers.random_networks.parts import DECORATORS

ROOT = "<root>"
LEFT_ALONE = ("long", "gated")


@dataclass(frozen=True)
class KnownStep:
    """A step as the generator knows it: `attribute` holds its factor on the twin's module of the same name.

    The depth is the number of calls in the step's stream (None for a long or gated one), the parent the module whose
    long step has it in its branch.
    """

    name: str
    module: str
    attribute: str
    kind: str
    calls: int
    places: int
    depth: int | None
    parent: str | None


@dataclass(frozen=True)
class RandomNetwork:
    """The source of a network, the source of its twin, and what is known of both.

    `shape` is the input's, `dtype` the parameters' and the input's; `autocast` says that the network is to be run
    under bfloat16 autocast; `exact` that no tensor is rounded to bfloat16 on the way, so that factors other than powers
    of two may be compared within a tolerance.
    """

    source: str = field(repr=False)
    twin: str = field(repr=False)
    steps: tuple[KnownStep, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    autocast: bool
    exact: bool
    features: frozenset[str] = field(repr=False)


@dataclass(frozen=True)
class Local:
    """A step relative to the class that holds it; the kind "either" depends on whether the instance changes shape."""

    path: str
    attribute: str
    kind: str
    calls: int = 1
    places: int = 1
    parent: str | None = None

    def inside(self, path: str, calls: int = 1, projects: bool = False) -> Local:
        """The same step, seen from the class that holds an instance of this one."""
        kind = self.kind if self.kind != "either" else "projection" if projects else "identity"
        parent = None if self.parent is None else _joined(path, self.parent)
        return replace(self, path=_joined(path, self.path), kind=kind, calls=self.calls * calls, parent=parent)


def _joined(path: str, below: str) -> str:
    return f"{path}.{below}".strip(".")


@dataclass(frozen=True)
class Op:
    """One operation of a branch. `call` holds {x} and, where there is a module, {m}; `saved` says that autograd keeps
    the result, so that nothing may write into it; `idle` that the operation may hand its input through."""

    call: str
    module: str | None = None
    saved: bool = False
    idle: bool = False


@dataclass(frozen=True)
class Branch:
    """Code that takes x to f: statements, then an expression in x that is f."""

    lines: list[str]
    value: str
    writable: bool


@dataclass
class Class:
    name: str
    base: str = "nn.Module"
    signature: str = ", dim, out, drop"
    arguments: str = ", x"
    init: list[str] = field(default_factory=list)
    forward: list[str] = field(default_factory=list)
    methods: list[str] = field(default_factory=list)
    steps: list[Local] = field(default_factory=list)
    functions: set[str] = field(default_factory=set)
    factors: Iterator[int] = field(default_factory=count)
    projects: bool = False
    forward_style: str = "plain forward"

    def factor(self, kind: str, places: int = 1, calls: int = 1) -> str:
        """One more step of this class: the attribute of its factor."""
        attribute = f"h{next(self.factors)}"
        self.steps.append(Local("", attribute, kind, calls, places))
        return attribute

    def template(self) -> str:
        own = [step.attribute for step in self.steps if not step.path]
        extra = ", *args, scale=None, **kwargs" if self.forward_style == "extra arguments" else ""
        forward = [
            *(f"@{name}" for name in DECORATORS.get(self.forward_style, ())),
            f"def forward(self{self.arguments}{extra}):",
            *(f"    {line}" for line in self.forward),
        ]
        if self.forward_style == "not called self":
            forward = [re.sub(r"\bself\b", "this", line) for line in forward]
        inherited = self.signature.removeprefix(", ") if self.base != "nn.Module" else ""
        lines = [
            *([f"<<{' = '.join(own)} = 1.0>>"] if own else []),
            *(f"def __init__(self{self.signature}):", f"    super().__init__({inherited})"),
            *(f"    {line}" for line in self.init),
        ]
        for method in ["\n".join(forward)] * bool(self.forward) + self.methods:
            lines += ["", *method.splitlines()]
        return "\n".join([f"class {self.name}({self.base}):", *(f"    {line}".rstrip() for line in lines)])


def render(template: str, twin: bool) -> str:
    """The template as the network or as its twin; lines of which nothing is left go."""
    lines = []
    for line in template.splitlines():
        text = re.sub("<<(.*?)>>", r"\1" if twin else "", line).rstrip()
        if text or not line.strip():
            lines.append(text)
    return "\n".join(lines) + "\n"


def named(steps: list[Local]) -> tuple[KnownStep, ...]:
    """The steps by their names: those of one module are numbered where it has several."""
    of_module = Counter(step.path for step in steps)
    calls: Counter[str | None] = Counter()
    for step in steps:
        calls[step.parent] += step.calls * (step.kind not in LEFT_ALONE)
    numbers: Counter[str] = Counter()
    known = []
    for step in steps:
        name = module = step.path or ROOT
        if of_module[step.path] > 1:
            name = f"{module}:{numbers[module]}"
            numbers[module] += 1
        depth = None if step.kind in LEFT_ALONE else calls[step.parent]
        parent = ROOT if step.parent == "" else step.parent
        known.append(KnownStep(name, module, step.attribute, step.kind, step.calls, step.places, depth, parent))
    return tuple(known)
