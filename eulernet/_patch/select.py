"""Which steps, and which h for each."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from os import PathLike
from typing import Any, Literal, TypeVar

from torch import nn

from eulernet._checks import brief, positive
from eulernet._errors import EulernetError, EulernetWarning
from eulernet._step import LEFT_ALONE, ROOT, Step, Steps

T = TypeVar("T")
Pattern = str
_NUMBERED = re.compile(r"(.*?)(?::([\d*?!\[\]-]*))?", re.DOTALL)  # what stands before a colon and a pattern of numbers
# Which steps: a pattern on names, a class of modules, a predicate, or several of these; None for what is the default.
Selector = Pattern | type | Callable[[Step], bool] | Iterable["Selector"] | None
# What `patch` takes as h.
Checkpoint = PathLike[str] | Mapping[str, Any]  # a folder, a file, or a state dict
HLike = float | Literal["auto"] | Sequence[float] | Mapping[str, float] | Callable[[Step], float] | Steps | Checkpoint


def matches(pattern: str, name: str, number: int | None = None) -> bool:
    """Whether a pattern names a module: component by component, and all below what it names.

    Where a number follows a colon, it names the step of that number in a module, and nothing below it.

    Example:
        >>> matches("layer1", "layer1.0"), matches("layer1.*", "layer10.0"), matches("*.0", "layer1.0", 1)
        (True, False, True)
        >>> matches("layer1.0:1", "layer1.0", 1), matches("layer1:1", "layer1.0", 1)
        (True, False)
    """
    pattern, wanted = _NUMBERED.fullmatch(pattern).groups()  # type: ignore[union-attr]  # it matches all
    if wanted and not fnmatchcase("" if number is None else str(number), wanted):
        return False
    names, patterns = name.split("."), pattern.split(".")
    short_enough = len(patterns) == len(names) if wanted else len(patterns) <= len(names)
    return short_enough and all(fnmatchcase(n, p) for n, p in zip(names, patterns, strict=False))


def _names_step(pattern: str, step: Step) -> bool:
    return matches(pattern, step.module_name or ROOT, step.number)


def select(
    steps: Sequence[Step], modules: Sequence[nn.Module], include: Selector, exclude: Selector, h: Any
) -> list[Step]:
    """The steps that `include` and `exclude` leave; long and gated ones only where `include` names them.

    Without either, `Steps` as `h` restore the selection that they were made with.
    """
    if include is None and exclude is None and (named := names_given(h, steps)):
        return [s for s in steps if s.name in named]
    by_default = [s for s in steps if s.kind not in LEFT_ALONE]
    chosen = by_default if include is None else which(steps, modules, include, "include")
    dropped = {s.index for s in which(steps, modules, exclude, "exclude")} if exclude is not None else set()
    kept = [s for s in chosen if s.index not in dropped]
    if not kept and include is None and exclude is None:
        raise EulernetError(
            f"all that was found, {_names(steps)}, is {' or '.join(dict.fromkeys(s.kind for s in steps))}: long steps, "
            "whose branches run through other sums, and gated updates are left alone unless include= names them: "
            'eulernet.patch(model, h, include="*")'
        )
    if not kept:
        raise EulernetError(
            f"include={brief(include)} and exclude={brief(exclude)} leave no step of {len(steps)}. The steps are: "
            f"{_names(steps)}"
        )
    return kept


def names_given(h: Any, steps: Sequence[Step]) -> set[str]:
    """The steps that `Steps` as `h` have values for, all of them steps of the model; none for other `h`."""
    named = {s.name for s in h if s.h is not None} if isinstance(h, Steps) else set()
    unknown = sorted(named - {s.name for s in steps})
    if unknown:
        raise EulernetError(
            f"h=Steps has values for {_list(unknown)}, which are no steps of this model. The steps are: {_names(steps)}"
        )
    return named


def _listed(selector: Any) -> list[Any] | None:
    try:
        return list(selector)
    except Exception:  # what iterates over nothing, or fails at it
        return None


def which(steps: Sequence[Step], modules: Sequence[nn.Module], selector: Selector, argument: str) -> list[Step]:
    """The steps that `include` or `exclude` names."""
    if isinstance(selector, nn.Module):
        names = [s.module_name or ROOT for s, m in zip(steps, modules, strict=True) if m is selector]
        name = names[0] if names else type(selector).__name__
        given = repr(name) if names else name
        raise EulernetError(
            f"{argument} is a module, {type(selector).__name__}(...), not its name, its class or a predicate: write "
            f"{argument}={given}"
        )
    if isinstance(selector, (str, type)) or callable(selector):
        selectors: list[Any] | None = [selector]
    else:
        selectors = _listed(selector)
    if selectors is None:
        raise EulernetError(
            f"{argument}={brief(selector)} is no pattern, module class, predicate on a step, or list of these; "
            f'for example {argument}="layer1" or {argument}=lambda step: step.calls == 1'
        )
    chosen: set[int] = set()
    for one in selectors:
        found = {s.index for s, m in zip(steps, modules, strict=True) if _is_meant(one, s, m, argument)}
        if not found and not (callable(one) and not isinstance(one, type)):
            raise EulernetError(f"{argument}={_shown(one)} matches no step. The steps are: {_names(steps)}")
        chosen |= found
    return [s for s in steps if s.index in chosen]


def leave_out(wrong: Sequence[Step], refused: dict[int, str], hs: dict[int, float], include: Selector) -> None:
    """Take steps that cannot be scaled out of those that are; an error where `include` names one, or none is left."""
    given = [include] if isinstance(include, str) else list(include) if isinstance(include, list | tuple | set) else []
    for step in wrong:
        if step.name in given or (step.module_name or ROOT) in given or hs.keys() <= refused.keys():
            raise EulernetError(
                f"{step.name} ({step.module_class}): {refused[step.index]} Or leave it out: "
                f"eulernet.patch(model, ..., exclude={step.name!r})"
            )
    for step in wrong:
        del hs[step.index]


def _is_meant(selector: Any, step: Step, module: nn.Module, argument: str) -> bool:
    if isinstance(selector, str):
        return _names_step(selector, step)
    if isinstance(selector, type):
        return isinstance(module, selector)
    if callable(selector) and not isinstance(selector, nn.Module):
        example = f"it is called with one Step and says whether it is meant, {argument}=lambda step: step.calls == 1"
        return _called(lambda step: bool(selector(step)), step, f"{argument}={_shown(selector)}", example)
    raise EulernetError(
        f"{argument}: {brief(selector)} is no pattern, module class or predicate on a step; for example "
        f'{argument}=["layer1", torch.nn.TransformerEncoderLayer]'
    )


def _called(rule: Callable[[Step], T], step: Step, what: str, example: str) -> T:
    """What a function that the caller gave says of a step."""
    try:
        return rule(step)
    except EulernetError:
        raise
    except Exception as error:
        raise EulernetError(f"{what} failed on {step.name} ({type(error).__name__}: {error}); {example}") from error


def values(h: Any, steps: Sequence[Step]) -> list[float]:
    """The step factor of each of the selected steps, checked."""
    if isinstance(h, str):
        from eulernet.schedules import inverse_sqrt  # which needs the patched steps, and they need this

        if h != "auto":
            raise EulernetError(
                f'h={h!r}: the one word that h may be is "auto", 1 / sqrt(D). Else it is a positive number, a '
                "sequence, a mapping, or a rule such as eulernet.schedules.inverse(); for example h=0.1"
            )
        h = inverse_sqrt()
    if isinstance(h, Steps):
        known = {s.name: s.h for s in h}
        missing = [s.name for s in steps if known.get(s.name) is None]
        if missing:
            raise EulernetError(
                f"h=Steps has no value for {_list(missing)}; it has values for "
                f"{_list([n for n, v in known.items() if v])}"
            )
        return [_checked(known[s.name], s.name) for s in steps]
    if isinstance(h, Mapping):
        return _from_mapping(h, steps)
    if getattr(h, "ndim", 0) == 1 and hasattr(h, "__array__") and len(h) > 1:  # of NumPy or torch
        h = h.tolist()
    if isinstance(h, Sequence) and not isinstance(h, (str, bytes, bytearray, memoryview)):
        if len(h) != len(steps):
            raise EulernetError(
                f"h has {len(h)} values, the model has {len(steps)} steps: {_names(steps)}. "
                f"Pass one number for all, or a sequence of {len(steps)}."
            )
        return [_checked(value, s.name) for value, s in zip(h, steps, strict=True)]
    if isinstance(h, type):
        raise EulernetError(
            f"h={h.__name__} is a class, not a rule: make one of it, as in eulernet.schedules.inverse()"
        )
    if callable(h) and not isinstance(h, nn.Module):
        unknown = [s.name for s in steps if s.depth == 0]
        if unknown:
            raise EulernetError(
                f"h: a rule needs the depth of {_list(unknown)}, which nobody has traced yet: layers of eulernet.nn. "
                'Once for the whole model: eulernet.patch(model, h="auto", example_inputs=...)'
            )
        example = "it is called with one Step and returns its h, h=lambda step: 1 / step.depth"
        return [_checked(_called(h, s, f"h={_shown(h)}", example), s.name) for s in steps]
    value = _checked(h, None)
    return [value] * len(steps)


_UNMATCHED = object()


def _from_mapping(h: Mapping[Any, Any], steps: Sequence[Step]) -> list[float]:
    for pattern in h:
        if not isinstance(pattern, str):
            raise EulernetError(
                f'h: the keys of the mapping are patterns on step names, like "layer1.*", not {brief(pattern)}'
            )
        if not any(_names_step(pattern, s) for s in steps):
            raise EulernetError(f"h: the pattern {pattern!r} matches no step. The steps are: {_names(steps)}")
    found = [next((v for p, v in h.items() if _names_step(p, s)), _UNMATCHED) for s in steps]
    unmatched = [s.name for s, v in zip(steps, found, strict=True) if v is _UNMATCHED]
    if unmatched:
        warnings.warn(
            f'h: no pattern matches {_list(unmatched)}, which get h = 1. Add "*": value as the last entry to give them '
            "another one.",
            EulernetWarning,
            stacklevel=4,
        )
    return [1.0 if v is _UNMATCHED else _checked(v, s.name) for s, v in zip(steps, found, strict=True)]


def _checked(value: Any, name: str | None) -> float:
    return positive(value, "h" if name is None else f"h of {name}", "h=0.1")


def _shown(selector: Any) -> str:
    return selector.__qualname__ if isinstance(selector, type) else brief(selector)


def _names(steps: Sequence[Step]) -> str:
    return _list([s.name for s in steps])


def _list(names: Sequence[str], most: int = 8) -> str:
    shown = ", ".join(names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "") or ROOT
