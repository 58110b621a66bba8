"""Steps as a picture: a strip map, read from the input at the top to the output at the bottom.

A stream is a line, a step a station on it, a long step an arc around the steps in its branch. What repeats, such as the
blocks of a stage, is drawn once, in a box that says how often. Each kind has a shape of its own, for print in grey.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eulernet._errors import EulernetError

if TYPE_CHECKING:
    from eulernet._step import LeftOut, Step, Steps

_LOOKS = {  # marker, its size in points, its colour, what it means
    "identity": ("o", 8.5, "#1f6fb4", "identity: the skip is untouched"),
    "projection": ("s", 7.5, "#d9822b", "projection: the skip is mapped to fit"),
    "parallel": ("^", 9.0, "#8a4fa8", "parallel: several branches of one state"),
    "long": ("D", 7.0, "#c03030", "long: its branch runs through other steps"),
    "gated": ("v", 8.5, "#2f8f5b", "gated: it says itself how far it goes"),
    "no step": ("x", 5.5, "#767676", "a sum that is no step, and why"),
    "not supported": ("X", 8.0, "#1a1a1a", "a step that cannot be scaled"),
}
_OTHER = ("h", 9.0, "#2f8f5b", "")  # a kind without a look of its own
_GREY, _INK, _BOX = "#767676", "#1a1a1a", "#eceef2"
_SIZE = 8.5  # of the text, in points
_ROW, _LANE, _GAP, _MARGIN = 0.24, 0.24, 0.2, 0.15  # in inches
_LONGEST_UNIT = 24  # stations of what may repeat
_MOST = 12  # rows of sums that are no steps


def new_figure(width: float, height: float, path: str | PathLike[str] | None, **options: Any) -> Any:
    """An empty figure, in inches, once it is known that matplotlib is there and can write to `path`."""
    try:
        from matplotlib import backend_bases, figure
    except ModuleNotFoundError as error:
        raise EulernetError("matplotlib, which draws, is not installed; run: pip install matplotlib") from error
    if path is not None:
        target = Path(path)
        known = backend_bases.FigureCanvasBase.get_supported_filetypes()
        if target.suffix.removeprefix(".").lower() not in known:
            raise EulernetError(
                f"{target.name!r} does not end in a format that matplotlib writes ({', '.join(sorted(known))}); "
                f"write {target.with_suffix('.svg').name!r}"
            )
        if not target.parent.is_dir():
            raise EulernetError(f"there is no folder {target.parent} for {target.name}; make it first")
    return figure.Figure(figsize=(width, height), **options)


# ---- names that repeat


def _parts(name: str) -> list[str]:
    """`blocks.3.mlp:0` to `["blocks.", "3", ".mlp:", "0", ""]`: the numbers stand at the odd places."""
    return re.split(r"(\d+)", name)


def together(names: Iterable[str]) -> str:
    """`blocks.0`, `blocks.1`, `blocks.2`, `blocks.5` as `blocks.{0-2,5}`; the first of names that are built otherwise.

    >>> together(["layer1.0", "layer1.1", "layer1.2", "layer1.5"])
    'layer1.{0-2,5}'
    >>> together(["h.0.attn", "h.0.mlp", "h.1.attn", "h.1.mlp"])
    'h.{0-1}.attn and 1 more'
    """
    groups: dict[tuple[str, ...], list[list[str]]] = {}
    for parts in map(_parts, names):
        groups.setdefault(tuple(parts[::2]), []).append(parts)
    first, *rest = groups.values()
    columns = [list(dict.fromkeys(column)) for column in zip(*first, strict=True)]
    name = "".join(column[0] if len(column) == 1 else f"{{{','.join(ranges(map(int, column)))}}}" for column in columns)
    return name + (f" and {len(rest)} more" if rest else "")


def ranges(numbers: Iterable[int]) -> list[str]:
    """Whole numbers, those that follow one another together.

    >>> ranges([0, 1, 2, 5])
    ['0-2', '5']
    """
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return [f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]


# ---- what the picture has


@dataclass
class Row:
    """One line of the picture: a station, which stands for one step or more, or sums that are none.

    Attributes:
        looks: which of the looks it has: the kind of its steps, "no step", "not supported".
        text: why it is no step; nothing for a station.
        after: where it is no step, the index of the step that it follows.
        lane: of a station, from the left.
    """

    looks: str
    name: str
    steps: list[Step] = field(default_factory=list)
    text: str = ""
    after: int | None = None
    lane: int = 0


@dataclass
class Box:
    """Rows `first` to `last`, drawn once and there `times` times."""

    first: int
    last: int
    times: int


@dataclass
class Line:
    """A stream in its lane, or the arc of a long step: from row `first` to row `last`."""

    first: int
    last: int
    lane: int


@dataclass
class Picture:
    """The rows from top to bottom, the boxes around them, the streams, the arcs; an arc ends at a row of its own."""

    rows: list[Row]
    boxes: list[Box]
    streams: list[Line]
    arcs: list[Line]


def picture(steps: Steps) -> Picture:
    """What there is to be drawn."""
    unit = _whole([*steps, *steps.long, *steps.gated])
    rows = [Row(row[0].kind, together(step.name for step in row), row) for row in unit.rows]
    boxes = unit.boxes
    for row in reversed(_without_step(steps.left_out)):
        at = next((i + 1 for i, r in enumerate(rows) if row.after in {step.index for step in r.steps}), 0)
        rows.insert(at, row)
        for box in boxes:
            box.first += box.first >= at
            box.last += box.last >= at
    for line in steps.unsupported:
        name, _, reason = line.partition("): ")
        rows.append(Row("not supported", name.rpartition(" (")[0] or name, text=reason))
    return Picture(rows, boxes, _streams(rows), _arcs(rows))


@dataclass
class _Unit:
    """What may repeat: the steps of each of its rows, and the boxes in it."""

    rows: list[list[Step]]
    boxes: list[Box] = field(default_factory=list)


def _whole(steps: list[Step]) -> _Unit:
    """The steps in the order of execution, with what repeats drawn once: the shortest units first."""
    units = [_Unit([[step]]) for step in sorted(steps, key=lambda step: _end(step, steps))]
    for size in range(1, _LONGEST_UNIT + 1):
        units = _folded(units, size)
    return _joined(units)


def _end(step: Step, steps: list[Step]) -> tuple[float, int]:
    """When a step ends: a long one after the last step of its branch, a gated one after the step that ended before."""
    inside = [_end(other, steps) for other in steps if step.kind == "long" and other.parent == step.name]
    before = -1 if step.after is None else step.after
    at = before + 0.5 if step.kind in ("long", "gated") else step.index  # those have numbers behind all others
    last, level = max(inside, default=(at, -1))
    return last, level + 1


def _folded(units: list[_Unit], size: int) -> list[_Unit]:
    """Each run of equal sequences of `size` units as one."""
    folded: list[_Unit] = []
    while units:
        times = _times(units, size)
        if times > 1:
            repeats = [_joined(units[i * size : (i + 1) * size]) for i in range(times)]
            rows = [[step for row in same for step in row] for same in zip(*(r.rows for r in repeats), strict=True)]
            folded.append(_Unit(rows, [*repeats[0].boxes, Box(0, len(rows) - 1, times)]))
        else:
            folded.append(units[0])
        units = units[size * times if times > 1 else 1 :]
    return folded


def _joined(units: Sequence[_Unit]) -> _Unit:
    joined = _Unit([])
    for unit in units:
        joined.boxes += [Box(b.first + len(joined.rows), b.last + len(joined.rows), b.times) for b in unit.boxes]
        joined.rows += unit.rows
    return joined


def _times(units: Sequence[_Unit], size: int) -> int:
    """How often the first `size` units repeat from the start on."""
    first = _joined(units[:size])
    times, varying = 1, None
    while len(units) >= (times + 1) * size:
        found = _differing(first, _joined(units[times * size : (times + 1) * size]))
        if found is None or varying not in (None, found):
            break
        times, varying = times + 1, found
    return times


def _differing(one: _Unit, other: _Unit) -> tuple[int, ...] | None:
    """For each row the number in the names that tells two units apart; None where more does."""
    if one.boxes != other.boxes or len(one.rows) != len(other.rows):
        return None
    places = []
    numbers: dict[object, str] = {}
    for mine, theirs in zip(one.rows, other.rows, strict=True):
        a, b = (_parts(row[0].name) for row in (mine, theirs))
        differ = [i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y]
        if len(a) != len(b) or len(differ) != 1 or _alike(mine) != _alike(theirs):
            return None
        (place,) = differ
        if place % 2 == 0 or a[place - 1][-1:] not in ("", ".", ":"):  # layer1 and layer2 are no repetition
            return None
        # Branches 0 and 1, then 2 and 3, are four and no pair that is there twice.
        if numbers.setdefault((_alike(mine), *a[::2], place), a[place]) != a[place]:
            return None
        places.append(place)
    streams = [{step.stream for row in unit.rows for step in row} for unit in (one, other)]
    return tuple(places) if streams[0] & streams[1] else None


def _alike(row: list[Step]) -> Any:
    """What two rows have in common that are drawn as one."""
    step = row[0]
    return len(row), step.module_class, step.kind, step.calls, step.depth, tuple((p.file, p.line) for p in step.places)


def _without_step(sums: Iterable[LeftOut]) -> list[Row]:
    """The sums that are no steps, one row for each place in the source and reason."""
    groups: dict[object, list[LeftOut]] = {}
    for left in sums:
        groups.setdefault((left.module_class, left.file, left.line, left.reason), []).append(left)
    rows = []
    for group in list(groups.values())[: _MOST if len(groups) > _MOST + 1 else None]:
        count = sum(left.calls for left in group)
        text = group[0].reason + (f", {count} times" if count > 1 else "")
        rows.append(Row("no step", together(left.module_name for left in group), text=text, after=group[0].after))
    if len(rows) < len(groups):
        count = sum(left.calls for group in list(groups.values())[_MOST:] for left in group)
        rows.append(Row("no step", f"{count} more sums", text="listed by eulernet inspect --all", after=rows[-1].after))
    return rows


def _streams(rows: list[Row]) -> list[Line]:
    """Each stream in the first lane that is free."""
    spans: dict[int, list[int]] = {}
    for at, row in enumerate(rows):
        for step in row.steps:
            if step.kind != "long":
                spans.setdefault(step.stream, []).append(at)
    lines: list[Line] = []
    for span in sorted({tuple(dict.fromkeys(span)) for span in spans.values()}):  # the streams of a box are drawn once
        taken = {line.lane for line in lines if line.last >= span[0]}
        line = Line(span[0], span[-1], next(lane for lane in range(len(lines) + 1) if lane not in taken))
        lines.append(line)
        for at in span:
            rows[at].lane = line.lane
    return lines


def _arcs(rows: list[Row]) -> list[Line]:
    """For each long step from the first row of its branch to its own, in a lane left of what it goes around."""
    arcs: list[Line] = []
    for last, row in enumerate(rows):
        names = {step.name for step in row.steps if step.kind == "long"}
        if names:
            inside = [at for at, other in enumerate(rows) if any(step.parent in names for step in other.steps)]
            first = min([*inside, *(arc.first for arc in arcs if arc.last in inside)], default=last)
            arcs.append(Line(first, last, 1 + max((arc.lane for arc in arcs if arc.last >= first), default=-1)))
            row.lane = rows[first].lane
    return arcs


# ---- how it is drawn


def draw(steps: Steps, path: str | PathLike[str] | None = None, title: str | None = None) -> Any:
    """The figure of `Steps.plot`."""
    new_figure(1, 1, path)  # what is wrong is said before anything is drawn
    sheet = _Sheet(picture(steps), title, str(steps.outside) if steps.outside.of else "")
    figure = new_figure(sheet.width, sheet.height, path)
    sheet.axes = figure.add_axes((0, 0, 1, 1), xlim=(0, sheet.width), ylim=(sheet.height, 0))
    sheet.axes.set_axis_off()
    sheet.draw()
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


class _Sheet:
    """The measures of a picture, in inches, from its rows and the widths of its texts."""

    axes: Any

    def __init__(self, shown: Picture, title: str | None, outside: str) -> None:
        self.shown, self.title = shown, title
        self.with_h = any(step.h is not None for row in shown.rows for step in row.steps)
        self.table = [("step", "module", "D", "h" if self.with_h else ""), *map(self.cells, shown.rows)]
        self.left = _MARGIN + _LANE * (0.5 + max((arc.lane + 1 for arc in shown.arcs), default=0))
        lanes = max((line.lane + 1 for line in shown.streams), default=1)
        self.mark = self.left + _LANE * lanes  # where the sums that are no steps stand, beside the streams
        self.columns = [self.mark + _LANE * any(row.text for row in shown.rows) - 0.06]
        widths = [max(map(_width, column)) for column in zip(*self.table, strict=True)]
        for width in widths:
            self.columns.append(self.columns[-1] + (width + _GAP if width else 0))
        wide = max((self.columns[1] + _width(row.text) + _GAP for row in shown.rows if row.text), default=0)
        self.right = max(self.columns.pop(), wide)  # where the boxes end, the inner ones first
        nested = max((self.level(box) + 1 for box in shown.boxes), default=0)
        self.looks = [look for look in _LOOKS if any(row.looks == look for row in shown.rows)]
        self.width = max(self.right + 0.5 * nested + _MARGIN, 4.0)
        self.below = textwrap.wrap(outside, max(int(15.5 * (self.width - 2 * _MARGIN)), 40))
        self.top = _MARGIN + (0.3 if title else 0) + _ROW
        self.height = self.y(len(shown.rows)) + _ROW * (len(self.looks) + 0.8 * len(self.below) + 0.2) + _MARGIN

    def cells(self, row: Row) -> tuple[str, str, str, str]:
        """The name, the class, D and h of a station; a long step that is left alone has h = 1."""
        if not row.steps:
            return row.name, "", "", ""
        hs = [1.0 if step.h is None else step.h for step in row.steps] if self.with_h else []
        ends = sorted({min(hs), max(hs)}, reverse=hs[0] > hs[-1]) if hs else []
        step = row.steps[0]
        name = row.name + (f" ({step.calls} calls)" if step.calls > 1 else "")
        return name, step.module_class, str(step.depth), " to ".join(f"{h:.3g}" for h in ends)

    def y(self, row: float) -> float:
        return self.top + _ROW * (row + 0.5)

    def x(self, lane: float) -> float:
        return self.left + _LANE * lane

    def level(self, box: Box) -> int:
        """How many boxes lie inside one another in it."""
        inner = [b for b in self.shown.boxes if b is not box and box.first <= b.first and b.last <= box.last]
        return 1 + max(map(self.level, inner)) if inner else 0

    def write(self, x: float, y: float, text: str, **style: Any) -> None:
        style = {"size": _SIZE, "color": _INK, **style}
        self.axes.text(x, y, text, va="center_baseline", parse_math=False, **style)

    def draw(self) -> None:
        if self.title:
            self.write(_MARGIN, _MARGIN + 0.1, self.title, size=_SIZE + 2, weight="bold")
        for x, text in zip(self.columns, self.table[0], strict=True):
            self.write(x, self.y(-1), text, color=_GREY)
        for box in sorted(self.shown.boxes, key=self.level, reverse=True):
            self.draw_box(box)
        for line in self.shown.streams:
            x, start, end = self.x(line.lane), self.y(line.first - 0.42), self.y(line.last + 0.42)
            self.axes.plot([x, x], [start, end], color=_INK, linewidth=2, solid_capstyle="butt", gid="stream")
        for arc in self.shown.arcs:
            self.draw_arc(arc)
        for at, row in enumerate(self.shown.rows):
            self.draw_row(at, row)
        self.draw_legend()

    def draw_row(self, at: int, row: Row) -> None:
        beside = row.looks in ("no step", "not supported")
        self.draw_marker(
            row.looks, self.mark if beside else self.x(row.lane), self.y(at), gid=row.looks if beside else "station"
        )
        cells = [row.name, row.text] if beside else self.table[at + 1]
        for number, (x, text) in enumerate(zip(self.columns, cells, strict=False)):
            color = _GREY if row.looks == "no step" or number in (1, 2) else _INK
            self.write(x, self.y(at), text, color=color)

    def draw_marker(self, looks: str, x: float, y: float, **style: Any) -> None:
        marker, size, color, _ = _LOOKS.get(looks, _OTHER)
        self.axes.plot([x], [y], marker, markersize=size, color=color, zorder=5, **style)

    def draw_box(self, box: Box) -> None:
        from matplotlib.patches import FancyBboxPatch

        level = self.level(box)
        x, y, end = self.left - 0.12 - 0.04 * level, self.y(box.first - 0.46), self.right + 0.5 * level + 0.4
        size = (end - x, self.y(box.last + 0.46) - y)
        style = "round,pad=0,rounding_size=0.06"
        self.axes.add_patch(
            FancyBboxPatch((x, y), *size, boxstyle=style, facecolor=_BOX, edgecolor="#c4c8d0", linewidth=0.6, gid="box")
        )
        self.write(
            end - 0.38, self.y((box.first + box.last) / 2), f"\N{MULTIPLICATION SIGN} {box.times}", weight="bold"
        )

    def draw_arc(self, arc: Line) -> None:
        from matplotlib.patches import PathPatch
        from matplotlib.path import Path as Curve

        x, out = self.x(self.shown.rows[arc.last].lane), self.left - _LANE * (arc.lane + 1)
        start, end = self.y(arc.first - 0.5), self.y(arc.last)
        turn = min(0.12, (end - start) / 2)
        points = [(x, start), (out, start), (out, start + turn), (out, end - turn), (out, end), (x, end)]
        codes = [Curve.MOVETO, Curve.CURVE3, Curve.CURVE3, Curve.LINETO, Curve.CURVE3, Curve.CURVE3]
        color = _LOOKS["long"][2]
        self.axes.add_patch(PathPatch(Curve(points, codes), fill=False, edgecolor=color, linewidth=1.4, gid="arc"))
        self.axes.plot([x, x], [start, end], color=color, linewidth=0.8, zorder=1)

    def draw_legend(self) -> None:
        y = self.y(len(self.shown.rows) + 0.3)
        for looks in self.looks:
            self.draw_marker(looks, self.left, y, gid="legend")
            self.write(self.columns[0], y, _LOOKS[looks][3], color=_GREY)
            y += _ROW
        for line in self.below:
            self.write(_MARGIN, y + 0.08, line)
            y += 0.8 * _ROW


def _width(text: str) -> float:
    """In inches."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextToPath

    return TextToPath().get_text_width_height_descent(text, FontProperties(size=_SIZE), ismath=False)[0] / 72
