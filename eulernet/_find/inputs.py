"""Example inputs: those that the caller gives, and those that a model itself says it takes.

Only shapes, dtypes and the range of indices matter here, since the inputs feed a trace. A library is recognised by the
modules in which a model's classes were defined, so nothing is imported; a Hugging Face model is read by the names of
its `forward`'s arguments and the entries of its configuration, not by its type.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from eulernet._errors import EulernetError
from eulernet._find.diffusion_inputs import diffusion_inputs

Arguments: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]

_BATCH = 2  # the least with which batch normalisation trains
_TEXT_LENGTH = 16


def as_arguments(example_inputs: Any) -> Arguments:
    """The positional and keyword arguments that `example_inputs` stands for.

    Args:
        example_inputs: A tensor (the one argument), a tuple or list (the positional arguments), or a dict (the keyword
            arguments).

    Raises:
        EulernetError: `example_inputs` is something else.

    Example:
        >>> as_arguments({"input_ids": 1})
        ((), {'input_ids': 1})
    """
    _check_value(example_inputs, ())
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, tuple | list):
        return tuple(example_inputs), {}
    raise EulernetError(
        f"example_inputs is a {type(example_inputs).__name__}; it must be a tensor, a tuple of positional arguments, "
        "or a dict of keyword arguments, e.g. eulernet.patch(model, example_inputs=torch.randn(2, 3, 224, 224))."
    )


def _check_value(value: Any, around: tuple[int, ...]) -> None:
    """Raise for what no trace can follow: a nested tensor, a container that holds itself."""
    if isinstance(value, Tensor) and value.is_nested:
        raise EulernetError(
            "example_inputs holds a nested tensor, through which eulernet does not trace. Only shapes matter: pad it, "
            "example_inputs=value.to_padded_tensor(0.0)"
        )
    if id(value) in around:
        raise EulernetError(
            f"example_inputs holds a {type(value).__name__} that holds itself; pass tensors, in tuples, lists and "
            "dicts, e.g. example_inputs=torch.randn(2, 3, 224, 224)"
        )
    if isinstance(value, Mapping | tuple | list):
        for item in value.values() if isinstance(value, Mapping) else value:
            _check_value(item, (*around, id(value)))


def guess_inputs(model: nn.Module, training: bool = False) -> Arguments | None:
    """Example arguments for `model`, from what it says of itself, or None where it says nothing.

    Understood are Lightning's `example_input_array`, the configurations of the models of Hugging Face (transformers,
    diffusers, and what Sentence Transformers wrap), of LitGPT and of timm, also within a model of PEFT, and the
    families of torchvision. The tensors are random, on the device and in the dtype of the model's first floating-point
    parameter (the meta device too); a batch holds two examples.

    Args:
        model: Any module.
        training: Whether the arguments are for train mode: torchvision's detectors then need targets as well.

    Returns:
        The positional arguments and the keyword arguments.
    """
    inner: Any = model
    if _defined_in(model, "peft") and hasattr(inner, "get_base_model"):  # which hands on what it is given
        inner = inner.get_base_model()
    for guess in (_lightning, _hugging_face, _sentence_transformers, _diffusers, _litgpt, _timm, _torchvision):
        call = guess(inner, training)
        if call is not None:
            first = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
            args, kwargs = _moved(call, first)
            return args, kwargs
    return None


def _moved(value: Any, like: Tensor) -> Any:
    """`value` with its tensors on the device of `like`, the floating ones in its dtype."""
    if isinstance(value, Tensor):
        return value.to(like.device, like.dtype if value.is_floating_point() else None)
    if isinstance(value, Mapping):
        return {key: _moved(item, like) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_moved(item, like) for item in value)
    return value


def _defined_in(model: nn.Module, package: str) -> str | None:
    """The first module of `package` among those where the model's classes were defined."""
    modules = (cls.__module__ for cls in type(model).__mro__)
    return next((name for name in modules if name == package or name.startswith(package + ".")), None)


