"""What torch's functions are to the rules of `classify.py` and `streams.py`, by their names in a trace."""

from __future__ import annotations

import re

from eulernet._find.trace import ADDITIONS, JOINS

VIEWS = frozenset(
    "view reshape flatten unflatten permute transpose t T mT H mH swapaxes swapdims movedim moveaxis squeeze unsqueeze "
    "ravel contiguous view_as reshape_as unsafe_view as_strided alias data atleast_1d atleast_2d atleast_3d getitem "
    "chunk split tensor_split unbind narrow select slice unsafe_chunk unsafe_split real imag as_subclass".split()
)
TURNS = frozenset("permute transpose t T mT H mH swapaxes swapdims movedim moveaxis".split())  # views with other axes
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
SCATTERS = frozenset(("slice_scatter", "select_scatter"))
PUTS = SCATTERS | {"setitem"}
WRITES = PUTS | {"overwritten"}
LINEAR = VIEWS | CASTS | _DROPOUTS | SCALES | ADDITIONS | REARRANGES | PADS | WRITES
NOT_LINEAR = re.compile(r"attention|lstm|gru|rnn|::")
