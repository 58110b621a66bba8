"""A norm or an activation after an addition that a kernel computes with it, and when it does not."""

import copy
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import eulernet
from eulernet import kernels
from tests.helpers.checks import train
from tests.helpers.fused import (
    DEVICE,
    KERNELS,
    MODELS,
    Builder,
    Flagged,
    InStatements,
    PostNorm,
    PreNorm,
    PreRMSNorm,
    Returns,
    Tail,
    gemma,
    ids,
    images,
    llama,
    randomized,
    tokens,
)

pytest.importorskip("triton")

# The interpreter of Triton 3.6 makes numbers of arrays with one element. NumPy warns of it, and refuses it from 2.4 on.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")

FUSED: list[tuple[Builder, Callable[[], Tensor], str, str]] = [
    (Tail, images, "norm", "step_forward"),
    (InStatements, images, "bn3", "step_forward"),
    (InStatements, images, "act3", ""),
    (PreNorm, tokens, "norm2", "step_forward step_forward"),
    (PreNorm, tokens, "ls1", "norm_forward step_forward"),
    (PreNorm, tokens, "drop_path1", "norm_forward step_forward"),
    (PostNorm, tokens, "norm", ""),
]


@pytest.mark.parametrize(("build", "inputs", "name", "left"), FUSED)
@pytest.mark.filterwarnings("ignore::eulernet.EulernetWarning")
def test_a_hook_or_another_module_wins(
    build: Builder, inputs: Callable[[], Tensor], name: str, left: str, launches: list[str]
) -> None:
    """What is changed after patching is called, in inference; the other things around the step stay fused."""
    model, x = randomized(build()).eval(), inputs()
    eulernet.patch(model, h=0.3, example_inputs=x)
    original: Any = getattr(model, name)

    class Another(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return original(x) * 2

    changes: list[Callable[[], Any]] = [
        lambda: original.register_forward_hook(lambda module, args, out: out * 2),
        lambda: original.register_forward_pre_hook(lambda module, args: (args[0].abs(),)),
        lambda: setattr(original, "forward", lambda x: type(original).forward(original, x) * 2),
        lambda: setattr(model, name, Another()),
    ]
    with torch.no_grad():
        before = model(x)
        for change in changes:
            handle = change()
            expected = model(x)
            launches.clear()
            with kernels.mode("triton"):
                torch.testing.assert_close(model(x), expected)
            assert (expected - before).abs().max() > 1e-2
            assert set(launches) <= {*left.split(), "bn_forward"} if name == "act3" else launches == left.split()
            if handle is not None:
                handle.remove()
            vars(original).pop("forward", None)
            setattr(model, name, original)
        launches.clear()
        with kernels.mode("triton"):
            torch.testing.assert_close(model(x), before)
        assert launches == [f"{KERNELS[k]}_forward" for k in next(m[3] for m in MODELS.values() if m[0] is build)]


class Between(PreNorm):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)
        y = self.mlp(x) + self.norm2(x)
        return x + self.ls2(y)


class Perhaps(PreNorm):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)
        y = self.norm2(x) if self.norm1 is None else x
        return x + self.mlp(y)


class Exchanged(PreNorm):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)
        x, y = x * 2, x
        return x + self.mlp(self.norm2(x)) + y


class Elsewhere(PreNorm):
    def forward(self, x: Tensor) -> Tensor:
        if self.norm1 is not None:
            x = x + self.attn(x)
        return x + self.mlp(self.norm2(x))


@pytest.mark.parametrize("build", [Between, Perhaps, Exchanged, Elsewhere])
@pytest.mark.filterwarnings("ignore:the stream from the model's input:eulernet.EulernetWarning")  # one sum in another
def test_a_norm_that_is_not_called_next_is_called(build: Builder, launches: list[str]) -> None:
    """What is called in between may write into the state."""
    model, x = randomized(build()).eval(), tokens()
    eulernet.patch(model, h=0.3, example_inputs=x)
    model.mlp.register_forward_hook(lambda module, args, out: [args[0].abs_(), out][1])
    with torch.inference_mode():
        expected = model(x.clone())
        with kernels.mode("triton"):
            torch.testing.assert_close(model(x.clone()), expected)
    assert "norm_forward" not in launches


