"""The benchmarks of the GPU run, tiny, on the CPU; their page says no more than was measured."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import performance
from benchmarks.gpu import correctness, models, operations, plan, supervise, thresholds, tiles
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.results import RESULTS, Results, Row
from benchmarks.gpu.sizes import EARNEST, TINY
from benchmarks.gpu.supervise import Job
from benchmarks.gpu.tables import tables
from eulernet import kernels

pytest.importorskip("triton")
without_gpu = pytest.mark.skipif(
    torch.cuda.is_available(), reason="there it measures, and kernels do not run on the CPU"
)
ON: Row = {
    "device": "GPU", "python": "3.11", "versions": {"torch": "3"}, "source": "abc", "command": "run", "date": "today"
}  # fmt: skip
IN_TIME = time.time() + 3600


@without_gpu
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 1
    assert "There is no CUDA device here" in capsys.readouterr().err


def test_the_parts_come_in_the_order_of_what_they_decide(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list", "--json", "none.json"]) == 0
    names = capsys.readouterr().out.splitlines()
    assert len(set(names)) == len(names)
    kinds = [name.partition("/")[0] for name in names]
    assert list(dict.fromkeys(kinds)) == ["correctness", "operations", "host", "models", "thresholds", "tiles"]
    bfloat16, compiled = "operations/step, ReLU/bfloat16/16 MiB", "models/resnet50/compiled"
    assert names.index(bfloat16) < names.index("host") < names.index("models/resnet50/eager") < names.index(compiled)
    assert {
        f"operations/step/{d}/{n} MiB" for d in ("bfloat16", "float32 + bfloat16") for n in (1, 16, 64, 256)
    } <= set(names[: names.index("host")])


@without_gpu
@pytest.mark.parametrize("name", operations.OPERATIONS)
def test_an_operation_is_measured_beside_eager_and_clone(name: str) -> None:
    for row in operations.measure(operations.Case(name, "bfloat16", 2**-5), TINY):
        for kind in ("fused", "eager"):
            assert row[f"{kind} GB/s"] > 0 and row[f"{kind} share"] > 0
        assert row["clone GB/s"] > 0


@without_gpu
def test_the_counted_bytes() -> None:
    """Of 2**16 bytes an operand in float32 and bfloat16: three streams are 4 + 2 + 4 bytes an element."""
    case = operations.Case("LayerScale, step", "float32 + bfloat16", 2**-4)
    forward, backward = operations.measure(case, TINY)
    elements = 2**16 // 4
    assert forward["bytes"] == elements * (4 + 2 + 4)
    assert backward["bytes"] == elements * (4 + 2 + 2)  # the gradient and the branch read, its gradient written


@without_gpu
def test_the_share_is_the_rate_over_that_of_clone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Liger's addition has no h, so that branch and skip have one gradient, written once."""
    monkeypatch.setattr(operations.DeviceClock, "__call__", lambda self, run: 1.0)
    monkeypatch.setitem(
        operations.OPERATIONS,
        "step, RMSNorm",
        operations.Operation(
            lambda s, b, w: (s + b, (s + b) * w),
            lambda s, b, w: (s + b, (s + b) * w),
            1,
            "sboo",
            "ooosb",
            others=lambda: {"Liger": lambda s, b, w: (s + b, (s + b) * w)},
        ),
    )
    forward, backward = operations.measure(operations.Case("step, RMSNorm", "float32", 2**-4, compiled=True), TINY)
    assert forward["Liger GB/s"] == forward["fused GB/s"] == 4 * 2**16 / 1e9
    assert backward["fused GB/s"] == backward["bytes"] / 1e9 == 5 * 2**16 / 1e9
    assert backward["Liger GB/s"] == 4 * 2**16 / 1e9
    assert backward["clone GB/s"] == 2 * 2**16 / 1e9 and backward["fused share"] == 5 / 2


