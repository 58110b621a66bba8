"""What comes from outside is checked at the door: an error in words that ends in the corrected call, and no change."""

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import eulernet
from eulernet import EulernetError
from eulernet._find.inputs import as_arguments
from eulernet._patch.subclass import restore
from eulernet._source import Span
from eulernet.cli import _example_inputs
from eulernet.functional import euler_step, euler_step_bn, euler_step_norm
from tests.helpers.blocks import Block, Loop, Named, NamedByItsClass, chain
from tests.helpers.refusals import refused

X = torch.ones(2, 8)


class Unshowable:
    def __repr__(self) -> str:
        raise RuntimeError("no words")

    def __float__(self) -> float:
        raise RuntimeError("no number")


def patch(model: nn.Module, **options: Any) -> nn.Module:
    return eulernet.patch(model, **{"h": 0.5, "example_inputs": X, **options})


# ------------------------------------------------------------------------------------------------------------ arguments

NO_NUMBERS = [
    True,
    np.True_,
    torch.tensor(True),
    b"1",
    bytearray(b"12"),
    memoryview(b"12"),
    None,
    "0.1",
    0,
    -1.0,
    float("nan"),
    float("inf"),
    10**400,
    1j,
    np.complex64(1 + 1j),
    torch.tensor(1 + 0j),
    np.ones(3),
    torch.ones(3),
    Unshowable(),
    nn.Linear(1, 1),
    object,
]


@pytest.mark.parametrize("h", NO_NUMBERS, ids=lambda h: type(h).__name__)
def test_an_h_that_is_no_number_is_refused(h: Any) -> None:
    plain = chain()
    refused(plain, lambda: patch(plain, h=h), "h")
    model = patch(chain())
    refused(model, lambda: eulernet.set_h(model, h), "h")
    refused(model, lambda: eulernet.set_h(model, [0.5, h]), r"h of 1 must be .*; for example h=0\.1")
    refused(model, lambda: eulernet.set_h(model, {"0": h, "*": 1.0}), r"h of 0 must be .*; for example h=0\.1")
    refused(model, lambda: eulernet.set_h(model, lambda step: h), r"h of 0 must be .*; for example h=0\.1")


def test_numbers_of_all_kinds_are_taken() -> None:
    model = patch(chain())
    for h in (1, np.float32(0.5), np.int64(2), torch.tensor(0.5), torch.tensor([2]), [0.5, np.float16(0.25)]):
        eulernet.set_h(model, h)


def raises(step: Any) -> Any:
    raise KeyError("of the caller's")


@pytest.mark.parametrize(
    ("argument", "value", "words"),
    [
        ("include", chain()[0], "include is a module, Block.*include=Block"),
        ("include", [chain()[0]], r"include: Block.*for example include=\["),
        ("include", lambda: True, r"failed on 0 \(TypeError.*include=lambda step: step.calls == 1"),
        ("include", lambda a, b: True, r"failed on 0 \(TypeError.*include=lambda step: step.calls == 1"),
        ("exclude", raises, r"failed on 0 \(KeyError.*exclude=lambda step: step.calls == 1"),
        ("exclude", lambda step: np.ones(2), r"failed on 0 \(ValueError.*exclude=lambda step: step.calls == 1"),
        ("include", b"0", "include"),
        ("include", Unshowable(), "include=a Unshowable is no pattern.*include=lambda step: step.calls == 1"),
        ("h", lambda: 0.5, r"failed on 0 \(TypeError.*h=lambda step: 1 / step.depth"),
        ("h", lambda a, b: 0.5, r"failed on 0 \(TypeError.*h=lambda step: 1 / step.depth"),
        ("h", raises, r"failed on 0 \(KeyError.*h=lambda step: 1 / step.depth"),
        ("preserve", np.ones(2), "preserve must be True, False or .*for example preserve=True"),
        ("preserve", 1, "preserve must be True, False or .*for example preserve=True"),
        ("preserve", [], "preserve must be True, False or .*for example preserve=True"),
        ("trainable", np.True_, "trainable=.*write trainable=True"),
        ("trainable", [], "trainable=.*write trainable=True"),
    ],
)
def test_a_wrong_argument_of_patch_is_refused(argument: str, value: Any, words: str) -> None:
    model = chain()
    refused(model, lambda: patch(model, **{argument: value}), words)


