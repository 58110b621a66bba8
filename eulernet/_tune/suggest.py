"""What the rules from depth give for a model, beside the bounds of the paper's propositions."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from eulernet._checks import check_model, positive, unwrapped, whole_number
from eulernet._errors import EulernetError
from eulernet._find.starts import counted_twice, relative_starts
from eulernet._patch.prove import search
from eulernet._step import Step, as_text
from eulernet.schedules import constant, decreasing, inverse, inverse_sqrt

_RULES = (constant(1.0), constant(0.1), inverse_sqrt(), inverse(), decreasing())
_SHALLOW = 9  # the steps of a ResNet-20
_TINY = 1e-3
_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
_BRANCH_SCALE = re.compile(r"gamma|lambda|layer_?scale|skipinit|resweight|\bls\d*\.")


@dataclass(frozen=True)
class Bounds:
    """A rule in a stream of D steps.

    Attributes:
        rule: the rule.
        depth: D.
        h: the step factor of each of the D steps; a module that runs several times has one value for all its runs.
        log10_gradient: log10 of prod(1 + h W), which is (1 + h W)^D where all h are equal.
        noise: sum(h W), which is h D W where all h are equal.
    """

    rule: Any
    depth: int
    h: tuple[float, ...]
    log10_gradient: float
    noise: float


class Suggestion:
    """What `suggest_h` found; it prints as a table.

    Attributes:
        bounds: `Bounds` for each depth and rule.
        gain: W.
        notes: what else is to be known before h is chosen, one sentence each.
    """

    def __init__(self, streams: dict[str, list[Step]], gain: float, notes: Sequence[str]) -> None:
        self.bounds = tuple(_bounds(rule, stream, gain) for stream in streams.values() for rule in _RULES)
        self.gain = gain
        self.notes = tuple(notes)
        self._depths = {title: len(stream) for title, stream in streams.items()}

    def __repr__(self) -> str:
        return f"<Suggestion: h for D = {', '.join(map(str, self._depths.values()))}>"

    def __str__(self) -> str:
        return as_text(self)

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        parts: list[Any] = []
        for title, depth in self._depths.items():
            table = Table(box=None, pad_edge=False, header_style="bold")
            for column in ("rule", "h", "gradients, at most", "noise, at most"):
                table.add_column(column, justify="left" if column == "rule" else "right")
            for row in self.bounds:
                if row.depth == depth:
                    table.add_row(
                        _name(row.rule), _range(row.h), f"x {_large(row.log10_gradient)}", f"e + {row.noise:.3g}"
                    )
            parts += [Text(title, style="bold"), table, Text()]
        w = f"W = {self.gain:g}"
        parts += [
            Text(
                "Gradients, Proposition 1: |dL/dx_0| <= |dL/dx_D| (sqrt(d) + h W)^D if |dF/dx| <= W at each step; "
                f"here {w}, and 1 for sqrt(d), as in Eq. (6): sqrt(d) is the Frobenius norm of the identity, 1 its "
                "spectral norm."
            ),
            Text(f"Noise, Proposition 2: e_D <= e + h D W if |F(x') - F(x)| <= W at each step; here {w}."),
            *(Text(f"\n{note}") for note in self.notes),
            Text('\nTo use one: eulernet.patch(model, h="auto"), or h=eulernet.schedules.inverse().'),
        ]
        return Group(*parts)


def suggest_h(model_or_depth: nn.Module | int, *, example_inputs: Any = None, gain: float = 1.0) -> Suggestion:
    """What each rule of `eulernet.schedules` gives for a model, beside the bounds of Propositions 1 and 2.

    The propositions (*Towards Robust ResNet*, Zhang et al., IJCAI 2019) bound how much gradients can grow from the
    last step to the first, (sqrt(d) + h W)^D, and the noise in the output, e + h D W. They are upper bounds:
    `eulernet.diagnose` measures what happens. It is said plainly where a small h is not to be expected to help: in a
    shallow model, and where the branches are zero at initialisation.

    Args:
        model_or_depth: a model, patched or not, which stays as it is; or D, the number of residual steps.
        example_inputs: as for `eulernet.find_steps`.
        gain: W of the propositions, the bound on a branch: 1 if not given.

    Returns:
        `Suggestion`, which prints as a table, and has the numbers in `bounds` and the warnings in `notes`.

    Raises:
        EulernetError: the model has no steps, or an argument is wrong.

    Example:
        >>> import eulernet
        >>> rows = eulernet.suggest_h(54).bounds
        >>> for row in rows:
        ...     print(f"{row.rule}: {row.h[0]:.3g}, gradients x {10**row.log10_gradient:.3g}, noise + {row.noise:.3g}")
        constant(h=1.0): 1, gradients x 1.8e+16, noise + 54
        constant(h=0.1): 0.1, gradients x 172, noise + 5.4
        inverse_sqrt(c=1): 0.136, gradients x 982, noise + 7.35
        inverse(c=1): 0.0185, gradients x 2.69, noise + 1
        decreasing(): 1.44, gradients x 234, noise + 6.43
    """
    gain = positive(gain, "gain", "gain=1.0")
    if isinstance(model_or_depth, nn.Module):
        model = unwrapped(model_or_depth)
        check_model(model, "suggest_h")
        with search(model, example_inputs) as result:
            steps = result.steps
            twice = counted_twice(result, relative_starts(model, result), "eulernet.schedules.inverse()")
        if not len(steps):
            raise EulernetError(
                f"{type(model).__name__} has no residual steps, so there is no h to choose; "
                "print(eulernet.find_steps(model, example_inputs=...)) shows what was seen"
            )
        streams = _streams(steps)
        notes = [*([twice[0].upper() + twice[1:] + "."] if twice else []), *_notes_of_model(model, steps)]
    else:
        what = "suggest_h takes a model or the number of its residual steps, which"
        depth = whole_number(model_or_depth, what, "eulernet.suggest_h(54)", least=1, most=10**6)
        stream = [Step(i, str(i), "", "identity", (), 1, 0, depth, position=i + 1) for i in range(depth)]
        streams = {f"D = {depth}": stream}
        notes = ["Whether the branches are zero at initialisation cannot be told from a depth: pass the model."]
    shallow = [_shallow(len(stream)) for stream in streams.values() if len(stream) <= _SHALLOW]
    return Suggestion(streams, gain, [*shallow, *notes])


def _bounds(rule: Any, stream: list[Step], gain: float) -> Bounds:
    h = tuple(rule(step) for step in stream)
    return Bounds(rule, len(stream), h, sum(math.log10(1 + x * gain) for x in h), sum(x * gain for x in h))


def _streams(steps: Sequence[Step]) -> dict[str, list[Step]]:
    """For each depth D that there is, the largest first: what streams have it, and the D steps of one of them."""
    found = {}
    for depth in sorted({s.depth for s in steps}, reverse=True):
        mine = [s for s in steps if s.depth == depth]
        streams = len({s.stream for s in mine})
        where = mine[0].name if len(mine) == 1 else f"{mine[0].name} to {mine[-1].name}"
        title = f"D = {depth}: {where}" + (f", {streams} streams" if streams > 1 else "")
        one = [s for s in steps if s.stream == mine[0].stream and s.position <= depth]
        first = {s.position: s for s in sorted(one, key=lambda s: (s.position, s.depth == depth))}
        again = [s for s in one for _ in range(s.calls - 1)]  # runs that have no position of their own
        found[title] = [*first.values(), *again][:depth]
    return found


def _shallow(depth: int) -> str:
    return (
        f"D = {depth} is shallow: with 9 steps (ResNet-20 on CIFAR-10) the paper finds all h from 0.1 to 2 equally "
        "good. Expect no benefit from a small h. (The paper's exception: VDCNN-17 on AG-NEWS, 8 steps, best near 0.5.)"
    )


def _notes_of_model(model: nn.Module, steps: Sequence[Step]) -> list[str]:
    if any(p.is_meta for p in model.parameters()):
        return ["Whether the branches are zero at initialisation cannot be told on the meta device."]
    names = list(dict.fromkeys(step.module_name for step in steps))
    modules = dict(model.named_modules())
    holders = {name: modules[name] for name in names if name in modules}
    zero = {name: found for name, m in holders.items() if (found := _zero_scale(m, set(holders.values()))) is not None}
    notes = []
    if zero:
        name, parameter = next(iter(zero.items()))
        example = f"{name}.{parameter}" if name else parameter
        notes.append(
            f"{len(zero)} of {len(names)} blocks have a branch that is zero at initialisation, or nearly ({example}): "
            "h does nothing for them at the start, and then lowers their learning rate. Expect no benefit from a small "
            "h, or initialise otherwise (timm: zero_init_last=False; LayerScale: init_values=1)."
        )
    notes.append(
        "Only zeros in the scales of norms and in LayerScale are seen here; eulernet.diagnose(model, batch) measures "
        "the branches, their gains W and the growth of the gradients."
    )
    return notes


def _zero_scale(module: nn.Module, others: set[nn.Module]) -> str | None:
    """The name of a norm's weight that is zero, or of a LayerScale that is tiny, in a block and not in one inside."""
    pending = [("", module)]
    while pending:
        prefix, current = pending.pop()
        for name, parameter in current.named_parameters(recurse=False):
            scales = isinstance(current, _NORMS) and name == "weight"
            limit = 0.0 if scales else _TINY
            if (scales or _BRANCH_SCALE.search(prefix + name)) and parameter.detach().abs().max() <= limit:
                return prefix + name
        pending.extend((f"{prefix}{n}.", m) for n, m in current.named_children() if m not in others)
    return None


def _name(rule: Any) -> str:
    known = {constant(1.0): "1 (not patched)", inverse_sqrt(): '"auto", inverse_sqrt()', inverse(): "inverse()"}
    return known.get(rule, repr(rule))


def _range(h: Sequence[float]) -> str:
    return f"{h[0]:.3g}" if h[0] == h[-1] else f"{h[0]:.3g} to {h[-1]:.2g}"


def _large(log10: float) -> str:
    return f"{10**log10:.3g}" if log10 < 15 else f"1e{log10:.0f}"
