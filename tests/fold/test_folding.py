"""Networks whose h is folded or preserved: parts, copies, shared maps, errors and warnings."""

import contextlib
import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import eulernet
from eulernet import EulernetError, EulernetWarning, Step
from tests.helpers.folding import (
    Branch,
    Residual,
    X,
    assert_equal_to_rounding,
    conv,
    gated,
    in_both_modes,
    linear,
    parameter,
    residual,
    scaled,
)
from tests.helpers.refusals import refused
from tests.helpers.trapped import build
from tests.traps import TRAPS, Trap
from tests.traps.forms import NarrowingInPlaceAddition, WideningAddition


def factor(step: Step) -> float:
    """Not the same for neighbours, so that a step that is given another one's h is seen."""
    return 0.3 + 0.1 * (step.index % 3)


# ------------------------------------------------------------------------------------------------------- several steps


class Net(nn.Module):
    """Batch norm, LayerScale and dropout, a gate, and a block with two steps of which one has a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = Residual(nn.Sequential(conv(bias=False), nn.BatchNorm2d(4), nn.ReLU(), conv(), nn.BatchNorm2d(4)))
        self.scale = Residual(Branch(scaled, c=conv(), gamma=parameter(8)))
        self.gate = Residual(Branch(gated, c=conv(), g=conv()))
        self.two = Two()

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.gate(self.scale(self.norm(x))))


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = linear(), linear()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.a(x).tanh()
        return x + self.b(x)


def net() -> Net:
    torch.manual_seed(0)
    return Net().double().apply(lambda m: [nn.init.normal_(p, std=0.5) for p in m.parameters(recurse=False)] and None)


FOLDABLE = ["norm", "scale", "two:1"]

H = [0.3, 0.4, 0.5, 0.6, 0.7]


def test_folding_a_part_leaves_the_rest_patched() -> None:
    original = net()
    model = eulernet.patch(copy.deepcopy(original), H, example_inputs=X)
    refused(
        model,
        lambda: eulernet.fold(model, example_inputs=X),
        "2 of the 5 steps have no last affine map",
        r"gate \(Residual\): conv2d",
        r"two:0 \(Two\): tanh",
    )
    expected = in_both_modes(model, X)
    eulernet.fold(model, where_possible=True, example_inputs=X)
    assert_equal_to_rounding(in_both_modes(model, X), expected)
    assert [(step.name, step.h) for step in eulernet.steps(model)] == [("gate", 0.5), ("two:0", 0.6)]
    assert type(model.norm) is Residual and type(model.gate) is not Residual and type(model.two) is not Two

    eulernet.set_h(model, {"two:0": 0.2, "gate": 1.0})
    model = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    by_hand = eulernet.patch(copy.deepcopy(original), [0.3, 0.4, 1.0, 0.2, 0.7], example_inputs=X)
    assert_equal_to_rounding(in_both_modes(model, X), in_both_modes(by_hand, X))
    assert type(eulernet.unpatch(model).two) is Two


def test_the_state_dict_loads_both_ways() -> None:
    model = eulernet.patch(net(), H[:3], example_inputs=X, exclude=["gate", "two:0"])
    fresh = net()
    model.load_state_dict(fresh.state_dict(), strict=True)
    identities = [id(p) for p in model.parameters()]
    expected = in_both_modes(model, X)
    eulernet.fold(model, example_inputs=X)
    assert [type(m) for m in model.modules()] == [type(m) for m in fresh.modules()]
    assert not eulernet.is_patched(model) and not any("euler" in name for m in model.modules() for name in vars(m))
    assert [id(p) for p in model.parameters()] == identities
    fresh.load_state_dict(model.state_dict(), strict=True)
    assert_equal_to_rounding(in_both_modes(fresh, X), expected)


def test_a_copy_folds_and_the_original_does_not() -> None:
    model = eulernet.patch(net(), H[:3], example_inputs=X, include=FOLDABLE)
    before = in_both_modes(model, X)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_equal_to_rounding(in_both_modes(eulernet.fold(other, example_inputs=X), X), before)
    assert all(torch.equal(a, b) for a, b in zip(in_both_modes(model, X), before, strict=True))
    assert eulernet.is_patched(model)


@pytest.mark.parametrize("h", [0.1, H[:3], {"norm": 0.1, "*": 2.0}, lambda step: 1 / step.depth])
def test_preserve_with_all_that_h_may_be(h: Any) -> None:
    original = net()
    model = eulernet.patch(copy.deepcopy(original), h, example_inputs=X, include=FOLDABLE, preserve=True)
    assert_equal_to_rounding(in_both_modes(model, X), in_both_modes(original, X))
    again = eulernet.Steps.from_json(eulernet.steps(model).to_json())
    other = eulernet.patch(copy.deepcopy(original), again, example_inputs=X, include=FOLDABLE, preserve=True)
    assert_equal_to_rounding(list(other.state_dict().values()), list(model.state_dict().values()))
    assert eulernet.steps(other) == eulernet.steps(model)


def test_preserve_keeps_what_a_patched_model_computes_now() -> None:
    """Of a model that is patched already, the function to keep is the one with its h; steps left out become 1."""
    model = eulernet.patch(net(), [0.5, 0.25, 3.0], example_inputs=X, include=FOLDABLE)
    expected = in_both_modes(model, X)
    eulernet.patch(model, 0.1, example_inputs=X, include="scale", preserve=True)
    assert_equal_to_rounding(in_both_modes(model, X), expected)
    assert [(step.name, step.h) for step in eulernet.steps(model)] == [("scale", 0.1)]


def test_a_step_at_1_needs_no_map() -> None:
    model = eulernet.patch(net(), {"gate": 1.0, "two:0": 1.0, "*": 0.5}, example_inputs=X)
    assert not eulernet.is_patched(eulernet.fold(model, example_inputs=X))


class Tied(nn.Module):
    """Two blocks with one linear map, and what reads the branch besides."""

    def __init__(self, returns: bool = False) -> None:
        super().__init__()
        self.first = Residual(linear())
        self.second = Residual(self.first.f)
        self.returns = returns

    def forward(self, x: Tensor) -> Any:
        x = self.second(self.first(x))
        return (x, self.first.f(x)) if self.returns else x


def test_a_map_that_steps_share_takes_their_common_h() -> None:
    model = eulernet.patch(Tied().double(), 0.3, example_inputs=X)
    expected = in_both_modes(model, X)
    assert_equal_to_rounding(in_both_modes(eulernet.fold(copy.deepcopy(model), example_inputs=X), X), expected)
    eulernet.set_h(model, [0.3, 0.4])
    refused(
        model, lambda: eulernet.fold(model, example_inputs=X), "2 of the 2", r"first\.f\.(weight|bias) is also read by"
    )
    eulernet.set_h(model, [0.3, 1.0])
    refused(
        model, lambda: eulernet.fold(model, example_inputs=X), r"first \(Residual\)", r"first\.f\.(weight|bias) is also"
    )
    eulernet.fold(model, where_possible=True, example_inputs=X)
    assert [step.h for step in eulernet.steps(model)] == [0.3]


def test_a_map_that_is_used_elsewhere() -> None:
    model = eulernet.patch(Tied(returns=True).double(), 0.3, example_inputs=X)
    refused(model, lambda: eulernet.fold(model, example_inputs=X), r"first\.f\.(weight|bias) is also read by linear")


class AddedTwice(nn.Module):
    """One value of a branch is added at two places, or in parts."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.a, self.how = nn.Sequential(linear(), nn.Tanh(), linear()), how

    def forward(self, x: Tensor) -> Any:
        if self.how == "streams":
            first, second = x.chunk(2, 1)
            y = self.a(first - second)
            return torch.cat([first + y, second + y], 1)
        y = self.a(x)
        match self.how:
            case "two sums":
                return torch.tanh(x + y), x + y
            case "parts":
                return torch.cat([x[:, :1] + y[:, :1], x[:, 1:] + y[:, 1:]], 1)
            case "samples":
                return torch.stack([a + b for a, b in zip(x, y, strict=True)])
            case "slices":
                x = x.clone()
                x[..., :4] += y[..., :4]
                x[..., 4:] += y[..., 4:]
                return x
        x = x.clone()
        for i in range(0, 8, 2):
            x[..., i : i + 2] = x[..., i : i + 2] + y[..., i : i + 2]
        return x


