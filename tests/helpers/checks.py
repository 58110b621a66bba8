"""What must hold of every patched model, whoever wrote it."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_map, tree_map_with_path

import eulernet
from eulernet import Step, Steps
from eulernet._find.inputs import Arguments
from tests.helpers.reference import reference, tensors
from tests.helpers.zoo import Specimen, quiet

# A model that computes some of it in float32 whatever it is given cannot run in float64. In float32 the rounding of the
# scaled branch (6e-8) may grow over the layers.
TOLERANCE_FLOAT32 = 1e-4
# Between (s + h * f) rounded twice and rounded once, in float64. What a model computes in float32 whatever it is given
# (norms, rotary tables) rounds its input, and so may fall to the next float32: 6e-8, a few times over the depth.
TOLERANCE = 1e-6
# Between h * (W x) and (h W) x, in float64; TOLERANCE where the model rounds these to float32.
TOLERANCE_FOLDED = 1e-9


def factor(step: Step) -> float:
    """Near 0.3, and not the same for neighbours, so that a step that is given another one's h is seen."""
    return 0.3 + 0.01 * (step.index % 7)


def check(specimen: Specimen) -> tuple[Steps, int]:
    """Asserts all that patching promises of a model, and returns its steps, and how many of them can be folded.

    With h the patched model equals the reference, folded or not; with h = 1 it is bit-identical to the original: in
    eval mode, in channels_last, in train mode with its gradients, under autocast; once unpatched, nothing is left.
    """
    original = specimen.model
    with quiet():
        expected = run(original, specimen.inputs)
        model = copy.deepcopy(original)
        before = snapshot(model)
        assert eulernet.patch(model, factor, example_inputs=specimen.example) is model
        steps = eulernet.steps(model)
        assert len(steps) > 0
        assert list(model.state_dict()) == list(original.state_dict())
        check_scaled(original, model, steps, specimen, expected)
        folded = check_folded(original, model, specimen)
        eulernet.set_h(model, 1)
        assert_identical(run(model, specimen.inputs), expected)
        check_identical(original, model, specimen)
        eulernet.unpatch(model)
        assert snapshot(model) == before
        assert_identical(run(model, specimen.inputs), expected)
    return steps, folded


def check_scaled(
    original: nn.Module, patched: nn.Module, steps: Steps, specimen: Specimen, unscaled: list[Tensor]
) -> None:
    """The patched model equals the reference, and differs from the original."""
    inputs, tolerance = in_dtype(specimen.inputs, torch.float64), TOLERANCE
    double = copy.deepcopy(original).double()
    if "float64" in specimen.cannot:
        with pytest.raises(RuntimeError):
            run(double, inputs)
        inputs, tolerance = specimen.inputs, TOLERANCE_FLOAT32
    else:
        original, patched = double, copy.deepcopy(patched).double()
    with reference(original, steps, [factor(step) for step in steps]):
        expected = run(original, inputs)
    result = run(patched, inputs)
    assert len(result) == len(expected) == len(unscaled)
    for ours, theirs in zip(result, expected, strict=True):
        finite = theirs[theirs.isfinite()] if theirs.is_floating_point() else theirs.new_empty(0)
        size = finite.abs().max().item() if finite.numel() else 0.0
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * max(size, 1e-3), equal_nan=True)
    # in float32 the original would differ from itself in float64 by a thousandth of this
    assert any(
        a.shape != b.shape or not torch.allclose(a.double(), b.double(), rtol=0.01)
        for a, b in zip(result, unscaled, strict=True)
    )


def check_folded(original: nn.Module, patched: nn.Module, specimen: Specimen) -> int:
    """Folding, and its inverse, patching with `preserve`, leave the function as it was; the number of folded steps."""
    dtype, tolerance = torch.float64, TOLERANCE if specimen.rounded else TOLERANCE_FOLDED
    if "float64" in specimen.cannot:
        dtype, tolerance = torch.float32, TOLERANCE_FLOAT32
    eps = torch.finfo(dtype).eps
    model, example = to(copy.deepcopy(patched), dtype), in_dtype(specimen.example, dtype)
    steps, expected = len(eulernet.steps(model)), in_both_modes(model, specimen, dtype)

    def check_same() -> list[Tensor]:
        result = in_both_modes(model, specimen, dtype)
        try:
            assert_close(result, expected, [tolerance] * len(expected))
        except AssertionError:  # Batch norm over two samples may amplify rounding: so much, and no more, is allowed.
            nudged = eulernet.set_h(to(copy.deepcopy(patched), dtype), lambda step: factor(step) * (1 + eps))
            amplified = [deviation(a, b) for a, b in zip(in_both_modes(nudged, specimen, dtype), expected, strict=True)]
            assert_close(result, expected, [max(tolerance, 100 * a) for a in amplified])
        return result

    eulernet.fold(model, where_possible=True, example_inputs=example)
    folded = check_same()
    left = eulernet.steps(model) if eulernet.is_patched(model) else ()
    assert all(step.h == factor(step) for step in left)
    if not left:
        assert [type(m) for m in model.modules()] == [type(m) for m in original.modules()]
        fresh = to(copy.deepcopy(original), dtype)
        fresh.load_state_dict(model.state_dict(), strict=True)
        alone = run(fresh, in_dtype(specimen.inputs, dtype))
        assert_identical(alone, folded[: len(alone)])
    if len(left) < steps:
        eulernet.patch(model, factor, example_inputs=example, preserve="where_possible")
        check_same()
        assert [step.h for step in eulernet.steps(model)] == [factor(step) for step in eulernet.steps(patched)]
        for ours, theirs in zip(model.parameters(), original.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs.to(ours), rtol=4 * eps, atol=0, equal_nan=True)
    return steps - len(left)


