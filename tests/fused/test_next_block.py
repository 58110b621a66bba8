"""In inference the norm that the next block begins with is computed together with the last sum of the one before."""

import copy
import io
import pickle
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import eulernet
from eulernet import kernels
from tests.helpers.fused import DEVICE, PreNorm, PreRMSNorm, ids, llama, randomized, tokens

pytest.importorskip("triton")

# The interpreter of Triton 3.6 makes numbers of arrays with one element. NumPy warns of it, and refuses it from 2.4 on.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")

FUSED = ["norm_forward", "norm_forward"]
LAST = ["norm_forward", "step_forward"]


def blocks(of: type[nn.Module] = PreNorm, depth: int = 3) -> nn.Sequential:
    model = nn.Sequential(*(of() for _ in range(depth)))
    randomized(model).eval()
    return eulernet.patch(model, h=0.3, example_inputs=tokens())


def run(model: nn.Module, x: Tensor) -> Tensor:
    with kernels.mode("triton"):
        return model(x)  # type: ignore[no-any-return]


@pytest.fixture
def norms(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[int]]:
    """How often each norm is called, by its id."""
    called: Counter[int] = Counter()
    for cls in (nn.LayerNorm, nn.RMSNorm):
        forward = cls.forward

        def counted(self: nn.Module, x: Tensor, forward: Any = forward) -> Tensor:
            called[id(self)] += 1
            return forward(self, x)

        monkeypatch.setattr(cls, "forward", counted)
    yield called


@pytest.mark.parametrize("of", [PreNorm, PreRMSNorm])
def test_it_is_computed_with_the_sum(of: type[nn.Module], launches: list[str]) -> None:
    model, x = blocks(of), tokens()
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(run(model, x), expected)
    assert launches == [*FUSED, *FUSED, *LAST]


def test_its_module_is_not_called(launches: list[str], norms: Counter[int]) -> None:
    model = blocks()
    norms.clear()
    with torch.no_grad():
        run(model, tokens())
    assert norms == {id(model[0].norm1): 1}  # the first one, whose state no step has made


def test_in_a_model_of_transformers(launches: list[str]) -> None:
    model, x = randomized(llama()).eval(), ids()
    eulernet.patch(model, h=0.3, example_inputs=x)
    with torch.no_grad():
        expected = model(x)[0]
        with kernels.mode("triton"):
            torch.testing.assert_close(model(x)[0], expected)
    assert launches == [*FUSED, "norm_forward"]  # a plain addition is left to ATen


def test_a_learned_h_too(launches: list[str]) -> None:
    model, x = randomized(nn.Sequential(PreNorm(), PreNorm())).eval(), tokens()
    eulernet.patch(model, h=0.3, trainable=True, example_inputs=x)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(run(model, x), expected)
    assert launches == [*FUSED, *LAST]


# ---- where it is not


def hooked(of: Callable[[nn.Module], nn.Module], hook: Callable[..., Any], pre: bool = False) -> Any:
    def change(model: nn.Module) -> Any:
        at = of(model)
        return at.register_forward_pre_hook(hook) if pre else at.register_forward_hook(hook)

    return change


def other_weight(model: Any) -> None:
    model[1].norm1 = randomized(nn.LayerNorm(8))


def other_order(model: Any) -> None:
    model[1], model[2] = model[2], model[1]


def skipped(model: Any) -> None:
    model[1] = nn.Identity()


CHANGES: dict[str, Callable[[Any], Any]] = {
    "a hook that changes the state": hooked(lambda m: m[0], lambda module, args, out: out * 2),
    "a hook that writes into it": hooked(lambda m: m[0], lambda module, args, out: [out.mul_(2), None][1]),
    "a hook that writes into its values": hooked(lambda m: m[0], lambda module, args, out: [out.data.mul_(2), None][1]),
    "a hook before the next block": hooked(lambda m: m[1], lambda module, args: (args[0] * 2,), pre=True),
    "one that writes": hooked(lambda m: m[1], lambda module, args: [args[0].mul_(2), None][1], pre=True),
    "a hook of the norm": hooked(lambda m: m[1].norm1, lambda module, args, out: out * 2),
    "one before the norm": hooked(lambda m: m[1].norm1, lambda module, args: (args[0].abs(),), pre=True),
    "another norm": other_weight,
    "another order": other_order,
    "a block left out": skipped,
    "another forward": lambda m: setattr(m[1].norm1, "forward", lambda x: x * 2),
    "something between": lambda m: m.insert(1, nn.Tanh()),
    "something in place between": lambda m: m.insert(1, nn.Hardtanh(inplace=True)),
    "unpatched": lambda m: eulernet.unpatch(m[1]),
    "another h": lambda m: eulernet.set_h(m, 0.7),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_changed_between_the_blocks_counts(name: str, launches: list[str]) -> None:
    model, x = blocks(), tokens()
    with torch.no_grad():
        before = run(model, x.clone())
        CHANGES[name](model)
        expected = model(x.clone())
        torch.testing.assert_close(run(model, x.clone()), expected)
    assert (expected - before).abs().max() > 1e-2


def test_gradients_by_a_state_between_blocks_are_whole(launches: list[str]) -> None:
    """As Grad-CAM takes them. A norm that was made with the state would have its part elsewhere."""
    model, x = blocks(), tokens()
    gradients = []
    for mode in ("torch", "triton"):
        with kernels.mode(mode):  # type: ignore[arg-type]
            state = model[0](x)
            out = model[2](model[1](state))
            gradients.append(torch.autograd.grad(out.square().sum(), state)[0])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-4)
    assert [name for name in launches if name.endswith("forward")] == LAST * 3


