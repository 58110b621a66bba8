"""Patched models whose steps do what stands around them in one kernel: values, bits, hooks, dtypes."""

import copy

import pytest
import torch
from torch import Tensor, nn

import eulernet
from eulernet import kernels
from tests.helpers.checks import assert_identical, run, train
from tests.helpers.fused import DEVICE, KERNELS, MODELS, Block, Tail, images, randomized, tokens
from tests.helpers.reference import tensors

pytest.importorskip("triton")

# The interpreter of Triton 3.6 makes numbers of arrays with one element. NumPy warns of it, and refuses it from 2.4 on.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")


class IntoSkip(Tail):
    """The sum is written into the skip, which is the input."""

    def forward(self, x: Tensor) -> Tensor:
        x += self.norm(self.conv(x.clone()))  # which keeps its input for backward
        return self.act(x)


models = pytest.mark.parametrize("name", MODELS)


@models
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.filterwarnings("ignore::eulernet.EulernetWarning")
def test_the_kernels_give_what_eager_gives(name: str, dtype: torch.dtype, launches: list[str]) -> None:
    build, inputs, trained, inferred = MODELS[name]
    model, x = randomized(build()).to(dtype), inputs()
    x = x.to(dtype) if x.is_floating_point() else x
    eulernet.patch(model, h=0.3, example_inputs=x)
    plain, nudged = copy.deepcopy(model), copy.deepcopy(model)
    expected = train(plain, ((x,), {}))
    assert launches == []
    with kernels.mode("triton"):
        actual = train(model, ((x,), {}))
        in_training = launches.copy()
        with torch.no_grad():
            result = tensors(model.eval()(x))
    if dtype == torch.float32:
        forward = [f"{KERNELS[letter]}_forward" for letter in trained]
        backward = [f"{KERNELS[letter]}_backward" for letter in trained]
        assert in_training[: len(forward)] == forward and sorted(in_training[len(forward) :]) == sorted(backward)
        assert launches[2 * len(forward) :] == [f"{KERNELS[letter]}_forward" for letter in inferred]
    tolerance = 1e-4 if dtype == torch.float32 else 1e-5 if name in ("Llama", "DINOv2", "BERT") else 1e-10
    others = expected
    if DEVICE == "cuda" and dtype == torch.float32 and x.is_floating_point():
        # A GPU's convolutions differ in the last bit from run to run, and batch norm over 8 numbers makes up to a tenth
        # of that. So it counts what such a change of the input does.
        others = train(nudged, ((x * (1 + 1e-7 * torch.randn_like(x)),), {}))
    for a, e, other in zip(actual, expected, others, strict=True):
        assert (a.dtype, a.shape, a.stride()) == (e.dtype, e.shape, e.stride())
        # the sum is rounded once, not three times; batch norm over 8 numbers makes more of it
        largest = max(1.0, e.double().abs().max().item())
        nudge = (other.double() - e.double()).abs().max().item()
        torch.testing.assert_close(a, e, rtol=tolerance, atol=max(tolerance * largest, 4 * nudge))
    for a, e in zip(result, tensors(plain.eval()(x)), strict=True):
        assert (a.dtype, a.shape, a.stride()) == (e.dtype, e.shape, e.stride())
        torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance)


@models
@pytest.mark.filterwarnings("ignore::eulernet.EulernetWarning")
def test_on_the_cpu_the_bits_are_the_originals(name: str, launches: list[str]) -> None:
    build, inputs, *_ = MODELS[name]
    model, x = randomized(build()).cpu(), inputs().cpu()
    patched = eulernet.patch(copy.deepcopy(model), h=1.0, example_inputs=x)
    assert_identical(train(patched, ((x,), {})), train(model, ((x,), {})))
    assert launches == []


@models
@pytest.mark.filterwarnings("ignore::eulernet.EulernetWarning")
def test_with_one_the_bits_are_the_originals_whatever_computes(name: str, launches: list[str]) -> None:
    build, inputs, *_ = MODELS[name]
    model, x = randomized(build()), inputs()
    patched = eulernet.patch(copy.deepcopy(model), h=1.0, example_inputs=x)
    with kernels.mode("triton"):
        assert_identical(run(patched, ((x,), {})), run(model, ((x,), {})))
        assert_identical(train(patched, ((x,), {})), train(model, ((x,), {})))


@models
@pytest.mark.filterwarnings("ignore::eulernet.EulernetWarning")
def test_compiled_graphs_are_whole_and_without_kernels(name: str, launches: list[str]) -> None:
    build, inputs, *_ = MODELS[name]
    model, x = randomized(build()).eval(), inputs()
    eulernet.patch(model, h=0.3, example_inputs=x)
    torch.compiler.reset()
    with kernels.mode("triton"):
        compiled = tensors(torch.compile(model, backend="eager", fullgraph=True)(x))
    for a, e in zip(compiled, tensors(model(x)), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)
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


def test_inference_mode_runs_the_kernels(launches: list[str]) -> None:
    model, x = Tail().to(DEVICE).eval(), images()
    eulernet.patch(model, h=0.3, example_inputs=x)
    with torch.inference_mode():
        expected = model(x)
        with kernels.mode("triton"):
            torch.testing.assert_close(model(x), expected)
    assert launches == ["bn_forward"]


def test_an_addition_in_place_has_the_gradients_of_eager() -> None:
    model, x = IntoSkip().to(DEVICE).eval(), images().requires_grad_()
    eulernet.patch(model, h=0.3, example_inputs=x)
    with kernels.mode("triton"):
        (actual,) = torch.autograd.grad(model(x * 1).square().sum(), x)
    (expected,) = torch.autograd.grad((x + 0.3 * model.norm(model.conv(x))).relu().square().sum(), x)
    torch.testing.assert_close(actual, expected)


def test_frozen_parameters_and_mixed_precision_give_what_eager_gives(launches: list[str]) -> None:
    model, x = Block().to(DEVICE).eval(), tokens()
    eulernet.patch(model, h=0.3, example_inputs=x)
    model.ls.gamma.requires_grad_(False)
    with torch.autocast(DEVICE, torch.bfloat16):
        expected = model(x)
        with kernels.mode("triton"):
            actual = model(x)
    assert launches == ["step_forward"] and actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected)
