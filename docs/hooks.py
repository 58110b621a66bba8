"""What mkdocs does for this site: READMEs are pages of it, and links to the repository become links to pages."""

import re
from pathlib import Path
from typing import Any

import griffe

ROOT = Path(__file__).parent.parent
STUDIES = ROOT / "reproductions"
READMES = {"index.md": ROOT / "README.md", "reproductions.md": STUDIES / "README.md"}
PAGE = re.compile(r"https://github\.com/eulernet/eulernet/blob/main/(?:docs|reproductions)/([\w/-]+\.md)")
PICTURES = re.compile(r"https://raw\.githubusercontent\.com/eulernet/eulernet/main/(?:docs|reproductions)/")


def on_files(files: Any, config: Any) -> Any:
    """The report of the studies, their figures and records are part of the site, placed as in the repository."""
    from mkdocs.structure.files import File

    results = [path for path in STUDIES.glob("results/**/*") if path.suffix in (".md", ".png", ".jsonl")]
    for path in sorted([*results, STUDIES / "campaign.md"]):
        files.append(File.generated(config, path.relative_to(STUDIES).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Two pages are READMEs; links become relative, so that `mkdocs build --strict` checks them."""
    if page.file.src_uri in READMES:
        markdown = READMES[page.file.src_uri].read_text()
    return PICTURES.sub("", PAGE.sub(r"\1", markdown))


class Examples(griffe.Extension):
    """The docstrings say `Example:`, as napoleon has it; griffe knows `Examples:` only."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            obj.docstring.value = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")
