"""docs/support.md: each of its lines is run here, and the page is what these tests say."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.support import ROWS
from tests.support.base import FOOT, Row, page, run

PAGE = Path(__file__).parent.parent / "docs" / "support.md"


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    """What tools leave behind: a process group, compiled graphs."""
    yield
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
    torch._dynamo.reset()


@pytest.mark.tools
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("row", ROWS, ids=[f"{row.tool}-{number}" for number, row in enumerate(ROWS)])
def test_what_the_page_says_of_a_tool(
    row: Row, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property: Callable[[str, object], None]
) -> None:
    monkeypatch.chdir(tmp_path)
    run(row, tmp_path)
    record_property("support", ROWS.index(row))


def test_the_page_is_what_the_tests_say() -> None:
    text = PAGE.read_text()
    assert text.partition(FOOT)[0].rstrip() == page(ROWS).rstrip()


def test_a_row_that_did_not_pass_is_not_on_the_page() -> None:
    assert page(ROWS[1:]) != page(ROWS) and ROWS[-1].line in page(ROWS)
