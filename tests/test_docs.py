"""What the README, the pages and the docstrings show is run, and what they name is there."""

import doctest
import importlib
import inspect
import pkgutil
import re
import typing
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import benchmarks.timing
import eulernet
from eulernet.cli import app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = {path.name: path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
TEXTS = {**PAGES, **{name: (ROOT / name).read_text() for name in ("CONTRIBUTING.md", "SECURITY.md")}}
MODULES = [m.name for m in pkgutil.walk_packages(eulernet.__path__, "eulernet.")]
URL = "https://github.com/eulernet/eulernet"
IN_REPOSITORY = re.compile(
    r"https://(?:raw\.githubusercontent\.com/eulernet/eulernet/|github\.com/eulernet/eulernet/(?:blob|tree)/)main/"
    r"([^)#\s\"]+)"
)


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", [name for name, text in PAGES.items() if blocks("python", text)])
def test_the_python_of_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks run one after another, as a reader would paste them, in an empty folder."""
    source = tmp_path / f"{page}.py"  # a class that is shown needs a source
    source.write_text("\n".join(blocks("python", PAGES[page])))
    monkeypatch.chdir(tmp_path)
    exec(compile(source.read_text(), str(source), "exec"), {})


def test_the_readme_shows_what_is_printed() -> None:
    """All but the line numbers, which are those of the timm that is installed."""
    (shown,) = blocks("text")
    model = eulernet.patch(pytest.importorskip("timm").create_model("resnet18"), h=0.1)
    lines = re.compile(r"(?<=\.py:)\d+")
    assert lines.sub("", shown.rstrip()) == lines.sub("", str(eulernet.steps(model)))


def test_the_readme_is_short_and_its_links_work_everywhere() -> None:
    assert len(README.splitlines()) <= 300
    assert re.findall(r"\]\((?!https://)[^)]*\)", README) == []


@pytest.mark.parametrize("command", re.findall(r"^eulernet (inspect [^#\n]*)", "\n".join(blocks("bash")), re.MULTILINE))
def test_the_command_lines_of_the_readme_run(command: str) -> None:
    result = CliRunner().invoke(app, command.split())
    assert result.exit_code == 0, result.output


def test_the_test_command_is_that_of_ci() -> None:
    command = "python -m pytest -n 2\n"
    assert command in "\n".join(blocks("bash"))
    assert f"check {command}" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("page", TEXTS)
def test_what_a_page_links_to_is_there(page: str) -> None:
    for name in IN_REPOSITORY.findall(TEXTS[page]):
        assert (ROOT / name).exists(), name
    for other in re.findall(r"https://github\.com/eulernet[^)\s\"]*", TEXTS[page]):
        assert other.startswith(URL), other


def test_the_reference_has_every_public_name() -> None:
    shown = set(re.findall(r"^::: eulernet\.(\w+)$", PAGES["reference.md"], re.MULTILINE))
    assert {*eulernet.__all__} - {"__version__"} <= shown


def test_how_it_works_names_each_file_of_the_library() -> None:
    named = set(re.findall(r"`(eulernet/[\w/.]+)`", PAGES["how-it-works.md"]))
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "eulernet").rglob("*.py")}
    kernels = {name for name in files if name.startswith("eulernet/kernels/")}
    packages = {name for name in files if name.endswith("__init__.py")}
    assert named - {"eulernet/", "eulernet/kernels/"} == files - kernels - packages


def test_how_it_works_says_what_happens_to_its_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's block is found at the page's place, shares one class, is rewritten as shown, and its map takes h."""
    page = PAGES["how-it-works.md"]
    source, rewritten = re.findall(r"^```python title[^\n]*\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    (tmp_path / "net.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    net = importlib.import_module("net")

    x = torch.zeros(2, 16)
    model = eulernet.patch(torch.nn.Sequential(*(net.Block() for _ in range(4))), h=0.1, example_inputs=x)
    ((line, column, end),) = re.findall(r"line (\d+), columns (\d+) to (\d+)", page)
    assert {(s.kind, s.depth) for s in eulernet.steps(model)} == {("identity", 4)}
    places = {(place.line, place.column, place.end_column) for s in eulernet.steps(model) for place in s.places}
    assert places == {(int(line), int(column), int(end))}
    assert len({type(block) for block in model}) == 1 and type(model[0]) is not net.Block

    # The function that runs is the one that the page shows: compiled on its own, it has the same instructions.
    shown: dict[str, Any] = {}
    exec(f"class Block:\n{rewritten}", shown)
    assert type(model[0]).forward.__code__.co_code == shown["Block"].forward.__code__.co_code
    assert type(model[0]).forward.__code__.co_names == shown["Block"].forward.__code__.co_names
    before = {name: value.clone() for name, value in model[0].named_parameters()}
    eulernet.fold(model, example_inputs=x)
    changed = {name for name, value in model[0].named_parameters() if not torch.equal(value, before[name])}
    assert changed == {"body.2.weight", "body.2.bias"} and type(model[0]) is net.Block


def test_the_versions_agree() -> None:
    assert f"\nversion: {eulernet.__version__}\n" in (ROOT / "CITATION.cff").read_text()


@pytest.mark.parametrize("name", [*MODULES, benchmarks.timing.__name__])
def test_each_example_of_a_docstring_runs(name: str) -> None:
    if name.startswith("eulernet.integrations."):
        pytest.importorskip(
            {"huggingface": "transformers", "lightning": "lightning"}.get(name.rpartition(".")[2], "torch")
        )
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
