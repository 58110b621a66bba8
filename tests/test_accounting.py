"""Every sum of a network is accounted for: step, long, not supported, or left out with its reason; and the picture."""

import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

import eulernet
from eulernet import EulernetError, EulernetWarning, Steps
from eulernet._find.classify import classify
from eulernet._patch.prove import search
from eulernet._plot import picture, together
from tests.helpers.trapped import build
from tests.traps import TRAPS, UNSUPPORTED, Trap
from tests.traps.beside import DetachedBetweenItsSteps
from tests.traps.branches import FourierBranch
from tests.traps.gated import Highway
from tests.traps.streams import ADetachedStateBesideItsBranch

SOURCE = Path(__file__).read_text().splitlines()
DIM = 8
X = torch.zeros(2, 5, DIM)
IMAGES = torch.zeros(1, DIM, 8, 8)

pytestmark = pytest.mark.filterwarnings("ignore::eulernet.EulernetWarning")


class Block(nn.Module):
    """`x + f(x)`, with any f."""

    def __init__(self, body: nn.Module | None = None) -> None:
        super().__init__()
        self.body = nn.Linear(DIM, DIM) if body is None else body

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Model(nn.Module):
    """A function of two maps and a parameter as a model, with a residual block behind it."""

    def __init__(self, function: Callable[..., Tensor], a: nn.Module, b: nn.Module, last: nn.Module) -> None:
        super().__init__()
        self.function, self.a, self.b, self.last = function, a, b, last
        self.p = nn.Parameter(torch.ones(()))

    def forward(self, *x: Tensor) -> Tensor:
        return self.last(self.function(self, *x))


def linear_model(function: Callable[..., Tensor]) -> nn.Module:
    return Model(function, nn.Linear(DIM, DIM), nn.Linear(DIM, DIM), Block())


def image_model(function: Callable[..., Tensor]) -> nn.Module:
    maps = [nn.Conv2d(DIM, DIM, 3, padding=1) for _ in range(3)]
    return Model(function, maps[0], maps[1], Block(maps[2]))


def groups(depth: int = 3, width: int = 4) -> nn.Module:
    """Groups of blocks, each around a residual of its own, as super-resolution networks are built; long twice over."""
    return Block(
        nn.Sequential(
            *(Block(nn.Sequential(*(Block() for _ in range(width)), nn.Linear(DIM, DIM))) for _ in range(depth)),
            nn.Linear(DIM, DIM),
        )
    )


# ---- every sum is one of them


def accounted(model: nn.Module, inputs: Any) -> None:
    """Each addition of the trace is in one list, and the lists that a user sees hold as many."""
    with search(model, inputs) as found:
        trace = found.traces[0]
        sums = classify(trace)
        steps = [id(step_call.addition) for step_call in sums.steps]
        others = [id(addition) for addition, _ in sums.left_out]
        assert sorted([*steps, *others]) == sorted(map(id, trace.additions))
        assert len(set(steps)) == len(steps) and not set(steps) & set(others)
        assert sum(left.calls for left in found.steps.left_out) == len(others)
        scaled = sum(site.calls[0] for f in found.found for site in f.sites)
        assert scaled <= len(steps) and (scaled == len(steps) or found.steps.unsupported)
        kinds = {step.kind == "long" for step in found.steps}
        assert True not in kinds and all(step.kind == "long" for step in found.steps.long)
        last = max((step.index for step in (*found.steps, *found.steps.long)), default=-1)
        assert all(left.after is None or 0 <= left.after <= last for left in found.steps.left_out)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*", "ignore:.*:DeprecationWarning")
@pytest.mark.parametrize("cls", [*TRAPS[::7], *UNSUPPORTED], ids=lambda cls: cls.__name__)
def test_each_addition_is_one_of_step_long_unsupported_left_out(cls: type[Trap]) -> None:
    accounted(*build(cls))


@pytest.mark.parametrize("name", ["resnet10t", "test_vit", "test_convnext", "pit_ti_224", "hgnet_tiny"])
def test_in_models_of_timm_as_well(name: str) -> None:
    accounted(pytest.importorskip("timm").create_model(name), None)


