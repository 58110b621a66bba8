"""What the README and the docstrings show is run."""

import doctest
import importlib
import inspect
import pkgutil
import re
import typing
from pathlib import Path

import pytest
from typer.testing import CliRunner

import benchmarks.timing
import eulernet
from eulernet.cli import app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
MODULES = [m.name for m in pkgutil.walk_packages(eulernet.__path__, "eulernet.")]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def test_readme_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks run one after another, as a reader would paste them, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    assert blocks("python")
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), names)


@pytest.mark.parametrize("command", re.findall(r"^eulernet (inspect [^#\n]*)", "\n".join(blocks("bash")), re.MULTILINE))
def test_readme_command_line(command: str) -> None:
    result = CliRunner().invoke(app, command.split())
    assert result.exit_code == 0, result.output


def test_the_test_command_is_that_of_ci() -> None:
    command = "python -m pytest -n 2\n"
    assert command in "\n".join(blocks("bash"))
    assert f"check {command}" in (ROOT / ".ci" / "run").read_text()


def test_files_that_the_readme_names_are_there() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)|src=\"(?!https?:)([^\"]+)\"", README)
    assert links
    for link in links:
        assert (ROOT / "".join(link)).exists(), link


@pytest.mark.parametrize("name", [*MODULES, benchmarks.timing.__name__])
def test_docstrings(name: str) -> None:
    failed, _ = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert failed == 0


ALIASES = {name for name in eulernet.__all__ if typing.get_origin(getattr(eulernet, name)) is not None}


@pytest.mark.parametrize("name", sorted(set(eulernet.__all__) - ALIASES - {"__version__"}))
def test_public_names_have_a_running_example(name: str) -> None:
    thing = getattr(eulernet, name)
    doc = inspect.getdoc(thing)
    assert doc, f"eulernet.{name} has no docstring"
    if inspect.isfunction(thing):
        assert ">>>" in doc, f"the docstring of eulernet.{name} shows no example"