def test_a_module_as_include_is_answered_with_its_name() -> None:
    model = chain()
    refused(model, lambda: patch(model, include=model[1]), "write include='1'$")


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: eulernet.param_groups(m, 1, h=0.5, optimizer=[], example_inputs=X), "optimizer must be one of"),
        (lambda m: eulernet.param_groups(m, 0.1, h=0.5, weight_decay=np.ones(2), example_inputs=X), "weight_decay"),
        (lambda m: eulernet.fold(m, where_possible=np.ones(2), example_inputs=X), "where_possible must be True"),
        (lambda m: eulernet.HScheduler(m, total_steps=torch.tensor(True)), "total_steps must be a whole number"),
        (lambda m: eulernet.HScheduler(m, total_steps=np.True_), "total_steps must be a whole number"),
        (lambda m: eulernet.HScheduler(m, total_steps=2, kind=[]), "kind must be one of.*kind="),
    ],
)  # fmt: skip
def test_a_wrong_argument_elsewhere_is_refused(call: Callable[[Any], Any], words: str) -> None:
    model = patch(chain())
    refused(model, lambda: call(model), words)


@pytest.mark.parametrize(
    "change",
    [
        None,
        [],
        7,
        {},
        {"steps": None},
        {"steps": "01"},
        {"steps": [0, 1]},
        {"last_step": -1},
        {"last_step": True},
        {"total_steps": 0},
        {"kind": None},
        {"kind": []},
        {"start": None},
        {"start": [1.0]},
        {"start": [True, 1.0]},
        {"end": "01"},
        {"end": [[1.0], 1.0]},
    ],
    ids=str,
)
def test_a_wrong_state_of_a_schedule_is_refused(change: Any) -> None:
    model = patch(chain())
    schedule = eulernet.HScheduler(model, start=1.0, end=0.5, total_steps=4)
    before = schedule.state_dict(), [step.h for step in eulernet.steps(model)]
    state = {**schedule.state_dict(), **change} if isinstance(change, dict) and change else change
    refused(model, lambda: schedule.load_state_dict(state))
    assert (schedule.state_dict(), [step.h for step in eulernet.steps(model)]) == before


@pytest.mark.parametrize("h", ["0.1", None, True, b"1", [0.1], 1j, nn.Linear(1, 1)], ids=str)
def test_the_h_of_a_functional_step_is_a_number_or_a_tensor(h: Any) -> None:
    one = torch.ones(2)
    for name, call in {
        "euler_step": lambda: euler_step(X, X, h),
        "euler_step_norm": lambda: euler_step_norm(X, X, h),
        "euler_step_bn": lambda: euler_step_bn(torch.ones(3, 2), torch.ones(3, 2), h, one, one),
    }.items():
        with pytest.raises(EulernetError, match=rf"h must be a number or a tensor, .*{name}\(skip, branch, h=0.1\)$"):
            call()


def test_numbers_of_numpy_are_taken_by_a_functional_step() -> None:
    assert torch.equal(euler_step(X, X, np.float32(0.5)), euler_step(X, X, 0.5))  # type: ignore[arg-type]


# -------------------------------------------------------------------------------------------------------------- inputs


def holding_itself(kind: str) -> Any:
    if kind == "dict":
        mapping: dict[str, Any] = {}
        mapping["x"] = [mapping]
        return mapping
    values: list[Any] = []
    values.append((values,))
    return values


@pytest.mark.parametrize("kind", ["list", "dict"])
def test_inputs_that_hold_themselves_are_refused(kind: str) -> None:
    model = chain()
    refused(
        model, lambda: patch(model, example_inputs=holding_itself(kind)), "holds itself; pass tensors.*example_inputs="
    )


def test_one_list_twice_is_no_circle() -> None:
    shared = [torch.ones(1)]
    assert as_arguments([shared, shared]) == (tuple([shared, shared]), {})


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors_are_refused(layout: torch.layout) -> None:
    model = chain()
    nested = torch.nested.nested_tensor([torch.zeros(2, 8), torch.zeros(3, 8)], layout=layout)
    refused(model, lambda: patch(model, example_inputs=nested), "nested tensor.*to_padded_tensor")


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_inputs_of_another_dtype_are_traced_or_refused(dtype: torch.dtype) -> None:
    model = chain()
    try:
        found = eulernet.find_steps(model, example_inputs=X.to(dtype))
    except EulernetError as error:
        assert "example_inputs" in str(error)
    else:
        assert len(found) == 2


# ---------------------------------------------------------------------------------------------------------------- JSON


def document() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(eulernet.steps(patch(chain())).to_json())
    return loaded


def edited(change: Callable[[dict[str, Any]], Any]) -> str:
    data = document()
    change(data)
    return json.dumps(data)


WRONG_FIELDS: dict[str, list[Any]] = {
    "index": [-1, 0.5, "0", True, None, 2**70],
    "name": [[1], None, 3],
    "module_class": [None, 1],
    "kind": ["other", None, ["identity"]],
    "places": [None, {}, [1], [{}], [[]], "places"],
    "calls": [-1, "1", None],
    "stream": [None, 1.5],
    "depth": [None, "2"],
    "position": [None, []],
    "parent": [1, []],
    "h": ["0.5", -1, 0, True, [], float("nan"), float("inf"), 10**400],
    "module_name": [None, 1],
    "number": ["0", -1, 0.0],
    "unknown": [1],
}


