"""What a user sees of the steps: `Step`, and `Steps`, which prints as a table and goes to JSON and back."""

from __future__ import annotations

import io
import json
import random
import sys
from collections import Counter
from collections.abc import Sequence
from copy import copy
from dataclasses import asdict, dataclass, replace
from functools import partial
from os import PathLike
from pathlib import Path, PurePath
from types import UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints, overload

from eulernet._errors import EulernetError

T = TypeVar("T")
ROOT = "<root>"
FILE = "eulernet.json"  # beside the weights of a model
StepKind = Literal["identity", "projection", "parallel", "long", "gated"]
LEFT_ALONE: tuple[StepKind, ...] = ("long", "gated")  # unless `include` names them


@dataclass(frozen=True)
class Place:
    """Where an addition stands in the source.

    Attributes:
        file, line, column, end_line, end_column: the expression; lines count from 1, columns (bytes) from 0.
        function: the qualified name of the function that holds it.
        skip: which operand is the skip, "left" or "right".
    """

    file: str
    line: int
    column: int
    function: str
    skip: Literal["left", "right"] = "left"
    end_line: int = 0
    end_column: int = 0


@dataclass(frozen=True)
class Step:
    """A residual step `s + h * F(s)`: an addition (or several that are one step) of one module.

    Attributes:
        index: its number in the order of execution, from 0.
        name: the module's qualified name, with `:0`, `:1` where the module has several steps; `<root>` for the model.
        module_class: the name of the module's class.
        kind: "identity", "projection" (the skip goes through a shape-matching map), "parallel" (several branches of
            one state), "long" (the branch runs through other steps) or "gated" (`(1 - z) * n + z * s`, however it is
            written, which becomes `s + h * (what it was - s)`). Those last two are left alone unless `include` names
            them.
        places: the additions in the source.
        calls: how often it runs in one forward pass.
        stream: the number of its residual stream, the chain from skip to result.
        depth: D, the number of calls in that stream; 0 in a layer of `eulernet.nn` that `patch` has not seen.
        position: l, the place of its first call in that stream, from 1.
        parent: the name of the long step in whose branch it lies, if any.
        h: the step factor; None where the step is not patched.
        module_name: the module's name in `model.named_modules()`, "" for the model itself.
        number: which of the module's steps it is, from 0; None where the module has no other.
        after: of a long or gated step the index of the last step of the other kinds that ended before it first did;
            None where there was none.
    """

    index: int
    name: str
    module_class: str
    kind: StepKind
    places: tuple[Place, ...]
    calls: int
    stream: int
    depth: int
    position: int = 1
    parent: str | None = None
    h: float | None = None
    module_name: str = ""
    number: int | None = None
    after: int | None = None

    def __post_init__(self) -> None:
        """Where only the name is given, as in JSON and pickles from before 0.1.0, the rest of it follows from it."""
        if self.name != step_name(self.module_name, self.number):
            module_name, _, number = self.name.partition(":")
            self.__dict__["module_name"] = "" if module_name == ROOT else module_name
            self.__dict__["number"] = int(number) if number.isdecimal() else None

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update({"module_name": "", "number": None, "after": None} | state)
        self.__post_init__()


def step_name(module_name: str, number: int | None) -> str:
    """`layer1.0` for the one step of a module, `blocks.0:1` for the second of several, `<root>` for the model's own."""
    return (module_name or ROOT) + ("" if number is None else f":{number}")


Reason = Literal[
    "constant operand",  # a bias, a table of positions, a mask: not computed from the model's input
    "position or injected input",  # the branch comes from the skip only through the branches of other steps
    "inside a branch",  # it is part of what a step computes
    "gate or score",  # squashed by a sigmoid, tanh or softmax
    "noise",  # a random draw, spread by what was computed: reparametrisation
    "siblings",  # both were computed from one state, neither from the other
    "resolutions",  # the same, at another resolution
    "no map between",  # one was computed from the other without a convolution, linear map, attention or pooling
    "broadcast",  # what one was computed from is smaller than the sum, and no state
    "what pooling took out",  # x - pool(x)
    "error or variance",  # the square of x - f(x)
    "detached",  # one of them hands on no gradient, as in a straight-through estimator
    "sum of layers",  # x + f(x) + g(f(x)), which none of the layers reads
    "unrelated",  # neither has anything to do with the other
]


