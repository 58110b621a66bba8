"""What mkdocs does for this site: the README is its first page, links to the repository become links to pages."""

import re
from pathlib import Path
from typing import Any

import griffe

ROOT = Path(__file__).parent.parent
STUDIES = ROOT / "reproductions"
PAGE = re.compile(r"https://github\.com/eulernet/eulernet/blob/main/(?:docs|reproductions)/([\w/-]+\.md)")
PICTURES = "https://raw.githubusercontent.com/eulernet/eulernet/main/reproductions/"


def on_files(files: Any, config: Any) -> Any:
    """The report of the studies and their figures are part of the site, where they are in the repository."""
    from mkdocs.structure.files import File

    for path in sorted([*STUDIES.glob("results/**/*.png"), STUDIES / "results" / "REPORT.md", STUDIES / "campaign.md"]):
        files.append(File.generated(config, path.relative_to(STUDIES).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """The first page is the README; links become relative, so that `mkdocs build --strict` checks them."""
    if page.file.src_uri == "index.md":
        markdown = (ROOT / "README.md").read_text()
    return PAGE.sub(r"\1", markdown).replace(PICTURES, "")


class Examples(griffe.Extension):
    """The docstrings say `Example:`, as napoleon has it; griffe knows `Examples:` only."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            obj.docstring.value = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")
