"""The models that the library is tried on: of timm, torchvision and Hugging Face, built small, with random weights."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from eulernet._find.inputs import Arguments, guess_inputs


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings and log lines of other people's models."""
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


class _Zeros(TorchFunctionMode):
    """Zeros for random initial values, which take longer than a forward pass to draw: `randomize` comes after it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.normal_, Tensor.uniform_, Tensor.erfinv_):
            return args[0].zero_()
        return func(*args, **kwargs or {})


@torch.no_grad()
def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random values for all parameters and batch statistics, such that each branch counts and activations stay finite.

    Matrices and kernels are normal with variance 1/fan-in, vectors of weights lie around one, biases around zero. So
    last gammas and layer scales, which start at zero in many networks, hide nothing.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator).to(like)

    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            if not p.is_floating_point():
                continue
            if p.dim() >= 2:
                fan_in = p[0].numel() if p.dim() > 3 or isinstance(module, nn.Conv1d) else max(p.shape[-2:])
                p.copy_(normal(p) * fan_in**-0.5)
            elif "bias" in name:
                p.copy_(normal(p) * 0.1)
            else:
                p.copy_(1 + 0.1 * normal(p))
        for name, b in module.named_buffers(recurse=False):
            if name == "running_mean":
                b.copy_(normal(b) * 0.1)
            elif name == "running_var":
                b.copy_(1 + 0.2 * normal(b).abs())
            elif name == "embed":  # a code book
                b.copy_(normal(b))
    return model


@dataclasses.dataclass
class Specimen:
    """A model in eval mode with random weights, and its arguments: in eval mode, in train mode, and for `patch`."""

    model: nn.Module
    inputs: Arguments
    training: Arguments
    example: Any = None  # None: to be guessed
    cannot: frozenset[str] = frozenset()  # what fails: "float64", "autocast", "channels_last", "train"
    rounded: bool = False  # ends its branches in float32, whatever it is given

    def fails_as(self, table: Mapping[str, Sequence[str]], name: str) -> None:
        """Look up what fails in a table of names by what their originals can't do."""
        self.cannot = frozenset(what for what, names in table.items() if name in names)


_Build = Callable[[], Specimen]


def first_that_runs(candidates: Iterator[_Build]) -> Specimen:
    """The first of the candidates that can be built and runs."""
    reasons = []
    for build in candidates:
        try:
            with quiet():
                with _Zeros():
                    specimen = build()
                randomize(specimen.model).eval()
                args, kwargs = specimen.inputs
                with torch.no_grad():
                    specimen.model(*args, **kwargs)
        except Exception as error:  # this size does not fit
            reasons.append(f"{type(error).__name__}: {error}")
        else:
            return specimen
    raise RuntimeError("no size fits: " + "; ".join(reasons))


_SIZES = (64, 84, 96, 128, 160, 192, 224, 256, 300)  # pixels, small ones first


def _on(model: nn.Module, x: Tensor) -> Specimen:
    return Specimen(model, ((x,), {}), ((x,), {}), x)


# timm -----------------------------------------------------------------------------------------------------------------

