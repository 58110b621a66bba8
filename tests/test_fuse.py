"""A patched model whose steps do what stands around them in one kernel gives what it gives without."""

import copy
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torchvision
import transformers
from timm.layers import BatchNormAct2d, DropPath, LayerScale, LayerScale2d, RmsNorm
from timm.models.metaformer import Scale
from torch import Tensor, nn

import eulernet
from eulernet import kernels
from eulernet._run import fuse, known
from tests.helpers.checks import assert_identical, run, train
from tests.helpers.reference import tensors

pytest.importorskip("triton")
from eulernet.kernels._launch import Launch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _exact_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU convolutions would round to 10 bits by default, and their gradients differ from run to run."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


# The interpreter of Triton 3.6 makes numbers of arrays with one element. NumPy warns of it, and refuses it from 2.4 on.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that ran, but for the ends of sums."""
    names: list[str] = []

    start = Launch.__call__

    def counted(self: Launch, tensors: tuple[Tensor | None, ...], h: float) -> None:
        names.extend({self.kernel.fn.__name__} - {"sum_parts"})
        start(self, tensors, h)

    monkeypatch.setattr(Launch, "__call__", counted)
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


class InStatements(nn.Module):
    """The tail of timm's ResNet; between its batch norm and the sum stand other things."""

    def __init__(self, se: bool = False) -> None:
        super().__init__()
        self.conv3, self.bn3, self.act3 = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        self.se = nn.Conv2d(8, 8, 1) if se else None
        self.drop_path = DropPath(0.5)
        self.downsample = nn.Dropout(0.5)  # which draws after drop path
        self.mean: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        x = self.conv3(x)
        x = self.bn3(x)

        if self.se is not None:
            x = self.se(x)

        if self.drop_path is not None:
            x = self.drop_path(x)

        if self.downsample is not None:
            shortcut = self.downsample(shortcut)
        x += shortcut
        x = self.act3(x)
        return x


class Gammas(nn.Module):
    """LayerScale without a module: in an expression, and in a statement."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.drop_path = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), DropPath(0.5)
        self.gamma_1, self.gamma_2 = nn.Parameter(torch.rand(8, 1, 1)), nn.Parameter(torch.rand(8))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.gamma_1 * self.first(x))
        shortcut = x
        x = self.second(x)
        if self.gamma_2 is not None:
            x = x.mul(self.gamma_2.reshape(1, -1, 1, 1))
        x = self.drop_path(x) + shortcut
        return x


class PreNorm(nn.Module):
    """A block of a vision transformer: a norm follows the first sum."""

    norm: type[nn.Module] = nn.LayerNorm

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = self.norm(8), nn.Linear(8, 8), self.norm(8), nn.Linear(8, 8)
        self.ls1, self.ls2 = LayerScale(8, 0.5), LayerScale(8, 0.5)
        self.drop_path1, self.drop_path2 = DropPath(0.5), DropPath(0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        x = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return x


class PreRMSNorm(PreNorm):
    norm = RmsNorm


class PostNorm(nn.Module):
    """As in BERT: the norm takes the sum, and nothing else does."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.dense(x) + x)


class InAnIf(SkipOnTheRight):
    """As in RegNet: the activation of a sum that stands in an `if`."""

    activation: type[nn.Module] = nn.ReLU

    def __init__(self) -> None:
        super().__init__()
        self.act = self.activation()

    def forward(self, x: Tensor) -> Tensor:
        """Which the rewritten one keeps."""
        shortcut = x
        x = self.norm(self.conv(x))
        if self.downsample is not None:
            x = self.drop_path(x) + self.downsample(shortcut)
        return self.act(x)


class InAnIfSmooth(InAnIf):
    activation = nn.GELU


class BetweenIfs(PreNorm):
    """As in GPT-2: between a sum and its norm is an `if`."""

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        x = self.ls1(self.attn(self.norm1(x))) + x
        if context is not None:
            x = self.attn(context) + x
        residual = x
        x = self.norm2(x)
        return residual + self.mlp(x)


