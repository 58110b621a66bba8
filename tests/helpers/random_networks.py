"""Random residual networks, each with what its generator knows of it.

A network is Python source: a few small classes with `Network` on top, in a module that is imported from a file as any
other. The source is made from one template in which the text between `<<` and `>>` belongs to the *twin* alone: the
same network with its step factors written out, `x + self.h0 * f` where the network itself says `x + f`. Beside the two
sources the generator states which additions are steps, of which kind, and how often each runs in a forward; every line
that holds a step ends in the comment `# step`.

>>> from hypothesis import find
>>> network = find(random_networks(), lambda network: len(network.steps) == 1)
>>> [step.module for step in network.steps]
['u0']
"""

from __future__ import annotations

import importlib.util
import linecache
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import TypeVar

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

ROOT = "<root>"
LEFT_ALONE = ("long", "gated")
T = TypeVar("T")

# What a network is put together from; the tests check that a run has met every name of every tuple.
STREAMS = ("tokens", "conv1d", "conv2d")
PRECISIONS = ("float64", "float32", "branch in bfloat16", "autocast")
BLOCKS = (
    *("single", "double", "fitted", "parallel", "broadcast", "loop", "layers", "output module"),
    *("inherited", "super", "super and one more step"),
)
LAYERS = ("of a list", "by number", "zipped", "in pairs", "in groups", "by sum")
SITES = (
    *("call", "called again", "checkpoint", "registered twice", "Sequential", "ModuleList", "wrapped", "inline"),
    *("long", "projection", "siblings", "fusion", "plain", "gated", "decoder", "hyper-connections"),
)
GATED = (
    *("mix", "from the state", "subtracted from the state", "from the candidate", "lerp", "addcmul by a gate"),
    *("in place by a gate", "scripted mix"),
)
SHORTCUTS = (
    *("input", "dropout", "clone", "activation", "cast", "normed", "scaled", "None or map", "Identity or map"),
)
FITS = (
    *("flip", "roll", "index_select", "gather", "repeat", "tile"),
    *("interpolate", "conv_transpose", "pixel_shuffle", "pixel_unshuffle"),
)
MAPS = ("map", "map and norm", "norm and map", "pool and map", "slice and pad", "weight norm")
BODIES = ("one module", "statements", "one expression", "method", "private")
MIXERS = {
    "tokens": ("attention", "talking heads", "MultiheadAttention", "GRU", "token mixing", "vmap"),
    "conv1d": ("depthwise", "pooling", "channels last", "vmap"),
    "conv2d": ("depthwise", "pooling", "channels last", "vmap"),
}
NORMS = ("norm of nn", "norm by hand", "frozen norm")
INNER = (
    *("none", "LoRA", "feed-through", "siblings in a branch", "split", "pooling residual", "response norm", "nested"),
    "gate of two maps",
)
BEFORE = (
    *("nothing", "position", "expanded position", "position from a table", "mask", "noise", "gate", "doubling"),
    *("argument", "mixed by a gate", "weighted by scores"),
)
STEMS = ("map to the stream", "position embedding", "class token", "queries")
AFTER = ("nothing again", "activation after", "activation in place", "norm after")
FORMS = (
    *("a + b", "torch.add", "operator.add", "Tensor.add", "alpha", "a - b", "torch.sub", "views", "lines", "walrus"),
    *("conditional", "alias", "function", "function with dropout", "method add", "static method", "nested function"),
    *("lambda", "comprehension", "Add module", "FloatFunctional", "slice +=", "slice =", "slice add_", "slice and cat"),
    *("function in an attribute", "partial", "function in a dict", "decorated function", "callable object"),
    *("class method", "kept method"),
    *("sum", "reduce", "sum of a stack", "addcmul", "index_add", "lerp by a number", "lambda in an attribute"),
    *("scripted function", "autograd function"),
    *("skip +=", "skip -=", "skip add_", "operator.iadd", "function in place", "branch +=", "branch add_"),
)
FUSED = ("addcmul", "index_add", "lerp by a number")  # on a mapped skip they are no steps; one dtype
BY_DIFFERENCE = (
    *FUSED,
    *("sum", "reduce", "sum of a stack", "lambda in an attribute", "scripted function", "autograd function"),
)
PARALLEL = ("in one expression", "in turn", "branches first", "in place", "sum of branches first", "three")
DOUBLE = ("one after the other", "two on one line", "two in one expression")
FORWARDS = (
    *("plain forward", "decorated", "not called self", "extra arguments", "nested decorators", "kept in a default"),
)
FEATURES = frozenset(
    (*STREAMS, *PRECISIONS, *STEMS, *BLOCKS, *SITES, *SHORTCUTS, *MAPS, *BODIES, *INNER, *BEFORE, *AFTER, *FORMS)
) | {
    *(*PARALLEL, *DOUBLE, *GATED, *FORWARDS, *LAYERS, *FITS, *NORMS, *MIXERS["tokens"], *MIXERS["conv1d"]),
    "branch left",
}

