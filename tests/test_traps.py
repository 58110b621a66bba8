"""A net of small models with one trap each (traps/): what is found, and what is computed."""

import copy
import importlib
import inspect
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import eulernet
from tests.helpers.trapped import assert_identical, both_modes, build, every_trap, run
from tests.traps import TRAPS, Trap, calls
from tests.traps.calls import BranchBegunByTheCaller, Dense, FreeFunction
from tests.traps.classes import Registered, RegisteredChild, RegistryGenericAbstract
from tests.traps.places import TwoOnALine
from tests.traps.steps import ParallelStatements, TwoTowers

# A model with a long step is patched here as any other; test_what_patch_warns_of asserts the warning.
pytestmark = pytest.mark.filterwarnings("ignore:the stream from the model:eulernet.EulernetWarning")


def patched(model: Trap, inputs: tuple[Any, ...], h: float | Sequence[float]) -> Trap:
    """A patched copy; a sequence of factors is in the order of ``expected``, however the steps are numbered."""
    model = copy.deepcopy(model)
    if not isinstance(h, float):
        values = dict(zip((step.name for step in model.expected), h, strict=True))
        h = [values[step.name] for step in eulernet.find_steps(model, example_inputs=inputs)]
    return eulernet.patch(model, h, example_inputs=inputs)


@every_trap
def test_the_expected_steps_are_found(cls: type[Trap]) -> None:
    model, inputs = build(cls)
    found = eulernet.find_steps(model, example_inputs=inputs)
    seen = [(step.name, step.kind, step.calls, step.depth, len(step.places)) for step in found]
    assert seen == [tuple(expected) for expected in model.expected]
    assert [step.index for step in found] == list(range(len(found)))
    assert tuple(step.name for step in found.long) == model.long
    assert all(step.kind == "long" for step in found.long)
    assert found.unsupported == ()


@both_modes
@every_trap
def test_a_factor_for_each_step_gives_the_reference(cls: type[Trap], training: bool) -> None:
    model, inputs = build(cls, torch.float64, training)
    factors = [0.3 + 0.1 * i for i in range(len(model.expected))]
    # Copies, since batch norm in training changes what it ran on.
    outputs, gradients = run(patched(model, inputs, factors), inputs)
    other = copy.deepcopy(model)
    references, reference_gradients = run(other, inputs, other.reference, h=factors)
    # In place into a bfloat16 branch, h * F is rounded to bfloat16 as well as the sum: one unit in the last place.
    tolerance = {torch.float64: 1e-12, torch.bfloat16: torch.finfo(torch.bfloat16).eps}
    for x, y in zip((*outputs, *gradients), (*references, *reference_gradients), strict=True):
        assert (x is None) == (y is None)
        if y is not None:
            torch.testing.assert_close(x, y, rtol=tolerance[y.dtype], atol=tolerance[y.dtype])
    originals, _ = run(copy.deepcopy(model), inputs)
    assert any((x - y).abs().max() > 1e-4 for x, y in zip(outputs, originals, strict=True)), "h had no effect"


@both_modes
@every_trap
def test_h_of_one_is_bit_identical(cls: type[Trap], training: bool) -> None:
    model, inputs = build(cls, training=training)
    one = patched(model, inputs, 1.0)
    other = copy.deepcopy(model)
    for actual, expected in zip(run(one, inputs), run(other, inputs), strict=True):
        assert_identical(actual, expected)
    assert_identical(list(one.buffers()), list(other.buffers()))


@every_trap
def test_h_of_one_is_bit_identical_without_grad(cls: type[Trap]) -> None:
    model, inputs = build(cls)
    one = patched(model, inputs, 1.0)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            actual, expected = tree_leaves(one(*inputs)), tree_leaves(model(*inputs))
        if cls.fused_inference:
            torch.testing.assert_close(actual, expected)  # another kernel, so equal up to rounding
        else:
            assert_identical(actual, expected)


@pytest.mark.parametrize("cls", [cls for cls in TRAPS if len(cls.shape) == 4], ids=lambda cls: cls.__name__)
@both_modes
def test_h_of_one_is_bit_identical_in_channels_last(cls: type[Trap], training: bool) -> None:
    model, inputs = build(cls, training=training)
    model = model.to(memory_format=torch.channels_last)
    inputs = tuple(x.contiguous(memory_format=torch.channels_last) for x in inputs)
    one = patched(model, inputs, 1.0)
    for actual, expected in zip(run(one, inputs), run(copy.deepcopy(model), inputs), strict=True):
        assert_identical(actual, expected)


