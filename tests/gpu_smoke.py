"""Each kernel on a GPU, in each dtype, forward and backward, against float64: a line a check.

python gpu_smoke.py        # at most a minute, most of it compilation; exits with 1 if a check failed
"""

import sys
import time
import traceback
import warnings

import torch
import torch.nn.functional as F

from eulernet import kernels
from eulernet.functional import euler_step, euler_step_bn, euler_step_norm
from eulernet.kernels import _launch

warnings.simplefilter("always")
D = "cuda"
START = time.time()
FAILED: list[str] = []
LIMIT = 55
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ACT = {None: lambda x: x, "relu": F.relu, "silu": F.silu, "gelu": F.gelu}
torch.manual_seed(0)
torch.backends.cuda.matmul.allow_tf32 = False


def rand(*shape, dtype=torch.float32, grad=True):
    return torch.randn(shape, device=D, dtype=torch.float64).to(dtype).requires_grad_(grad)


def grid(*shape, dtype, grad=True):
    """Eighths, of which sums with quarters near 0 are exact: no two ways of rounding differ in the sign of a state."""
    return ((torch.randn(shape, device=D) * 8).round() / 8).to(dtype).requires_grad_(grad)


def run(function, inputs, seeds):
    out = function(*inputs)
    outs = list(out) if isinstance(out, tuple) else [out]
    wanted = [x for x in inputs if x is not None and x.requires_grad]
    gradients = (
        torch.autograd.grad(outs, wanted, [s.to(o.dtype) for s, o in zip(seeds, outs, strict=True)]) if wanted else ()
    )
    return outs + list(gradients)


def compare(ours, eager, inputs, count=1):
    """Ours errs no more than eager does, up to three units in the last place, or of a sum over many elements."""
    doubles = [None if x is None else x.detach().double().requires_grad_(x.requires_grad) for x in inputs]
    seeds = [torch.randn_like(inputs[0], dtype=torch.float64) for _ in range(count)]
    exact, expected = run(eager, doubles, seeds), run(eager, inputs, seeds)
    worst = 0.0
    for again in range(2):  # the second time the compiled kernels are started directly
        actual = run(ours, inputs, seeds)
        torch.cuda.synchronize()
        for a, e, x in zip(actual, expected, exact, strict=True):
            assert a.dtype == e.dtype and a.shape == e.shape, (a.dtype, e.dtype, a.shape, e.shape)
            big = max(x.abs().max().item(), max(s.abs().max().item() for s in seeds))
            eps = torch.finfo(torch.promote_types(a.dtype, torch.float32)).eps
            many = (exact[0].numel() / max(1, a.numel())) ** 0.5  # rounded states are summed up, and rounded sums
            unit = max(big * torch.finfo(a.dtype).eps, big * many * eps, many * torch.finfo(inputs[0].dtype).eps)
            allowed = (e.double() - x).abs().max().item() + 3 * unit
            error = (a.double() - x).abs().max().item()
            assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}, run {again}, shape {tuple(a.shape)}"
            worst = max(worst, error / unit)
        for a, e in list(zip(actual, expected, strict=True))[:count]:
            assert a.stride() == e.stride(), (a.stride(), e.stride())
    return f"{worst:.2f} units"


def check(name, function, *args, **options):
    if time.time() - START > LIMIT:
        print(f"{name}: left out, the time is up", flush=True)
        return
    begun = time.time()
    try:
        said = function(*args, **options)
        print(f"ok    {name}: {said} ({time.time() - begun:.2f} s)", flush=True)
    except Exception as error:
        FAILED.append(name)
        print(f"FAILED {name}: {type(error).__name__}: {error}", flush=True)
        traceback.print_exc(limit=6)


def step(activation, dtype, shape, scaled, masked, view=lambda x: x, skip_dtype=None):
    skip, branch = (view(grid(*shape, dtype=d, grad=False)).requires_grad_() for d in (skip_dtype or dtype, dtype))
    channels = (shape[1], 1, 1) if len(shape) == 4 else (shape[-1],)
    scale = (2.0 ** torch.randint(-1, 2, channels, device=D)).to(dtype).requires_grad_() if scaled else None
    mask = torch.randint(0, 2, (skip.shape[0], *[1] * (len(shape) - 1)), device=D).to(dtype) * 2 if masked else None

    def eager(skip, branch, scale, mask):
        f = branch if scale is None else scale * branch
        return ACT[activation](skip + 0.25 * (f if mask is None else mask * f))

    def ours(skip, branch, scale, mask):
        return euler_step(skip, branch, 0.25, activation=activation, layer_scale=scale, drop_path=mask)

    return compare(ours, eager, [skip, branch, scale, mask])


