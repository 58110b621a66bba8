"""Models whose steps have something around them that a kernel does as well."""

from collections.abc import Callable
from typing import Any

import timm
import torch
import torchvision
import transformers
from timm.layers import BatchNormAct2d, DropPath, LayerScale, LayerScale2d, RmsNorm
from timm.models.metaformer import Scale
from torch import Tensor, nn

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


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


class Flagged(PreNorm):
    """As in OPT: two norms stand behind flags, of which one is up, and the shape is kept and changed between."""

    norm_before = True

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        if not self.norm_before:
            x = self.norm1(x)
        shape = x.shape
        x = x.reshape(-1, x.size(-1))
        residual = x
        if self.norm_before:
            x = self.norm2(x)
        x = self.mlp(x)
        x = (residual + x).view(shape)
        if not self.norm_before:
            x = self.norm2(x)
        return x


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


def gemma() -> nn.Module:
    config = transformers.Gemma2Config(
        vocab_size=50, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=4, use_cache=False, pad_token_id=0,
    )  # fmt: skip
    return transformers.Gemma2Model(config)


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
    "Flagged": (Flagged, tokens, "n", "n"),
    "NormWithActivation": (NormWithActivation, images, "s", "b"),
    "BeforeAnIf": (BeforeAnIf, images, "s", "b"),
    "AugmentedElsewhere": (AugmentedElsewhere, images, "s", ""),
    "DropsFirst": (DropsFirst, tokens, "ss", "ss"),
    "GPT-2": (gpt2, ids, "nn", "nnn"),
    "timm ResNet": (timm_resnet(drop_path_rate=0.5), pictures, "ssss", "bbbb"),
    "timm SE-ResNet": (timm_resnet(block_args={"attn_layer": "se"}), pictures, "ssss", "ssss"),
    "timm ConvNeXt": (timm_convnext, large_pictures, "sssss", "sssss"),
    "timm ViT": (vit("vit_tiny_patch16_224"), pictures, "nns", "nnn"),  # nothing is fused with the others
    "timm DeiT 3": (vit("deit3_small_patch16_224"), pictures, "nsns", "nnns"),
    "timm BEiT": (vit("beit_base_patch16_224"), pictures, "nsns", "nnns"),
    "torchvision ResNet": (torchvision_resnet, pictures, "s" * 8, "b" * 8),
    "torchvision ConvNeXt": (torchvision_convnext, large_pictures, "sss", "sss"),
    "DINOv2": (dinov2, pictures, "nsns", "nnns"),
    "Llama": (llama, ids, "nn", "nnn"),
    "Gemma 2": (gemma, ids, "nn", "nnn"),
    "BERT": (bert, ids, "nnnn", "nnnn"),
    "TransformerEncoderLayer, pre-norm": (encoder(norm_first=True), tokens, "n", "n"),
    "TransformerEncoderLayer, post-norm": (encoder(norm_first=False), tokens, "nn", "nn"),
}


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
