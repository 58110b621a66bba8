"""Example inputs of diffusers' models, by the names of their arguments and the entries of their configuration."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_BATCH = 2
_TOKENS = 16  # of the text, and of an image that is a sequence
_FRAMES = 5  # one, and a multiple of four
_SIZE = 32  # pixels, where the configuration names none
_SAMPLES = 4096  # of sound


def diffusion_inputs(model: nn.Module) -> dict[str, Any] | None:
    """The arguments of a model of diffusers by name, or None where one that it needs is not known here.

    Example:
        >>> class Unet(nn.Module):
        ...     config = {"in_channels": 4, "sample_size": 8}
        ...     def forward(self, sample, timestep, return_dict=True):
        ...         return sample
        >>> {name: tuple(value.shape) for name, value in diffusion_inputs(Unet()).items()}
        {'sample': (2, 4, 8, 8), 'timestep': (2,)}
    """
    parameters = inspect.signature(model.forward).parameters.values()
    reader = _Reader(model, {p.name for p in parameters})
    found: dict[str, Any] = {}
    for p in parameters:
        value = _ARGUMENTS[p.name](reader) if p.name in _ARGUMENTS else None
        if value is not None:
            found[p.name] = value
        elif p.default is p.empty and p.kind is not p.VAR_KEYWORD:
            return None
    return found


class _Reader:
    def __init__(self, model: nn.Module, names: set[str]) -> None:
        self.model = model
        self.names = names
        self.config: dict[str, Any] = dict(getattr(model, "config", {}))

    def get(self, *names: str, default: Any = None) -> Any:
        """The first of the entries that has a value."""
        return next((self.config[name] for name in names if self.config.get(name) is not None), default)

    def image(self) -> Tensor:
        """(batch, channels, [frames,] height, width), (batch, channels, length), or (batch, tokens, channels)."""
        channels = self.get("in_channels", "input_channels", "audio_channels", default=3)
        if self.names & {"img_ids", "img_shapes"}:
            return torch.randn(_BATCH, _TOKENS, channels)
        height = self.get("sample_size", "sample_height", default=_SIZE)
        width = self.get("sample_size", "sample_width", default=_SIZE)
        height, width = height if isinstance(height, tuple | list) else (height, width)
        maps = [m for m in self.model.modules() if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d)]
        if maps and all(isinstance(m, nn.Conv1d) for m in maps):
            return torch.randn(_BATCH, channels, self.get("sample_size", default=_SAMPLES))
        frames = self.get("num_frames", "video_length", "sample_frames")
        if frames is None and any(isinstance(m, nn.Conv3d) for m in maps):
            frames = _FRAMES
        as_batch = "num_frames" in self.names  # the frames of a video are a batch, whose number is told
        return torch.randn(_BATCH, channels, *([frames] if frames and not as_batch else []), height, width)

    def text(self) -> Tensor | None:
        """What a text encoder hands over: (batch, tokens, width)."""
        names = "encoder_hid_dim caption_channels joint_attention_dim text_embed_dim text_dim cap_feat_dim"
        width = self.get(*names.split(), "cross_attention_dim")
        width = width[0] if isinstance(width, tuple | list) else width
        return None if width is None else torch.randn(_BATCH, self.get("max_text_seq_length", default=_TOKENS), width)

    def labels(self) -> Tensor | None:
        """(batch,) int64, for a model that is told the class."""
        told = self.get("norm_type") == "ada_norm_zero" or self.get("num_class_embeds") is not None
        return torch.zeros(_BATCH, dtype=torch.int64) if told else None

    def pooled(self) -> Tensor | None:
        """The text as a whole: (batch, width)."""
        width = self.get("pooled_projection_dim")
        return None if width is None else torch.randn(_BATCH, width)

    def added(self) -> dict[str, Tensor] | None:
        """What the U-Net of Stable Diffusion XL takes besides: the text as a whole, and six numbers about the image."""
        if self.get("addition_embed_type") != "text_time":
            return None
        width = self.config["projection_class_embeddings_input_dim"] - 6 * self.config["addition_time_embed_dim"]
        return {"text_embeds": torch.randn(_BATCH, width), "time_ids": torch.ones(_BATCH, 6)}


def _time(reader: _Reader) -> Tensor:
    return torch.ones(_BATCH, dtype=torch.int64)


_ARGUMENTS: dict[str, Callable[[_Reader], Any]] = {
    "sample": _Reader.image,
    "hidden_states": _Reader.image,
    "timestep": _time,
    "encoder_hidden_states": _Reader.text,
    "class_labels": _Reader.labels,
    "pooled_projections": _Reader.pooled,
    "added_cond_kwargs": _Reader.added,
    "img_ids": lambda reader: torch.zeros(_TOKENS, 3),
    "txt_ids": lambda reader: torch.zeros(_TOKENS, 3),
    "guidance": lambda reader: torch.ones(_BATCH) if reader.get("guidance_embeds") else None,
}
