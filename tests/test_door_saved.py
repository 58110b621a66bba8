"""State dicts and files from outside are checked at the door, and weights are loaded whole."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import eulernet
from eulernet import EulernetError
from tests.helpers.blocks import chain
from tests.helpers.refusals import refused
from tests.test_door import patch


@pytest.mark.parametrize(
    "entry",
    [5, None, "a", [1], [[1]], [[1, 2, 3]], {"a": 1}, [["x", 0.5]], [[None, float("nan")]], [[0, -1.0]], [[0, True]]],
    ids=str,
)
def test_metadata_of_a_state_dict_that_holds_no_steps_is_refused(entry: Any) -> None:
    model, other = patch(chain()), chain()
    state: Any = model.state_dict()
    state._metadata["0"]["eulernet"] = entry
    refused(model, lambda: eulernet.set_h(model, state), "holds no steps of eulernet, but .*set_h")
    refused(other, lambda: patch(other, h=state), "holds no steps of eulernet, but .*set_h")
    with torch.no_grad():
        state["0.f.bias"] += 1  # of `model`, which is to be loaded whole all the same
        expected = state["1.f.bias"].clone().fill_(3)
        state["1.f.bias"] = expected
    with pytest.raises(RuntimeError, match="holds no steps of eulernet"):
        model.load_state_dict(state)
    assert torch.equal(model[1].f.bias, expected)  # type: ignore[index]


def test_a_state_dict_without_its_learned_h_is_refused() -> None:
    model = patch(chain(), trainable=True)
    state: Any = model.state_dict()
    del state[next(name for name in state if name.startswith("1.log_h"))]
    refused(model, lambda: eulernet.set_h(model, state), r"1\.log_h\w* is a learned h, and holds None.*h=0\.1\)$")


def test_a_warning_that_is_an_error_does_not_leave_weights_half_loaded() -> None:
    model, other = patch(chain()), patch(chain(), h=0.25)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeError, match=r"saved at h = 0\.25"):
            model.load_state_dict(other.state_dict())
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("suffix", [".json", ".safetensors", ".pt"])
@pytest.mark.parametrize("content", [b"", b"\xff" * 40, b"[]", b"\x02" + b"\0" * 7 + b"[]", b'{"a": ' * 9])
def test_a_file_that_holds_something_else_is_refused(content: bytes, suffix: str, tmp_path: Path) -> None:
    model, file = chain(), tmp_path / f"model{suffix}"
    file.write_bytes(content)
    refused(model, lambda: patch(model, h=file), r"eulernet\.(patch|steps|Steps)")
    with pytest.raises(EulernetError, match=r"for example steps\.save"):
        eulernet.steps(patch(model)).save(5)  # type: ignore[arg-type]
