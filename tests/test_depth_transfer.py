"""The study of depth transfer: its cells, one training beside a hand-written one, the pool, what is said of records."""

import csv
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import eulernet
from reproductions.data.pieces import Bytes, pieces
from reproductions.evidence.claims import HOLDS, NOT_RUN, REFUTED, SUPPORTED, UNDECIDED, VIOLATED, Results
from reproductions.records import read_records
from reproductions.studies import depth_transfer as study
from reproductions.training import depth_cells, pool
from reproductions.training.depth_cells import Cell, build, make_optimizer, train

WORDS = "the quick brown fox jumps over the lazy dog while seven wizards mix bright potions ".split()


@pytest.fixture(scope="module")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> str:
    """AG-NEWS of made-up texts, with as many test rows as the loader asks for."""
    root = tmp_path_factory.mktemp("data")
    for name, rows in (("train", 300), ("test", 7600)):
        with (root / f"{name}.csv").open("w", newline="") as file:
            writer = csv.writer(file, quoting=csv.QUOTE_ALL)
            for i in range(rows):
                text = " ".join(WORDS[(i * k + k) % len(WORDS)] for k in range(1, 9))
                writer.writerow([i % 4 + 1, f"{name} {i}", text])
    pieces.cache_clear()
    return str(root)


# ------------------------------------------------------------------------------------------------------------ the cells


def test_at_the_base_the_arms_of_h_are_one_training() -> None:
    keys = {study.cell(arm, 4, 1e-3).key for arm in ("h = 1", "4/D", "Depth-muP", "2/sqrt(D)")}
    assert len(keys) == 1
    assert len(keys | {study.cell(arm, 4, 1e-3).key for arm in ("zero", "gpt2")}) == 3


@pytest.mark.parametrize(
    ("arm", "setting", "h", "rate", "epsilon"),
    [
        ("h = 1", "adamw", 1, 1, 1),
        ("4/D", "adamw", 1 / 16, 1, 1 / 16),
        ("Depth-muP", "adamw", 1 / 4, 1 / 4, 1 / 4),
        ("2/sqrt(D)", "adamw", 1 / 4, 1, 1),
        ("4/D", "sgd", 1 / 16, 16, 1),
        ("Depth-muP", "sgd", 1 / 4, 1, 1),
    ],
)
def test_the_arms_are_what_the_sources_say(arm: str, setting: str, h: float, rate: float, epsilon: float) -> None:
    cell = study.cell(arm, 64, 1e-3, setting)
    assert (cell.h, cell.hidden_rate, cell.hidden_epsilon) == (h, rate, epsilon)


@pytest.mark.parametrize(("arm", "setting"), [("4/D", "adamw"), ("Depth-muP", "adamw"), ("4/D", "sgd")])
def test_the_optimiser_of_a_cell_is_that_of_param_groups(arm: str, setting: str) -> None:
    """The study ran before the groups were written: they are to say the same."""
    cell = study.cell(arm, 8, 0.02, setting)
    network, rule = build(cell), eulernet.schedules.transfer(8, 1.0 if arm == "4/D" else 0.5)
    groups = eulernet.param_groups(network, 0.02, transfer=rule, optimizer=cell.optimizer)

    def by_parameter(some: Any) -> dict[Any, tuple[float, ...]]:
        of = lambda g: (g["lr"],) if setting == "sgd" else (g["lr"], g["eps"])  # noqa: E731
        return {parameter: of(group) for group in some for parameter in group["params"]}

    ours, theirs = by_parameter(make_optimizer(cell, network).param_groups), by_parameter(groups)
    assert ours.keys() == theirs.keys() == set(network.parameters())
    for parameter, values in ours.items():
        assert values == pytest.approx(theirs[parameter], rel=1e-12)


@pytest.mark.parametrize(
    ("projections", "expected"), [("plain", 0.125), ("zero", 0.0), ("gpt2", 0.125 / math.sqrt(12))]
)
def test_projections_start_as_the_arm_says(projections: Any, expected: float) -> None:
    for model, name in (("gpt", "transformer.h.3.mlp.c_proj.weight"), ("vit", "blocks.3.mlp.fc2.weight")):
        network = build(Cell(model=model, depth=6, projections=projections))  # type: ignore[arg-type]
        assert dict(network.named_parameters())[name].std().item() == pytest.approx(expected, rel=0.03)