def test_buffers_go_beyond_the_cache() -> None:
    sets = operations.Buffers(operations.Case("step", "float32", 2**-5), TINY).sets
    assert sum(skip.numel() * skip.element_size() for skip, _ in sets) >= TINY.cache
    assert EARNEST.cache >= 4 * 60 * 10**6


@without_gpu
@pytest.mark.parametrize("dtypes", ["bfloat16", "float64"])
def test_kernels_are_checked_against_float64(dtypes: str) -> None:
    for case in correctness.cases():
        if case.dtypes == dtypes and case.layout in ("odd rows", "channels_last"):
            (row,) = correctness.check(case, TINY)
            assert row["right"] and row["error"] < row["bound"]


@without_gpu
def test_a_wrong_kernel_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """One hundredth of h too much, and one element that is no number."""
    exact = correctness.euler_step
    case = correctness.Case(correctness.Kernel(), "rows", "float32")
    monkeypatch.setattr(correctness, "euler_step", lambda s, b, h, **rest: exact(s, b, h * 1.01, **rest))
    (row,) = correctness.check(case, TINY)
    assert not row["right"] and row["error"] == pytest.approx(0.01, rel=0.1)
    nan = torch.tensor(float("nan"))
    monkeypatch.setattr(correctness, "euler_step", lambda s, b, h, **rest: exact(s, b, h, **rest) * nan)
    (row,) = correctness.check(case, TINY)
    assert not row["right"] and row["error"] == float("inf")
    assert any("WRONG: " in line[1] for line in tables([row])[0].rows)


@without_gpu
@pytest.mark.filterwarnings("ignore::Warning:torch")
def test_what_fails_does_not_keep_the_rest_from_being_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(models.TINY, "resnet10t", models._timm("no such model", 2, "x"))
    path = tmp_path / "gpu.json"
    supervise.work(Job(("models/resnet10t/eager", "models/deit3/eager"), path, ON, IN_TIME, TINY))
    results = Results(path)
    (failed,) = results.of("models/resnet10t/eager")
    assert failed["table"] == "failed" and "no such model" in failed["error"] and results.begun is None
    measured = results.of("models/deit3/eager")
    assert {(row["batch"], row["what"]) for row in measured} == {
        (batch, what) for batch in (1, 2) for what in ("inference", "training")
    }
    for row in measured:
        assert row["low"] <= row["median"] <= row["high"] and row["hooks"] > 0
    assert results.measured(ON) == {"models/deit3/eager"}
    assert "no such model" in capsys.readouterr().err


@without_gpu
def test_a_part_that_does_not_fit_into_the_time_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    supervise.work(Job(("models/deit3/compiled",), path, ON, time.time() + 5, TINY))
    assert Results(path).rows == []


def _fall(job: Job) -> None:
    """As `supervise.work`, in whose first part the process dies, and whose last one hangs."""
    results = Results(job.path)
    for name in job.parts:
        results.begin(name)
        if name == "dies":
            raise SystemExit(3)
        if name == "hangs":
            time.sleep(60)
        results.add(name, [{"table": "host"}], job.on)
    results.begin(None)


def test_after_a_process_that_died_the_next_goes_on_behind_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "work", _fall)
    results = Results(tmp_path / "gpu.json")
    names = ["one", "dies", "two", "hangs", "never"]
    results = supervise.measure(names, results, ON, time.time() + 30, TINY)
    assert results.measured(ON) == {"one", "two"}
    errors = {row["part"]: row["error"] for row in results.rows if row["table"] == "failed"}
    assert errors == {"dies": "its process died, exit code 3", "hangs": "the time was over"}


