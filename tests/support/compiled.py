"""Compilers, exporters, tracers, and transforms of functions."""

from tests.support.base import Row

_PATCH = "eulernet.patch(model, 0.3, example_inputs=x)"
_GROUP, _FUNCTIONS = "Compile and export", "Functions, precision, memory"
_ONNX = """
from onnx.reference import ReferenceEvaluator
net = ReferenceEvaluator(str(folder / "net.onnx"))
given = net.run(None, {net.input_names[0]: x.numpy()})[0]
"""
ROWS = [
    *(
        Row(_GROUP, "torch.compile", f"model = torch.compile({_PATCH}{options})", result="model(x).detach()")
        for options in (
            "",
            ", dynamic=True",
            ', mode="reduce-overhead"',
            ', mode="max-autotune-no-cudagraphs"',
        )
    ),
    Row(
        _GROUP,
        "torch.compile",
        "eulernet.patch(torch.compile(model), 0.3, example_inputs=x)",
        "refused",
        r"model = torch\.compile\(eulernet\.patch\(wrapped\._orig_mod, h=0\.1\)\)",
    ),
    Row(_GROUP, "torch.export", f"model = torch.export.export({_PATCH}, (x,)).module()"),
    Row(
        _GROUP,
        "torch.export",
        "eulernet.patch(torch.export.export(model, (x,)).module(), 0.3, example_inputs=x)",
        "refused",
        "patch the model that it was made from, and trace that again",
    ),
    Row(
        _GROUP,
        "ONNX",
        f'torch.onnx.export({_PATCH}.eval(), (x,), folder / "net.onnx", dynamo=True)',
        after=_ONNX,
        result="torch.from_numpy(given)",
        needs=("onnx", "onnxscript"),
    ),
    Row(
        _GROUP,
        "AOTInductor",
        f"torch._inductor.aoti_compile_and_package(torch.export.export({_PATCH}, (x,)), package_path=path)",
        before="import torch._inductor\npath = str(folder / 'net.pt2')",
        result="torch._inductor.aoti_load_package(path)(x)",
    ),
    Row(_GROUP, "torch.jit.trace", f"model = torch.jit.trace({_PATCH}, x)", "keeps h"),
    Row(
        _GROUP,
        "torch.jit.trace",
        "eulernet.patch(torch.jit.trace(model, x), 0.3, example_inputs=x)",
        "refused",
        "Patch the Python model",
    ),
    Row(
        _GROUP,
        "torch.jit.script",
        "torch.jit.script(eulernet.patch(network(), 0.3, example_inputs=x))",
        "refused",
        r"eulernet\.fold\(model\)",
    ),
    Row(
        _GROUP,
        "torch.jit.script",
        "eulernet.patch(torch.jit.script(model), 0.3, example_inputs=x)",
        "refused",
        "Patch the Python model",
    ),
    Row(
        _GROUP,
        "torch.jit.script",
        f"model = torch.jit.script(eulernet.fold({_PATCH}, example_inputs=x))",
    ),
    Row(_GROUP, "torch.fx", f"model = torch.fx.symbolic_trace({_PATCH})", "keeps h", before="import torch.fx"),
    Row(
        _GROUP,
        "torch.fx",
        "eulernet.patch(torch.fx.symbolic_trace(model), 0.3, example_inputs=x)",
        "refused",
        "patch the model that it was made from, and trace that again",
        before="import torch.fx",
    ),
    Row(
        _GROUP,
        "torch.fx",
        f"torch.fx.symbolic_trace({_PATCH}); eulernet.set_h(model, 0.2)",
        "noticed",
        "Make them again now",
        before="import torch.fx",
    ),
    Row(
        _FUNCTIONS,
        "torch.func",
        f"y = torch.func.functional_call({_PATCH}, dict(model.named_parameters()), (x,))",
        result="y",
    ),
    Row(
        _FUNCTIONS,
        "torch.func",
        f"y = torch.vmap({_PATCH})(x)",
        result="y",
    ),
    Row(
        _FUNCTIONS,
        "torch.func",
        f"y, slope = torch.func.jvp({_PATCH}, (x,), (x,))",
        after="difference = (model(x + 1e-3 * x) - model(x - 1e-3 * x)) / 2e-3\n"
        "torch.testing.assert_close(slope, difference, rtol=1e-2, atol=1e-3)",
        result="y",
    ),
    Row(
        _FUNCTIONS,
        "AMP",
        f'with torch.autocast("cpu", torch.bfloat16): y = {_PATCH}(x)',
        after="torch.testing.assert_close(y.float(), wanted, rtol=0.05, atol=0.05)",
    ),
    Row(
        _FUNCTIONS,
        "AMP",
        f"scaler = torch.amp.GradScaler('cpu'); scaler.scale({_PATCH}(x).sum()).backward(); scaler.step(optimizer)",
        before="optimizer = torch.optim.SGD(model.parameters(), 0.0)",
        after="assert all(p.grad.isfinite().all() for p in model.parameters())",
    ),
    *(
        Row(
            _FUNCTIONS,
            "activation checkpointing",
            f"y = checkpoint({_PATCH}, x.requires_grad_(), use_reentrant={reentrant})",
            before="from torch.utils.checkpoint import checkpoint",
            after="y.sum().backward()\nassert all(p.grad.abs().sum() > 0 for p in model.parameters())",
            result="y.detach()",
        )
        for reentrant in (False, True)
    ),
]