class Reshaped(PreNorm):
    """As in Swin: between a sum and its norm the state gets another shape."""

    def forward(self, x: Tensor) -> Tensor:
        batch, length, channels = x.shape
        x = x + self.attn(self.norm1(x))
        x = x.reshape(batch * length, channels)
        x = x + self.mlp(self.norm2(x))
        return x.view(batch, length, channels)


class BeforeAnIf(SkipOnTheRight):
    """As in EfficientNet: what is done to the branch stands before the `if` that the sum stands in."""

    has_skip = True

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        x = self.conv(x)
        x = self.norm(x)
        if self.has_skip and shortcut is not None:
            x = self.drop_path(x) + shortcut
        else:
            shortcut = shortcut + x.abs()
        x = x * 2
        return x + shortcut.mean() if self.has_skip else x - shortcut


class AugmentedElsewhere(SkipOnTheRight):
    """In the other half of the `if` the name is augmented, which a branch that waits could not be."""

    has_skip = True

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        x = self.norm(self.conv(x))
        if self.has_skip:
            x = self.drop_path(x) + shortcut
        else:
            x += 1
        return x


class DropsFirst(Block):
    """As in PoolFormer: drop path before LayerScale."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = Scale(8, 0.5, use_nchw=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls(self.drop_path(self.mlp(self.norm(x))))
        return x + self.scale(self.drop_path(self.mlp(x)))


class NormWithActivation(Tail):
    """The batch norm of timm that has an activation, here none."""

    def __init__(self, apply_act: bool = False) -> None:
        super().__init__()
        self.norm = BatchNormAct2d(8, apply_act=apply_act)


def tokens() -> Tensor:
    return torch.randn(4, 5, 8, device=DEVICE)


def images() -> Tensor:
    return torch.randn(4, 8, 3, 3, device=DEVICE).contiguous(memory_format=torch.channels_last)


def pictures() -> Tensor:
    return torch.randn(2, 3, 32, 32, device=DEVICE)


def large_pictures() -> Tensor:
    return torch.randn(2, 3, 64, 64, device=DEVICE).contiguous(memory_format=torch.channels_last)


def ids() -> Tensor:
    return torch.randint(0, 50, (2, 7), device=DEVICE)


def vit(name: str) -> Callable[[], nn.Module]:
    options = dict(img_size=32, embed_dim=24, depth=2, num_heads=2, drop_path_rate=0.5, num_classes=3)
    return lambda: timm.create_model(name, **options)


def timm_resnet(**options: Any) -> Callable[[], nn.Module]:
    return lambda: timm.create_model("resnet14t", num_classes=3, **options)


def timm_convnext() -> nn.Module:
    options = dict(depths=(1, 1, 2, 1), dims=(8, 16, 24, 32), drop_path_rate=0.5, num_classes=3)
    return timm.create_model("convnext_atto", **options).to(memory_format=torch.channels_last)


def torchvision_resnet() -> nn.Module:
    return torchvision.models.resnet18(num_classes=3)


def torchvision_convnext() -> nn.Module:
    stages = [torchvision.models.convnext.CNBlockConfig(8, None, 3)]
    model = torchvision.models.convnext.ConvNeXt(stages, stochastic_depth_prob=0.5, num_classes=3)
    return model.to(memory_format=torch.channels_last)


SMALL = dict(hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)


def dinov2() -> nn.Module:
    return transformers.Dinov2Model(
        transformers.Dinov2Config(**SMALL, image_size=32, patch_size=16, drop_path_rate=0.5)
    )


def llama() -> nn.Module:
    return transformers.LlamaModel(transformers.LlamaConfig(**SMALL, vocab_size=50, use_cache=False))


def bert() -> nn.Module:
    dropout = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return transformers.BertModel(transformers.BertConfig(**SMALL, **dropout, vocab_size=50))


def encoder(norm_first: bool) -> Callable[[], nn.Module]:
    return lambda: nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True, norm_first=norm_first)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=50, n_embd=8, n_layer=2, n_head=2, use_cache=False, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0
    )
    return transformers.GPT2Model(config)


# What a model does forward in training and in inference: each letter a kernel.
KERNELS = {"s": "step", "n": "norm", "b": "bn"}
Builder = Callable[[], nn.Module]
MODELS: dict[str, tuple[Builder, Callable[[], Tensor], str, str]] = {
    "Block": (Block, tokens, "s", "s"),
    "Convolutional": (Convolutional, images, "s", "s"),
    "Tail": (Tail, images, "s", "b"),
    "Returns": (Returns, images, "s", "b"),
    "SkipOnTheRight": (SkipOnTheRight, images, "s", "b"),
    "InStatements": (InStatements, images, "s", "b"),
    "InStatements, se": (lambda: InStatements(se=True), images, "s", "s"),
    "Gammas": (Gammas, images, "ss", "ss"),
    "PreNorm": (PreNorm, tokens, "ns", "ns"),
    "PreRMSNorm": (PreRMSNorm, tokens, "ns", "ns"),
    "PostNorm": (PostNorm, tokens, "n", "n"),
    "InAnIf": (InAnIf, images, "s", "b"),
    "InAnIfSmooth": (InAnIfSmooth, images, "s", "b"),
    "BetweenIfs": (BetweenIfs, tokens, "n", "n"),
    "Reshaped": (Reshaped, tokens, "n", "n"),
    "NormWithActivation": (NormWithActivation, images, "s", "b"),
    "BeforeAnIf": (BeforeAnIf, images, "s", "b"),
    "AugmentedElsewhere": (AugmentedElsewhere, images, "s", ""),
    "DropsFirst": (DropsFirst, tokens, "ss", "ss"),
    "GPT-2": (gpt2, ids, "nn", "nn"),
    "timm ResNet": (timm_resnet(drop_path_rate=0.5), pictures, "ssss", "bbbb"),
    "timm SE-ResNet": (timm_resnet(block_args={"attn_layer": "se"}), pictures, "ssss", "ssss"),
    "timm ConvNeXt": (timm_convnext, large_pictures, "sssss", "sssss"),
    "timm ViT": (vit("vit_tiny_patch16_224"), pictures, "nns", "nn"),  # nothing is fused with the others
    "timm DeiT 3": (vit("deit3_small_patch16_224"), pictures, "nsns", "nsns"),
    "timm BEiT": (vit("beit_base_patch16_224"), pictures, "nsns", "nsns"),
    "torchvision ResNet": (torchvision_resnet, pictures, "s" * 8, "b" * 8),
    "torchvision ConvNeXt": (torchvision_convnext, large_pictures, "sss", "sss"),
    "DINOv2": (dinov2, pictures, "nsns", "nsns"),
    "Llama": (llama, ids, "nn", "nn"),
    "BERT": (bert, ids, "nnnn", "nnnn"),
    "TransformerEncoderLayer, pre-norm": (encoder(norm_first=True), tokens, "n", "n"),
    "TransformerEncoderLayer, post-norm": (encoder(norm_first=False), tokens, "nn", "nn"),
}
models = pytest.mark.parametrize("name", MODELS)


def randomized(model: nn.Module) -> nn.Module:
    """Without gammas of 0, with which the branches of some models begin."""
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.squeeze().dim() == 1:
                nn.init.uniform_(parameter, 0.5, 1.5)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -1, 1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.to(DEVICE)


@models
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.filterwarnings("ignore::eulernet.EulernetWarning")
def test_the_kernels_give_what_eager_gives(name: str, dtype: torch.dtype, launches: list[str]) -> None:
    build, inputs, trained, inferred = MODELS[name]
    model, x = randomized(build()).to(dtype), inputs()
    x = x.to(dtype) if x.is_floating_point() else x
    eulernet.patch(model, h=0.3, example_inputs=x)
    plain = copy.deepcopy(model)
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
    for a, e in zip(actual, expected, strict=True):
        assert (a.dtype, a.shape, a.stride()) == (e.dtype, e.shape, e.stride())
        # the sum is rounded once, not three times; batch norm over 8 numbers makes more of it
        torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance * max(1.0, e.abs().max().item()))
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


def test_inference_mode(launches: list[str]) -> None:
    model, x = Tail().to(DEVICE).eval(), images()
    eulernet.patch(model, h=0.3, example_inputs=x)
    with torch.inference_mode():
        expected = model(x)
        with kernels.mode("triton"):
            torch.testing.assert_close(model(x), expected)
    assert launches == ["bn_forward"]


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


class Odd(nn.Module):
    """A batch norm whose result is not simply added."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.drop_path = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), DropPath(0.5)
        self.kept: Any = None


