"""Every error says what is wrong and what to call instead, and leaves no half-patched model behind."""

import functools
import importlib
import os
import re
import subprocess
import sys
import textwrap
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import eulernet
from eulernet import EulernetError, EulernetWarning
from tests.helpers.refusals import refused, snapshot

ROOT = str(Path(eulernet.__file__).parents[1])


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.a(x)


class Net(nn.Module):
    """Three steps: layer.0, layer.1 and layer.10 (to tell components from prefixes)."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.ModuleDict({name: Block() for name in ("0", "1", "10")})

    def forward(self, x: Tensor) -> Tensor:
        for block in self.layer.values():
            x = block(x)
        return x


X = torch.linspace(-1, 1, 12).view(2, 6)


# -------------------------------------------------------------------------------------------------------------- no step


def test_no_step() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
    refused(model, lambda: eulernet.patch(model, 0.1, example_inputs=X), r"(?i)no (residual )?steps?", "Sequential")
    assert len(eulernet.find_steps(model, example_inputs=X)) == 0


def test_no_step_but_a_long_one_names_it() -> None:
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
def test_no_example_input(function: Callable[..., Any]) -> None:
    model = Net()
    refused(
        model,
        lambda: function(model),
        r"eulernet\.(patch|find_steps)\(model,.*example_inputs=",
        "Net",
        r"(?i)example",
    )


@pytest.mark.parametrize("inputs", ["1,3,224,224", 3, object()], ids=["str", "int", "object"])
def test_example_inputs_of_a_wrong_type(inputs: Any) -> None:
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
def test_not_a_module(function: Callable[..., Any], model: Any) -> None:
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
def test_a_pattern_that_matches_nothing(arguments: dict[str, Any]) -> None:
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


def test_a_class_and_a_predicate_that_match_nothing() -> None:
    model = Net()
    refused(model, lambda: eulernet.patch(model, example_inputs=X, include=nn.Conv2d), "include", "Conv2d")
    refused(model, lambda: eulernet.patch(model, example_inputs=X, include=lambda step: False), "include")


def test_a_selector_of_a_wrong_type() -> None:
    model = Net()
    refused(model, lambda: eulernet.patch(model, example_inputs=X, include=3), "include", "3", "pattern", "class")
    refused(model, lambda: eulernet.patch(model, example_inputs=X, exclude=[0.5]), "exclude", "0.5")


def test_everything_excluded() -> None:
    """Not the words of "no step": there are steps, and the selection leaves none."""
    model = Net()
    error = refused(model, lambda: eulernet.patch(model, example_inputs=X, exclude=Block), "exclude", r"\b3\b")
    assert not re.search(r"(?i)no residual step (was )?found", str(error))


# -------------------------------------------------------------------------------------------------------------------- h

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
    "vector": torch.ones(3),
}


def spoil(model: nn.Module, function: str) -> Callable[[Any], Any]:
    """`patch` of a plain model or `set_h` of a patched one, as a function of h."""
    if function == "patch":
        return lambda h: eulernet.patch(model, h, example_inputs=X)
    eulernet.patch(model, 0.5, example_inputs=X)
    return lambda h: eulernet.set_h(model, h)


@pytest.mark.parametrize("function", ["patch", "set_h"])
@pytest.mark.parametrize("value", NOT_A_FACTOR.values(), ids=NOT_A_FACTOR.keys())
def test_h_that_is_not_a_positive_number(value: Any, function: str) -> None:
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
def test_one_bad_value_among_good_ones(form: str, value: Any, function: str) -> None:
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
def test_a_sequence_of_the_wrong_length(h: Any, function: str) -> None:
    """It says how many steps there are, and how many values came."""
    model = Net()
    call = spoil(model, function)
    refused(model, lambda: call(h), rf"\b{len(h)}\b", r"\b3 (selected )?steps\b")


@pytest.mark.parametrize("function", ["patch", "set_h"])
def test_a_mapping_with_a_pattern_that_matches_nothing(function: str) -> None:
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


def test_steps_of_another_model() -> None:
    other = nn.Sequential(Block(), Block(), Block())
    steps = eulernet.steps(eulernet.patch(other, 0.1, example_inputs=X))
    model = Net()
    refused(model, lambda: eulernet.patch(model, steps, example_inputs=X), r"\b0, 1, 2\b", r"layer\.0")


def test_json_that_is_not_of_steps() -> None:
    for text in ("", "[1, 2]", '{"a": 1}', "not json"):
        with pytest.raises(EulernetError, match=r"(?i)json"):
            eulernet.Steps.from_json(text)


# -------------------------------------------------------------------------------------------------- what is not patched


@pytest.mark.parametrize("function", [eulernet.steps, lambda model: eulernet.set_h(model, 0.1)], ids=["steps", "set_h"])
def test_a_model_that_is_not_patched(function: Callable[..., Any]) -> None:
    model = Net()
    refused(model, lambda: function(model), r"(?i)not patched", r"eulernet\.patch\(model")


def test_unpatching_a_plain_model_changes_nothing() -> None:
    model = Net()
    before = snapshot(model)
    assert eulernet.unpatch(model) is model
    assert snapshot(model) == before


# ---------------------------------------------------------------------------------------------- sources that do not fit

MODULE = """
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 6)

    def forward(self, x):
        return x + self.a(x)
