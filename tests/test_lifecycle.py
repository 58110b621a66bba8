"""The life of a model at random: all public operations in any order, against h kept by hand.

Each sequence is a list of operations; hypothesis makes 300 of them, the same each time. EULERNET_SEQUENCES=5000 tries
as many others.
"""

import copy
import gc
import io
import math
import os
import pickle
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor, nn

import eulernet
from tests.helpers.blocks import Block, Closed, Frozen, Weighted, chain
from tests.helpers.refusals import snapshot

X = torch.linspace(-1, 1, 16).view(2, 8)
SEQUENCES = int(os.environ.get("EULERNET_SEQUENCES", "0"))
FACTORS = st.sampled_from([0.125, 0.25, 0.5, 1.0, 1.5])
BLOCKS = 3


def by_hand(model: Any, hs: list[float], x: Tensor) -> Tensor:
    """What the network computes with these factors, in float64, written out."""
    for block, h in zip(model, hs, strict=True):
        weight = block.f.weight if hasattr(block, "f") else block.weight
        bias = block.f.bias.double() if hasattr(block, "f") else 0.0
        x = x + h * (x @ weight.double().T + bias)
    return x


class Lifecycle(RuleBasedStateMachine):
    """`hs` are the factors, None where the model is not patched; `learned` says whether they are parameters."""

    @initialize(kinds=st.lists(st.sampled_from([Block, Frozen, Closed, Weighted]), min_size=BLOCKS, max_size=BLOCKS))
    def build(self, kinds: list[type[nn.Module]]) -> None:
        self.model: Any = chain(*(kind() for kind in kinds))
        self.kinds = kinds
        self.names = [name for name, _ in self.model.named_parameters()]
        self.hs: list[float | None] = [None] * BLOCKS
        self.learned = False
        self.function: Tensor | None = None

    # ---- what changes

    @rule(h=st.one_of(FACTORS, st.lists(FACTORS, min_size=BLOCKS, max_size=BLOCKS)), learned=st.booleans())
    def patch(self, h: Any, learned: bool) -> None:
        if learned and Closed in self.kinds:
            self.refused(lambda: eulernet.patch(self.model, h, example_inputs=X, trainable=True))
            return
        eulernet.patch(self.model, h, example_inputs=X, trainable=learned)
        self.hs = list(h) if isinstance(h, list) else [h] * BLOCKS
        self.learned = learned

    @rule(which=st.sets(st.integers(0, BLOCKS - 1), min_size=1), h=FACTORS)
    def patch_some(self, which: set[int], h: float) -> None:
        eulernet.patch(self.model, h, example_inputs=X, include=[str(i) for i in which])
        self.hs = [h if i in which else None for i in range(BLOCKS)]
        self.learned = False

    @rule(h=FACTORS)
    def patch_and_preserve(self, h: float) -> None:
        before = self.expected()
        eulernet.patch(self.model, h, example_inputs=X, preserve=True)
        self.hs, self.learned = [h] * BLOCKS, False
        torch.testing.assert_close(self.expected(), before, rtol=1e-4, atol=1e-5)

    @rule()
    def unpatch(self) -> None:
        eulernet.unpatch(self.model)
        self.hs, self.learned = [None] * BLOCKS, False

    @precondition(lambda self: any(self.hs))
    @rule()
    def fold(self) -> None:
        before = self.expected()
        eulernet.fold(self.model, example_inputs=X)
        self.hs, self.learned = [None] * BLOCKS, False
        torch.testing.assert_close(self.expected(), before, rtol=1e-4, atol=1e-5)

    @precondition(lambda self: any(self.hs))
    @rule(h=FACTORS)
    def set_h(self, h: float) -> None:
        eulernet.set_h(self.model, h)
        self.hs = [None if old is None else h for old in self.hs]

    @precondition(lambda self: any(self.hs) and not self.learned)
    @rule(start=FACTORS, end=FACTORS, steps=st.integers(0, 3), on=st.booleans())
    def schedule(self, start: float, end: float, steps: int, on: bool) -> None:
        schedule = eulernet.HScheduler(self.model, start, end, total_steps=2)
        for _ in range(steps):
            schedule.step()
        if on:
            other = eulernet.HScheduler(self.model, 1.0, 1.0, total_steps=5)
            other.load_state_dict(schedule.state_dict())
        h = start + (end - start) * min(steps, 2) / 2
        self.hs = [None if old is None else h for old in self.hs]

    @precondition(lambda self: any(self.hs))
    @rule()
    def restore_from_json(self) -> None:
        steps = eulernet.Steps.from_json(eulernet.steps(self.model).to_json())
        eulernet.unpatch(self.model)
        eulernet.patch(self.model, steps, example_inputs=X)
        if self.learned:  # what it was learned as: the exponential of a number of float32
            self.hs = [None if h is None else torch.tensor(math.log(h)).double().exp().item() for h in self.hs]
        self.learned = False

    @rule(how=st.sampled_from(["deepcopy", "pickle", "save"]))
    def copy(self, how: str) -> None:
        if how == "deepcopy":
            self.model = copy.deepcopy(self.model)
        elif how == "pickle":
            self.model = pickle.loads(pickle.dumps(self.model))
        else:
            file = io.BytesIO()
            torch.save(self.model, file)
            file.seek(0)
            self.model = torch.load(file, weights_only=False)

    @rule(training=st.booleans())
    def train(self, training: bool) -> None:
        self.model.train(training)

    @rule()
    def look(self) -> None:
        assert len(eulernet.find_steps(self.model, example_inputs=X)) == BLOCKS

    # ---- what is refused

    def refused(self, call: Any) -> None:
        before = snapshot(self.model)
        with pytest.raises(eulernet.EulernetError):
            call()
        assert snapshot(self.model) == before

    @rule(h=st.sampled_from([0.0, -1.0, float("nan"), True, "0.1", b"1", [0.5], None]))
    def wrong_h(self, h: Any) -> None:
        self.refused(lambda: eulernet.patch(self.model, h, example_inputs=X))
        self.refused(lambda: eulernet.set_h(self.model, h if any(self.hs) and h != [0.5] else None))

    @rule(name=st.sampled_from(["9", "x.*"]))
    def wrong_pattern(self, name: str) -> None:
        self.refused(lambda: eulernet.patch(self.model, 0.5, example_inputs=X, include=name))

    @precondition(lambda self: not any(self.hs))
    @rule()
    def not_patched(self) -> None:
        for call in (eulernet.steps, eulernet.fold, lambda m: eulernet.set_h(m, 0.5)):
            self.refused(lambda call=call: call(self.model))

    # ---- what holds

    def expected(self) -> Tensor:
        with torch.no_grad():
            return by_hand(self.model, [1.0 if h is None else h for h in self.hs], X.double())

    @invariant()
    def holds(self) -> None:
        patched = [h for h in self.hs if h is not None]
        assert eulernet.is_patched(self.model) is bool(patched)
        if patched:
            assert [step.h for step in eulernet.steps(self.model)] == pytest.approx(
                patched, rel=1e-6 if self.learned else 0
            )
        assert [name for name, _ in self.model.named_parameters() if "log_h" not in name] == self.names
        assert sum("log_h" in name for name in self.model.state_dict()) == self.learned * len(patched)
        for block, kind, h in zip(self.model, self.kinds, self.hs, strict=True):
            assert isinstance(block, kind) and (type(block) is kind) is (h is None)
            assert (h is None) is not any(name.startswith("_euler") for name in vars(block))
        with torch.no_grad():
            torch.testing.assert_close(self.model(X).double(), self.expected(), rtol=1e-4, atol=1e-5)


def test_any_sequence_of_operations_is_what_it_is_by_hand() -> None:
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        Lifecycle,
        settings=settings(
            max_examples=SEQUENCES or 300,
            stateful_step_count=8,
            derandomize=not SEQUENCES,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_memory_stays_level_over_500_cycles() -> None:
    """Objects and tensors, after a garbage collection: what the first cycles make is kept, and no more."""

    def cycle(model: nn.Module, learned: bool) -> None:
        eulernet.patch(model, 0.5, example_inputs=X, trainable=learned)
        eulernet.set_h(model, 0.25)
        eulernet.unpatch(model)

    def count() -> tuple[int, int]:
        gc.collect()
        objects = gc.get_objects()
        return len(objects), sum(issubclass(type(o), Tensor) for o in objects)  # isinstance would ask for __class__

    model = chain(Block())
    for i in range(20):
        cycle(model, learned=bool(i % 2))
    objects, tensors = count()
    for i in range(500):
        cycle(model, learned=bool(i % 2))
    after, tensors_after = count()
    assert tensors_after == tensors
    assert after - objects < 250  # less than one object in two cycles
