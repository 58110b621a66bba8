"""Residual layers for models of one's own: their sum is a step from the start.

Each is a plain module, whose `forward` has one addition, and which rewrites it when it is made, as `patch` would. So
`steps`, `set_h`, `HScheduler`, `calibrate`, `diagnose`, `watch`, `fold`, `unpatch` and the kernels see patched steps,
and `eulernet.patch` takes these layers like those of any library.
"""

from __future__ import annotations

import copy
from functools import cache
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from eulernet._checks import brief, positive
from eulernet._errors import EulernetError
from eulernet._find.locate import sole_addition
from eulernet._patch.subclass import patched_class
from eulernet._run.factor import StepFactor, UnsettledFactor
from eulernet._run.patched import FACTORS, STEP, STEPS
from eulernet._step import ROOT, Place, Step

__all__ = ["EulerStep", "Recurrent", "Residual"]

H = float | Literal["auto"]
State = Any  # of a recurrent cell: a tensor, or a tuple of them


class EulerStep(nn.Module):
    """`x + h * f`: an addition as a module, `x = self.step(x, f)`.

    Eq. (3) of *Towards Robust ResNet* (Zhang et al., IJCAI 2019). `x` and `f` are tensors of one shape, or of shapes
    that broadcast; the result is what `x + f` would be, in shape and dtype. With h = 1 it is `x + f`, bit for bit.

    Args:
        h: the step factor, a positive number; or "auto", 1 / sqrt(D), which `eulernet.patch(model, h="auto")` settles
            for all such layers of a model at once.

    Raises:
        EulernetError: h is neither. When it runs: h is "auto" and was not settled.

    Example:
        >>> import torch
        >>> from eulernet.nn import EulerStep
        >>> EulerStep(h=0.5)(torch.ones(2), torch.ones(2))
        tensor([1.5000, 1.5000])
    """

    def __init__(self, h: H = 0.1) -> None:
        super().__init__()
        _begin(self, EulerStep.forward, h)

    def forward(self, x: Tensor, f: Tensor) -> Tensor:
        return x + f


