"""What is said of records: every clause of the paper has its row, and what speaks against a small h is said as well."""

import math
import re
from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest

from reproductions import report
from reproductions.cli import RESULTS
from reproductions.evidence.claims import (
    Results,
    Row,
    compare,
    compare_drops,
    compare_failures,
    compare_unpaired,
    fails_often,
)
from reproductions.evidence.statistics import Estimate, holm, share_interval
from reproductions.records import FILE, Record, read_records
from reproductions.studies import STUDIES
from reproductions.trial import Trial

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


# ---- rules
ONE, OTHER = Trial(depth=8, train=72, h=1.0), Trial(depth=8, train=72, h=0.1)


def records_of(cell: Trial, results: list[dict[str, Any]]) -> list[Record]:
    return [
        {"key": replace(cell, seed=seed).key, "result": {"failed": False, **result}}
        for seed, result in enumerate(results)
    ]


def accuracies(cell: Trial, values: list[float], failed: bool = False) -> list[Record]:
    return records_of(cell, [{"test_accuracy": value, "failed": failed} for value in values])


def test_failed_trainings_are_counted_and_an_arm_at_chance_is_not_judged() -> None:
    results = Results([*accuracies(ONE, [0.1, 0.11, 0.1], failed=True), *accuracies(OTHER, [0.5, 0.51, 0.52])])
    row = compare(results, "claim", [(ONE, OTHER)], "test_accuracy")
    assert row.verdict == "at chance" and row.p is None and "3 of 3 and 0 of 3 trainings failed" in row.outcome
    assert compare_unpaired(results, "claim", ONE, OTHER, "test_accuracy").verdict == "at chance"
    assert compare_failures(results, "claim", [(ONE, OTHER)]).verdict == "undecided"  # p = 0.1


def test_one_failed_training_of_three_is_counted_and_hinders_no_verdict() -> None:
    plain = accuracies(ONE, [0.3, 0.31, 0.1])
    plain[2]["result"]["failed"] = True
    row = compare(Results([*plain, *accuracies(OTHER, [0.5, 0.51, 0.31])]), "claim", [(ONE, OTHER)], "test_accuracy")
    assert row.verdict == "supported" and "1 of 3 and 0 of 3 trainings failed" in row.outcome


def test_two_seeds_decide_nothing() -> None:
    for seeds, word in ((2, "undecided"), (3, "supported")):
        plain, small = ([value + seed / 1000 for seed in range(seeds)] for value in (0.3, 0.5))
        results = Results([*accuracies(ONE, plain), *accuracies(OTHER, small)])
        row = compare(results, "claim", [(ONE, OTHER)], "test_accuracy")
        assert row.verdict == word and "+0.200 (+0.200 to +0.200)" in row.outcome
        assert compare_unpaired(results, "claim", ONE, OTHER, "test_accuracy").verdict == word


def test_gradients_of_an_arm_at_chance_are_judged() -> None:
    plain = records_of(ONE, [{"failed": True, "log": {"layer 7": {"late_gradient": g}}} for g in (1.0, 1.1, 1.2)])
    small = records_of(OTHER, [{"log": {"layer 7": {"late_gradient": g}}} for g in (2.0, 2.1, 2.3)])
    row = compare(Results([*plain, *small]), "c", [(ONE, OTHER)], "log/layer 7/late_gradient", higher=False)
    assert row.verdict == "refuted"


def test_the_papers_own_statistic_stands_beside_ours() -> None:
    both = [
        records_of(cell, [{"test_accuracy": v - 0.1, "best_test_accuracy": v} for v in values])
        for cell, values in ((ONE, (0.2, 0.3, 0.4)), (OTHER, (0.5, 0.5, 0.5)))
    ]
    row = compare(Results([*both[0], *both[1]]), "claim", [(ONE, OTHER)], "test_accuracy")
    assert "best epochs as in the paper (median ± standard deviation) 0.3 ± 0.1 -> 0.5 ± 0" in row.outcome


