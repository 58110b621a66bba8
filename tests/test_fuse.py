"""A patched model whose steps do what stands around them in one kernel gives what it gives without."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torchvision
from checks import assert_identical, run, train
from timm.layers import DropPath, LayerScale, LayerScale2d
from torch import Tensor, nn

import eulernet
from eulernet import kernels

pytest.importorskip("triton")
from eulernet.kernels import _layout, _step

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _exact_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU convolutions would round to 10 bits by default, which makes much of a small difference."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that ran."""
    names: list[str] = []

    def counted(kernel: Any, *args: Any, **options: Any) -> None:
        names.append(kernel.fn.__name__)
        _layout.launch(kernel, *args, **options)

    monkeypatch.setattr(_step, "launch", counted)
    return names


class Block(nn.Module):
    """A block of a transformer with all that timm puts around an addition."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp, self.ls, self.drop_path = (
            nn.LayerNorm(8),
            nn.Linear(8, 8),
            LayerScale(8, 0.5),
            DropPath(0.5),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.ls(self.mlp(self.norm(x))))


class Convolutional(nn.Module):
    """LayerScale on channels, and an activation around the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.ls, self.drop_path, self.act = (
            nn.Conv2d(8, 8, 1),
            LayerScale2d(8, 0.5),
            DropPath(0.5),
            nn.GELU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x + self.drop_path(self.ls(self.conv(x))))


class Tail(nn.Module):
    """The tail of a ResNet."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        x = self.norm(self.conv(x))
        x += shortcut
        x = self.act(x)
        return x


class Returns(Tail):
    """Written otherwise: the sum is out of place, and its activation returned."""

    def forward(self, x: Tensor) -> Tensor:
        out = x + self.norm(self.conv(x))
        return self.act(out)


class SkipOnTheRight(Tail):
    """As in timm's RegNet: what is called around the right operand is called around the skip."""

    def __init__(self) -> None:
        super().__init__()
        self.drop_path, self.downsample = DropPath(0.5), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop_path(self.norm(self.conv(x))) + self.downsample(x)
        x = self.act(x)
        return x


class IntoSkip(Tail):
    """The sum is written into the skip, which is the input."""

    def forward(self, x: Tensor) -> Tensor:
        x += self.norm(self.conv(x.clone()))  # which keeps its input for backward
        return self.act(x)


def tokens() -> Tensor:
    return torch.randn(4, 5, 8, device=DEVICE)


def images() -> Tensor:
    return torch.randn(4, 8, 3, 3, device=DEVICE).contiguous(memory_format=torch.channels_last)


def deit3() -> nn.Module:
    return timm.create_model(
        "deit3_small_patch16_224", img_size=32, embed_dim=24, depth=2, num_heads=2, drop_path_rate=0.5, num_classes=3
    )


def resnet() -> nn.Module:
    return timm.create_model("resnet14t", num_classes=3)


def torchvision_resnet() -> nn.Module:
    return torchvision.models.resnet18(num_classes=3)


def pictures() -> Tensor:
    return torch.randn(2, 3, 32, 32, device=DEVICE)


MODELS: list[tuple[Callable[[], nn.Module], Callable[[], Tensor], int]] = [
    (Block, tokens, 1),
    (Convolutional, images, 1),
    (Tail, images, 1),
    (Returns, images, 1),
    (SkipOnTheRight, images, 1),
    (deit3, pictures, 4),
    (resnet, pictures, 4),
    (torchvision_resnet, pictures, 8),
]
models = pytest.mark.parametrize(("build", "inputs", "steps"), MODELS, ids=lambda value: getattr(value, "__name__", ""))


@models
@pytest.mark.filterwarnings("ignore::eulernet.EulernetWarning")
def test_the_kernels_give_what_eager_gives(
    build: Callable[[], nn.Module], inputs: Callable[[], Tensor], steps: int, launches: list[str]
) -> None:
    model, x = build().to(DEVICE), inputs()
    eulernet.patch(model, h=0.3, example_inputs=x)
    plain = copy.deepcopy(model)
    expected = train(plain, ((x,), {}))
    assert launches == []
    with kernels.mode("triton"):
        actual = train(model, ((x,), {}))
        assert launches == ["step_forward"] * steps + ["step_backward"] * steps
        with torch.no_grad():
            inferred = model.eval()(x)
    assert len(launches) == 3 * steps
    for a, e in zip(actual, expected, strict=True):
        assert (a.dtype, a.shape, a.stride()) == (e.dtype, e.shape, e.stride())
        # the sum is rounded once, not three times; batch norm over 8 numbers makes more of it
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4 * max(1.0, e.abs().max().item()))
    torch.testing.assert_close(inferred, plain.eval()(x), rtol=1e-4, atol=1e-5)


@models
@pytest.mark.filterwarnings("ignore::eulernet.EulernetWarning")
def test_on_the_cpu_the_bits_are_the_originals(
    build: Callable[[], nn.Module], inputs: Callable[[], Tensor], steps: int, launches: list[str]
) -> None:
    model, x = build(), inputs().cpu()
    patched = eulernet.patch(copy.deepcopy(model), h=1.0, example_inputs=x)
    assert_identical(train(patched, ((x,), {})), train(model, ((x,), {})))
    assert launches == []


@models
@pytest.mark.filterwarnings("ignore::eulernet.EulernetWarning")
def test_with_one_the_bits_are_the_originals_whatever_computes(
    build: Callable[[], nn.Module], inputs: Callable[[], Tensor], steps: int, launches: list[str]
) -> None:
    model, x = build().to(DEVICE), inputs()
    patched = eulernet.patch(copy.deepcopy(model), h=1.0, example_inputs=x)
    with kernels.mode("triton"):
        assert_identical(run(patched, ((x,), {})), run(model, ((x,), {})))
        assert_identical(train(patched, ((x,), {})), train(model, ((x,), {})))


