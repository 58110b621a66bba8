"""h and the last affine map of a branch are one number twice: fold the one into the other, or train alike.

`s + h * F(s)`, where F ends in an affine map W, b, is `s + F'(s)` with the map hW, hb. Which parameters these are is
found in `_find/absorb.py`. The inverse, `patch(..., preserve=True)`, is in `_patch/patch.py`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any, Literal

from torch import nn

from eulernet import schedules
from eulernet._checks import brief, check_model, positive, truth
from eulernet._commit import commit
from eulernet._errors import EulernetError
from eulernet._find.absorb import absorbing, check_scalable, refusal, scale_parameters
from eulernet._patch.patch import Model, factors_now, is_patched, steps
from eulernet._patch.prove import search
from eulernet._patch.select import HLike, values
from eulernet._patch.subclass import remove_steps
from eulernet._run.learned import step_parameters
from eulernet._run.patched import slots
from eulernet._step import LEFT_ALONE
from eulernet._tune.groups import Parameters, transfer_groups


def fold(model: Model, *, where_possible: bool = False, example_inputs: Any = None) -> Model:
    """Absorb h into the weights, in place: the model is its library's own again and computes what it computed.

    The last affine maps of each branch (batch norm, convolution, linear map, LayerScale, a norm with weights) are
    multiplied by h: W <- hW, b <- hb. A factor moves through dropout, stochastic depth, views, ReLU, pooling, and
    whatever else is homogeneous, so the equality, to rounding, holds in eval and in train mode. Nothing of eulernet is
    left: the `state_dict` loads into the model that was never patched, and inference costs what it did there. Training
    on is another matter: see `param_groups`. The parameters stay the same objects.

    Args:
        model: a patched model, on a real device.
        where_possible: leave the steps patched that have no such map, or share it. By default they are an error. A
            squeeze-and-excitation gate at the end of a branch is the usual reason: it feeds on what it multiplies.
        example_inputs: as for `find_steps`; the model is traced once more. What they do not reach, such as the path
            of an optional argument, is not known to read a map as well.

    Returns:
        The same model.

    Raises:
        EulernetError: the model is not patched, is wrapped or sharded; a step cannot be folded; weights are quantised,
            on the meta device, or would leave the range of their dtype. The model is then as it was.

    Example:
        >>> import torch, eulernet
        >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> weight = layer.linear2.weight.detach().clone()
        >>> layer = eulernet.patch(layer, h=0.5, example_inputs=torch.zeros(2, 5, 8))
        >>> layer = eulernet.fold(layer, example_inputs=torch.zeros(2, 5, 8))
        >>> torch.equal(layer.linear2.weight, 0.5 * weight), eulernet.is_patched(layer)
        (True, False)
    """
    check_model(model, "fold")
    where_possible = truth(where_possible, "where_possible")
    if not is_patched(model):
        name = type(model).__name__
        raise EulernetError(f"{name} is not patched: there is no h to fold, and it needs no eulernet as it is")
    with search(model, example_inputs) as result:
        now = factors_now(model, result)
        scales, refused = absorbing(model, result, now)
        if refused and not where_possible:
            raise refusal(
                result,
                refused,
                "Fold the others and leave these patched: eulernet.fold(model, where_possible=True). Or set their h to "
                "1 first, with eulernet.set_h.",
            )
        left = {f.step.name for f in result.found if f.step.index in refused}
    check_scalable(model, scales)
    folded = {(id(module), slot) for module, slot, step in slots(model) if step.name not in left}
    commit([*scale_parameters(scales), *remove_steps(model, folded)])
    return model


# What the learning rate and the weight decay of a map are multiplied by, so that it learns as one behind h does.
_RATES = {
    "sgd": lambda h: (h**2, h**-2),
    "adam": lambda h: (h, h**-2),
    "adamw": lambda h: (h, h**-1),
}


def _rates(rule: str, h: float) -> tuple[float, float]:
    """What the learning rate and the weight decay are multiplied by."""
    try:
        rate, decay = _RATES[rule](h)
    except OverflowError:
        rate = decay = math.inf
    if not (0 < rate < math.inf and 0 < decay < math.inf):
        raise EulernetError(f"h = {h:g} is too far from 1: it makes learning rates of 0 or infinity; for example h=0.1")
    return rate, decay


def param_groups(
    model: nn.Module,
    lr: float,
    *,
    h: HLike | None = None,
    transfer: schedules.transfer | None = None,
    optimizer: Literal["sgd", "adam", "adamw"] | None = None,
    weight_decay: float = 0.0,
    eps: float = 1e-8,
    example_inputs: Any = None,
) -> list[dict[str, Any]]:
    """Groups for an optimiser: to learn as behind a step factor `h`, or to `transfer` a rate to another depth.

    **With `h`** the last affine maps of the branches learn as they would behind that step factor. It does two things:
    the branch starts h times as large, and it learns more slowly. For a network with h = 1 the groups do the second
    alone: the learning rate of these maps is lr * h**2 for SGD (with momentum too) and lr * h for Adam and AdamW, and
    their weight decay is divided by h**2, or by h for AdamW. The equivalence is exact: a network patched with h trains
    as one with h = 1 whose maps start at h times their value (what `fold` makes of it) and which has these groups, but
    for rounding and Adam's epsilon.

    On a patched model the groups come on top of what its h does, and `h=lambda step: 1 / step.h` undoes what it does
    to the learning rate, leaving the first effect alone. A learned step factor is a group of its own without decay.

    Patch before or after the optimiser is built, both work, with `preserve=True` and `fold` as well: parameters stay
    the same objects. A fixed h adds none; a learned one does, so there patch first. With FSDP2: patch, make the groups,
    shard, build the optimiser from the groups, which hold what is in the model when the optimiser reads them.

    Args:
        model: any model: unpatched, patched or folded.
        lr: the learning rate of all other parameters.
        h: as for `patch`, for the steps that `patch` would change, or those that are patched. Steps with h = 1 need no
            last affine map.
        optimizer: the rule that the optimiser follows: "sgd", "adam" or "adamw".
        weight_decay: that of all other parameters.
        example_inputs: as for `find_steps`.

    Returns:
        The other parameters first, then a group for each learning rate, in the form that `torch.optim` takes. Each
        parameter of the model is in one of them.

    Raises:
        EulernetError: a step with h other than 1 has no last affine map of its own, or a value is wrong.

    Example:
        >>> import torch, eulernet
        >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> groups = eulernet.param_groups(layer, lr=0.1, h=0.5, example_inputs=torch.zeros(2, 5, 8))
        >>> [(len(group["params"]), group["lr"]) for group in groups]
        [(8, 0.1), (4, 0.025)]
        >>> optimizer = torch.optim.SGD(groups, momentum=0.9)

        >>> rule = eulernet.schedules.transfer(base_depth=1)
        >>> layer = eulernet.patch(layer, h=rule, example_inputs=torch.zeros(2, 5, 8))
        >>> groups = eulernet.param_groups(layer, lr=1e-3, transfer=rule, example_inputs=torch.zeros(2, 5, 8))
        >>> [(len(group["params"]), group["lr"], group["eps"]) for group in groups]
        [(4, 0.001, 1e-08), (8, 0.001, 5e-09)]
        >>> optimizer = torch.optim.AdamW(groups, lr=1e-3)
    """
    check_model(model, "param_groups")
    lr = positive(lr, "lr", "lr=0.1")
    rule = ("sgd" if transfer is None else "adamw") if optimizer is None else optimizer
    if not (isinstance(rule, str) and rule in _RATES):
        raise EulernetError(
            f"optimizer must be one of {', '.join(map(repr, _RATES))}, not {brief(optimizer)}; for example "
            'optimizer="adamw"'
        )
    if not (isinstance(weight_decay, int | float) and weight_decay == 0):
        weight_decay = positive(weight_decay, "weight_decay", "weight_decay=1e-4")
    eps = positive(eps, "eps", "eps=1e-8")
    if (h is None) == (transfer is None):
        raise EulernetError(
            f"param_groups takes either h or transfer, not {'both' if h is not None else 'neither'}: "
            "eulernet.param_groups(model, lr=0.1, h=0.1), or "
            "eulernet.param_groups(model, lr=1e-3, transfer=eulernet.schedules.transfer(base_depth=8))"
        )
    if transfer is not None:
        if not isinstance(transfer, schedules.transfer):
            raise EulernetError(
                f"transfer={brief(transfer)} is no rule of transfer; for example "
                "transfer=eulernet.schedules.transfer(base_depth=8)"
            )
        return transfer_groups(model, lr, transfer, rule, weight_decay, eps, example_inputs)
    assert h is not None
    with search(model, example_inputs) as result:
        found = {f.step.name: f.step for f in result.found}
        if is_patched(model):
            factors_now(model, result)  # refuses what was patched at other additions
            chosen = list(steps(model))
        else:
            chosen = [s for s in found.values() if s.kind not in LEFT_ALONE]
        factors = {found[s.name].index: value for s, value in zip(chosen, values(h, chosen), strict=True)}
        scales, refused = absorbing(model, result, factors)
        if refused:
            raise refusal(result, refused, f"Give {'these steps' if len(refused) > 1 else 'it'} h = 1.")
    own = set(step_parameters(model))
    groups: dict[float, list[nn.Parameter]] = defaultdict(list, {1.0: []})
    for parameter in model.parameters():
        if parameter not in own:
            groups[scales.get(parameter, 1.0)].append(parameter)
    rates = {scale: _rates(rule, scale) for scale in groups}
    return [
        {"params": Parameters(model, groups[scale]), "lr": lr * rate, "weight_decay": weight_decay * decay}
        for scale, (rate, decay) in rates.items()
        if groups[scale]
    ] + ([{"params": Parameters(model, list(step_parameters(model))), "lr": lr, "weight_decay": 0.0}] if own else [])