# The models of at most 130 million parameters that together hold each pair of a class of timm.models with children and
# the class of a child, chosen greedily, the small ones first.
TIMM = """
bat_resnext26ts beitv2_base_patch16_224 caformer_s18 cait_xxs24_224 coat_tiny coatnet_bn_0_rw_224
coatnet_rmlp_1_rw_224 coatnet_rmlp_2_rw_384 convit_tiny convmixer_768_32 convnext_atto_rms convnext_tiny_hnf
convnext_zepto_rms convnextv2_atto cpubone_b2_bfrobust cpubone_nano crossvit_9_dagger_240 crossvit_tiny_240
cs3darknet_focus_s cs3se_edgenet_x cs3sedarknet_xdw csatv2 cspnext_tiny cspresnext50 davit_base_fl davit_tiny
deit_tiny_distilled_patch16_224 densenet121 dla34 dla46x_c dla60_res2next dm_nfnet_f0 dpn48b eca_botnext26ts_256
eca_vovnet39b ecaresnet50d_pruned edgenext_xx_small efficientformer_l1 efficientformerv2_s0 efficientformerv2_s2
efficientnet_b0_gn efficientnet_b1_pruned efficientnet_blur_b0 efficientnet_x_b3 efficientvim_m1
efficientvim_m1_dist efficientvit_b0 efficientvit_l1 efficientvit_m0 ese_vovnet19b_slim ese_vovnet19b_slim_dw
eva02_base_patch16_clip_224 eva02_tiny_patch14_336 fasternet_t0 fasternet_t2 fastvit_mci0 fastvit_mci3 fastvit_t8
focalnet_tiny_srf gc_efficientnetv2_rw_t gcresnext26ts gcvit_small gcvit_xxtiny ghostnetv2_100 ghostnetv3_050
gmixer_12_224 gmlp_ti16_224 halonet_h1 hgnet_tiny hgnetv2_b0 hiera_small_abswin_256 hiera_tiny_224 hieradet_small
hrnet_w18_small iformer_t inception_next_atto inception_resnet_v2 inception_v3 inception_v4 lambda_resnet26t
lcnetv2_small legacy_senet154 legacy_seresnet18 legacy_seresnet50 legacy_seresnext26_32x4d legacy_xception
levit_128s levit_conv_256d levit_conv_384_s8 levit_conv_512_s8 lowformer_b0 lowformer_e3 mambaout_femto
maxvit_tiny_pm_256 maxvit_tiny_tf_224 maxxvit_rmlp_nano_rw_256 mixer_s16_224 mobilenetv1_100 mobilenetv3_rw
mobilenetv4_conv_aa_medium mobilenetv4_conv_blur_medium mobilenetv4_hybrid_medium_075 mobilenetv5_base mobileone_s1
mobileone_s4 mobilevit_xxs mobilevitv2_050 mvitv2_tiny naflexvit_base_patch16_map nasnetalarge nest_tiny
nest_tiny_jx nextvit_small nf_ecaresnet26 nfnet_f0 pit_ti_224 pnasnet5large poolformer_s12 poolformerv2_s12
pvt_v2_b0 pvt_v2_b2_li qwen3_vit_88m_merge rdnet_tiny regnetv_040 regnetv_064 regnety_002 regnety_040_sgn
repghostnet_050 repvgg_a0 repvit_m0_9 repvit_m1 res2next50 resmlp_12_224 resnest14d resnet50_clip resnet50_gn
resnet50_mlp resnet51q resnet61q resnetaa34d resnetblur18 resnetblur50 resnetv2_18 resnetv2_18d resnetv2_50
resnetv2_50d_evos resnetv2_50d_frn resnetv2_50x1_bit rexnet_100 sam2_hiera_tiny samvit_base_patch16_224 sedarknet21
selecsls42 sequencer2d_s seresnet18 seresnetaa50d shvit_s1 skresnet18 skresnet50 starnet_s050 swiftformer_xs
swin_tiny_patch4_window7_224 swinv2_cr_tiny_384 swinv2_tiny_window8_256 test_byobnet test_coatnet test_convnext
test_efficientnet_evos test_efficientnet_gn test_efficientnet_ln test_mambaout test_maxvit test_nfnet test_resnet
test_vit2 test_vit3 test_vit4 test_vit_relpos tf_efficientnet_cc_b0_4e tf_efficientnet_es tf_mixnet_s
tf_mobilenetv3_small_075 tf_mobilenetv3_small_minimal_100 tiny_vit_11m_224 tiny_vit_5m_224 tnt_s_legacy_patch16_224
tresnet_m twins_svt_small visformer_tiny vit_base_mci_224 vit_base_patch16_rpn_224 vit_base_patch16_sapiens2
vit_base_patch16_xp_224 vit_dpwee_patch16_reg1_gap_256 vit_dwee_patch16_reg1_gap_256 vit_pe_core_tiny_patch16_384
vit_pwee_patch16_reg1_gap_256 vit_relpos_small_patch16_rpn_224 vit_small_patch16_18x2_224
vit_small_patch16_rope_mixed_224 vit_small_r26_s32_224 vit_small_resnet50d_s16_224 vit_srelpos_small_patch16_224
vit_tiny_patch16_dinov3_qkvb vitamin_small_224 volo_d1_224 xception41 xception41p xcit_nano_12_p8_384
""".split()

