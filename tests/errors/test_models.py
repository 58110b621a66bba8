"""What is said of models that misbehave or are wrapped, and that nothing has changed."""

import queue
import re
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import eulernet
from eulernet import EulernetError, EulernetWarning
from tests.helpers.plain import Block, Net, X
from tests.helpers.refusals import refused

# ------------------------------------------------------------------------------------------------ models that misbehave


def test_a_model_that_fails_on_the_input_is_refused_with_its_reason() -> None:
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


def test_a_model_that_cannot_be_copied_is_refused() -> None:
    """What is traced is a copy."""

    class Single(Net):
        def __deepcopy__(self, memo: Any) -> Any:
            raise TypeError("there is only one of it")

    model = Single()
    error = refused(model, lambda: eulernet.patch(model, 0.1, example_inputs=X), "Single", "only one of it", "deepcopy")
    assert isinstance(error.__cause__, TypeError)


def test_an_error_of_the_models_own_is_repeated() -> None:
    class Strict(Net):
        def forward(self, x: Tensor) -> Tensor:
            raise LookupError("the tokenizer is missing")

    model = Strict()
    error = refused(model, lambda: eulernet.find_steps(model, example_inputs=X), "the tokenizer is missing", "Strict")
    assert isinstance(error.__cause__, LookupError)


def test_a_model_that_fails_in_training_only_is_noted() -> None:
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

    runs = queue.SimpleQueue[None]()  # as many entries, which nobody can put back
    steady = 10**6

    def __init__(self) -> None:
        super().__init__()
        self.a, self.block = nn.Linear(6, 6), Block()

    def forward(self, x: Tensor) -> Tensor:
        Fickle.runs.put(None)
        x = self.block(x)
        if Fickle.runs.qsize() > Fickle.steady:
            return self.a(x)
        return x + self.a(x)


def test_a_patch_that_cannot_be_proven_is_rolled_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Fickle()
    monkeypatch.setattr(Fickle, "runs", queue.SimpleQueue())
    eulernet.find_steps(model, example_inputs=X)
    monkeypatch.setattr(Fickle, "steady", 2 * Fickle.runs.qsize())
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
def test_a_step_in_a_scripted_part_is_named() -> None:
    model = nn.Sequential(Block(), torch.jit.script(Block()))
    with pytest.warns(EulernetWarning, match="the addition in Sequential.forward is compiled"):
        eulernet.patch(model, 0.1, example_inputs=X)
    assert [step.name for step in eulernet.steps(model)] == ["0"]


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


@pytest.mark.parametrize("call", [eulernet.patch, eulernet.find_steps])
def test_a_weak_reference_is_refused(call: Any) -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    with pytest.raises(EulernetError, match=f"eulernet.{call.__name__} was given a weak reference to a model"):
        call(weakref.proxy(model), example_inputs=torch.zeros(2, 3, 8))
