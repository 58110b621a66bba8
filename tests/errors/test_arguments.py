"""What is said of wrong inputs, patterns and values of h, and that nothing has changed."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import eulernet
from eulernet import EulernetError, EulernetWarning
from tests.helpers.plain import Block, Net, X
from tests.helpers.refusals import refused, snapshot

# -------------------------------------------------------------------------------------------------------------- no step


def test_a_model_without_steps_is_refused() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
    refused(model, lambda: eulernet.patch(model, 0.1, example_inputs=X), r"(?i)no (residual )?steps?", "Sequential")
    assert len(eulernet.find_steps(model, example_inputs=X)) == 0


def test_where_only_a_long_step_is_found_it_is_named() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = Block()

        def forward(self, x: Tensor) -> Tensor:
            return x + self.body(x)

    model = Outer()
    error = refused(model, lambda: eulernet.patch(model, 0.1, example_inputs=X, exclude="body"), "exclude")
    assert "body" in str(error)


@pytest.mark.parametrize("function", [eulernet.patch, eulernet.find_steps])
def test_a_missing_example_input_is_asked_for(function: Callable[..., Any]) -> None:
    model = Net()
    refused(
        model,
        lambda: function(model),
        r"eulernet\.(patch|find_steps)\(model,.*example_inputs=",
        "Net",
        r"(?i)example",
    )


@pytest.mark.parametrize("inputs", ["1,3,224,224", 3, object()], ids=["str", "int", "object"])
def test_example_inputs_of_a_wrong_type_are_refused(inputs: Any) -> None:
    model = Net()
    refused(
        model,
        lambda: eulernet.patch(model, example_inputs=inputs),
        "example_inputs",
        type(inputs).__name__,
        "tensor",
        "tuple",
        "dict",
    )


@pytest.mark.parametrize("model", ["resnet50", Net, lambda x: x], ids=["name", "class", "function"])
@pytest.mark.parametrize("function", [eulernet.patch, eulernet.find_steps])
def test_what_is_not_a_module_is_refused(function: Callable[..., Any], model: Any) -> None:
    with pytest.raises(EulernetError, match=r"nn\.Module"):
        function(model, example_inputs=X)


# ------------------------------------------------------------------------------------------------------------- patterns


@pytest.mark.parametrize(
    "arguments",
    [
        {"include": "stages.*"},
        {"include": ["layer.0", "stages.*"]},
        {"exclude": "stages.*"},
        {"exclude": ["stages.*", Block]},
    ],
    ids=["include", "one-of-two", "exclude", "one-of-two-exclude"],
)
def test_a_pattern_that_matches_nothing_is_refused(arguments: dict[str, Any]) -> None:
    """The message names the pattern, the argument, and steps that there are."""
    model = Net()
    refused(
        model,
        lambda: eulernet.patch(model, 0.1, example_inputs=X, **arguments),
        re.escape("stages.*"),
        next(iter(arguments)),
        r"layer\.0",
    )


def test_a_pattern_matches_components_and_not_prefixes() -> None:
    model = Net()
    eulernet.patch(model, 0.1, example_inputs=X, include="layer.1")
    assert [step.name for step in eulernet.steps(model)] == ["layer.1"]
    eulernet.patch(model, 0.1, example_inputs=X, include="layer.1*")
    assert [step.name for step in eulernet.steps(model)] == ["layer.1", "layer.10"]
    eulernet.patch(model, 0.1, example_inputs=X, include="layer")
    assert [step.name for step in eulernet.steps(model)] == ["layer.0", "layer.1", "layer.10"]
    refused(model, lambda: eulernet.patch(model, 0.1, example_inputs=X, include="lay"), "'lay'")


def test_a_class_and_a_predicate_that_match_nothing_are_refused() -> None:
    model = Net()
    refused(model, lambda: eulernet.patch(model, example_inputs=X, include=nn.Conv2d), "include", "Conv2d")
    refused(model, lambda: eulernet.patch(model, example_inputs=X, include=lambda step: False), "include")


def test_a_selector_of_a_wrong_type_is_refused() -> None:
    model = Net()
    refused(model, lambda: eulernet.patch(model, example_inputs=X, include=3), "include", "3", "pattern", "class")
    refused(model, lambda: eulernet.patch(model, example_inputs=X, exclude=[0.5]), "exclude", "0.5")


def test_excluding_everything_is_refused() -> None:
    """Not the words of "no step": there are steps, and the selection leaves none."""
    model = Net()
    error = refused(model, lambda: eulernet.patch(model, example_inputs=X, exclude=Block), "exclude", r"\b3\b")
    assert not re.search(r"(?i)no residual step (was )?found", str(error))


NOT_A_FACTOR = {
    "nan": float("nan"),
    "infinite": float("inf"),
    "negative": -0.1,
    "zero": 0,
    "zero-float": 0.0,
    "too-large": 10**400,
    "string": "0.1",
    "none": None,
    "bool": True,
    "complex": 0.1j,
    "object": object(),
}


# -------------------------------------------------------------------------------------------------------------------- h


def spoil(model: nn.Module, function: str) -> Callable[[Any], Any]:
    """`patch` of a plain model or `set_h` of a patched one, as a function of h."""
    if function == "patch":
        return lambda h: eulernet.patch(model, h, example_inputs=X)
    eulernet.patch(model, 0.5, example_inputs=X)
    return lambda h: eulernet.set_h(model, h)


@pytest.mark.parametrize("function", ["patch", "set_h"])
@pytest.mark.parametrize("value", NOT_A_FACTOR.values(), ids=NOT_A_FACTOR.keys())
def test_an_h_that_is_not_a_positive_number_is_refused(value: Any, function: str) -> None:
    model = Net()
    call = spoil(model, function)
    output = model(X)
    refused(model, lambda: call(value), r"\bh\b", "positive")
    if isinstance(value, (int, float)):
        refused(model, lambda: call(value), re.escape(repr(value)[:70]))
    assert torch.equal(model(X), output)


@pytest.mark.parametrize("function", ["patch", "set_h"])
@pytest.mark.parametrize("value", [float("nan"), -1.0, 0.0, "x", None], ids=["nan", "negative", "zero", "str", "none"])
@pytest.mark.parametrize("form", ["sequence", "mapping", "callable"])
def test_one_bad_value_among_good_ones_is_refused(form: str, value: Any, function: str) -> None:
    """The message names the step that the value is for; no step gets its factor."""
    model = Net()
    call = spoil(model, function)
    output = model(X)
    h = {
        "sequence": [0.1, value, 0.1],
        "mapping": {"layer.1": value, "*": 0.1},
        "callable": lambda step: value if step.name == "layer.1" else 0.1,
    }[form]
    refused(model, lambda: call(h), r"layer\.1\b", "positive")
    assert torch.equal(model(X), output)


@pytest.mark.parametrize("function", ["patch", "set_h"])
@pytest.mark.parametrize("h", [[0.1], [0.1] * 4, []], ids=["one", "four", "none"])
def test_a_sequence_of_the_wrong_length_is_refused(h: Any, function: str) -> None:
    """It says how many steps there are, and how many values came."""
    model = Net()
    call = spoil(model, function)
    refused(model, lambda: call(h), rf"\b{len(h)}\b", r"\b3 (selected )?steps\b")


@pytest.mark.parametrize("function", ["patch", "set_h"])
def test_a_mapping_with_a_pattern_that_matches_nothing_is_refused(function: str) -> None:
    model = Net()
    call = spoil(model, function)
    refused(model, lambda: call({"layer.*": 0.1, "stages.*": 0.2}), re.escape("stages.*"), r"layer\.0")


@pytest.mark.parametrize("function", ["patch", "set_h"])
def test_a_mapping_says_what_unmatched_steps_get(function: str) -> None:
    model = Net()
    call = spoil(model, function)
    with pytest.warns(EulernetWarning, match=r"layer\.0(.|\n)*\b1\b"):
        call({"layer.1*": 0.25})
    assert {step.name: step.h for step in eulernet.steps(model)} == {"layer.0": 1.0, "layer.1": 0.25, "layer.10": 0.25}


def test_a_mapping_takes_the_first_match() -> None:
    model = Net()
    eulernet.patch(model, {"layer.10": 0.5, "layer": 0.25}, example_inputs=X)
    assert [step.h for step in eulernet.steps(model)] == [0.25, 0.25, 0.5]


def test_a_callable_that_fails_leaves_nothing() -> None:
    model = Net()
    before = snapshot(model)
    with pytest.raises((EulernetError, ZeroDivisionError)):
        eulernet.patch(model, lambda step: 1 / (step.index - 1), example_inputs=X)
    assert snapshot(model) == before


def test_steps_of_another_model_are_refused() -> None:
    other = nn.Sequential(Block(), Block(), Block())
    steps = eulernet.steps(eulernet.patch(other, 0.1, example_inputs=X))
    model = Net()
    refused(model, lambda: eulernet.patch(model, steps, example_inputs=X), r"\b0, 1, 2\b", r"layer\.0")


def test_json_that_is_not_of_steps_is_refused() -> None:
    for text in ("", "[1, 2]", '{"a": 1}', "not json"):
        with pytest.raises(EulernetError, match=r"(?i)json"):
            eulernet.Steps.from_json(text)


# -------------------------------------------------------------------------------------------------- what is not patched


@pytest.mark.parametrize("function", [eulernet.steps, lambda model: eulernet.set_h(model, 0.1)], ids=["steps", "set_h"])
def test_a_model_that_is_not_patched_is_refused(function: Callable[..., Any]) -> None:
    model = Net()
    refused(model, lambda: function(model), r"(?i)not patched", r"eulernet\.patch\(model")


def test_unpatching_a_plain_model_changes_nothing() -> None:
    model = Net()
    before = snapshot(model)
    assert eulernet.unpatch(model) is model
    assert snapshot(model) == before
