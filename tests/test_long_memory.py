"""The study of recurrent cells: its networks are those of torch, trained as torch trains."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from reproductions.cli import app
from reproductions.evidence.claims import Results
from reproductions.records import read_records
from reproductions.studies import long_memory as study

TINY = replace(study.PROTOCOLS["smoke"], length=6, iterations=4)


def by_hand(cell: nn.Module, head: nn.Linear, h: float, x: torch.Tensor) -> torch.Tensor:
    state = torch.zeros(x.shape[1], TINY.hidden)
    for given in x:
        state = state + h * (cell(given, state) - state)
    return head(state).squeeze(-1)


@pytest.mark.parametrize("arm", study.ARMS, ids=str)
def test_a_training_is_that_of_the_cell_of_torch(arm: study.Arm) -> None:
    """Of each of several that are trained side by side, against `nn.GRUCell`, `clip_grad_norm_` and `Adam`."""
    choices = [(3e-3, 0), (1e-2, 3), (1e-2, 0)]
    found = study.train(arm, choices, TINY)
    for (rate, seed), result in zip(choices, found, strict=True):
        cell, head = study.start(arm, TINY.hidden, seed)
        generator = torch.Generator().manual_seed(1000 + seed)
        (vx, vy), (tx, ty) = (study.sequences(TINY.sequences, TINY.length, generator) for _ in range(2))
        parameters = [*cell.parameters(), *head.parameters()]
        optimizer = torch.optim.Adam(parameters, rate)
        for _ in range(TINY.iterations):
            x, y = study.sequences(TINY.batch_size, TINY.length, generator)
            optimizer.zero_grad()
            (by_hand(cell, head, arm.h, x) - y).square().mean().backward()
            nn.utils.clip_grad_norm_(parameters, TINY.clip)
            optimizer.step()
        for name, x, y in (("validation_error", vx, vy), ("test_error", tx, ty)):
            wanted = ((by_hand(cell, head, arm.h, x) - y).square().mean() * 6).item()
            assert result[name] == pytest.approx(wanted, rel=1e-4)


def test_a_sequence_has_one_mark_in_each_half_and_asks_for_the_sum() -> None:
    x, y = study.sequences(20_000, 7, torch.Generator().manual_seed(0))
    marks = x[..., 1]
    assert set(marks.unique().tolist()) == {0.0, 1.0}
    assert marks[:3].sum(0).eq(1).all() and marks[3:].sum(0).eq(1).all()
    assert torch.equal((x[..., 0] * marks).sum(0), y)
    assert y.var().item() == pytest.approx(study.VARIANCE, rel=0.03)


def test_a_slow_start_moves_as_the_cell_with_a_small_h() -> None:
    x, state = torch.randn(5, 2) * 1e-3, torch.randn(5, 8) * 1e-3
    (slow, _), (plain, _) = (study.start(study.Arm("tanh", 1.0, slow), 8, 0) for slow in (True, False))
    for each in (slow, plain):
        nn.init.zeros_(each.bias_ih)
        nn.init.zeros_(each.bias_hh)
    moved = state + study.SLOW * (plain(x, state) - state)
    torch.testing.assert_close(slow(x, state), moved, rtol=1e-3, atol=1e-8)
    gated, _ = study.start(study.Arm("gru", 1.0, True), 8, 0)
    with torch.no_grad():
        for name, parameter in gated.named_parameters():
            if name != "bias_hh":
                parameter.zero_()
        gated.bias_hh[:8] = gated.bias_hh[16:] = 0
        torch.testing.assert_close(1 - gated(x, state) / state, torch.full((5, 8), study.SLOW / 2), rtol=0.6, atol=0.03)


def test_it_learns() -> None:
    protocol = replace(study.PROTOCOLS["cpu"], length=6, hidden=16, iterations=300)
    (result,) = study.train(study.Arm("gru", 0.5), [(1e-2, 0)], protocol)
    assert result["test_error"] < 0.3 and not result["failed"] and len(result["curve"]) == 6


def test_the_command_writes_records_that_the_claims_and_the_picture_are_made_of(tmp_path: Path) -> None:
    given = ["memory", "--preset", "smoke", "--seeds", "2", "--out", str(tmp_path)]
    printed = CliRunner().invoke(app, given)
    assert printed.exit_code == 0, printed.output
    records = read_records(tmp_path)
    assert len(records) == len(study.ARMS) * len(study.LEARNING_RATES) * 2
    assert (tmp_path / "memory.png").stat().st_size > 10_000
    rows = study.claims(Results(records), "smoke")
    assert len(rows) == 8 and {row.verdict for row in rows} <= {"supported", "refuted", "undecided", "at chance"}
    assert {row.verdict for row in study.claims(Results([]), "cpu")} == {"not run"}


def made(arm: study.Arm, rate: float, seed: int, validation: float, test: float) -> dict[str, Any]:
    config = {"preset": "cpu", "cell": arm.cell, "h": arm.h, "slow_start": arm.slow_start, "learning_rate": rate}
    result = {"failed": test > 0.95, "validation_error": validation, "test_error": test}
    return {"study": "memory", "config": {**config, "seed": seed, **vars(TINY)}, "result": result}


def test_an_arm_is_judged_at_the_rate_that_validation_chose() -> None:
    records = [
        made(arm, rate, seed, validation, test + 0.001 * seed)
        for arm in study.ARMS
        for seed in range(4)
        for rate, validation, test in ((1e-3, 0.5, 0.1), (1e-2, 0.2, 0.3 if arm.h == 1 else 0.2 - 0.01 * seed))
    ]
    assert study.at_its_best(records, study.ARMS[0])[0] == 1e-2
    rows = study.claims(Results(records), "cpu")
    assert [row.verdict for row in rows[:3]] == ["supported"] * 3
    assert all("the largest that was run" in row.outcome for row in rows[:3])
    for record in records:
        if record["config"]["cell"] == "tanh" and record["config"]["seed"] < 2:
            record["result"]["failed"] = True
    assert [row.verdict for row in study.claims(Results(records), "cpu")[:5]] == [
        *["at chance"] * 3,
        "undecided",
        "supported",
    ]
    records[0]["result"]["validation_error"] = None  # not finite, in a record
    assert math.isinf(study.errors(records, study.ARMS[0], "validation_error")[1e-3][0])
