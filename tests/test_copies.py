"""A patched model is copied, saved, traced and exported like any other, and each copy is independent."""

import copy
import io
import os
import pickle
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import eulernet
from tests.traps.base import DIM, Block
from tests.traps.calls import BranchBegunByTheCaller, FreeFunction
from tests.traps.classes import Decorated, Extended, ZeroArgumentSuper
from tests.traps.forms import Plus
from tests.traps.steps import GlobalSkip

ROOT = str(Path(eulernet.__file__).parents[1])


class Net(nn.Module):
    """Steps of several kinds: a plain one, a decorated one, one reached by ``super()``, and one in a free function."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = Block()
        self.decorated = Decorated()
        self.extended = Extended()
        self.free = FreeFunction.Part()
        self.dense = BranchBegunByTheCaller.Layer()

    def forward(self, x: Tensor) -> Tensor:
        return self.dense(self.free(self.extended(self.decorated(self.plain(x)))))


NAMES = ["plain", "decorated", "extended", "free", "dense.attention_output", "dense.output"]
FACTORS = [0.25, 0.5, 0.75, 1.25, 1.5, 1.75]


@pytest.fixture
def original() -> Net:
    return Net().eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 5, DIM)


@pytest.fixture
def model(original: Net, x: Tensor) -> Net:
    model = eulernet.patch(copy.deepcopy(original), FACTORS, example_inputs=x)
    assert [step.name for step in eulernet.steps(model)] == NAMES
    return model


def factors(model: nn.Module) -> list[float | None]:
    return [step.h for step in eulernet.steps(model)]


# ------------------------------------------------------------------------------------------------- state and identity


def test_state_dict_has_the_same_keys_and_loads_both_ways(original: Net, model: Net, x: Tensor) -> None:
    assert list(model.state_dict()) == list(original.state_dict())
    other = Net().eval()
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(other(x), original(x))
    expected = model(x)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    assert not torch.equal(model(x), expected)
    model.load_state_dict(original.state_dict(), strict=True)
    assert torch.equal(model(x), expected)
    assert factors(model) == FACTORS  # what was loaded holds no h


def test_names_of_everything_are_the_originals(original: Net, model: Net) -> None:
    assert [name for name, _ in model.named_modules()] == [name for name, _ in original.named_modules()]
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in original.named_parameters()]
    assert [name for name, _ in model.named_buffers()] == [name for name, _ in original.named_buffers()]
    for (name, module), (_, other) in zip(model.named_modules(), original.named_modules(), strict=True):
        assert isinstance(module, type(other)), name
        assert type(module).__name__ == type(other).__name__
        assert type(module).__qualname__ == type(other).__qualname__
        assert type(module).__module__ == type(other).__module__


def test_a_patched_block_is_its_class_only(model: Net) -> None:
    assert isinstance(model.plain, Block)
    assert not isinstance(model.plain, Extended)
    assert issubclass(type(model.extended), Extended)
    assert isinstance(model.extended, Block)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_h_keeps_its_value_when_the_model_changes_dtype(model: Net, x: Tensor, dtype: torch.dtype) -> None:
    """A registered buffer would be rounded by ``half``."""
    eulernet.set_h(model, 0.1)
    model.to(dtype).to(torch.float64)
    reference = model.plain.reference(x.double(), 0.1)
    torch.testing.assert_close(model.plain(x.double()), reference, rtol=1e-14, atol=1e-14)
    assert factors(model) == [0.1] * 6


def test_repr_shows_h(model: Net) -> None:
    text = repr(model)
    for factor in FACTORS:
        assert f"h={factor}" in text
    assert "h=" not in repr(eulernet.unpatch(model))


def test_repr_of_a_block_with_an_own_extra_repr(x: Tensor) -> None:
    model = ZeroArgumentSuper()
    before = repr(model)
    eulernet.patch(model, 0.25, example_inputs=torch.randn(2, DIM, 4, 4))
    (line,) = [line for line in repr(model).splitlines() if "ResidualConv" in line]
    assert "kernel_size=(3, 3)" in line and "h=0.25" in line
    eulernet.unpatch(model)
    assert repr(model) == before


# ------------------------------------------------------------------------------------------------------------- hooks


@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_run(original: Net, x: Tensor, when: str) -> None:
    seen: list[str] = []

    def register(model: Net) -> None:
        model.plain.register_forward_pre_hook(lambda module, args: seen.append("pre"))
        model.plain.register_forward_hook(lambda module, args, out: seen.append("post"))
        model.extended.register_forward_hook(lambda module, args, out: out * 2)
        model.plain.register_full_backward_hook(lambda module, grads, out: seen.append("backward"))

    if when == "before":
        register(original)
    patched = eulernet.patch(copy.deepcopy(original), 1.0, example_inputs=x)
    if when == "after":
        register(original)
        register(patched)
    assert seen == []
    x.requires_grad_()
    expected = original(x)
    expected.sum().backward()
    assert seen == ["pre", "post", "backward"]
    actual = patched(x)
    actual.sum().backward()
    assert seen == ["pre", "post", "backward"] * 2
    assert torch.equal(actual, expected)
    eulernet.unpatch(patched)
    assert torch.equal(patched(x), expected)
    assert seen == ["pre", "post", "backward"] * 2 + ["pre", "post"]


def test_a_module_replaced_after_patching_is_the_one_that_runs(model: Net, x: Tensor) -> None:
    model.plain.a = nn.Linear(DIM, DIM)
    torch.testing.assert_close(model.plain(x), model.plain.reference(x, FACTORS[0]))


# ------------------------------------------------------------------------------------------------------------ copies


def by_pickle(model: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(model))


def by_save(model: nn.Module) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES: list[Callable[[nn.Module], Any]] = [copy.deepcopy, by_pickle, by_save]


@pytest.mark.parametrize("make", COPIES, ids=lambda make: make.__name__)
def test_a_copy_is_patched_and_independent(model: Net, x: Tensor, make: Callable[[nn.Module], Any]) -> None:
    expected = model(x)
    other = make(model)
    assert type(other) is type(model)
    assert [type(module) for module in other.modules()] == [type(module) for module in model.modules()]
    assert torch.equal(other(x), expected)
    assert eulernet.steps(other) == eulernet.steps(model)

    eulernet.set_h(other, 0.1)
    assert factors(other) == [0.1] * 6 and factors(model) == FACTORS
    assert torch.equal(model(x), expected) and not torch.equal(other(x), expected)
    eulernet.set_h(model, 2.0)
    assert factors(other) == [0.1] * 6

    eulernet.unpatch(model)
    assert eulernet.is_patched(other) and not eulernet.is_patched(model)
    eulernet.set_h(other, FACTORS)
    assert torch.equal(other(x), expected)
    eulernet.unpatch(other)
    assert [type(module) for module in other.modules()] == [type(module) for module in model.modules()]
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("make", COPIES, ids=lambda make: make.__name__)
def test_a_copied_part_has_its_steps(model: Net, x: Tensor, make: Callable[[nn.Module], Any]) -> None:
    """One block alone, without the model that it was patched in."""
    part = make(model.plain)
    assert torch.equal(part(x), model.plain(x))
    assert type(part) is type(model.plain)


def test_a_shallow_copy_keeps_h(model: Net, x: Tensor) -> None:
    assert torch.equal(copy.copy(model.plain)(x), model.plain(x))


def test_a_copied_block_goes_into_another_model(model: Net, x: Tensor) -> None:
    """Blocks are cloned into stacks, as ``nn.TransformerEncoder`` does it."""
    stack = nn.Sequential(*(copy.deepcopy(model.plain) for _ in range(3)))
    expected = x
    for block in stack:
        expected = block.reference(expected, FACTORS[0])
    torch.testing.assert_close(stack(x), expected)


def test_a_module_with_its_own_way_of_pickling(x: Tensor) -> None:
    model = OwnState()
    eulernet.patch(model, 0.5, example_inputs=x)
    other = pickle.loads(pickle.dumps(model))
    assert isinstance(other, OwnState) and other.restored
    assert torch.equal(other(x), model(x))
    assert factors(other) == [0.5]


class OwnState(Block):
    restored = False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "restored": True}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)


class OwnCopy(Block):
    """Copies itself as a new module with the same weights."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "OwnCopy":
        twin = type(self)()
        twin.load_state_dict(self.state_dict(), strict=False)
        return twin


