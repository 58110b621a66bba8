"""Parts of a source that are no choice's own: what it imports, and modules and functions that it may contain."""

HEADER = """import functools
import operator
import warnings

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

TOKENS = 4
"""
DECORATORS = {
    "decorated": ("decorated",),
    "nested decorators": ("decorated", "decorated"),
    "kept in a default": ("kept_in_a_default",),
}
HELPERS = {
    "LayerScale": """
class LayerScale(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(shape))

    def forward(self, x):
        return x * self.gamma
""",
    "DropPath": """
class DropPath(nn.Module):
    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        if not self.training or self.p == 0.0:
            return x
        keep = torch.full((x.shape[0],) + (1,) * (x.ndim - 1), 1 - self.p, dtype=x.dtype, device=x.device)
        return x * torch.bernoulli(keep) / (1 - self.p)
""",
    "Attention": """
class Attention(nn.Module):
    def __init__(self, dim, rotary, bias, mask):
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.rotary = rotary
        self.bias = nn.Parameter(torch.zeros(2, TOKENS, TOKENS)) if bias else None
        self.register_buffer("mask", torch.full((TOKENS, TOKENS), -1e4).triu(1) if mask else None, persistent=False)

    def rotate(self, x):
        angle = torch.arange(TOKENS, dtype=x.dtype, device=x.device)[:, None].expand_as(x)
        a, b = x.chunk(2, -1)
        return x * angle.cos() + torch.cat([-b, a], -1) * angle.sin()

    def forward(self, x):
        n, t, d = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, 2, d // 2).permute(2, 0, 3, 1, 4).unbind(0)
        if self.rotary:
            q, k = self.rotate(q), self.rotate(k)
        scores = q @ k.transpose(-2, -1)
        if self.bias is not None:
            scores = scores + self.bias.expand_as(scores)
        if self.mask is not None:
            scores = scores + self.mask
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(n, t, d))
""",
    "TalkingHeads": """
class TalkingHeads(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.qkv, self.proj, self.talk = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim), nn.Conv2d(2, 2, 1)

    def forward(self, x):
        n, t, d = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, 2, d // 2).permute(2, 0, 3, 1, 4).unbind(0)
        scores = q @ k.transpose(-2, -1)
        scores = scores + self.talk(scores)
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(n, t, d))
""",
    "NormByHand": """
class NormByHand(nn.Module):
    def __init__(self, shape, dim):
        super().__init__()
        self.weight, self.bias, self.dim = nn.Parameter(torch.ones(shape)), nn.Parameter(torch.zeros(shape)), dim

    def forward(self, x):
        u = x.mean(self.dim, keepdim=True)
        s = (x - u).pow(2).mean(self.dim, keepdim=True)
        return self.weight * ((x - u) / torch.sqrt(s + 1e-2)) + self.bias
""",
    "FrozenNorm": """
class FrozenNorm(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.register_buffer("scale", torch.ones(shape))
        self.register_buffer("shift", torch.full(shape if isinstance(shape, tuple) else (shape,), 0.1))

    def forward(self, x):
        return x * self.scale + self.shift
""",
    "GateOfTwoMaps": """
class GateOfTwoMaps(nn.Module):
    def __init__(self, encode, w, u):
        super().__init__()
        self.encode, self.w, self.u = encode, w, u

    def forward(self, x):
        s = torch.tanh(self.encode(x))
        return torch.sigmoid((self.w(x) + self.u(s)) / 2) * s
""",
    "WeightedByScores": """
class WeightedByScores(nn.Module):
    def __init__(self, encode, w, u, v, dim):
        super().__init__()
        self.encode, self.w, self.u, self.v, self.dim = encode, w, u, v, dim

    def forward(self, x):
        k = torch.relu(self.encode(x))
        scores = self.v(torch.tanh(self.w(x) + self.u(k)))
        return scores.softmax(self.dim) * k
""",
    "Hyper": """
class Hyper(nn.Module):
    <<h0 = 1.0>>
    def __init__(self, layer, dim, depends):
        super().__init__()
        self.layer, self.depends = layer, nn.Linear(dim, 4) if depends else None
        self.mix, self.beta = nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(3, 1, 1))

    def forward(self, streams):
        if self.depends is None:
            mixed = torch.einsum("st,ntld->nsld", self.mix, streams)
        else:
            mix = self.mix + torch.tanh(self.depends(streams.mean(2))).transpose(1, 2)
            mixed = torch.einsum("nst,ntld->nsld", mix, streams)
        return mixed[:, 1:] + <<self.h0 * >>(self.beta * self.layer(mixed[:, 0])[:, None])  # step
""",
    "Decoder": """
class DecoderLayer(nn.Module):
    <<h0 = h1 = 1.0>>
    def __init__(self, dim):
        super().__init__()
        self.attention = nn.MultiheadAttention(dim, 2, batch_first=True)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.ReLU(), nn.Linear(2 * dim, dim))

    def forward(self, x, positions):
        query = x + positions
        x = self.norm1(x + <<self.h0 * >>self.attention(query, query, x, need_weights=False)[0])  # step
        return self.norm2(x + <<self.h1 * >>self.mlp(x))  # step


class Decoder(nn.Module):
    def __init__(self, dim, layers):
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(dim) for _ in range(layers))
        self.heads = nn.ModuleList(nn.Linear(dim, 4) for _ in range(layers))
        self.embed = nn.Sequential(nn.Linear(4, dim), nn.ReLU(), nn.Linear(dim, dim))
        self.boxes = nn.Parameter(torch.zeros(1, TOKENS, 4))

    def forward(self, x):
        boxes = self.boxes.expand(x.shape[0], -1, -1)
        for layer, head in zip(self.layers, self.heads):
            x = layer(x, self.embed(boxes))
            boxes = torch.sigmoid(head(x) + boxes)
        return x
""",
    "Permuted": """
class Permuted(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x.transpose(1, -1)).transpose(1, -1)
""",
    "LoRA": """
class LoRA(nn.Module):
    def __init__(self, base, down, up):
        super().__init__()
        self.base, self.down, self.up = base, down, up

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))
""",
    "FeedThrough": """
class FeedThrough(nn.Module):
    def __init__(self, scan, shape):
        super().__init__()
        self.scan = scan
        self.D = nn.Parameter(torch.ones(shape))

    def forward(self, x):
        return self.scan(x) + x * self.D
""",
    "Siblings": """
class Siblings(nn.Module):
    def __init__(self, one, other):
        super().__init__()
        self.one, self.other = one, other

    def forward(self, x):
        return self.one(x) + self.other(x)
""",
    "Split": """
class Split(nn.Module):
    def __init__(self, one, other, dim):
        super().__init__()
        self.one, self.other, self.dim = one, other, dim

    def forward(self, x):
        a, b = x.chunk(2, self.dim)
        a = self.one(a)
        return torch.cat([a, self.other(a + b)], self.dim)
""",
    "PoolingResidual": """
class PoolingResidual(nn.Module):
    def __init__(self, pool):
        super().__init__()
        self.pool = pool

    def forward(self, x):
        return self.pool(x) - x
""",
    "ResponseNorm": """
class ResponseNorm(nn.Module):
    def __init__(self, shape, channels, space):
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.zeros(shape)), nn.Parameter(torch.zeros(shape))
        self.channels, self.space = channels, space

    def forward(self, x):
        g = x.norm(dim=self.space, keepdim=True)
        return x + self.beta + self.gamma * (x * (g / (g.mean(self.channels, keepdim=True) + 1e-6)))
""",
    "Inner": """
class Inner(nn.Module):
    <<h0 = 1.0>>
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return x + <<self.h0 * >>self.layer(x)  # step
""",
    "Residual": """
class Residual(nn.Module):
    <<h0 = 1.0>>
    def __init__(self, fn):
        super().__init__()
        self.fn = fn

    def forward(self, x, **kwargs):
        return <<self.h0 * >>self.fn(x, **kwargs) + x  # step
""",
    "Add": """
class Add(nn.Module):
    <<h0 = 1.0>>
    def forward(self, a, b):
        return a + <<self.h0 * >>b  # step
""",
    "Gated": """
class Gated(nn.Module):
    <<h0 = 1.0>>
    def __init__(self, layer, gate, spelling):
        super().__init__()
        self.layer, self.gate, self.spelling = layer, gate, spelling

    def forward(self, s):
        n, z = torch.tanh(self.layer(s)), torch.sigmoid(self.gate(s))
        if self.spelling == "mix":
            return <<by_difference(>>(1 - z) * n + z * s<<, s, self.h0)>>  # step
        if self.spelling == "from the state":
            return s + <<self.h0 * >>((1 - z) * (n - s))  # step
        if self.spelling == "subtracted from the state":
            return s - <<self.h0 * >>((1 - z) * (s - n))  # step
        if self.spelling == "scripted mix":
            return <<by_difference(>>scripted_mix(s, n, z)<<, s, self.h0)>>  # step
        if self.spelling == "from the candidate":
            return <<by_difference(>>(s - n) * z + n<<, s, self.h0)>>  # step
        if self.spelling == "lerp":
            return <<by_difference(>>torch.lerp(s, n, 1 - z)<<, s, self.h0)>>  # step
        if self.spelling == "addcmul by a gate":
            return <<by_difference(>>torch.addcmul(n, z, s - n)<<, s, self.h0)>>  # step
        y = z * s
        y += (1 - z) * n  # step
        <<y = by_difference(y, s, self.h0)>>
        return y
""",
    "by_difference": """
<<def by_difference(y, s, h):>>
<<    if h == 1.0:>>
<<        return y>>
<<    if (y.dtype, y.stride()) == (s.dtype, s.stride()):>>
<<        return torch.lerp(s, y, h)>>
<<    return (y + (y - s) * (h - 1)).to(y.dtype)>>
""",
    "scripted_mix": """
def plain_mix(s, n, z):
    return (1 - z) * n + z * s


with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    scripted_mix = torch.jit.script(plain_mix)
""",
    "scripted_add": """
def plain_add(a, b):
    return a + b


with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    scripted_add = torch.jit.script(plain_add)
""",
    "AddByHand": """
class AddByHand(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b):
        ctx.shapes = a.shape, b.shape
        return a + b

    @staticmethod
    def backward(ctx, grad):
        return grad, grad
""",
    "weight_normed": """
def weight_normed(layer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nn.utils.weight_norm(layer)
""",
    "kept_in_a_default": """
def kept_in_a_default(function):
    def wrapper(*args, __function=function, **kwargs):
        return __function(*args, **kwargs)

    return functools.update_wrapper(wrapper, function)
""",
    "SliceAndPad": """
class SliceAndPad(nn.Module):
    def __init__(self, pads, stride):
        super().__init__()
        self.pads, self.stride = pads, stride

    def forward(self, x):
        return F.pad(x[(slice(None), slice(None)) + (slice(None, None, self.stride),) * (x.ndim - 2)], self.pads)
""",
    "decorated": """
def decorated(function):
    @functools.wraps(function)
    def wrapper(self, *args, **kwargs):
        return function(self, *args, **kwargs)

    return wrapper
""",
}
