"""docs/coverage.md: made of the sweep tests that passed, so that it cannot say more than they verified."""

import re
from collections import defaultdict
from importlib.metadata import version
from typing import NamedTuple


class Covered(NamedTuple):
    """What a sweep test records of its model: `record_property("coverage", tuple(Covered(...)))`."""

    library: str  # "timm", "torchvision", "Hugging Face", "elsewhere"
    group: str  # the module of timm, the family of torchvision, the model type of Hugging Face, the package elsewhere
    model: str
    steps: int
    long: int
    unsupported: int
    folded: int


SWEEPS = "tests/test_timm.py tests/test_torchvision.py tests/test_huggingface.py tests/test_elsewhere.py"
COMMAND = f"python -m pytest -n 2 {SWEEPS} --write-coverage docs/coverage.md"
ELSEWHERE = "elsewhere"
PACKAGES = {"timm": "timm", "torchvision": "torchvision", "Hugging Face": "transformers"}

HEAD = f"""# What was found and verified

Written by `{COMMAND}`; a line whose models did not run is left as it was.
A model is listed when its test passed: at random weights, patched at h = 0.3, it equals a reference that scales the
branches at run time; at h = 1 it is bit-identical to the original; after `unpatch` it is what it was; folded, and
patched with `preserve=True`, it computes what it computed. The number of its steps stands behind its name. *Long*
steps are left alone unless `include=` names them; *unsupported* additions are named by `find_steps` and never scaled;
*folded* is the share of the steps whose h the weights can absorb, and so `preserve` can make up for. The others end in
something that is not homogeneous, such as a gate on what it multiplies, and are named.
"""

_HEADS = ("| | models and their steps | long | unsupported | folded |", "| --- | --- | --: | --: | --: |")


def page(rows: list[Covered], before: str = "") -> str:
    """The table as Markdown: one line a group of each library. What no row is about is left as it was before."""
    libraries: dict[str, dict[str, list[Covered]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        libraries[row.library][row.group].append(row)
    parts = {re.split(r": \d", part)[0]: part for part in before.split("\n## ")[1:]}
    text = [HEAD]
    for library in (*PACKAGES, ELSEWHERE):
        if not libraries[library]:
            text += [f"## {parts[library].rstrip()}\n"] if library in parts else []
            continue
        lines = {_group(line): line for line in re.findall(r"^\| [^-|].*$", parts.get(library, ""), re.MULTILINE)}
        lines |= {name: _line(name, group, library) for name, group in libraries[library].items()}
        models = sum(line.split(" | ")[1].count(", ") + 1 for line in lines.values())
        of = f"{len(lines)} packages" if library == ELSEWHERE else f"{PACKAGES[library]} {version(PACKAGES[library])}"
        head = f"## {library}: {models} models ({of})\n"
        text.append("\n".join((head, *_HEADS, *(lines[name] for name in sorted(lines)), "")))
    return "\n".join(text)


def _group(line: str) -> str:
    """The group's name without the version that elsewhere stands behind it."""
    return re.sub(r" [\d.]+$", "", line.removeprefix("| ").split(" | ")[0])


def _line(name: str, group: list[Covered], library: str) -> str:
    models = ", ".join(f"{row.model} {row.steps}" if row.model != name else str(row.steps) for row in group)
    columns = zip(*((r.long, r.unsupported, r.folded, r.steps) for r in group), strict=True)
    long, unsupported, folded, steps = map(sum, columns)
    title = f"{name} {version(name)}" if library == ELSEWHERE and name != "VDCNN" else name  # which is no package
    return f"| {title} | {models} | {long} | {unsupported} | {folded / steps:.0%} |"
