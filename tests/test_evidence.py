"""What is said of records: every clause of the paper has its row, and what speaks against a small h is said as well."""

import re

import pytest

from reproductions.cli import RESULTS
from reproductions.evidence.claims import Results, Row
from reproductions.records import FILE, read_records
from reproductions.studies import STUDIES

CLAUSES = {  # of the paper's text, by the study that asks for them
    "euler": ["smaller step factor approximates", "unstable"],
    "dynamics": ["do not explode", "plateau", "late .* are smaller", "less bumpy", "averaged weight norm", "move less"],
    "depth": ["tests better", "h = 1 accuracy degrades", "h = 0.1 accuracy increases", "varies less"],
    "two-moon": ["Noise is amplified less", "features move less", "weights are smaller", "classifies .* better"],
    "noise": ["at level .* tests better on clean data", "varies less"],
    "select": [
        "best h lies within", "up to 0.1. accuracy varies less", "fail often", "h = 0.001 tests worse",
        "h = 0.01 tests worse", "h = 2 is tolerated", "deeper network wants a smaller h",
    ],
    "robust": ["At learning rate 1, with BN", "Under Adam", "without BN, h = 0.1", "falls without BN", "goes with"],
    "bounds": ["Eq. 6", "Proposition 1", "Proposition 2", "grows more over depth", "amplified more over depth"],
}  # fmt: skip


@pytest.fixture(scope="module")
def stored() -> Results:
    return Results(record for path in sorted(RESULTS.rglob(FILE)) for record in read_records(path.parent))


@pytest.mark.parametrize("name", CLAUSES)
def test_every_clause_of_the_paper_has_a_row(name: str, stored: Results) -> None:
    said = [row.claim for row in STUDIES[name].claims(stored, "cpu")]
    assert [clause for clause in CLAUSES[name] if not any(re.search(clause, claim) for claim in said)] == []


def row_of(rows: list[Row], claim: str) -> Row:
    (row,) = [row for row in rows if row.claim == claim]
    return row


def test_late_gradients_of_a_deep_layer_are_larger_with_a_small_h(stored: Results) -> None:
    claim = "resnet 110: with h = 0.1 late gradients in deep layers are smaller (layer 109)"
    row = row_of(STUDIES["dynamics"].claims(stored, "cpu"), claim)
    assert row.verdict == "refuted" and "0.0526 -> 0.097; +0.04 (+0.0297 to +0.0504)" in row.outcome