"""


def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str = MODULE) -> tuple[types.ModuleType, Path]:
    path = tmp_path / f"module_{tmp_path.name}.py"
    path.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    return importlib.import_module(path.stem), path


def test_a_forward_without_source() -> None:
    namespace: dict[str, Any] = {"__name__": "typed_in"}
    exec(compile(MODULE, "<string>", "exec"), namespace)
    model = nn.Sequential(Block(), namespace["Block"]())
    call = functools.partial(eulernet.patch, model, 0.1, example_inputs=X)
    refused(model, lambda: call(include="1"), "Block", r"(?i)source", "'?1'?", "exclude")
    with pytest.warns(eulernet.EulernetWarning, match=r"not scaled: 1 \(Block\)"):
        call()
    assert [step.name for step in eulernet.steps(model)] == ["0"]
    eulernet.patch(model, 0.5, example_inputs=X, exclude="1")
    assert [step.name for step in eulernet.steps(model)] == ["0"]


def test_a_file_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, path = written(tmp_path, monkeypatch)
    path.unlink()
    model = nn.Sequential(Block(), module.Block())
    refused(model, lambda: eulernet.patch(model, 0.1, example_inputs=X, include="1"), path.name, r"(?i)source")


@pytest.mark.parametrize(
    "edit",
    [
        lambda text: text.replace("x + self.a(x)", "self.a(x) + x"),
        lambda text: text.replace("x + self.a(x)", "2 * x + self.a(x)"),
        lambda text: "\n\n" + text,
        lambda text: text.replace("return x", "return (x"),
        lambda text: "",
    ],
    ids=["operands", "constant", "shifted", "syntax-error", "empty"],
)
def test_a_file_that_changed_since_import(
    edit: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, path = written(tmp_path, monkeypatch)
    path.write_text(edit(MODULE))
    model = nn.Sequential(Block(), module.Block())
    output = model(X)
    call = functools.partial(eulernet.patch, model, 0.1, example_inputs=X)
    refused(model, lambda: call(include="1"), path.name, r"(?i)changed|edited|differs", "import")
    assert torch.equal(model(X), output)
    with pytest.warns(eulernet.EulernetWarning, match=r"not scaled: 1 \(Block\)"):
        call()


class Asserting(nn.Module):
    """Pytest rewrites the assertion below, so that what runs is not what the file says."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[-1] == 6
        return x + self.a(x)


def test_a_forward_that_pytest_rewrote() -> None:
    model = Asserting()
    refused(model, lambda: eulernet.patch(model, 0.1, example_inputs=X), "Asserting", "(?i)pytest", "assert")