def _pair(size: Any) -> tuple[int, int]:
    """Height and width of an image size given as one number, as two, or as three with the channels first."""
    if isinstance(size, Mapping):
        size = (size["height"], size["width"]) if "height" in size else next(iter(size.values()))
    return (size, size) if isinstance(size, int) else (int(size[-2]), int(size[-1]))


def _in_channels(model: nn.Module, name: str | None = None) -> int:
    """The channels that the named convolution takes, or else the model's first one (3 where there is none)."""
    modules = model.modules() if name is None else iter([model.get_submodule(name)])
    return next((m.in_channels for m in modules if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d)), 3)


# ---- Lightning


def _lightning(model: nn.Module, training: bool) -> Arguments | None:
    example = getattr(model, "example_input_array", None)
    return None if example is None else as_arguments(example)


# ---- what wraps a model of Hugging Face


def _sentence_transformers(model: nn.Module, training: bool) -> Arguments | None:
    """One dict, of what the transformer inside takes."""
    if _defined_in(model, "sentence_transformers") is None:
        return None
    calls = (_hugging_face(module, training) for module in model.modules())
    _, features = next((call for call in calls if call is not None), ((), {}))
    if "input_ids" in features:
        features["attention_mask"] = torch.ones_like(features["input_ids"])
    return (({**features},), {}) if features else None


# ---- diffusers and LitGPT


def _diffusers(model: nn.Module, training: bool) -> Arguments | None:
    known = _defined_in(model, "diffusers") is not None and hasattr(model, "config")
    arguments = diffusion_inputs(model) if known else None
    return None if arguments is None else ((), arguments)


def _litgpt(model: Any, training: bool) -> Arguments | None:
    if _defined_in(model, "litgpt") is None or not hasattr(model, "config"):
        return None
    length = min(_TEXT_LENGTH, getattr(model, "max_seq_length", _TEXT_LENGTH))
    return (torch.randint(model.config.vocab_size, (_BATCH, length)),), {}


# ---- timm


def _timm(model: nn.Module, training: bool) -> Arguments | None:
    settings = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    if not isinstance(settings, Mapping) or "input_size" not in settings:
        return None
    channels, height, width = settings["input_size"]
    stem = settings.get("first_conv")
    stem = next(iter(stem), None) if isinstance(stem, tuple | list) else stem
    if stem and any(name == stem for name, _ in model.named_modules()):
        # A first layer that makes blocks of pixels into channels multiplies what the convolution takes.
        blocks: Iterator[Any] = (m.bs for m in model.modules() if type(m).__name__ == "SpaceToDepth")
        channels = _in_channels(model, stem) // next(blocks, 1) ** 2
    # A model that was built for another size than its weights keeps that size in its patch embedding.
    for module in model.modules():
        if getattr(module, "img_size", None) is not None:
            height, width = _pair(module.img_size)
            break
    return (torch.randn(_BATCH, channels, height, width),), {}


# ---- torchvision

_FRAMES = 16
_CLIP_SIZES = {"resnet": 112}  # the other video models take 224
_DETECTION_SIZE = 320


def _torchvision(model: nn.Module, training: bool) -> Arguments | None:
    module = _defined_in(model, "torchvision.models")
    if module is None:
        return None
    _, _, *family = module.split(".")
    channels = _in_channels(model)
    if family[0] == "detection":
        images = [torch.rand(channels, _DETECTION_SIZE, _DETECTION_SIZE) for _ in range(_BATCH)]
        return ((images, [_target() for _ in images]) if training else (images,)), {}
    if family[0] == "video":
        size = _CLIP_SIZES.get(family[-1], 224)
        return (torch.randn(_BATCH, channels, _FRAMES, size, size),), {}
    if family[0] == "optical_flow":
        return (torch.randn(_BATCH, 3, 128, 128), torch.randn(_BATCH, 3, 128, 128)), {}
    height, width = _pair(getattr(model, "image_size", 299 if family[-1] == "inception" else 224))
    return (torch.randn(_BATCH, channels, height, width),), {}


