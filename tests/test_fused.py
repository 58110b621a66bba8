"""The table of what is fused: counted as a GPU would run it, with nothing started, and nothing left behind."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks import fused, performance
from eulernet import kernels
from eulernet._run import fuse
from eulernet._run.patched import Patched

pytest.importorskip("triton")
from eulernet.kernels._launch import Launch


class Network(nn.Module):
    """Two steps with a norm after them, one that is an addition alone, and one with batch norm and an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.norms, self.maps = (
            nn.ModuleList(nn.LayerNorm(8) for _ in "12"),
            nn.ModuleList(nn.Linear(8, 8) for _ in "123"),
        )
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.conv, self.bn, self.act = nn.Conv1d(3, 3, 1), nn.BatchNorm1d(3), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.maps[0](x)
        x = x + self.maps[1](self.norm1(x))
        x = x + self.maps[2](self.norm2(x))
        return self.act(x + self.bn(self.conv(x)))


def test_steps_are_counted_by_what_they_are_fused_with(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fused, "MODELS", {"network": lambda: (Network(), {"x": torch.randn(2, 3, 8)})})
    before = (Launch.__call__, fuse._fused, Patched._euler_step, kernels.current())
    assert fused.main(["--json", str(tmp_path / "fused.json")]) == 0
    assert (Launch.__call__, fuse._fused, Patched._euler_step, kernels.current()) == before
    data = json.loads((tmp_path / "fused.json").read_text())
    evaluation, training = data["rows"]
    assert evaluation["steps"] == training["steps"] == 4
    assert evaluation["with"] == {"step + LayerNorm": 2, "": 1, "BatchNorm + step + ReLU": 1}
    assert training["with"] == {"step + LayerNorm": 2, "": 1, "step + ReLU": 1}
    assert fused.table(data["rows"]).rows[-1] == ["mean share of the models", "", "", "75%", "75%"]
    page = performance.page({}, None, data)
    assert "| network | 2 step + LayerNorm; 1 BatchNorm + step + ReLU | 2 step + LayerNorm; 1 step + ReLU |" in page
    assert "| 3 of 4 | 3 of 4 |" in page
    assert "network" in capsys.readouterr().out


def test_a_model_that_is_not_known_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        fused.main(["ResNet-51"])
    assert "ResNet-51 is not known; use some of ResNet-50 (timm)" in capsys.readouterr().err