@both_modes
@pytest.mark.parametrize("cls", [cls for cls in TRAPS if cls.autocast], ids=lambda cls: cls.__name__)
def test_h_of_one_is_bit_identical_under_autocast(cls: type[Trap], training: bool) -> None:
    model, inputs = build(cls, training=training)
    one = patched(model, inputs, 1.0)
    with torch.autocast("cpu", torch.bfloat16):
        for actual, expected in zip(run(one, inputs), run(copy.deepcopy(model), inputs), strict=True):
            assert_identical(actual, expected)


@every_trap
def test_unpatch_leaves_nothing(cls: type[Trap]) -> None:
    model, inputs = build(cls)

    def state() -> list[tuple[Any, ...]]:
        return [
            (name, type(module), sorted(vars(module)), [id(value) for value in vars(module).values()])
            for name, module in model.named_modules()
        ]

    before, parameters = state(), {name: id(p) for name, p in model.named_parameters()}
    outputs, gradients = run(model, inputs)
    steps = eulernet.find_steps(model, example_inputs=inputs)
    assert eulernet.patch(model, 0.3, example_inputs=inputs) is model
    assert eulernet.is_patched(model)
    assert [step.name for step in eulernet.steps(model)] == [step.name for step in steps]
    assert {step.h for step in eulernet.steps(model)} == {0.3}
    assert eulernet.unpatch(model) is model
    assert not eulernet.is_patched(model)
    assert state() == before
    assert {name: id(p) for name, p in model.named_parameters()} == parameters
    again, gradients_again = run(model, inputs)
    assert_identical(again, outputs)
    assert_identical(gradients_again, gradients)


# ------------------------------------------------------------------------------------------- beyond the common checks


