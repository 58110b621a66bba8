"""The oldest releases that pyproject.toml allows, as constraints for pip: `python tests/oldest.py > FILE`.

Of what eulernet computes with; what only tests it may be new.
"""

import re
import tomllib
from pathlib import Path
from typing import Any

TOOLS = ("bench", "test")


def oldest(project: dict[str, Any]) -> list[str]:
    """`package==version` for each `package>=version` of the project table.

    >>> oldest({"dependencies": ["torch>=2.8,!=2.13.0"], "optional-dependencies": {"hf": ["transformers>=5"]}})
    ['torch==2.8', 'transformers==5']
    """
    extras = [needed for name, needed in project["optional-dependencies"].items() if name not in TOOLS]
    requirements = [requirement for needed in (project["dependencies"], *extras) for requirement in needed]
    bounds = [re.match(r"([\w-]+)>=([\d.]+)", requirement) for requirement in requirements]
    return ["==".join(bound.groups()) for bound in bounds if bound]


if __name__ == "__main__":
    print(*oldest(tomllib.loads(Path("pyproject.toml").read_text())["project"]), sep="\n")