class Counter(TorchFunctionMode):
    """Counts the calls that add or subtract two floating tensors, knowing nothing of the library."""

    count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [a for a in args if isinstance(a, Tensor) and a.is_floating_point()]
        self.count += getattr(func, "__name__", "").strip("_") in ("add", "iadd", "sub", "isub") and len(tensors) > 1
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("cls", TRAPS[3::9], ids=lambda cls: cls.__name__)
def test_as_many_sums_are_accounted_for_as_run(cls: type[Trap]) -> None:
    """Those that Python calls; what an operator or a scripted function hides comes on top."""
    model, inputs = build(cls)
    with search(model, inputs) as found, Counter() as counter:
        assert not found.steps.unsupported
        counter.count = 0
        model(*inputs)
    scaled = sum(site.calls[0] for f in found.found for site in f.sites)
    assert scaled + sum(left.calls for left in found.steps.left_out) >= max(counter.count, 1)


# ---- the reasons


class Scored(nn.Module):
    """Attention whose scores are added to those of the layer before, which came from the state that it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.value = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor, before: Tensor | None = None) -> tuple[Tensor, Tensor]:
        scores = self.query(x) @ x.mT
        if before is not None:
            scores = scores + before
        branch = torch.softmax(scores, -1) @ self.value(x)
        return x + branch, scores


class Passed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = Scored(), Scored(), Block()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(*self.first(x))[0])


REASONS: dict[str, tuple[nn.Module, Any]] = {
    "constant operand": (linear_model(lambda m, x: m.a(x) + m.p), X),
    "position or injected input": (Passed(), X),
    "inside a branch": (linear_model(lambda m, x: x + m.a(torch.relu(m.a(x) + m.b(x)))), X),
    "gate or score": (linear_model(lambda m, x, z: torch.sigmoid(m.a(x) + m.b(z)) * x), (X, X.clone())),
    "noise": (linear_model(lambda m, x: x + m.a(x).exp() * torch.randn_like(x)), X),
    "siblings": (linear_model(lambda m, x: m.a(x) + m.b(x)), X),
    "resolutions": (
        image_model(lambda m, x: m.a(x) + F.interpolate(m.b(F.avg_pool2d(x, 2)), scale_factor=2.0)),
        IMAGES,
    ),
    "broadcast": (linear_model(lambda m, x: (s := x.mean(-1, keepdim=True)) + m.a(s.expand_as(x))), X),
    "detached": (linear_model(lambda m, x: x + m.a(x).detach()), X),
    "error or variance": (linear_model(lambda m, x: (x - m.a(x)).square()), X),
    "no map between": (linear_model(lambda m, x: x + x.relu()), X),
    "what pooling took out": (image_model(lambda m, x: x - F.avg_pool2d(x, 3, 1, 1)), IMAGES),
    "sum of layers": (linear_model(lambda m, x: (y := m.a(x)) + (z := m.b(torch.relu(y))) + m.a(torch.relu(z))), X),
    "unrelated": (linear_model(lambda m, x, z: x + z), (X, X.clone())),
}


def test_each_reason_has_its_network() -> None:
    assert set(REASONS) == set(get_args(eulernet.Reason))


DEEPER = torch.nn.functional.gelu
REPARAMETRISED = {
    "a deeper head for the scale": lambda m, x: m.a(x) + torch.randn_like(x) * m.b(DEEPER(m.a(x))).exp(),
    "a deeper head for the mean": lambda m, x: m.b(DEEPER(m.a(x))) + m.a(x).exp() * torch.randn(x.shape),
    "scaled twice": lambda m, x: 0.5 * (torch.empty_like(x).normal_() * m.b(DEEPER(m.a(x)))) + m.a(x),
    "fused": lambda m, x: torch.addcmul(x, torch.randn_like(x), m.a(x).exp()),
    "a distribution": lambda m, x: torch.distributions.Normal(x, m.a(x).exp()).rsample(),
}


@pytest.mark.parametrize("spelled", REPARAMETRISED)
def test_reparametrisation_is_no_step(spelled: str) -> None:
    steps = eulernet.find_steps(linear_model(REPARAMETRISED[spelled]), example_inputs=X)
    assert [step.name for step in steps] == ["last"]
    assert {left.reason for left in steps.left_out} <= {"noise", "constant operand"}


@pytest.mark.parametrize("like", [Tensor.expand_as, Tensor.type_as, lambda p, x: p.expand(x.shape).view_as(x)])
def test_what_is_read_for_its_shape_alone_has_no_part_in_a_sum(like: Callable[..., Tensor]) -> None:
    steps = eulernet.find_steps(linear_model(lambda m, x: m.a(x) + like(m.p, x)), example_inputs=X)
    assert [left.reason for left in steps.left_out] == ["constant operand"] and len(steps) == 1


def layers(part: Callable[[nn.Module, Tensor, int], Tensor]) -> Callable[[nn.Module, Tensor], Tensor]:
    """Something of three layers without a residual, summed up."""

    def function(m: nn.Module, x: Tensor) -> Tensor:
        total = part(m, y := torch.relu(m.a(x)), 0)
        for n in (1, 2):
            total = total + part(m, y := torch.relu(m.b(y)), n)
        return total + torch.relu(y).sum() * 0

    return function


def levels(m: nn.Module, x: Tensor) -> Tensor:
    """The nodes of a pyramid, which weight what they fuse (BiFPN)."""
    small = torch.relu(m.b(F.avg_pool2d(x, 2)))
    up = m.a(F.silu(0.5 * x + 0.5 * F.interpolate(small, scale_factor=2)))
    return F.interpolate(0.5 * small + 0.5 * F.max_pool2d(up, 2), scale_factor=2)


def fourier(m: nn.Module, x: Tensor) -> Tensor:
    made = torch.fft.rfft(x, dim=1)
    kept = torch.zeros_like(made)
    kept[:, :2] = made[:, :2] * (1 + m.p)
    return torch.fft.irfft(kept, n=x.shape[1], dim=1)


ADJACENT = torch.rand(5, 5)
NO_STEPS: dict[str, tuple[nn.Module, Any]] = {
    "layers, pooled": (linear_model(layers(lambda m, y, n: y.mean(1, keepdim=True))), X),
    "layers, weighted": (linear_model(layers(lambda m, y, n: m.p * n * y)), X),
    "layers, their last tokens": (linear_model(layers(lambda m, y, n: y[:, -1:])), X),
    "layers, sums of logarithms": (
        linear_model(layers(lambda m, y, n: torch.tanh(y).sum(2, keepdim=True).expand_as(y))),
        X,
    ),
    "a layer behind another input's matrix": (
        linear_model(lambda m, x, a: torch.relu(m.a(a @ x) + m.b(x))),
        (X, ADJACENT),
    ),
    "two such layers": (
        linear_model(lambda m, x, a: m.a(a @ (y := torch.relu(m.a(a @ x) + m.b(x)))) + m.b(y)),
        (X, ADJACENT),
    ),
    "a layer in Fourier space": (linear_model(lambda m, x: torch.relu(fourier(m, m.a(x)) + m.b(m.a(x)))), X),
    "levels of a pyramid": (image_model(levels), IMAGES),
}


@pytest.mark.parametrize("name", NO_STEPS)
def test_networks_without_a_residual_have_no_step(name: str) -> None:
    model, inputs = NO_STEPS[name]
    steps = eulernet.find_steps(model, example_inputs=inputs)
    assert [step.name for step in steps] == ["last"]
    assert not (steps.long or steps.gated or steps.unsupported) and steps.left_out


def test_a_random_mask_leaves_a_branch_what_it_is() -> None:
    def shaken(m: nn.Module, x: Tensor) -> Tensor:
        drawn = torch.rand(len(x), *[1] * (x.dim() - 1))
        return x + drawn * m.a(x) + (1 - drawn) * m.b(x)

    steps = eulernet.find_steps(linear_model(shaken), example_inputs=X)
    assert [step.kind for step in steps] == ["parallel", "identity"]


@pytest.mark.parametrize("reason", REASONS)
def test_the_reason_is_right_and_the_place_too(reason: str) -> None:
    model, inputs = REASONS[reason]
    steps = eulernet.find_steps(model, example_inputs=inputs)
    (left,) = steps.left_out
    calls = 2 if reason == "sum of layers" else 1  # of two layers it could as well be a step
    assert (left.reason, left.calls) == (reason, calls)
    assert (left.module_name, left.module_class) in (("<root>", "Model"), ("second", "Scored"))
    assert left.file == __file__ and re.search(r" [+-] ", SOURCE[left.line - 1])
    assert f"{calls} {reason}" in str(steps)
    assert steps[-1].name == "last"


def test_a_sum_that_is_left_out_says_after_which_step_it_ran() -> None:
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.Sequential(Block(), Block())
            self.p = nn.Parameter(torch.ones(DIM))

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.p
            return self.blocks(x) + self.p

    steps = eulernet.find_steps(Late(), example_inputs=X)
    assert [left.after for left in steps.left_out] == [None, 1]
    assert Steps.from_json(steps.to_json()) == steps


# ---- what still computes at h = 0


def post_norm() -> nn.Module:
    layers = (nn.Sequential(Block(nn.Sequential(nn.Linear(DIM, DIM), nn.Tanh())), nn.LayerNorm(DIM)) for _ in range(3))
    return nn.Sequential(nn.Linear(DIM, DIM), *layers, nn.Linear(DIM, 3))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "blocks between two maps": lambda: nn.Sequential(nn.Linear(DIM, DIM), Block(), Block(), nn.Linear(DIM, 3)),
    "post-norm": post_norm,
    "a block that was missed": lambda: nn.Sequential(Block(), nn.Linear(DIM, DIM), nn.Tanh(), Block()),
    "groups of blocks": groups,
    **{cls.__name__: cls for cls in TRAPS},
}


@pytest.mark.parametrize("name", NETWORKS)
def test_what_lies_in_branches_gets_no_gradient_at_a_tiny_h(name: str) -> None:
    """By numbers, not by the trace: at h = 1e-7 the gradient of what lies in branches is under a thousandth."""
    model: nn.Module = NETWORKS[name]()
    inputs = model.inputs() if isinstance(model, Trap) else (X,)
    torch.manual_seed(0)
    inputs = tuple(torch.randn_like(x).double() if x.is_floating_point() else x for x in inputs)
    for parameter in model.double().eval().parameters():
        nn.init.normal_(parameter, std=0.5)
    outside = eulernet.find_steps(model, example_inputs=inputs).outside
    if isinstance(model, FourierBranch):
        assert outside.of == 0
        return
    if isinstance(
        model, DetachedBetweenItsSteps | ADetachedStateBesideItsBranch
    ):  # whose stem computes at h = 0, and is cut off from any gradient
        assert outside.names == ("stem",)
        return
    norms = []
    for h in (1.0, 1e-7):
        eulernet.patch(model, h, example_inputs=inputs)
        model.zero_grad()
        outputs = [y for y in tree_leaves(model(*inputs)) if y.requires_grad]
        sum((y * torch.linspace(0.5, 1, y.numel()).view_as(y)).sum() for y in outputs).backward()
        norms.append([0.0 if p.grad is None else float(p.grad.norm()) for p in model.parameters()])
    sizes = [p.numel() for p in model.parameters()]
    alive = [b > 1e-3 * a for a, b in zip(*norms, strict=True)]
    assert sum(size for size, alive in zip(sizes, alive, strict=True) if alive) == outside.parameters


def test_a_block_that_was_missed_shows_by_its_name() -> None:
    steps = eulernet.find_steps(NETWORKS["a block that was missed"](), example_inputs=X)
    assert str(steps).splitlines()[-1] == "144 of 216 parameters lie in branches; outside: 1"


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["layer2.0.fc", "layer3.0.fc", "layer4.0.fc"], "layer2-4.0.fc"),
        (["up.0.fc.0", "up.0.fc.1", "up.1.fc.0", "up.1.fc.1", "head"], "up.0-1.fc.0-1, head"),
        (["a.0.x", "a.2.x", "a.3.x"], "a.0.x, a.2-3.x"),
    ],
)
def test_names_outside_are_drawn_together(names: list[str], said: str) -> None:
    from eulernet._find.account import _in_ranges

    assert ", ".join(_in_ranges(names)) == said


# ---- what patch says


def said_by_patch(model: nn.Module, **arguments: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", EulernetWarning)
        eulernet.patch(model, 0.5, example_inputs=X, **arguments)
    return [str(w.message) for w in caught if w.category is EulernetWarning]


def test_a_main_stream_that_keeps_one_is_named_with_the_call_that_mends_it() -> None:
    (said,) = said_by_patch(groups())
    assert "keeps h = 1 at body.0, body.1, body.2, <root>: long steps" in said
    assert eval("dict(" + re.search(r"eulernet\.patch\(model, h, ([^)]*)\)", said)[1] + ")") == {"include": "*"}
    assert said_by_patch(groups(), include="*") == []


def test_who_excludes_long_steps_has_decided() -> None:
    assert said_by_patch(groups(), exclude=lambda step: step.kind == "long") == []
    (said,) = said_by_patch(groups(), exclude=lambda step: step.kind == "long" and step.name != "body.1")
    assert "keeps h = 1 at body.1: long steps" in said


def test_networks_that_are_whole_stay_silent() -> None:
    assert said_by_patch(nn.Sequential(nn.Linear(DIM, DIM), Block(), Block(), nn.LayerNorm(DIM))) == []


def test_where_no_step_is_found_the_error_says_what_the_sums_are() -> None:
    model = Model(lambda m, x: m.a(x) + m.b(x), nn.Linear(DIM, DIM), nn.Linear(DIM, DIM), nn.Identity())
    with pytest.raises(EulernetError, match="sums that are no steps: 1 siblings"):
        eulernet.patch(model, 0.5, example_inputs=X)


def test_unequal_twins_are_named() -> None:
    (said,) = said_by_patch(nn.Sequential(Block(), Block(nn.ReLU()), Block()))
    assert "is a step in 2 of 3 modules of class Block, and none in 1;" in said
    assert f"{__file__}:" in said


def test_unequal_twins_are_told_apart_on_one_line() -> None:
    """In the first module the first of two sums on a line has no map in its branch."""

    class OnOneLine(nn.Module):
        def __init__(self, a: nn.Module) -> None:
            super().__init__()
            self.a, self.b = a, nn.Linear(DIM, DIM)

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.a(x); return x + self.b(x)  # noqa: E702  # fmt: skip

    (said,) = said_by_patch(nn.Sequential(OnOneLine(nn.ReLU()), OnOneLine(nn.Linear(DIM, DIM))))
    assert "is a step in 1 of 2 modules of class OnOneLine, and none in 0;" in said


def test_what_is_not_supported_is_said_once_a_place() -> None:
    class Overwritten(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(DIM, DIM)

        def forward(self, x: Tensor) -> Tensor:
            return x.clone().lerp_(self.a(x), 0.5)

    (said,) = said_by_patch(nn.Sequential(*(Overwritten() for _ in range(4)), Block()))
    first, last = said.splitlines()
    assert first.startswith("not scaled, because not supported: {0-3} (") and "was written into" in first
    assert "eulernet.functional.euler_step(skip, branch, h)" in last


# ---- the picture


def drawn(steps: Steps, gid: str) -> int:
    (axes,) = steps.plot().axes
    return sum(artist.get_gid() == gid for artist in (*axes.lines, *axes.patches))


def texts(steps: Steps) -> list[str]:
    (axes,) = steps.plot().axes
    return [text.get_text() for text in axes.texts]


def test_what_repeats_is_one_station() -> None:
    layer = nn.TransformerEncoderLayer(DIM, 2, 16, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 12, enable_nested_tensor=False)
    steps = eulernet.find_steps(encoder, example_inputs=X)
    assert len(steps) == 24
    assert drawn(steps, "station") == 2 and drawn(steps, "box") == 1 and drawn(steps, "stream") == 1
    assert {"layers.{0-11}:0", "layers.{0-11}:1", "\N{MULTIPLICATION SIGN} 12"} <= set(texts(steps))


def test_long_steps_are_arcs_around_what_is_in_their_branch() -> None:
    steps = eulernet.find_steps(groups(3, 4), example_inputs=X)
    shown = picture(steps)
    assert [row.name for row in shown.rows] == ["body.{0-2}.body.{0-3}", "body.{0-2}", "<root>"]
    assert [(arc.first, arc.last, arc.lane) for arc in shown.arcs] == [(0, 1, 0), (0, 2, 1)]
    assert [(box.first, box.last, box.times) for box in shown.boxes] == [(0, 0, 4), (0, 1, 3)]
    assert drawn(steps, "arc") == 2 and drawn(steps, "station") == 3


def test_two_long_steps_of_one_module_have_an_arc_each() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.up = (nn.Sequential(Block(), Block()) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.down(x)
            return x + self.up(x)

    shown = picture(eulernet.find_steps(Two(), example_inputs=X))
    assert [row.name for row in shown.rows] == ["down.{0-1}", "<root>:0", "up.{0-1}", "<root>:1"]
    assert [(arc.first, arc.last) for arc in shown.arcs] == [(0, 1), (2, 3)]


def test_gated_updates_stand_where_they_run() -> None:
    model = nn.Sequential(Highway(), Block(), Highway(), Highway(), Block())
    steps = eulernet.find_steps(model, example_inputs=X)
    assert [(step.name, step.after) for step in steps.gated] == [("0", None), ("2", 0), ("3", 0)]
    assert [row.name for row in picture(steps).rows] == ["0", "1", "{2-3}", "4"]
    eulernet.patch(model, 0.5, include="*", example_inputs=X)
    assert [row.name for row in picture(eulernet.steps(model)).rows] == ["0", "1", "{2-3}", "4"]
    assert Steps.from_json(steps.to_json()) == steps


@pytest.mark.parametrize("reason", REASONS)
def test_what_was_left_out_is_drawn_with_its_reason(reason: str) -> None:
    model, inputs = REASONS[reason]
    steps = eulernet.find_steps(model, example_inputs=inputs)
    assert drawn(steps, "no step") == 1 and reason in (text.partition(",")[0] for text in texts(steps))


def test_each_step_stands_in_the_picture_once() -> None:
    for cls in TRAPS[::10]:
        model, inputs = build(cls)
        steps = eulernet.find_steps(model, example_inputs=inputs)
        shown = [step.name for row in picture(steps).rows for step in row.steps]
        assert sorted(shown) == sorted(step.name for step in (*steps, *steps.long, *steps.gated))


def test_the_texts_of_a_picture_do_not_overlap() -> None:
    """By the boxes that matplotlib gives them, in a picture with arcs, boxes in boxes, reasons and h."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    model = nn.Sequential(REASONS["siblings"][0], groups(3, 4))
    eulernet.patch(model, lambda step: 1 / (step.index + 1), example_inputs=X)
    steps = eulernet.find_steps(model, example_inputs=X)
    figure = steps.with_h([step.h for step in eulernet.steps(model)]).plot(title="a model")
    renderer = FigureCanvasAgg(figure).get_renderer()
    boxes = [text.get_window_extent(renderer) for text in figure.axes[0].texts if text.get_text()]
    assert len(boxes) > 15 and all(b.x0 >= 0 and b.x1 <= figure.bbox.x1 and b.y0 >= 0 for b in boxes)
    assert not [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]