# Classes that only larger models have, in smaller ones; and the slowest of the models above, at less depth.
TIMM_SHRUNK: dict[str, dict[str, Any]] = {
    "beitv2_base_patch16_224": {"depth": 4},
    "davit_base_fl": {"depths": (1, 1, 2, 1)},
    "deepseek_vit_412m": {"depth": 2},
    "deepseek_vit_412m_align": {"depth": 2},
    "deepseek_vit_412m_enc": {"depth": 2},
    "eva02_enormous_patch14_clip_224": {"depth": 2, "embed_dim": 192, "num_heads": 3},
    "fastvit_mci3": {"layers": (1, 2, 3, 2, 1)},
    "gemma4_vit_167m": {"depth": 2},
    "gemma4_vit_167m_enc": {"depth": 2},
    "legacy_senet154": {"layers": (1, 2, 2, 1)},
    "mobilenetv5_300m_enc": {"channel_multiplier": 0.25},
    "mobilenetv5_base": {"channel_multiplier": 0.25},
    "vgg11": {"num_classes": 10},
}
TIMM += [name for name in TIMM_SHRUNK if name not in TIMM]


def timm_model(name: str) -> Specimen:
    """A timm model with an input of the smallest size that it takes: (2, 3, size, size)."""
    import timm

    def candidates() -> Iterator[_Build]:
        options = TIMM_SHRUNK.get(name, {})
        for size in _SIZES:
            for sized in ({"img_size": size}, {}):
                x = torch.randn(2, 3, size, size)
                yield lambda o={**options, **sized}, x=x: _on(timm.create_model(name, **o), x)

    return first_that_runs(candidates())


# torchvision ----------------------------------------------------------------------------------------------------------


def torchvision_names() -> list[str]:
    """All classification, segmentation, detection, video and optical-flow models, and the quantisable ones."""
    import torchvision

    return list(torchvision.models.list_models())


def build_torchvision(name: str, **options: Any) -> nn.Module:
    import torchvision

    parameters = inspect.signature(torchvision.models.get_model_builder(name)).parameters
    without = {key: None for key in ("weights", "weights_backbone") if key in parameters}
    return torchvision.models.get_model(name, **without, **options)


def _with_class(module: Any, name: str, other: Any, model: str) -> nn.Module:
    """A torchvision model whose builder finds `other` under the name of its class."""
    own = getattr(module, name)
    setattr(module, name, lambda **options: other(**{**options, **other.keywords}))
    try:
        return build_torchvision(model)
    finally:
        setattr(module, name, own)