@dataclass(frozen=True)
class LeftOut:
    """A sum of two tensors of the model's own data that is no step.

    Attributes:
        module_name, module_class: the module that makes it.
        file, line, function: where it stands.
        reason: why it is no step.
        calls: how often it runs in one forward pass.
        after: the index of the step that ended last before it first ran; None where none had.
    """

    module_name: str
    module_class: str
    file: str
    line: int
    function: str
    reason: Reason
    calls: int
    after: int | None = None


@dataclass(frozen=True)
class Outside:
    """The parameters that still reach the output at h = 0: those outside of all branches.

    Attributes:
        names: the outermost modules (or parameters) all of which lies outside; `layer2-4` stands for three.
        parameters: how many there are.
        of: how many parameters the model read in all.
    """

    names: tuple[str, ...] = ()
    parameters: int = 0
    of: int = 0

    def __str__(self) -> str:
        inside = self.of - self.parameters
        units = (("billion", 1e9), ("million", 1e6), ("thousand", 1e3))
        unit, size = next((unit for unit in units if self.of >= unit[1]), ("", 1.0))
        amount = f"{inside / size:.3g} of {self.of / size:.3g} {unit}".rstrip()
        most = 8 if len(self.names) > 9 else 9
        shown = ", ".join(self.names[:most]) + (f" and {len(self.names) - most} more" if self.names[most:] else "")
        return f"{amount} parameters lie in branches; outside: {shown or 'none'}"


