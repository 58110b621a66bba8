"""The folder of a study: several processes in it, damaged files, one that refuses; a training that can not begin."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import eulernet
from reproductions import cli, records
from reproductions.errors import DataError
from reproductions.evidence.claims import Results
from reproductions.locks import Claims
from reproductions.records import FILE, WHOLE, append_record, check_folder, read_records
from reproductions.studies import fig6_choice_of_h
from reproductions.training import grid, ray_cluster
from reproductions.trial import Trial
from tests.helpers import small_data

CPU = torch.device("cpu")
COUNT = 40  # images a file
TINY = Trial(depth=8, size=8, batch_size=32, train=72, test=24, epochs=3, milestones=())
START = """
import sys, torch
from pathlib import Path
from dataclasses import replace
torch.set_num_threads(1)
from reproductions.data import cifar10
from reproductions.locks import Claims
from reproductions.records import append_record
from reproductions.training import grid
from reproductions.trial import Trial
cifar10.IMAGES_PER_FILE = 40
folder, root, number = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
one = Trial(depth=8, size=8, batch_size=32, train=72, test=24, epochs=3, milestones=())
print("begun", flush=True)
sys.stdin.readline()
"""


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    small_data.expect(monkeypatch, COUNT)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    return small_data.write(tmp_path / "data", COUNT)


@contextmanager
def processes(code: str, folder: Path, root: Path, count: int) -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that run some code, all begun, each once it is told to."""
    command = [sys.executable, "-c", START + code, str(folder), str(root)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    here = {"cwd": Path(__file__).parents[1], "text": True}
    running = [subprocess.Popen([*command, str(number)], **pipes, **here) for number in range(count)]  # type: ignore[call-overload]
    try:
        for process in running:
            assert process.stdout.readline() == "begun\n", process.stderr.read()
        yield running
    finally:
        for process in running:
            process.kill()
            process.communicate()


def go(running: list[subprocess.Popen[str]]) -> None:
    """Tell all of them to begin, and wait for the end."""
    for process in running:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    for process in running:
        _, complaints = process.communicate(timeout=300)
        assert process.returncode == 0, complaints


# ---- several processes
def test_lines_of_two_writers_are_all_there(root: Path, tmp_path: Path) -> None:
    code = """
for line in range(200):
    append_record(folder, {"study": "trials", "key": f"{number}-{line}", "result": {"x": [0.1] * 50}})
"""
    with processes(code, tmp_path / "out", root, 2) as running:
        go(running)
    keys = [record["key"] for record in read_records(tmp_path / "out")]
    assert sorted(keys) == sorted(f"{number}-{line}" for number in range(2) for line in range(200))


def test_processes_in_one_folder_train_each_trial_once_and_all_end(root: Path, tmp_path: Path) -> None:
    code = """
trials = [replace(one, h=h, seed=seed) for seed in (0, 1) for h in (1.0, 0.1)]
print(len(grid.run(grid.Place(folder, root, torch.device("cpu")), trials)))
"""
    trials = [replace(TINY, h=h, seed=seed) for seed in (0, 1) for h in (1.0, 0.1)]
    with processes(code, tmp_path / "out", root, 3) as running:
        go(running)
    together = {record["key"]: record["result"] for record in read_records(tmp_path / "out")}
    assert len(read_records(tmp_path / "out")) == len(together) == 4
    alone = grid.run(grid.Place(tmp_path / "alone", root, CPU), trials)
    assert together == {record["key"]: record["result"] for record in alone}


def test_a_claim_ends_with_its_process(root: Path, tmp_path: Path) -> None:
    code = """
claims = Claims(folder)
print(claims.take(one.key), flush=True)
sys.stdin.readline()
"""
    folder = tmp_path / "out"
    with processes(code, folder, root, 1) as (other,), Claims(folder) as claims:
        assert other.stdin is not None and other.stdout is not None
        other.stdin.write("\n")
        other.stdin.flush()
        assert other.stdout.readline() == "True\n"
        assert not claims.take(TINY.key) and claims.take(replace(TINY, seed=1).key)
        with pytest.raises(DataError, match=r"another process trains resnet-8, h = 1, seed 0 in .*--out"):
            ray_cluster._claim(claims, grid.Place(folder, root, CPU), [TINY])
        other.kill()
        other.wait()
        assert claims.take(TINY.key)


# ---- damaged files
@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"study": "trials", "key"', "Expecting"),
        (b"7", "it has no names at all"),
        (b"[1, 2]", "it has no names at all"),
        (b'{"study": "trials", "config": {}}', "it has no result"),
        (b"", "Expecting value"),
        (b'{"study": "\xff"}', "can't decode"),
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, line: bytes, reason: str) -> None:
    good = {"study": "trials", "key": "a", "config": {}, "result": {}}
    append_record(tmp_path, good)
    path = tmp_path / FILE
    path.write_bytes(path.read_bytes() + line + b"\n" + path.read_bytes())
    with pytest.raises(DataError, match=rf"records\.jsonl, line 2 is no record: .*{reason}.* \(sed -i 2d "):
        read_records(tmp_path, WHOLE)
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([lines[0], *lines[2:]]))  # as the message says
    assert read_records(tmp_path) == [good, good]


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04 cut off"])
def test_a_damaged_checkpoint_is_named(root: Path, tmp_path: Path, content: bytes) -> None:
    place = grid.Place(tmp_path / "out", root, CPU)
    saved = place.checkpoint(TINY.key)
    saved.parent.mkdir(parents=True)
    saved.write_bytes(content)
    with pytest.raises(DataError, match=rf"{TINY.key}\.pt is damaged, or of another version: .*Delete it \(rm "):
        grid.run(place, [TINY])
    saved.unlink()
    assert len(grid.run(place, [TINY])) == 1


