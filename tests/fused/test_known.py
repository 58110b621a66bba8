"""What a module computes is known by what its class does, and a traceback shows the original's line."""

import copy
import inspect
from collections.abc import Callable

import pytest
import timm
import torch
import transformers
from torch import Tensor, nn

import eulernet
from eulernet import kernels
from eulernet._run import known
from tests.helpers.fused import DEVICE, Builder, InStatements, PreNorm, dinov2, images, randomized, tokens

pytest.importorskip("triton")

# The interpreter of Triton 3.6 makes numbers of arrays with one element. NumPy warns of it, and refuses it from 2.4 on.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")


class TwiceLayerScale(nn.Module):
    """Called like a LayerScale, which it is not."""

    def __init__(self) -> None:
        super().__init__()
        self.lambda1 = nn.Parameter(torch.rand(8))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.lambda1 * self.lambda1


class MyLayerScale(nn.Module):
    """As in timm up to 1.0.13, whose models have their own."""

    def __init__(self) -> None:
        super().__init__()
        self.inplace, self.gamma = False, nn.Parameter(torch.rand(8))

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(self.gamma) if self.inplace else x * self.gamma


class MyDropPath(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.drop_prob = 0.5

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rand(len(x), *[1] * (x.dim() - 1))


class MyRMSNorm(nn.Module):
    """As in Gemma."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.rand(8)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x, (8,), 1 + self.weight, self.variance_epsilon)


@pytest.mark.parametrize("divides_by", ["mean square", "variance"])
def test_a_norm_of_timm_is_known_by_what_it_computes(divides_by: str) -> None:
    """Before 1.0.13 its RmsNorm divided by the variance."""

    class RmsNorm(timm.layers.RmsNorm):
        def forward(self, x: Tensor) -> Tensor:
            divided = x.square().mean(-1, True) if divides_by == "mean square" else x.var(-1, keepdim=True)
            return x * torch.rsqrt(divided + self.eps) * self.weight

    RmsNorm.__module__, RmsNorm.__qualname__ = "timm.layers.norm", "RmsNorm"
    assert (known.norm(RmsNorm(8)) is not None) == (divides_by == "mean square")


def test_a_class_is_known_by_what_it_computes() -> None:
    """Not by its name alone; and nothing is drawn from the generators to find out."""
    layers = transformers.models.dinov2.modeling_dinov2
    assert known.before(layers.Dinov2LayerScale(dinov2().config)) == known.before(MyLayerScale()) == "LayerScale"
    assert known.before(layers.Dinov2DropPath(0.5)) == "DropPath"
    norm = transformers.models.llama.modeling_llama.LlamaRMSNorm(8)
    assert known.norm(norm) == known.Norm("rms_norm", 8, norm.weight, None, 1e-6, written_out=True)
    norm = transformers.models.gemma2.modeling_gemma2.Gemma2RMSNorm(8)
    assert known.norm(norm) == known.Norm("rms_norm", 8, norm.weight, None, 1e-6, written_out=True, shifted=True)
    ambiguous = MyLayerScale()
    ambiguous.lambda1 = nn.Parameter(torch.rand(8))
    others = [ambiguous, MyDropPath(), TwiceLayerScale(), MyRMSNorm(), nn.LayerNorm((2, 8))]
    state = torch.get_rng_state()
    assert not any(known.before(module) or known.norm(module) for module in others)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("build", "inputs", "name"), [(InStatements, images, "bn3"), (PreNorm, tokens, "norm2")])
@pytest.mark.filterwarnings("ignore::eulernet.EulernetWarning")
def test_tracebacks_show_the_line_of_the_original(build: Builder, inputs: Callable[[], Tensor], name: str) -> None:
    """That of the call, although with kernels it may be made at the addition."""
    model, x = randomized(build()).eval(), inputs()
    patched = eulernet.patch(copy.deepcopy(model), h=0.3, example_inputs=x)
    lines = []
    for each in (model, patched):
        setattr(each, name, nn.Linear(5, 5).to(DEVICE))
        with kernels.mode("triton"), pytest.raises(RuntimeError, match="shapes cannot be multiplied") as error:
            each(x)
        lines.append([entry.lineno for entry in error.traceback if entry.path.samefile(inspect.getfile(build))][-1])
    assert lines[0] == lines[1]
