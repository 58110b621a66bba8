"""What a killed process leaves, and Ray."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from reproductions.errors import DataError
from reproductions.presets import PRESETS
from reproductions.records import append_record, read_records
from reproductions.studies import GRIDS
from reproductions.training import grid
from reproductions.training.loop import SideBySide, Training
from reproductions.trial import Trial
from tests.helpers.studied import CPU, TINY, run_cli, source_of

# ---- what a killed process leaves


def comparable(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in r.items() if name not in ("seconds", "environment")} for r in records]


LONG = [replace(TINY, epochs=6, log=True, seed=seed, h=0.1) for seed in range(3)]

CHILD = """
import sys, torch
from pathlib import Path
from dataclasses import replace
torch.set_num_threads(1)
from reproductions.data import cifar10 as data
from reproductions.training import grid
from reproductions.trial import Trial
data.IMAGES_PER_FILE = 40
base = Trial(depth=8, size=8, batch_size=32, train=72, test=24, epochs=6, milestones=(0.5,), learning_rate=0.05)
trials = [replace(base, log=True, seed=seed, h=0.1) for seed in range(3)]
grid.run(grid.Place(Path(sys.argv[1]), Path(sys.argv[2]), torch.device("cpu")), trials)
"""


def test_a_study_killed_in_the_middle_ends_as_an_undisturbed_one(root: Path, tmp_path: Path) -> None:
    undisturbed = grid.run(grid.Place(tmp_path / "whole", root, CPU), LONG)
    command = [sys.executable, "-c", CHILD, str(tmp_path / "killed"), str(root)]
    child = subprocess.Popen(command, cwd=Path(__file__).parents[2])
    try:
        checkpoint = tmp_path / "killed" / "checkpoints" / f"{LONG[1].key}.pt"
        end = time.monotonic() + 120
        while not checkpoint.exists():
            assert child.poll() is None and time.monotonic() < end
            time.sleep(0.001)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    place = grid.Place(tmp_path / "killed", root, CPU)
    done = len(grid.recorded(place, LONG))
    assert 1 <= done < 3
    begun: list[float] = []
    resumed = grid.run(place, LONG, lambda label, share, work: begun.append(share))
    assert begun[0] > 1 / 6  # the first epoch was not trained again
    assert comparable(resumed) == comparable(undisturbed)
    assert not list((tmp_path / "killed" / "checkpoints").iterdir())


def test_an_exception_in_each_epoch_changes_nothing(root: Path, tmp_path: Path) -> None:
    place = grid.Place(tmp_path / "stopped", root, CPU)

    def stop(label: str, share: float, work: float) -> None:
        if share % (1 / 3) > 1 / 6 and share > stop.passed:  # type: ignore[attr-defined]
            stop.passed = share  # type: ignore[attr-defined]
            raise KeyboardInterrupt

    stop.passed = 0.0  # type: ignore[attr-defined]
    stops = 0
    while True:
        try:
            records = grid.run(place, LONG[:1], stop)
            break
        except KeyboardInterrupt:
            stops += 1
    assert stops >= 3
    assert comparable(records) == comparable(grid.run(grid.Place(tmp_path / "whole", root, CPU), LONG[:1]))


def test_what_was_begun_on_a_gpu_goes_on_without_one(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, one = grid.Place(tmp_path / "begun", root, CPU), LONG[0]
    begun = Training(one, source_of(one, root), CPU)
    SideBySide([begun]).epoch()
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        grid._save(place.checkpoint(one.key), begun.state())
    with pytest.raises(RuntimeError, match="CUDA"):
        torch.load(place.checkpoint(one.key), weights_only=True)
    whole = grid.run(grid.Place(tmp_path / "whole", root, CPU), [one])
    assert comparable(grid.run(place, [one])) == comparable(whole)


def test_what_was_begun_without_a_gpu_goes_on_with_learning_rates_that_a_graph_can_be_told(root: Path) -> None:
    begun, other = (Training(TINY, source_of(TINY, root), CPU) for _ in range(2))
    SideBySide([begun]).epoch()
    for group in other.optimizer.param_groups:  # as on a CUDA device
        group["lr"] = torch.tensor(group["lr"])
    other.load(begun.state())
    assert all(isinstance(group["lr"], Tensor) for group in other.optimizer.param_groups)
    buffers = [[s["momentum_buffer"] for s in one.optimizer.state.values()] for one in (begun, other)]
    assert buffers[0] and all(torch.equal(a, b) for a, b in zip(*buffers, strict=True))


def test_a_torn_line_is_no_record_and_is_cut_off(tmp_path: Path) -> None:
    append_record(tmp_path, {"key": "a", "result": {"loss": math.nan}})
    with (tmp_path / "records.jsonl").open("a") as file:
        file.write('{"key":"b","resu')
    assert [record["key"] for record in read_records(tmp_path)] == ["a"]
    append_record(tmp_path, {"key": "c", "config": {}})
    assert [record["key"] for record in read_records(tmp_path)] == ["a", "c"]
    assert read_records(tmp_path)[0]["result"]["loss"] is None


@pytest.mark.parametrize("study", ["bounds", "throughput"])
def test_a_study_does_not_overwrite_the_records_of_another(study: str, root: Path, tmp_path: Path) -> None:
    append_record(tmp_path, {"study": "trials", "key": "a", "config": {}, "result": {}})
    with pytest.raises(DataError, match=rf"records\.jsonl holds records of trials, not of {study}"):
        run_cli(study, "--data-root", root, "--device", "cpu", "--out", tmp_path)
    assert [record["key"] for record in read_records(tmp_path)] == ["a"]


def test_finished_trials_are_not_run_again(root: Path, tmp_path: Path) -> None:
    place = grid.Place(tmp_path, root, CPU)
    first = grid.run(place, [TINY])
    begun: list[str] = []
    assert grid.run(place, [TINY], lambda label, share, work: begun.append(label)) == first
    assert not begun
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == []


def test_keys_are_those_of_stored_records() -> None:
    """A key that changes with the code would train everything again."""
    assert Trial().key == Trial(depth=20, h=1.0).key
    assert Trial(h=0.1, depth=110, seed=3).key == "2de5f9c80b5d"
    keys = [one.key for name in GRIDS for preset in PRESETS for one in GRIDS[name].trials(preset, 10)]
    configs = {
        json.dumps(one.config(), sort_keys=True) for g in GRIDS.values() for p in PRESETS for one in g.trials(p, 10)
    }
    assert len(set(keys)) == len(configs)


RAY = """
import os, signal, sys, torch
from pathlib import Path
from dataclasses import replace
torch.set_num_threads(1)
from reproductions.data import cifar10 as data
from reproductions.training import grid, ray_cluster as on_ray
from reproductions.trial import Trial
root, folder, always = Path(sys.argv[2]), Path(sys.argv[1]), len(sys.argv) > 3
on_ray.RETRIES = 1
base = Trial(depth=8, size=8, batch_size=32, train=72, test=24, epochs=6, milestones=(0.5,), learning_rate=0.05)
trials = [replace(base, log=True, seed=seed, h=0.1) for seed in range(3)]
whole = grid.train