@pytest.mark.parametrize("cls", [cls for cls in TRAPS if cls.long], ids=lambda cls: cls.__name__)
def test_long_skips_are_scaled_where_include_names_them(cls: type[Trap]) -> None:
    model, inputs = build(cls, torch.float64)
    names = [step.name for step in model.expected] + list(model.long)
    factors = {name: 0.3 + 0.1 * i for i, name in enumerate(names)}
    other = copy.deepcopy(model)
    eulernet.patch(model, lambda step: factors[step.name], example_inputs=inputs, include=names)
    assert sorted(step.name for step in eulernet.steps(model)) == sorted(names)
    assert {step.name for step in eulernet.steps(model) if step.kind == "long"} == set(model.long)
    actual, expected = run(model, inputs), run(other, inputs, other.reference, h=list(factors.values()))
    for x, y in zip(tree_leaves(actual), tree_leaves(expected), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


def test_two_towers_are_two_streams() -> None:
    model, inputs = build(TwoTowers)
    found = eulernet.find_steps(model, example_inputs=inputs)
    streams = {step.name.split(".")[0]: {s.stream for s in found if s.name.startswith(step.name[:4])} for step in found}
    assert len(streams["image"]) == len(streams["text"]) == 1
    assert streams["image"].isdisjoint(streams["text"])


def test_places_are_the_lines_of_the_additions() -> None:
    model, inputs = build(ParallelStatements)
    (step,) = eulernet.find_steps(model, example_inputs=inputs)
    lines, first = inspect.getsourcelines(ParallelStatements.forward)
    assert [lines[place.line - first].strip() for place in step.places] == ["out = x + self.a(y)", "out += self.b(y)"]
    assert {place.file for place in step.places} == {inspect.getfile(ParallelStatements)}
    assert all(place.function.endswith("forward") for place in step.places)
    assert step.module_class.endswith("ParallelStatements")


def test_nobody_elses_function_or_class_changes() -> None:
    model, inputs = build(FreeFunction)
    before = {name: value for name, value in vars(calls).items()}
    forwards = {cls: dict(vars(cls)) for cls in (FreeFunction, FreeFunction.Part, FreeFunction.Embedding)}
    eulernet.patch(model, 0.3, example_inputs=inputs)
    assert {name: value for name, value in vars(calls).items()} == before
    assert {cls: dict(vars(cls)) for cls in forwards} == forwards


def test_registries_of_subclasses_hear_nothing() -> None:
    model, inputs = build(RegistryGenericAbstract)
    known = list(Registered.known)
    eulernet.patch(model, 0.3, example_inputs=inputs)
    assert Registered.known == known
    assert isinstance(model.block, RegisteredChild)


def test_blocks_of_one_class_share_one_patched_class() -> None:
    model, inputs = build(BranchBegunByTheCaller)
    eulernet.patch(model, [0.1, 0.2, 0.3, 0.4], example_inputs=inputs)
    outputs = [layer.output for layer in model.layers]
    assert type(outputs[0]) is type(outputs[1]) is not Dense
    again, _ = build(BranchBegunByTheCaller)
    eulernet.patch(again, 0.5, example_inputs=inputs)
    assert type(again.layers[0].output) is type(outputs[0])
    for attribute in ("__name__", "__qualname__", "__module__"):
        assert getattr(type(outputs[0]), attribute) == getattr(Dense, attribute)


def test_one_object_of_a_class_is_patched_and_the_other_is_not() -> None:
    model, inputs = build(BranchBegunByTheCaller, torch.float64)
    eulernet.patch(model, 0.3, example_inputs=inputs, include="layers.1.output")
    other, _ = build(BranchBegunByTheCaller, torch.float64)
    expected, _ = run(other, inputs, other.reference, h=[1.0, 1.0, 1.0, 0.3])
    torch.testing.assert_close(model(*inputs), expected[0], rtol=1e-12, atol=1e-12)
    assert type(model.layers[0].output) is Dense


def test_one_of_two_steps_of_a_module_is_patched() -> None:
    model, inputs = build(TwoOnALine, torch.float64)
    expected, _ = run(model, inputs, model.reference, h=[1.0, 0.3])
    eulernet.patch(model, 0.3, example_inputs=inputs, include="<root>:1")
    torch.testing.assert_close(model(*inputs), expected[0], rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_encoder_with_padding_keeps_its_nested_path() -> None:
    """With a padding mask the encoder hands nested tensors to its layers, whose Python additions do not know them."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(2, 5, 8)
    padding = torch.arange(5).expand(2, 5) >= torch.tensor([[3], [5]])
    eulernet.patch(copied := copy.deepcopy(model), 1.0, example_inputs={"src": x, "src_key_padding_mask": padding})
    with torch.no_grad():
        expected = model(x, src_key_padding_mask=padding)
        actual = copied(x, src_key_padding_mask=padding)
        torch.testing.assert_close(actual[~padding], expected[~padding])
        eulernet.set_h(copied, 0.3)
        assert (copied(x, src_key_padding_mask=padding) - expected)[~padding].abs().max() > 1e-3
        eulernet.unpatch(copied)
        assert torch.equal(copied(x, src_key_padding_mask=padding), expected)


SOURCE = """
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 6)

    def forward(self, x):
        größe = x
        return größe + self.a(größe)  # ±
"""


# ---------------------------------------------------------------------------------------------- files as they come


@pytest.mark.parametrize(
    "encode",
    [
        lambda text: text.encode(),
        lambda text: text.replace("\n", "\r\n").encode(),
        lambda text: text.replace("    ", "\t").encode(),
        lambda text: text.encode("utf-8-sig"),
        lambda text: ("# -*- coding: latin-1 -*-" + text).encode("latin-1"),
        lambda text: ('"""A docstring."""\nfrom __future__ import annotations' + text).encode(),
        lambda text: ("\f\n" + text.rstrip("\n")).encode(),
        lambda text: text.replace("größe\n", "größe; x = '''\n  two lines'''\n").encode(),
    ],
    ids=["plain", "crlf", "tabs", "bom", "latin-1", "future", "form-feed", "triple-quotes"],
)
def test_source_files_of_all_kinds_are_patched(encode: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"source_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_bytes(encode(SOURCE))
    monkeypatch.syspath_prepend(tmp_path)
    block = importlib.import_module(name).Block()
    x = torch.randn(2, 6)
    eulernet.patch(block, 0.3, example_inputs=x)
    torch.testing.assert_close(block(x), x + 0.3 * block.a(x))


def test_the_traceback_shows_the_models_own_line() -> None:
    model, inputs = build(ParallelStatements)
    eulernet.patch(model, 0.3, example_inputs=inputs)
    model.b = nn.Linear(2, 2)
    with pytest.raises(RuntimeError) as caught:
        model(*inputs)
    shown = "".join(traceback.format_exception(caught.value))
    assert "out += self.b(y)" in shown and inspect.getfile(ParallelStatements) in shown


@pytest.mark.filterwarnings("default::eulernet.EulernetWarning")
@every_trap
def test_what_patch_warns_of(cls: type[Trap]) -> None:
    """A stream from input to output that keeps a sum at h = 1 is named, and nothing else is where all is scaled."""
    model, inputs = build(cls)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        eulernet.patch(model, 0.5, example_inputs=inputs)
    said = "".join(str(w.message) for w in caught if issubclass(w.category, eulernet.EulernetWarning))
    assert ("keeps h = 1 at" in said) == bool(cls.long)
    with warnings.catch_warnings():
        warnings.simplefilter("error", eulernet.EulernetWarning)
        if not said:
            eulernet.patch(model, 0.5, example_inputs=inputs)