@models
@pytest.mark.filterwarnings("ignore::eulernet.EulernetWarning")
def test_compiled_graphs_are_whole_and_without_kernels(
    build: Callable[[], nn.Module], inputs: Callable[[], Tensor], steps: int, launches: list[str]
) -> None:
    model, x = build().to(DEVICE).eval(), inputs()
    eulernet.patch(model, h=0.3, example_inputs=x)
    torch.compiler.reset()
    with kernels.mode("triton"):
        compiled = torch.compile(model, backend="eager", fullgraph=True)(x)
    torch.testing.assert_close(compiled, model(x), rtol=1e-4, atol=1e-5)
    assert launches == []


@pytest.mark.parametrize("name", ["ls", "drop_path"])
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"])
def test_hooks_run(name: str, kind: str, launches: list[str]) -> None:
    model, x = Block().to(DEVICE).train(), tokens().requires_grad_()
    eulernet.patch(model, h=0.3, example_inputs=x)
    seen: list[str] = []
    handle = getattr(getattr(model, name), kind)(lambda *args: seen.append(kind))
    torch.manual_seed(1)
    with kernels.mode("triton"):
        hooked = model(x)
        hooked.sum().backward()
        handle.remove()
        torch.manual_seed(1)
        torch.testing.assert_close(model(x), hooked)
    assert seen == [kind]
    torch.manual_seed(1)
    torch.testing.assert_close(model(x), hooked)


def test_hooks_on_all_modules_and_forwards_of_instances_run(launches: list[str]) -> None:
    model, x = Tail().to(DEVICE).eval(), images()
    eulernet.patch(model, h=0.3, example_inputs=x)
    seen: list[type] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.append(type(module)))
    with kernels.mode("triton"), torch.no_grad():
        expected = model(x)
        handle.remove()
        assert nn.ReLU in seen
        model.act.forward = lambda x: x * 0 + 7  # type: ignore[method-assign]
        assert model(x).unique().tolist() == [7]
        del model.act.forward
        torch.testing.assert_close(model(x), expected)


def test_a_module_replaced_after_patching_wins(launches: list[str]) -> None:
    model, x = Tail().to(DEVICE).eval(), images()
    eulernet.patch(model, h=0.3, example_inputs=x)
    model.act = nn.Tanh()
    with kernels.mode("triton"), torch.no_grad():
        torch.testing.assert_close(model(x), torch.tanh(x + 0.3 * model.norm(model.conv(x))))
        model.act = nn.SiLU()
        torch.testing.assert_close(model(x), nn.functional.silu(x + 0.3 * model.norm(model.conv(x))))
    block, x = Block().to(DEVICE).eval(), tokens()
    eulernet.patch(block, h=0.3, example_inputs=x)
    block.ls = nn.Linear(8, 8).to(DEVICE)
    with kernels.mode("triton"), torch.no_grad():
        torch.testing.assert_close(block(x), x + 0.3 * block.ls(block.mlp(block.norm(x))))


def test_in_place_stays_in_place(launches: list[str]) -> None:
    """The skip that is written into is the caller's tensor, in both modes of autograd."""
    model = IntoSkip().to(DEVICE).eval()
    eulernet.patch(model, h=0.3, example_inputs=images())
    for grad in (False, True):
        x = images()
        expected = (x + 0.3 * model.norm(model.conv(x))).relu().detach()
        with kernels.mode("triton"), torch.set_grad_enabled(grad):
            given = (x.requires_grad_() * 1) if grad else x
            version = given._version
            result = model(given)
            assert result.data_ptr() == given.data_ptr() and given._version > version
            torch.testing.assert_close(given.detach(), expected)
            if grad:
                result.sum().backward()
                fused = x.grad
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad"), kernels.mode("triton"):
        model(images().requires_grad_())
    x = images().requires_grad_()
    (x + 0.3 * model.norm(model.conv(x))).relu().sum().backward()
    assert fused is not None and fused.shape == x.grad.shape
    assert "step_backward" in launches


def test_inference_mode(launches: list[str]) -> None:
    model, x = Tail().to(DEVICE).eval(), images()
    eulernet.patch(model, h=0.3, example_inputs=x)
    with torch.inference_mode():
        expected = model(x)
        with kernels.mode("triton"):
            torch.testing.assert_close(model(x), expected)
    assert launches == ["step_forward"]


def test_the_gradients_of_an_addition_in_place() -> None:
    model, x = IntoSkip().to(DEVICE).eval(), images().requires_grad_()
    eulernet.patch(model, h=0.3, example_inputs=x)
    with kernels.mode("triton"):
        (actual,) = torch.autograd.grad(model(x * 1).square().sum(), x)
    (expected,) = torch.autograd.grad((x + 0.3 * model.norm(model.conv(x))).relu().square().sum(), x)
    torch.testing.assert_close(actual, expected)


def test_frozen_parameters_and_mixed_precision(launches: list[str]) -> None:
    model, x = Block().to(DEVICE).eval(), tokens()
    eulernet.patch(model, h=0.3, example_inputs=x)
    model.ls.gamma.requires_grad_(False)
    with torch.autocast(DEVICE, torch.bfloat16):
        expected = model(x)
        with kernels.mode("triton"):
            actual = model(x)
    assert launches == ["step_forward"] and actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected)
