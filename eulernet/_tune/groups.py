"""Groups of parameters for an optimiser, so that what was tuned at one depth can be used at another."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, overload

from torch import nn

from eulernet._errors import EulernetError
from eulernet._find.branches import branch_parameters
from eulernet._patch.patch import factors_now
from eulernet._patch.prove import search
from eulernet._run.factor import LearnedFactor
from eulernet._run.learned import step_parameters
from eulernet._run.patched import bound
from eulernet._step import Step
from eulernet.schedules import transfer

# Of what a branch holds, in a model m times deeper than the base: what rate, epsilon and decay are multiplied by. The
# rates keep lr * sum(h) under Adam, and lr * sum(h^2) under SGD, the sums over the steps, as at the base depth. The
# gradient of a branch's parameters goes as h = m^-alpha: so does what it is compared with, epsilon, and what is added
# to it, the decay of SGD and Adam. AdamW's decay is no part of the gradient.
#   CompleteP, arXiv:2505.01618, Table 1 and Eq. (40): AdamW; Depth-muP, arXiv:2310.02244: the rates at alpha = 1/2.
_Factors = Callable[[float, float], tuple[float, float, float]]
FACTORS: dict[str, _Factors] = {
    "adamw": lambda m, alpha: (m ** (alpha - 1), m**-alpha, 1.0),
    "adam": lambda m, alpha: (m ** (alpha - 1), m**-alpha, m**-alpha),
    "sgd": lambda m, alpha: (m ** (2 * alpha - 1), 1.0, m**-alpha),
}


def transfer_groups(
    model: nn.Module, lr: float, rule: transfer, optimizer: str, weight_decay: float, eps: float, example_inputs: Any
) -> list[dict[str, Any]]:
    """What `param_groups` returns where it is given a rule of transfer."""
    steps = _patched_by(model, rule)
    with search(model, example_inputs) as result:
        factors_now(model, result)  # refuses what was patched at other additions
        found = {f.step.index: f.step.name for f in result.found}
        holders = {parameter: found[index] for parameter, index in branch_parameters(result).items()}
    without = [s.name for s in steps.values() if rule.deeper(s) != 1 and s.name not in holders.values()]
    if without:
        raise EulernetError(
            f"{without[0]}{f' and {len(without) - 1} more steps' if len(without) > 1 else ' is a step that'} hold no "
            "parameters of their own: what several runs read, as the blocks of an ALBERT, the sources of "
            f"{rule!r} do not treat. Leave all at one rate: torch.optim.AdamW(model.parameters(), lr={lr:g})"
        )
    learned = list(step_parameters(model))
    own = set(learned)
    groups: dict[tuple[float, bool], list[nn.Parameter]] = defaultdict(list)
    for parameter in model.parameters():
        if parameter not in own:
            step = steps.get(holders.get(parameter, ""))
            decays = parameter.dim() > 1 or not weight_decay
            groups[1.0 if step is None else rule.deeper(step), decays].append(parameter)
    made = []
    for (m, decays), parameters in sorted(groups.items(), key=lambda one: (one[0][0] != 1, one[0][0], not one[0][1])):
        rate, epsilon, decay = FACTORS[optimizer](m, rule.alpha)
        made.append(
            _group(Parameters(model, parameters), lr * rate, weight_decay * decay * decays, optimizer, eps * epsilon)
        )
    return made + ([_group(Parameters(model, learned), lr, 0.0, optimizer, eps)] if learned else [])


class Parameters(Sequence[nn.Parameter]):
    """Parameters of a model, as they are there when an optimiser reads them: FSDP2 puts others in their places."""

    def __init__(self, model: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
        held = {id(p): (module, name) for module in model.modules() for name, p in module._parameters.items()}
        self._places = [held[id(parameter)] for parameter in parameters]

    @overload
    def __getitem__(self, index: int) -> nn.Parameter: ...
    @overload
    def __getitem__(self, index: slice) -> list[nn.Parameter]: ...
    def __getitem__(self, index: int | slice) -> nn.Parameter | list[nn.Parameter]:
        places = self._places[index]
        found = [getattr(module, name) for module, name in ([places] if isinstance(places, tuple) else places)]
        return found if isinstance(index, slice) else found[0]

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[nn.Parameter]:
        return iter(self[:])

    def __repr__(self) -> str:
        return f"<{len(self)} parameters>"


def _group(parameters: Sequence[nn.Parameter], lr: float, decay: float, optimizer: str, eps: float) -> dict[str, Any]:
    group = {"params": parameters, "lr": lr, "weight_decay": decay}
    return group if optimizer == "sgd" else {**group, "eps": eps}


def _patched_by(model: nn.Module, rule: transfer) -> dict[str, Step]:
    """The patched steps by name, if their h is what the rule says; a learned one may be anything."""
    held = bound(model, "param_groups")
    for _, step, factor in held:
        if not isinstance(factor, LearnedFactor) and not math.isclose(factor.value, rule(step), rel_tol=1e-9):
            raise EulernetError(
                f"{step.name} has h = {factor.value:.4g}, and transfer={rule!r} makes groups for h = {rule(step):.4g}. "
                f"First eulernet.set_h(model, eulernet.schedules.{rule!r})"
            )
    return {step.name: step for _, step, _ in held}
