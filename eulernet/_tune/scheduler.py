"""h over training time."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import nn

from eulernet._checks import brief, each_of, whole_number
from eulernet._commit import Change, Set, commit
from eulernet._errors import EulernetError, EulernetWarning
from eulernet._patch.cautions import baked, rounded_away
from eulernet._patch.saved import read_steps
from eulernet._patch.select import HLike, values
from eulernet._run.factor import LearnedFactor
from eulernet._run.patched import FACTORS, bound

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
            `start` from now on. Or a list, `[model, average]`: a copy, such as the average of the weights
            (`torch.optim.swa_utils.AveragedModel`, `timm.utils.ModelEmaV3`), has an h of its own, and follows.
        start, end: step factors, each given as for `eulernet.patch`: a number, "auto", a rule, a list, a mapping.
        total_steps: how many calls of `step` lead from `start` to `end`, at least 1.
        kind: "linear", "cosine" (half a period, slow at both ends) or "exponential" (the same ratio at each call).

    Raises:
        EulernetError: the model is not patched, a copy has other steps, its h is learned, or an argument is wrong; then
            nothing is changed.

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

    last_step: int

    def __init__(
        self,
        model: nn.Module | Sequence[nn.Module],
        start: HLike = 1.0,
        end: HLike = 0.1,
        *,
        total_steps: int,
        kind: Literal["linear", "cosine", "exponential"] = "linear",
    ) -> None:
        self.total_steps = _count(total_steps, "total_steps", 1)
        self.kind = _kind(kind)
        self._model = each_of(model, "HScheduler")[0]
        each = [bound(one, "HScheduler") for one in each_of(model, "HScheduler")]
        held = [one for copy in each for one in copy]
        if any(isinstance(factor, LearnedFactor) for _, _, factor in held):
            raise EulernetError(
                f"the h of this {type(self._model).__name__} is learned (it was patched with trainable=), and the "
                "optimiser moves it. To have a schedule instead: eulernet.HScheduler(eulernet.patch(model, h=0.1), ...)"
            )
        self._steps = [step for _, step, _ in each[0]]
        self._copies = len(each)
        for number, copy in enumerate(each):
            if [step.name for _, step, _ in copy] != self._names():
                raise EulernetError(
                    f"HScheduler: model {number} of the list has {len(copy)} steps, the first one {len(self._steps)}, "
                    "or they have other names; copy the model once it is patched"
                )
        self._factors = [factor for _, _, factor in held]
        self._modules = list(dict.fromkeys(module for module, _, _ in held))
        self._held = self._factors_of_modules()
        self.start = self._endpoint(start, "start")
        self.end = self._endpoint(end, "end")
        least = map(min, self.start, self.end)
        for caution in rounded_away(
            self._model, [(module, h) for (module, _, _), h in zip(each[0], least, strict=True)]
        ):
            warnings.warn(caution, EulernetWarning, stacklevel=2)
        self._go({"last_step": 0}, *(Set(factor, {"scheduled": True}) for factor in self._factors))

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """It has none; Lightning looks for one."""
        raise AttributeError(
            "an HScheduler has no optimizer; for Lightning's configure_optimizers write "
            "eulernet.integrations.lightning.LightningHScheduler(schedule, optimizer)"
        )

    def step(self) -> None:
        """Go on to the next h; call it after each step of the optimiser, or once an epoch.

        Raises:
            EulernetError: the model was patched again or unpatched in the meantime.
        """
        self._check_current()
        self._go({"last_step": self.last_step + 1})

    def get_last_h(self) -> list[float]:
        """The h of each step, in the order of `eulernet.steps(model)`."""
        return _on_the_way(self.__dict__)

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
        advice = "load what another one gave: schedule.load_state_dict(other.state_dict())"
        if not isinstance(state_dict, Mapping):
            raise EulernetError(f"this is no state of an HScheduler, but {brief(state_dict)}; {advice}")
        missing = sorted(set(self.state_dict()) - set(state_dict))
        if missing:
            raise EulernetError(f"this is no state of an HScheduler: it has no {', '.join(missing)}; {advice}")
        names = state_dict["steps"]
        if not (isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)):
            raise EulernetError(f"this is no state of an HScheduler: its steps are {brief(names)}; {advice}")
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
        self._go({"last_step": last_step, "total_steps": total_steps, "kind": kind, "start": start, "end": end})

    def __repr__(self) -> str:
        return f"HScheduler(kind={self.kind!r}, last_step={self.last_step}, total_steps={self.total_steps})"

    def _go(self, state: dict[str, Any], *also: Change) -> None:
        """Be in another state, and give the model, and its copies, the h of it."""
        hs = _on_the_way(self.__dict__ | state) * self._copies
        moved = [(factor, h) for factor, h in zip(self._factors, hs, strict=True) if factor.value != h]
        if any(getattr(factor, "traced", False) for factor, _ in moved):
            for caution in baked(self._model, [factor for factor, _ in moved]):
                warnings.warn(caution, EulernetWarning, stacklevel=3)
        commit([*also, Set(self, state), *(change for factor, h in moved for change in factor.set(h))])

    def _endpoint(self, h: Any, name: str) -> list[float]:
        try:
            return values(read_steps(h, self._model), self._steps)
        except EulernetError as error:
            raise EulernetError(f"HScheduler, {name}: {error}") from None

    def _names(self) -> list[str]:
        return [step.name for step in self._steps]

    def _factors_of_modules(self) -> list[object]:
        return [factor for module in self._modules for factor in module.__dict__.get(FACTORS, ())]

    def _check_current(self) -> None:
        if self._factors_of_modules() != self._held:
            raise EulernetError(
                "the model was patched again or unpatched since this HScheduler was made, which does not reach its "
                "steps any more. Make another: schedule = eulernet.HScheduler(model, ...); "
                "schedule.load_state_dict(old.state_dict())"
            )


def _on_the_way(state: Mapping[str, Any]) -> list[float]:
    start, end = state["start"], state["end"]
    if state["last_step"] >= state["total_steps"]:
        return list(end)
    curve, t = _CURVES[state["kind"]], state["last_step"] / state["total_steps"]
    return [curve(a, b, t) for a, b in zip(start, end, strict=True)]


def _count(value: Any, name: str, least: int) -> int:
    example = "the steps of the optimiser in all epochs: total_steps=epochs * len(loader)"
    return whole_number(value, f"HScheduler: {name}", example, least)


def _kind(value: Any) -> Kind:
    kinds: Sequence[Kind] = get_args(Kind)
    for kind in kinds:
        if isinstance(value, str) and value == kind:
            return kind
    raise EulernetError(
        f'HScheduler: kind must be one of {", ".join(map(repr, kinds))}, not {brief(value)}; for example kind="cosine"'
    )