class Steps(Sequence[Step]):
    """The steps of a model, in the order of execution.

    Example:
        >>> import torch, eulernet
        >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> steps = eulernet.find_steps(layer, example_inputs=torch.zeros(2, 5, 8))
        >>> [(step.name, step.kind, step.depth) for step in steps]
        [('<root>:0', 'identity', 2), ('<root>:1', 'identity', 2)]
        >>> eulernet.Steps.from_json(steps.to_json()) == steps
        True

    Attributes:
        long: long steps that are left alone.
        gated: gated updates that are left alone.
        unsupported: what was seen and cannot be scaled, one sentence each.
        unreached: modules with parameters that the example input never reached.
        notes: what else is worth knowing, one sentence each.
        left_out: the sums that are no steps, each with its reason.
        outside: the parameters that still reach the output at h = 0.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        *,
        long: Sequence[Step] = (),
        unsupported: Sequence[str] = (),
        unreached: Sequence[str] = (),
        notes: Sequence[str] = (),
        left_out: Sequence[LeftOut] = (),
        outside: Outside = Outside(),  # frozen
        gated: Sequence[Step] = (),
    ) -> None:
        self._steps = tuple(steps)
        self.long = tuple(long)
        self.gated = tuple(gated)
        self.unsupported = tuple(unsupported)
        self.unreached = tuple(unreached)
        self.notes = tuple(notes)
        self.left_out = tuple(left_out)
        self.outside = outside

    @overload
    def __getitem__(self, index: int) -> Step: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Step, ...]: ...
    def __getitem__(self, index: int | slice) -> Step | tuple[Step, ...]:
        return self._steps[index]

    def __len__(self) -> int:
        return len(self._steps)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Steps) and self.__dict__ == other.__dict__

    def __hash__(self) -> int:
        return hash(self._steps)

    def __setstate__(self, state: dict[str, Any]) -> None:
        since = {"left_out": (), "outside": Outside(), "gated": ()}  # what a pickle of old does not hold
        self.__dict__ = {**since, **state}

    def __repr__(self) -> str:
        return f"<Steps: {len(self)} steps>"

    def __str__(self) -> str:
        return as_text(self)

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, header_style="bold")
        with_h = any(step.h is not None for step in self)
        for column in ("#", "step", "module", "kind", "calls", "stream", "D", *(["h"] if with_h else []), "place"):
            numeric = column in ("#", "calls", "stream", "D", "h")
            table.add_column(column, justify="right" if numeric else "left", overflow="fold")
        for step in self:
            h = [] if not with_h else ["" if step.h is None else f"{step.h:.4g}"]
            place = ", ".join(f"{PurePath(p.file).name}:{p.line}" for p in step.places)
            cells = (str(step.index), step.name, step.module_class, step.kind, str(step.calls), str(step.stream))
            table.add_row(*cells, str(step.depth), *h, place)
        parts: list[Any] = [table] if len(self) else [Text("no steps")]
        listed = (
            ("long steps, left alone (name them in include= to scale them too)", [_line(s) for s in self.long]),
            ("gated updates, left alone (name them in include= to scale them too)", [_line(s) for s in self.gated]),
            ("seen and not supported", self.unsupported),
            ("modules that the example input never reached", self.unreached),
            ("notes", self.notes),
            ("sums that are no steps", self.reasons()),
        )
        for title, lines in listed:
            if lines:
                parts.append(Text(f"\n{title}:", style="bold"))
                parts.extend(Text(f"  {line}") for line in lines)
        if self.outside.of:
            parts.append(Text(f"\n{self.outside}"))
        return Group(*parts)

    def plot(self, path: str | PathLike[str] | None = None, *, title: str | None = None) -> Any:
        """Draw the steps as a map, from the input at the top to the output at the bottom.

        A line is a stream, a station on it a step, with its D and h; an arc is a long step, around those in its branch.
        What repeats is drawn once, in a box that says how often. Grey crosses are the sums that are no steps, with the
        reason: each place in the source once, where it first ran.

        Args:
            path: where the picture goes, with an ending that matplotlib knows (.svg, .png, .pdf); None writes none.
            title: a line above it.

        Returns:
            The `matplotlib.figure.Figure`.

        Raises:
            EulernetError: matplotlib is not installed, or the file's ending or folder is wrong.

        Example:
            >>> import torch, eulernet
            >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            >>> model = eulernet.patch(torch.nn.Sequential(layer, layer), h=0.5, example_inputs=torch.zeros(2, 5, 8))
            >>> figure = eulernet.steps(model).plot(title="two layers")
        """
        from eulernet._plot import draw  # and with it matplotlib, where something is drawn

        return draw(self, path, title)

    def reasons(self) -> list[str]:
        """How many sums are no steps, for each reason."""
        counts: Counter[str] = Counter()
        for sum_ in self.left_out:
            counts[sum_.reason] += sum_.calls
        return [f"{calls} {reason}" for reason, calls in counts.items()]

    def with_h(self, values: Sequence[float | None]) -> Steps:
        """The same steps with other step factors."""
        steps = [replace(step, h=h) for step, h in zip(self, values, strict=True)]
        other = copy(self)
        other._steps = tuple(steps)
        return other

    def to_json(self) -> str:
        """All of it as JSON, to keep beside the weights: see `save`."""
        rest = {"unsupported": self.unsupported, "unreached": self.unreached, "notes": self.notes}
        steps: dict[str, Sequence[Step]] = {"steps": self, "long": self.long, "gated": self.gated}
        entries = {key: [asdict(step) for step in held] for key, held in steps.items()}
        entries["left_out"] = [asdict(sum_) for sum_ in self.left_out]
        return json.dumps({**entries, **rest, "outside": asdict(self.outside)}, indent=1)

    def save(self, path: str | PathLike[str]) -> Path:
        """Write `to_json()` to a file, or beside the weights in a folder, as `eulernet.json`; returns where.

        `eulernet.patch(model, h=Path(FOLDER))` patches a model again from either.
        """
        if not isinstance(path, str | PathLike):
            raise EulernetError(f'path is no path, but a {type(path).__name__}; for example steps.save("{FILE}")')
        file = Path(path) / FILE if Path(path).is_dir() else Path(path)
        if not file.parent.is_dir():
            raise EulernetError(f"path={str(path)!r}: there is no folder {file.parent}")
        file.write_text(self.to_json())
        return file

    @classmethod
    def from_json(cls, text: str) -> Steps:
        """The steps that `to_json` wrote; `eulernet.patch(model, h=Steps.from_json(text))` gives a model their h.

        Raises:
            EulernetError: the text is not what `to_json` writes: an entry is missing, not known, given twice or of
                another type, or a number is out of its range.
        """
        try:
            data = json.loads(text, object_pairs_hook=_without_repeats)
            if not isinstance(data, dict):
                raise ValueError(f"it holds a {type(data).__name__}, not an object")
            read = {key: _entries(Step, data[key], key) for key in ("steps", "long")}
            read["gated"] = _entries(Step, data.get("gated", []), "gated")
            _check_distinct([*read["steps"], *read["long"], *read["gated"]])
            sums = _entries(LeftOut, data.get("left_out", []), "left_out")
            outside = _entry(Outside, data.get("outside", {}), "outside")
            lines = {key: data[key] for key in ("unsupported", "unreached", "notes")}
            for key, value in lines.items():
                if not _fits(value, tuple[str, ...]):
                    raise ValueError(f"{key} is {value!r:.60}, not a list of sentences")
            steps = partial(cls, read["steps"], long=read["long"], gated=read["gated"])
            return steps(left_out=sums, outside=outside, **lines)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise EulernetError(
                f"this is not what Steps.to_json() writes: {type(error).__name__}: {str(error)[:300]}. Write it with "
                "text = eulernet.steps(model).to_json(), and read that: eulernet.Steps.from_json(text)"
            ) from error


# ---- what comes from outside


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        raise ValueError(f"an entry is given twice among {', '.join(key for key, _ in pairs)}")
    return entries


def _entries(cls: type[T], data: Any, where: str) -> list[T]:
    if not isinstance(data, list):
        raise ValueError(f"{where} is {data!r:.60}, not a list")
    return [_entry(cls, entry, f"{where}[{i}]") for i, entry in enumerate(data)]


def _entry(cls: type[T], data: Any, where: str) -> T:
    """An entry of JSON as one of the classes above, each field checked against its annotation."""
    if not isinstance(data, dict):
        raise ValueError(f"{where} is {data!r:.60}, not an object")
    hints = get_type_hints(cls)
    entries = dict(data)
    if cls is Step:
        entries["places"] = tuple(_entries(Place, data.get("places"), f"{where}, places"))
    for name, value in entries.items():
        if name not in hints:
            raise ValueError(f"{where} has an entry {name!r}, which is not known")
        if not _fits(value, hints[name]):
            raise ValueError(f"{where}: {name} is {value!r:.60}")
        if isinstance(value, list):
            entries[name] = tuple(value)
    try:
        return cls(**entries)
    except TypeError as error:
        raise ValueError(f"{where}: {error}") from error


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type. Of numbers, whole ones count something, and others are step factors."""
    parts = get_args(hint)
    if get_origin(hint) is Literal:
        return isinstance(value, str) and value in parts
    if get_origin(hint) is UnionType:
        return any(_fits(value, part) for part in parts)
    if get_origin(hint) is tuple:
        return isinstance(value, list | tuple) and all(_fits(item, parts[0]) for item in value)
    if hint is int:
        return type(value) is int and 0 <= value < 2**63
    if hint is float:
        return type(value) in (int, float) and 0 < value <= sys.float_info.max
    return isinstance(value, hint)


def _check_distinct(steps: Sequence[Step]) -> None:
    for attribute in ("name", "index"):
        counts = Counter(getattr(step, attribute) for step in steps)
        if twice := [value for value, count in counts.items() if count > 1]:
            raise ValueError(f"several steps have the {attribute} {twice[0]!r:.60}")


def as_text(table: Any) -> str:
    """What rich draws, without colours, 140 columns wide."""
    state = random.getstate()
    from rich.console import Console  # where something is shown, so not with eulernet; it draws a number when imported

    random.setstate(state)
    text = io.StringIO()
    Console(file=text, width=140, color_system=None, soft_wrap=False).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def _line(step: Step) -> str:
    places = ", ".join(f"{PurePath(p.file).name}:{p.line}" for p in step.places)
    return f"{step.name} ({step.module_class}, {places})"
