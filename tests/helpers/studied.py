"""Small data, and a training of them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from typer.testing import CliRunner

from reproductions.cli import app
from reproductions.data import batches as sources
from reproductions.trial import Trial

CPU = torch.device("cpu")

COUNT = 40  # images a file

TINY = Trial(depth=8, size=8, batch_size=32, train=72, test=24, epochs=2, milestones=(0.5,), learning_rate=0.05)


def source_of(one: Trial, root: Path) -> sources.Source:
    return sources.load(one, root, CPU)


def records_of(cell: Trial, values: list[float | None], name: str = "test_accuracy") -> list[dict[str, Any]]:
    return [{"key": replace(cell, seed=s).key, "result": {name: v, "failed": False}} for s, v in enumerate(values)]


def run_cli(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output