@pytest.mark.parametrize("trainable", [False, True])
def test_a_module_with_its_own_way_of_copying(trainable: bool, x: Tensor) -> None:
    model = eulernet.patch(nn.Sequential(OwnCopy(), OwnCopy()), [0.5, 0.25], example_inputs=x, trainable=trainable)
    other = copy.deepcopy(model)
    assert type(other[0]) is type(model[0]) and list(other.state_dict()) == list(model.state_dict())
    assert torch.equal(other(x), model(x))
    eulernet.set_h(other, 1.0)
    assert factors(model) == pytest.approx([0.5, 0.25]) and factors(other) == [1.0, 1.0]
    again = eulernet.patch(model, 0.125, example_inputs=x)
    assert factors(again) == [0.125] * 2 and type(eulernet.unpatch(again)[0]) is OwnCopy


def test_averaged_models(original: Net, model: Net, x: Tensor) -> None:
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    reference = AveragedModel(original, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    for seed in range(2):
        for net, averaged in ((model, average), (original, reference)):
            torch.manual_seed(seed)
            for parameter in net.parameters():
                nn.init.normal_(parameter)
            averaged.update_parameters(net)
    assert not torch.equal(average(x), model(x))
    assert factors(average.module) == FACTORS
    eulernet.set_h(model, 0.1)
    assert factors(average.module) == FACTORS
    eulernet.unpatch(average.module)
    assert torch.equal(average(x), reference(x))


def test_replicas_of_data_parallel(model: Net, x: Tensor) -> None:
    """``nn.parallel.replicate`` copies each module this way and then gives the copies their parameters."""
    replica = model.plain._replicate_for_data_parallel()
    assert type(replica) is type(model.plain)
    replica.norm, replica.a = model.plain.norm, model.plain.a
    assert torch.equal(replica(x), model.plain(x))
    eulernet.set_h(model, 0.1)
    assert torch.equal(model.plain._replicate_for_data_parallel()(x), model.plain(x))


def test_functional_call(original: Net, model: Net, x: Tensor) -> None:
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
def test_higher_derivatives_and_forward_mode(x: Tensor) -> None:
    model = eulernet.patch(Plus(), 0.3, example_inputs=x).double()
    x = x.double()
    _, tangent = torch.func.jvp(model, (x,), (torch.ones_like(x),))
    _, expected = torch.func.jvp(lambda x: x + 0.3 * model.a(x), (x,), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, expected, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradgradcheck(lambda x: model(x).square().sum(), (x[:1, :1].requires_grad_(),))


# ------------------------------------------------------------------------------------------------------ other processes

MODULE = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 6)

    def forward(self, x):
        return x + self.a(x)

class Child(Block):
    def forward(self, x):
        return super().forward(x) * 2

def build():
    torch.manual_seed(0)
    return nn.Sequential(Block(), Child())
"""


def in_a_fresh_process(folder: Path, script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-B", "-c", textwrap.dedent(script)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), ROOT])},
        capture_output=True,
        text=True,
        timeout=300,
    )


SAVE = """
    import torch, eulernet, pickled
    model, x = pickled.build(), torch.ones(2, 6)
    eulernet.patch(model, [0.25, 0.5], example_inputs=x)
    torch.save(model, "model.pt")
    torch.save(model(x), "output.pt")
"""
LOAD = """
    import torch
    model = torch.load("model.pt", weights_only=False)
    import eulernet, pickled
    x = torch.ones(2, 6)
    assert torch.equal(model(x), torch.load("output.pt"))
    assert [step.h for step in eulernet.steps(model)] == [0.25, 0.5]
    assert type(model[0]) is not pickled.Block and isinstance(model[0], pickled.Block)
    assert eulernet.unpatch(model) is model
    assert type(model[0]) is pickled.Block and type(model[1]) is pickled.Child
    assert torch.equal(model(x), pickled.build()(x))
"""


def test_save_and_load_in_a_fresh_process(tmp_path: Path) -> None:
    (tmp_path / "pickled.py").write_text(MODULE)
    for script in (SAVE, LOAD):
        result = in_a_fresh_process(tmp_path, script)
        assert result.returncode == 0, result.stderr


def test_loading_where_an_unrelated_line_changed(tmp_path: Path) -> None:
    (tmp_path / "pickled.py").write_text(MODULE)
    assert in_a_fresh_process(tmp_path, SAVE).returncode == 0
    (tmp_path / "pickled.py").write_text(MODULE + "\n# A later comment.\n")
    result = in_a_fresh_process(tmp_path, LOAD)
    # The same additions, or the clear error; never a model that computes something else.
    assert result.returncode == 0 or "EulernetError" in result.stderr


@pytest.mark.parametrize(
    "edit",
    [
        lambda text: text.replace("x + self.a(x)", "self.a(x) + x"),
        lambda text: text.replace("return x + self.a(x)", "y = self.a(x)\n        return x + y"),
        lambda text: text.replace("return x + self.a(x)", "return 2 * x + self.a(x)"),
    ],
    ids=["operands", "statement", "factor"],
)
def test_loading_beside_another_version_of_the_source(tmp_path: Path, edit: Callable[[str], str]) -> None:
    (tmp_path / "pickled.py").write_text(MODULE)
    assert in_a_fresh_process(tmp_path, SAVE).returncode == 0
    (tmp_path / "pickled.py").write_text(edit(MODULE))
    result = in_a_fresh_process(tmp_path, LOAD)
    assert result.returncode != 0
    last = result.stderr.strip().rpartition("EulernetError")[2]
    assert "EulernetError" in result.stderr
    for word in ("Block", "pickled", "source", "state_dict"):
        assert word in last, f"{word!r} is not in: {last}"


def test_loading_where_the_class_is_gone(tmp_path: Path) -> None:
    (tmp_path / "pickled.py").write_text(MODULE)
    assert in_a_fresh_process(tmp_path, SAVE).returncode == 0
    (tmp_path / "pickled.py").write_text(MODULE.replace("Block", "Brick"))
    result = in_a_fresh_process(tmp_path, LOAD)
    assert result.returncode != 0 and "Block" in result.stderr


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


def test_a_table_of_the_steps(model: Net) -> None:
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


def test_make_fx_and_meta(model: Net, x: Tensor) -> None:
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
