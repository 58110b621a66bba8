"""The campaign on a device that is at hand for some minutes, and the desk's cores, at toy size."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from reproductions import campaign, desk
from reproductions.campaign import EPOCHS, Campaign, Way, cells, same_so_far
from reproductions.cli import app
from reproductions.errors import DataError
from reproductions.evidence.claims import Results
from reproductions.records import Record, append_record, read_records
from reproductions.training.loop import SideBySide, Training
from reproductions.training.stack import Stacked, together
from reproductions.trial import Trial
from tests.helpers.small_data import small_data, small_files  # noqa: F401  the small data sets

CPU = torch.device("cpu")


def of(out: Path, data: Path, seconds: float = 600.0, **more: Any) -> Campaign:
    return Campaign(out, data, CPU, seconds, "smoke", **more)


def test_the_command_works_through_all_cells_and_runs_nothing_twice(
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = cells("smoke", 3, "fp32")[:3]
    monkeypatch.setattr(campaign, "cells", lambda preset, epochs, precision: [
        (title, [replace(one, epochs=min(one.epochs, epochs)) for one in trials]) for title, trials in first
    ])  # fmt: skip
    arguments = ["campaign", "--minutes", "10", "--preset", "smoke", "--device", "cpu", "--data-root", str(root)]
    found = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path)])
    assert found.exit_code == 0, found.output
    notes = json.loads((tmp_path / "probe.json").read_text())
    assert {row["way"] for row in notes["variants"]} == {"stacked", "separate"}
    assert all(row["launched"] > 0 for row in notes["variants"]) and not notes["variants"][0]["nan_leaks"]
    assert notes["chosen"]["epochs"] == 3 and "fixed before" in notes["rule"]
    records = read_records(tmp_path)
    assert {record["key"] for record in records} == {one.key for _, trials in first for one in trials}
    assert {path.name for path in tmp_path.iterdir()} == {"probe.json", "records.jsonl"}
    monkeypatch.setattr(Campaign, "probe", None)  # a campaign that goes on probes nothing
    again = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path)])
    assert again.exit_code == 1 and "no trial came to its end" in str(again.exception)
    assert read_records(tmp_path) == records
    last = json.loads((tmp_path / "probe.json").read_text())
    assert (last["chosen"], last["variants"]) == (notes["chosen"], notes["variants"])
    assert "as chosen before" in last["events"][len(notes["events"])]


def test_a_way_that_fails_is_noted_and_the_next_one_does_it(
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(self: Stacked, size: int) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(Stacked, "_each", broken)
    monkeypatch.setattr(campaign, "cells", lambda *arguments: cells(*arguments)[:1])
    one = of(tmp_path, root)
    assert one.run() == 4
    errors = {row["way"]: row.get("error") for row in one.notes["variants"]}
    assert errors == {"stacked": "RuntimeError: no such kernel", "separate": None}
    assert one.notes["chosen"]["kind"] == "separate"


def test_a_way_that_fails_in_the_middle_is_followed_by_another(
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = of(tmp_path, root)
    ways = [Way("stacked", "fp32", False, 1e12), Way("separate", "fp32", False, 1e12)]
    finish = Stacked.finish

    def broken(self: Stacked) -> None:
        finish(self)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Stacked, "finish", broken)
    one.cell("a cell", cells("smoke", 1, "fp32")[0][1], ways, must=True)
    assert len(read_records(tmp_path)) == 4
    assert {record["environment"]["way"] for record in read_records(tmp_path)} == {"separate"}


class Graph:
    """What stands for a CUDA graph: it runs what was captured."""

    def __init__(self, engine: SideBySide, size: int) -> None:
        self.engine, self.size, self.replayed = engine, size, 0

    def replay(self) -> None:
        self.replayed += 1
        self.engine._each(self.size)


@pytest.mark.parametrize("works", [True, False])
def test_where_graphs_can_be_captured_they_are_and_where_not_kernels_are_launched(
    works: bool,
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    graphs: list[Graph] = []

    def capture(engine: SideBySide, size: int) -> Graph:
        if not works:
            raise RuntimeError("operation not permitted when stream is capturing")
        graphs.append(Graph(engine, size))
        return graphs[-1]

    def on_cuda(trainings: list[Training], way: str) -> SideBySide:
        engine = together(trainings, way)
        engine.captures = True
        return engine

    monkeypatch.setattr(SideBySide, "_capture", capture)
    monkeypatch.setattr(campaign, "together", on_cuda)
    monkeypatch.setattr(campaign, "cells", lambda *arguments: cells(*arguments)[:1])
    one = of(tmp_path, root, way="stacked")
    assert one.run() == 4
    (row,) = one.notes["variants"]
    assert row["launched"] > 0 and ("captured" in row, "error" in row) == (works, not works)
    assert all(record["environment"]["captured"] in (works, False) for record in read_records(tmp_path))
    assert bool(graphs) == works and all(graph.replayed for graph in graphs)


def test_without_time_nothing_is_begun_and_the_first_cell_stops(root: Path, tmp_path: Path) -> None:
    one = of(tmp_path, root, seconds=1.0)
    time.sleep(1.0)
    trials = cells("smoke", 2, "fp32")[0][1]
    slow = [Way("stacked", "fp32", False, 1.0)]
    one.cell("later", trials, slow)
    assert "not begun" in one.notes["events"][-1]
    one.cell("first", trials, slow, must=True)
    assert "stopped for time" in one.notes["events"][-1]
    assert len((tmp_path / "unfinished.jsonl").read_text().splitlines()) == 4
    assert not (tmp_path / "records.jsonl").exists()


@pytest.mark.parametrize(
    ("tf32", "bf16", "expected"),
    [
        (1e6, 2e6, (80, "tf32")),
        (60e3, 2e6, (30, "tf32")),
        (30e3, 90e3, (50, "bf16")),
        (30e3, 60e3, (30, "bf16")),
        (5e3, 5e3, (3, "tf32")),
        (5e3, 15e3, (5, "bf16")),
    ],
)
def test_epochs_and_precision_follow_the_rule(
    tf32: float, bf16: float, expected: tuple[int, str], tmp_path: Path
) -> None:
    """With 370 s left, at so many images a second at depth 110."""
    one = Campaign(tmp_path, tmp_path, CPU, 370.0)
    ways = [Way("stacked", "bf16", True, bf16 * 110 * 1024), Way("stacked", "tf32", True, tf32 * 110 * 1024)]
    epochs, chosen = one.choose(sorted(ways, key=lambda way: -way.speed))
    assert (epochs, chosen[0].precision) == expected


def test_a_training_is_made_shorter_where_nothing_would_have_been_different(tmp_path: Path) -> None:
    one = Campaign(tmp_path, tmp_path, CPU, 100.0)

    class Begun:
        trial, epoch = Trial(epochs=50), 2

    begun: Any = Begun()
    one._shorten([begun], 1.0)
    assert begun.trial == Trial(epochs=50)
    one._shorten([begun], 2.5)
    assert begun.trial == Trial(epochs=30)
    begun.epoch = 16
    one._shorten([begun], 30.0)
    assert begun.trial == Trial(epochs=30) and same_so_far(begun.trial, 20, 10)
    assert not same_so_far(begun.trial, 20, 11)


def test_cells_have_five_seeds_and_the_epochs_chosen() -> None:
    for epochs in EPOCHS["paper"]:
        title, trials = cells("paper", epochs, "bf16")[0]
        assert "ResNet-110" in title and {(t.depth, t.epochs, t.log, t.precision) for t in trials} == {
            (110, epochs, True, "bf16")
        }
        assert [(t.h, t.seed) for t in trials] == [(h, seed) for h in (1.0, 0.1) for seed in range(5)]


def write_others(folder: Path, records: list[Record]) -> Path:
    """The same trials, trained on other data."""
    for record in records:
        append_record(folder, {**record, "data": {**record["data"], "sha256": "0" * 16}})
    return folder


def test_the_desk_trains_in_order_of_worth_and_stops_in_time(
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert [(t.model, t.depth, t.h, t.seed) for t in desk.trials()[:3]] == [
        ("vdcnn", 9, 1.0, 0), ("vdcnn", 9, 0.1, 0), ("vdcnn", 9, 1.0, 1)
    ]  # fmt: skip
    assert {trial.seed for trial in desk.trials()} == set(range(5)) and len(set(desk.trials())) == len(desk.trials())
    small = {"train": 64, "test": 16, "batch_size": 16, "epochs": 1}
    wanted = [replace(trial, **small, held_out=0, depth=8) for trial in desk.trials()[15:18]]
    monkeypatch.setattr(desk, "ProcessPoolExecutor", lambda workers, context, begin: ThreadPoolExecutor(workers))
    monkeypatch.setattr(desk, "SPARE", 0.0)
    assert desk.run(wanted, tmp_path, root, 1, 1e-3) == []
    found = desk.run(wanted[:2], tmp_path, root, 1, 600.0)
    assert [record["key"] for record in found] == [trial.key for trial in wanted[:2]]
    more = desk.run(wanted, tmp_path, root, 1, 600.0)
    assert [record["key"] for record in more] == [wanted[2].key]
    assert desk.train(wanted[0], root, 0.0) is None
    other = write_others(tmp_path / "other", more)
    assert [r["key"] for r in desk.run(wanted[2:], tmp_path / "new", root, 1, 600.0, [other, tmp_path])] == []
    assert [r["key"] for r in desk.run(wanted[2:], tmp_path / "new", root, 1, 600.0, [other])] == [wanted[2].key]
    with pytest.raises(DataError, match="holds trials on another cifar10, of 1,600 training samples"):
        desk.run(wanted[2:], other, root, 1, 600.0)
    assert {row.verdict for row in desk.primary(Results(read_records(tmp_path)))} == {"not run"}
