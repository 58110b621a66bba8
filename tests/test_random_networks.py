"""The steps of randomly generated networks are found, and patching scales them and nothing else.

`tests/helpers/random_networks/` generates the networks. Continuous integration runs 200 of them, always the same; for
thousands, and for others:

    EULERNET_RANDOM_NETWORKS=5000 EULERNET_RANDOM_SEED=1 pytest tests/test_random_networks.py
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, note, seed, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import eulernet
from tests.helpers.random_networks import (
    FEATURES,
    LEFT_ALONE,
    KnownStep,
    RandomNetwork,
    imported,
    random_input,
    random_networks,
    randomize,
    set_factors,
)

# A network whose batch norm has run counts as trained; here h is meant to change it.
# Long steps are left alone here, of which patch warns (test_traps.py).
pytestmark = pytest.mark.filterwarnings(
    "ignore:Network seems to be trained:eulernet.EulernetWarning",
    "ignore:the stream from the model:eulernet.EulernetWarning",
)

NETWORKS = int(os.environ.get("EULERNET_RANDOM_NETWORKS", "200"))
SEED = int(os.environ.get("EULERNET_RANDOM_SEED", "0"))
PARTS = 4  # that several workers can share

NETWORK = random_networks()
LEFT = NETWORK.filter(lambda it: len(it.steps) > 1 and any(step.kind in LEFT_ALONE for step in it.steps))

POWERS_OF_TWO = (0.5, 0.25, 2.0, 0.125)
"""Factors that scale without rounding in any dtype, so that every order of scaling and adding gives the same bits."""


def for_random_networks(
    check: Callable[[RandomNetwork], None],
    part: int,
    networks: st.SearchStrategy[RandomNetwork] = NETWORK,
    share: float = 1,
) -> None:
    """Run the check on this part's share of the networks; a failing network is shrunk and its source shown."""
    run = settings(
        max_examples=int(NETWORKS / PARTS / share),
        deadline=None,
        database=None,
        report_multiple_bugs=False,
        suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
    )
    seed(SEED * PARTS + part)(run(given(networks)(check)))()


@dataclass
class Built:
    """A network, its twin with the same parameters, and an input."""

    network: RandomNetwork
    model: nn.Module
    twin: nn.Module
    inputs: Tensor
    file: Path

    def __post_init__(self) -> None:
        self.start = [buffer.clone() for buffer in self.model.buffers()]

    def run(self, model: nn.Module, train: bool = False) -> list[Tensor | None]:
        """The output, and in train mode the gradients of the input and of every parameter, from one start and seed."""
        for buffer, value in zip(model.buffers(), self.start, strict=True):
            buffer.copy_(value)
        model.train(train).zero_grad()
        inputs = self.inputs.clone().requires_grad_(train)
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.network.autocast), torch.set_grad_enabled(train):
            output = model(inputs)
        if not train:
            return [output]
        output.double().square().sum().backward()
        return [output.detach(), inputs.grad, *(parameter.grad for parameter in model.parameters())]

    @contextmanager
    def in_float64(self) -> Iterator[None]:
        """Both networks and the input in float64, in which a gradient that cancels out is no larger than the rounding.

        In float32 that of a bias before a norm, which is zero, was off by a thousandth.
        """
        inputs = self.inputs
        try:
            for network in (self.model, self.twin):
                network.zero_grad()  # gradients that were returned are not converted with the parameters
                network.double()
            self.inputs = inputs.double()
            yield
        finally:
            self.inputs = inputs
            for network in (self.model, self.twin):
                network.to(inputs.dtype)


@contextmanager
def built(network: RandomNetwork, folder: Path) -> Iterator[Built]:
    note(network.source)
    with imported(network.source, folder) as module, imported(network.twin, folder) as twin_module:
        model = randomize(module.Network().to(network.dtype)).eval()
        twin = twin_module.Network().to(network.dtype).eval()
        twin.load_state_dict(model.state_dict())
        yield Built(network, model, twin, random_input(network), Path(module.__file__ or ""))


def assert_same_bits(actual: list[Tensor | None], expected: list[Tensor | None]) -> None:
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        if a is None or b is None:
            assert a is b
        else:
            assert (a.dtype, a.stride()) == (b.dtype, b.stride())
            assert torch.equal(a, b), f"differs by up to {(a - b).abs().max()}"


def assert_close(actual: list[Tensor | None], expected: list[Tensor | None]) -> None:
    """Equal but for the rounding of one more multiplication in each step, which the layers after it amplify."""
    for a, b in zip(actual, expected, strict=True):
        if a is None or b is None:
            assert a is b
        else:
            torch.testing.assert_close(a, b, rtol=0.0, atol=1e-9 * max(1.0, float(b.abs().max())))


def assert_known(steps: Iterable[eulernet.Step], built: Built, known: Iterable[KnownStep]) -> None:
    """The steps are those that the generator knows, at the lines that it marked."""
    lines = built.file.read_text().splitlines()
    parents = {step.name: step.parent and step.parent.partition(":")[0] for step in steps}  # the generator's: modules
    found = {step.name: (step.kind, step.calls, len(step.places), parents[step.name]) for step in steps}
    assert found == {step.name: (step.kind, step.calls, step.places, step.parent) for step in known}
    depths = {step.name: step.depth for step in steps if step.kind not in LEFT_ALONE}
    assert depths == {step.name: step.depth for step in known if step.kind not in LEFT_ALONE}
    for step in steps:
        for place in step.places:
            if Path(place.file) == built.file:
                assert lines[place.line - 1].endswith("# step")