@pytest.mark.parametrize("how", ["two sums", "parts", "samples", "streams", "slices", "loop"])
def test_a_branch_that_is_added_twice_takes_h_once(how: str) -> None:
    model, x = AddedTwice(how).double(), torch.randn(2, 4, 8, dtype=torch.float64)
    original = in_both_modes(model, x)
    eulernet.patch(model, 0.3, example_inputs=x, preserve=True)
    assert_equal_to_rounding(in_both_modes(model, x), original)
    eulernet.set_h(model, 0.5)
    expected = in_both_modes(model, x)
    assert_equal_to_rounding(in_both_modes(eulernet.fold(model, example_inputs=x), x), expected)


def test_parts_of_a_branch_with_an_h_each_are_refused() -> None:
    model, x = AddedTwice("slices").double(), torch.randn(2, 4, 8, dtype=torch.float64)
    eulernet.patch(model, [0.3, 0.4], example_inputs=x)
    refused(model, lambda: eulernet.fold(model, example_inputs=x), "2 of the 2", "linear .* is also read by getitem")


class Rounded(nn.Module):
    """Between the last map and the sum stands something that is no multiple of it."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.a, self.b = how, linear(), linear()

    def forward(self, x: Tensor) -> Tensor:
        y, z = self.a(x), self.b(x)
        match self.how:
            case "to":
                y = (8 * y).to(torch.int32).to(x.dtype) + z
            case "type":
                y = y.type(torch.int64).type_as(x) + z
            case "copy":
                y = torch.empty_like(y, dtype=torch.int32).copy_(8 * y).to(x.dtype) + z
            case "scatter":
                y = torch.scatter(y, -1, torch.zeros(y.shape, dtype=torch.int64), z, reduce="multiply")
            case "floor":
                y = torch.div(y, z, rounding_mode="floor")
            case "list":
                y = y / max(y.flatten().tolist())
        return x + y


@pytest.mark.filterwarnings("ignore:Tensor.tolist:eulernet.EulernetWarning", "ignore:The reduce argument:UserWarning")
@pytest.mark.parametrize("how", ["to", "type", "copy", "scatter", "floor", "list"])
def test_what_rounds_or_looks_at_values_takes_no_factor(how: str) -> None:
    words = "one step has no last affine map"
    with torch.no_grad():
        model, x = Rounded(how).double(), torch.randn(2, 4, 8, dtype=torch.float64)
        before = model(x)
        refused(model, lambda: eulernet.patch(model, 0.3, example_inputs=x, preserve=True), words)
        assert torch.equal(model(x), before)
        eulernet.patch(model, 0.3, example_inputs=x)
        refused(model, lambda: eulernet.fold(model, example_inputs=x), words)


def in_one_memory(how: str) -> nn.Module:
    """Two tensors that are not the same, and lie in the same place."""
    model = nn.Sequential(Residual(linear()), nn.Linear(8, 8, bias=False))
    weight = model[0].f.weight
    match how:
        case "tied":
            model[1].weight.data = weight.data
        case "view":
            model.register_buffer("transposed", weight.detach().t())
        case "attribute":
            model.row = weight.detach()[0]
        case "expanded":
            model[0].f.weight = nn.Parameter(torch.ones(8, 1).expand(8, 8))
    return model


@pytest.mark.parametrize("how", ["tied", "view", "attribute", "expanded"])
def test_memory_that_another_tensor_has_as_well_takes_no_factor(how: str) -> None:
    words = "is expanded" if how == "expanded" else "lies in the same memory as"
    model = in_one_memory(how)
    refused(model, lambda: eulernet.patch(model, 0.3, example_inputs=torch.ones(2, 8), preserve=True), words)
    eulernet.patch(model, 0.3, example_inputs=torch.ones(2, 8))
    refused(model, lambda: eulernet.fold(model, example_inputs=torch.ones(2, 8)), words)


def test_weights_that_lie_side_by_side_in_one_memory_take_factors() -> None:
    model, flat = nn.Sequential(Residual(linear()), Residual(linear())), torch.randn(128)
    for block, part in zip(model, flat.split(64), strict=True):
        block.f.weight.data = part.view(8, 8)
    x = torch.randn(2, 8)
    before = model(x)
    eulernet.patch(model, 0.3, example_inputs=x, preserve=True)
    torch.testing.assert_close(model(x), before)


class Returned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = linear()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.a(x)
        return {"state": x + y, "branch": y}


def test_a_branch_that_the_model_returns_is_refused() -> None:
    model = eulernet.patch(Returned().double(), 0.3, example_inputs=X)
    refused(model, lambda: eulernet.fold(model, example_inputs=X), r"linear \(in a\) is also returned by the model")


def test_an_expert_that_the_example_did_not_reach_is_refused() -> None:
    branch = Branch(lambda s, x: s.experts[int(x.sum() > 1e9)](x), experts=nn.ModuleList([linear(), linear()]))
    model = eulernet.patch(residual(branch), 0.3, example_inputs=X)
    refused(model, lambda: eulernet.fold(model, example_inputs=X), r"never reached f\.experts\.1")


class Modes(nn.Module):
    """Another map in training."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = linear(), linear(bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + (self.b if self.training else self.a)(x)


