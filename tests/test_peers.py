"""What the benchmarks compare with computes what a patched model computes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from benchmarks import peers
from benchmarks.models import BRANCHES, SPEED, Inputs, first_output
from benchmarks.test_peers import saved


def _small(name: str) -> Inputs:
    tokens = {"input_ids": torch.randint(0, 1000, (2, 8))}
    return tokens if name == "bert_small" else {"x": torch.randn(1, 3, 224, 224)}


@pytest.mark.parametrize("name", BRANCHES)
def test_all_peers_compute_the_same_but_unit_scaling(name: str) -> None:
    torch.manual_seed(0)
    model, inputs = SPEED[name][0]().eval(), _small(name)
    made: dict[str, Callable[[], torch.nn.Module]] = peers.peers(model, BRANCHES[name], inputs)
    made.pop("unit-scaling")
    with torch.no_grad():
        results = {peer: first_output(make(), inputs) for peer, make in made.items()}
        before = first_output(model, inputs)
    for peer, result in results.items():
        torch.testing.assert_close(result, results["eulernet"], rtol=1e-4, atol=1e-5, msg=peer)
        assert not torch.allclose(result, before, rtol=1e-4, atol=1e-5)


def test_a_pattern_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(LookupError, match="no module of Linear"):
        peers.hooked(torch.nn.Linear(2, 2), "branch")


def test_the_bytes_that_are_saved_for_backward() -> None:
    """Two linear layers save their inputs: 8 rows of 4, of which one stands for both, and of 16 floats."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.Linear(16, 2))
    x = torch.randn(8, 4)
    assert saved(model, lambda: model(x).sum().backward()) == (8 * 4 + 8 * 16) * 4
