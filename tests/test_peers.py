"""What the benchmarks compare with computes what a patched model computes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from benchmarks import peers
from benchmarks.models import BRANCHES, SPEED, Inputs, first_output


def _small(name: str) -> Inputs:
    tokens = {"input_ids": torch.randint(0, 1000, (2, 8))}
    return tokens if name == "bert_small" else {"x": torch.randn(1, 3, 224, 224)}


@pytest.mark.parametrize("name", BRANCHES)
def test_all_peers_compute_the_same_but_unit_scaling(name: str) -> None:
    torch.manual_seed(0)
    model, inputs = SPEED[name][0]().eval(), _small(name)
    for p in model.parameters():
        if p.dim() == 1:  # some factors of branches begin with zero, which would hide h
            torch.nn.init.uniform_(p, 0.5, 1.5)
    made: dict[str, Callable[[], torch.nn.Module]] = peers.peers(model, BRANCHES[name], inputs)
    made.pop("unit-scaling")
    with torch.no_grad():
        results = {peer: first_output(make(), inputs) for peer, make in made.items()}
        before = first_output(model, inputs)
    for peer, result in results.items():
        error = (result - results["eulernet"]).norm() / results["eulernet"].norm()
        assert error < 1e-5, peer
        assert (result - before).norm() > 0.01 * before.norm()


def test_a_pattern_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(LookupError, match="no module of Linear"):
        peers.hooked(torch.nn.Linear(2, 2), "branch")


def test_the_bytes_that_are_saved_for_backward() -> None:
    """Two linear layers save their inputs: 8 rows of 4, of which one stands for both, and of 16 floats."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.Linear(16, 2))
    x = torch.randn(8, 4)
    assert peers.saved(model, lambda: model(x).sum().backward()) == (8 * 4 + 8 * 16) * 4