def test_what_was_made_without_a_graph_is_no_part_of_one(launches: list[str]) -> None:
    model, x = blocks(), tokens()
    with torch.no_grad():
        state = run(model[0], x)
    assert launches == FUSED
    weight = model[1].norm1.weight
    expected = torch.autograd.grad(model[1](state.clone()).square().sum(), weight)[0]
    actual = torch.autograd.grad(run(model[1], state).square().sum(), weight)[0]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_what_was_made_with_a_graph_goes_on_without(launches: list[str]) -> None:
    model, x = blocks(), tokens()
    state = run(model[0], x)
    with torch.no_grad():
        torch.testing.assert_close(run(model[1], state), model[1](state))
    assert launches == LAST + FUSED


def test_in_inference_mode_writes_are_not_counted_so_it_is_called(launches: list[str]) -> None:
    model, x = blocks(), tokens()
    with torch.inference_mode():
        expected = model(x)
        torch.testing.assert_close(run(model, x), expected)
    assert launches == LAST * 3


def test_autocast_that_begins_between_the_blocks(launches: list[str]) -> None:
    model, x = blocks(), tokens()
    with torch.no_grad(), kernels.mode("triton"):
        state = model[0](x)
        with torch.autocast(DEVICE, torch.bfloat16):
            actual = model[1](state)
            expected = model[1](state.clone())
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected)


def test_a_weight_whose_memory_is_elsewhere_is_not_read(launches: list[str]) -> None:
    """FSDP frees what a block holds until it is called."""
    model, x = blocks(), tokens()
    kept = model[1].norm1.weight.detach().clone()

    def free(module: nn.Module, *_: Any) -> None:
        module.norm1.weight.untyped_storage().resize_(0)

    def gather(module: nn.Module, *_: Any) -> None:
        module.norm1.weight.untyped_storage().resize_(kept.nbytes)
        module.norm1.weight.data.copy_(kept)

    with torch.no_grad():
        expected = run(model, x)
        model[1].register_forward_pre_hook(gather)
        free(model[1])
        torch.testing.assert_close(run(model, x), expected)
    assert launches == [*FUSED, *FUSED, *LAST, *LAST * 3]  # who has a hook gives nothing either


# ---- copies, pickles, what stays behind


def test_copies_have_their_own(launches: list[str]) -> None:
    model, x = blocks(), tokens()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.add_(0.1)
            expected = twin(x)
            launches.clear()
            torch.testing.assert_close(run(twin, x), expected)
        assert launches == [*FUSED, *FUSED, *LAST]


def test_nothing_stays_on_a_model_that_is_patched_no_more() -> None:
    model = blocks()
    assert [sorted(vars(block)) for block in eulernet.unpatch(model)] == [sorted(vars(PreNorm()))] * 3
    assert not any("norms" in name for name in blocks().state_dict())


def test_a_state_that_nobody_took_is_a_tensor_like_others() -> None:
    model, x = blocks(), tokens()
    with torch.no_grad():
        state = run(model[0], x)
    for twin in (copy.deepcopy(state), pickle.loads(pickle.dumps(state))):
        assert torch.equal(twin, state) and not any(isinstance(value, nn.Module) for value in vars(twin).values())


def test_it_goes_with_the_state(launches: list[str]) -> None:
    seen: list[Tensor] = []

    class Kept(PreNorm):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x)
            x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
            return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))

    model, x = blocks(Kept), tokens()
    seen.clear()
    with torch.no_grad():
        run(model, x)
    assert launches == [*FUSED, *FUSED, *LAST] and len(seen) == 3 and not any(map(vars, seen))


EXCLUDED = {"1:0": [*FUSED, "norm_forward", *LAST], "1:1": [*FUSED, "norm_forward", *LAST], "1*": [*LAST, *LAST]}


@pytest.mark.parametrize("exclude", EXCLUDED)
def test_steps_that_are_left_out(exclude: str, launches: list[str]) -> None:
    model, x = randomized(nn.Sequential(*(PreNorm() for _ in range(3)))).eval(), tokens()
    eulernet.patch(model, h=0.3, example_inputs=x, exclude=exclude)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(run(model, x), expected)
    assert launches == EXCLUDED[exclude]


class Bounded(PreNorm):
    """Its second branch ends in what h cannot be folded into."""

    def __init__(self) -> None:
        super().__init__()
        del self.ls1, self.ls2, self.drop_path1, self.drop_path2

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        x = x + torch.tanh(self.mlp(self.norm2(x)))
        return x


def test_steps_that_were_folded(launches: list[str]) -> None:
    """The step that is left has another number."""
    model, x = blocks(Bounded), tokens()
    eulernet.fold(model, where_possible=True, example_inputs=x)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(run(model, x), expected)
    assert launches == ["norm_forward", "norm_forward"]  # the last one is a plain addition