def _target() -> dict[str, Tensor]:
    """One annotated object, with all that any of torchvision's detectors reads in training."""
    mask = torch.zeros(1, _DETECTION_SIZE, _DETECTION_SIZE, dtype=torch.uint8)
    mask[:, 40:200, 40:200] = 1
    return {
        "boxes": torch.tensor([[40.0, 40.0, 200.0, 200.0]]),
        "labels": torch.ones(1, dtype=torch.int64),
        "masks": mask,
        "keypoints": torch.tensor([100.0, 100.0, 1.0]).repeat(1, 17, 1),
    }


# ---- Hugging Face


def _hugging_face(model: nn.Module, training: bool) -> Arguments | None:
    if _defined_in(model, "transformers.modeling_utils") is None or not hasattr(model, "config"):
        return None
    wanted = _wanted(model)
    if not set(wanted) <= set(_ARGUMENTS):
        return None
    reader = _Reader(model, wanted)
    return (), {name: _ARGUMENTS[name](reader) for name in wanted}


def _wanted(model: Any) -> list[str]:
    """The arguments to give: those without a default, the main input, and what those leave out of reach."""
    parameters = inspect.signature(model.forward).parameters.values()
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    wanted = [p.name for p in parameters if p.name in named and p.default is p.empty]
    main = model.main_input_name
    if not {"hidden_states", "query_embeds", "inputs_embeds"} & set(wanted):  # a part that is fed by another
        wanted += [main] if isinstance(main, str) else main
    entries = vars(model.config)
    if not _MEDIA_TOKENS & set(entries):
        # Towers side by side (CLIP) need all their inputs; where images stand for tokens of the text, text will do.
        nested = " ".join(name for name in entries if name.endswith("_config"))
        if "text" in nested or "vocab_size" in entries:
            wanted += ["input_ids"]
        if re.search("vision|video|image", nested) or {"image_size", "input_size"} & set(entries):
            wanted += [name for name in ("pixel_values", "pixel_values_videos") if name in named][:1]
        if "audio" in nested:
            wanted += ["input_features", "input_values"]
    for name in wanted:
        wanted = [*wanted, *_COMPANIONS.get(name, [])]
    if "encoder_hidden_size" in entries:  # it attends to what another model hands over
        wanted += ["encoder_hidden_states"]
    if entries.get("is_encoder_decoder"):
        wanted += ["decoder_input_ids"]
    return [name for name in dict.fromkeys(wanted) if name in named]


# Arguments with a default of None that go with another one.
_COMPANIONS = {
    "input_ids": ["bbox", "visual_feats", "visual_pos"],
    "input_features": ["input_features_mask"],
    "qformer_input_ids": ["input_ids"],
    "past_values": ["future_values", "future_time_features"],
    "states": ["actions", "rewards", "returns_to_go", "timesteps"],
}
_MEDIA_TOKENS = frozenset("image_token_id image_token_index video_token_id audio_token_id audio_token_index".split())
_KINDS = {
    "text": ("text", "llm", "language", "decoder", "encoder"),
    "image": ("vision", "visual", "image", "video", "backbone", "detector"),
    "audio": ("audio", "speech", "encoder", "acoustic", "codec"),
}


