"""What torch's functions are to the rules of `classify.py` and `streams.py`, by their names in a trace."""

from __future__ import annotations

import re
from typing import Any

from eulernet._find.trace import ADDITIONS, JOINS

VIEWS = frozenset(
    "as_subclass view reshape flatten unflatten permute transpose t T mT H mH swapaxes swapdims movedim moveaxis squeeze unsqueeze "
    "ravel contiguous view_as reshape_as unsafe_view as_strided alias data atleast_1d atleast_2d atleast_3d "
    "getitem chunk split tensor_split unbind narrow select slice unsafe_chunk unsafe_split real imag".split()
)
CASTS = frozenset(
    "to to_copy type type_as float half bfloat16 double clone cpu cuda requires_grad lift_fresh copy positive".split()
)
_DROPOUTS = frozenset(
    "dropout dropout1d dropout2d dropout3d alpha_dropout feature_dropout feature_alpha_dropout native_dropout".split()
)
_ACTIVATIONS = frozenset(
    "relu relu6 leaky_relu elu selu celu gelu silu mish hardswish hardsigmoid hardtanh sigmoid tanh softplus softsign "
    "logsigmoid prelu rrelu threshold clamp clamp_min clip tanhshrink softshrink hardshrink".split()
)
NORMS = frozenset(
    "batch_norm layer_norm group_norm instance_norm rms_norm local_response_norm normalize native_batch_norm "
    "native_layer_norm native_group_norm".split()
)
PADS = frozenset("pad constant_pad_nd zeropad2d".split()) | JOINS
REPEATS = frozenset("repeat repeat_interleave tile expand expand_as broadcast_to".split())
REARRANGES = REPEATS | frozenset(
    "pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle index_select gather take_along_dim flip "
    "fliplr flipud roll rot90 unfold".split()
)
SCALES = frozenset("mul multiply rmul div divide true_divide imul neg negative".split())
MAPS = re.compile(
    r"conv|linear|matmul|(^|_)(mm|bmm|mv|dot|inner|outer|addr|ger)$|addb?mm|addmv|baddbmm|einsum|tensordot|multi_dot|"
    r"^bilinear$|attention|lstm|gru|rnn|fft|::"
)
RECURRENT = frozenset("lstm gru rnn_tanh rnn_relu".split())  # a map at each place, and one from place to place
POOLS = re.compile(r"pool")
REDUCTIONS = frozenset("max amax mean sum".split())  # pooling by hand, over a reshaped axis
UPSAMPLES = re.compile(r"interpolate|upsample|conv_transpose|pixel_shuffle")
SQUASHES = frozenset("sigmoid hardsigmoid logsigmoid tanh softmax log_softmax softmin".split())
SQUARES = frozenset("pow square float_power abs".split())  # what an error or a variance is made by
DRAWS = frozenset("randn randn_like normal cauchy".split())  # no masks, as uniform ones are
# Values are left out, replaced or rounded, each by itself.
_MASKS = frozenset(
    "masked_fill where nan_to_num round fake_quantize_per_tensor_affine fake_quantize_per_channel_affine "
    "fake_quantize_learnable_per_tensor_affine fused_moving_avg_obs_fake_quant".split()
)
SAME = VIEWS | CASTS | _DROPOUTS | _ACTIVATIONS | _MASKS
HANDING_ON = VIEWS | CASTS | _DROPOUTS | SCALES | ADDITIONS | _MASKS
MATCHING = SAME | NORMS | PADS | SCALES | REDUCTIONS | REARRANGES
WRITES = frozenset(("overwritten", "setitem"))
LINEAR = VIEWS | CASTS | _DROPOUTS | SCALES | ADDITIONS | REARRANGES | PADS | WRITES
NOT_LINEAR = re.compile(r"attention|lstm|gru|rnn|::")


def part_of(op: str, args: Any, kwargs: Any, output: int, shape: tuple[int, ...]) -> Any:
    """The index of the part of a tensor that an operation gives, by numbers and slices; None where it is not known.

    Example:
        >>> part_of("narrow", [0, 1, 2, 3], {}, 0, (4, 6))
        (slice(None, None, None), slice(2, 5, None))
    """
    if op == "getitem":
        return args[1]
    names = {"narrow": "dim start length", "select": "dim index", "slice": "dim start end step", "unbind": "dim"}
    given = dict(zip(names.get(op, "sizes dim").split(), args[1:], strict=False)) | kwargs
    dim = given.get("dim", 0)
    start, sizes = given.get("start", 0), given.get("sizes", given.get("split_size_or_sections", given.get("chunks")))
    if not all(type(n) is int for n in (dim, start)) or not shape:
        return None
    part: Any = None
    if op == "narrow":
        part = slice(start, start + given["length"])
    elif op == "select":
        part = given["index"]
    elif op == "slice":
        part = slice(start, given.get("end"), given.get("step", 1))
    elif op == "unbind":
        part = output
    elif op in ("chunk", "split"):
        n = shape[dim]
        each = -(-n // sizes) if op == "chunk" and type(sizes) is int else sizes
        bounds = list(range(0, n, each)) + [n] if type(each) is int else [sum(each[:i]) for i in range(len(each) + 1)]
        part = slice(*bounds[output : output + 2])
    return None if part is None else (slice(None),) * (dim % len(shape)) + (part,)


def apart(one: Any, other: Any, shape: tuple[int, ...]) -> bool:
    """Whether two indices of a tensor of this shape, of numbers and slices, have no element in common.

    Example:
        >>> apart((slice(None), slice(0, 3)), (slice(None), slice(3, None)), (2, 6))
        True
    """
    ranges = [_ranges(index, shape) for index in (one, other) if index is not None]
    return len(ranges) == 2 and all(ranges) and any(a.isdisjoint(b) for a, b in zip(*ranges, strict=True))


def _ranges(index: Any, shape: tuple[int, ...]) -> list[set[int]]:
    """The positions along each axis, none where an index is something else than a number or a slice."""
    parts = list(index) if isinstance(index, list | tuple) else [index]
    if Ellipsis in parts:
        at = parts.index(Ellipsis)
        parts[at : at + 1] = [slice(None)] * (len(shape) - len(parts) + 1)
    parts += [slice(None)] * (len(shape) - len(parts))
    bounds = [b for part in parts for b in ((part.start, part.stop, part.step) if type(part) is slice else (part,))]
    if len(parts) != len(shape) or not all(type(b) is int or b is None for b in bounds) or None in parts:
        return []
    return [
        set(range(n)[part] if isinstance(part, slice) else [part % n]) for part, n in zip(parts, shape, strict=True)
    ]