def torchvision_model(name: str) -> Specimen:
    """A torchvision model with an input of the smallest size that it takes."""
    import torchvision
    from torchvision.models import detection, optical_flow, video

    family = torchvision.models.get_model_builder(name).__module__

    def detector(size: int) -> _Build:
        def build() -> Specimen:
            options = {} if name.startswith("ssd") else {"min_size": size, "max_size": 2 * size}
            if "rcnn" in name:  # the heads run on each box
                few = ("rpn_post_nms_top_n_test", "rpn_post_nms_top_n_train", "box_batch_size_per_image")
                options |= {key: 20 for key in few} | {"box_detections_per_img": 4}
            model = build_torchvision(name, num_classes=3, **options)
            return Specimen(model, guess_inputs(model) or ((), {}), guess_inputs(model, training=True) or ((), {}))

        return build

    def candidates() -> Iterator[_Build]:
        for size in _SIZES:
            if family.startswith(detection.__name__):
                yield detector(size)
            elif name.startswith("mvit"):  # its builders fix the size of the clip
                small = functools.partial(video.mvit.MViT, spatial_size=(size, size), temporal_size=8)
                x = torch.randn(2, 3, 8, size, size)
                yield lambda m=small, x=x: _on(_with_class(video.mvit, "MViT", m, name), x)
            elif family.startswith(video.__name__):
                for frames in (8, 16):
                    x = torch.randn(2, 3, frames, size, size)
                    yield lambda x=x: _on(build_torchvision(name), x)
            elif family.startswith(optical_flow.__name__):
                pair = (torch.randn(2, 3, size, size), torch.randn(2, 3, size, size))
                yield lambda p=pair: Specimen(build_torchvision(name), (p, {}), (p, {}), p)
            else:
                for options in ({"image_size": size}, {"input_size": (size, size)}, {}):
                    x = torch.randn(2, 3, size, size)
                    yield lambda o=options, x=x: _on(build_torchvision(name, **o), x)

    return first_that_runs(candidates())


# Hugging Face ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Scale:
    """How far a configuration is shrunk: widths, heads and their sizes (None: as they are), number of layers."""

    layers: int = 2
    width: int | None = 64
    heads: int = 4
    head_size: int | None = 16
    image: int = 64
    complete: bool = False  # with values for entries that have none


SCALES = {
    "tiny": Scale(),
    "deeper": Scale(layers=8, heads=8),  # for hybrids whose first attention layer comes later
    "heads of 64": Scale(layers=4, width=128, heads=2, head_size=None),  # rotary sections are cut for one head size
    "whole heads": Scale(layers=4, width=256, heads=2, head_size=None),
    "whole depth": Scale(layers=100),  # lists of layers, by number, in another part's configuration
    "complete": Scale(complete=True),  # without a checkpoint's configuration nothing says how many experts there are
    "complete, deeper": Scale(layers=8, heads=8, complete=True),
    "whole widths": Scale(width=None, head_size=None),
    "whole widths and images": Scale(width=None, head_size=None, image=224),
    "whole": Scale(layers=100, width=None, head_size=None, image=10_000),
}
VOCABULARY = 256