def test_the_plan_begins_with_the_primary_cells_and_repeats_none() -> None:
    cells = study.cells("desk")
    assert len({cell.key for cell in cells}) == len(cells)
    primary = [c for c in cells[: cells.index(next(c for c in cells if c.depth == 16))]]
    assert {c.depth for c in primary} == {4, 64} and {c.seed for c in primary} == {0, 1, 2}


def test_the_plan_for_a_gpu_is_wider_and_has_the_whole_grid_at_the_base() -> None:
    cells = study.cells("gpu")
    assert len({cell.key for cell in cells}) == len(cells) and {cell.seed for cell in cells} == {0, 1, 2}
    assert {(cell.width, cell.initial, cell.precision) for cell in cells} == {(256, 1 / 16, "tf32")}
    assert {cell.learning_rate for cell in cells if cell.depth == 4} == set(study.GRIDS["wide"])
    assert {cell.learning_rate for cell in cells if cell.depth == 64} == set(study.GRIDS["wide"][1:5])
    assert not {cell.key for cell in cells} & {cell.key for cell in study.cells("desk")}


def test_a_stored_record_is_of_the_cell_that_it_names() -> None:
    records = read_records(Path("reproductions/results/transfer"))
    assert [record["key"] for record in records] == [Cell(**record["config"]).key for record in records]


# ------------------------------------------------------------------------------------------------------- one training


@pytest.mark.parametrize("changed", [{}, {"width": 32, "texts": 5, "context": 24, "precision": "tf32"}])
def test_a_training_is_the_hand_written_one(data_root: str, changed: dict[str, Any]) -> None:
    """Unpatched, with h in the output projections: the same function, so the same loss before the first update."""
    cell = Cell(depth=3, h=0.25, iterations=1, **changed)
    record = train(cell, data_root)
    assert record is not None
    torch.manual_seed(0)
    network = depth_cells.plain(cell)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.mul_(0.25 if "c_proj" in name else 1.0)
    inputs, labels = Bytes(data_root, cell.texts, cell.context).batch(torch.Generator().manual_seed(1000))
    assert inputs.shape == labels.shape == (cell.texts, cell.context)
    loss = nn.functional.cross_entropy(network(inputs).logits.transpose(1, 2), labels)
    assert record["result"]["curve"] == pytest.approx([loss.item()], rel=1e-5)


def test_a_training_learns_and_one_that_diverges_has_failed(data_root: str) -> None:
    good = train(Cell(depth=2, iterations=40), data_root)
    bad = train(Cell(depth=2, iterations=40, optimizer="sgd", learning_rate=1e4), data_root)
    assert good is not None and bad is not None
    assert good["result"]["curve"][-1] < good["result"]["curve"][0] - 1
    assert good["result"]["test_loss"] < good["result"]["chance"] and not good["result"]["failed"]
    assert bad["result"]["failed"] and bad["result"]["iterations"] < 40


def test_the_loss_of_frequencies_is_that_of_a_network_that_looks_at_nothing(data_root: str) -> None:
    found = Bytes(data_root)
    counts = torch.bincount(found.train.long(), minlength=256).double() + 1
    logits = counts.log().expand(len(found.test), 256)
    assert found.chance == pytest.approx(nn.functional.cross_entropy(logits, found.test.long()).item(), rel=1e-9)


def test_the_pool_goes_on_from_its_records_and_begins_nothing_late(data_root: str, tmp_path: Path) -> None:
    cells = [Cell(depth=1, iterations=2, seed=seed) for seed in range(3)]
    assert pool.run(cells, tmp_path, Path(data_root), workers=1, minutes=-1.0) == []
    first = pool.run(cells[:2], tmp_path, Path(data_root), workers=2)
    seen: list[float] = []
    records = pool.run(cells, tmp_path, Path(data_root), workers=1, show=lambda label, share: seen.append(share))
    assert [r["key"] for r in records] == [c.key for c in cells] and records[:2] == first
    assert seen == [1.0] and len(read_records(tmp_path)) == 3
    assert records[0]["result"]["curve"] != records[1]["result"]["curve"]


# -------------------------------------------------------------------------------------------------- what is said of it


def results(loss: Callable[[str, int, float, int], float], arms: tuple[str, ...] = ("h = 1", "4/D")) -> Results:
    """Made-up records: `loss(arm, depth, log2 of the rate over 4e-3, seed)`."""
    records = []
    for arm in arms:
        for depth in (4, 64):
            for rate in study.GRIDS["adamw"]:
                for seed in range(3):
                    cell = study.cell(arm, depth, rate, seed=seed)
                    value = loss(arm, depth, math.log2(rate / 4e-3), seed)
                    result = {"test_loss": value if math.isfinite(value) else None, "failed": not value < 3.2}
                    records.append({"study": "transfer", "key": cell.key, "config": cell.config(), "result": result})
    return Results(records)


