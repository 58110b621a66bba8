"""Ifs, shapes and modules between a branch, its addition and the norm after it."""

import pytest
import timm
import torch
from torch import Tensor, nn

import eulernet
from eulernet import kernels
from eulernet._run import fuse
from tests.helpers.fused import (
    DEVICE,
    AugmentedElsewhere,
    BeforeAnIf,
    Builder,
    InAnIfSmooth,
    NormWithActivation,
    PreNorm,
    images,
    pictures,
    randomized,
    tokens,
)

pytest.importorskip("triton")

# The interpreter of Triton 3.6 makes numbers of arrays with one element. NumPy warns of it, and refuses it from 2.4 on.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")


class Context(PreNorm):
    """An `if` that is gone through writes into the state, or makes another one."""

    exchanged = False

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        x = x + self.attn(x)
        if context is not None:
            x.abs_()
            if self.exchanged:
                x = x + self.attn(context)
        return x + self.mlp(self.norm2(x))


@pytest.mark.filterwarnings("ignore:.* adds here what the example_inputs:eulernet.EulernetWarning")  # the other way
@pytest.mark.parametrize("exchanged", [False, True])
@pytest.mark.filterwarnings("ignore:the stream from the model's input:eulernet.EulernetWarning")
def test_an_if_before_a_norm_that_is_gone_through(exchanged: bool, launches: list[str]) -> None:
    """What was computed ahead is forgotten, in inference mode too, where nobody counts who writes."""
    model, x, context = randomized(Context()).eval(), tokens(), tokens()
    model.exchanged = exchanged
    eulernet.patch(model, h=0.3, example_inputs=x)
    with torch.inference_mode():
        for given in ((x,), (x, context)):
            expected = model(*given)
            with kernels.mode("triton"):
                torch.testing.assert_close(model(*given), expected)
    assert launches == ["norm_forward"] * 2


def test_an_if_around_a_sum_that_is_left_out(launches: list[str]) -> None:
    """Its activation is called, and the method keeps its docstring."""
    model, x = randomized(InAnIfSmooth()).eval(), images()
    eulernet.patch(model, h=0.3, example_inputs=x)
    assert type(model).forward.__doc__ == InAnIfSmooth.forward.__doc__
    model.downsample = None
    with kernels.mode("triton"), torch.no_grad():
        torch.testing.assert_close(model(x), model.act(model.norm(model.conv(x))))
    assert launches == []


@pytest.mark.filterwarnings("ignore:.* adds here what the example_inputs:eulernet.EulernetWarning")  # the other way
@pytest.mark.parametrize("build", [BeforeAnIf, AugmentedElsewhere])
def test_a_branch_that_waits_is_a_tensor_in_the_other_half_of_an_if(build: Builder, launches: list[str]) -> None:
    model, x = randomized(build()).eval(), images()
    eulernet.patch(model, h=0.3, example_inputs=x)
    model.has_skip = False
    with torch.no_grad():
        expected = model(x)
        with kernels.mode("triton"):
            torch.testing.assert_close(model(x), expected)
    assert type(expected) is Tensor and launches == []


@pytest.mark.parametrize(("name", "steps"), [("efficientnet_b0", 9), ("mobilenetv3_small_100", 6)])
@pytest.mark.filterwarnings("ignore::eulernet.EulernetWarning")
def test_inverted_residuals_do_their_batch_norm_with_the_step(name: str, steps: int, launches: list[str]) -> None:
    model, x = randomized(timm.create_model(name, num_classes=3)).eval(), pictures()
    eulernet.patch(model, h=0.3, example_inputs=x)
    with torch.no_grad():
        expected = model(x)
        with kernels.mode("triton"):
            torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    assert launches == ["bn_forward"] * steps


def test_a_state_in_another_shape_has_the_norm_of_its_rows(launches: list[str]) -> None:
    """Where the new shape has other rows, or they were copied, the norm is called."""
    state = torch.randn(4, 2, 8, device=DEVICE)
    norm = nn.LayerNorm(8).to(DEVICE)
    for given, known in (
        (state, True), (state.reshape(8, 8), True), (state.view(2, 2, 2, 8), True), (state.reshape(4, 16), False),
        (state.transpose(0, 1), False), (state.transpose(0, 1).reshape(8, 8), False), (state[:2], False),
    ):  # fmt: skip
        marked = torch.full_like(state, 7.0)
        found = fuse.PrecomputedNorm(norm, state, marked).of(given)
        assert (found is not None) == known
        if found is not None:
            assert found.shape == given.shape and found.unique().tolist() == [7]


@pytest.mark.parametrize("where", ["act", "drop", "activation"])
def test_what_a_batch_norm_holds_runs(where: str, launches: list[str]) -> None:
    """A hook on its activation, and one that is not the identity."""
    model, x = randomized(NormWithActivation(apply_act=where == "activation")).eval(), images()
    eulernet.patch(model, h=0.3, example_inputs=x)
    if where != "activation":
        getattr(model.norm, where).register_forward_hook(lambda module, args, out: out + 1)
    with torch.no_grad():
        expected = model(x)
        with kernels.mode("triton"):
            torch.testing.assert_close(model(x), expected)
    assert launches == ["step_forward"]
