"""h from data: the step factor at which gradients, or input noise, grow as much as is asked."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from torch import nn

from eulernet._checks import brief, positive
from eulernet._errors import EulernetError, EulernetWarning
from eulernet._step import Step
from eulernet._tune.meter import LossFn, StepMeter, growth

Quantity = Literal["gradient", "noise"]
TARGET = 2.0
BOUNDS = (1e-3, 1.0)
_WORDS = {
    "gradient": "the growth of gradients from the last step to the first",
    "noise": "the amplification of input noise",
}


def calibrate(
    model: nn.Module,
    batch: Any,
    loss_fn: LossFn | None = None,
    *,
    target: float = TARGET,
    quantity: Literal["gradient", "noise"] = "gradient",
    rule: Callable[[Step], float] | None = None,
    bounds: tuple[float, float] = BOUNDS,
    tolerance: float = 0.01,
    noise: float = 0.01,
    seed: int = 0,
) -> float:
    """The step factor at which gradients grow `target`-fold from the last step to the first, or noise from x_0 to x_D.

    Both are what a small h constrains in *Towards Robust ResNet* (Zhang et al., IJCAI 2019): the gradients in
    Proposition 1, ||dL/dx_0|| / ||dL/dx_D||, the noise in Proposition 2, ||x_D(e) - x_D|| / ||x_0(e) - x_0||, here
    measured on a batch, best at initialisation. The model is not changed: give what is returned to `patch` or `set_h`.

    log h is bisected between the logarithms of `bounds`, with one forward and backward pass a probe (two forward passes
    for noise), about ten in all, on a copy as in `diagnose`: in train mode, with the same random numbers in each probe.

    Args:
        model: a model, patched or not. Of a patched one only the patched steps get the new h, so patch first, at any h,
            to leave steps out.
        batch: what the model takes, as `example_inputs` of `patch`; with `loss_fn` the pair (inputs, targets).
        loss_fn: `loss_fn(output, targets)`, a tensor of one number. Without it the gradient is that of a fixed random
            projection of the output, and no targets are needed.
        target: how many-fold the growth shall be, a positive number.
        quantity: "gradient" or "noise".
        rule: a function of a `Step`; then the number returned is the c of `h = lambda step: c * rule(step)`.
        bounds: the smallest and the largest h that come into question (of c, with a rule).
        tolerance: how far from the target, as a share of it, the measured growth may be.
        noise: the size of the input noise, as a share of the norm of the input.
        seed: of the random numbers.

    Returns:
        h, within `bounds`. Where the growth stays below the target the upper bound, with a warning: there a smaller h
        has nothing to give.

    Raises:
        EulernetError: the growth is above the target at both bounds, does not depend on h, or cannot be measured.
            The message says what was measured.

    Warns:
        EulernetWarning: the growth stays below the target, or does not rise or fall steadily with h (it turns by
            more than five times `tolerance`), so that another h may meet the target as well.

    Example:
        >>> import torch, eulernet
        >>> _ = torch.manual_seed(0)
        >>> layer = lambda: torch.nn.TransformerEncoderLayer(8, 2, 64, 0.0, batch_first=True, norm_first=True)
        >>> model, batch = torch.nn.Sequential(*(layer() for _ in range(12))), torch.randn(4, 5, 8)
        >>> h = eulernet.calibrate(model, batch, target=1.5)
        >>> 0.9 < h < 1
        True
        >>> eulernet.set_h(eulernet.patch(model, example_inputs=batch), h) is model
        True
    """
    if not (isinstance(quantity, str) and quantity in _WORDS):
        raise EulernetError(f'quantity={brief(quantity)} is neither "gradient" nor "noise"')
    target = positive(target, "target", "target=2.0")
    tolerance = positive(tolerance, "tolerance", "tolerance=0.01")
    noise = positive(noise, "noise", "noise=0.01")
    bounds = _in_order(bounds)
    if rule is not None and not callable(rule):
        raise EulernetError(
            f"rule={brief(rule)} is no function of a step; for example rule=eulernet.schedules.inverse_sqrt()"
        )
    meter = StepMeter(model, batch, loss_fn, seed, "calibrate")
    found = solve_for_h(meter, target, quantity, rule=rule, bounds=bounds, tolerance=tolerance, noise=noise)
    if found.warning:
        warnings.warn(found.warning, EulernetWarning, stacklevel=2)
    return found.h


@dataclass(frozen=True)
class Solution:
    """What the search found: h (c, with a rule), the growth measured there, and what is doubtful about it."""

    h: float
    growth: float
    warning: str = ""


def solve_for_h(
    meter: StepMeter,
    target: float = TARGET,
    quantity: Quantity = "gradient",
    *,
    rule: Callable[[Step], float] | None = None,
    bounds: tuple[float, float] = BOUNDS,
    tolerance: float = 0.01,
    noise: float = 0.01,
) -> Solution:
    """Bisect log h on a meter, whose h is afterwards that of the last measurement."""
    measured: dict[float, float] = {}

    def excess(h: float) -> float:
        """log(growth / target)"""
        meter.set_h(h if rule is None else lambda step: h * rule(step))
        measured[h] = _measure(meter, quantity, noise)
        return math.log(max(measured[h], 1e-300) / target)

    def ends() -> str:
        (low, at_low), (high, at_high) = sorted(measured.items())[:: len(measured) - 1]
        return f"{_WORDS[quantity]} is {at_low:.3g} at h = {low:.3g} and {at_high:.3g} at h = {high:.3g}"

    low, high = (float(bound) for bound in bounds)
    at_high, at_low = excess(high), excess(low)
    close = math.log1p(tolerance)
    if abs(at_high) <= close:
        return Solution(high, measured[high])
    if abs(at_high - at_low) <= 1e-6:
        raise EulernetError(
            f"{ends()}: it does not depend on h. Branches that are zero at initialisation (a zero last gamma, as in "
            "timm's ResNets) hide h; eulernet.diagnose(model, batch) shows them"
        )
    if at_low > close and at_high > close:
        least, most = sorted((measured[low], measured[high]))
        between = math.sqrt(least * min(most, 4 * least))  # the most may have overflowed
        way = f"or a target between these: eulernet.calibrate(model, batch, target={between:.3g})"
        if between == math.inf:
            way = f"such as eulernet.calibrate(model, batch, bounds=({low / 1000:g}, {low:g}))"
        raise EulernetError(f"{ends()}, above the target {target:g}: pass smaller bounds=, {way}")
    if at_low < -close and at_high < -close:
        return Solution(high, measured[high], f"{ends()}, below the target {target:g}: a smaller h has nothing to give")

    inside, h = at_low, low
    while abs(inside) > close and high / low > 1 + tolerance / 1000:
        h = math.sqrt(low * high)
        inside = excess(h)
        if (inside > 0) == (at_high > 0):
            high = h
        else:
            low = h
    cautions = []
    if abs(inside) > close:
        cautions.append(f"it jumps there, from {measured[low]:.3g} to {measured[high]:.3g}")
    changes = [math.log(b / a) for a, b in pairwise(g for _, g in sorted(measured.items())) if a > 0 and b < math.inf]
    if any(c > 5 * close for c in changes) and any(c < -5 * close for c in changes):
        cautions.append("it does not rise or fall steadily with h, so that another h may meet the target as well")
    values = ", ".join(f"{g:.3g} at {x:.3g}" for x, g in sorted(measured.items()))
    warning = f"{_WORDS[quantity]} is {measured[h]:.3g} at h = {h:.3g}, but {'; '.join(cautions)}: {values}"
    return Solution(h, measured[h], warning if cautions else "")


def _measure(meter: StepMeter, quantity: Quantity, noise: float) -> float:
    if quantity == "gradient":
        value = growth(meter.gradients())
    else:
        result = meter.noise(noise)
        value = None if result is None else result.amplification
    if value is None:
        raise EulernetError(
            f"{_WORDS[quantity]} could not be measured in {meter.name}: "
            "eulernet.diagnose(model, batch) shows of which step it is not known"
        )
    return value if math.isfinite(value) else math.inf  # features or gradients that are not finite have grown too far


def _in_order(bounds: Any) -> tuple[float, float]:
    try:
        low, high = (positive(bound, "bounds", "") for bound in bounds)
    except (TypeError, ValueError):
        low = high = math.nan
    if not low < high:
        raise EulernetError(
            f"bounds={brief(bounds)} are no two positive numbers in order; for example bounds=(0.001, 1.0)"
        )
    return low, high