def known_factors(network: RandomNetwork, h: float | None = None, *, with_long: bool = False) -> dict[KnownStep, float]:
    """A factor for each step: h, or powers of two in turn; long and gated ones keep 1 unless they are wanted."""
    return {
        step: 1.0 if step.kind in LEFT_ALONE and not with_long else h or POWERS_OF_TWO[i % len(POWERS_OF_TWO)]
        for i, step in enumerate(network.steps)
    }


def by_name(factors: dict[KnownStep, float]) -> Callable[[eulernet.Step], float]:
    names = {step.name: factor for step, factor in factors.items()}
    return lambda step: names[step.name]


@pytest.mark.parametrize("part", range(PARTS))
def test_generator_agrees_with_itself(part: int, tmp_path: Path) -> None:
    """At h = 1 the twin is the network, bit by bit; at h = 0.3 it is not, so it can tell right from wrong."""
    differs: Counter[bool] = Counter()

    def check(network: RandomNetwork) -> None:
        with built(network, tmp_path) as it:
            for train in (False, True):
                assert_same_bits(it.run(it.twin, train), it.run(it.model, train))
            if network.steps:
                set_factors(it.twin, known_factors(network, 0.3, with_long=True))
                output, scaled = *it.run(it.model), *it.run(it.twin)
                assert output is not None and scaled is not None
                differs[not torch.equal(output, scaled)] += 1

    for_random_networks(check, part, share=2)
    # A branch may end in a ReLU that is zero everywhere.
    assert differs[False] < 0.05 * differs[True]


@pytest.mark.skipif(NETWORKS < 200, reason="fewer networks need not have everything")
def test_the_generator_makes_many_kinds() -> None:
    """Four thousand networks, made and not run, have between them everything that the generator can build.

    The rarest choice is made in one of 400.
    """
    seen: set[str] = set()
    for part in range(PARTS):
        for_random_networks(lambda network: seen.update(network.features), part, share=NETWORKS / 4000)
    assert seen == FEATURES


@pytest.mark.parametrize("part", range(PARTS))
def test_steps_and_patched_output(part: int, tmp_path: Path) -> None:
    """The steps are those that were built in; patched, the network is its twin; at h = 1 and unpatched, itself."""

    def check(network: RandomNetwork) -> None:
        with built(network, tmp_path) as it:
            model, twin = it.model, it.twin
            original = {train: it.run(model, train) for train in (False, True)}
            before = [(name, type(module), set(vars(module))) for name, module in model.named_modules()]
            parameters = [id(parameter) for parameter in model.parameters()]

            if all(step.kind == "gated" for step in network.steps):
                said = "is gated" if network.steps else "no residual step was found"
                with pytest.raises(eulernet.EulernetError, match=said):
                    eulernet.patch(model, h=0.3, example_inputs=it.inputs)
                return

            assert eulernet.patch(model, h=0.3, example_inputs=it.inputs) is model
            assert_known(eulernet.steps(model), it, [s for s in network.steps if s.kind not in LEFT_ALONE])
            if network.exact:
                set_factors(twin, known_factors(network, 0.3))
                with it.in_float64():
                    for train in (False, True):
                        assert_close(it.run(model, train), it.run(twin, train))

            factors = known_factors(network)
            set_factors(twin, factors)
            eulernet.set_h(model, by_name(factors))
            assert_same_bits(it.run(model), it.run(twin))

            eulernet.set_h(model, 1.0)
            for train in (False, True):
                assert_same_bits(it.run(model, train), original[train])

            eulernet.unpatch(model)
            assert not eulernet.is_patched(model)
            assert [(name, type(module), set(vars(module))) for name, module in model.named_modules()] == before
            assert [id(parameter) for parameter in model.parameters()] == parameters
            assert_same_bits(it.run(model), original[False])

    for_random_networks(check, part)


@pytest.mark.parametrize("part", range(PARTS))
def test_long_steps_and_selections_give_the_reference(part: int, tmp_path: Path) -> None:
    """A dry run reports the long steps; named, they are scaled as well; an excluded step is not."""

    def check(network: RandomNetwork) -> None:
        with built(network, tmp_path) as it:
            model, twin = it.model, it.twin
            found = eulernet.find_steps(model, example_inputs=it.inputs)
            assert_known([*found, *found.long, *found.gated], it, network.steps)
            for kind, steps in (("long", found.long), ("gated", found.gated)):
                assert {step.name for step in steps} == {step.name for step in network.steps if step.kind == kind}
            assert found.unsupported == found.unreached == found.notes == ()
            assert not eulernet.is_patched(model)

            *kept, excluded = network.steps
            factors = known_factors(network, with_long=True) | {excluded: 1.0}
            set_factors(twin, factors)
            eulernet.patch(
                model,
                h=by_name(factors),
                example_inputs=it.inputs,
                include=[step.name for step in network.steps],
                exclude=lambda step: step.name == excluded.name,
            )
            assert {step.name for step in eulernet.steps(model)} == {step.name for step in kept}
            assert_same_bits(it.run(model), it.run(twin))

    for_random_networks(check, part, LEFT, share=8)
