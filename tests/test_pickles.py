"""Pickles of patched models: the names that they hold, and those that were written when the modules had other names."""

import pickle
import pickletools
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import eulernet

DATA = Path(__file__).parent / "data"
# What is listed here stays importable under this name, or no pickle of a patched model loads any more.
NAMES = {
    "eulernet._patch.subclass restore",
    "eulernet._run.factor LearnedFactor",
    "eulernet._run.factor StepFactor",
    "eulernet._source Span",
    "eulernet._source Target",
    "eulernet._step Outside",
    "eulernet._step Place",
    "eulernet._step Step",
    "eulernet._step Steps",
}
FORMER = {
    "eulernet._factor LearnedFactor",
    "eulernet._factor StepFactor",
    "eulernet._patch _restore",
    "eulernet._report Place",
    "eulernet._report Step",
    "eulernet._report Steps",
    "eulernet._rewrite Span",
    "eulernet._rewrite Target",
}


@pytest.fixture
def pickled(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(DATA))
    import pickled  # type: ignore[import-not-found]  # it is found when the test runs

    return pickled


def names(data: bytes) -> set[str]:
    return {arg for op, arg, _ in pickletools.genops(data) if op.name == "GLOBAL" and arg.startswith("eulernet")}


def models(pickled: Any) -> dict[str, Any]:
    fixed = eulernet.patch(pickled.model(), h=[0.1, 0.2, 0.3, 0.4, 0.5], example_inputs=pickled.example())
    learned = eulernet.patch(pickled.model(), h=0.3, trainable="stage", example_inputs=pickled.example())
    return {"fixed": fixed, "learned": learned, "steps": eulernet.steps(fixed)}


def test_names_of_the_library_in_a_pickle_are_these(pickled: ModuleType) -> None:
    assert names(pickle.dumps(models(pickled), protocol=2)) == NAMES


def test_a_pickle_with_the_former_names_still_loads(pickled: ModuleType) -> None:
    data = (DATA / "patched_flat_modules.pickle").read_bytes()
    assert names(data) == FORMER
    old, new, x = pickle.loads(data), models(pickled), pickled.example()
    assert old["steps"] == eulernet.steps(old["fixed"]) == eulernet.Steps.from_json(old["json"])
    for kind in ("fixed", "learned"):
        assert [s.h for s in eulernet.steps(old[kind])] == [s.h for s in eulernet.steps(new[kind])]
        assert [type(module) for module in old[kind]] == [type(module) for module in new[kind]]
        torch.testing.assert_close(old[kind](x), old["outputs"][kind])
        for ours, theirs in zip(new[kind], old[kind], strict=True):
            spans = [[span for _, span in targets] for targets, *_ in theirs._euler_plan]
            expected = [[span for _, span in targets] for targets, *_ in ours._euler_plan]
            assert [list(map(vars, s)) for s in spans] == [list(map(vars, s)) for s in expected]
    assert names(pickle.dumps({k: v for k, v in old.items() if k != "outputs"}, protocol=2)) == NAMES
