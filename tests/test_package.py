"""What is built can be installed: all of the library is in it, and nothing else is imported with it."""

import os
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

pytest.importorskip("build")
pytest.importorskip("hatchling")

ROOT = Path(__file__).parent.parent
LIBRARY = ROOT / "eulernet"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that is built from the sdist."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return folder


def test_the_wheel_holds_the_library_and_nothing_else(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        (metadata,) = (archive.read(name).decode() for name in archive.namelist() if name.endswith("METADATA"))
    sources = {p.relative_to(ROOT).as_posix() for p in LIBRARY.rglob("*") if p.suffix == ".py" or p.name == "py.typed"}
    assert names == sources
    fields = Parser().parsestr(metadata)
    assert fields["Requires-Python"] == ">=3.11" and fields["License-Expression"] == "Apache-2.0"
    assert "Repository, https://github.com/eulernet/eulernet" in fields.get_all("Project-URL", [])
    assert fields.get_payload() == (ROOT / "README.md").read_text()


def test_the_sdist_holds_what_its_tests_need(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = (
        "README.md LICENSE CITATION.cff mkdocs.yml tests/test_docs.py reproductions/cli.py benchmarks/gpu/__main__.py"
    )
    assert set(needed.split()) <= names


def test_what_was_installed_inspects_a_model(built: Path, tmp_path: Path) -> None:
    (wheel,) = built.glob("*.whl")
    site = tmp_path / "site"
    install = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site), str(wheel)]
    subprocess.run([sys.executable, *install], check=True)
    (tmp_path / "net.py").write_text(
        "from torch import nn\n\n\nclass Block(nn.Linear):\n    def forward(self, x):\n"
        "        return x + super().forward(x)\n\n\ndef build():\n    return nn.Sequential(Block(4, 4), Block(4, 4))\n"
    )
    result = subprocess.run(
        [site / "bin" / "eulernet", "inspect", "net:build", "--input", "2,4"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "Sequential" in result.stdout and "2 residual steps" in result.stdout and "net.py:6" in result.stdout
    assert not (site / "reproductions").exists()
