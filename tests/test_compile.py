"""``torch.compile``, automatic mixed precision and activation checkpointing treat a patched model as the original."""

import copy
import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import eulernet
from eulernet.functional import euler_step
from tests.helpers.trapped import build
from tests.traps import TRAPS, Trap

# Where Dynamo breaks the graph, patched or not: at += into the attribute of a SimpleNamespace, at an autograd function
# that keeps its inputs as attributes, and in training where random numbers decide which layers run. Each with modes.
BREAKING = {
    "InPlaceAttribute": (False, True),
    "RunAgainInItsBackward": (False, True),
    "LayersDroppedAtRandom": (True,),
}
# And where the Dynamo of torch 2.8 to 2.11 still does: at hooks that change what comes in or out, and torch 2.8 at the
# name of what torch.func.vmap maps.
BREAKING_EARLIER = (
    {"WorksInHooks", "ABranchUnderVmap", "ABlockUnderVmap", "BehindVmap"} if torch.__version__ < "2.14" else set()
)

# Where Dynamo looks at the attributes of a tensor, torch warns of .grad; as an error that would stop the compilation.
pytestmark = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor:UserWarning",
    "ignore:the stream from the model:eulernet.EulernetWarning",  # of long steps; test_traps.py asserts it
)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """No compilation of one test counts in another."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Block(nn.Module):
    """A residual block with a norm in front."""

    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        self.norm, self.a = nn.LayerNorm(dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.a(self.norm(x))


class Bottleneck(nn.Module):
    """A residual block that adds in place, with a projection where the shape changes."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(channels, channels, 3, stride, 1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.norm2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False), nn.BatchNorm2d(channels)
        self.downsample = nn.Conv2d(channels, channels, 1, stride, bias=False) if stride > 1 else None
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.norm1(self.conv1(x)))
        out = self.norm2(self.conv2(out))
        identity = x if self.downsample is None else self.downsample(x)
        out += identity
        return self.relu(out)


def vector_net() -> tuple[nn.Sequential, Tensor]:
    return nn.Sequential(*(Block() for _ in range(12))), torch.randn(2, 5, 8)


def image_net() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(*(Bottleneck(8, stride) for stride in (1, 2, 1, 2))), torch.randn(2, 8, 8, 8)


def encoder_net() -> tuple[nn.Module, Tensor]:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), torch.randn(2, 5, 8)