def to(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model in another dtype than float32, in which it is already: `.to` makes complex parameters real."""
    return model if dtype == torch.float32 else model.to(dtype)


def in_both_modes(model: nn.Module, specimen: Specimen, dtype: torch.dtype) -> list[Tensor]:
    """What a copy of the model returns in eval and, where it can be trained, in train mode."""
    model = copy.deepcopy(model)
    output = run(model, in_dtype(specimen.inputs, dtype))
    if "train" in specimen.cannot:
        return output
    seed()
    args, kwargs = copy.deepcopy(in_dtype(specimen.training, dtype))
    with torch.no_grad():
        return output + tensors(model.train()(*args, **kwargs))


def assert_close(ours: list[Tensor], theirs: list[Tensor], tolerances: list[float]) -> None:
    assert len(ours) == len(theirs) > 0
    for a, b, tolerance in zip(ours, theirs, tolerances, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * size(b), equal_nan=True)


def deviation(a: Tensor, b: Tensor) -> float:
    """The largest difference of two tensors, in units of the second one's size."""
    both = a.isfinite() & b.isfinite()
    return ((a - b)[both].abs().max().item() if both.any() and b.is_floating_point() else 0.0) / size(b)


def size(t: Tensor) -> float:
    """The largest finite value of a tensor, or a thousandth."""
    finite = t[t.isfinite()] if t.is_floating_point() else t.new_empty(0)
    return max(finite.abs().max().item() if finite.numel() else 0.0, 1e-3)


def check_identical(original: nn.Module, patched: nn.Module, specimen: Specimen) -> None:
    """Patched with h = 1, a model gives the original's bits, dtypes and strides in each way of running it."""
    inputs = specimen.inputs
    original, patched = copy.deepcopy(original), copy.deepcopy(patched)  # some keep what they computed, in its dtype
    with torch.autocast("cpu", torch.bfloat16):
        if "autocast" in specimen.cannot:
            with pytest.raises(RuntimeError):
                run(original, inputs)
        else:
            assert_identical(run(patched, inputs), run(original, inputs))
    if "channels_last" in specimen.cannot:
        with pytest.raises(RuntimeError):
            copy.deepcopy(original).to(memory_format=torch.channels_last)
    elif any(t.dim() == 4 for t in tensors(inputs)):
        inputs = channels_last(inputs)
        for model in (original, patched):
            model.to(memory_format=torch.channels_last)
        assert_identical(run(patched, inputs), run(original, inputs))
        for model in (original, patched):
            model.to(memory_format=torch.contiguous_format)
    if "train" in specimen.cannot:
        with pytest.raises((TypeError, ValueError, RuntimeError)):
            train(original, specimen.training)
    else:
        assert_identical(train(patched, specimen.training), train(original, specimen.training))


def snapshot(model: nn.Module) -> list[Any]:
    """Of each module its class and what its `__dict__` holds, parameters and buffers by identity."""
    return [
        (
            name,
            type(m),
            list(vars(m)),
            [*map(id, m._parameters.values())],
            [*map(id, m._buffers.values())],
            len(m._modules),
        )
        for name, m in model.named_modules()
    ]


def run(model: nn.Module, inputs: Arguments) -> list[Tensor]:
    """All tensors of the output, in eval mode."""
    seed()
    args, kwargs = copy.deepcopy(inputs)  # some models write into their input
    with torch.no_grad():
        return tensors(model.eval()(*args, **kwargs))


def train(model: nn.Module, inputs: Arguments) -> list[Tensor]:
    """The output in train mode, the gradients of a random function of it, and the buffers afterwards."""
    seed()
    args, kwargs = copy.deepcopy(inputs)
    output = tensors(model.train()(*args, **kwargs))
    differentiable = [t for t in output if t.requires_grad]
    if not differentiable:
        raise ValueError("its output, such as codes, has no gradient")
    sum((t * torch.randn_like(t)).sum() for t in differentiable).backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients
    return [t.detach() for t in output] + gradients + list(model.buffers())


def assert_identical(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        assert (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def seed() -> None:
    """All the generators that models draw from."""
    random.seed(0)
    torch.manual_seed(0)
    try:
        import numpy
    except ImportError:
        return
    numpy.random.seed(0)


def in_dtype(inputs: Any, dtype: torch.dtype) -> Any:
    """The arguments with their floating-point tensors in another dtype."""

    def cast(path: Any, x: Any) -> Any:
        fixed = "keypoints" in keystr(path)  # torchvision trains on these in float32 alone
        return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() and not fixed else x

    return tree_map_with_path(cast, inputs)


def channels_last(inputs: Arguments) -> Arguments:
    """The arguments with their images in channels_last."""
    return tree_map(
        lambda x: x.contiguous(memory_format=torch.channels_last) if isinstance(x, Tensor) and x.dim() == 4 else x,
        inputs,
    )