def _parts(config: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """The entries of a configuration and of those nested in it, each with its dotted path."""
    yield path, vars(config)
    for name, value in vars(config).items():
        if hasattr(value, "model_type") and path.count(".") < 3:
            yield from _parts(value, f"{path}.{name}")


class _Reader:
    """Builds the arguments of a Hugging Face model from its configuration."""

    def __init__(self, model: Any, wanted: list[str]) -> None:
        self.model = model
        self.parts = list(_parts(model.config))
        self.wanted = wanted

    def get(self, kind: str, *names: str, default: Any = None) -> Any:
        """The first of `names` that has a value: in the nested configuration of that kind, else in the outer ones."""

        def rank(part: tuple[str, dict[str, Any]]) -> tuple[bool, int]:
            path, _ = part
            return not any(word in path for word in _KINDS[kind]), path.count(".")

        found = (part[name] for _, part in sorted(self.parts, key=rank) for name in names if part.get(name) is not None)
        return next(found, default)

    def tokens(self) -> Tensor:
        """Indices below the vocabulary's size, none of them special: (batch, length) int64."""
        size = self.get("text", "vocab_size", "n_vocab", default=32)
        special = {
            v
            for _, part in self.parts
            for name, v in part.items()
            if name.endswith(("_id", "_index")) and isinstance(v, int)
        }
        ids = [i for i in range(min(size, 4096)) if i not in special] or [0]
        length = min(_TEXT_LENGTH, self.get("text", "max_position_embeddings", "n_positions", default=_TEXT_LENGTH))
        tokens = torch.tensor(ids)[torch.randint(len(ids), (_BATCH, max(length, 1)))]
        return tokens.unsqueeze(1) if "MultipleChoice" in type(self.model).__name__ else tokens

    def boxes(self) -> Tensor:
        """A box a token: (batch, length, 4) int64, left, top, right, bottom; in BROS all four corners, as numbers."""
        if corners := self.get("text", "dim_bbox"):
            return torch.rand(_BATCH, _TEXT_LENGTH, corners)
        return torch.tensor([10, 10, 40, 20]).expand(*self.tokens().shape, 4)

    def image(self) -> Tensor:
        """(batch, channels, height, width), or (batch, frames, channels, height, width) for a video model."""
        if {"grid_thw", "image_grid_thw"} & set(self.wanted):
            return self.patches()
        size = _pair(self.get("image", "image_size", "img_size", "input_size", "crop_size", default=224))
        channels = self.get("image", "num_channels", "in_channels", "in_chans", default=3)
        frames = self.get("image", "num_frames", "frames_per_clip")
        return torch.randn(_BATCH, *([frames] if frames else []), channels, *size)

    def grid(self) -> Tensor:
        """An image of 4 by 4 patches a sequence: (batch, 3) int64."""
        return torch.tensor([[1, 4, 4]] * _BATCH)

    def patches(self) -> Tensor:
        """The flattened patches of `grid`: (patches, channels * frames * height * width)."""
        channels = self.get("image", "in_channels", "num_channels", "in_chans", default=3)
        frames = self.get("image", "temporal_patch_size", "patch_temporal", default=1)
        height, width = _pair(self.get("image", "patch_size", default=16))
        return torch.randn(_BATCH * 16, channels * frames * height * width)

    def waveform(self) -> Tensor:
        """Half a second of sound: (batch, samples), or (batch, channels, samples) for a codec."""
        bins, frames = self.get("audio", "num_mel_bins"), self.get("audio", "max_length")
        if bins and frames and self.get("audio", "patch_size"):  # in truth a spectrogram, cut to patches
            return torch.randn(_BATCH, frames, bins)
        hop = self.get("audio", "hop_length", default=1)
        samples = math.ceil(8000 / hop) * hop
        if self.get("audio", "codebook_size", "codebook_dim", "upsampling_ratios", "audio_channels"):
            return torch.randn(_BATCH, self.get("audio", "audio_channels", default=1), samples)
        return torch.randn(_BATCH, samples)

    def spectrogram(self) -> Tensor:
        """(batch, bins, frames) where a convolution over time is first (Whisper), (batch, frames, bins) elsewhere."""
        bins = self.get(
            "audio", "num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim", "input_dim", default=128
        )
        if frames := self.get("audio", "spec_size"):  # CLAP
            return torch.randn(_BATCH, 1, frames, bins)
        first = next((m for m in self.model.modules() if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Linear)), None)
        if isinstance(first, nn.Conv1d) and self.get("audio", "input_feat_per_channel") is None:
            return torch.randn(_BATCH, first.in_channels, 2 * self.get("audio", "max_source_positions", default=32))
        return torch.randn(_BATCH, 64, first.in_features if isinstance(first, nn.Linear) else bins)

    def frames_mask(self) -> Tensor:
        """No frame of the spectrogram is padding: (batch, frames) int64."""
        return torch.ones(_BATCH, max(self.spectrogram().shape[1:]), dtype=torch.int64)

    def series(self) -> Tensor:
        """A time series: (batch, steps), or (batch, steps, variables) where the model counts variables."""
        steps = self.get("text", "context_length", "seq_length", default=32) + max(
            self.get("text", "lags_sequence", default=[0])
        )
        variables = self.get("text", "num_input_channels")
        return torch.randn(_BATCH, steps, *([variables] if variables else []))

    def future(self) -> Tensor:
        """What follows the time series: (batch, steps) or (batch, steps, variables)."""
        past = self.series()
        return torch.randn(_BATCH, self.get("text", "prediction_length", default=8), *past.shape[2:])

    def time_features(self, series: Tensor) -> Tensor:
        """(batch, steps, features)."""
        return torch.randn(_BATCH, series.shape[1], self.get("text", "num_time_features", default=1))

    def states(self, *names: str) -> Tensor:
        """What another model would hand over: (batch, length, width), the width being the first of `names`."""
        return torch.randn(_BATCH, _TEXT_LENGTH, self.get("text", *names, "hidden_size", "d_model", default=64))

    def positioned_patches(self) -> Tensor:
        """The row and the column of a patch before its pixels: (batch, patches, 2 + size)."""
        pixels = self.get("image", "patch_embed_hidden_size", default=3 * 16 * 16)
        return torch.cat([torch.ones(_BATCH, _TEXT_LENGTH, 2), torch.randn(_BATCH, _TEXT_LENGTH, pixels)], dim=-1)


