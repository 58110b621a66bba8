"""What a user sees of the steps: `Step`, and `Steps`, which prints as a table and goes to JSON and back."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import PurePath
from typing import Any, overload

from eulernet._errors import EulernetError

ROOT = "<root>"


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
    skip: str = "left"
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
            one state) or "long" (the branch runs through other steps; left alone unless `include` names it).
        places: the additions in the source.
        calls: how often it runs in one forward pass.
        stream: the number of its residual stream, the chain from skip to result.
        depth: D, the number of calls in that stream.
        position: l, the place of its first call in that stream, from 1.
        parent: the name of the long step in whose branch it lies, if any.
        h: the step factor; None where the step is not patched.
    """

    index: int
    name: str
    module_class: str
    kind: str
    places: tuple[Place, ...]
    calls: int
    stream: int
    depth: int
    position: int = 1
    parent: str | None = None
    h: float | None = None


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
        unsupported: what was seen and cannot be scaled, one sentence each.
        unreached: modules with parameters that the example input never reached.
        notes: what else is worth knowing, one sentence each.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        *,
        long: Sequence[Step] = (),
        unsupported: Sequence[str] = (),
        unreached: Sequence[str] = (),
        notes: Sequence[str] = (),
    ) -> None:
        self._steps = tuple(steps)
        self.long = tuple(long)
        self.unsupported = tuple(unsupported)
        self.unreached = tuple(unreached)
        self.notes = tuple(notes)

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
            ("seen and not supported", self.unsupported),
            ("modules that the example input never reached", self.unreached),
            ("notes", self.notes),
        )
        for title, lines in listed:
            if lines:
                parts.append(Text(f"\n{title}:", style="bold"))
                parts.extend(Text(f"  {line}") for line in lines)
        return Group(*parts)

    def with_h(self, values: Sequence[float | None]) -> Steps:
        """The same steps with other step factors."""
        steps = [replace(step, h=h) for step, h in zip(self, values, strict=True)]
        return Steps(steps, long=self.long, unsupported=self.unsupported, unreached=self.unreached, notes=self.notes)

    def to_json(self) -> str:
        """All of it as JSON: a `state_dict` does not hold h, so keep this beside it."""
        rest = {"unsupported": self.unsupported, "unreached": self.unreached, "notes": self.notes}
        return json.dumps(
            {"steps": [asdict(s) for s in self], "long": [asdict(s) for s in self.long], **rest}, indent=1
        )

    @classmethod
    def from_json(cls, text: str) -> Steps:
        """The steps that `to_json` wrote; `eulernet.patch(model, h=Steps.from_json(text))` gives a model their h."""
        try:
            data = json.loads(text)
            read = {
                key: [Step(**{**s, "places": tuple(Place(**p) for p in s["places"])}) for s in data[key]]
                for key in ("steps", "long")
            }
            return cls(read["steps"], long=read["long"], **{k: data[k] for k in ("unsupported", "unreached", "notes")})
        except (ValueError, KeyError, TypeError) as error:
            raise EulernetError(f"this is not what Steps.to_json() writes: {type(error).__name__}: {error}") from error


def as_text(table: Any) -> str:
    """What rich draws, without colours, 140 columns wide."""
    from rich.console import Console  # imported where something is shown, so not with eulernet

    text = io.StringIO()
    Console(file=text, width=140, color_system=None, soft_wrap=False).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def _line(step: Step) -> str:
    places = ", ".join(f"{PurePath(p.file).name}:{p.line}" for p in step.places)
    return f"{step.name} ({step.module_class}, {places})"
