"""docs/coverage.md: made of the sweep tests that passed, so that it cannot say more than they verified."""

from collections import defaultdict
from importlib.metadata import version
from typing import NamedTuple


class Covered(NamedTuple):
    """What a sweep test records of its model: `record_property("coverage", tuple(Covered(...)))`."""

    library: str  # "timm", "torchvision", "Hugging Face"
    group: str  # the module of timm, the family of torchvision, the model type of Hugging Face
    model: str
    steps: int
    long: int
    unsupported: int
    folded: int


SWEEPS = "tests/test_timm.py tests/test_torchvision.py tests/test_huggingface.py"
COMMAND = f"python -m pytest -n 2 {SWEEPS} --write-coverage docs/coverage.md"
PACKAGES = {"timm": "timm", "torchvision": "torchvision", "Hugging Face": "transformers"}

HEAD = f"""# What was found and verified

Written by `{COMMAND}`.
A model is listed when its test passed: at random weights, patched at h = 0.3, it equals a reference that scales the
branches at run time; at h = 1 it is bit-identical to the original; after `unpatch` it is what it was; folded, and
patched with `preserve=True`, it computes what it computed. The number of its steps stands behind its name. *Long*
steps are left alone unless `include=` names them; *unsupported* additions are named by `find_steps` and never scaled;
*folded* is the share of the steps whose h the weights can absorb, and so `preserve` can make up for. The others end in
something that is not homogeneous, such as a gate on what it multiplies, and are named.
"""


def page(rows: list[Covered]) -> str:
    """The table as Markdown: one line a group of each library."""
    libraries: dict[str, dict[str, list[Covered]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        libraries[row.library][row.group].append(row)
    lines = [HEAD]
    for library, package in PACKAGES.items():
        groups = libraries[library]
        lines += [
            f"## {library}: {sum(map(len, groups.values()))} models ({package} {version(package)})\n",
            "| | models and their steps | long | unsupported | folded |",
            "| --- | --- | --: | --: | --: |",
        ]
        for name, group in groups.items():
            models = ", ".join(f"{row.model} {row.steps}" if row.model != name else str(row.steps) for row in group)
            long, unsupported, folded, steps = (
                sum(column) for column in zip(*((r.long, r.unsupported, r.folded, r.steps) for r in group), strict=True)
            )
            lines.append(f"| {name} | {models} | {long} | {unsupported} | {folded / steps:.0%} |")
        lines.append("")
    return "\n".join(lines)
