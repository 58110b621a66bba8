"""h from depth: the rules of the literature. h over training time: `HScheduler`.

A rule is a function of a `Step`: `eulernet.patch(model, h=eulernet.schedules.inverse())`. D is the depth of the step's
residual stream, the number of its additions: 54 in a ResNet-110 for CIFAR, 24 in a ViT of 12 blocks, each of which adds
twice. Where a source counts L blocks of two additions, D = 2 L, and the rules say what that makes of their constant.

With the rules stands what they mean for the learning rate. To first order, an optimiser's step changes what the network
computes by an amount that grows as lr * sum(h^2) under SGD and as lr * sum(h) under Adam, the sums over the D steps: h
scales each branch, and under SGD the branch's gradient as well. "The learning rate goes as ..." says what keeps this
amount the same at all depths.
"""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import nn

from eulernet._doubts import rounded_away
from eulernet._errors import EulernetError, EulernetWarning
from eulernet._factor import LearnedFactor
from eulernet._patch import bound
from eulernet._report import Step
from eulernet._select import HLike, positive, values

__all__ = ["HScheduler", "constant", "decreasing", "inverse", "inverse_sqrt"]


# ---- from depth: objects that are called like functions, and named like them


@dataclass(frozen=True)
class constant:
    """h for every step, at any depth.

    The paper's main experiments have h = 0.1 (Zhang et al., IJCAI 2019, Section 4). Other networks with a constant:
    Inception-ResNet 0.1 to 0.2, EDSR 0.1, NFNet 0.2, Granite 0.22.

    The learning rate goes as 1 / D, under SGD and under Adam, as in a network with h = 1; for another h, as 1 / h^2
    under SGD and 1 / h under Adam.

    Args:
        h: the step factor, positive.

    Raises:
        EulernetError: h is not a positive, finite number.

    Example:
        >>> import torch, eulernet
        >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> first, second = eulernet.find_steps(layer, example_inputs=torch.zeros(2, 5, 8))
        >>> rule = constant(0.1)
        >>> rule, rule(first), rule(second)
        (constant(h=0.1), 0.1, 0.1)
    """

    h: float

    def __post_init__(self) -> None:
        positive(self.h, "h", "constant(0.1)")

    def __call__(self, step: Step) -> float:
        return float(self.h)


@dataclass(frozen=True)
class inverse_sqrt:
    """c / sqrt(D). With c = 1 it is what h="auto" means.

    It keeps the variance of the stream bounded as D grows: tau-ResNet (arXiv:1903.07120), Stable ResNet with uniform
    scaling (arXiv:2010.12859), Depth-muP (arXiv:2310.02244); for weights that are initialised independently, any other
    power of D ends in an explosion or in the identity (Marion et al., arXiv:2206.06929). Beside the optima that the
    paper found by grid search (Zhang et al., IJCAI 2019, Fig. 6):

        D                  8      9           24     54         108
        1 / sqrt(D)        0.354  0.333       0.204  0.136      0.096
        best in the paper  0.5    0.1 to 2    0.3    near 0.1   near 0.1

    Where a source counts L blocks of two additions, its 1 / sqrt(L) is `inverse_sqrt(c=2**0.5)`.

    The learning rate is the same at all depths under SGD, and goes as 1 / sqrt(D) under Adam.

    Args:
        c: a positive number.

    Raises:
        EulernetError: c is not a positive, finite number.

    Example:
        >>> import torch, eulernet
        >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> model = torch.nn.TransformerEncoder(layer, 8)
        >>> steps = eulernet.find_steps(model, example_inputs=torch.zeros(2, 5, 8))
        >>> rule = inverse_sqrt()
        >>> rule, steps[0].depth, rule(steps[0])
        (inverse_sqrt(c=1), 16, 0.25)
    """

    c: float = 1

    def __post_init__(self) -> None:
        positive(self.c, "c", "inverse_sqrt(c=1)")

    def __call__(self, step: Step) -> float:
        return self.c / math.sqrt(step.depth)


