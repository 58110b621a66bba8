"""What the callbacks of all trainers do: patch, move h with the trainer's own count of steps, measure, save."""

from __future__ import annotations

from typing import Any

from torch import nn

from eulernet._patch.patch import is_patched, patch, steps
from eulernet._patch.select import HLike
from eulernet._run.patched import bound
from eulernet._tune.scheduler import HScheduler
from eulernet._tune.watch import watch


class Run:
    """The h of one training, which is a function of the number of optimiser steps: so a resumed run goes on rightly."""

    def __init__(self, h: HLike, end: HLike | None, kind: Any, options: dict[str, Any]) -> None:
        self.h, self.end, self.kind, self.options = h, end, kind, options
        self.schedule: HScheduler | None = None
        self.log: watch | None = None

    def patch(self, model: nn.Module) -> None:
        """A model that is patched already stays so."""
        if not is_patched(model):
            patch(model, self.h, **self.options)
        if self.end is not None:  # weights of any h may be loaded: where the training is says which it is
            for _, _, factor in bound(model, "patch"):
                factor.__dict__["scheduled"] = True

    def begin(self, model: nn.Module, step: int, total_steps: int, every: int) -> None:
        if self.end is not None:
            self.schedule = HScheduler(model, self.h, self.end, total_steps=total_steps, kind=self.kind)
            self.at(step)
        self.log = watch(model, layers=None, every=max(1, every)).__enter__()

    def at(self, step: int) -> None:
        """Where the training is."""
        if self.schedule is not None:
            self.schedule.load_state_dict({**self.schedule.state_dict(), "last_step": step})

    def measure(self) -> None:
        """Call it between backward and the optimiser's step."""
        if self.log is not None:
            self.log.step()

    def shown(self, model: nn.Module) -> dict[str, float]:
        """What to log: h, once where all are equal, and the last sizes of steps."""
        hs = {step.name: step.h for step in steps(model) if step.h is not None}
        one = {"h": next(iter(hs.values()))} if len(set(hs.values())) == 1 else {f"h/{n}": h for n, h in hs.items()}
        records = self.log.records if self.log is not None else []
        sizes = records[-1].get("step_size", {}) if records else {}
        return {**one, **{f"step_size/{name}": float(size) for name, size in sizes.items()}}

    def end_(self) -> None:
        if self.log is not None:
            self.log.__exit__(None, None, None)
            self.log = None
