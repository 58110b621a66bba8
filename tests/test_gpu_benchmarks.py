"""The benchmarks of the GPU run, tiny, on the CPU; their page says no more than was measured."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu, performance

pytest.importorskip("triton")


without_gpu = pytest.mark.skipif(
    torch.cuda.is_available(), reason="there it measures, and kernels do not run on the CPU"
)


@without_gpu
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([]) == 1
    assert "There is no CUDA device here" in capsys.readouterr().err


@without_gpu
@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("operations/.*/bfloat16$", 2 * len(gpu.OPERATIONS) - 1),
        ("launch", 4),
        ("models/deit3", 4),
        ("models/resnet10t/inference/eager", 1),
    ],
)
@pytest.mark.filterwarnings("ignore::Warning:torch")
def test_smoke(pattern: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row holds a positive number in each column of speed, and nothing is written."""
    shown: list[dict[str, Any]] = []
    monkeypatch.setattr(gpu, "show", shown.extend)
    assert gpu.main(["--smoke", "-k", pattern, "--json", str(tmp_path / "none.json")]) == 0
    assert len(shown) == count and not list(tmp_path.iterdir())
    for row in shown:
        speeds = [value for name, value in row.items() if name.split()[-1] in ("GB/s", "us", "ms", "ratio")]
        assert len(speeds) >= 2 and all(value > 0 for value in speeds)
    assert "measurement" in performance.page(shown)  # the tables name the device, which is none


@without_gpu
def test_what_fails_does_not_keep_the_rest_from_being_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The time on a GPU is short; the exit status tells."""
    shown: list[dict[str, Any]] = []
    monkeypatch.setattr(gpu, "show", shown.extend)
    monkeypatch.setitem(gpu.TINY, "resnet10t", gpu._timm("no such model", 2))
    assert gpu.main(["--smoke", "-k", "models/.*/inference/eager"]) == 1
    assert [row["name"] for row in shown] == ["deit3"]
    assert "Not measured, the errors stand above: models/resnet10t/inference/eager" in capsys.readouterr().err


@without_gpu
def test_the_counted_bytes() -> None:
    """Of 2**16 bytes an operand in float32 and bfloat16: three streams are 4 + 2 + 4 bytes an element."""
    sizes = gpu.Sizes("cpu", (2**-4,), calls=1, rounds=1, backend="eager", models={})
    forward, backward = gpu.measure_operation("LayerScale, step", "float32 + bfloat16", 2**-4, sizes)
    elements = 2**16 // 4
    assert forward["bytes"] == elements * (4 + 2 + 4)
    assert backward["bytes"] == elements * (4 + 2 + 2)  # the gradient and the branch read, its gradient written


@without_gpu
def test_what_moves_less_is_not_counted_as_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Liger's addition has no h, so that branch and skip have one gradient, written once."""
    monkeypatch.setattr(gpu, "_seconds", lambda calls, sizes: 1.0)
    monkeypatch.setattr(gpu, "liger", lambda: lambda s, b, w: (s + b, (s + b) * w))
    sizes = gpu.Sizes("cpu", (2**-4,), calls=1, rounds=1, backend="eager", models={})
    _, backward = gpu.measure_operation("step, RMSNorm", "float32", 2**-4, sizes)
    assert backward["fused GB/s"] == backward["bytes"] / 1e9 == 5 * 2**16 / 1e9
    assert backward["Liger GB/s"] == 4 * 2**16 / 1e9


def test_a_later_run_replaces_the_rows_of_the_same_name(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    one = {"table": "models", "name": "a", "what": "training", "backend": "eager", "ratio": 2.0}
    gpu.save(path, [one, one | {"what": "inference"}])
    gpu.save(path, [one | {"ratio": 1.0}])
    assert [(row["what"], row["ratio"]) for row in json.loads(path.read_text())] == [
        ("training", 1.0),
        ("inference", 2.0),
    ]


def test_the_page_says_that_nothing_was_measured(tmp_path: Path) -> None:
    performance.main(tmp_path / "no.json", tmp_path / "performance.md", cpu=tmp_path / "no.json")
    text = (tmp_path / "performance.md").read_text()
    assert "Nothing has been measured on a GPU yet" in text and "|" not in text
    assert not (tmp_path / performance.PLOT).exists()


def test_the_page_holds_what_was_measured(tmp_path: Path) -> None:
    on = {"device": "GPU", "versions": {"torch": "3"}, "python": "3.11", "command": "python -m benchmarks.gpu"}
    speeds = {"clone GB/s": 3000.0, "fused GB/s": 2900.0, "eager GB/s": 1000.0, "compiled GB/s": 2800.0}
    row = {"table": "operations", "name": "step", "dtype": "float32", "MiB": 64, "direction": "forward"}
    model = {
        "table": "models",
        "name": "net",
        "what": "training",
        "backend": "eager",
        "ratio": 0.9,
        "low": 0.8,
        "high": 1.1,
    }
    memory = {"original bytes": 200, "patched bytes": 100}
    rows = [row | on | speeds | {"bytes": 1200, "flops": 200}, model | on | memory]
    (tmp_path / "gpu.json").write_text(json.dumps(rows))
    performance.main(tmp_path / "gpu.json", tmp_path / "performance.md")
    text = (tmp_path / "performance.md").read_text()
    assert "| step | float32 | 64 | forward | 2,900 | 1,000 | 2,800 | 3,000 |" in text
    assert "| net | training | eager | 0.900 | 0.800 | 1.100 | 0.500 |" in text
    assert "GPU; Python 3.11, torch 3; `python -m benchmarks.gpu`" in text and "Launching" not in text
    assert (tmp_path / performance.PLOT).stat().st_size > 10_000


def test_the_committed_page_is_that_of_the_committed_results() -> None:
    rows = json.loads(gpu.RESULTS.read_text()) if gpu.RESULTS.exists() else []
    assert performance.PAGE.read_text() == performance.page(rows, json.loads(performance.CPU.read_text()))
