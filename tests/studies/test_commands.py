"""The commands of the studies, their reports and figures."""

import doctest
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import matplotlib.pyplot as plt
import pytest
from typer.testing import CliRunner

from reproductions import campaign, cli, desk, report, trial
from reproductions.cli import RESULTS, app
from reproductions.data import ag_news as texts
from reproductions.data import noise as corrupt
from reproductions.errors import DataError
from reproductions.evidence import claims, style
from reproductions.evidence.claims import Results
from reproductions.presets import PRESETS
from reproductions.records import read_records
from reproductions.studies import GRIDS, throughput
from reproductions.studies import fig2_dynamics as dynamics
from reproductions.studies import fig3_depth as depth
from reproductions.studies import propositions as bounds
from reproductions.training import loop as train
from reproductions.training import network as made
from tests.helpers.studied import CPU, TINY, records_of, run_cli


@pytest.mark.parametrize("module", [claims, corrupt, made, texts, train, trial], ids=lambda module: module.__name__)
def test_examples_in_docstrings_run(module: ModuleType) -> None:
    assert doctest.testmod(module).failed == 0


# ---- the command line


def test_depth_command_writes_records_figures_and_a_report(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid_of = [replace(TINY, h=h, depth=8, log=True, seed=s) for h in (1.0, 0.1) for s in range(2)]
    progress = cli._progress()
    monkeypatch.setattr(cli, "_progress", lambda: progress)
    monkeypatch.setattr(depth, "trials", lambda preset, seeds: grid_of)
    monkeypatch.setattr(depth, "cell", lambda preset, model, n, arm: replace(TINY, depth=8, log=True, **arm))
    printed = run_cli("depth", "--data-root", root, "--device", "cpu", "--out", tmp_path / "trials")
    assert "4 trials" in printed and (tmp_path / "trials" / "depth-smoke.png").stat().st_size > 10_000
    whole, flight = progress.tasks
    assert flight.finished_time < whole.finished_time / 2  # that of the last of four
    again = run_cli("depth", "--data-root", root, "--device", "cpu", "--out", tmp_path / "trials")
    assert "4 of 4 trials have a record" in again
    run_cli("report", "--results", tmp_path)
    text = (tmp_path / "REPORT.md").read_text()
    assert re.search(r"\| resnet 20: h = 0.1 tests better than h = 1 \| ResNet-8; 72 images .* 2 seeds \| .*\*\*", text)


def test_missing_texts_are_noticed_before_the_images_are_trained_on(root: Path, tmp_path: Path) -> None:
    (tmp_path / "cifar-10-batches-bin").symlink_to(root / "cifar-10-batches-bin")
    with pytest.raises(DataError, match="holds no AG-NEWS"):
        run_cli("depth", "--data-root", tmp_path, "--device", "cpu", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_norms_on_texts_and_of_the_first_iterations_are_claimed_and_drawn(tmp_path: Path) -> None:
    layer = {"weight": [1.0, 2.0], "gradient": [1.0, None], "mean_weight": 1.0}
    log = {"iterations": [0, 1], **{f"layer {n}": layer for n in (2, 19, 49)}}
    cells = [dynamics.early("paper", 20, {"h": 0.1}), dynamics.news("paper", 49, False, {"h": 0.1})]
    assert all(one in dynamics.trials("paper", 1) for one in cells)
    results = Results({"study": "trials", "key": one.key, "result": {"log": log}} for one in cells)
    drawn = [style.save(figure, tmp_path / name) for name, figure in dynamics.figures(results)]
    assert [path.name for path in drawn] == ["dynamics-early-paper", "dynamics-texts-paper"]
    said = {(row.claim, row.run) for row in dynamics.claims(Results([]), "paper")}
    claim = "vdcnn 49: with h = 0.1 the averaged weight norm of layer 2 is smaller"
    assert (claim, "VDCNN-49 without BN; all training texts at hand of 1,024 letters; 1 epoch") in said


def test_diverged_trainings_are_crosses() -> None:
    figure, axes = plt.subplots()
    results = Results(records_of(TINY, [1.0, None, None], "train_loss"))
    shown = style.points(axes, results, {0.0: TINY}, "train_loss", "h = 1", ("red", "o", "-"))
    crosses = next(c for c in axes.collections if len(c.get_offsets()) == 2)
    assert shown == 1 and crosses.get_offsets()[:, 1].tolist() == [0.98] * 2
    assert "diverged: not finite" in axes.get_legend_handles_labels()[1]
    plt.close(figure)


def test_start_bounds_and_throughput_commands_write_their_records(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dynamics, "DEPTHS", (8, 14))
    monkeypatch.setattr(bounds, "DEPTHS", {"smoke": (8, 14)})
    monkeypatch.setattr(throughput, "AT_ONCE", (1, 2))
    printed = run_cli(
        "dynamics", "--init", "--data-root", root, "--device", "cpu", "--seeds", 2, "--out", tmp_path / "s"
    )
    assert "explodes" in printed and (tmp_path / "s" / "start.png").exists()
    run_cli("bounds", "--data-root", root, "--device", "cpu", "--seeds", 2, "--out", tmp_path / "b")
    assert (tmp_path / "b" / "bounds.png").exists()
    assert len(read_records(tmp_path / "b")) == 2 * 2 * len(bounds.H)
    out = tmp_path / "t"
    run_cli("throughput", "--data-root", root, "--device", "cpu", "--depth", 8, "--iterations", 2, "--out", out)
    assert [r["config"]["at_once"] for r in read_records(out)] == [1, 2]
    assert throughput.measure([replace(TINY, train=72)], root, CPU, iterations=7) > 0  # more than an epoch has


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["depth", "--preset", "large", "--data-root", "."], "'large' is none of smoke, cpu, small, paper"),
        (["depth", "--data-root", ".", "--device", "abacus"], "abacus"),
        (["noise", "--data-root", ".", "--seeds", "11"], "--seeds"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(arguments: list[str], words: str) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2 and words in result.output


def test_stored_trials_belong_to_the_studies_as_they_are() -> None:
    presets = {name: (*PRESETS, *getattr(study, "ALSO", ())) for name, study in GRIDS.items()}
    known = {one.key: one for name, study in GRIDS.items() for p in presets[name] for one in study.trials(p, 10)}
    known |= {one.key: one for one in desk.trials()}
    chosen = json.loads((RESULTS / "campaign" / "probe.json").read_text())["chosen"]
    known |= {
        one.key: one for _, some in campaign.cells("paper", chosen["epochs"], chosen["precision"]) for one in some
    }
    for record in read_records(RESULTS / "trials"):
        assert record["config"] == known[record["key"]].config()
        loss = record["result"]["train_loss"]
        assert record["result"]["failed"] == train.failed(
            math.nan if loss is None else loss, known[record["key"]].class_count
        )


def test_report_is_made_of_the_stored_records() -> None:
    stored = (RESULTS / "REPORT.md").read_text()
    assert report.text(RESULTS) == stored
    # What speaks against a small h is said as well.
    assert re.search(r"relative to how far the features spread .* \+0\.156 \(.*\*\*refuted\*\*", stored)
