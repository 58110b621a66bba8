"""Steps that one line of a loop makes, one for each layer: what happens to them from patch to fold."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

import eulernet
import eulernet.kernels
from tests.helpers.trapped import assert_identical, build
from tests.traps.base import DIM
from tests.traps.loops import LoopWithAnOtherHalf, PreNorm, TransformerLoop

NAMES = [f"layers.{i}.{j}" for i in range(3) for j in range(2)]
FACTORS = [0.3 + 0.1 * i for i in range(6)]


def patched(**options: Any) -> tuple[Any, tuple[Any, ...]]:
    model, inputs = build(TransformerLoop, torch.float64)
    h = dict(zip(NAMES, FACTORS, strict=True))
    return eulernet.patch(model, lambda step: h[step.name], example_inputs=inputs, **options), inputs


def reference(h: list[float]) -> Tensor:
    model, inputs = build(TransformerLoop, torch.float64)
    return model.reference(*inputs, h=h)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------------------------------------------- which, and h


def test_layers_are_addressed_by_their_names() -> None:
    model, inputs = patched()
    eulernet.set_h(model, {"layers.1": 0.5, "layers.*.1": 0.25, "*": 0.125})
    h = [0.125, 0.25, 0.5, 0.5, 0.125, 0.25]
    assert [step.h for step in eulernet.steps(model)] == h
    close(model(*inputs), reference(h))


def test_what_is_not_chosen_keeps_one() -> None:
    model, inputs = build(TransformerLoop, torch.float64)
    eulernet.patch(model, 0.3, example_inputs=inputs, include="layers.1", exclude="layers.1.0")
    assert [step.name for step in eulernet.steps(model)] == ["layers.1.1"]
    close(model(*inputs), reference([1, 1, 1, 0.3, 1, 1]))
    assert {type(layer) for pair in model.layers for layer in pair} == {PreNorm}


def test_steps_go_to_json_and_back() -> None:
    model, inputs = patched(include="layers.[02]")
    other, _ = build(TransformerLoop, torch.float64)
    eulernet.patch(other, eulernet.Steps.from_json(eulernet.steps(model).to_json()), example_inputs=inputs)
    assert eulernet.steps(other) == eulernet.steps(model)
    assert torch.equal(other(*inputs), model(*inputs))


def test_copies_and_pickles_have_an_h_of_their_own() -> None:
    model, inputs = patched()
    expected = model(*inputs)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(*inputs), expected)
        eulernet.set_h(other, 1.0)
        assert torch.equal(other(*inputs), reference([1.0] * 6))
        assert_identical(list(eulernet.unpatch(other).state_dict().values()), list(model.state_dict().values()))
        assert not any("_euler" in name for module in other.modules() for name in vars(module))
    assert torch.equal(model(*inputs), expected)


def test_a_part_of_a_larger_model_is_called_by_its_name_there() -> None:
    model, _ = patched()
    whole = nn.Sequential(nn.Identity(), model)
    assert [step.name for step in eulernet.steps(whole)] == [f"1.{name}" for name in NAMES]
    eulernet.set_h(whole, {"1.layers.2.1": 0.5, "*": 1.0})
    assert [step.h for step in eulernet.steps(model)] == [1.0] * 5 + [0.5]


def test_a_layer_that_was_exchanged_is_refused_in_words() -> None:
    model, inputs = patched()
    model.layers[1][0] = PreNorm(nn.Linear(DIM, DIM)).double()
    with pytest.raises(eulernet.EulernetError, match=r"a PreNorm without an h.*eulernet\.patch\(model, h=eulernet"):
        model(*inputs)


def test_both_halves_of_an_if_are_led_by_the_layer() -> None:
    """The example takes one half, the call the other."""
    model, inputs = build(LoopWithAnOtherHalf, torch.float64)
    context = torch.randn(DIM, dtype=torch.float64)
    expected = model.reference(*inputs, context, h=[0.3, 0.6])
    eulernet.patch(model, [0.3, 0.6], example_inputs=inputs)
    close(model(*inputs, context), expected)


class Aside(nn.Module):
    """A path on which the branch comes from elsewhere: from no layer, or from the one before."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.other = nn.ModuleList(PreNorm(nn.Linear(DIM, DIM)) for _ in range(3)), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor, aside: int = -1) -> Tensor:
        for i, layer in enumerate(self.layers):
            y = self.other(x) if i == aside else layer(x)
            x = x + y
        return x