DECORATORS = {
    "decorated": ("decorated",),
    "nested decorators": ("decorated", "decorated"),
    "kept in a default": ("kept_in_a_default",),
}
HELPERS = {
    "LayerScale": """
class LayerScale(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(shape))

    def forward(self, x):
        return x * self.gamma
""",
    "DropPath": """
class DropPath(nn.Module):
    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        if not self.training or self.p == 0.0:
            return x
        keep = torch.full((x.shape[0],) + (1,) * (x.ndim - 1), 1 - self.p, dtype=x.dtype, device=x.device)
        return x * torch.bernoulli(keep) / (1 - self.p)
""",
    "Attention": """
class Attention(nn.Module):
    def __init__(self, dim, rotary, bias, mask):
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.rotary = rotary
        self.bias = nn.Parameter(torch.zeros(2, TOKENS, TOKENS)) if bias else None
        self.register_buffer("mask", torch.full((TOKENS, TOKENS), -1e4).triu(1) if mask else None, persistent=False)

    def rotate(self, x):
        angle = torch.arange(TOKENS, dtype=x.dtype, device=x.device)[:, None].expand_as(x)
        a, b = x.chunk(2, -1)
        return x * angle.cos() + torch.cat([-b, a], -1) * angle.sin()

    def forward(self, x):
        n, t, d = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, 2, d // 2).permute(2, 0, 3, 1, 4).unbind(0)
        if self.rotary:
            q, k = self.rotate(q), self.rotate(k)
        scores = q @ k.transpose(-2, -1)
        if self.bias is not None:
            scores = scores + self.bias.expand_as(scores)
        if self.mask is not None:
            scores = scores + self.mask
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(n, t, d))
""",
    "TalkingHeads": """
class TalkingHeads(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.qkv, self.proj, self.talk = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim), nn.Conv2d(2, 2, 1)

    def forward(self, x):
        n, t, d = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, 2, d // 2).permute(2, 0, 3, 1, 4).unbind(0)
        scores = q @ k.transpose(-2, -1)
        scores = scores + self.talk(scores)
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(n, t, d))
""",
    "NormByHand": """
class NormByHand(nn.Module):
    def __init__(self, shape, dim):
        super().__init__()
        self.weight, self.bias, self.dim = nn.Parameter(torch.ones(shape)), nn.Parameter(torch.zeros(shape)), dim

    def forward(self, x):
        u = x.mean(self.dim, keepdim=True)
        s = (x - u).pow(2).mean(self.dim, keepdim=True)
        return self.weight * ((x - u) / torch.sqrt(s + 1e-2)) + self.bias
""",
    "FrozenNorm": """
class FrozenNorm(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.register_buffer("scale", torch.ones(shape))
        self.register_buffer("shift", torch.full(shape if isinstance(shape, tuple) else (shape,), 0.1))

    def forward(self, x):
        return x * self.scale + self.shift
""",
    "GateOfTwoMaps": """
class GateOfTwoMaps(nn.Module):
    def __init__(self, encode, w, u):
        super().__init__()
        self.encode, self.w, self.u = encode, w, u

    def forward(self, x):
        s = torch.tanh(self.encode(x))
        return torch.sigmoid((self.w(x) + self.u(s)) / 2) * s
""",
    "WeightedByScores": """
class WeightedByScores(nn.Module):
    def __init__(self, encode, w, u, v, dim):
        super().__init__()
        self.encode, self.w, self.u, self.v, self.dim = encode, w, u, v, dim

    def forward(self, x):
        k = torch.relu(self.encode(x))
        scores = self.v(torch.tanh(self.w(x) + self.u(k)))
        return scores.softmax(self.dim) * k
""",
    "Hyper": """
class Hyper(nn.Module):
    <<h0 = 1.0>>
    def __init__(self, layer, dim, depends):
        super().__init__()
        self.layer, self.depends = layer, nn.Linear(dim, 4) if depends else None
        self.mix, self.beta = nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(3, 1, 1))

    def forward(self, streams):
        if self.depends is None:
            mixed = torch.einsum("st,ntld->nsld", self.mix, streams)
        else:
            mix = self.mix + torch.tanh(self.depends(streams.mean(2))).transpose(1, 2)
            mixed = torch.einsum("nst,ntld->nsld", mix, streams)
        return mixed[:, 1:] + <<self.h0 * >>(self.beta * self.layer(mixed[:, 0])[:, None])  # step
""",
    "Decoder": """
class DecoderLayer(nn.Module):
    <<h0 = h1 = 1.0>>
    def __init__(self, dim):
        super().__init__()
        self.attention = nn.MultiheadAttention(dim, 2, batch_first=True)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.ReLU(), nn.Linear(2 * dim, dim))

    def forward(self, x, positions):
        query = x + positions
        x = self.norm1(x + <<self.h0 * >>self.attention(query, query, x, need_weights=False)[0])  # step
        return self.norm2(x + <<self.h1 * >>self.mlp(x))  # step


class Decoder(nn.Module):
    def __init__(self, dim, layers):
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(dim) for _ in range(layers))
        self.heads = nn.ModuleList(nn.Linear(dim, 4) for _ in range(layers))
        self.embed = nn.Sequential(nn.Linear(4, dim), nn.ReLU(), nn.Linear(dim, dim))
        self.boxes = nn.Parameter(torch.zeros(1, TOKENS, 4))

    def forward(self, x):
        boxes = self.boxes.expand(x.shape[0], -1, -1)
        for layer, head in zip(self.layers, self.heads):
            x = layer(x, self.embed(boxes))
            boxes = torch.sigmoid(head(x) + boxes)
        return x
""",
    "Permuted": """
class Permuted(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x.transpose(1, -1)).transpose(1, -1)
""",
    "LoRA": """
class LoRA(nn.Module):
    def __init__(self, base, down, up):
        super().__init__()
        self.base, self.down, self.up = base, down, up

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))
""",
    "FeedThrough": """
class FeedThrough(nn.Module):
    def __init__(self, scan, shape):
        super().__init__()
        self.scan = scan
        self.D = nn.Parameter(torch.ones(shape))

    def forward(self, x):
        return self.scan(x) + x * self.D
""",
    "Siblings": """
class Siblings(nn.Module):
    def __init__(self, one, other):
        super().__init__()
        self.one, self.other = one, other

    def forward(self, x):
        return self.one(x) + self.other(x)
""",
    "Split": """
class Split(nn.Module):
    def __init__(self, one, other, dim):
        super().__init__()
        self.one, self.other, self.dim = one, other, dim

    def forward(self, x):
        a, b = x.chunk(2, self.dim)
        a = self.one(a)
        return torch.cat([a, self.other(a + b)], self.dim)
""",
    "PoolingResidual": """
class PoolingResidual(nn.Module):
    def __init__(self, pool):
        super().__init__()
        self.pool = pool

    def forward(self, x):
        return self.pool(x) - x
""",
    "ResponseNorm": """
class ResponseNorm(nn.Module):
    def __init__(self, shape, channels, space):
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.zeros(shape)), nn.Parameter(torch.zeros(shape))
        self.channels, self.space = channels, space

    def forward(self, x):
        g = x.norm(dim=self.space, keepdim=True)
        return x + self.beta + self.gamma * (x * (g / (g.mean(self.channels, keepdim=True) + 1e-6)))
""",
    "Inner": """
class Inner(nn.Module):
    <<h0 = 1.0>>
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return x + <<self.h0 * >>self.layer(x)  # step
""",
    "Residual": """
class Residual(nn.Module):
    <<h0 = 1.0>>
    def __init__(self, fn):
        super().__init__()
        self.fn = fn

    def forward(self, x, **kwargs):
        return <<self.h0 * >>self.fn(x, **kwargs) + x  # step
""",
    "Add": """
class Add(nn.Module):
    <<h0 = 1.0>>
    def forward(self, a, b):
        return a + <<self.h0 * >>b  # step
""",
    "Gated": """
class Gated(nn.Module):
    <<h0 = 1.0>>
    def __init__(self, layer, gate, spelling):
        super().__init__()
        self.layer, self.gate, self.spelling = layer, gate, spelling

    def forward(self, s):
        n, z = torch.tanh(self.layer(s)), torch.sigmoid(self.gate(s))
        if self.spelling == "mix":
            return <<by_difference(>>(1 - z) * n + z * s<<, s, self.h0)>>  # step
        if self.spelling == "from the state":
            return s + <<self.h0 * >>((1 - z) * (n - s))  # step
        if self.spelling == "subtracted from the state":
            return s - <<self.h0 * >>((1 - z) * (s - n))  # step
        if self.spelling == "scripted mix":
            return <<by_difference(>>scripted_mix(s, n, z)<<, s, self.h0)>>  # step
        if self.spelling == "from the candidate":
            return <<by_difference(>>(s - n) * z + n<<, s, self.h0)>>  # step
        if self.spelling == "lerp":
            return <<by_difference(>>torch.lerp(s, n, 1 - z)<<, s, self.h0)>>  # step
        if self.spelling == "addcmul by a gate":
            return <<by_difference(>>torch.addcmul(n, z, s - n)<<, s, self.h0)>>  # step
        y = z * s
        y += (1 - z) * n  # step
        <<y = by_difference(y, s, self.h0)>>
        return y
""",
    "by_difference": """
<<def by_difference(y, s, h):>>
<<    if h == 1.0:>>
<<        return y>>
<<    if (y.dtype, y.stride()) == (s.dtype, s.stride()):>>
<<        return torch.lerp(s, y, h)>>
<<    return (y + (y - s) * (h - 1)).to(y.dtype)>>
""",
    "scripted_mix": """
def plain_mix(s, n, z):
    return (1 - z) * n + z * s


with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    scripted_mix = torch.jit.script(plain_mix)
""",
    "scripted_add": """
def plain_add(a, b):
    return a + b


with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    scripted_add = torch.jit.script(plain_add)
""",
    "AddByHand": """
class AddByHand(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b):
        ctx.shapes = a.shape, b.shape
        return a + b

    @staticmethod
    def backward(ctx, grad):
        return grad, grad
""",
    "weight_normed": """
def weight_normed(layer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nn.utils.weight_norm(layer)
""",
    "kept_in_a_default": """
def kept_in_a_default(function):
    def wrapper(*args, __function=function, **kwargs):
        return __function(*args, **kwargs)

    return functools.update_wrapper(wrapper, function)
""",
    "SliceAndPad": """
class SliceAndPad(nn.Module):
    def __init__(self, pads, stride):
        super().__init__()
        self.pads, self.stride = pads, stride

    def forward(self, x):
        return F.pad(x[(slice(None), slice(None)) + (slice(None, None, self.stride),) * (x.ndim - 2)], self.pads)
""",
    "decorated": """
def decorated(function):
    @functools.wraps(function)
    def wrapper(self, *args, **kwargs):
        return function(self, *args, **kwargs)

    return wrapper
""",
}

HEADER = """import functools
import operator
import warnings

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

TOKENS = 4
"""


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


# -- Inside: the template's parts -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Local:
    """A step relative to the class that holds it; the kind "either" depends on whether the instance changes shape."""

    path: str
    attribute: str
    kind: str
    calls: int = 1
    places: int = 1
    parent: str | None = None

    def inside(self, path: str, calls: int = 1, projects: bool = False) -> _Local:
        """The same step, seen from the class that holds an instance of this one."""
        kind = self.kind if self.kind != "either" else "projection" if projects else "identity"
        parent = None if self.parent is None else _joined(path, self.parent)
        return replace(self, path=_joined(path, self.path), kind=kind, calls=self.calls * calls, parent=parent)


def _joined(path: str, below: str) -> str:
    return f"{path}.{below}".strip(".")


@dataclass(frozen=True)
class _Op:
    """One operation of a branch. `call` holds {x} and, where there is a module, {m}; `saved` says that autograd keeps
    the result, so that nothing may write into it; `idle` that the operation may hand its input through."""

    call: str
    module: str | None = None
    saved: bool = False
    idle: bool = False


@dataclass(frozen=True)
class _Branch:
    """Code that takes x to f: statements, then an expression in x that is f."""

    lines: list[str]
    value: str
    writable: bool


