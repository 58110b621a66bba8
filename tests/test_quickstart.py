"""The notebook runs from top to bottom, shows what it says, and is stored with what it showed."""

import re
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("sklearn")

NOTEBOOK = Path(__file__).parent.parent / "examples" / "quickstart.ipynb"


def printed(notebook: Any) -> str:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")


def pictures(notebook: Any) -> int:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return sum("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Jupyter's own packages
def test_the_notebook_runs_and_a_small_h_trains_where_h_1_fails(tmp_path: Path) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    text = printed(notebook)
    assert pictures(notebook) == 1
    assert "patched: False" in text
    largest = re.search(r"largest difference: (\S+)", text)
    assert largest is not None and float(largest[1]) < 1e-4
    plain, patched = re.search(r"^ +0\.1 +(\S+) +(\S+)$", text, re.MULTILINE).groups()  # type: ignore[union-attr]
    assert float(plain) < 0.3 and float(patched) > 0.8
    assert not list(tmp_path.iterdir())


def test_the_stored_notebook_shows_its_outputs_and_no_error() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert pictures(notebook) == 1 and "patched: False" in printed(notebook)
    assert all(output.output_type != "error" for cell in code for output in cell.outputs)
