"""Look at a model: how large its steps are, and what they do to gradients and to noise."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from os import PathLike
from typing import Any

from torch import nn

from eulernet._checks import positive, unwrapped
from eulernet._errors import EulernetError
from eulernet._find.starts import counted_twice, relative_starts
from eulernet._patch.prove import search
from eulernet._plot import new_figure
from eulernet._step import as_text
from eulernet._tune.calibrate import BOUNDS, solve_for_h
from eulernet._tune.meter import LossFn, MeasuredCall, Noise, StepMeter, growth, most_frequent, stream

_ZERO = 1e-3  # branches below this share of the stream are as good as not there
_FLAT = 2.0  # growth of gradients up to this is none
_NONE = 1e-6  # the h at which branches are as good as not there
_WIDE = 4.0  # values that differ by more than this factor are drawn on a logarithmic axis
_FEW = 12  # in the paper (Fig. 6) any h from 0.1 to 2 trains a network of 9 steps


@dataclass(frozen=True)
class Row:
    """One run of one step. None is "not measured".

    Attributes:
        step: the step's name.
        call: which of the step's runs in this forward pass, from 0.
        stream: the number of its residual stream.
        h: its step factor.
        skip: ||s||, the Euclidean norm of the skip, over the whole batch.
        step_size: ||h F|| / ||s||.
        gradient: ||dL/dx||, x being the state that skip and branch come from.
        gain: W, the largest singular value of dF/dx; only with `gains=True`.
    """

    step: str
    call: int
    stream: int
    h: float
    skip: float | None
    step_size: float | None
    gradient: float | None
    gain: float | None


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` measured: prints as a table, `to_json()`, `plot()`.

    The quantities of the whole are those of the deepest residual stream, x_0 to x_D. None is "not measured".

    Attributes:
        model: the name of the model's class.
        depth: D, the number of runs of steps in that stream.
        rows: one `Row` a run of a step, in the order of execution.
        gradient_growth: ||dL/dx_0|| / ||dL/dx_D||.
        equation_6: what bounds it by Eq. (6), applied step by step: the product of 1 + h W; only with `gains=True`.
        log10_proposition_1: the decimal logarithm of its bound by Proposition 1, (sqrt(d) + h W)^D, d being the number
            of elements of x for one sample (of the largest x), W the largest gain; only with `gains=True`.
        noise_amplification: ||x_D(e) - x_D|| / ||x_0(e) - x_0||, where e is noise in the input.
        proposition_2: what bounds it by Proposition 2, 1 + h D W / ||x_0(e) - x_0||, where W is the largest
            ||F(x(e)) - F(x)||.
        advice: one sentence.
        notes: what could not be measured, one sentence each.
    """

    model: str
    depth: int
    rows: tuple[Row, ...]
    gradient_growth: float | None
    equation_6: float | None
    log10_proposition_1: float | None
    noise_amplification: float | None
    proposition_2: float | None
    advice: str
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"<Diagnosis: {self.advice}>"

    def __str__(self) -> str:
        from rich.console import Group

        return "\n".join([as_text(Group(*self._parts())), "", self.advice])  # the advice on one line, however long

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.text import Text

        return Group(*self._parts(), Text(f"\n{self.advice}", style="bold"))

    def _parts(self) -> list[Any]:
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, header_style="bold")
        with_gain = any(row.gain is not None for row in self.rows)
        columns = ("#", "step", "h", "‖x‖", "‖hF‖/‖x‖", "‖∂L/∂x‖", *(["W"] if with_gain else []))
        for column in columns:
            table.add_column(column, justify="left" if column == "step" else "right", overflow="fold")
        several = {row.step for row in self.rows if row.call}
        for number, row in enumerate(self.rows):
            name = f"{row.step}, run {row.call}" if row.step in several else row.step
            values = [row.skip, row.step_size, row.gradient, *([row.gain] if with_gain else [])]
            table.add_row(str(number), name, f"{row.h:.4g}", *map(_shown, values))
        totals = Table(box=None, pad_edge=False, show_header=False)
        for name, value, bound in self._totals():
            totals.add_row(name, value, bound)
        streams = [row.stream for row in self.rows]
        deepest = [row.step for row in self.rows if row.stream == most_frequent(streams)]
        of = f"\nthe deepest of {len(set(streams))} streams, {deepest[0]} to {deepest[-1]}:"
        parts: list[Any] = [table, Text(of if len(set(streams)) > 1 else ""), totals]
        if self.notes:
            parts += [Text("\nnotes:", style="bold"), *(Text(f"  {note}") for note in self.notes)]
        return parts

    def _totals(self) -> list[tuple[str, str, str]]:
        bounds = []
        if self.equation_6 is not None:
            bounds.append(f"Eq. (6): at most {_shown(self.equation_6)}")
        if self.log10_proposition_1 is not None:
            bounds.append(f"Proposition 1: at most 10^{self.log10_proposition_1:.1f}")
        noise = [] if self.proposition_2 is None else [f"Proposition 2: at most {_shown(self.proposition_2)}"]
        return [
            ("growth of gradients ‖∂L/∂x_0‖ / ‖∂L/∂x_D‖", _shown(self.gradient_growth), "; ".join(bounds)),
            (
                "amplification of noise ‖x_D(e) - x_D‖ / ‖x_0(e) - x_0‖",
                _shown(self.noise_amplification),
                "; ".join(noise),
            ),
        ]

    def to_json(self) -> str:
        """All of it as JSON; what was not measured is null."""
        return json.dumps(asdict(self), indent=1)

    def plot(self, path: str | PathLike[str] | None = None) -> Any:
        """Draw the rows over depth: gradients, step sizes, norms of the stream, and gains where measured.

        Args:
            path: where the picture goes, with an ending that matplotlib knows (.png, .svg, .pdf); None writes none.

        Returns:
            The `matplotlib.figure.Figure`.

        Raises:
            EulernetError: matplotlib is not installed, or the file's ending or folder is wrong.
        """
        panels = [("‖∂L/∂x‖", "gradient"), ("‖hF‖ / ‖x‖", "step_size"), ("‖x‖", "skip"), ("W", "gain")]
        panels = [p for p in panels if any(getattr(row, p[1]) is not None for row in self.rows)]
        figure = new_figure(8, 1 + 1.7 * len(panels), path, layout="constrained")
        from matplotlib import ticker

        all_axes: Any = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0] if panels else []
        for axes, (title, name) in zip(all_axes, panels, strict=True):
            for number in sorted({row.stream for row in self.rows}):
                points = [(i, getattr(row, name)) for i, row in enumerate(self.rows) if row.stream == number]
                points = [(i, value) for i, value in points if value is not None and math.isfinite(value)]
                axes.plot(*zip(*points, strict=True), ".-", label=f"stream {number}") if points else None
            values = [v for row in self.rows if (v := getattr(row, name)) is not None and math.isfinite(v)]
            if values and min(values) > 0 and max(values) > _WIDE * min(values):
                axes.set_yscale("log")
                axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
                axes.yaxis.set_major_formatter("{x:g}")
                axes.yaxis.set_minor_formatter(ticker.NullFormatter())
            else:
                axes.set_ylim(0, 1.1 * max(values, default=0) or None)
            axes.set_ylabel(title)
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
        if panels:
            all_axes[-1].xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
            all_axes[-1].set_xlabel("step, in the order of execution")
            if len({row.stream for row in self.rows}) > 1:
                all_axes[0].legend(frameon=False)
        figure.suptitle(f"{self.model}: {self.advice}", wrap=True, fontsize="medium")
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure


def diagnose(
    model: nn.Module,
    batch: Any,
    loss_fn: LossFn | None = None,
    *,
    gains: bool = False,
    noise: float = 0.01,
    seed: int = 0,
) -> Diagnosis:
    """Measure on a batch what the steps of a model do: their sizes, the growth of gradients, of noise.

    These are the quantities of *Towards Robust ResNet* (Zhang et al., IJCAI 2019): Eqs. (3) and (6), Propositions 1 and
    2, which assume that the skips, and what follows the additions, are identities; where they are not (a projection, a
    ReLU) the bounds are no theorems.

    A copy of the model runs, in train mode, as at the start of training (dropout and stochastic depth with the same
    random numbers in each run, batch normalisation with the batch's statistics), without the model's hooks. The model,
    its gradients and buffers, and the random number generators stay as they are. A model that is not patched is
    measured at h = 1, a patched one at its own h.

    Args:
        model: a model, patched or not.
        batch: what the model takes, as `example_inputs` of `patch`; with `loss_fn` the pair (inputs, targets).
        loss_fn: `loss_fn(output, targets)`, a tensor of one number. Without it the gradient is that of the scalar
            product of the output and a fixed random direction of length 1, so that no targets are needed.
        gains: measure W for each step as well, by power iteration with Jacobian-vector and vector-Jacobian products (up
            to 100 of each). It is a lower bound, off by up to some 0.5 % where the largest singular values are close to
            each other. Takes many times as long as the rest.
        noise: the norm of the Gaussian noise in each floating-point input, as a share of the input's norm. In a model
            of tokens the noise is in the result of the embedding that runs first.
        seed: of the random numbers.

    Returns:
        A `Diagnosis`: a row for each run of each step, and the growth from end to end of the deepest residual stream.
        Its advice comes from measurements: where gradients grow more than 2-fold, `calibrate`'s search for the h that
        makes the growth twice what it is without branches (some ten passes).

    Raises:
        EulernetError: no step is found, or the model, its backward pass or `loss_fn` fails on the batch.

    Example:
        >>> import torch, eulernet
        >>> _ = torch.manual_seed(0)
        >>> layer = lambda: torch.nn.TransformerEncoderLayer(8, 2, 64, 0.0, batch_first=True, norm_first=True)
        >>> eulernet.diagnose(torch.nn.Sequential(layer(), layer()), torch.randn(4, 5, 8))
        <Diagnosis: 4 steps, gradients grow 1.2-fold from the last block to the first: nothing to gain from a smaller h>
    """
    meter = StepMeter(model, batch, loss_fn, seed, "diagnose")
    noise = positive(noise, "noise", "noise=0.01")
    calls = meter.gradients(gains)
    if not calls:
        raise EulernetError(f"no step of {meter.name} ran on this batch in train mode: {', '.join(meter.notes)}")
    disturbed = meter.noise(noise)
    rows, mine = _rows(calls), stream(calls)
    if any(row.gradient is None for row in rows):
        names = dict.fromkeys(row.step for row in rows if row.gradient is None)
        meter.notes.append(f"the gradient was not measured at {', '.join(names)}: its input is not known, or got none")
    if disturbed is None:
        meter.notes.append("the amplification of noise was not measured: no noise in the input reaches the first step")
    meter.notes += _twice(model, meter, mine)
    equation_6, log10_proposition_1 = _gradient_bounds(mine)
    return Diagnosis(
        model=meter.name,
        depth=len(mine),
        rows=rows,
        gradient_growth=growth(calls),
        equation_6=equation_6,
        log10_proposition_1=log10_proposition_1,
        noise_amplification=None if disturbed is None else disturbed.amplification,
        proposition_2=None if disturbed is None else _proposition_2(mine, disturbed),
        advice=_advice(mine, growth(calls), meter),
        notes=tuple(meter.notes),
    )