@dataclass(frozen=True)
class inverse:
    """c / D.

    With it the bounds of Propositions 1 and 2 (Zhang et al., IJCAI 2019) do not depend on the depth: in the spectral
    norm gradients grow by at most (1 + c W / D)^D < exp(c W), and noise by at most h D W = c W. CompleteP
    (arXiv:2505.01618) has it for transformers, Marion et al. (arXiv:2206.06929) for weights that change smoothly from
    layer to layer. It is smaller than the optima of the paper's grid search in deep networks (0.009 against 0.1 at
    D = 108).

    Where a source counts L blocks of two additions, its 1 / L is `inverse(c=2)`.

    The learning rate goes as D under SGD, and is the same at all depths under Adam.

    Args:
        c: a positive number.

    Raises:
        EulernetError: c is not a positive, finite number.

    Example:
        >>> import torch, eulernet
        >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> model = torch.nn.TransformerEncoder(layer, 8)
        >>> steps = eulernet.find_steps(model, example_inputs=torch.zeros(2, 5, 8))
        >>> rule = inverse(c=2)
        >>> rule, steps[0].depth, rule(steps[0])
        (inverse(c=2), 16, 0.125)
    """

    c: float = 1

    def __post_init__(self) -> None:
        positive(self.c, "c", "inverse(c=1)")

    def __call__(self, step: Step) -> float:
        return self.c / step.depth


@dataclass(frozen=True)
class decreasing:
    """1 / (sqrt(l) * log(l + 1)), where l is the step's position in its stream, from 1, and log the natural logarithm.

    Stable ResNet with decreasing scaling (arXiv:2010.12859): sum(h^2) stays finite however deep the network is, so that
    a step's h does not depend on how many follow. The first step gets 1 / log(2) = 1.44, more than 1: so the formula
    says, and it is not capped here. A module that is called several times has the h of its first call.

    The learning rate is the same at all depths under SGD, and goes as log(D) / sqrt(D) under Adam.

    Example:
        >>> import torch, eulernet
        >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> rule = decreasing()
        >>> steps = eulernet.find_steps(layer, example_inputs=torch.zeros(2, 5, 8))
        >>> rule, [(step.position, round(rule(step), 3)) for step in steps]
        (decreasing(), [(1, 1.443), (2, 0.644)])
    """

    def __call__(self, step: Step) -> float:
        return 1 / (math.sqrt(step.position) * math.log(step.position + 1))


# ---- over training time

Kind = Literal["linear", "cosine", "exponential"]

# The value on the way from a (t = 0) to b (t = 1); where a = b it is that number, unrounded.
_CURVES: dict[str, Callable[[float, float, float], float]] = {
    "linear": lambda a, b, t: a + (b - a) * t,
    "cosine": lambda a, b, t: a + (b - a) * (1 - math.cos(math.pi * t)) / 2,
    "exponential": lambda a, b, t: a * (b / a) ** t,
}


