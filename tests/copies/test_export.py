"""A patched model as JSON, as a table, traced and exported."""

import copy
import io
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import eulernet
from tests.helpers.copied import FACTORS, NAMES, Net, factors
from tests.traps.forms import Plus
from tests.traps.steps import GlobalSkip

# ------------------------------------------------------------------------------------------------------------ copies


def test_functional_call_computes_the_patched_model(original: Net, model: Net, x: Tensor) -> None:
    parameters = {name: torch.randn_like(value) for name, value in model.named_parameters()}
    actual = torch.func.functional_call(model, parameters, (x,))
    other = copy.deepcopy(model)
    other.load_state_dict(parameters)
    assert torch.equal(actual, other(x))

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (x[None],)).square().sum()

    # Gradients for each sample, by vmap, against one sample after the other.
    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0), randomness="error")(parameters, x)
    for name, value in torch.func.grad(loss)(parameters, x[1]).items():
        torch.testing.assert_close(each[name][1], value)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning", "ignore:.*torch.jit.*:DeprecationWarning")
def test_higher_derivatives_and_forward_mode_are_those_of_the_formula(x: Tensor) -> None:
    model = eulernet.patch(Plus(), 0.3, example_inputs=x).double()
    x = x.double()
    _, tangent = torch.func.jvp(model, (x,), (torch.ones_like(x),))
    _, expected = torch.func.jvp(lambda x: x + 0.3 * model.a(x), (x,), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, expected, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradgradcheck(lambda x: model(x).square().sum(), (x[:1, :1].requires_grad_(),))


# -------------------------------------------------------------------------------------------------------------- JSON


def test_steps_go_to_json_and_back(original: Net, model: Net, x: Tensor) -> None:
    steps = eulernet.steps(model)
    again = eulernet.Steps.from_json(steps.to_json())
    assert again == steps
    assert again.to_json() == steps.to_json()
    assert [step.h for step in again] == FACTORS
    other = eulernet.patch(copy.deepcopy(original), again, example_inputs=x)
    assert torch.equal(other(x), model(x))
    assert eulernet.steps(other) == steps


def test_json_keeps_what_was_left_alone() -> None:
    model = GlobalSkip()
    found = eulernet.find_steps(model, example_inputs=torch.randn(model.shape))
    again = eulernet.Steps.from_json(found.to_json())
    assert again == found and again.long == found.long != ()
    assert again.notes == found.notes and again.unreached == found.unreached and again.unsupported == found.unsupported
    assert all(step.h is None for step in again)


def test_json_of_a_selection_patches_the_selection(original: Net, x: Tensor) -> None:
    model = eulernet.patch(copy.deepcopy(original), 0.25, example_inputs=x, include=["plain", "free"])
    steps = eulernet.Steps.from_json(eulernet.steps(model).to_json())
    assert [step.name for step in steps] == ["plain", "free"]
    other = eulernet.patch(copy.deepcopy(original), steps, example_inputs=x)
    assert eulernet.steps(other) == steps
    assert torch.equal(other(x), model(x))


def test_json_of_a_long_step_patches_it() -> None:
    """`include` had to name it; it must not be lost on the way back."""
    original, x = GlobalSkip(), torch.randn(GlobalSkip.shape)
    model = eulernet.patch(copy.deepcopy(original), 0.25, example_inputs=x, include="*")
    steps = eulernet.Steps.from_json(eulernet.steps(model).to_json())
    assert "long" in [step.kind for step in steps]
    other = eulernet.patch(copy.deepcopy(original), steps, example_inputs=x)
    assert eulernet.steps(other) == steps
    assert torch.equal(other(x), model(x))


def test_steps_print_as_a_table(model: Net) -> None:
    text = str(eulernet.steps(model))
    for step, name, factor in zip(eulernet.steps(model), NAMES, FACTORS, strict=True):
        (line,) = [line for line in text.splitlines() if name in line.split()]
        (place,) = step.places
        assert "identity" in line and str(factor) in line and f"{Path(place.file).name}:{place.line}" in line


# --------------------------------------------------------------------------------------------------- tracing and export


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning", "ignore:.*torch.jit.*:DeprecationWarning")
def test_scripting_a_patched_model_raises(model: Net, x: Tensor) -> None:
    """``torch.jit.script`` reads the source again and would compile the original."""
    with pytest.raises(Exception, match=r"(?i)step factors(.|\n)*(unpatch|trace|export)"):
        torch.jit.script(model)
    with pytest.raises(Exception, match=r"(?i)step factors"):
        torch.jit.script(model.plain)
    eulernet.unpatch(model)
    assert torch.equal(torch.jit.script(model.plain)(x), model.plain(x))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning", "ignore:.*torch.jit.*:DeprecationWarning")
def test_jit_trace_gives_the_patched_function(model: Net, x: Tensor) -> None:
    traced = torch.jit.trace(model, x)
    torch.testing.assert_close(traced(x + 1), model(x + 1))


def test_fx_gives_the_patched_function(model: Net, x: Tensor) -> None:
    traced = torch.fx.symbolic_trace(model)
    torch.testing.assert_close(traced(x + 1), model(x + 1))  # h * F is a node of its own, so rounded by itself
    assert list(traced.state_dict()) == list(model.state_dict())
    torch.testing.assert_close(pickle.loads(pickle.dumps(traced))(x), model(x))


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # torch 2.11, of what it reads itself
@pytest.mark.parametrize("strict", [False, True])
def test_export_gives_the_patched_function(model: Net, x: Tensor, strict: bool) -> None:
    program = torch.export.export(model, (x,), strict=strict)
    torch.testing.assert_close(program.module()(x + 1), model(x + 1))
    assert set(program.state_dict) == set(model.state_dict())
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    torch.testing.assert_close(torch.export.load(buffer).module()(x + 1), model(x + 1))


def test_make_fx_and_meta_see_the_patched_model(model: Net, x: Tensor) -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    torch.testing.assert_close(make_fx(model)(x)(x + 1), model(x + 1))
    meta = copy.deepcopy(model).to("meta")
    assert meta(x.to("meta")).device.type == "meta"
    assert factors(meta) == FACTORS


# ---------------------------------------------------------------------------------------------------------- fast path


def fused_calls(model: nn.Module, x: Tensor) -> int:
    """How often the fused kernel of ``nn.TransformerEncoderLayer`` runs."""
    with torch.no_grad(), torch.profiler.profile() as profile:
        model(x)
    return sum(event.count for event in profile.key_averages() if "transformer_encoder_layer_fwd" in event.key)


@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events")  # torch 2.11, once a process
@pytest.mark.parametrize("stack", [False, True], ids=["layer", "encoder"])
def test_the_fused_inference_path_is_off_while_patched(stack: bool) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model: nn.Module = (nn.TransformerEncoder(layer, 2) if stack else layer).eval()
    x = torch.randn(2, 5, 8)
    layers = 2 if stack else 1
    assert fused_calls(model, x) == layers
    eulernet.patch(model, 0.3, example_inputs=x)
    assert fused_calls(model, x) == 0
    with torch.no_grad():
        without_grad = model(x)
    torch.testing.assert_close(without_grad, model(x).detach())
    assert fused_calls(copy.deepcopy(model), x) == 0
    assert fused_calls(pickle.loads(pickle.dumps(model)), x) == 0
    untouched = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    assert fused_calls(untouched, x) == 1
    eulernet.unpatch(model)
    assert fused_calls(model, x) == layers
