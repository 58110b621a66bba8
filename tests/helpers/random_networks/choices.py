"""What a network may be put together from, and how each choice is drawn."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

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
    *("long", "projection", "siblings", "fusion", "plain", "gated", "decoder", "hyper-connections", "conditioned"),
    "several states",
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
FUSED = ("addcmul", "index_add", "lerp by a number")  # of one dtype
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


class Choices:
    """Draws the choices from bytes, and keeps those that count as features.

    The writers of layers, additions, blocks and networks build on it, each on the one before.
    """

    def __init__(self, choices: bytes) -> None:
        self.choices = iter(choices)
        self.features: set[str] = set()
        self.stream = self.pick(STREAMS)
        self.precision = self.pick(PRECISIONS)
        self.tokens = self.stream == "tokens"
        self.space = {"tokens": 1, "conv1d": 1, "conv2d": 2}[self.stream]

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