@pytest.mark.parametrize(
    ("field", "value"), [(f, v) for f, values in WRONG_FIELDS.items() for v in values], ids=lambda v: repr(v)[:20]
)
def test_each_field_of_a_step_is_checked(field: str, value: Any) -> None:
    text = edited(lambda data: data["steps"][0].update({field: value}))
    with pytest.raises(EulernetError, match=r"steps\[0\].*eulernet.Steps.from_json\(text\)$"):
        eulernet.Steps.from_json(text)


@pytest.mark.parametrize("field", list(document()["steps"][0]["places"][0]))
def test_each_field_of_a_place_is_checked(field: str) -> None:
    wrong: list[Any] = [None, -1, [], {}]
    for value in wrong:
        text = edited(lambda data, value=value: data["steps"][0]["places"][0].update({field: value}))  # type: ignore[misc]
        with pytest.raises(EulernetError, match=r"steps\[0\], places\[0\].*eulernet.Steps.from_json\(text\)$"):
            eulernet.Steps.from_json(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[",
        "[" * 100_000,
        '{"a":' * 100_000,
        "[]",
        "null",
        "7",
        '"steps"',
        "{}",
        '{"steps": []}',
        b"\xff",
        None,
        7,
        edited(lambda data: data.update(steps={})),
        edited(lambda data: data.update(notes="a")),
        edited(lambda data: data.update(unsupported=[1])),
        edited(lambda data: data.update(left_out={})),
        edited(lambda data: data.update(outside=[])),
        edited(lambda data: data["outside"].update(names=[1])),
        edited(lambda data: data["outside"].update(parameters="1")),
        edited(lambda data: data["steps"].append(data["steps"][0])),
        edited(lambda data: data["steps"][1].update(index=0)),
        edited(lambda data: data["steps"][1].update(name="0", module_name="0")),
        edited(lambda data: data["steps"][0].pop("calls")),
        edited(lambda data: data["steps"].append(None)),
        json.dumps(document())[:-1] + ', "steps": []}',
    ],
    ids=lambda text: str(text)[:12],
)
def test_what_is_no_document_of_steps_is_refused(text: Any) -> None:
    with pytest.raises(EulernetError, match=r"not what Steps.to_json\(\) writes.*eulernet.Steps.from_json\(text\)$"):
        eulernet.Steps.from_json(text)


# -------------------------------------------------------------------------------------------------------------- pickles


def plan_of(model: nn.Module) -> Any:
    return type(patch(model)[0])._euler_plan  # type: ignore[index]


@pytest.mark.parametrize(
    "change",
    [
        lambda t, slot, left, sub: None,
        lambda t, slot, left, sub: (t, slot, left),
        lambda t, slot, left, sub: (t, 1, left, sub),
        lambda t, slot, left, sub: (t, "0", left, sub),
        lambda t, slot, left, sub: (t, slot, 1, sub),
        lambda t, slot, left, sub: ((), slot, left, sub),
        lambda t, slot, left, sub: (((1, 2),), slot, left, sub),
        lambda t, slot, left, sub: (((t[0][0], Span(90, 90, 0, 1)),), slot, left, sub),
        lambda t, slot, left, sub: (((replace(t[0][0], digest="0"), t[0][1]),), slot, left, sub),
        lambda t, slot, left, sub: (((replace(t[0][0], name="__init__"), t[0][1]),), slot, left, sub),
        lambda t, slot, left, sub: (((replace(t[0][0], owner=("os", "f")), t[0][1]),), slot, left, sub),
    ],
)  # fmt: skip
def test_a_plan_that_does_not_fit_is_refused(change: Callable[..., Any]) -> None:
    (place,) = plan_of(chain())
    with pytest.raises(EulernetError):
        restore(Block, (change(*place),))
    restore(Block, (place,))


def test_a_class_that_is_no_module_is_refused() -> None:
    plan = plan_of(chain())
    for cls in (dict, None, "Block", nn.Linear(1, 1)):
        with pytest.raises(EulernetError, match=r"h=Steps.from_json\(...\)$"):
            restore(cls, plan)  # type: ignore[arg-type]


def test_a_plan_imports_no_module_that_the_class_does_not_belong_to() -> None:
    import sys

    ((targets, slot, left, subtracts),) = plan_of(chain())
    target, span = targets[0]
    for name in ("antigravity", "this"):
        callee = replace(target, owner=None, name=f"{name}:f")
        with pytest.raises(EulernetError):
            restore(Block, ((((target, span), (callee, span)), slot, left, subtracts),))
        assert name not in sys.modules