def test_a_claim_on_noise_is_the_difference_of_drops() -> None:
    """The second is better by 0.2 with noise and without: noise costs it as much."""
    noisy = (replace(ONE, noise="gaussian", level=0.1), replace(OTHER, noise="gaussian", level=0.1))
    clean, rough = [0.5, 0.52, 0.51], [0.4, 0.43, 0.40]
    records = [*accuracies(ONE, clean), *accuracies(OTHER, [v + 0.2 for v in clean])]
    records += [*accuracies(noisy[0], rough), *accuracies(noisy[1], [v + 0.2 for v in rough])]
    results = Results(records)
    assert compare(results, "better", [noisy], "test_accuracy").verdict == "supported"
    row = compare_drops(results, "loses less", [(ONE, OTHER)], [noisy], "test_accuracy")
    assert row.verdict == "undecided" and re.search(r"drops 0.1 -> 0.1, .*; [+-]0.000 \([+-]0.000", row.outcome)
    better = Results([*records, *accuracies(noisy[1], clean)])  # it loses 0.2, the first 0.1
    assert compare_drops(better, "loses less", [(ONE, OTHER)], [noisy], "test_accuracy").verdict == "refuted"


@pytest.mark.parametrize(
    ("gaps", "rule", "word"),
    [
        ((0.0, 0.0, 0.0), {"margin": 0.01}, "supported"),
        ((0.0, 0.0, 0.0), {"margin": 0.01, "same": True}, "supported"),
        ((0.0, 0.0, 0.0), {}, "undecided"),
        ((-0.0056, -0.0051, -0.0058), {"margin": 0.01}, "supported"),  # a little worse, and surely within the margin
        ((-0.02, -0.021, -0.022), {"margin": 0.01}, "refuted"),
        ((-0.02, -0.021, -0.022), {"margin": 0.01, "same": True}, "refuted"),
        ((0.02, 0.021, 0.022), {"margin": 0.01, "same": True}, "refuted"),
        ((-0.0105, -0.0005, -0.005), {"margin": 0.01}, "undecided"),
        ((0.5,), {"margin": 0.01}, "undecided"),
    ],
)
def test_what_is_to_cost_little_is_judged_by_its_margin(gaps: tuple[float, ...], rule: Any, word: str) -> None:
    results = Results([*accuracies(ONE, [0.5] * len(gaps)), *accuracies(OTHER, [0.5 + gap for gap in gaps])])
    row = compare(results, "claim", [(ONE, OTHER)], "test_accuracy", **rule)
    assert row.verdict == word
    assert row.p is None or (row.p < 0.05) == (word in ("supported", "refuted"))


def test_networks_of_different_depths_are_not_paired_by_seed() -> None:
    few, many = [0.1, 0.2, 0.3, 0.4], [0.2, 0.3, 0.4, 0.5]
    rows = []
    for order in (many, many[::-1]):
        results = Results([*accuracies(ONE, few), *accuracies(replace(ONE, depth=14), order)])
        rows.append(compare_unpaired(results, "claim", ONE, replace(ONE, depth=14), "test_accuracy"))
    assert rows[0] == rows[1] and rows[0].verdict == "undecided"
    found = Estimate.of_difference(few, many)  # equal variances and numbers: Student's t with 6 degrees of freedom
    assert found.freedom == pytest.approx(6) and found.high - found.mean == pytest.approx(2.44691 * found.error)
    assert found.error == pytest.approx(math.sqrt(2 * (0.05 / 3) / 4))


def test_shares_have_the_interval_of_clopper_and_pearson() -> None:
    assert share_interval(10, 10) == pytest.approx((0.025 ** (1 / 10), 1.0))
    assert share_interval(0, 5) == pytest.approx((0.0, 1 - 0.025 ** (1 / 5)))
    row = fails_often("claim", "run", {5.0: (3, 5), 10.0: (0, 5)}, 0.2)
    assert row.verdict == "undecided" and "30% (7% to 65%)" in row.outcome  # of 10: 0.0667 to 0.6525 in the tables
    assert fails_often("claim", "run", {5.0: (10, 10)}, 0.2).verdict == "supported"