def test_a_checkpoint_of_another_network_is_named(root: Path, tmp_path: Path) -> None:
    place = grid.Place(tmp_path / "out", root, CPU)
    saved = place.checkpoint(TINY.key)
    for state in ({"epoch": 1}, {"epoch": 1, "network": {}, "optimizer": {"state": {}}}):
        saved.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, saved)
        with pytest.raises(DataError, match=rf"{TINY.key}\.pt is damaged, or of another version"):
            grid.run(place, [TINY])


# ---- a folder that can't be written
def test_a_file_for_a_folder_is_noticed_before_training(root: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for folder in (file, file / "below"):
        with pytest.raises(DataError, match=r"file is a file, so that no record .* by --out"):
            check_folder(folder, "trials")
    new = tmp_path / "a" / "b"
    assert check_folder(new, "trials") == new and not new.parent.exists()


def test_a_folder_that_refuses_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(dir: Path) -> Any:
        raise PermissionError(13, "Permission denied", str(dir))

    monkeypatch.setattr(records, "TemporaryFile", refuse)
    with pytest.raises(DataError, match=r"can't be written \(Permission denied\), .* by --out"):
        check_folder(tmp_path / "out", "trials")


def test_what_the_system_refuses_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full() -> None:
        raise OSError(28, "No space left on device", "runs/trials/records.jsonl")

    monkeypatch.setattr(cli, "app", full)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    assert "error: [Errno 28] No space left on device: 'runs/trials/records.jsonl'" in capsys.readouterr().err


# ---- a training that can't begin
def test_what_can_not_be_calibrated_has_failed_and_the_study_goes_on(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*arguments: object) -> float:
        raise eulernet.EulernetError("gradients grow at no h")

    monkeypatch.setattr(eulernet, "calibrate", none)
    trials = [replace(TINY, h="calibrate"), TINY]
    found = grid.run(grid.Place(tmp_path / "out", root, CPU, at_once=2), trials)
    assert [record["key"] for record in found] == [one.key for one in trials]
    assert found[0]["result"]["failed"] and found[0]["result"]["error"] == "gradients grow at no h"
    assert found[1]["result"]["test_accuracy"] > 0
    assert json.loads((tmp_path / "out" / FILE).read_text().splitlines()[0])["result"]["test_accuracy"] is None


def test_claims_about_a_rule_that_gave_no_h_are_undecided() -> None:
    cells = {h: fig6_choice_of_h.cell("smoke", "resnet", 20, h) for h in (0.01, 0.1, 1.0, "calibrate")}
    stored = []
    for h, cell in cells.items():
        good = {"failed": False, "validation_accuracy": 0.5, "test_accuracy": 0.5, "h": h}
        result = {"failed": True, "h": None, "test_accuracy": None} if h == "calibrate" else good
        stored += [{"key": replace(cell, seed=seed).key, "result": result} for seed in range(3)]
    rows = fig6_choice_of_h.claims(Results(stored), "smoke")
    (row,) = [row for row in rows if "h = calibrate tests" in row.claim]
    assert row.verdict in ("undecided", "at chance") and "3 of 3 trainings failed" in row.outcome
