"""The bounds of the propositions, and the verdicts that follow from records."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from reproductions.evidence.claims import Results, Row, compare, compare_spreads
from reproductions.evidence.statistics import Estimate
from reproductions.presets import PRESETS, SEEDS
from reproductions.studies import GRIDS
from reproductions.studies import fig2_dynamics as dynamics
from reproductions.studies import fig3_depth as depth
from reproductions.studies import fig5_noise as noise
from reproductions.studies import fig6_choice_of_h as select
from reproductions.studies import finetuning as finetune
from reproductions.studies import propositions as bounds
from reproductions.studies import robustness as robust
from reproductions.training.network import build
from reproductions.trial import Trial
from tests.helpers.studied import TINY, records_of

# ---- bounds


def test_spectral_norm_is_that_of_the_whole_matrix() -> None:
    convolution, norm = nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3).eval()
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([0.5, -2.0, 1.0]))
        norm.running_var.copy_(torch.tensor([0.25, 1.0, 4.0]))

        def affine(x: Tensor) -> Tensor:
            return norm(convolution(x.view(1, 2, 5, 5))).flatten()

        matrix = torch.autograd.functional.jacobian(affine, torch.zeros(50))
        found = bounds.spectral_norm(convolution, norm, (2, 5, 5), torch.Generator().manual_seed(0), iterations=300)
    assert found == pytest.approx(torch.linalg.matrix_norm(matrix, 2).item(), rel=1e-4)


def test_bounds_hold_and_are_reached_where_they_must_be() -> None:
    """With empty branches nothing changes: gain 1, bound 1, noise as it was."""
    network = build(Trial(depth=14, h=0.5, initial=0.0))
    inputs, labels = torch.randn(8, 3, 8, 8), torch.arange(8)
    result = bounds.measure(network, inputs, labels, 0.5, torch.Generator().manual_seed(0))
    assert result["blocks"] == 2 and result["noise_holds"]
    assert result["gain_bounds"] == [1.0, 1.0] and result["branch_norm"] == 0
    # The rectifier after a block lets the gradient of what is positive pass; what is zero was cut off before.
    assert result["growth"] <= 1 + 1e-6 and result["noise"] <= 1 + 1e-6
    random = bounds.measure(build(Trial(depth=14)), inputs, labels, 1.0, torch.Generator().manual_seed(0))
    assert all(gain <= bound for gain, bound in zip(random["gains"], random["gain_bounds"], strict=True))
    assert random["noise"] <= random["noise_bound"] and math.log10(random["growth"]) <= random["log10_growth_bound"]


# ---- what is said


@pytest.mark.parametrize(
    ("plain", "euler", "word"),
    [
        ([0.5, 0.6, 0.7], [0.6, 0.71, 0.8], "supported"),
        ([0.6, 0.71, 0.8], [0.5, 0.6, 0.7], "refuted"),
        ([0.5, 0.6, 0.7], [0.6, 0.55, 0.7], "undecided"),
        ([0.5], [0.6], "undecided"),
        ([0.5, None], [0.6, 0.6], "undecided"),
        ([], [0.6], "not run"),
    ],
)
def test_a_verdict_follows_from_the_interval_of_paired_differences(
    plain: list[float | None], euler: list[float | None], word: str
) -> None:
    a, b = TINY, replace(TINY, h=0.1)
    results = Results([*records_of(a, plain), *records_of(b, euler)])
    row = compare(results, "claim", [(a, b)], "test_accuracy")
    assert row.verdict == word
    if word in ("supported", "refuted"):
        found = Estimate.of([y - x for x, y in zip(plain, euler, strict=True)])  # type: ignore[operator]
        assert f"{found.mean:+.3f} ({found.low:+.3f} to {found.high:+.3f})" in row.outcome
        assert "3 seeds" in row.run and "ResNet-8; 72 images of 8 x 8; 2 epochs" in row.run


@pytest.mark.parametrize(
    ("plain", "euler", "word"),
    [
        ([2.0, 2.1, None], [1.0, 1.1, 1.2], "supported"),
        ([2.0, 2.1, 2.0], [1.0, 1.1, None], "undecided"),
        ([2.0, 2.1, None], [1.0, 1.1, None], "supported"),
        ([1.0, 1.1, None], [2.0, 2.1, 2.0], "undecided"),
        ([1.0, 1.1, 1.0], [2.0, 2.1, None], "refuted"),
    ],
)
def test_a_diverged_training_contradicts_what_it_is_the_worse_of(
    plain: list[float | None], euler: list[float | None], word: str
) -> None:
    a, b = TINY, replace(TINY, h=0.1)
    results = Results([*records_of(a, plain, "train_loss"), *records_of(b, euler, "train_loss")])
    row = compare(results, "claim", [(a, b)], "train_loss", higher=False)
    assert row.verdict == word and "1 seed not finite" in row.outcome


def test_a_diverged_training_has_no_feature_steps() -> None:
    records = [{"key": TINY.key, "result": {"feature_steps": [0.1, None]}}]
    assert math.isnan(Results(records).values(TINY, "feature_steps")[0])


def test_a_learning_rate_at_which_most_trainings_diverge_is_not_the_best() -> None:
    good, bad = (robust.cell("smoke", {"h": 1.0}, {"learning_rate": rate}) for rate in (0.1, 1.0))
    results = Results([*records_of(good, [1.5] * 3, "train_loss"), *records_of(bad, [1.0, None, None], "train_loss")])
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(robust.RATES, "smoke", (1.0, 0.1))
        assert robust.at_best_rate(results, "smoke", {"h": 1.0}) == good


def test_failures_are_judged_with_ten_seeds_and_need_no_small_h() -> None:
    records = []
    for h in select.TEXT_H[-2:]:
        cell = select.short("paper", "vdcnn", 49, h)
        records += [{"key": replace(cell, seed=s).key, "result": {"failed": s < 9}} for s in range(10)]
    for counted, seeds, word in ((records, "10 seeds", "supported"), (records[:-1], "9 seeds", "undecided")):
        (row,) = [r for r in select.claims(Results(counted), "paper") if r.claim.startswith("vdcnn 49: trainings fail")]
        assert row.verdict == word and seeds in row.run and "h = 0.8: 9 of 10 fail; h = 1: 9 of" in row.outcome


def test_spreads_are_judged_over_pooled_cells() -> None:
    pairs = [(replace(TINY, depth=d), replace(TINY, depth=d, h=0.1)) for d in (8, 14, 20, 26)]
    records = []
    for wide, narrow in pairs:
        records += records_of(wide, [0.1, 0.5, 0.9]) + records_of(narrow, [0.49, 0.5, 0.51])
    row = compare_spreads(Results(records), "claim", pairs, "test_accuracy")
    assert row.verdict == "supported" and "12 pairs" in row.outcome
    assert compare_spreads(Results(records), "claim", pairs[:1], "test_accuracy").verdict == "undecided"
    assert compare_spreads(Results([]), "claim", pairs, "test_accuracy").verdict == "not run"


def test_best_h_is_chosen_on_held_out_samples_and_ties_go_to_the_smaller() -> None:
    records = []
    for h in (0.01, 0.1, 1.0):
        cell = select.cell("smoke", "resnet", 20, h)
        for seed in range(3):
            result = {"validation_accuracy": {0.01: 0.5, 0.1: 0.7, 1.0: 0.7}[h], "test_accuracy": h, "failed": False}
            records.append({"key": replace(cell, seed=seed).key, "result": result})
    assert select.best(Results(records), "smoke", "resnet", 20) == 0.1
    auto = {"key": select.cell("smoke", "resnet", 20, "auto").key, "result": {"h": 1 / 3}}
    said = [row.claim for row in select.claims(Results([*records, auto]), "smoke")]
    assert any(claim.startswith("resnet 20: h = auto (0.333) tests") for claim in said)  # where the rule landed


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("preset", PRESETS)
def test_every_study_has_a_grid_and_claims_in_every_preset(name: str, preset: str) -> None:
    study = GRIDS[name]
    trials = study.trials(preset, SEEDS[preset])
    assert trials and len({one.key for one in trials}) == len(trials)
    rows = study.claims(Results([]), preset)
    assert rows and all(isinstance(row, Row) and row.verdict == "not run" for row in rows)


def test_paper_presets_are_the_papers_protocol() -> None:
    images, news = Trial(), depth.cell("paper", "vdcnn", 49, {"h": 0.1})
    assert (images.epochs, images.batch_size, images.learning_rate, images.milestones) == (80, 128, 0.1, (0.5, 0.75))
    assert (news.epochs, news.batch_size, news.learning_rate, news.milestones) == (15, 64, 0.1, ())
    assert images.weight_decay == news.weight_decay == 0 and images.warmup == 0
    assert {t.depth for t in depth.trials("paper", 5)} >= {20, 110, 218, 9, 17, 29, 49}
    assert {t.depth for t in dynamics.trials("paper", 5) if t.model == "resnet" and t.epochs == 80} == {110, 218}
    assert noise.DEPTH["paper"] == (218, 49) and noise.cell("paper", "letters", 0.1, {}).learning_rate == 0.01
    assert min(select.IMAGE_H) == 0.001 and max(select.IMAGE_H) == 20 and max(select.TEXT_H) == 1
    assert {t.learning_rate for t in robust.trials("paper", 1)} >= {0.01, 1.0}
    assert {t.start for t in finetune.trials("paper", 1)} == {None, finetune.base("paper")}