def valley(arm: str, depth: int, x: float, seed: int) -> float:
    """h = 1: 2.8 at x = 0, deep 2.9 at x = -2; 4/D: deep 2.7 at x = 0.25; seeds differ by 0.001."""
    level, at = {(4, 4): (2.8, 0.0), (64, 0): (2.9, -2.0), (64, 1): (2.7, 0.25)}[
        (4, 4) if depth == 4 else (64, int(arm != "h = 1"))
    ]
    return level + 0.02 * (x - at) ** 2 + 0.001 * seed * (1 if depth == 4 else -1)


def test_the_three_numbers_of_parabolas_are_theirs() -> None:
    found = results(valley)
    plain, scaled = (study.three_numbers(found, arm, 64, "adamw") for arm in ("h = 1", "4/D"))
    assert plain is not None and scaled is not None
    assert plain["loss at depth"] == pytest.approx([0.18 - 0.002 * seed for seed in range(3)], abs=1e-9)
    assert plain["regret"] == pytest.approx([0.08] * 3, abs=1e-9)
    # rates of the grid are not quite powers of 2 apart
    assert plain["shift"] == pytest.approx([-2.0] * 3, abs=0.01) and plain["bounded"] == [0.0] * 3
    assert scaled["shift"] == pytest.approx([0.25] * 3, abs=0.01) and scaled["regret"] == [0.0] * 3


def test_verdicts_and_the_title_follow_the_rules_that_were_written_before() -> None:
    rows = study.claims(results(valley), "")
    verdicts = [row.verdict for row in rows[:7]]
    assert verdicts == [SUPPORTED] * 7
    assert study.title(rows) == "Train deeper with the learning rate you have"
    edges = {row.claim.split(":")[0]: row for row in rows[7:] if "fail at no lower rate" in row.claim}
    assert (edges["h = 1"].verdict, edges["4/D"].verdict) == (VIOLATED, HOLDS)  # 3.22 at 0.016, and 2.85 at the last
    assert edges["h = 1"].outcome == "none up to 0.032 -> up to 0.008, of 0.032"
    assert {row.verdict for row in rows[7:] if row.verdict not in (VIOLATED, HOLDS)} == {NOT_RUN}

    alike = study.claims(
        results(
            lambda arm, depth, x, seed: (
                valley("4/D" if arm != "h = 1" else "", depth, x, seed)
                if depth == 4 or arm != "h = 1"
                else 2.9 + 0.02 * x**2 + 0.001 * seed
            )
        ),
        "",
    )
    assert [row.verdict for row in alike[4:7]] == [REFUTED, SUPPORTED, REFUTED]
    assert study.title(alike) == "Depth that pays"

    flat = study.claims(results(lambda arm, depth, x, seed: 2.8 + 0.02 * x**2 + 0.01 * (seed * depth % 3)), "")
    assert [row.verdict for row in flat[:3]] == [UNDECIDED] * 3
    assert study.title(flat) == "A factor that falls with depth"


def test_a_best_rate_at_the_end_of_the_grid_is_said_and_decides_no_small_shift() -> None:
    found = results(lambda arm, depth, x, seed: 2.8 + 0.02 * (x - (0 if depth == 4 else -9)) ** 2 * 0.1 + 0.001 * seed)
    rows = study.claims(found, "")
    assert "first or last that was run" in rows[5].outcome and rows[5].verdict != SUPPORTED


def test_seeds_beyond_the_grids_do_not_choose_the_best_rate() -> None:
    some = {1e-3: {0: 2.0, 1: 2.0, 2: 2.0}, 4e-3: {seed: 2.5 for seed in range(5)}, 2e-3: {0: 1.0}}
    assert study.best_rate(some) == 1e-3


def test_the_edge_is_the_last_rate_before_one_fails() -> None:
    found = results(lambda arm, depth, x, seed: math.nan if x > 1.5 and depth == 64 and seed == 2 else 2.8)
    assert (study.edge(found, "h = 1", 4, "adamw"), study.edge(found, "h = 1", 64, "adamw")) == (3.2e-2, 8e-3)


def test_the_picture_is_drawn_from_records_and_none_without() -> None:
    ((name, figure),) = study.figures(results(valley))
    assert name == "transfer" and len(figure.axes) == 6
    assert list(study.figures(Results([]))) == []
    assert all(replace(Cell(), seed=seed).key != Cell().key for seed in (1, 2))