def test_both_modes_are_looked_at() -> None:
    model = eulernet.patch(Modes().double(), 0.3, example_inputs=X)
    expected = in_both_modes(model, X)
    assert_equal_to_rounding(in_both_modes(eulernet.fold(model, example_inputs=X), X), expected)


IN_HALF_PRECISION = (WideningAddition, NarrowingInPlaceAddition)  # round inside, whatever they are given


class Nested(nn.Module):
    """A long step around a step: its last map has both factors."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(conv(), Residual(conv()), Residual(conv()))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


def test_a_step_in_the_branch_of_another_folds_where_possible() -> None:
    model = Nested().double()
    weights = [model.inner[0].weight.clone(), model.inner[1].f.weight.clone(), model.inner[2].f.weight.clone()]
    eulernet.patch(model, {"<root>": 0.5, "*": 0.25}, example_inputs=X, include=["<root>", "inner"])
    assert len(eulernet.steps(model)) == 3
    expected = in_both_modes(model, X)
    with pytest.raises(
        EulernetError, match=r"<root> \(Nested\): add \(in inner\.1\) is also read by conv2d \(in inner\.2\.f\)"
    ):
        eulernet.fold(model, example_inputs=X)
    eulernet.fold(model, where_possible=True, example_inputs=X)
    assert_equal_to_rounding(in_both_modes(model, X), expected)
    assert torch.equal(model.inner[0].weight, weights[0])
    for block, weight in zip(model.inner[1:], weights[1:], strict=True):
        torch.testing.assert_close(block.f.weight, 0.25 * weight, rtol=1e-15, atol=0)


@pytest.mark.filterwarnings("ignore::eulernet.EulernetWarning", "ignore:None of the inputs have requires_grad=True")
@pytest.mark.parametrize("cls", [t for t in TRAPS if t not in IN_HALF_PRECISION], ids=lambda cls: cls.__name__)
def test_every_trap_computes_what_it_computed_once_it_is_folded(cls: type[Trap]) -> None:
    """Whatever the trap, what is folded or preserved computes what it computed."""
    model, inputs = build(cls, torch.float64)
    original = copy.deepcopy(model)
    eulernet.patch(model, factor, example_inputs=inputs)
    expected = in_both_modes(model, *inputs)
    eulernet.fold(model, where_possible=True, example_inputs=inputs)
    assert_equal_to_rounding(in_both_modes(model, *inputs), expected)
    expected = in_both_modes(original, *inputs)
    eulernet.patch(original, factor, example_inputs=inputs, preserve="where_possible")
    assert_equal_to_rounding(in_both_modes(original, *inputs), expected)


# -------------------------------------------------------------------------------------------------------------- errors


def test_what_cannot_be_folded_at_all() -> None:
    model = net()
    refused(model, lambda: eulernet.fold(model, example_inputs=X), "Net is not patched", "no h to fold")
    with pytest.raises(EulernetError, match=r"takes a torch\.nn\.Module, not str"):
        eulernet.fold("resnet18")  # type: ignore[type-var]
    with pytest.raises(EulernetError, match=r"wraps the model"):
        eulernet.fold(nn.DataParallel(eulernet.patch(model, H, example_inputs=X)))
    with pytest.raises(EulernetError, match=r"does not say what it takes(.|\n)*example_inputs="):
        eulernet.fold(model)
    with pytest.raises(EulernetError, match=r'preserve must be True, False or "where_possible", not \'yes\''):
        eulernet.patch(net(), H, example_inputs=X, preserve="yes")  # type: ignore[arg-type]


def test_other_inputs_than_those_of_the_patch_are_refused() -> None:
    class Optional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = linear()

        def forward(self, x: Tensor, residual: bool = True) -> Tensor:
            return x + self.a(x) if residual else self.a(x)

    model = eulernet.patch(Optional().double(), 0.3, example_inputs=X)
    refused(
        model, lambda: eulernet.fold(model, example_inputs=(X, False)), "<root>", "with which the model was patched"
    )


def test_weights_without_values_are_refused() -> None:
    model = eulernet.patch(net(), 0.3, example_inputs=X, include=FOLDABLE).to("meta")
    meta = X.to("meta")
    refused(model, lambda: eulernet.fold(model, example_inputs=meta), "meta device", "to_empty", "norm.f.4.weight")
    eulernet.unpatch(model)
    refused(model, lambda: eulernet.patch(model, 0.3, example_inputs=meta, include=FOLDABLE, preserve=True), "meta")
    h = {**dict.fromkeys(FOLDABLE, 0.3), "*": 1.0}
    groups = eulernet.param_groups(model, 0.1, h=h, example_inputs=meta)
    assert [len(group["params"]) for group in groups] == [13, 5]


@pytest.mark.parametrize("h", [1e-6, 1e6])
def test_a_weight_beyond_half_precision_is_refused(h: float) -> None:
    model = residual(linear()).half()
    x = X.half()
    words = ("f.weight, with values up to", "leaves the range of float16", "float32")
    refused(model, lambda: eulernet.patch(model, h, example_inputs=x, preserve=True), *words)
    with pytest.warns(EulernetWarning) if h < 1 else contextlib.nullcontext():
        eulernet.patch(model, h, example_inputs=x)
    refused(model, lambda: eulernet.fold(model, example_inputs=x), *words)
    assert not eulernet.is_patched(eulernet.fold(model.float(), example_inputs=X.float()))


class Packed(Tensor):
    """A weight of another kind, as quantising libraries have them."""


def test_packed_weights_are_refused() -> None:
    model = residual(linear())
    model.f.weight = nn.Parameter(model.f.weight.detach().as_subclass(Packed))
    refused(
        model,
        lambda: eulernet.patch(model, 0.3, example_inputs=X, preserve=True),
        r"f\.weight is quantised or packed \(Packed\)",
    )


# ------------------------------------------------------------------------------------------------------------ warnings


def test_a_trained_model_is_not_changed_silently() -> None:
    model = net()
    model.train()(X)
    words = r"Net seems to be trained \(norm\.f\.1 has seen 1 batch\)(.|\n)*preserve=True(.|\n)*h=1\.0(.|\n)*set_h"
    with pytest.warns(EulernetWarning, match=words):
        eulernet.patch(model, 0.1, example_inputs=X, include=FOLDABLE)
    saved = eulernet.steps(model)
    eulernet.unpatch(model)
    with pytest.raises(EulernetWarning):  # where warnings are errors, as in these tests, nothing is changed
        eulernet.patch(model, 0.1, example_inputs=X, include=FOLDABLE)
    assert not eulernet.is_patched(model)
    for h, kwargs in ((1, {}), (0.1, {"preserve": True}), (saved, {})):  # no warning, which would be an error
        eulernet.patch(model, h, example_inputs=X, include=FOLDABLE, **kwargs)
    eulernet.patch(net(), 0.1, example_inputs=X)


def test_a_model_that_says_where_it_was_loaded_from() -> None:
    model = residual(linear())
    model.config = model.name_or_path = "google/bert"
    with pytest.warns(EulernetWarning, match=r"its configuration names 'google/bert'"):
        eulernet.patch(model, 0.1, example_inputs=X)


@pytest.mark.parametrize(
    ("dtype", "h", "least"),
    [(torch.bfloat16, 0.05, "0.062"), (torch.float16, 0.005, "0.0078"), (torch.float32, 1e-9, "")],
)
def test_half_precision_with_a_small_h_is_warned_of(dtype: torch.dtype, h: float, least: str) -> None:
    model, x = residual(linear()).to(dtype), X.to(dtype)
    if not least:
        eulernet.patch(model, h, example_inputs=x)
        return
    words = rf"1 step has an h down to {h}(.|\n)*Keep h above {least}"
    with pytest.warns(EulernetWarning, match=words):
        eulernet.patch(model, h, example_inputs=x)
    eulernet.patch(model, 2 * h, example_inputs=x)
    with pytest.warns(EulernetWarning, match=words):
        eulernet.set_h(model, h)
    with pytest.warns(EulernetWarning, match=words):
        eulernet.HScheduler(model, start=1.0, end=h, total_steps=3)
    eulernet.HScheduler(model, start=1.0, end=2 * h, total_steps=3)
    eulernet.patch(model, h, example_inputs=x, preserve=True)  # the increment is what it was


def test_half_precision_is_seen_in_a_module_without_parameters() -> None:
    class Add(nn.Module):
        def forward(self, x: Tensor, f: Tensor) -> Tensor:
            return x + f

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f, self.add = linear(), Add()

        def forward(self, x: Tensor) -> Tensor:
            return self.add(x, self.f(x))

    with pytest.warns(EulernetWarning, match="1 step has an h down to 0.01 in bfloat16"):
        eulernet.patch(Block().bfloat16(), 0.01, example_inputs=X.bfloat16())