_ARGUMENTS: dict[str, Callable[[_Reader], Tensor]] = {
    "input_ids": _Reader.tokens,
    "decoder_input_ids": _Reader.tokens,
    "bbox": _Reader.boxes,
    "pixel_values": _Reader.image,
    "pixel_values_videos": _Reader.image,
    "grid_thw": _Reader.grid,
    "image_grid_thw": _Reader.grid,
    "merge_sizes": lambda reader: torch.ones(_BATCH, dtype=torch.int64),
    "input_values": _Reader.waveform,
    "input_features": _Reader.spectrogram,
    "input_features_mask": _Reader.frames_mask,
    "past_values": _Reader.series,
    "past_observed_mask": lambda reader: torch.ones_like(reader.series()),
    "past_time_features": lambda reader: reader.time_features(reader.series()),
    "future_values": _Reader.future,
    "future_time_features": lambda reader: reader.time_features(reader.future()),
    "hidden_states": lambda reader: reader.patches() if "grid_thw" in reader.wanted else reader.states(),
    "encoder_hidden_states": lambda reader: reader.states("encoder_hidden_size"),
    "inputs_embeds": _Reader.states,
    "query_embeds": _Reader.states,
    "inputs": lambda reader: reader.states("d_model"),
    "qformer_input_ids": _Reader.tokens,
    "flattened_patches": _Reader.positioned_patches,
    "visual_feats": lambda reader: reader.states("visual_feat_dim"),
    "visual_pos": lambda reader: torch.rand(_BATCH, _TEXT_LENGTH, reader.get("text", "visual_pos_dim", default=4)),
    # a trajectory of a decision process
    "states": lambda reader: reader.states("state_dim"),
    "actions": lambda reader: reader.states("act_dim"),
    "rewards": lambda reader: torch.randn(_BATCH, _TEXT_LENGTH, 1),
    "returns_to_go": lambda reader: torch.randn(_BATCH, _TEXT_LENGTH, 1),
    "timesteps": lambda reader: torch.arange(_TEXT_LENGTH).expand(_BATCH, -1),
}