@dataclass
class _Class:
    name: str
    base: str = "nn.Module"
    signature: str = ", dim, out, drop"
    arguments: str = ", x"
    init: list[str] = field(default_factory=list)
    forward: list[str] = field(default_factory=list)
    methods: list[str] = field(default_factory=list)
    steps: list[_Local] = field(default_factory=list)
    functions: set[str] = field(default_factory=set)
    factors: Iterator[int] = field(default_factory=count)
    projects: bool = False
    forward_style: str = "plain forward"

    def factor(self, kind: str, places: int = 1, calls: int = 1) -> str:
        """One more step of this class: the attribute of its factor."""
        attribute = f"h{next(self.factors)}"
        self.steps.append(_Local("", attribute, kind, calls, places))
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


class _Writer:
    """Draws the choices and writes the template."""

    def __init__(self, choices: bytes) -> None:
        self.choices = iter(choices)
        self.features: set[str] = set()
        self.helpers: dict[str, str] = {}
        self.classes: list[str] = []
        self.functions: list[str] = []
        self.blocks: list[_Class] = []
        self.names = count()
        self.stream = self.pick(STREAMS)
        self.precision = self.pick(PRECISIONS)
        self.tokens = self.stream == "tokens"
        self.space = {"tokens": 1, "conv1d": 1, "conv2d": 2}[self.stream]
        self.conv, self.batch_norm, self.pool = (f"nn.{name}{self.space}d" for name in ("Conv", "BatchNorm", "AvgPool"))

    def below(self, n: int) -> int:
        """The next choice; 0, the simplest, once the bytes are used up."""
        return next(self.choices, 0) % n

    def maybe(self) -> bool:
        return self.below(2) == 1

    def choose(self, *options: T) -> T:
        return options[self.below(len(options))]

    def pick(self, options: Iterable[str], *excluded: str) -> str:
        """A choice that counts as a feature of the network."""
        choice = self.choose(*(option for option in options if option not in excluded))
        self.features.add(choice)
        return choice

    def helper(self, name: str) -> str:
        self.helpers[name] = HELPERS[name].strip()
        return name

    # Operations.

    def scale_shape(self, width: str) -> str:
        return width if self.tokens else f"({width}{', 1' * self.space})"

    def full_shape(self, width: str) -> str:
        return f"1, TOKENS, {width}" if self.tokens else f"1, {width}{', 1' * self.space}"

    def linear(self, a: str, b: str, stride: str = "1") -> str:
        if self.tokens:
            return f"nn.Linear({a}, {b})"
        return f"{self.conv}({a}, {b}, 3, {stride}, 1)" if self.maybe() else f"{self.conv}({a}, {b}, 1, {stride})"

    def norm(self, width: str) -> str:
        kind = self.pick(NORMS)
        if kind == "norm by hand":
            return f"{self.helper('NormByHand')}({self.scale_shape(width)}, {-1 if self.tokens else 1})"
        if kind == "frozen norm":
            return f"{self.helper('FrozenNorm')}({self.scale_shape(width)})"
        if self.tokens:
            # Under autocast an RMSNorm warns that its input and its weight differ in dtype.
            return f"nn.{self.choose('LayerNorm', *(['RMSNorm'] if self.precision != 'autocast' else []))}({width})"
        return f"{self.batch_norm}({width})" if self.maybe() else f"nn.GroupNorm(2, {width})"

    def activation(self, into_place: bool) -> _Op:
        if into_place and self.maybe():
            return _Op("{m}({x})", "nn.ReLU(inplace=True)", saved=True)
        name = self.choose("ReLU", "GELU", "SiLU", "Tanh")
        saved = name in ("ReLU", "Tanh")
        if self.maybe():
            return _Op(f"{'torch' if name == 'Tanh' else 'F'}.{name.lower()}({{x}})", saved=saved)
        return _Op("{m}({x})", f"nn.{name}()", saved=saved)

    def mixer(self, width: str) -> _Op:
        # A mapped convolution is not cast as a whole.
        match self.pick(MIXERS[self.stream], *(["vmap"] if self.precision == "autocast" else [])):
            case "attention":
                flags = ", ".join(f"{name}={self.maybe()}" for name in ("rotary", "bias", "mask"))
                return _Op("{m}({x})", f"{self.helper('Attention')}({width}, {flags})")
            case "talking heads":
                return _Op("{m}({x})", f"{self.helper('TalkingHeads')}({width})")
            case "vmap":
                one = f"nn.Linear({width}, {width})" if self.tokens else f"{self.conv}({width}, {width}, 1)"
                return _Op("torch.func.vmap({m})({x})", one)
            case "MultiheadAttention":
                module = f"nn.MultiheadAttention({width}, 2, batch_first=True)"
                return _Op("{m}({x}, {x}, {x}, need_weights=False)[0]", module)
            case "GRU":
                return _Op("{m}({x})[0]", f"nn.GRU({width}, {width}, batch_first=True)", saved=True)
            case "token mixing":
                return _Op("{m}({x})", f"{self.helper('Permuted')}(nn.Linear(TOKENS, TOKENS))")
            case "depthwise":
                return _Op("{m}({x})", f"{self.conv}({width}, {width}, 3, 1, 1, groups={width})")
            case "pooling":
                return _Op("{m}({x})", f"{self.pool}(3, 1, 1)")
            case _:
                return _Op("{m}({x})", f"{self.helper('Permuted')}(nn.Linear({width}, {width}))")

    def inner(self, width: str, nested: bool) -> list[_Op]:
        """Additions inside a branch, none of which is a step: a lone residual belongs to the branch."""
        excluded = ["nested"] * (not nested) + ["pooling residual"] * self.tokens
        choice = self.pick(INNER, *excluded)
        half = f"{width} // 2"
        module = {
            "LoRA": lambda: f"LoRA({self.linear(width, width)}, {self.linear(width, '2')}, {self.linear('2', width)})",
            "feed-through": lambda: (
                f"FeedThrough(nn.Sequential({self.linear(width, width)}, nn.SiLU(), {self.linear(width, width)}), "
                f"{self.scale_shape(width)})"
            ),
            "siblings in a branch": lambda: f"Siblings({self.linear(width, width)}, {self.linear(width, width)})",
            "split": lambda: f"Split({self.linear(half, half)}, {self.linear(half, half)}, {-1 if self.tokens else 1})",
            "pooling residual": lambda: f"PoolingResidual({self.pool}(3, 1, 1, count_include_pad=False))",
            "response norm": lambda: (
                f"ResponseNorm({self.scale_shape(width)}, "
                + ("-1, 1)" if self.tokens else f"1, {tuple(range(2, 2 + self.space))})")
            ),
            "nested": lambda: f"Inner({self.linear(width, width)})",
            "gate of two maps": lambda: f"GateOfTwoMaps({', '.join(self.linear(width, width) for _ in range(3))})",
        }.get(choice)
        if module is None:
            return []
        text = module()
        self.helper(text.partition("(")[0])
        return [_Op("{m}({x})", text)]

    def branch(
        self, cls: _Class, name: str, a: str = "dim", b: str = "dim", stride: str = "1",
        *, deep: bool = False, nested: bool = False, last: bool = True, bodies: tuple[str, ...] = BODIES,
    ) -> _Branch:  # fmt: skip
        """A branch from width `a` to width `b`; a deep one has at least two maps with an activation between them."""
        ops: list[_Op] = []
        if self.maybe():
            ops.append(_Op("{m}({x})", self.norm(a)))
            if self.maybe():
                ops.append(self.activation(into_place=True))
        if deep or self.maybe():
            hidden = self.choose(a, f"{a} * 2")
            ops.append(_Op("{m}({x})", self.linear(a, hidden, stride)))
            if self.maybe():
                ops.append(_Op("{m}({x})", self.norm(hidden)))
            ops += [self.activation(into_place=True), _Op("{m}({x})", self.linear(hidden, b))]
        else:
            ops.append(_Op("{m}({x})", self.linear(a, b, stride)))
        if self.maybe():
            ops.append(self.mixer(b))
        ops += self.inner(b, nested)
        if self.maybe():
            ops.append(_Op("{m}({x})", self.norm(b)))
        if self.maybe():
            ops.append(self.activation(into_place=not ops[-1].saved))
        if self.maybe():
            scale = self.scale_shape(b)
            ops.append(_Op("{m}({x})", f"{self.helper('LayerScale')}({scale})") if self.maybe()
                       else _Op("{x} * {m}", f"nn.Parameter(torch.ones({scale}))"))  # fmt: skip
        if self.maybe():
            ops.append(_Op("{m}({x})", "nn.Dropout(drop)", idle=True) if self.maybe()
                       else _Op("F.dropout({x}, 0.2, self.training)", idle=True))  # fmt: skip
        if self.maybe():
            ops.append(_Op("{m}({x})", f"{self.helper('DropPath')}(drop)", idle=True))
        if self.precision == "branch in bfloat16" and last and self.maybe():
            ops.append(_Op("{x}.to(torch.bfloat16)"))
        writable = not next(op for op in reversed(ops) if not op.idle).saved
        return self.body(cls, name, ops, writable, bodies)

    def body(self, cls: _Class, name: str, ops: list[_Op], writable: bool, bodies: tuple[str, ...]) -> _Branch:
        """The same operations in one of several ways of writing a branch down."""
        plain = all(op.module and op.call == "{m}({x})" for op in ops)
        unfit = [] if plain else ["one module", "private"]
        if any(op.call.count("{x}") > 1 for op in ops):
            unfit.append("one expression")
        choice = self.pick(bodies, *unfit)
        if choice in ("one module", "private"):
            private = choice == "private"
            attribute = f"__{name}" if private else name
            cls.init.append(f"self.{attribute} = nn.Sequential({', '.join(op.module or '' for op in ops)})")
            return _Branch([], f"self.{attribute}(x)", writable)
        calls = []
        for i, op in enumerate(ops):
            if op.module:
                cls.init.append(f"self.{name}_{i} = {op.module}")
            calls.append(op.call.replace("{m}", f"self.{name}_{i}"))
        if choice == "one expression":
            value = "x"
            for call in calls:
                value = call.replace("{x}", f"({value})" if " * " in value else value)
            return _Branch([], f"({value})" if calls[-1].startswith("{x} *") else value, writable)
        variable = name if choice == "statements" else "y"
        lines = [f"{variable} = {call.replace('{x}', variable if i else 'x')}" for i, call in enumerate(calls)]
        if choice == "method":
            cls.methods.append("\n".join([f"def {name}(self, x):", *(f"    {line}" for line in lines), "    return y"]))
            return _Branch([], f"self.{name}(x)", writable)
        return _Branch(lines, variable, writable)

    def shortcut(self, cls: _Class, name: str, kind: str) -> tuple[list[str], str, str, bool]:
        """Statements, the skip's expression, the step's kind, and whether the skip may be written into."""
        match kind:
            case "dropout":
                cls.init.append(f"self.{name}_skip = nn.Dropout(drop)")
                return [], f"self.{name}_skip(x)", "identity", False
            case "clone":
                return [], "x.clone()", "identity", True
            case "activation":
                return [], self.choose("F.gelu(x)", "torch.tanh(x)"), "identity", False
            case "cast":
                return [], "x.double().to(x.dtype)" if self.maybe() else "x.view_as(x)", "identity", False
            case "normed":
                cls.init.append(f"self.{name}_pre = {self.norm('dim')}")
                return [f"x = self.{name}_pre(x)"], "x", "identity", False
            case "scaled":
                cls.init.append(f"self.{name}_scale = nn.Parameter(torch.ones({self.scale_shape('dim')}))")
                return [], f"(x * self.{name}_scale)", "projection", False
            case "None or map" | "Identity or map":
                cls.projects = True
                otherwise = "None" if kind == "None or map" else "nn.Identity()"
                cls.init += [f"self.shortcut = {otherwise}", "if dim != out:", f"    self.shortcut = {self.map()}"]
                if kind == "Identity or map":
                    return [], "self.shortcut(x)", "either", False
                if self.maybe():
                    return [], "(x if self.shortcut is None else self.shortcut(x))", "either", False
                return ["s = x", "if self.shortcut is not None:", "    s = self.shortcut(x)"], "s", "either", False
            case _:
                return [], "x", "identity", False

    def map(self) -> str:
        """A projection from `dim` to `out` that halves the resolution of images and sequences."""
        one = "nn.Linear(dim, out, bias=False)" if self.tokens else f"{self.conv}(dim, out, 1, 2, bias=False)"
        match self.pick(MAPS, *(["pool and map"] if self.tokens else [])):
            case "map":
                return one
            case "map and norm":
                return f"nn.Sequential({one}, {self.norm('out')})"
            case "norm and map":
                return f"nn.Sequential({self.norm('dim')}, {one})"
            case "pool and map":
                return f"nn.Sequential({self.pool}(2, 2, ceil_mode=True), {self.conv}(dim, out, 1))"
            case "weight norm":
                return f"{self.helper('weight_normed')}({one})"
            case _:
                pads = "(0, out - dim)" if self.tokens else f"({'0, 0, ' * self.space}0, out - dim)"
                return f"{self.helper('SliceAndPad')}({pads}, {1 if self.tokens else 2})"

    def addition(self, cls: _Class, skip: str, branch: _Branch, kind: str, skip_writable: bool = False) -> list[str]:
        """Statements that leave the step's result in x."""
        excluded = [] if self.precision in ("float64", "float32") else ["sum of a stack", *FUSED]
        if kind != "identity":
            excluded += FUSED
        form = self.pick(FORMS, *excluded, *([] if branch.writable else FORMS[-2:]))
        into = skip if skip_writable else f"({skip}).clone()"
        f = branch.value
        if form == "Add module":
            attribute = f"add{next(self.names)}"
            cls.init.append(f"self.{attribute} = {self.helper('Add')}()")
            cls.steps.append(_Local(attribute, "h0", kind))
            return [f"x = self.{attribute}({skip}, {f})"]
        if form == "FloatFunctional":
            attribute = f"add{next(self.names)}"
            cls.init.append(f"self.{attribute} = torch.ao.nn.quantized.FloatFunctional()")
            cls.init.append(f"<<self.{attribute}.h0 = 1.0>>")
            cls.steps.append(_Local(attribute, "h0", kind))
            return [f"x = self.{attribute}.add({skip}, <<self.{attribute}.h0 * >>{f})"]
        if form.startswith("slice") and kind != "long":
            kind = "projection"  # a slice is a shape-matching map
        h = cls.factor(kind)
        scaled, mark = f"<<self.{h} * >>", "  # step"
        left, right = skip, scaled + f
        flip = form not in ("a - b", "torch.sub", "alias") and self.maybe()
        if flip:
            left, right = right, left
            self.features.add("branch left")
        pair = f"{left}, {right}"
        back = ["x = x.to(dtype)"] if self.precision == "branch in bfloat16" else []
        remember = ["dtype = x.dtype"] if back else []
        unique = f"merge{next(self.names)}"
        a, b = ("<<h * >>b", "a") if flip else ("a", "<<h * >>b")
        if form in BY_DIFFERENCE:
            return [self.by_difference(cls, form, skip, f, h, flip) + mark]
        match form:
            case "a + b":
                return [f"x = {left} + {right}{mark}"]
            case "torch.add" | "operator.add":
                return [f"x = {form}({pair}){mark}"]
            case "Tensor.add":
                return [f"x = ({left}).add({right}){mark}"]
            case "alpha":
                return [f"x = torch.add({pair}, alpha=0.7){mark}"]
            case "a - b":
                return [f"x = {skip} - {scaled}{f}{mark}"]
            case "torch.sub":
                return [f"x = torch.sub({skip}, {scaled}{f}){mark}"]
            case "views":
                return [f"x = ({left}).transpose(1, -1) + ({right}).transpose(1, -1){mark}", "x = x.transpose(1, -1)"]
            case "lines":
                return ["x = (", f"    {left}{mark}", f"    + {right}{mark}", ")"]
            case "walrus":
                return [f"x = F.gelu(y := {left} + {right}){mark}"]
            case "conditional":
                cls.init.append("self.residual = True")
                return [f"x = {left} + {right} if self.residual else {f}{mark}"]
            case "alias":
                return [f"y = {skip}", f"x = y + {scaled}{f}{mark}"]
            case "function" | "function with dropout" | "function in place":
                name = self.function(cls, form)
                extra = ", 0.2, self.training" if "dropout" in name else ""
                return [f"x = {name}({into if 'place' in form else skip}, {f}{extra}<<, self.{h}>>)"]
            case "function in an attribute" | "partial":
                name = self.function(cls, "function")
                cls.init.append(f"self.{unique} = {f'functools.partial({name})' if form == 'partial' else name}")
                return [f"x = self.{unique}({skip}, {f}<<, self.{h}>>)"]
            case "function in a dict":
                self.functions.append(f"{unique.upper()} = {{'add': {self.function(cls, 'function')}}}")
                return [f"x = {unique.upper()}['add']({skip}, {f}<<, self.{h}>>)"]
            case "decorated function":
                self.helper("decorated")
                self.functions.append(f"@decorated\ndef {unique}(a, b<<, h>>):\n    return {a} + {b}{mark}")
                return [f"x = {unique}({skip}, {f}<<, self.{h}>>)"]
            case "callable object":
                method = f"    def __call__(self, a, b<<, h>>):\n        return {a} + {b}{mark}"
                self.functions.append(f"class {unique.title()}:\n{method}")
                cls.init.append(f"self.{unique} = {unique.title()}()")
                return [f"x = self.{unique}({skip}, {f}<<, self.{h}>>)"]
            case "class method":
                method = f"    @classmethod\n    def add(cls, a, b<<, h>>):\n        return {a} + {b}{mark}"
                self.functions.append(f"class {unique.title()}:\n{method}")
                return [f"x = {unique.title()}.add({skip}, {f}<<, self.{h}>>)"]
            case "kept method":
                a, b = a.replace("h *", f"self.{h} *"), b.replace("h *", f"self.{h} *")
                cls.methods.append(f"def {unique}(self, a, b):\n    return {a} + {b}{mark}")
                cls.init.append(f"self.kept_{unique} = self.{unique}")
                return [f"x = self.kept_{unique}({skip}, {f})"]
            case "method add":
                a, b = a.replace("h *", f"self.{h} *"), b.replace("h *", f"self.{h} *")
                cls.methods.append(f"def {unique}(self, a, b):\n    return {a} + {b}{mark}")
                return [f"x = self.{unique}({skip}, {f})"]
            case "static method":
                cls.methods.append(f"@staticmethod\ndef {unique}(a, b<<, h>>):\n    return {a} + {b}{mark}")
                return [f"x = self.{unique}({skip}, {f}<<, self.{h}>>)"]
            case "nested function":
                define = [f"def {unique}(a, b<<, h>>):", f"    return {a} + {b}{mark}"]
                return [*define, f"x = {unique}({skip}, {f}<<, self.{h}>>)"]
            case "lambda":
                return [f"{unique} = lambda a, b<<, h>>: {a} + {b}{mark}", f"x = {unique}({skip}, {f}<<, self.{h}>>)"]
            case "comprehension":
                a, b = a.replace("h *", f"self.{h} *"), b.replace("h *", f"self.{h} *")
                return [f"(x,) = [{a} + {b} for a, b in [({skip}, {f})]]{mark}"]
            case "slice +=":
                return [f"f = {f}", f"y = ({skip}).clone()", f"y[:, 1:] += {scaled}f[:, 1:]{mark}", "x = y"]
            case "slice =":
                return [f"f = {f}", f"y = ({skip}).clone()", f"y[:, 1:] = y[:, 1:] + {scaled}f[:, 1:]{mark}", "x = y"]
            case "slice add_":
                return [f"f = {f}", f"y = ({skip}).clone()", f"y[:, 1:].add_({scaled}f[:, 1:]){mark}", "x = y"]
            case "slice and cat":
                first, rest = f"({left})[:, 1:]", f"({right})[:, 1:]"
                return [f"y = {first} + {rest}{mark}", f"x = torch.cat([({skip})[:, :1], y], 1)"]
            case "skip +=":
                return [f"y = {into}", f"y += {scaled}{f}{mark}", "x = y"]
            case "skip -=":
                return [f"y = {into}", f"y -= {scaled}{f}{mark}", "x = y"]
            case "skip add_":
                return [f"y = {into}", f"x = y.add_({scaled}{f}){mark}"]
            case "operator.iadd":
                return [f"y = {into}", f"x = operator.iadd(y, {scaled}{f}){mark}"]
            case "branch +=":
                return [*remember, f"f = {f}", f"<<f.mul_(self.{h}); >>f += {skip}{mark}", "x = f", *back]
            case _:
                return [*remember, f"f = {f}", f"<<f.mul_(self.{h}); >>x = f.add_({skip}){mark}", *back]

    def by_difference(self, cls: _Class, form: str, skip: str, f: str, h: str, flip: bool) -> str:
        """A statement that leaves in x what an expression gives that is no addition of the source."""
        self.helper("by_difference")
        name = f"t{next(self.names)}"
        named = f"(<<{name} := >>{skip})"
        pair = f"{f}, {named}" if flip else f"{named}, {f}"
        if form == "lambda in an attribute":
            cls.init.append(f"self.{name}_plus = lambda a, b: a + b")
        if form in ("scripted function", "autograd function"):
            self.helper("scripted_add" if form == "scripted function" else "AddByHand")
        expression = {
            "sum": f"sum(({pair}))",
            "reduce": f"functools.reduce(operator.add, [{pair}])",
            "sum of a stack": f"torch.stack(({pair})).sum(0)",
            "addcmul": f"torch.addcmul({named}, {f}, torch.ones((), dtype=x.dtype))",
            "index_add": f"torch.index_add({named}, 0, torch.arange(len(x)), {f})",
            "lerp by a number": f"torch.lerp({pair}, {0.75 if flip else 0.25})",
            "scripted function": f"scripted_add({pair})",
            "autograd function": f"AddByHand.apply({pair})",
            "lambda in an attribute": f"self.{name}_plus({pair})",
        }[form]
        return f"x = <<by_difference(>>{expression}<<, {name}, self.{h})>>"

    def function(self, cls: _Class, form: str) -> str:
        """A free function that adds: a new one, or one that another class calls as well."""
        prefix = {"function": "add", "function with dropout": "dropout_add", "function in place": "add_into"}[
            form
        ] + "_"
        known = [name for name in re.findall(r"def (\w+)", "\n".join(self.functions)) if name.startswith(prefix)]
        known = [name for name in known if name not in cls.functions]
        if known and self.maybe():
            name = self.choose(*known)
        else:
            name = f"{prefix}{next(self.names)}"
            body = {
                "function": [f"return {'<<h * >>b + a' if self.maybe() else 'a + <<h * >>b'}  # step"],
                "function with dropout": ["b = F.dropout(b, p, training)", "return a + <<h * >>b  # step"],
                "function in place": ["a += <<h * >>b  # step", "return a"],
            }[form]
            arguments = "a, b, p, training<<, h>>" if "dropout" in name else "a, b<<, h>>"
            self.functions.append("\n".join([f"def {name}({arguments}):", *(f"    {line}" for line in body)]))
        cls.functions.add(name)
        return name

    # Statements around a step.

    def before(self, cls: _Class) -> list[str]:
        """An addition to the state that is not a step."""
        choice = self.pick(BEFORE, *([] if self.tokens else ["position from a table"]))
        maps = lambda n: ", ".join(self.linear("dim", "dim") for _ in range(n))  # noqa: E731
        if choice in ("position", "expanded position"):
            cls.init.append(f"self.position = nn.Parameter(torch.zeros({self.full_shape('dim')}))")
        if choice == "position from a table":
            cls.init.append("self.table = nn.Embedding(TOKENS, dim)")
        if choice == "mixed by a gate":
            cls.init.append(f"self.mixed = {self.helper('GateOfTwoMaps')}({maps(3)})")
        if choice == "weighted by scores":
            one, along = ("nn.Linear(dim, 1)", 1) if self.tokens else (f"{self.conv}(dim, 1, 1)", 2)
            cls.init.append(f"self.weighted = {self.helper('WeightedByScores')}({maps(3)}, {one}, {along})")
        if choice == "argument":
            cls.arguments = ", x, pos"
        return {
            "nothing": [],
            "position": ["x = x + self.position"],
            "expanded position": ["x = self.position.expand_as(x) + x"],
            "mask": ["mask = torch.zeros_like(x[0]).fill_(0.5)", "x = x + mask.expand_as(x)"],
            "noise": ["x = x + 0.1 * torch.randn_like(x)"],
            "gate": ["x = x + x * torch.sigmoid(x)"],
            "doubling": ["x = x + x"],
            "argument": ["x = x + pos.expand_as(x)"],
            "position from a table": ["x = x + self.table(torch.arange(TOKENS)).expand_as(x)"],
            "mixed by a gate": ["x = self.mixed(x)"],
            "weighted by scores": ["x = self.weighted(x)"],
        }[choice]

    def after(self, cls: _Class, name: str, width: str, fresh: bool = True) -> list[str]:
        """What follows a step; only a fresh x may be written into."""
        match self.pick(AFTER, *([] if fresh else ["activation in place"])):
            case "activation after":
                return [f"x = {self.choose('F.relu', 'F.gelu', 'torch.tanh')}(x)"]
            case "activation in place":
                return ["x = F.relu(x, inplace=True)"]
            case "norm after":
                cls.init.append(f"self.{name}_after = {self.norm(width)}")
                return [f"x = self.{name}_after(x)"]
            case _:
                return []

    # Classes.

    def finish(self, cls: _Class) -> _Class:
        if cls.forward:
            cls.forward.append("return x")
            self.features.add(cls.forward_style)
            for name in DECORATORS.get(cls.forward_style, ()):
                self.helper(name)
        self.classes.append(cls.template())
        return cls

    def new_class(self, name: str, **options: str) -> _Class:
        return _Class(f"{name}{next(self.names)}", **options)

    def step(self, cls: _Class, name: str, shortcut: str = "input") -> list[str]:
        """Statements that take x through one step."""
        lines, skip, kind, writable = self.shortcut(cls, name, shortcut)
        width, stride = "dim", "1"
        if kind == "either":
            width, stride = "out", "1" if self.tokens else "1 if dim == out else 2"
        branch = self.branch(cls, name, "dim", width, stride, deep=kind != "identity", nested=kind == "identity")
        added = self.addition(cls, skip, branch, kind, skip_writable=writable)
        return [*lines, *branch.lines, *added, *self.after(cls, name, width)]

    def fitted(self, cls: _Class, name: str) -> list[str]:
        """A step whose skip and branch are fitted to another shape in one way, and what restores the shape."""
        choice = self.pick(FITS, *{"tokens": FITS[6:], "conv1d": FITS[8:], "conv2d": ()}[self.stream])
        channels, axis = (-1 if self.tokens else 1), self.choose(1, 2)
        twice = "1, 1, 2" if self.tokens else f"1, 2{', 1' * self.space}"
        order = f"self.{name}_order"
        if choice in ("index_select", "gather"):
            view = f"torch.arange(dim - 1, -1, -1).view({self.scale_shape('dim')})"
            cls.init.append(f"self.register_buffer('{name}_order', {view}, persistent=False)")
        if choice == "conv_transpose":
            one = f"nn.ConvTranspose{self.space}d(dim, dim, 2, 2)"
            cls.init += [f"self.{name}_{end} = {one}" for end in ("skip_up", "branch_up")]
        fit = {
            "flip": f"{{x}}.flip({axis})",
            "roll": f"{{x}}.roll(1, {axis})",
            "index_select": f"{{x}}.index_select({channels}, {order}.flatten())",
            "gather": f"{{x}}.gather({channels}, {order}.expand_as({{x}}))",
            "repeat": f"{{x}}.repeat({twice})",
            "tile": f"torch.tile({{x}}, ({twice}))",
            "interpolate": "F.interpolate({x}, scale_factor=2.0)",
            "conv_transpose": f"self.{name}_{{end}}_up({{x}})",
            "pixel_shuffle": "F.pixel_shuffle({x}.repeat_interleave(4, dim=1), 2)",
            "pixel_unshuffle": "F.pixel_unshuffle({x}, 2).unflatten(1, (-1, 4)).mean(2)",
        }[choice]
        restored = {
            "repeat": [f"x = x.unflatten({channels}, (2, -1)).mean({-2 if self.tokens else 1})"],
            "interpolate": [f"x = F.avg_pool{self.space}d(x, 2)"],
        }
        alike = {"tile": "repeat", "conv_transpose": "interpolate", "pixel_shuffle": "interpolate"}
        lines = ["x = F.interpolate(x, scale_factor=2.0)"] if choice == "pixel_unshuffle" else []
        skip = fit.replace("{x}", "x").replace("{end}", "skip")
        branch = self.branch(cls, name, deep=True, last=False)
        value = fit.replace("{x}", "f").replace("{end}", "branch")
        added = self.addition(cls, skip, _Branch([], value, writable=True), "projection")
        after = restored.get(alike.get(choice, choice), [])
        return [*lines, *branch.lines, f"f = {branch.value}", *added, *after, *self.after(cls, name, "dim")]

    def block(self, projects: bool = False) -> _Class:
        """A class with one or more steps, built as `Block(dim, out, drop)`; `projects`: `out` may differ from `dim`."""
        cls = self.new_class("Block", forward_style=self.choose(*FORWARDS))
        cls.forward += self.before(cls)
        if projects:
            cls.forward += self.step(cls, "body", self.pick(SHORTCUTS[-2:]))
            return self.finish(cls)
        match self.pick(BLOCKS):
            case "single":
                cls.forward += self.step(cls, "body", self.pick(SHORTCUTS))
            case "double":
                self.double(cls)
            case "parallel":
                self.parallel(cls)
            case "fitted":
                cls.forward += self.fitted(cls, "body")
            case "broadcast":
                self.broadcast(cls)
            case "loop":
                self.loop(cls)
            case "layers":
                self.layers(cls)
            case "output module":
                self.output_module(cls)
            case choice:
                return self.inheriting(cls, choice)
        return self.finish(cls)

    def double(self, cls: _Class) -> None:
        """Two steps, as in a transformer's block."""
        choice = self.pick(DOUBLE)
        if choice == "one after the other":
            for name in ("first", "second"):
                cls.forward += self.step(cls, name, self.pick(SHORTCUTS[:-2]))
            return
        bodies = tuple(body for body in BODIES if body != "statements")
        branches = [self.branch(cls, name, bodies=bodies) for name in ("first", "second")]
        first, second = (f"<<self.{cls.factor('identity')} * >>{branch.value}" for branch in branches)
        cls.forward.append(
            f"x = x + {first}; x = x + {second}  # step"
            if choice == "two on one line"
            else f"x = (x := x + {first}) + {second}  # step"
        )

    def parallel(self, cls: _Class) -> None:
        """Several branches of one state."""
        choice = self.pick(PARALLEL)
        cls.forward.append("state = x")
        if self.maybe():
            cls.init.append(f"self.before = {self.norm('dim')}")
            cls.forward.append("x = self.before(x)")
        branches = [self.branch(cls, name) for name in ("a", "b", "c")[: 3 if choice == "three" else 2]]
        siblings = choice == "sum of branches first"
        h = cls.factor("identity" if siblings else "parallel", places=1 if siblings else len(branches))
        for branch in branches:
            cls.forward += branch.lines
        values = [branch.value for branch in branches]
        a, b, *_ = scaled = [f"<<self.{h} * >>{value}" for value in values]
        cls.forward += {
            "in one expression": [f"x = state + {a} + {b}  # step"],
            "in turn": [f"y = state + {a}  # step", f"x = y + {b}  # step"],
            "branches first": [f"x = {b} + ({a} + state)  # step"],
            "in place": [f"y = state + {a}  # step", f"y += {b}  # step", "x = y"],
            "sum of branches first": [f"x = <<self.{h} * >>({values[0]} + {values[1]}) + state  # step"],
            "three": [f"x = state + {' + '.join(scaled)}  # step"],
        }[choice]
        cls.forward += self.after(cls, "all", "dim")

    def loop(self, cls: _Class) -> None:
        """One addition that several branches run through in turn."""
        n = 1 + self.below(3)
        body = f"nn.Sequential({self.norm('dim')}, {self.linear('dim', 'dim')}, nn.GELU())"
        # One module, so one step: a loop over several is a step for each of them (tests/traps/loops.py).
        cls.init.append(f"self.bodies = nn.ModuleList([{body}] * {n})")
        h = cls.factor("identity", calls=n)
        cls.forward += ["for body in self.bodies:", f"    x = x + <<self.{h} * >>body(x)  # step"]

    def layers(self, cls: _Class) -> None:
        """One line of a loop that adds for several layers: a step of each, named by the module that made its branch."""
        way, n = self.pick(LAYERS), 2 + self.below(2)
        linear = lambda: self.linear("dim", "dim")  # noqa: E731
        layers = [
            f"nn.Sequential({self.norm('dim')}, {linear()}, nn.GELU())" if self.maybe() else linear() for _ in range(n)
        ]
        names, calls = [f"bodies.{i}" for i in range(n)], [1] * n
        keyed = "<<for body in self.bodies: body.h0 = 1.0>>"
        if way == "in groups":
            cls.init += [f"layers = [{', '.join(layers)}]", "self.bodies = nn.ModuleList([*layers, *layers[:1]])"]
            calls[0] = 2
        elif way == "in pairs":
            pairs = [f"nn.ModuleList([{layer}, {linear()}])" for layer in layers]
            cls.init.append(f"self.bodies = nn.ModuleList([{', '.join(pairs)}])")
            keyed = "<<for a, b in self.bodies: a.h0 = b.h0 = 1.0>>"
            names, calls = [f"bodies.{i}.{j}" for i in range(n) for j in range(2)], [1] * 2 * n
        else:
            cls.init.append(f"self.bodies = nn.ModuleList([{', '.join(layers)}])")
        if way == "zipped":
            cls.init.append(f"self.firsts = nn.ModuleList([{', '.join(linear() for _ in range(n))}])")
        if way == "by sum":
            self.helper("by_difference")
        cls.init.append(keyed)
        cls.forward += {
            "by number": [
                "for i in range(len(self.bodies)):",
                "    f = torch.tanh(self.bodies[i](x))",
                "    x = <<self.bodies[i].h0 * >>f + x  # step",
            ],
            "zipped": [
                "for first, body in zip(self.firsts, self.bodies):",
                "    x = x + <<body.h0 * >>body(F.silu(first(x)))  # step",
            ],
            "in pairs": [
                "for a, b in self.bodies:",
                "    x = <<a.h0 * >>a(x) + x  # step",
                "    x = torch.add(x, <<b.h0 * >>b(x))  # step",
            ],
            "by sum": [
                "for body in self.bodies:",
                "    x = <<by_difference(>>sum((x, body(x)))<<, x, body.h0)>>  # step",
            ],
        }.get(way, ["for body in self.bodies:", "    x = x + <<body.h0 * >>body(x)  # step"])
        cls.steps += [_Local(name, "h0", "identity", c) for name, c in zip(names, calls, strict=True)]

    def broadcast(self, cls: _Class) -> None:
        """A branch that is pooled, and broadcast to the state's shape where it is added."""
        one = "nn.Linear(dim, dim)" if self.tokens else f"{self.conv}(dim, dim, 1)"
        cls.init.append(f"self.context = nn.Sequential({one}, nn.SiLU(), {one})")
        over = 1 if self.tokens else tuple(range(2, 2 + self.space))
        f = f"<<self.{cls.factor('identity')} * >>self.context(x.mean({over}, keepdim=True))"
        cls.forward += self.choose(
            [f"x = x + {f}  # step"],
            [f"x = torch.add({f}, x)  # step"],
            ["y = x.clone()", f"y += {f}  # step", "x = y"],
            [f"x = x + ({f}).expand_as(x)  # step"],
        )

    def output_module(self, cls: _Class) -> None:
        """A branch that the caller begins and a module of its own ends, as in BERT."""
        output = self.new_class("Output", signature=", dim, drop", arguments=", hidden, residual")
        branch = self.branch(output, "dense")
        output.forward += ["x = hidden", *branch.lines]
        if self.maybe():
            adds = self.new_class("AddAfter", signature=", dim, drop", arguments=", f, x")
            adds.forward += self.addition(adds, "x", _Branch([], "f", writable=False), "identity")
            self.finish(adds)
            output.init.append(f"self.adds = {adds.name}(dim, drop)")
            output.forward.append(f"x = self.adds({branch.value}, residual)")
            output.steps += [step.inside("adds") for step in adds.steps]
        else:
            output.forward += self.addition(output, "residual", branch, "identity")
        output.forward += self.after(output, "sum", "dim")
        self.finish(output)
        start = self.branch(cls, "body", last=False)
        cls.init.append(f"self.output = {output.name}(dim, drop)")
        cls.forward += [*start.lines, f"x = self.output({start.value}, x)"]
        cls.steps += [step.inside("output") for step in output.steps]

    def inheriting(self, base: _Class, choice: str) -> _Class:
        """A class that has its forward, or a part of it, from another."""
        base.forward += self.step(base, "body", self.pick(SHORTCUTS))
        if choice == "super and one more step":
            base.projects = False
        self.finish(base)
        cls = self.new_class("Derived", base=base.name, arguments=base.arguments)
        cls.projects, cls.steps, cls.factors = base.projects, list(base.steps), base.factors
        cls.functions = base.functions
        if choice == "inherited":
            return self.finish(cls)
        parent = self.choose("super()", f"super({cls.name}, self)")
        call = [f"x = {parent}.forward({cls.arguments.removeprefix(', ')})"]
        if choice == "super":
            cls.forward = [
                *self.after(cls, "early", "dim", fresh=False),
                *call,
                *self.after(cls, "late", "out", fresh=False),
            ]
        elif self.maybe():
            cls.forward = [*call, *self.step(cls, "more")]
        else:
            cls.steps = []
            cls.forward = [*self.step(cls, "more"), *call]
            cls.steps += base.steps
        return self.finish(cls)

    # Where blocks are called.

    def some_block(self, projects: bool = False, trunk: bool = True) -> _Class:
        """A class that exists already, or a new one; in a long step's branch one without projections.

        Alone in another step's branch a projection is no step, as the sum of a LoRA layer is none.
        """
        known = [block for block in self.blocks if block.projects or not projects]
        if not trunk:
            known = [block for block in known if all(step.kind != "projection" for step in block.steps)]
        while not known or (len(self.blocks) < 3 and self.maybe()):
            self.blocks.append(self.block(projects))
            if trunk or all(step.kind != "projection" for step in self.blocks[-1].steps):
                return self.blocks[-1]
        return self.choose(*known)

    def build(self, block: _Class, width: int, out: int | None = None) -> str:
        return f"{block.name}({width}, {out or width}, {self.choose('0.0', '0.1', '0.3')})"

    def call(self, cls: _Class, block: _Class, path: str, width: int) -> str:
        """A call of the block `path` on x; some want a position embedding, which layers of one width share."""
        if "pos" not in block.arguments:
            return f"{path}({self.choose('x', 'x=x')})"
        parameter = f"self.pos{width} = nn.Parameter(torch.zeros({self.full_shape(str(width))}))"
        if parameter not in cls.init:
            cls.init.append(parameter)
        return f"{path}(x, {self.choose('', 'pos=')}self.pos{width})"

    def site(self, cls: _Class, name: str, width: int, trunk: bool = True) -> int:
        """Statements of `cls` that take x on, and x's new width; outside the trunk the width stays."""
        excluded = [] if trunk else ["inline", "projection", "fusion", "hyper-connections"]
        excluded += ["decoder", "hyper-connections"] if not self.tokens else []
        choice = self.pick(SITES, *excluded, *([] if self.stream == "conv2d" else ["fusion"]))
        path, w, out = f"self.{name}", str(width), 12 - width
        match choice:
            case "wrapped":
                self.wrapped(cls, name, w, 1 + self.below(2))
                return width
            case "inline":
                part = _Class(cls.name, factors=cls.factors, functions=cls.functions)
                cls.forward += self.step(part, name, self.pick(SHORTCUTS[:-2]))
                cls.init += [re.sub(r"\bdim\b", w, line).replace("drop)", "0.1)") for line in part.init]
                cls.methods += part.methods
                cls.steps += part.steps
                return width
            case "long":
                stage = self.stage(width, nested=trunk)
                cls.init.append(f"{path} = {stage.name}()")
                cls.forward.append(f"x = {path}(x)")
                cls.steps += [step.inside(name) for step in stage.steps]
                return width
            case "siblings":
                for branch in "ab":
                    maps = f"{self.linear(w, w)}, nn.SiLU(), {self.linear(w, w)}"
                    cls.init.append(f"{path}_{branch} = nn.Sequential({maps})")
                cls.forward.append(f"x = {path}_a(x) + {path}_b(x)")
                return width
            case "plain":
                cls.init.append(f"{path} = {self.linear(w, w)}")
                cls.forward.append(f"x = F.gelu({path}(x))")
                return width
            case "gated":
                mixed = self.precision == "autocast"  # where only the arithmetic takes two dtypes
                spelling = self.pick(GATED, *(["lerp", "addcmul by a gate", "in place by a gate"] if mixed else []))
                self.helper("by_difference")
                self.helper("scripted_mix")
                layers = f"{self.linear(w, w)}, {self.linear(w, w)}"
                cls.init.append(f"{path} = {self.helper('Gated')}({layers}, {spelling!r})")
                cls.forward.append(f"x = {path}(x)")
                cls.steps.append(_Local(name, "h0", "gated"))
                return width
            case "decoder":
                n = 1 + self.below(2)
                cls.init.append(f"{path} = {self.helper('Decoder')}({w}, {n})")
                cls.forward.append(f"x = {path}(x)")
                cls.steps += [_Local(f"{name}.layers.{i}", f"h{j}", "identity") for i in range(n) for j in range(2)]
                return width
            case "hyper-connections":
                layers = [f"nn.Sequential({self.norm(w)}, {self.linear(w, w)}, nn.GELU())" for _ in range(2)]
                layers = [f"{self.helper('Hyper')}({layer}, {w}, {self.maybe()})" for layer in layers]
                cls.init.append(f"{path} = nn.Sequential({', '.join(layers)})")
                cls.forward.append(f"x = {path}(torch.stack([x] * 3, 1)){self.choose('.sum(1)', '.mean(1)', '[:, 0]')}")
                cls.steps += [_Local(f"{name}.{i}", "h0", "projection") for i in range(2)]
                return width
        block = self.some_block(choice in ("projection", "fusion"), trunk)
        call = self.call(cls, block, path, width)
        match choice:
            case "projection" | "fusion":
                cls.init.append(f"{path} = {self.build(block, width, out)}")
                cls.steps += [step.inside(name, projects=True) for step in block.steps]
                if choice == "projection":
                    cls.forward.append(f"x = {call}")
                    return out
                cls.init += [f"{path}_{i} = {self.conv}({c}, {w}, 1)" for i, c in enumerate((width, out))]
                up = f"F.interpolate({path}_1({call}), size=x.shape[2:])"
                cls.forward.append(f"x = {path}_0(x) + {up}")
            case "registered twice":
                cls.init += [f"shared = {self.build(block, width)}", f"{path} = nn.ModuleList([shared, shared])"]
                cls.forward += [f"for block in {path}:", f"    x = {call.replace(path, 'block', 1)}"]
                cls.steps += [step.inside(f"{name}.0", calls=2) for step in block.steps]
            case "ModuleList":
                n = 1 + self.below(3)
                cls.init.append(f"{path} = nn.ModuleList([{', '.join(self.build(block, width) for _ in range(n))}])")
                cls.forward += [f"for block in {path}:", f"    x = {call.replace(path, 'block', 1)}"]
                cls.steps += [step.inside(f"{name}.{i}") for i in range(n) for step in block.steps]
            case "Sequential":
                blocks = [block, *(self.some_block(trunk=trunk) for _ in range(self.below(3)))]
                cls.init.append(f"{path} = nn.Sequential({', '.join(self.build(block, width) for block in blocks)})")
                if any("pos" in block.arguments for block in blocks):
                    calls = [self.call(cls, block, f"{path}[{i}]", width) for i, block in enumerate(blocks)]
                    cls.forward += [f"x = {call}" for call in calls]
                else:
                    cls.forward.append(f"x = {path}(x)")
                cls.steps += [step.inside(f"{name}.{i}") for i, block in enumerate(blocks) for step in block.steps]
            case "called again":
                n = 2 + self.below(2)
                cls.init.append(f"{path} = {self.build(block, width)}")
                cls.forward += [f"for _ in range({n}):", f"    x = {call}"]
                cls.steps += [step.inside(name, calls=n) for step in block.steps]
            case "checkpoint":
                again = call.replace(f"{path}(", f"checkpoint({path}, ").replace("x=x", "x").replace("pos=", "")
                cls.init.append(f"{path} = {self.build(block, width)}")
                reentrant = f"use_reentrant={self.maybe()}"
                cls.forward.append(f"x = {again[:-1]}, {reentrant}) if self.training else {call}")
                cls.steps += [step.inside(name) for step in block.steps]
            case _:
                cls.init.append(f"{path} = {self.build(block, width)}")
                cls.forward.append(f"x = {call}")
                cls.steps += [step.inside(name) for step in block.steps]
        return width

    def wrapped(self, cls: _Class, name: str, width: str, n: int) -> None:
        """Steps that a module of their own makes of any function, one after the other."""
        bodies = [f"nn.Sequential({self.norm(width)}, {self.linear(width, width)}, nn.Tanh())" for _ in range(n)]
        cls.init.append(f"self.{name} = nn.Sequential({', '.join(f'Residual({body})' for body in bodies)})")
        cls.forward.append(f"x = self.{name}(x)")
        cls.steps += [_Local(f"{name}.{i}", "h0", "identity") for i in range(n)]
        self.helper("Residual")

    def stage(self, width: int, nested: bool) -> _Class:
        """A long skip around blocks that keep the width; the first of them, a stream, begin at the skip itself."""
        cls = self.new_class("Stage", signature="")
        cls.forward.append("start = x")
        self.wrapped(cls, "first", str(width), 2 + self.below(2))
        for i in range(self.below(2)):
            self.site(cls, f"v{i}", width, trunk=False)
        tail = self.maybe()
        if tail:
            cls.init.append(f"self.tail = {self.linear(str(width), str(width))}")
            cls.forward.append("x = self.tail(x)")
        cls.steps = [step if step.parent is not None else replace(step, parent="") for step in cls.steps]
        h = cls.factor("long")
        if tail and self.maybe():
            cls.forward += [f"<<x.mul_(self.{h}); >>x += start  # step"]
        else:
            cls.forward += [f"x = start + <<self.{h} * >>x  # step"]
        return self.finish(cls)

    def stem(self, cls: _Class, width: int) -> tuple[int, ...]:
        """The first statements of the network, and the input's shape."""
        w = str(width)
        choice = self.pick(STEMS, *([] if self.tokens else ["class token", "queries"]))
        cls.init.append(f"self.stem = {self.linear('3', w)}")
        cls.forward.append("x = self.stem(x)")
        tokens = 4
        match choice:
            case "position embedding":
                cls.init.append(f"self.position = nn.Parameter(torch.zeros({self.full_shape(w)}))")
                cls.forward.append("x = x + self.position.expand_as(x)")
            case "class token":
                tokens = 3
                cls.init.append(f"self.token = nn.Parameter(torch.zeros(1, 1, {w}))")
                cls.forward.append("x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)")
            case "queries":
                cls.init += [
                    f"self.queries = nn.Parameter(torch.zeros(1, TOKENS, {w}))",
                    f"self.cross = nn.MultiheadAttention({w}, 2, batch_first=True)",
                ]
                h = cls.factor("identity")
                cls.forward += [
                    "memory, x = x, self.queries.expand(x.shape[0], -1, -1)",
                    f"x = x + <<self.{h} * >>self.cross(x, memory, memory)[0]  # step",
                ]
        return {"tokens": (2, tokens, 3), "conv1d": (2, 3, 8), "conv2d": (2, 3, 6, 6)}[self.stream]

    def network(self) -> RandomNetwork:
        cls = _Class("Network", signature="")
        width = self.choose(4, 8)
        shape = self.stem(cls, width)
        for i in range(1 + self.below(3)):
            width = self.site(cls, f"u{i}", width)
        if self.maybe():
            cls.init.append(f"self.head = nn.Linear({width}, 3)")
            cls.forward.append(f"x = self.head(x.mean({1 if self.tokens else tuple(range(2, 2 + self.space))}))")
        self.finish(cls)
        template = "\n\n\n".join([HEADER.strip(), *self.helpers.values(), *self.functions, *self.classes]) + "\n"
        return RandomNetwork(
            source=_render(template, twin=False),
            twin=_render(template, twin=True),
            steps=_named(cls.steps),
            shape=shape,
            dtype=torch.float64 if self.precision == "float64" else torch.float32,
            autocast=self.precision == "autocast",
            exact=self.precision in ("float64", "float32"),
            features=frozenset(self.features),
        )