def test_holm_rejects_what_the_closed_tests_by_bonferroni_reject() -> None:
    ps = [0.001, 0.012, 0.02, 0.04, 0.3]

    def closed(index: int) -> float:
        others = [i for i in range(len(ps)) if i != index]
        sets = [[index, *some] for n in range(len(ps)) for some in combinations(others, n)]
        return min(1.0, max(len(some) * min(ps[i] for i in some) for some in sets))

    assert holm(ps) == pytest.approx([closed(index) for index in range(len(ps))])


# ---- the report
def test_theorems_are_checked_not_supported(stored: Results) -> None:
    rows = STUDIES["bounds"].claims(stored, "cpu")
    assert {row.verdict for row in rows if row.claim.startswith(("Eq. 6", "Proposition"))} == {"holds"}
    broken = {**stored.of("bounds")[0], "study": "bounds"}
    broken = {**broken, "result": {**broken["result"], "noise_holds": False, "gains": [9.0], "gain_bounds": [1.0]}}
    rows = STUDIES["bounds"].claims(Results([*stored.of("bounds"), broken]), "cpu")
    words = {row.claim.partition(":")[0]: row.verdict for row in rows}
    assert words["Eq. 6"] == words["Proposition 2"] == "violated" and words["Proposition 1"] == "holds"


def test_a_remedy_is_tried_when_all_its_values_are(stored: Results) -> None:
    rows = {row.claim: row for row in STUDIES["robust"].claims(stored, "cpu")}
    row = rows["h = 0.1 alone tests better than h = 1 with warm-up (best of 4 values)"]
    assert row.verdict == "not run" and row.outcome == "1 of 4 values tried: no trial of it"
    assert rows["h = 0.1 alone tests better than h = 1 with clipping (best of 2 values)"].verdict != "not run"


def test_the_report_begins_with_the_primary_claims_once_each(stored: Results) -> None:
    rows = report.primary(stored)
    asked = [
        row
        for name, study in STUDIES.items()
        if hasattr(study, "claims")
        for preset in report._presets(stored, name)
        for row in study.claims(Results([]), preset)
    ]
    named = {row.primary for row in asked if row.primary}
    assert len(rows) == len({row.claim for row in rows}) == len(named) and 15 <= len(rows) <= 24
    first = (RESULTS / "REPORT.md").read_text().split("## ")[1]
    assert first.startswith("The paper's claims") and all(f"| {row.claim} |" in first for row in rows)


def test_what_was_asked_beforehand_stands_second(stored: Results) -> None:
    rows = report.beforehand(stored, RESULTS)
    assert len(rows) == 12 and all(row.verdict != "not run" for row in rows)
    second = (RESULTS / "REPORT.md").read_text().split("## ")[2]
    assert second.startswith("Asked beforehand") and all(f"| {row.claim} |" in second for row in rows)


def test_primary_verdicts_are_those_that_are_left_after_holm(stored: Results) -> None:
    for row in report.primary(stored):
        if row.p is not None and row.verdict != "not run":
            assert (row.p < 0.05) == (row.verdict in ("supported", "refuted"))


def test_a_comparison_has_one_row() -> None:
    """But for the first two tables, which choose from all: the paper's claims, and what was asked beforehand."""
    below = (RESULTS / "REPORT.md").read_text().split("## ")[3:]
    lines = [line for part in below for line in part.splitlines() if line.startswith("| ") and "claim |" not in line]
    numbers = [re.sub(r"^\| [^|]* ", "", line) for line in lines if " seeds |" in line and " -> " in line]
    assert [line for line in numbers if numbers.count(line) > 1 and "failed; p" not in line] == []