def norm(kind, dtype, shape, scaled=False, masked=False, h=None, view=lambda x: x):
    skip, branch = (view(rand(*shape, dtype=dtype, grad=False)).requires_grad_() for _ in "12")
    weight, bias = rand(shape[-1], dtype=dtype), rand(shape[-1], dtype=dtype) if kind == "layer_norm" else None
    scale = rand(shape[-1], dtype=dtype) if scaled else None
    mask = rand(skip.shape[0], *[1] * (len(shape) - 1), dtype=dtype, grad=False) if masked else None

    def eager(skip, branch, weight, bias, scale, mask, h):
        f = branch if scale is None else branch * scale
        state = skip + (0.3 if h is None else h) * (f if mask is None else f * mask)
        if kind == "rms_norm":
            return state, F.rms_norm(state, state.shape[-1:], weight, 1e-5)
        return state, F.layer_norm(state, state.shape[-1:], weight, bias, 1e-5)

    def ours(skip, branch, weight, bias, scale, mask, h):
        return euler_step_norm(
            skip, branch, 0.3 if h is None else h, weight, bias, 1e-5, kind, layer_scale=scale, drop_path=mask
        )

    return compare(ours, eager, [skip, branch, weight, bias, scale, mask, h], count=2)


def bn(activation, dtype, shape, channels_last):
    skip, branch = rand(*shape, dtype=dtype, grad=False), rand(*shape, dtype=dtype, grad=False)
    if channels_last:
        skip, branch = (x.contiguous(memory_format=torch.channels_last) for x in (skip, branch))
    mean, var, weight, bias = (rand(shape[1], grad=False) for _ in range(4))

    def eager(skip, branch, mean, var, weight, bias):
        return ACT[activation](skip + 0.3 * F.batch_norm(branch, mean, var, weight, bias))

    def ours(skip, branch, mean, var, weight, bias):
        return euler_step_bn(skip, branch, 0.3, mean, var, weight, bias, activation=activation)

    return compare(ours, eager, [skip, branch, mean, var.square() + 0.1, weight, bias])


def learned(dtype, activation, on="cuda"):
    skip, branch = grid(64, 49, 384, dtype=dtype), grid(64, 49, 384, dtype=dtype)
    h = torch.tensor(0.25, device=on, requires_grad=True)

    def eager(skip, branch, h):
        return ACT[activation](skip + h * branch)

    return compare(lambda s, b, h: euler_step(s, b, h, activation=activation), eager, [skip, branch, h])


def captured():
    """A graph of a step, a step and a norm, and a 0-d h on the CPU, with gradients; replayed with new values."""
    skip, branch, weight = rand(256, 1024), rand(256, 1024), rand(1024)
    h = torch.tensor(0.5)

    def work():
        out = euler_step(skip, branch, h, activation="silu")
        state, normed = euler_step_norm(out, branch, 0.3, weight, kind="rms_norm")
        return (normed, *torch.autograd.grad(normed.square().sum() + state.sum(), (skip, branch, weight)))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = work()
    with torch.no_grad():
        skip.copy_(torch.randn_like(skip))
        branch.copy_(torch.randn_like(branch))
    graph.replay()
    torch.cuda.synchronize()
    for a, e in zip(results, work(), strict=True):
        assert torch.equal(a, e)
    return "the same bits"


def streams():
    """A step on a stream that is not the default one comes after what that stream does before it."""
    side = torch.cuda.Stream()
    x = torch.zeros(1 << 22, device=D)
    torch.cuda.synchronize()
    with torch.cuda.stream(side), torch.no_grad():
        for _ in range(3):
            torch.cuda._sleep(20_000_000)
            x.fill_(2.0)
            y = euler_step(x, x, 0.5, activation="relu")
            x.fill_(0.0)
    side.synchronize()
    assert (y == 3).all()
    return "in order"


def unaligned():
    """Pointers that 16 does not divide, between aligned ones, with the same plan."""
    base, out = torch.randn(2, (1 << 20) + 8, device=D), []
    for offset in (0, 1, 0, 2, 3, 0):
        s, b = (row[offset : offset + (1 << 20)] for row in base)
        out.append((euler_step(s, b, 0.5, activation="relu") - F.relu(s + 0.5 * b)).abs().max().item())
    assert max(out) < 1e-6, out
    return f"{max(out):.1e}"


def direct():
    """The compiled kernels are started directly on this version of Triton."""
    count, ordinary = [0], _launch.Launch._through_triton

    def counted(self, tensors, h):
        count[0] += 1
        return ordinary(self, tensors, h)

    _launch.Launch._through_triton = counted
    try:
        s, b = rand(333, 1024), rand(333, 1024)
        for _ in range(5):
            euler_step(s, b, 0.3, activation="relu").sum().backward()
    finally:
        _launch.Launch._through_triton = ordinary
    assert count[0] == 2, f"{count[0]} launches through Triton, of 10"
    return "two launches of ten went through Triton, the first of each kernel"


