"""What the options of the commands mean, and what is said where they mean nothing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import typer

from reproductions.presets import PRESETS
from reproductions.trial import Trial


def chosen(trials: list[Trial], only: list[str]) -> list[Trial]:
    """The trials that have one of the values named for each of the fields named."""
    wanted: dict[str, set[str]] = {}
    for choice in only:
        field, _, value = choice.partition("=")
        if not hasattr(trials[0], field):
            raise typer.BadParameter(
                f"a trial has no {field!r}; it has {', '.join(vars(trials[0]))}", param_hint="--only"
            )
        wanted.setdefault(field, set()).add(value)
    found = [t for t in trials if all(_shown(getattr(t, field)) in values for field, values in wanted.items())]
    if not found:
        there = "; ".join(f"{f} is {', '.join(sorted({_shown(getattr(t, f)) for t in trials}))}" for f in wanted)
        raise typer.BadParameter(f"no trial has {' and '.join(only)}: {there}", param_hint="--only")
    return found


def _shown(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def known_preset(preset: str, also: Sequence[str] = ()) -> None:
    """Refuse what is no preset, and none that a study has besides."""
    if preset not in (*PRESETS, *also):
        raise typer.BadParameter(f"{preset!r} is none of {', '.join((*PRESETS, *also))}", param_hint="--preset")


def device_of(name: str) -> torch.device:
    """The device of a name; without one a GPU where there is one."""
    try:
        return torch.empty(0, device=name or ("cuda" if torch.cuda.is_available() else "cpu")).device
    except (AssertionError, RuntimeError) as error:  # torch raises either for a device that is not there
        raise typer.BadParameter(str(error), param_hint="--device") from None
