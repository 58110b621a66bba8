"""What is said of a forward whose source does not fit, and that nothing has changed."""

import functools
import importlib
import os
import re
import subprocess
import sys
import textwrap
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import eulernet
from tests.helpers.plain import Block, X
from tests.helpers.refusals import refused

ROOT = str(Path(eulernet.__file__).parents[1])

MODULE = """
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 6)

    def forward(self, x):
        return x + self.a(x)
"""


# ---------------------------------------------------------------------------------------------- sources that do not fit


def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str = MODULE) -> tuple[types.ModuleType, Path]:
    path = tmp_path / f"module_{tmp_path.name}.py"
    path.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    return importlib.import_module(path.stem), path


def test_a_forward_without_source_is_named() -> None:
    namespace: dict[str, Any] = {"__name__": "typed_in"}
    exec(compile(MODULE, "<string>", "exec"), namespace)
    model = nn.Sequential(Block(), namespace["Block"]())
    call = functools.partial(eulernet.patch, model, 0.1, example_inputs=X)
    refused(model, lambda: call(include="1"), "Block", r"(?i)source", "'?1'?", "exclude")
    with pytest.warns(eulernet.EulernetWarning, match=r"not scaled: 1 \(Block\)"):
        call()
    assert [step.name for step in eulernet.steps(model)] == ["0"]
    eulernet.patch(model, 0.5, example_inputs=X, exclude="1")
    assert [step.name for step in eulernet.steps(model)] == ["0"]


def test_a_file_that_is_gone_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, path = written(tmp_path, monkeypatch)
    path.unlink()
    model = nn.Sequential(Block(), module.Block())
    refused(model, lambda: eulernet.patch(model, 0.1, example_inputs=X, include="1"), path.name, r"(?i)source")


@pytest.mark.parametrize(
    "edit",
    [
        lambda text: text.replace("x + self.a(x)", "self.a(x) + x"),
        lambda text: text.replace("x + self.a(x)", "2 * x + self.a(x)"),
        lambda text: "\n\n" + text,
        lambda text: text.replace("return x", "return (x"),
        lambda text: "",
    ],
    ids=["operands", "constant", "shifted", "syntax-error", "empty"],
)
def test_a_file_that_changed_since_import_is_named(
    edit: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, path = written(tmp_path, monkeypatch)
    path.write_text(edit(MODULE))
    model = nn.Sequential(Block(), module.Block())
    output = model(X)
    call = functools.partial(eulernet.patch, model, 0.1, example_inputs=X)
    refused(model, lambda: call(include="1"), path.name, r"(?i)changed|edited|differs", "import")
    assert torch.equal(model(X), output)
    with pytest.warns(eulernet.EulernetWarning, match=r"not scaled: 1 \(Block\)"):
        call()


class Asserting(nn.Module):
    """Pytest rewrites the assertion below, so that what runs is not what the file says."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[-1] == 6
        return x + self.a(x)


def test_a_forward_that_pytest_rewrote_is_refused() -> None:
    model = Asserting()
    refused(model, lambda: eulernet.patch(model, 0.1, example_inputs=X), "Asserting", "(?i)pytest", "assert")


def test_a_file_with_an_edit_elsewhere_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What counts is the function that runs."""
    module, path = written(tmp_path, monkeypatch)
    path.write_text(MODULE + "\n\ndef later():\n    return 1\n")
    block = module.Block()
    eulernet.patch(block, 0.5, example_inputs=X)
    torch.testing.assert_close(block(X), X + 0.5 * block.a(X))


def test_code_without_column_information_is_refused(tmp_path: Path) -> None:
    (tmp_path / "module_without_columns.py").write_text(MODULE)
    script = textwrap.dedent(
        """
        import torch, eulernet
        from module_without_columns import Block
        block = Block()
        try:
            eulernet.patch(block, 0.1, example_inputs=torch.zeros(2, 6))
        except eulernet.EulernetError as error:
            assert type(block) is Block and not eulernet.is_patched(block)
            print(error)
        """
    )
    result = subprocess.run(
        [sys.executable, "-B", "-X", "no_debug_ranges", "-c", script],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), ROOT])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert re.search("(?i)column", result.stdout)
    assert "PYTHONNODEBUGRANGES" in result.stdout or "no_debug_ranges" in result.stdout