@pytest.mark.parametrize("aside", [0, 2])
def test_a_branch_of_no_layer_takes_no_other_ones_h(aside: int) -> None:
    model, x = Aside(), torch.randn(2, DIM)
    eulernet.patch(model, [0.1, 0.2, 0.3], example_inputs=x)
    with pytest.raises(eulernet.EulernetError, match=r"Aside: no module made the branch.*example_inputs"):
        model(x, aside)


# --------------------------------------------------------------------------------------------------- one step, as today


class Helper(nn.Module):
    """The addition stands in a method of its own, to which the layers are not known."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(PreNorm(nn.Linear(DIM, DIM)) for _ in range(3))

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.add(x, layer(x))
        return x


class TwoHosts(nn.Module):
    """Two modules that run the same layers: a layer cannot have the h of both."""

    class Host(nn.Module):
        def __init__(self, layers: nn.ModuleList) -> None:
            super().__init__()
            self.layers = layers

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = x + layer(x)
            return x

    def __init__(self) -> None:
        super().__init__()
        layers = nn.ModuleList(PreNorm(nn.Linear(DIM, DIM)) for _ in range(3))
        self.a, self.b = self.Host(layers), self.Host(layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


class Unregistered(nn.Module):
    """Layers in a plain list, of which `model.modules()` knows nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = [PreNorm(nn.Linear(DIM, DIM)) for _ in range(3)]

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


