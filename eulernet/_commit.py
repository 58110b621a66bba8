"""All or nothing: what is to be changed is prepared, then changed in one short step that is undone where it fails."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

# One commit at a time, and none while h is read to be changed. A forward in another thread does not wait for it.
LOCK = threading.RLock()


class Change(Protocol):
    """Something to be changed."""

    def before(self) -> Callable[[], None]:
        """What puts back the state of now, as often as it is called, whatever of the change was made."""

    def make(self) -> None:
        """Make the change."""


def commit(changes: Sequence[Change]) -> None:
    """Make all of these changes, or none.

    Whatever is raised in between, an interrupt included, what was there before is put back, and it is raised further.
    """
    with LOCK, _disable_current_modes():  # a mode of the caller's would take what is written for something else
        undo = [change.before() for change in changes]  # takes memory, so before anything is changed
        try:
            for change in changes:
                change.make()
        except BaseException:
            while undo:
                with contextlib.suppress(KeyboardInterrupt):  # a second one: what it cut short is done once more
                    undo[-1]()
                    undo.pop()
            raise


@dataclass(frozen=True)
class Set:
    """Attributes of an object get other values."""

    owner: Any
    values: Mapping[str, Any]

    def before(self) -> Callable[[], None]:
        entries = dict(self.owner.__dict__)
        return lambda: put_back(self.owner.__dict__, entries)

    def make(self) -> None:
        self.owner.__dict__.update(self.values)


@dataclass(frozen=True)
class Write:
    """Something is written into a tensor, in place: it stays the same object, for optimisers and for tied modules."""

    tensor: Tensor
    write: Callable[[Tensor], Any]

    def before(self) -> Callable[[], None]:
        values = self.tensor.detach().clone()
        return Write(self.tensor, lambda tensor: tensor.copy_(values)).make

    def make(self) -> None:
        with torch.no_grad():
            self.write(self.tensor)


@contextlib.contextmanager
def surely(undo: Callable[[], None]) -> Iterator[None]:
    """Undo something in the end, twice, so that what cuts it short the first time does not leave it half undone."""
    try:
        try:
            yield
        finally:
            undo()
    finally:
        undo()


def put_back(held: dict[str, Any], before: Mapping[str, Any]) -> None:
    """Give a dictionary, which stays the same object, the entries that it had before, in their order."""
    for name in held.keys() - before.keys():
        del held[name]
    held.update(before)
    if list(held) != list(before):
        for name in before:
            held[name] = held.pop(name)