class HScheduler:
    """h over training time, used like a scheduler of `torch.optim.lr_scheduler`.

    From h = 1, where the network is the original, to a small h, or from a small h up. Each step of the model goes from
    its value in `start` to its value in `end` in `total_steps` calls of `step`, and stays there. `torch.compile`
    compiles nothing again.

    Args:
        model: a patched model, also inside `torch.compile`, `DistributedDataParallel` or `DataParallel`. Its h is
            `start` from now on.
        start, end: step factors, each given as for `eulernet.patch`: a number, "auto", a rule, a list, a mapping.
        total_steps: how many calls of `step` lead from `start` to `end`, at least 1.
        kind: "linear", "cosine" (half a period, slow at both ends) or "exponential" (the same ratio at each call).

    Raises:
        EulernetError: the model is not patched, its h is learned, or an argument is wrong; then nothing is changed.

    Warns:
        EulernetWarning: `start` or `end` is lost to rounding in half precision.

    Example:
        >>> import torch, eulernet
        >>> model = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> model = eulernet.patch(model, example_inputs=torch.zeros(2, 5, 8))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> schedule = eulernet.HScheduler(model, start=1.0, end=0.5, total_steps=2)
        >>> for _ in range(4):
        ...     model(torch.ones(2, 5, 8)).square().sum().backward()
        ...     optimizer.step()
        ...     schedule.step()
        ...     print(schedule.get_last_h())
        [0.75, 0.75]
        [0.5, 0.5]
        [0.5, 0.5]
        [0.5, 0.5]
    """

    def __init__(
        self, model: nn.Module, start: HLike = 1.0, end: HLike = 0.1, *, total_steps: int, kind: Kind = "linear"
    ) -> None:
        self.total_steps = _count(total_steps, "total_steps", 1)
        self.kind = _kind(kind)
        held = bound(model, "HScheduler")
        if any(isinstance(factor, LearnedFactor) for _, _, factor in held):
            raise EulernetError(
                f"the h of this {type(model).__name__} is learned (it was patched with trainable=), and the optimiser "
                "moves it. To have a schedule instead: eulernet.HScheduler(eulernet.patch(model, h=0.1), ...)"
            )
        self._steps = [step for _, step, _ in held]
        self._factors = [factor for _, _, factor in held]
        self._modules = list(dict.fromkeys(module for module, _, _ in held))
        self._held = self._factors_of_modules()
        self.start = self._endpoint(start, "start")
        self.end = self._endpoint(end, "end")
        least = map(min, self.start, self.end)
        for doubt in rounded_away(model, [(module, h) for (module, _, _), h in zip(held, least, strict=True)]):
            warnings.warn(doubt, EulernetWarning, stacklevel=2)
        self.last_step = 0
        self._set()

    def step(self) -> None:
        """Go on to the next h; call it after each step of the optimiser, or once an epoch.

        Raises:
            EulernetError: the model was patched again or unpatched in the meantime.
        """
        self._check_current()
        self.last_step += 1
        self._set()

    def get_last_h(self) -> list[float]:
        """The h of each step, in the order of `eulernet.steps(model)`."""
        if self.last_step >= self.total_steps:
            return list(self.end)
        curve, t = _CURVES[self.kind], self.last_step / self.total_steps
        return [curve(a, b, t) for a, b in zip(self.start, self.end, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        """Where the schedule is and where it goes, as numbers, strings and lists of these."""
        return {
            "last_step": self.last_step,
            "total_steps": self.total_steps,
            "kind": self.kind,
            "start": list(self.start),
            "end": list(self.end),
            "steps": self._names(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where another schedule was, and give the model the h that it had there.

        As in torch, what the constructor was given is replaced by what was saved.

        Raises:
            EulernetError: the state is not one that `state_dict` returns, or is that of a model with other steps; then
                nothing is changed.
        """
        self._check_current()
        missing = sorted(set(self.state_dict()) - set(state_dict))
        if missing:
            raise EulernetError(f"this is no state of an HScheduler: it has no {', '.join(missing)}")
        if list(state_dict["steps"]) != self._names():
            theirs, ours = set(state_dict["steps"]), set(self._names())
            differing = sorted(theirs ^ ours) or ["their order"]
            raise EulernetError(
                f"the state is that of a model with {len(theirs)} steps, this one has {len(ours)}; they differ in "
                f"{', '.join(differing[:8])}. Patch this model as the other one was (include=, exclude=)."
            )
        last_step = _count(state_dict["last_step"], "last_step", 0)
        total_steps = _count(state_dict["total_steps"], "total_steps", 1)
        kind = _kind(state_dict["kind"])
        start = self._endpoint(state_dict["start"], "start")
        end = self._endpoint(state_dict["end"], "end")
        self.last_step, self.total_steps, self.kind, self.start, self.end = last_step, total_steps, kind, start, end
        self._set()

    def __repr__(self) -> str:
        return f"HScheduler(kind={self.kind!r}, last_step={self.last_step}, total_steps={self.total_steps})"

    def _set(self) -> None:
        for factor, h in zip(self._factors, self.get_last_h(), strict=True):
            if factor.value != h:
                factor.set(h)

    def _endpoint(self, h: Any, name: str) -> list[float]:
        try:
            return values(h, self._steps)
        except EulernetError as error:
            raise EulernetError(f"HScheduler, {name}: {error}") from None

    def _names(self) -> list[str]:
        return [step.name for step in self._steps]

    def _factors_of_modules(self) -> list[object]:
        return [factor for module in self._modules for factor in module.__dict__.get("_euler", ())]

    def _check_current(self) -> None:
        if self._factors_of_modules() != self._held:
            raise EulernetError(
                "the model was patched again or unpatched since this HScheduler was made, which does not reach its "
                "steps any more. Make another: schedule = eulernet.HScheduler(model, ...); "
                "schedule.load_state_dict(old.state_dict())"
            )


def _count(value: Any, name: str, least: int) -> int:
    try:
        number = -1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = -1
    if number < least:
        raise EulernetError(
            f"HScheduler: {name} must be a whole number, at least {least}, not {value!r}; for example the steps of the "
            "optimiser in all epochs: total_steps=epochs * len(loader)"
        )
    return number


def _kind(value: Any) -> Kind:
    kinds: Sequence[Kind] = get_args(Kind)
    for kind in kinds:
        if isinstance(value, str) and value == kind:
            return kind
    raise EulernetError(f"HScheduler: kind must be one of {', '.join(map(repr, kinds))}, not {value!r}")