def train(place, group, keep):
    data.IMAGES_PER_FILE = 40
    mark = folder / f"killed-{group[0].key}"
    def show(label, share, work):
        if share > 0.5 and group[0].seed == 1 and (always or not mark.exists()):
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
    return whole(place, group, keep, show)

grid.train = train
on_ray.run("local", grid.Place(folder, root, torch.device("cpu")), trials)
"""


# ---- Ray


def run_on_ray(folder: Path, root: Path, *options: str) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("ray")
    folder.mkdir()
    return subprocess.run(
        [sys.executable, "-c", RAY, str(folder), str(root), *options],
        timeout=300,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"},
        capture_output=True,
        text=True,
    )


def test_on_ray_a_killed_worker_changes_nothing(root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "ray"
    assert run_on_ray(folder, root).returncode == 0
    assert list(folder.glob("killed-*")) == [folder / f"killed-{LONG[1].key}"]
    spread = grid.recorded(grid.Place(folder, root, CPU), LONG)
    assert comparable(spread) == comparable(grid.run(grid.Place(tmp_path / "here", root, CPU), LONG))


def test_on_ray_a_worker_that_always_dies_is_named(root: Path, tmp_path: Path) -> None:
    ended = run_on_ray(tmp_path / "ray", root, "always")
    assert ended.returncode == 1
    assert f"DataError: {grid.name([LONG[1]])}: its worker died 2 times" in ended.stderr
    assert "give the command again, on machines with more memory" in ended.stderr