class ReadBetween(Odd):
    def forward(self, x: Tensor) -> Tensor:
        out = self.bn(self.conv(x))
        self.kept = out.mean()
        out += x
        return out


class ReadAfter(Odd):
    def forward(self, x: Tensor) -> Tensor:
        out = self.bn(self.conv(x))
        y = x + out
        return y * out.sigmoid()


class ReadByAFunction(Odd):
    def forward(self, x: Tensor) -> Tensor:
        out = self.bn(self.conv(x))
        self.kept = lambda: out.mean()
        return x + out


class ReadInALoop(Odd):
    def forward(self, x: Tensor) -> Tensor:
        out = x
        for _ in range(2):
            x = x + out.mean() * 0.1
            out = self.bn(self.conv(x))
            x = x + out
        return x + out.mean()


class ReadWithAllLocals(Odd):
    def forward(self, x: Tensor) -> Tensor:
        out = self.bn(self.conv(x))
        self.kept = locals()["out"].mean()
        return x + out


class ReadAfterAnError(Odd):
    def forward(self, x: Tensor) -> Tensor:
        out = self.conv(x)
        try:
            out = self.bn(out)
            out = out + x.view(-1)[:0].view(x.shape) if self.kept else out + x
        except RuntimeError:
            return out * 2
        return out