def test_a_flag_that_is_changed_after_patching_decides(launches: list[str]) -> None:
    """Then the norm of the sum is called, and writes into it: what was computed ahead is not taken any more."""
    model, x = randomized(Flagged()).eval(), tokens()
    eulernet.patch(model, h=0.3, example_inputs=x)
    model.norm1.register_forward_hook(lambda module, args, out: args[0].copy_(out))
    for flag in (False, True):
        model.norm_before = flag
        with torch.inference_mode():
            expected = model(x.clone())
            with kernels.mode("triton"):
                torch.testing.assert_close(model(x.clone()), expected)
    assert "norm_forward" in launches


def test_what_was_computed_ahead_is_not_kept(launches: list[str]) -> None:
    """The norm's result goes when the model is done with it, as in the original."""
    seen: list[weakref.ref[Tensor]] = []
    alive: list[bool] = []

    class Watched(PreNorm):
        def forward(self, x: Tensor) -> Tensor:
            x = x + self.attn(self.norm1(x))
            y = self.mlp(self.norm2(x))
            alive.append(seen[-1]() is not None)
            return x + y

    model, x = randomized(Watched()).eval(), tokens()
    model.mlp.register_forward_pre_hook(lambda module, args: seen.append(weakref.ref(args[0])))
    eulernet.patch(model, h=0.3, example_inputs=x)
    with torch.no_grad(), kernels.mode("triton"):
        model(x)
    assert launches == ["norm_forward"] and alive[-1] is False


def test_a_batch_norm_that_learns_in_inference_is_called(launches: list[str]) -> None:
    """Its affine parameters get gradients, which the kernel has none of."""
    model, x = randomized(Tail()).eval(), images()
    eulernet.patch(model, h=0.3, example_inputs=x)
    plain = copy.deepcopy(model)
    for each, mode in ((plain, "torch"), (model, "triton")):
        with kernels.mode(mode):
            each(x).square().sum().backward()
    assert launches == ["step_forward", "step_backward"]
    torch.testing.assert_close(model.norm.weight.grad, plain.norm.weight.grad)
    torch.testing.assert_close(model.norm.bias.grad, plain.norm.bias.grad)


def test_a_learned_h_has_the_gradient_of_eager(launches: list[str]) -> None:
    """With batch norm in inference it is a tensor, which the kernel does not take; with a norm it gets its gradient."""
    model, x = randomized(Returns()).eval(), images()
    eulernet.patch(model, h=0.3, trainable=True, example_inputs=x)
    with torch.no_grad():
        expected = model(x)
        with kernels.mode("triton"):
            torch.testing.assert_close(model(x), expected)
    assert launches == ["step_forward"]
    block, x = randomized(PreNorm()).eval(), tokens()
    eulernet.patch(block, h=0.3, trainable=True, example_inputs=x)
    expected = train(copy.deepcopy(block), ((x,), {}))
    launches.clear()
    with kernels.mode("triton"):
        actual = train(block, ((x,), {}))
    assert launches[:2] == ["norm_forward", "step_forward"]
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("build", [PreNorm, PreRMSNorm, llama, gemma], ids=lambda build: build.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_norms_give_the_dtypes_of_eager(
    build: Builder, dtype: torch.dtype, autocast: bool, launches: list[str]
) -> None:
    model, x = randomized(build()).to(dtype).eval(), ids() if build in (llama, gemma) else tokens().to(dtype)
    eulernet.patch(model, h=0.3, example_inputs=x)
    inner = model.layers[0].mlp if build in (llama, gemma) else model.mlp
    given: list[Tensor] = []
    inner.register_forward_pre_hook(lambda module, args: given.append(args[0]))
    with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        model(x)
        with kernels.mode("triton"):
            model(x)
    expected, actual = given
    assert (actual.dtype, actual.stride()) == (expected.dtype, expected.stride())
    unit = torch.finfo(torch.bfloat16 if autocast else dtype).eps
    assert (actual - expected).abs().max() <= 16 * unit * expected.abs().max()
    assert ("norm_forward" in launches) or autocast