@pytest.mark.parametrize("kept", [[], None, "factors", [1, 2]])
def test_a_pickle_without_its_factors_is_refused(kept: Any) -> None:
    block = patch(chain())[0]  # type: ignore[index]
    function, args, state = block.__reduce_ex__(2)[:3]
    with pytest.raises(EulernetError, match=r"plan for 1 steps.*h=Steps.from_json\(...\)$"):
        function(*args).__setstate__({**state, "_euler": kept})
    assert isinstance(pickle.loads(pickle.dumps(block)), Block)


# ---------------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    "name", ["_euler", "_euler_steps", "_euler_slots", "_euler_step", "_euler_function_0", "_euler_of_mine"]
)
def test_an_attribute_with_a_name_of_eulernets_is_refused(name: str) -> None:
    model = chain(Block(), Named(name))
    refused(model, lambda: patch(model), rf"1 \(Named\) has {name} of its own.*exclude='1'\)$")
    assert len(eulernet.steps(patch(model, exclude="1"))) == 1
    eulernet.unpatch(model)
    assert getattr(model[1], name) == "the owner's"


def test_an_attribute_of_a_layer_of_a_loop_with_a_name_of_eulernets_is_refused() -> None:
    model = Loop()
    for name in ("_euler_slots", "_euler_of_mine"):
        setattr(model.layers[1], name, "the owner's")
        words = r"layers\.1 \(Linear\) has _euler_.* of its own.*exclude=\['layers\.0', 'layers\.1'\]\)$"
        for options in ({}, {"exclude": "layers.1"}):  # which is asked whether it is the layer of now, all the same
            refused(model, lambda: patch(model, **options), words)  # noqa: B023
        delattr(model.layers[1], name)
    assert [step.h for step in eulernet.steps(patch(patch(model), h=0.25))] == [0.25, 0.25]


def test_an_attribute_of_the_class_with_a_name_of_eulernets_is_refused() -> None:
    model = chain(NamedByItsClass())
    refused(model, lambda: patch(model), r"0 \(NamedByItsClass\) has _euler_step of its own.*exclude='0'\)$")


@pytest.mark.parametrize("name", ["log_h_bias"])
def test_an_attribute_with_the_name_of_a_learned_h_is_refused(name: str) -> None:
    model = chain(Block(), Named(name))
    refused(
        model, lambda: patch(model, trainable=True), rf"1 \(Named\) has an attribute {name} of its own.*exclude='1'"
    )


# --------------------------------------------------------------------------------------------------------- command line


@pytest.mark.parametrize(
    "text",
    ["1,2:float99", "1,2:quint8", "9" * 30, "99999999,99999999,999", "1,2:Tensor", "9" * 5000, "-1,2", "1,"],
    ids=lambda text: text[:20],
)  # fmt: skip
def test_an_input_of_the_command_line_that_cannot_be_made_is_refused(text: str) -> None:
    with pytest.raises(EulernetError, match=r"write .*--input input_ids=1,16:int64"):
        _example_inputs([text], torch.device("cpu"))


# ------------------------------------------------------------------------------------------------ -------- operands


@pytest.mark.parametrize(
    "operand", [None, 1.0, "x", np.ones((2, 8)), [1.0], Unshowable()], ids=lambda o: type(o).__name__
)
def test_the_operands_of_a_functional_step_are_tensors(operand: Any) -> None:
    for name, call in {
        "skip": lambda: euler_step(operand, X, 0.5),
        "branch": lambda: euler_step_norm(X, operand, 0.5),
    }.items():
        with pytest.raises(EulernetError, match=rf"{name} must be a tensor, not .*\(x, f\(x\), h=0.1\)$"):
            call()


@pytest.mark.parametrize("h", [float("nan"), float("inf"), 10**400, Unshowable()], ids=lambda h: type(h).__name__)
def test_an_h_of_a_functional_step_that_is_not_finite_is_refused(h: Any) -> None:
    with pytest.raises(EulernetError, match=r"h must be a number or a tensor, not .*h=0.1\)$"):
        euler_step(X, X, h)


@pytest.mark.parametrize("selector", [torch.tensor(1), map(raises, [1]), object()], ids=lambda s: type(s).__name__)
def test_what_cannot_be_listed_is_no_selector(selector: Any) -> None:
    model = chain()
    refused(model, lambda: patch(model, include=selector), "include=|include: ")


@pytest.mark.parametrize("h", [5e-324, 1e200])
def test_an_h_that_makes_no_learning_rate_is_refused(h: float) -> None:
    model = chain()
    refused(
        model, lambda: eulernet.param_groups(model, 0.1, h=h, example_inputs=X), r"too far from 1.*for example h=0\.1"
    )