def test_a_file_with_an_edit_elsewhere_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What counts is the function that runs."""
    module, path = written(tmp_path, monkeypatch)
    path.write_text(MODULE + "\n\ndef later():\n    return 1\n")
    block = module.Block()
    eulernet.patch(block, 0.5, example_inputs=X)
    torch.testing.assert_close(block(X), X + 0.5 * block.a(X))


def test_without_column_information(tmp_path: Path) -> None:
    (tmp_path / "module_without_columns.py").write_text(MODULE)
    script = textwrap.dedent(
        """
        import torch, eulernet
        from module_without_columns import Block
        block = Block()
        try:
            eulernet.patch(block, 0.1, example_inputs=torch.zeros(2, 6))
        except eulernet.EulernetError as error:
            assert type(block) is Block and not eulernet.is_patched(block)
            print(error)
        """
    )
    result = subprocess.run(
        [sys.executable, "-B", "-X", "no_debug_ranges", "-c", script],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), ROOT])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert re.search("(?i)column", result.stdout)
    assert "PYTHONNODEBUGRANGES" in result.stdout or "no_debug_ranges" in result.stdout


# ------------------------------------------------------------------------------------------------ models that misbehave


def test_a_model_that_fails_on_the_input() -> None:
    model = Net()
    error = refused(
        model,
        lambda: eulernet.patch(model, 0.1, example_inputs=torch.zeros(2, 5)),
        "Net",
        "example_inputs",
        r"2, 5",
        r"(?i)shape|size|mat1",
    )
    assert error.__cause__ is not None
    assert not isinstance(error.__cause__, EulernetError)


def test_a_model_that_cannot_be_copied() -> None:
    """What is traced is a copy."""

    class Single(Net):
        def __deepcopy__(self, memo: Any) -> Any:
            raise TypeError("there is only one of it")

    model = Single()
    error = refused(model, lambda: eulernet.patch(model, 0.1, example_inputs=X), "Single", "only one of it", "deepcopy")
    assert isinstance(error.__cause__, TypeError)


def test_a_model_that_raises_an_error_of_its_own() -> None:
    class Strict(Net):
        def forward(self, x: Tensor) -> Tensor:
            raise LookupError("the tokenizer is missing")

    model = Strict()
    error = refused(model, lambda: eulernet.find_steps(model, example_inputs=X), "the tokenizer is missing", "Strict")
    assert isinstance(error.__cause__, LookupError)


def test_a_model_that_fails_in_training_only() -> None:
    """An inference model is patched all the same, and it is said that training was not looked at."""

    class Inference(Net):
        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                raise NotImplementedError("no training here")
            return super().forward(x)

    model = Inference().eval()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        eulernet.patch(model, 0.5, example_inputs=X)
    assert len(eulernet.steps(model)) == 3
    said = [*map(str, caught), *eulernet.steps(model).notes]
    assert any("train" in line for line in said)


class Fickle(nn.Module):
    """Runs other code from its third run on, so that the proof of the patch must fail."""

    runs = 0
    steady = 10**6

    def __init__(self) -> None:
        super().__init__()
        self.a, self.block = nn.Linear(6, 6), Block()

    def forward(self, x: Tensor) -> Tensor:
        Fickle.runs += 1
        x = self.block(x)
        if Fickle.runs > Fickle.steady:
            return self.a(x)
        return x + self.a(x)


def test_a_patch_that_cannot_be_proven_is_rolled_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Fickle()
    monkeypatch.setattr(Fickle, "runs", 0)
    eulernet.find_steps(model, example_inputs=X)
    searching = Fickle.runs
    monkeypatch.setattr(Fickle, "runs", 0)
    monkeypatch.setattr(Fickle, "steady", searching)
    refused(
        model, lambda: eulernet.patch(model, 0.1, example_inputs=X, include=["<root>", "block"]), "<root>", "Fickle"
    )
    assert type(model.block) is Block


class LooksAtValues(Net):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum().item() > 1e9:
            x = x * 2
        return super().forward(x)


def test_code_that_looks_at_values_is_run_for_real() -> None:
    model = LooksAtValues()
    eulernet.patch(model, 0.5, example_inputs=X)
    assert len(eulernet.steps(model)) == 3


def test_code_that_looks_at_values_is_refused_on_meta() -> None:
    with torch.device("meta"):
        model = LooksAtValues()
    refused(model, lambda: eulernet.patch(model, 0.5, example_inputs=X.to("meta")), "meta", "LooksAtValues")


def test_example_inputs_that_are_not_on_meta_with_the_model() -> None:
    with torch.device("meta"):
        model = Net()
    refused(model, lambda: eulernet.patch(model, 0.5, example_inputs=X), "meta", r"tensor\.to\('meta'\)", "Net")


# ------------------------------------------------------------------------------------------------------------- wrappers


class OwnParallel(nn.DataParallel[nn.Module]):
    """A wrapper with additions of its own, as those of training frameworks."""


WRAPPERS: dict[str, Callable[[nn.Module], Any]] = {
    "torch.compile": lambda model: torch.compile(model, backend="eager"),
    "DataParallel": nn.DataParallel,
    "OwnParallel": OwnParallel,
}


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_a_wrapper_is_refused_with_the_call_to_make_instead(wrap: str) -> None:
    model = Net()
    wrapper = WRAPPERS[wrap](model)
    with pytest.raises(EulernetError, match=re.escape(f"model = {wrap}(eulernet.patch(wrapped.")):
        eulernet.patch(wrapper, 0.5, example_inputs=X)
    assert not eulernet.is_patched(model)
    eulernet.patch(model, 0.5, example_inputs=X)
    assert [step.h for step in eulernet.steps(eulernet.set_h(wrapper, 0.25))] == [0.25] * 3
    torch.testing.assert_close(wrapper(X), model(X))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning", "ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("make", [torch.jit.script, lambda model: torch.jit.trace(model, X)], ids=["script", "trace"])
def test_a_scripted_model_is_refused(make: Callable[[nn.Module], nn.Module]) -> None:
    model = nn.Sequential(Block(), Block())
    scripted = make(model)
    with pytest.raises(EulernetError, match=r"(?i)script(.|\n)*patch the python model"):
        eulernet.patch(scripted, 0.1, example_inputs=X)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning", "ignore:.*torch.jit.*:DeprecationWarning")
def test_a_scripted_part_is_refused() -> None:
    model = nn.Sequential(Block(), torch.jit.script(Block()))
    with pytest.raises(EulernetError, match=r"(?i)^1 (.|\n)*script"):
        eulernet.patch(model, 0.1, example_inputs=X)
    assert type(model[0]) is Block


def test_patching_again_with_an_error_keeps_the_patch() -> None:
    """Patching again is remove-then-apply, but not where the new call is wrong."""
    model = eulernet.patch(Net(), 0.5, example_inputs=X)
    output = model(X)
    refused(model, lambda: eulernet.patch(model, -1.0, example_inputs=X), "positive")
    refused(model, lambda: eulernet.patch(model, 0.1, example_inputs=X, include="nowhere"), "nowhere")
    refused(model, lambda: eulernet.patch(model, 0.1, example_inputs=torch.zeros(2, 5)), "example_inputs")
    assert [step.h for step in eulernet.steps(model)] == [0.5] * 3
    assert torch.equal(model(X), output)


@pytest.mark.parametrize("name", ["patch", "find_steps", "steps", "set_h", "unpatch", "is_patched"])
def test_what_is_no_module_is_refused(name: str) -> None:
    arguments = (3, 0.1) if name in ("patch", "set_h") else (3,)
    with pytest.raises(EulernetError, match=rf"eulernet\.{name} takes a torch\.nn\.Module, not int"):
        getattr(eulernet, name)(*arguments)


def test_steps_of_another_model_are_no_new_h() -> None:
    model = eulernet.patch(Net(), 0.5, example_inputs=X, include="layer.0")
    whole = eulernet.steps(eulernet.patch(Net(), 0.1, example_inputs=X))
    with pytest.raises(EulernetError, match=r"h=Steps has values for layer\.1, layer\.10, which are no steps of this"):
        eulernet.set_h(model, whole)
    assert [step.h for step in eulernet.steps(model)] == [0.5]


def test_set_h_warns_before_it_changes_anything() -> None:
    model = eulernet.patch(Net().bfloat16(), 0.5, example_inputs=X.bfloat16())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(EulernetWarning, match="rounding"):
            eulernet.set_h(model, 1e-4)
    assert [step.h for step in eulernet.steps(model)] == [0.5, 0.5, 0.5]