def _twice(model: nn.Module, meter: StepMeter, calls: list[MeasuredCall]) -> list[str]:
    """That depth is in the initial values of the branches, with how large these are beside the state."""
    with search(unwrapped(model), meter.args or meter.kwargs) as result:
        said = counted_twice(result, relative_starts(unwrapped(model), result), "eulernet.schedules.inverse()")
    sizes = [c.increment / c.skip / c.h for c in calls if c.increment is not None and c.skip]
    measured = f" (the branches F measure {min(sizes):.2g} to {max(sizes):.2g} of the state)" if sizes else ""
    return [said + measured] if said else []


def _rows(calls: list[MeasuredCall]) -> tuple[Row, ...]:
    rows: list[Row] = []
    for c in calls:
        number = sum(row.step == c.step.name for row in rows)
        size = None if c.increment is None or not c.skip else c.increment / c.skip
        rows.append(Row(c.step.name, number, c.step.stream, c.h, c.skip, size, c.gradient, c.gain))
    return tuple(rows)


def _gradient_bounds(calls: list[MeasuredCall]) -> tuple[float | None, float | None]:
    """The product of 1 + h W over the steps, and the decimal logarithm of that of sqrt(d) + h max W."""
    gains = [c.gain for c in calls]
    known = [g for g in gains if g is not None]
    if len(known) < len(gains):
        return None, None
    root = math.sqrt(max(c.dimension for c in calls))
    product = math.prod(1 + c.h * gain for c, gain in zip(calls, known, strict=True))
    return product, sum(math.log10(root + c.h * max(known)) for c in calls)


def _proposition_2(calls: list[MeasuredCall], noise: Noise) -> float:
    """eps + h D W, divided by eps; with several h their sum stands for h D."""
    return 1 + sum(c.h for c in calls) * noise.branch / noise.start


def _advice(calls: list[MeasuredCall], grown: float | None, meter: StepMeter) -> str:
    sizes = [c.increment / c.skip for c in calls if c.increment is not None and c.skip]
    steps = f"{len(calls)} steps"
    if sizes and max(sizes) < _ZERO:
        zero = "zero" if max(sizes) == 0 else f"nearly zero (at most {max(sizes):.1g} of the stream)"
        return f"branches are {zero} at initialisation: h only lowers their learning rate"
    if grown is None:
        return f"{steps}, the growth of gradients was not measured: no advice"
    if not math.isfinite(grown):
        changed = "gradients overflow on the way"
    elif grown >= 1:
        changed = f"gradients grow {_fold(grown)}"
    else:
        changed = f"gradients shrink to {grown:.2g} of their norm"
    changed += " from the last block to the first"
    if grown <= _FLAT:
        return f"{steps}, {changed}: nothing to gain from a smaller h"
    meter.set_h(_NONE)
    least = growth(meter.gradients())
    if least is None or not math.isfinite(least) or grown <= _FLAT * least:
        left = "not finite" if least is None or not math.isfinite(least) else _fold(least)
        return f"{steps}, {changed}; at h = {_NONE:g} that is {left}: it does not come from the branches"
    solution = solve_for_h(meter, _FLAT * max(least, 1.0), bounds=(_NONE, BOUNDS[1]), tolerance=0.05)
    rest = f", of which {_shown(least)} does not come from the branches" if least > 1.1 else ""
    few = "; but with so few steps h seldom matters" if len(calls) <= _FEW else ""
    return f"{steps}, {changed}: h = {solution.h:.2g} makes it {_shown(solution.growth)}{rest}{few}"


def _fold(growth: float) -> str:
    return f"{growth:.1f}-fold" if growth < 10 else f"{growth:.3g}-fold" if growth >= 1000 else f"{growth:.0f}-fold"


def _shown(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.3g}"