def test_h_stands_at_each_station_and_is_one_where_a_long_step_is_left_alone() -> None:
    model = groups(2, 3)
    steps = eulernet.find_steps(model, example_inputs=X)
    shown = texts(steps.with_h([0.5, 0.25, 0.125] * 2))
    assert shown.count("0.5 to 0.125") == 1 and shown.count("1") == 3  # <root>: h and D; the groups: h
    assert "h" in shown and "h" not in texts(steps)


def test_a_step_that_runs_several_times_says_how_often() -> None:
    block = Block()
    assert "0 (3 calls)" in texts(eulernet.find_steps(nn.Sequential(block, block, block), example_inputs=X))


@pytest.mark.parametrize("ending", [".svg", ".png", ".pdf"])
def test_it_is_written(ending: str, tmp_path: Path) -> None:
    eulernet.find_steps(Block(), example_inputs=X).plot(tmp_path / f"steps{ending}")
    start = (tmp_path / f"steps{ending}").read_bytes()[:5]
    assert start == {".svg": b"<?xml", ".png": b"\x89PNG\r", ".pdf": b"%PDF-"}[ending]


def test_a_wrong_file_is_refused_before_anything_is_drawn(tmp_path: Path) -> None:
    steps = eulernet.find_steps(Block(), example_inputs=X)
    with pytest.raises(EulernetError, match=r"'steps.doc' does not end in a format .* write 'steps.svg'"):
        steps.plot(tmp_path / "steps.doc")
    with pytest.raises(EulernetError, match="there is no folder"):
        steps.plot(tmp_path / "nowhere" / "steps.svg")


def test_plot_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = eulernet.find_steps(Block(), example_inputs=X)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(EulernetError, match="pip install matplotlib"):
        steps.plot()


def test_names_that_repeat() -> None:
    assert together(["blocks.0:1"]) == "blocks.0:1"
    assert together(f"blocks.{i}:1" for i in (0, 1, 2, 5)) == "blocks.{0-2,5}:1"
