"""The examples run, and do what they say."""

import importlib.util
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import eulernet

EXAMPLES = Path(__file__).parent.parent / "examples"
optuna = pytest.importorskip("optuna")


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def trials(file: Path) -> list[tuple[dict[str, float], float | None]]:
    """Parameters and values of the trials that have ended."""
    try:
        study = optuna.load_study(study_name="h", storage=f"sqlite:///{file}")
    except Exception:  # the file is not there, or not complete yet
        return []
    ended = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)
    return [(trial.params, trial.value) for trial in study.get_trials(states=ended)]


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_a_study_that_was_killed_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A killed process leaves its finished trials; the next one adds what is missing, with other parameters."""
    file = tmp_path / "h.db"
    monkeypatch.chdir(tmp_path)
    start = "import sys; sys.path.insert(0, sys.argv[1]); import optuna_h; optuna_h.EPOCHS, optuna_h.TRIALS = 1, 1000"
    process = subprocess.Popen([sys.executable, "-c", f"{start}; optuna_h.main()", EXAMPLES], stderr=subprocess.DEVNULL)
    try:
        while len(trials(file)) < 2:
            assert process.poll() is None
            time.sleep(0.2)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    before = trials(file)
    assert 2 <= len(before) < 1000

    example = load("optuna_h")
    monkeypatch.setattr(example, "EPOCHS", 1)
    monkeypatch.setattr(example, "TRIALS", len(before) + 2)
    study = example.main()
    after = trials(file)
    assert after[: len(before)] == before
    assert len(after) == len(before) + 2 == len({parameters["h"] for parameters, _ in after})
    assert all(0.01 <= parameters["h"] <= 1 for parameters, _ in after)
    assert study.best_value == max(value for _, value in after if value is not None) > 0.5
    assert f"accuracy {study.best_value:.3f}" in capsys.readouterr().out

    example.main()  # all trials are there: none is added
    assert trials(file) == after


def test_poor_trials_are_pruned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a learning rate that makes training fail the median of the others is not reached."""
    example = load("optuna_h")
    monkeypatch.setattr(example, "EPOCHS", 4)
    study = optuna.create_study(direction="maximize", pruner=optuna.pruners.MedianPruner(2, n_warmup_steps=2))
    for lr, h in ((0.05, 0.1), (0.06, 0.1), (1.0, 1.0)):
        study.enqueue_trial({"lr": lr, "h": h})
    study.optimize(example.objective, n_trials=3)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "COMPLETE", "PRUNED"]


def test_the_training_script_of_timm_has_one_line_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It trains a patched model and its average, and goes on with the steps of its checkpoint."""
    pytest.importorskip("timm")
    monkeypatch.chdir(tmp_path)
    source = (EXAMPLES / "timm_train.py").read_text()
    assert (
        sum("eulernet." in line and '"""' not in line for line in source.partition("import eulernet")[2].splitlines())
        == 1
    )
    example = load("timm_train")
    small = ["--epochs", "1", "--images", "16", "--device", "cpu"]
    model = example.main([*small, "--h", "0.3"])
    assert {step.h for step in eulernet.steps(model)} == {0.3}
    saved = torch.load("output/last.pth.tar", weights_only=False)
    for name in ("state_dict", "state_dict_ema"):
        again = eulernet.patch(timm_model(), saved[name])
        assert {step.h for step in eulernet.steps(again)} == {0.3}
    assert not torch.equal(saved["state_dict"]["conv1.0.weight"], saved["state_dict_ema"]["conv1.0.weight"])
    resumed = example.main([*small, "--epochs", "2", "--resume", "output/last.pth.tar"])
    assert {step.h for step in eulernet.steps(resumed)} == {0.3}
    assert torch.load("output/last.pth.tar", weights_only=False)["epoch"] == 1


def timm_model() -> Any:
    return pytest.importorskip("timm").create_model("test_resnet", num_classes=10)