class Later(nn.Module):
    """All layers are called before the first of their results is added."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        s = x
        for y in [layer(x) for layer in self.layers]:
            s = s + y
        return s


@pytest.mark.parametrize(
    ("cls", "names"), [(Helper, ["<root>"]), (TwoHosts, ["a", "b"]), (Unregistered, ["<root>"]), (Later, ["<root>"])]
)
def test_where_no_layer_can_hold_it_there_is_one_step(cls: type[nn.Module], names: list[str]) -> None:
    model, x = cls(), torch.randn(2, DIM)
    expected = model(x)
    assert [step.name for step in eulernet.find_steps(model, example_inputs=x)] == names
    eulernet.patch(model, 1.0, example_inputs=x)
    assert torch.equal(model(x), expected)


# ----------------------------------------------------------------------------------------------------------- learned h


def test_each_layer_learns_its_own() -> None:
    model, inputs = patched(trainable=True)
    assert [name for name, _ in model.named_parameters() if "log_h" in name] == [
        f"log_h_{name.replace('.', '_')}_bias" for name in NAMES
    ]
    model(*inputs).square().sum().backward()
    gradients = [getattr(model, f"log_h_{name.replace('.', '_')}_bias").grad for name in NAMES]
    other, _ = build(TransformerLoop, torch.float64)
    h = torch.tensor(FACTORS, dtype=torch.float64, requires_grad=True)
    other.reference(*inputs, h=h).square().sum().backward()
    close(torch.cat(gradients), h.grad * h.detach())  # d/d log h = h d/dh
    eulernet.unpatch(model)
    assert model.state_dict().keys() == other.state_dict().keys()


def test_layers_of_a_stage_share_one() -> None:
    model, _ = patched()
    eulernet.patch(model, 0.2, example_inputs=torch.zeros(2, 5, DIM).double(), trainable="model")
    assert len({id(p) for name, p in model.named_parameters(remove_duplicate=False) if "log_h" in name}) == 1
    assert [step.h for step in eulernet.steps(model)] == pytest.approx([0.2] * 6)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients_to_the_bit(reentrant: bool) -> None:
    model, (x,) = patched(trainable=True)
    x.requires_grad_()
    gradients = []
    for how in (False, True):
        model.zero_grad()
        x.grad = None
        y = checkpoint(model, x, use_reentrant=reentrant) if how else model(x)
        y.square().sum().backward()
        gradients.append([x.grad, *(p.grad.clone() for p in model.parameters())])
    assert_identical(gradients[1], gradients[0])


# -------------------------------------------------------------------------------------------------- compiled, and fused


@pytest.mark.parametrize("trainable", [False, True])
def test_one_graph_over_all_changes_of_h(trainable: bool) -> None:
    model, inputs = patched(trainable=trainable)
    torch.compiler.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for h in (FACTORS, 1.0, [0.05 * (i + 1) for i in range(6)]):
            eulernet.set_h(model, h)
            close(compiled(*inputs), model(*inputs))
    assert counter.frame_count == 1


def test_a_layer_that_was_compiled_after_the_patch_keeps_its_h() -> None:
    model, inputs = patched()
    expected = model(*inputs)
    for pair in model.layers:
        pair[0] = torch.compile(pair[0], backend="eager")
    with torch.no_grad():
        close(model(*inputs), expected)


class Activated(nn.Module):
    """A loop with what a kernel does together with an addition on both sides of it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.act = nn.ModuleList(PreNorm(nn.Linear(DIM, DIM)) for _ in range(2)), nn.GELU()
        self.gamma = nn.Parameter(torch.rand(DIM) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.act(x + self.gamma * layer(x))
        return x


@pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")
def test_kernels_fuse_what_stands_around_it_with_each_layers_h(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from eulernet.kernels._launch import Launch

    launches: list[str] = []
    start = Launch.__call__

    def counted(self: Launch, tensors: tuple[Tensor | None, ...], h: float) -> None:
        launches.append(self.kernel.fn.__name__)
        start(self, tensors, h)

    monkeypatch.setattr(Launch, "__call__", counted)
    model, x = Activated(), torch.randn(2, 5, DIM)
    eulernet.patch(model, [0.3, 0.6], example_inputs=x, include="layers.*")
    expected = x
    for layer, h in zip(model.layers, (0.3, 0.6), strict=True):
        expected = model.act(expected + h * model.gamma * layer(expected))
    with eulernet.kernels.mode("triton"), torch.no_grad():
        torch.testing.assert_close(model(x), expected)
    assert launches == ["step_forward"] * 2


# ----------------------------------------------------------------------------------------------------- into the weights


def test_fold_absorbs_each_layers_h() -> None:
    model, inputs = patched()
    expected = model(*inputs)
    eulernet.fold(model, example_inputs=inputs)
    assert not eulernet.is_patched(model)
    assert not any("_euler" in name for module in model.modules() for name in vars(module))
    close(model(*inputs), expected)


class Squeezed(nn.Module):
    """A layer whose last operation takes in no factor."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.f(x))


def test_what_cannot_be_folded_stays_a_step() -> None:
    model, inputs = build(TransformerLoop, torch.float64)
    model.layers[1][0] = Squeezed().double()
    eulernet.patch(model, FACTORS[:5], example_inputs=inputs, exclude="layers.2.1")
    expected = model(*inputs)
    with pytest.raises(eulernet.EulernetError, match=r"layers\.1\.0 \(Squeezed\): tanh"):
        eulernet.fold(model, example_inputs=inputs)
    assert torch.equal(model(*inputs), expected)
    eulernet.fold(model, example_inputs=inputs, where_possible=True)
    assert [(step.name, step.h) for step in eulernet.steps(model)] == [("layers.1.0", FACTORS[2])]
    close(model(*inputs), expected)
    eulernet.set_h(model, 1.0)
    assert not torch.allclose(model(*inputs), expected)
    eulernet.unpatch(model)
    assert not any("_euler" in name for module in model.modules() for name in vars(module))


def test_preserve_keeps_what_the_loop_computes() -> None:
    model, inputs = build(TransformerLoop, torch.float64)
    expected = model(*inputs)
    eulernet.patch(model, FACTORS, example_inputs=inputs, preserve=True)
    close(model(*inputs), expected)
    assert [step.h for step in eulernet.steps(model)] == FACTORS
    eulernet.patch(model, 0.5, example_inputs=inputs, preserve=True)  # once more, on top
    close(model(*inputs), expected)


# -------------------------------------------------------------------------------------------------------------- sharded


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch was built without gloo")
@pytest.mark.filterwarnings("ignore::UserWarning:torch", "ignore::FutureWarning:torch")
@pytest.mark.parametrize("trainable", [False, True])
def test_sharded_layer_by_layer_it_trains_as_it_did(trainable: bool, tmp_path: Path) -> None:
    """h is the host's, so it is gathered where the addition runs, and not where the layer does."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model, inputs = patched(trainable=trainable)
        shards = copy.deepcopy(model)
        mesh = init_device_mesh("cpu", (1,))
        for pair in shards.layers:
            for layer in pair:
                fully_shard(layer, mesh=mesh)
        fully_shard(shards, mesh=mesh)
        outputs = [net(*inputs) for net in (model, shards)]
        assert torch.equal(*outputs)
        for y in outputs:
            y.square().sum().backward()
        for ours, theirs in zip(shards.parameters(), model.parameters(), strict=True):
            assert torch.equal(ours.grad.full_tensor(), theirs.grad)
        assert [step.h for step in eulernet.steps(shards)] == pytest.approx(FACTORS)
    finally:
        dist.destroy_process_group()


def test_hooks_of_the_tools_see_each_layer() -> None:
    model, inputs = build(TransformerLoop)
    assert [row.step for row in eulernet.diagnose(model, inputs[0]).rows] == NAMES