def _render(template: str, twin: bool) -> str:
    """The template as the network or as its twin; lines of which nothing is left go."""
    lines = []
    for line in template.splitlines():
        text = re.sub("<<(.*?)>>", r"\1" if twin else "", line).rstrip()
        if text or not line.strip():
            lines.append(text)
    return "\n".join(lines) + "\n"


def _named(steps: list[_Local]) -> tuple[KnownStep, ...]:
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


def random_networks() -> st.SearchStrategy[RandomNetwork]:
    """Networks of one to three sites with up to three classes of blocks; they shrink towards a single plain block.

    The choices are taken from bytes: of integers and of elements Hypothesis draws the first ones far more often.
    """
    return st.binary(min_size=512, max_size=512).map(lambda choices: _Writer(choices).network())


# -- From source to modules -------------------------------------------------------------------------------------------

_modules = count()


@contextmanager
def imported(source: str, folder: Path) -> Iterator[ModuleType]:
    """The source as a module, imported from a file in `folder` under a name of its own, and gone afterwards."""
    name = f"random_network_{next(_modules)}"
    file = folder / f"{name}.py"
    file.write_text(source)
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        del sys.modules[name]
        linecache.cache.pop(str(file), None)
        file.unlink()


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random values in place of all parameters and running statistics: many start at 0 or 1 and would hide an error."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.5 if parameter.ndim < 2 else parameter[0].numel() ** -0.5
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))
            elif name.endswith("running_var"):
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))
    return model


def random_input(network: RandomNetwork, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(network.shape, generator=generator, dtype=torch.float64).to(network.dtype)


def set_factors(twin: nn.Module, factors: dict[KnownStep, float]) -> None:
    """Each of the twin's written-out step factors."""
    for step, factor in factors.items():
        setattr(twin.get_submodule("" if step.module == ROOT else step.module), step.attribute, factor)