def twice():
    """Derivatives of derivatives, and batched ones."""
    s, b, g, w = (rand(*shape, dtype=torch.float64) for shape in ((2, 8), (2, 8), (8,), (8,)))
    for act in ACT:
        assert torch.autograd.gradgradcheck(
            lambda s, b, g, act=act: euler_step(s, b, 0.3, activation=act, layer_scale=g), (s, b, g)
        )
    assert torch.autograd.gradgradcheck(lambda s, b, w: euler_step_norm(s, b, 0.3, w), (s, b, w))
    seeds = torch.randn(3, 2, 8, device=D, dtype=torch.float64)
    y = euler_step(s, b, 0.3, activation="gelu")
    batched = torch.autograd.grad(y, s, seeds, is_grads_batched=True, retain_graph=True)[0]
    for row, seed in zip(batched, seeds, strict=True):
        torch.testing.assert_close(row, torch.autograd.grad(y, s, seed, retain_graph=True)[0])
    return "right"


def offloaded():
    s, b, g = (rand(4, 8, 6, 6, grad=False).contiguous(memory_format=torch.channels_last) for _ in "123")
    s.requires_grad_(), b.requires_grad_()
    with torch.autograd.graph.save_on_cpu(pin_memory=True):
        y = euler_step(s, b, 0.3, activation="silu", layer_scale=torch.ones(8, 1, 1, device=D, requires_grad=True))
    z = F.silu(s + 0.3 * b)
    for a, e in zip(torch.autograd.grad(y, (s, b), g), torch.autograd.grad(z, (s, b), g), strict=True):
        torch.testing.assert_close(a, e)
    return "right"


def threads():
    """Checkpointing: the forward is run again in a thread of autograd's, in the mode of the one that called it."""
    from torch.utils.checkpoint import checkpoint

    s, b = rand(8, 64), rand(8, 64)
    for mode in ("torch", "triton"):
        with kernels.mode(mode):
            y = checkpoint(lambda s, b: euler_step(s, b, 0.3, activation="silu"), s, b, use_reentrant=False)
            y.sum().backward()
    return "right"


def autocast():
    s, b, w = rand(64, 1024, grad=False), rand(64, 1024, dtype=torch.bfloat16, grad=False), rand(1024, grad=False)
    with torch.autocast("cuda", torch.bfloat16):
        _, normed = euler_step_norm(s, b, 0.3, w)
        expected = F.layer_norm(torch.add(s, b, alpha=0.3), (1024,), w)
    torch.testing.assert_close(normed, expected)
    assert normed.dtype == expected.dtype
    return "right"


def main():
    kernels.mode("triton")
    print(torch.cuda.get_device_name(), "torch", torch.__version__, flush=True)
    last = lambda x: x.contiguous(memory_format=torch.channels_last)  # noqa: E731
    check("direct launches", direct)
    for dtype in DTYPES:
        short = str(dtype).removeprefix("torch.")
        check(f"step relu {short}", step, "relu", dtype, (32, 197, 768), False, False)
        check(f"step none, gamma, drop path {short}", step, None, dtype, (32, 197, 384), True, True)
        check(f"step silu {short}", step, "silu", dtype, (32, 197, 384), False, False)
        check(f"step gelu, gamma {short}", step, "gelu", dtype, (32, 197, 384), True, False)
        check(f"step relu channels_last, gamma {short}", step, "relu", dtype, (8, 96, 14, 14), True, False, last)
        check(f"step relu NCHW 7x7, gamma {short}", step, "relu", dtype, (8, 96, 7, 7), True, True)
        check(f"layer_norm {short}", norm, "layer_norm", dtype, (16, 197, 768))
        check(f"rms_norm {short}", norm, "rms_norm", dtype, (4, 512, 2048))
        check(f"layer_norm, gamma, drop path {short}", norm, "layer_norm", dtype, (16, 197, 384), True, True)
        check(f"learned h, silu {short}", learned, dtype, "silu")
        if dtype != torch.float64:
            check(f"bn relu NCHW {short}", bn, "relu", dtype, (8, 256, 7, 7), False)
            check(f"bn relu channels_last {short}", bn, "relu", dtype, (8, 256, 14, 14), True)
    check(
        "mixed float32 + bfloat16",
        step,
        "relu",
        torch.bfloat16,
        (64, 1024),
        True,
        False,
        skip_dtype=torch.float32,
    )
    check(
        "norm of a transposed state",
        norm,
        "layer_norm",
        torch.float32,
        (64, 32, 256),
        view=lambda x: x.transpose(0, 1),
    )
    check(
        "rms_norm of a transposed state",
        norm,
        "rms_norm",
        torch.float32,
        (64, 32, 256),
        view=lambda x: x.transpose(0, 1),
    )
    check(
        "norm, learned h",
        norm,
        "rms_norm",
        torch.bfloat16,
        (64, 1024),
        h=torch.tensor(0.3, device=D, requires_grad=True),
    )
    check("learned h on the CPU", learned, torch.float32, "relu", "cpu")
    for name, function in list(globals().items()):
        if name in ("captured", "streams", "unaligned", "twice", "offloaded", "threads", "autocast"):
            check(name, function)
    check("norm of 8192 columns", norm, "layer_norm", torch.bfloat16, (512, 8192))
    print(f"{len(FAILED)} failed {FAILED} in {time.time() - START:.0f} s")
    return 1 if FAILED else 0


if __name__ == "__main__":
    sys.exit(main())
