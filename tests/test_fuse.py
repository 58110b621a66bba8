"""A patched model whose steps do what stands around them in one kernel gives what it gives without."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torchvision
import transformers
from checks import assert_identical, run, train
from reference import tensors
from timm.layers import DropPath, LayerScale, LayerScale2d, RmsNorm
from torch import Tensor, nn

import eulernet
from eulernet import kernels

pytest.importorskip("triton")
from eulernet.kernels import _bn, _layout, _norm, _step

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

    for module in (_step, _norm, _bn):
        monkeypatch.setattr(module, "launch", counted)
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
    "timm ResNet": (timm_resnet(drop_path_rate=0.5), pictures, "ssss", "bbbb"),
    "timm SE-ResNet": (timm_resnet(block_args={"attn_layer": "se"}), pictures, "ssss", "ssss"),
    "timm ConvNeXt": (timm_convnext, large_pictures, "sssss", "sssss"),
    "timm ViT": (vit("vit_tiny_patch16_224"), pictures, "nsns", "nsns"),
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