def test_a_later_run_goes_on_with_what_was_not_measured_of_this_source(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    Results(path).add("a", [{"table": "host", "name": "old"}], ON)
    Results(path).add("b", [{"table": "host", "name": "new"}], ON | {"date": "tomorrow"})
    assert Results(path).measured(ON) == {"a", "b"}
    assert Results(path).measured(ON | {"source": "mended"}) == set()
    Results(path).add("a", [{"table": "host", "name": "again"}], ON | {"source": "mended"})
    results = Results(path)
    assert [row["name"] for row in results.of("a")] == ["again"] and len(results.machines) == 2
    Results(path).add("b", [{"table": "host", "name": "again"}], ON | {"source": "mended"})
    assert len(Results(path).machines) == 1  # the others are of nothing any more


def test_the_page_says_that_nothing_was_measured(tmp_path: Path) -> None:
    none = tmp_path / "no.json"
    performance.main(none, tmp_path / "performance.md", cpu=none, fused=none)
    text = (tmp_path / "performance.md").read_text()
    assert "Nothing has been measured on a GPU yet" in text and "|" not in text
    assert not (tmp_path / performance.PLOT).exists()


def test_the_page_holds_what_was_measured(tmp_path: Path) -> None:
    operation = {"table": "operations", "name": "step", "dtype": "bfloat16", "direction": "forward", "beside": "eager"}
    speeds = {
        "clone GB/s": 3000.0,
        "fused GB/s": 2900.0,
        "eager GB/s": 1000.0,
        "fused share": 0.967,
        "eager share": 0.33,
    }
    ratio = {"median": 0.9, "low": 0.8, "high": 1.1, "hooks": 1.2, "original ms": 10.0, "patched ms": 9.0}
    model: dict[str, Any] = {"table": "models", "name": "net", "what": "training", "backend": "eager", "batch": 1}
    memory = {"original bytes": 200, "patched bytes": 100}
    results = Results(tmp_path / "gpu.json")
    results.add("x", [operation | speeds | {"MiB": 64, "bytes": 1200}, operation | speeds | {"MiB": 1}], ON)
    results.add("y", [model | ratio | memory], ON)
    performance.main(tmp_path / "gpu.json", tmp_path / "performance.md")
    text = (tmp_path / "performance.md").read_text()
    assert "| step | bfloat16 | forward | fused | 97% (2,900) | 97% (2,900) |" in text
    assert "| net | training | eager | 1 | 10.00 | 9.00 | 0.900 (0.800-1.100) | 1.200 |  | 0.500 |" in text
    assert "GPU; Python 3.11, torch 3; eulernet's files abc; today; `run`" in text and "Microseconds" not in text
    assert (tmp_path / performance.PLOT).stat().st_size > 10_000


def test_the_committed_page_is_that_of_the_committed_results() -> None:
    data = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    others = [json.loads(path.read_text()) for path in (performance.CPU, performance.FUSED)]
    assert performance.PAGE.read_text() == performance.page(data, *others)


def test_every_part_has_a_name_of_its_own() -> None:
    names = [part.name for part in (*plan.checks(), *plan.parts(TINY))]
    assert len(set(names)) == len(names)


@without_gpu
def test_models_are_measured_with_the_kernels_from_each_size_on() -> None:
    before = [getattr(kernels, name) for name in thresholds.NAMES]
    case = thresholds.cases(TINY)[-1]
    [row] = thresholds.measure(case, TINY)
    assert [getattr(kernels, name) for name in thresholds.NAMES] == before
    assert all(row[str(size)] > 0 for size in thresholds.MEBIBYTES)
    [table] = tables([{**row, "part": case.part}])
    assert table.columns[-2:] == ("64 MiB", "never") and len(table.rows[0]) == len(table.columns)


@without_gpu
@pytest.mark.parametrize("case", tiles.cases(TINY), ids=lambda case: case.part)
def test_other_tiles_are_timed_and_then_as_they_were(case: tiles.Case) -> None:
    from eulernet.kernels import _step

    before = [getattr(_step, name) for name in tiles.NAMES]
    rows = list(tiles.measure(case, TINY))
    assert len(rows) == 2 and all(row["share"] > 0 for row in rows)
    assert [getattr(_step, name) for name in tiles.NAMES] == before