NETS = [vector_net, image_net, encoder_net]
nets = pytest.mark.parametrize("net", NETS, ids=lambda net: net.__name__)


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The output, and the gradients of the input and of the parameters."""
    x = x.detach().clone().requires_grad_()
    out = model(x)
    return [out, *torch.autograd.grad(out.square().sum(), (x, *model.parameters()))]


def assert_close(actual: list[Tensor], expected: list[Tensor]) -> None:
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)  # float32, fused in another order


# ------------------------------------------------------------------------------------------------------- whole graphs


def fullgraph_fails(model: nn.Module, inputs: tuple[Any, ...]) -> bool:
    torch.compiler.reset()
    try:
        with torch._dynamo.config.patch(allow_rnn=True):  # else Dynamo runs a model with nn.GRU or nn.LSTM as it is
            torch.compile(model, backend="eager", fullgraph=True)(*inputs)
    except torch._dynamo.exc.Unsupported:
        return True
    return False


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("cls", TRAPS, ids=lambda cls: cls.__name__)
def test_no_more_graph_breaks_than_the_original(cls: type[Trap], training: bool) -> None:
    model, inputs = build(cls, training=training)
    patched = eulernet.patch(copy.deepcopy(model), 0.3, example_inputs=inputs)
    breaks = fullgraph_fails(model, inputs)
    assert breaks is (training in BREAKING.get(cls.__name__, ())) or cls.__name__ in BREAKING_EARLIER
    if breaks:
        counts = [torch._dynamo.explain(net)(*inputs).graph_break_count for net in (model, patched)]
        assert counts[1] <= counts[0]
        return
    assert not fullgraph_fails(patched, inputs)
    torch.manual_seed(0)
    expected = tree_leaves(patched.eval()(*inputs))
    with torch._dynamo.config.patch(allow_rnn=True):
        actual = tree_leaves(torch.compile(patched, backend="eager", fullgraph=True)(*inputs))
    assert_close(actual, expected)


@nets
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_fullgraph_gives_the_eager_values_and_gradients(net: Any, training: bool) -> None:
    model, x = net()
    model.train(training)
    eulernet.patch(model, 0.3, example_inputs=x)
    expected = gradients(copy.deepcopy(model), x)
    assert_close(gradients(torch.compile(model, backend="aot_eager", fullgraph=True), x), expected)


@nets
def test_inductor_gives_the_eager_values_and_gradients(net: Any) -> None:
    model, x = net()
    eulernet.patch(model, 0.3, example_inputs=x)
    expected = gradients(copy.deepcopy(model), x)
    assert_close(gradients(torch.compile(model, fullgraph=True), x), expected)


# ------------------------------------------------------------------------------------------------------ recompilations


@nets
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_one_compilation_over_all_changes_of_h(net: Any, training: bool) -> None:
    model, x = net()
    model.train(training)
    eulernet.patch(model, 0.3, example_inputs=x)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    steps = eulernet.steps(model)
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled(x)
        for h in (0.1, 1.0, 2, [0.05 * (i + 1) for i in range(len(steps))], lambda step: 1 / step.depth):
            eulernet.set_h(model, h)
            assert_close([compiled(x)], [model(x)])
    assert counter.frame_count == 1


@pytest.mark.usefixtures("recompiled")
def test_a_long_schedule_compiles_once() -> None:
    """More values of h than Dynamo's limit of recompilations, with inductor, in training."""
    model, x = vector_net()
    eulernet.patch(model, 1.0, example_inputs=x)
    compiled = torch.compile(model, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for i in range(1, torch._dynamo.config.recompile_limit + 5):
            eulernet.set_h(model, 1 / i)
            assert_close(gradients(compiled, x), gradients(model, x))


def test_blocks_of_different_h_share_one_compilation() -> None:
    """Compiled block by block, as large models are: one compilation serves all of them."""
    torch._dynamo.utils.counters.clear()
    model, x = vector_net()
    x.requires_grad_()  # the first block's input as the others'
    original = copy.deepcopy(model)
    eulernet.patch(model, [0.1 * (i + 1) for i in range(12)], example_inputs=x)
    frames = []
    for net in (original, model):
        torch.compiler.reset()
        counter = CompileCounter()
        for block in net:
            block.compile(backend=counter, fullgraph=True)
        net(x)
        frames.append(counter.frame_count)
    assert frames[1] == frames[0] == 1


def test_setting_h_of_one_block_does_not_recompile_the_others() -> None:
    model, x = vector_net()
    x.requires_grad_()
    eulernet.patch(model, 0.1, example_inputs=x)
    counter = CompileCounter()
    for block in model:
        block.compile(backend=counter, fullgraph=True)
    model(x)
    with torch._dynamo.config.patch(error_on_recompile=True):
        eulernet.set_h(model, [0.2] + [0.1] * 11)
        model(x)
    assert counter.frame_count == 1


def test_h_of_a_compiled_model_is_the_one_that_was_set() -> None:
    """No value of h is a constant of the graph."""
    model, x = vector_net()
    eulernet.patch(model, 1.0, example_inputs=x)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(x)
    eulernet.set_h(model, 1e-9)
    torch.testing.assert_close(compiled(x), x, rtol=0, atol=1e-6)


def test_patching_after_compiling_in_place_takes_effect() -> None:
    """``model.compile()`` keeps the model's type; what it compiled before patching must not go on running."""
    model, x = vector_net()
    model.compile(backend="eager", fullgraph=True)
    model(x)
    eulernet.patch(model, 1e-9, example_inputs=x)
    torch.testing.assert_close(model(x), x, rtol=0, atol=1e-6)
    eulernet.unpatch(model)
    assert (model(x) - x).abs().max() > 1e-2


def test_the_operation_itself_compiles() -> None:
    skip, branch = torch.randn(3, 4), torch.randn(3, 4)
    compiled = torch.compile(euler_step, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(skip, branch, torch.tensor(0.3)), skip + 0.3 * branch)
    torch.testing.assert_close(euler_step(skip, branch, 0.3), skip + 0.3 * branch)
    assert torch.equal(euler_step(skip, branch, 1.0), skip + branch)


# ----------------------------------------------------------------------------------------------------------- autocast


class Recorder:
    """The dtypes of each module's outputs."""

    def __init__(self, model: nn.Module) -> None:
        self.seen: list[tuple[str, list[torch.dtype]]] = []
        for name, module in model.named_modules():
            module.register_forward_hook(functools.partial(self.see, name))

    def see(self, name: str, module: nn.Module, args: Any, out: Any) -> None:
        self.seen.append((name, [t.dtype for t in tree_leaves(out) if t is not None]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("h", [1.0, 0.3])
@nets
def test_autocast_gives_the_originals_dtypes(net: Any, h: float, dtype: torch.dtype) -> None:
    model, x = net()
    patched = eulernet.patch(copy.deepcopy(model), h, example_inputs=x)
    original, actual = Recorder(model), Recorder(patched)
    with torch.autocast("cpu", dtype):
        expected, output = model(x), patched(x)
    assert actual.seen == original.seen and output.dtype == expected.dtype
    assert torch.equal(output, expected) == (h == 1.0)


@pytest.mark.parametrize("stream", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("branch", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_types_promote_as_in_an_addition(stream: torch.dtype, branch: torch.dtype, compiled: bool) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(6, 6, dtype=branch)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.a(x.to(branch))

    model, x = Mixed(), torch.randn(2, 6, dtype=stream)
    expected, f = model(x), model.a(x.to(branch))
    eulernet.patch(model, 0.3, example_inputs=x)
    forward = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    assert forward(x).dtype == expected.dtype
    exact = (x.double() + 0.3 * f.double()).to(expected.dtype)
    # One rounding of h * F and one of the sum, each at most half a unit of the result's dtype.
    limit = 2 * torch.finfo(expected.dtype).eps
    torch.testing.assert_close(forward(x), exact, rtol=limit, atol=limit)
    eulernet.set_h(model, 1.0)
    assert torch.equal(forward(x), expected)


def test_autocast_and_compile_go_together() -> None:
    model, x = vector_net()
    eulernet.patch(model, 0.3, example_inputs=x)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        expected, actual = model(x), compiled(x)
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=1e-2, atol=1e-2)  # bfloat16 has 8 bits


# ------------------------------------------------------------------------------------------------------ checkpointing


class Checkpointed(nn.Module):
    """Blocks with dropout, of which the activations are computed again in backward."""

    def __init__(self, use_reentrant: bool | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(Block(), nn.Dropout(0.5)) for _ in range(3))
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x) if self.use_reentrant is None else checkpoint(block, x, use_reentrant=self.use_reentrant)
        return x


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(use_reentrant: bool) -> None:
    plain, x = Checkpointed(None).train(), torch.randn(2, 5, 8)
    model = Checkpointed(use_reentrant).train()
    model.load_state_dict(plain.state_dict())
    for net in (plain, model):
        eulernet.patch(net, [0.3, 0.4, 0.5], example_inputs=x)
    assert len(eulernet.steps(model)) == 3
    torch.manual_seed(0)
    expected = gradients(plain, x)
    torch.manual_seed(0)
    x = x.requires_grad_()
    out = model(x)
    out.square().sum().backward()
    for y, z in zip([out, x.grad, *(p.grad for p in model.parameters())], expected, strict=True):
        assert torch.equal(y, z)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_from_outside_gives_the_same_gradients(use_reentrant: bool) -> None:
    model, x = vector_net()
    eulernet.patch(model, 0.3, example_inputs=x)
    expected = gradients(model, x)
    x = x.requires_grad_()
    out = checkpoint_sequential(model, 3, x, use_reentrant=use_reentrant)
    out.square().sum().backward()
    for y, z in zip([out, x.grad, *(p.grad for p in model.parameters())], expected, strict=True):
        assert torch.equal(y, z)


def test_set_h_between_forward_and_backward_is_of_the_next_forward() -> None:
    """Without checkpointing, the gradients are those of the forward that ran."""
    model, x = vector_net()
    eulernet.patch(model, 0.3, example_inputs=x)
    expected = gradients(model, x)
    out = model(x)
    eulernet.set_h(model, 0.9)
    actual = torch.autograd.grad(out.square().sum(), list(model.parameters()))
    assert all(torch.equal(y, z) for y, z in zip(actual, expected[2:], strict=True))


def test_compiled_checkpointing_gives_the_same_gradients() -> None:
    model, x = Checkpointed(False).train(), torch.randn(2, 5, 8)
    for block in model.blocks:
        block[1].p = 0.0  # compiled and eager draw other random numbers
    eulernet.patch(model, 0.3, example_inputs=x)
    expected = gradients(model, x)
    assert_close(gradients(torch.compile(model, backend="aot_eager", fullgraph=True), x), expected)