_COMPLETE = {
    **{"num_key_value_heads": 2, "head_dim": 16, "hidden_size": 64, "num_heads": 4, "q_lora_rank": 16},
    **{name: 4 for name in ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")},
    **{name: 2 for name in ("num_experts_per_tok", "moe_topk", "moe_k")},
    **{name: 1 for name in ("n_group", "topk_group", "first_k_dense_replace", "n_shared_experts")},
    **{name: 96 for name in ("moe_intermediate_size", "intermediate_size")},
    **{"pad_token_id": 0, "mask_token_id": 254, "image_token_id": 255, "image_token_index": 255},
    "attn_layer_indices": [1],
}

_Rule = Callable[[str, int, Scale], int]


def _at_most(limit: int) -> _Rule:
    return lambda name, value, scale: min(value, limit)


def _width(limit: int | None, value: int) -> int:
    return value if limit is None else min(value, limit)


# The first pattern found in an entry's name says what becomes of its integers.
_RULES: list[tuple[str, _Rule]] = [
    (r"token(_id|_index)?$", lambda n, v, s: v if v < VOCABULARY else VOCABULARY - 1 - crc32(n.encode()) % 100),
    (
        r"(_id|_index|_idx|stride|kernel|axis|bits|padding|seed|ratio|factor|interval|scale|rate|_bins|theta)s?$",
        lambda n, v, s: v,
    ),
    (r"vocab", _at_most(VOCABULARY)),
    (r"attention_window", _at_most(8)),  # to a multiple of which longformers pad what they are given
    (r"max_text_length", _at_most(16)),  # so often a decoder of tables runs
    (r"num_queries|num_denoising|num_proposals|two_stage_num", _at_most(10)),
    (r"num_frames|frames_per_clip", _at_most(4)),
    (r"(^|_)(n_?|num_?)?(layers?|depth|blocks?)$", lambda n, v, s: min(v, s.layers)),
    (r"n_group$|topk_group|num_expert_group|moe_groups", _at_most(1)),
    (r"index_topk", _at_most(16)),
    (r"per_tok|top_?k|num_selected", _at_most(2)),
    (r"experts?$", _at_most(4)),
    (r"image_embedding_size", lambda n, v, s: max(v * s.image // 1024, 1)),
    (r"(image|img|input|crop)_?size$|resolution", lambda n, v, s: min(v, s.image)),
    (
        r"position_embeddings|_positions?$|n_ctx|max_len|seq_len|context_length|context_size",
        lambda n, v, s: _width(s.width and 128, v),
    ),
    (r"(key_value|kv)_heads|heads_kv|query_group_num", lambda n, v, s: v if s.width is None else min(v, 2)),
    (r"(^|_)n?_?heads?(_encoder|_decoder)?$", lambda n, v, s: v if s.width is None else min(v, s.heads)),
    (r"rotary_dim$|rope_head_dim$", lambda n, v, s: v if s.head_size is None else min(v, s.head_size // 2)),
    (r"head_(dim|size|width)|dim_head|d_kv|kv_channels", lambda n, v, s: _width(s.head_size, v)),
    (r"_rank$", lambda n, v, s: _width(s.head_size, v)),
    (r"intermediate|ffn|(^|_)ff(_|$)|d_inner|n_inner|mlp_dim", lambda n, v, s: _width(s.width and 96, v)),
    (
        r"hidden|embed|model|proj|width|dim|channels?|n_embd|features|size|units|upsample_groups",
        lambda n, v, s: v if s.width is None or v < 64 else s.width,
    ),
]
_LISTS: list[tuple[str, Callable[[list[int], Scale], list[int]]]] = [
    (r"attention_window", lambda v, s: [min(x, 8) for x in v]),
    (r"patch|kernel|window|stride|ratio|factor|_idx|index|section|strides", lambda v, s: v),
    (r"depths|repeats|blocks|numb_of_layers|n_layers", lambda v, s: [min(x, s.layers) for x in v]),
    (r"image|img", lambda v, s: [min(x, s.image) for x in v]),
    (r"heads", lambda v, s: v if s.width is None else [min(x, s.heads) for x in v]),
    (
        r"size|dim|channels|hidden|embed|width",
        lambda v, s: v if s.width is None or max(v) < 64 else [max(8 * round(x * 16 / max(v)), 8) for x in v],
    ),
]


def _declared(kind: type) -> dict[str, Any]:
    """The entries of a configuration with their first values: of a dataclass, in transformers 5.0 of `__init__`."""
    if dataclasses.is_dataclass(kind):
        fields = [field for field in dataclasses.fields(kind) if field.init]
        return {field.name: None if field.default is dataclasses.MISSING else field.default for field in fields}
    arguments = [p for p in inspect.signature(kind).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    return {p.name: None if p.default is p.empty else p.default for p in arguments}


def shrink(config: Any, scale: Scale) -> Any:
    """A small configuration of the same type: its entries changed by what their names say, nested ones as well.

    Entries that the type computes from others are left for it to compute.
    """
    kind = type(config)
    default = vars(kind())
    declared, changed = _declared(kind), {}
    for name, first in declared.items():
        value = vars(config).get(name)
        if hasattr(value, "model_type"):
            changed[name] = shrink(value, scale)
            continue
        given = value if value != default.get(name) else first
        small = _small(name, given, scale)
        if given is not None and small != first:
            changed[name] = small
        elif first is None and name in ("vocab_size", "prediction_length"):  # needed, without a default
            changed[name] = VOCABULARY if name == "vocab_size" else 16
        elif value is None and scale.complete and name in _COMPLETE:
            changed[name] = _COMPLETE[name]
    heads, groups = "num_attention_heads", "num_key_value_heads"
    if vars(config).get(heads) is not None and vars(config).get(heads) == vars(config).get(groups) and heads in changed:
        changed[groups] = changed[heads]
    changed |= _shorter(vars(config), declared, changed)
    stages = vars(config).get("_out_features")
    if stages != default.get("_out_features"):  # of a backbone, no entry but an argument
        changed["out_features"] = stages
    return kind(**changed)


def _small(name: str, value: Any, scale: Scale) -> Any:
    if name.endswith("_coefficient") and isinstance(value, float) and scale.width is not None:
        return min(value, 1.0)
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return next((rule(name, value, scale) for pattern, rule in _RULES if re.search(pattern, name)), value)
    if isinstance(value, list | tuple) and value and all(type(x) is int for x in value):
        new = next((rule(list(value), scale) for pattern, rule in _LISTS if re.search(pattern, name)), value)
        return type(value)(new)
    return value


def _shorter(old: dict[str, Any], declared: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """The lists that have an entry a layer, cut to the new number of layers so that each kind of layer stays."""
    depth = next(
        (n for n in ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers") if n in new), None
    )
    if depth is None or not isinstance(old.get(depth), int) or old[depth] <= new[depth]:
        return {}
    lists = {n: v for n, v in old.items() if n in declared and isinstance(v, list) and len(v) == old[depth]}
    if not lists:
        return {}
    rows = [repr([v[i] for v in lists.values() if len(set(map(repr, v))) < len(v)]) for i in range(old[depth])]
    kinds = sorted({rows.index(row) for row in rows})
    kept = sorted(kinds + [i for i in range(len(rows)) if i not in kinds][: max(new[depth] - len(kinds), 0)])
    return {depth: len(kept), **{name: [value[i] for i in kept] for name, value in lists.items()}}


def hugging_face_types() -> list[str]:
    """The model types of transformers that an auto class builds; the rest are parts of these."""
    from transformers import CONFIG_MAPPING

    return [kind for kind in CONFIG_MAPPING if _auto_class(kind) is not None]


@functools.cache
def _auto_class(kind: str) -> Any:
    """AutoModel where it knows the type, else the first other auto class that does."""
    from transformers.models.auto import configuration_auto, modeling_auto

    config = configuration_auto.CONFIG_MAPPING_NAMES[kind]
    autos = [value for name, value in vars(modeling_auto).items() if name.startswith("AutoModel")]
    for auto in sorted(autos, key=lambda auto: auto.__name__ != "AutoModel"):
        mapping = getattr(auto, "_model_mapping", None)
        if mapping is not None and mapping._config_mapping.get(kind) == config and kind in mapping._model_mapping:
            return auto
    return None


def _not_too_large(model: nn.Module, most: int = 100_000_000) -> None:
    size = sum(p.numel() for p in model.parameters())
    if size > most:
        raise ValueError(f"{size / 1e6:.0f} M parameters")


def hugging_face_model(kind: str) -> Specimen:
    """A model of a type of Hugging Face at the smallest scale at which it can be built and runs."""
    from transformers import AutoConfig

    def build(scale: Scale) -> Specimen:
        config = shrink(AutoConfig.for_model(kind), scale)
        with torch.device("meta"), contextlib.suppress(NotImplementedError, RuntimeError):  # some read numbers
            _not_too_large(_auto_class(kind).from_config(config))
        model = _auto_class(kind).from_config(config, experts_implementation="eager")  # the other has no float64
        _not_too_large(model)
        inputs = guess_inputs(model)
        if inputs is None:
            raise ValueError("its inputs cannot be guessed")
        if any(t.numel() > 6_000_000 for t in tree_leaves(inputs) if isinstance(t, Tensor)):
            raise ValueError("inputs of more than six million numbers, which take minutes")
        return Specimen(model, inputs, inputs)

    return first_that_runs(functools.partial(build, scale) for scale in SCALES.values())
