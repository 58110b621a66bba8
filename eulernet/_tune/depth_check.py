"""Train a few iterations at several depths, and see what moves with depth: where nothing does, a rate transfers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from eulernet._checks import brief, positive, short, whole_number
from eulernet._errors import EulernetError
from eulernet._find.apart import without_global_hooks
from eulernet._find.inputs import as_arguments
from eulernet._find.sandbox import measuring
from eulernet._patch.patch import is_patched, patch
from eulernet._patch.select import HLike
from eulernet._plot import new_figure
from eulernet._run.hooks import StepInputs, add_step_hook, remove_step_hooks
from eulernet._run.patched import by_module
from eulernet._step import Step, as_text
from eulernet._tune.groups import transfer_groups
from eulernet._tune.meter import LossFn, most_frequent
from eulernet.schedules import transfer

MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]
_FLAT = 0.25  # a power of D up to this is none
_LARGE = 0.5  # a change beyond this share of the state is no small one, and cannot grow much further
_PANELS = (
    ("change", "change of the state\n‖Δx_D‖ / ‖x_D‖"),
    ("moved", "the same, beside x_0\n‖Δx_D‖ / ‖x_0‖"),
    ("increment_change", "change of the increments\nΣ ‖Δ hF‖ / ‖x_D‖"),
    ("increments", "increments at the start\n‖x_D - x_0‖ / ‖x_0‖"),
    ("state", "state at the start\n‖x_D‖ / ‖x_0‖"),
)


@dataclass(frozen=True)
class DepthRow:
    """One depth; of several seeds, the geometric means, and the means of the losses.

    Attributes:
        depth: as `build` was given it.
        steps: D, the runs of steps in the deepest residual stream, x_0 to x_D.
        state: ||x_D|| / ||x_0|| before training.
        increments: ||x_D - x_0|| / ||x_0|| before training.
        change: ||x_D after training - x_D before|| / ||x_D before||.
        moved: the same beside ||x_0||, change * state.
        increment_change: the sum over the steps of ||hF after - hF before||, divided by ||x_D before||.
        loss_before, loss_after: on the batch.
    """

    depth: int
    steps: int
    state: float
    increments: float
    change: float
    moved: float
    increment_change: float
    loss_before: float
    loss_after: float


@dataclass(frozen=True)
class DepthCheck:
    """What `depth_check` measured: prints as a table, `plot()`.

    Attributes:
        rows: one `DepthRow` a depth.
        powers: of each quantity but the losses the p of a fit by D^p; 0 is flat.
        transfers: whether the change of the state is flat, |p| up to 0.25, and small enough to tell.
        answer: in words.
    """

    rows: tuple[DepthRow, ...]
    powers: dict[str, float]
    transfers: bool
    answer: str

    def __repr__(self) -> str:
        return f"<DepthCheck: {self.answer}>"

    def __str__(self) -> str:
        return "\n".join([as_text(self._table()), "", self.answer])

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.text import Text

        return Group(self._table(), Text(f"\n{self.answer}", style="bold"))

    def _table(self) -> Any:
        from rich.table import Table

        table = Table(box=None, pad_edge=False, header_style="bold")
        for column in ("depth", "D", *(title.split("\n")[1] for _, title in _PANELS), "loss before", "after"):
            table.add_column(column, justify="right")
        for row in self.rows:
            values = [getattr(row, name) for name, _ in _PANELS]
            shown = [f"{value:.3g}" for value in (*values, row.loss_before, row.loss_after)]
            table.add_row(str(row.depth), str(row.steps), *shown)
        table.add_row("", "D^", *(f"{self.powers[name]:+.2f}" for name, _ in _PANELS))
        return table

    def plot(self, path: str | PathLike[str] | None = None) -> Any:
        """Draw the quantities over D.

        Args:
            path: where the picture goes, with an ending that matplotlib knows (.png, .svg, .pdf); None writes none.

        Returns:
            The `matplotlib.figure.Figure`.

        Raises:
            EulernetError: matplotlib is not installed, or the file's ending or folder is wrong.
        """
        figure = new_figure(12.5, 3.2, path, layout="constrained")
        from matplotlib import ticker

        depths = [row.steps for row in self.rows]
        for axes, (name, title) in zip(figure.subplots(1, len(_PANELS)), _PANELS, strict=True):
            values = [getattr(row, name) for row in self.rows]
            axes.plot(depths, [v if math.isfinite(v) and v > 0 else math.nan for v in values], "o-", color="#0072B2")
            axes.set(xscale="log", yscale="log", xlabel="D")
            low, high = axes.get_ylim()  # a decade at least, so that what is flat looks flat
            middle = math.sqrt(low * high)
            axes.set_ylim(min(low, middle / 3.2), max(high, middle * 3.2))
            axes.set_xticks(depths, [str(depth) for depth in depths])
            axes.xaxis.set_minor_formatter(ticker.NullFormatter())
            axes.set_title(f"{title}: D^{self.powers[name]:.2f}", loc="left", fontsize="medium")
            axes.grid(alpha=0.3, which="both")
            axes.spines[["top", "right"]].set_visible(False)
        figure.suptitle(self.answer, wrap=True, fontsize="medium")
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure


def depth_check(
    build: Callable[[int], nn.Module],
    depths: Sequence[int],
    batch: Any,
    loss_fn: LossFn,
    *,
    h: HLike | None = None,
    optimizer: MakeOptimizer | None = None,
    lr: float = 1e-4,
    iterations: int = 3,
    seeds: int = 2,
    progress: bool = True,
) -> DepthCheck:
    """Whether a learning rate can be expected to transfer over depth: the coordinate check of muP, over depth.

    At each depth a model is built and trained for some iterations on one batch. Where the change of its final state is
    the same at all depths, one rate does the same everywhere; where it grows or falls with depth, the rate has to fall
    or grow with it. The change counts as a share of the state, which is what a norm behind the last block passes on;
    CompleteP's check over depth (arXiv:2505.01618, Fig. 7) has it beside a state of size 1, here `moved`. It looks at
    the first iterations alone: a training that is tuned at two depths says more, and takes longer.

    Args:
        build: `build(depth)` makes a model, patched or not; a new one each time.
        depths: what `build` is given, two or more, such as [4, 8, 16, 32].
        batch: the pair (inputs, targets), the inputs as `example_inputs` of `patch`.
        loss_fn: `loss_fn(output, targets)`, a tensor of one number.
        h: patch each model with it first; None leaves each as `build` made it.
        optimizer: `optimizer(model)` makes the optimiser. By default AdamW with `lr`; where h is a rule of transfer,
            with the groups of `param_groups`.
        lr: of AdamW; smaller than one would train with, so that the changes stay small beside the state.
        iterations: of training, on the one batch.
        seeds: trainings a depth; each draws what follows on `torch.manual_seed`, from generators of its own.
        progress: show a bar where the output is a terminal.

    Returns:
        A `DepthCheck`, with a row a depth, the power of D of each quantity, and an answer.

    Raises:
        EulernetError: an argument is wrong, or a model cannot be built, patched or trained.

    Example:
        >>> import torch, eulernet
        >>> from torch import nn
        >>> class Block(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.norm, self.map = nn.LayerNorm(16), nn.Linear(16, 16)
        ...     def forward(self, x):
        ...         return x + self.map(self.norm(x))
        >>> build = lambda depth: nn.Sequential(*(Block() for _ in range(depth)))
        >>> batch = torch.randn(8, 16), torch.randn(8, 16)
        >>> plain = eulernet.depth_check(build, [4, 16, 64], batch, nn.functional.mse_loss)
        >>> rule = eulernet.schedules.transfer(base_depth=4)
        >>> scaled = eulernet.depth_check(build, [4, 16, 64], batch, nn.functional.mse_loss, h=rule)
        >>> plain.transfers, scaled.transfers
        (False, True)
    """
    depths = _checked(build, depths, batch, loss_fn, optimizer)
    lr = positive(lr, "lr", "lr=1e-4")
    iterations = whole_number(iterations, "iterations", "iterations=3", least=1)
    seeds = whole_number(seeds, "seeds", "seeds=2", least=1)
    if optimizer is None:
        optimizer = partial(_adamw, lr=lr, h=h, inputs=batch[0])
    rows = []
    for depth, seed in _shown([(depth, seed) for depth in depths for seed in range(seeds)], progress):
        with measuring(seed=seed):
            rows.append(_train(build, depth, batch, loss_fn, h, optimizer, iterations))
    return _result([_mean([row for row in rows if row.depth == depth]) for depth in depths], iterations)


def _checked(build: Any, depths: Any, batch: Any, loss_fn: Any, optimizer: Any) -> list[int]:
    call = "eulernet.depth_check(build, [4, 8, 16], (inputs, targets), loss_fn)"
    for name, value in (("build", build), ("loss_fn", loss_fn), ("optimizer", optimizer)):
        given = value is not None or name != "optimizer"
        if given and (not callable(value) or (name == "build" and isinstance(value, nn.Module))):
            raise EulernetError(f"depth_check: {name} is no function, but {type(value).__name__}: {call}")
    if isinstance(depths, str | int) or not isinstance(depths, Iterable):
        raise EulernetError(f"depths must be two whole numbers or more, not {brief(depths)}: {call}")
    found = sorted({whole_number(depth, "a depth", "depths=[4, 8, 16]", least=1) for depth in depths})
    if len(found) < 2:
        raise EulernetError(f"depths must be two whole numbers or more, not {brief(depths)}: {call}")
    if not (isinstance(batch, tuple | list) and len(batch) == 2):
        raise EulernetError(f"depth_check: the batch is a pair, inputs and targets: {call}")
    return found


def _adamw(model: nn.Module, lr: float, h: Any, inputs: Any) -> torch.optim.Optimizer:
    if isinstance(h, transfer):
        groups = transfer_groups(model, lr, h, "adamw", weight_decay=0.0, eps=1e-8, example_inputs=inputs)
        return torch.optim.AdamW(groups, lr=lr)
    return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)


def _shown(runs: list[tuple[int, int]], progress: bool) -> Iterator[tuple[int, int]]:
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not (progress and console.is_terminal)) as bar:
        task = bar.add_task("", total=sum(depth for depth, _ in runs))
        for depth, seed in runs:
            bar.update(task, description=f"depth {depth}, seed {seed}")
            yield depth, seed
            bar.advance(task, depth)


def _train(
    build: Callable[[int], nn.Module],
    depth: int,
    batch: Any,
    loss_fn: LossFn,
    h: HLike | None,
    make_optimizer: MakeOptimizer,
    iterations: int,
) -> DepthRow:
    inputs, targets = batch
    args, kwargs = as_arguments(inputs)
    model = build(depth)
    if not isinstance(model, nn.Module):
        raise EulernetError(f"build({depth}) returned a {type(model).__name__}; it must make a torch.nn.Module")
    if h is not None or not is_patched(model):
        patch(model, h=1.0 if h is None else h, example_inputs=inputs)
    optimizer = make_optimizer(model.train())
    losses: list[float] = []
    with without_global_hooks(list(model.modules())):
        before = _see(model, args, kwargs)
        for _ in range(iterations + 1):  # the last for its loss alone
            try:
                loss = loss_fn(model(*args, **kwargs), targets)
                losses.append(loss.item())
                if len(losses) <= iterations:
                    optimizer.zero_grad()
                    loss.backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
            except Exception as error:
                raise EulernetError(
                    f"the model of depth {depth} failed on the batch: {short(error)}. The batch is (inputs, targets), "
                    "and loss_fn(output, targets) gives a tensor of one number"
                ) from error
        after = _see(model, args, kwargs)
    size = _norm(before.last)
    pairs = zip(before.increments, after.increments, strict=True)
    return DepthRow(
        depth=depth,
        steps=len(before.increments),
        state=size / _norm(before.first),
        increments=_norm(before.last - before.first) / _norm(before.first),
        change=_norm(after.last - before.last) / size,
        moved=_norm(after.last - before.last) / _norm(before.first),
        increment_change=sum(_norm(b - a) for a, b in pairs) / size,
        loss_before=losses[0],
        loss_after=losses[-1],
    )


@dataclass
class _Seen:
    """x_0 and x_D of the deepest stream, and the increments between them."""

    first: Tensor
    last: Tensor
    increments: list[Tensor]


def _see(model: nn.Module, args: Any, kwargs: Any) -> _Seen:
    """One run in eval mode without gradients."""
    modules = by_module(model)
    deepest = most_frequent([step.stream for steps in modules.values() for step in steps for _ in range(step.calls)])
    states: list[Tensor] = []
    increments: list[Tensor] = []

    def hook(module: Any, steps: list[Step], seen: StepInputs, add: Callable[[], Any]) -> Any:
        mine = steps[seen.slot].stream == deepest and isinstance(seen.skip, Tensor) and isinstance(seen.branch, Tensor)
        if mine:
            h = module._euler[seen.slot].bound_to(module).value
            states.append(seen.skip.clone())
            increments.append(seen.branch * (h * seen.alpha))
        result = add()
        if mine and isinstance(result, Tensor):
            states[1:] = [result.clone()]
        return result

    for module, steps in modules.items():
        add_step_hook(module, partial(hook, module, steps))
    training = model.training
    try:
        with torch.no_grad():
            model.eval()(*args, **kwargs)
    finally:
        model.train(training)
        for module in modules:
            remove_step_hooks(module)
    if len(states) < 2:
        raise EulernetError(
            f"no step of {type(model).__name__} could be seen on this batch: eulernet.diagnose(model, batch, loss_fn) "
            "shows what runs"
        )
    if states[0].shape != states[1].shape:  # a residual network that halves its resolution on the way
        states[0] = torch.full_like(states[1], _norm(states[0]) / math.sqrt(states[1].numel()))
    return _Seen(states[0], states[1], increments)


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor.float()))


def _mean(rows: list[DepthRow]) -> DepthRow:
    def mean(name: str) -> float:
        values = [getattr(row, name) for row in rows]
        if not all(math.isfinite(value) for value in values):
            return math.inf
        return math.exp(sum(math.log(max(value, 1e-30)) for value in values) / len(values))

    losses = (sum(getattr(row, name) for row in rows) / len(rows) for name in ("loss_before", "loss_after"))
    quantities = ("state", "increments", "change", "moved", "increment_change")
    return DepthRow(rows[0].depth, rows[0].steps, *map(mean, quantities), *losses)


def _power(rows: Sequence[DepthRow], name: str) -> float:
    """The slope of log quantity over log D, by least squares."""
    points = [(math.log(r.steps), math.log(getattr(r, name))) for r in rows if math.isfinite(getattr(r, name))]
    x0, y0 = (sum(values) / len(points) for values in zip(*points, strict=True)) if points else (0.0, 0.0)
    spread = sum((x - x0) ** 2 for x, _ in points)
    return sum((x - x0) * (y - y0) for x, y in points) / spread if spread else math.nan


def _result(rows: list[DepthRow], iterations: int) -> DepthCheck:
    powers = {name: _power(rows, name) for name, _ in _PANELS}
    lost = [row.depth for row in rows if not (math.isfinite(row.change) and math.isfinite(row.loss_after))]
    p, ends = powers["change"], f"From depth {rows[0].depth} to {rows[-1].depth}"
    if lost:
        answer = f"At depth {lost[0]} the training diverges: take a smaller lr, and check again."
        return DepthCheck(tuple(rows), powers, False, answer)
    if max(row.change for row in rows) > _LARGE:
        answer = (
            f"{ends}, the final state changes by up to {max(row.change for row in rows):.2g} of its size, too much to "
            "tell how the change goes with depth: check again with a smaller lr, or fewer iterations."
        )
        return DepthCheck(tuple(rows), powers, False, answer)
    changed = f"{ends}, {iterations} iterations change the final state by an amount that goes as D^{p:.2f}"
    if abs(p) <= _FLAT:
        answer = f"{changed}: flat, so that a learning rate can be expected to transfer."
    else:
        moves, size = ("more", "smaller") if p > 0 else ("less", "larger")
        answer = (
            f"{changed}: at one rate a deep network moves {moves}, and wants a {size} one, about as D^{-p:.2f}. "
            f"Beside x_0 it goes as D^{powers['moved']:.2f}."
        )
    return DepthCheck(tuple(rows), powers, abs(p) <= _FLAT, answer)