class Augmented(Odd):
    def forward(self, x: Tensor) -> Tensor:
        out = self.bn(self.conv(x))
        out *= 2
        out += x
        return out


class TwoSums(Odd):
    def forward(self, x: Tensor) -> Tensor:
        out = self.bn(self.conv(x))
        self.kept = out + 1
        y = out + x
        return y


class Chosen(Odd):
    def forward(self, x: Tensor) -> Tensor:
        out = self.conv(x)
        if self.kept is None:
            out = self.bn(out)
        else:
            out, _ = self.bn(out) * 2, None
        return x + self.drop_path(out)


class Twice(Odd):
    """Each of two sums has the result of one batch norm as its branch."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn(self.conv(x))
        y = x + out
        return y + torch.relu(x + out)


@pytest.mark.parametrize(
    "build",
    [ReadBetween, ReadAfter, ReadByAFunction, ReadInALoop, ReadWithAllLocals, ReadAfterAnError, Augmented, TwoSums,
     Chosen, Twice],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore::eulernet.EulernetWarning")
def test_a_result_that_is_read_elsewhere_is_a_tensor(build: type[Odd], launches: list[str]) -> None:
    model, x = randomized(build()).double(), images().double()
    eulernet.patch(model, h=0.3, example_inputs=x)
    for kept in (None, True):
        model.kept = kept
        model.zero_grad()
        plain = copy.deepcopy(model)
        expected, also_expected = train(plain, ((x,), {})), run(plain, ((x,), {}))
        with kernels.mode("triton"):
            actual, also_actual = train(model, ((x,), {})), run(model, ((x,), {}))
        for a, e in zip([*actual, *also_actual], [*expected, *also_expected], strict=True):
            torch.testing.assert_close(a, e)
        read, also_read = (m.kept() if callable(m.kept) else m.kept for m in (model, plain))
        if isinstance(also_read, Tensor):
            torch.testing.assert_close(read, also_read)


def test_masks_are_drawn_where_the_original_draws_them() -> None:
    """The dropout of the skip draws after drop path, and the batch norm's statistics are those of one call."""
    model, x = randomized(InStatements()), images()
    eulernet.patch(model, h=0.3, example_inputs=x)
    plain = copy.deepcopy(model)
    torch.manual_seed(1)
    expected, after = plain(x), torch.rand(1)
    torch.manual_seed(1)
    with kernels.mode("triton"):
        actual = model(x)
    assert torch.equal(torch.rand(1), after)
    torch.testing.assert_close(actual, expected)
    assert model.bn3.num_batches_tracked == plain.bn3.num_batches_tracked == 1