class Residual(nn.Module):
    """`activation(shortcut(x) + h * drop_path(layer_scale * branch(x)))`: a residual block around a branch.

    With h = 1 it is this block without h, bit for bit. On a GPU what stands around the sum is done with it, in one
    kernel. Further arguments of a call go to the branch.

    Args:
        branch: any module, whose result has the shape of the shortcut's.
        h: as for `EulerStep`.
        shortcut: a module; None for `x` itself; "auto" for `x` itself where the branch keeps the shape, else a
            projection: a linear map, or a convolution of size 1 with the branch's stride, with a batch norm where the
            branch has one (option B of He et al., arXiv:1512.03385). The shapes are tried on a copy of the branch on
            the meta device.
        activation: a module that is applied to the sum.
        drop_path: the probability, from 0 up to and without 1, that a sample's branch is left out in training, the
            others being divided by the rest of it (stochastic depth, arXiv:1603.09382, scaled as in timm).
        layer_scale: what a learned factor for each channel begins with (LayerScale, arXiv:2103.17239), for example
            1e-5, where the channels are tried as for the shortcut; or a tensor that begins it.

    Raises:
        EulernetError: an argument is wrong, or the shapes cannot be tried. When it runs: h is "auto", not settled.

    Example:
        >>> import torch
        >>> from eulernet.nn import Residual
        >>> branch = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, stride=2, padding=1), torch.nn.BatchNorm2d(8))
        >>> block = Residual(branch, h=0.1, shortcut="auto", activation=torch.nn.ReLU())
        >>> block(torch.zeros(2, 3, 32, 32)).shape, block.shortcut[0]
        (torch.Size([2, 8, 16, 16]), Conv2d(3, 8, kernel_size=(1, 1), stride=(2, 2), bias=False))
    """

    def __init__(
        self,
        branch: nn.Module,
        h: H = 0.1,
        shortcut: nn.Module | Literal["auto"] | None = None,
        activation: nn.Module | None = None,
        drop_path: float = 0.0,
        layer_scale: float | Tensor | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(branch, nn.Module):
            raise EulernetError(
                f"Residual: branch must be a module, not {type(branch).__name__}; for example "
                "Residual(nn.Linear(8, 8)). Around a function: x = EulerStep(h)(x, function(x))"
            )
        auto = isinstance(shortcut, str) and shortcut == "auto"
        if not (shortcut is None or isinstance(shortcut, nn.Module) or auto):
            raise EulernetError(f'Residual: shortcut={brief(shortcut)} must be a module, None or "auto"')
        if not (activation is None or isinstance(activation, nn.Module)):
            raise EulernetError(f"Residual: activation={brief(activation)} must be a module; for example nn.ReLU()")
        if isinstance(drop_path, bool) or not (isinstance(drop_path, int | float) and 0 <= drop_path < 1):
            raise EulernetError(f"Residual: drop_path={brief(drop_path)} must be a number from 0 up to, and without, 1")
        self.branch = branch
        self.shortcut = _projection(branch) if isinstance(shortcut, str) else shortcut
        self.layer_scale = nn.Identity() if layer_scale is None else LayerScale(_gamma(branch, layer_scale))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.activation = nn.Identity() if activation is None else activation
        _begin(self, Residual.forward, h)

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        skip = x if self.shortcut is None else self.shortcut(x)
        branch = self.branch(x, *args, **kwargs)
        return self.activation(skip + self.drop_path(self.layer_scale(branch)))


class Recurrent(nn.Module):
    """`state + h * (cell(x, state) - state)`: a recurrent cell that goes h of the way to its new state.

    The Euler step of size h of d state / dt = cell(x, state) - state, as in leaky units (Jaeger et al., 2007) and,
    for a map of its own, AntisymmetricRNN (arXiv:1902.09689). With h = 1 it is the cell, bit for bit.

    Called with one input it is a cell: `(x, state) -> state`, the state as the cell has it, a tensor or a tuple of
    tensors, each of which is moved. Called with a sequence it is a layer: `(xs, state) -> (outputs, state)`, with the
    outputs, the first tensor of each state, stacked as the inputs are, and the last state.

    Args:
        cell: `nn.GRUCell`, `nn.LSTMCell`, `nn.RNNCell`, or any module with `cell(x, state) -> state`. Where no state is
            passed the first one is zero; a cell of one's own says by `hidden_size` how wide that is.
        h: as for `EulerStep`.
        sequence: whether inputs are sequences; None: those of three dimensions, as in torch, are.
        batch_first: the dimension of time in a sequence is the second, not the first.

    Raises:
        EulernetError: an argument is wrong. When it runs: h is "auto" and was not settled; no state is passed, and the
            cell does not say how wide it is.

    Example:
        >>> import torch
        >>> from eulernet.nn import Recurrent
        >>> layer = Recurrent(torch.nn.GRUCell(4, 8), h=0.1)
        >>> outputs, state = layer(torch.zeros(20, 2, 4))  # 20 steps, 2 sequences
        >>> outputs.shape, state.shape, layer(torch.zeros(2, 4), state).shape
        (torch.Size([20, 2, 8]), torch.Size([2, 8]), torch.Size([2, 8]))
    """

    def __init__(self, cell: nn.Module, h: H = 0.1, *, sequence: bool | None = None, batch_first: bool = False) -> None:
        super().__init__()
        if not isinstance(cell, nn.Module):
            raise EulernetError(f"Recurrent: cell must be a module, not {type(cell).__name__}; for example nn.GRUCell")
        if isinstance(cell, nn.RNNBase):
            name = type(cell).__name__
            raise EulernetError(
                f"Recurrent takes a cell, and nn.{name} is a whole layer, whose steps cannot be reached; use "
                f"Recurrent(nn.{name}Cell({cell.input_size}, {cell.hidden_size}))"
            )
        self.cell = cell
        self.sequence, self.batch_first = sequence, batch_first
        _begin(self, Recurrent._move, h)

    def forward(self, x: Tensor, state: State = None) -> Any:
        if not (x.dim() == 3 if self.sequence is None else self.sequence):
            return self._next(x, state)
        time = 1 if self.batch_first and x.dim() > 2 else 0
        outputs = []
        for input_ in x.unbind(time):
            state = self._next(input_, state)
            outputs.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(outputs, time), state

    def _next(self, x: Tensor, state: State) -> State:
        state = self._zeros(x) if state is None else state
        new = self.cell(x, state)
        if isinstance(new, tuple):
            return tuple(self._move(s, n) for s, n in zip(state, new, strict=True))
        return self._move(state, new)

    def _zeros(self, x: Tensor) -> State:
        """The state before the first input, as torch's cells have it."""
        width = getattr(self.cell, "hidden_size", None)
        if not isinstance(width, int):
            name = type(self.cell).__name__
            raise EulernetError(
                f"Recurrent: {name} has no hidden_size, which would say what state to begin with; pass the state: "
                "layer(xs, torch.zeros(2, 8))"
            )
        zeros = torch.zeros(*x.shape[:-1], width, dtype=x.dtype, device=x.device)
        return (zeros, zeros) if isinstance(self.cell, nn.LSTMCell) else zeros

    def _move(self, state: Tensor, new: Tensor) -> Tensor:
        if self._is_the_cell():
            return new
        return state + (new - state)

    def _is_the_cell(self) -> bool:
        """Whether h is 1, and nobody stands at the step to see it: the sum would round the new state."""
        factors = self.__dict__.get(FACTORS)
        h = factors[0].current(self) if factors and STEP not in self.__dict__ else None
        return isinstance(h, float) and h == 1.0

    def extra_repr(self) -> str:
        return "batch_first=True" if self.batch_first else ""


class LayerScale(nn.Module):
    """`x * lambda1`, a learned factor for each channel."""

    def __init__(self, gamma: Tensor) -> None:
        super().__init__()
        self.lambda1 = nn.Parameter(gamma.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.lambda1

    def extra_repr(self) -> str:
        return f"{self.lambda1.numel()}"


class DropPath(nn.Module):
    """In training, zero for some samples, and the others divided by the share of these."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        keep = 1 - self.drop_prob
        shape = (x.shape[0], *(1 for _ in x.shape[1:]))
        return x.div(keep) * torch.rand(shape, dtype=x.dtype, device=x.device).add_(keep).floor_()

    def extra_repr(self) -> str:
        return f"{self.drop_prob:g}"


# ---- a step from the start

# A module that has all that `forward` calls around a sum: whether it is fused is decided at each call.
_TEMPLATE = SimpleNamespace(layer_scale=None, drop_path=None, activation=nn.ReLU())


def _begin(layer: nn.Module, method: Any, h: H) -> None:
    """Make the addition of a method a step, as `patch` would."""
    auto = isinstance(h, str) and h == "auto"
    factor = UnsettledFactor() if auto else StepFactor(positive(h, f"{type(layer).__name__}: h", "h=0.1"))
    targets, place = _located(method)
    step = Step(0, ROOT, type(layer).__name__, "identity", (place,), calls=1, stream=0, depth=0, position=0)
    plan = ((targets, 0, True, False),)
    own = type(layer).__module__ == __name__
    layer.__dict__.update({FACTORS: [factor], STEPS: [step]})
    layer.__class__ = (_kept if own else patched_class)(type(layer), plan)  # type: ignore[arg-type]


_kept = cache(patched_class)  # a class of this module is made once, with all that stands around its addition


@cache
def _located(method: Any) -> Any:
    location = sole_addition(method, _TEMPLATE)
    line, end_line, column, end_column = location.position
    place = Place(location.file, line, column, location.function, "left", end_line, end_column)
    return location.targets, place


# ---- shapes that are not known yet


class _Tried(NamedTuple):
    given: torch.Size
    made: torch.Size
    spatial: bool  # the channels are the second dimension, and others follow them

    @property
    def channels(self) -> int:
        return self.made[1 if self.spatial else -1]


_WIDTHS = ("in_channels", "in_features", "num_features", "num_channels", "embed_dim", "normalized_shape")


def _tried(branch: nn.Module, argument: str, instead: str) -> _Tried:
    """The shapes of an input that a branch takes and of what it makes of it, on a copy without values."""
    widths = [(m, getattr(m, name)) for m in branch.modules() for name in _WIDTHS if hasattr(m, name)]
    for module, width in widths[:1]:
        width = width[-1] if isinstance(width, tuple) else width
        kernel = getattr(module, "kernel_size", None)
        digits = (
            [len(kernel)] if isinstance(kernel, tuple) else [d for d in (1, 2, 3) if f"{d}d" in type(module).__name__]
        )
        shapes = [(2, width, *[32] * d) for d in digits] if digits else [(2, width), (2, 32, width)]
        for shape in shapes:
            try:
                with torch.no_grad():
                    twin = copy.deepcopy(branch).to("meta").eval()
                    made = twin(torch.empty(shape, device="meta", dtype=_first(branch).dtype))
            except Exception:
                continue
            if isinstance(made, Tensor) and made.dim() == len(shape):
                return _Tried(torch.Size(shape), made.shape, bool(digits))
    raise EulernetError(
        f"Residual: the shapes that this {type(branch).__name__} takes and makes cannot be tried, so that {argument} "
        f"has none; pass {instead}"
    )


def _projection(branch: nn.Module) -> nn.Module | None:
    """What leads from the shape of the branch's input to that of its result; None where they are one."""
    given, made, spatial = tried = _tried(
        branch, 'shortcut="auto"', "the projection: shortcut=nn.Conv2d(8, 16, 1, stride=2)"
    )
    if given == made:
        return None
    like = _first(branch)
    options: Any = {"device": like.device, "dtype": like.dtype}
    if not spatial:
        return nn.Linear(given[-1], made[-1], **options)
    stride = tuple(-(-a // b) for a, b in zip(given[2:], made[2:], strict=True))
    if any(-(-a // s) != b for a, s, b in zip(given[2:], stride, made[2:], strict=True)):
        raise EulernetError(
            f"Residual: the branch makes {tuple(made)} of {tuple(given)}, which no stride of a convolution of size 1 "
            "does; pad the branch's convolutions, or pass shortcut="
        )
    d = len(stride)
    conv: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[d - 1]
    norm: Any = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[d - 1]
    normed = any(isinstance(module, norm) for module in branch.modules())
    projection: nn.Module = conv(given[1], tried.channels, 1, stride=stride, bias=not normed, **options)
    return nn.Sequential(projection, norm(tried.channels, **options)) if normed else projection


def _gamma(branch: nn.Module, layer_scale: float | Tensor) -> Tensor:
    if isinstance(layer_scale, Tensor):
        return layer_scale
    value = positive(layer_scale, "Residual: layer_scale", "layer_scale=1e-5")
    tried = _tried(branch, f"layer_scale={value:g}", "a tensor: layer_scale=torch.full((8,), 1e-5)")
    shape = (tried.channels, *(1 for _ in tried.made[2:])) if tried.spatial else (tried.channels,)
    like = _first(branch)
    if value > torch.finfo(like.dtype).max:
        raise EulernetError(f"Residual: layer_scale={value:g} is too large for {like.dtype}; for example 1e-5")
    return torch.full(shape, value, device=like.device, dtype=like.dtype)


def _first(branch: nn.Module) -> Tensor:
    return next((p for p in branch.parameters() if p.is_floating_point()), torch.empty(0))