class WritesBehind(Odd):
    """Writes into what batch norm was called with, as only a model without training can."""

    def forward(self, x: Tensor) -> Tensor:
        given = self.conv(x)
        out = self.bn(given)
        self.kept = given.mul_(2)
        out += x
        return out


class WritesBehindTwoNames(Odd):
    def forward(self, x: Tensor) -> Tensor:
        out = given = self.conv(x)
        out = self.bn(out)
        self.kept = given.mul_(2)
        out += x
        return out


class WritesBehindALaterName(Odd):
    def forward(self, x: Tensor) -> Tensor:
        out = self.conv(x)
        if self.kept is None:
            given = out
            out = self.bn(out)
            given.mul_(2)
        out += x
        return out


class WritesInTheAddition(Odd):
    def forward(self, x: Tensor) -> Tensor:
        out = given = self.conv(x)
        out = self.bn(out)
        return x + 0 * given.mul_(2) + out


class WritesAfterTheBranch(Odd):
    def forward(self, x: Tensor) -> Tensor:
        given = self.conv(x)
        return self.bn(given) + x.add(0 * given.mul_(2))


class ReadsBesideTheBranch(Odd):
    def forward(self, x: Tensor) -> Tensor:
        out = self.conv(x)
        out = self.bn(out)
        return self.drop_path(out) + x.add(0 * out.mul_(2))


class WritesIntoWhatIsKept(Odd):
    """By a reference that the source of the block does not show."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv(x)
        out = self.bn(out)
        self.kept.mul_(2)
        out += x
        return out


@pytest.mark.parametrize("inference", [False, True], ids=["", "inference mode"])
@pytest.mark.parametrize(
    "build",
    [WritesBehind, WritesBehindTwoNames, WritesBehindALaterName, WritesInTheAddition, WritesAfterTheBranch,
     ReadsBesideTheBranch],
)  # fmt: skip
def test_nothing_waits_whose_input_others_may_write_into(
    build: type[Odd], inference: bool, launches: list[str]
) -> None:
    """In inference mode no version of a tensor would tell."""
    x, model = images(), randomized(build()).eval()
    eulernet.patch(model, h=0.3, example_inputs=x)
    with torch.inference_mode(inference), torch.no_grad():
        model.kept = None
        expected = model(x)
        model.kept = None
        with kernels.mode("triton"):
            torch.testing.assert_close(model(x), expected)
    assert launches == []


def test_what_waits_must_not_change() -> None:
    """Where the source does not show that it does, it is an error."""
    x = images()
    with torch.no_grad():
        model = WritesIntoWhatIsKept().to(DEVICE).eval()
        model.conv.register_forward_hook(lambda module, args, out: setattr(model, "kept", out))
        eulernet.patch(model, h=0.3, example_inputs=x)
        expected = model(x)
        with (
            kernels.mode("triton"),
            pytest.raises(eulernet.EulernetError, match=r'modified in place .*mode\("torch"\)'),
        ):
            model(x)
        with kernels.mode("torch"):
            torch.testing.assert_close(model(x), expected)


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
    for given, expected in (
        (state, True), (state.reshape(8, 8), True), (state.view(2, 2, 2, 8), True), (state.reshape(4, 16), False),
        (state.transpose(0, 1), False), (state.transpose(0, 1).reshape(8, 8), False), (state[:2], False),
    ):  # fmt: skip
        marked = torch.full_like(state, 7.0)
        found = fuse.PrecomputedNorm(norm, state, marked).of(given)
        assert (found is not None) == expected
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


def test_a_learned_h(launches: list[str]) -> None:
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


@pytest.mark.parametrize("build", [PreNorm, PreRMSNorm, llama], ids=lambda build: build.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_norms_give_the_dtypes_of_eager(
    build: Builder, dtype: torch.dtype, autocast: bool, launches: list[str]
) -> None:
    model, x = randomized(build()).to(dtype).eval(), ids() if build is llama else tokens().to(dtype)
    eulernet.patch(model, h=0.3, example_inputs=x)
    inner = model.layers[0].mlp if build is llama else model.mlp
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
        lines.append([entry.lineno for entry in error.traceback if entry.path.samefile(__file__)][-1])
    assert lines[0] == lines[1]
