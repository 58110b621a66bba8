"""A copy of a patched model is patched and independent, in this process and in another."""

import copy
import os
import pickle
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import eulernet
from tests.helpers.copied import FACTORS, Net, by_pickle, by_save, factors
from tests.traps.base import Block

ROOT = str(Path(eulernet.__file__).parents[1])


# ------------------------------------------------------------------------------------------------------------ copies


COPIES: list[Callable[[nn.Module], Any]] = [copy.deepcopy, by_pickle, by_save]


@pytest.mark.parametrize("make", COPIES, ids=lambda make: make.__name__)
def test_a_copy_is_patched_and_independent(model: Net, x: Tensor, make: Callable[[nn.Module], Any]) -> None:
    expected = model(x)
    other = make(model)
    assert type(other) is type(model)
    assert [type(module) for module in other.modules()] == [type(module) for module in model.modules()]
    assert torch.equal(other(x), expected)
    assert eulernet.steps(other) == eulernet.steps(model)

    eulernet.set_h(other, 0.1)
    assert factors(other) == [0.1] * 6 and factors(model) == FACTORS
    assert torch.equal(model(x), expected) and not torch.equal(other(x), expected)
    eulernet.set_h(model, 2.0)
    assert factors(other) == [0.1] * 6

    eulernet.unpatch(model)
    assert eulernet.is_patched(other) and not eulernet.is_patched(model)
    eulernet.set_h(other, FACTORS)
    assert torch.equal(other(x), expected)
    eulernet.unpatch(other)
    assert [type(module) for module in other.modules()] == [type(module) for module in model.modules()]
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("make", COPIES, ids=lambda make: make.__name__)
def test_a_copied_part_has_its_steps(model: Net, x: Tensor, make: Callable[[nn.Module], Any]) -> None:
    """One block alone, without the model that it was patched in."""
    part = make(model.plain)
    assert torch.equal(part(x), model.plain(x))
    assert type(part) is type(model.plain)


def test_a_shallow_copy_keeps_h(model: Net, x: Tensor) -> None:
    assert torch.equal(copy.copy(model.plain)(x), model.plain(x))


def test_a_copied_block_goes_into_another_model(model: Net, x: Tensor) -> None:
    """Blocks are cloned into stacks, as ``nn.TransformerEncoder`` does it."""
    stack = nn.Sequential(*(copy.deepcopy(model.plain) for _ in range(3)))
    expected = x
    for block in stack:
        expected = block.reference(expected, FACTORS[0])
    torch.testing.assert_close(stack(x), expected)


def test_a_module_with_its_own_way_of_pickling_is_patched_when_it_comes_back(x: Tensor) -> None:
    model = OwnState()
    eulernet.patch(model, 0.5, example_inputs=x)
    other = pickle.loads(pickle.dumps(model))
    assert isinstance(other, OwnState) and other.restored
    assert torch.equal(other(x), model(x))
    assert factors(other) == [0.5]


class OwnState(Block):
    restored = False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "restored": True}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)


class OwnCopy(Block):
    """Copies itself as a new module with the same weights."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "OwnCopy":
        twin = type(self)()
        twin.load_state_dict(self.state_dict(), strict=False)
        return twin


@pytest.mark.parametrize("trainable", [False, True])
def test_a_copy_made_by_the_modules_own_way_is_patched(trainable: bool, x: Tensor) -> None:
    model = eulernet.patch(nn.Sequential(OwnCopy(), OwnCopy()), [0.5, 0.25], example_inputs=x, trainable=trainable)
    other = copy.deepcopy(model)
    assert type(other[0]) is type(model[0]) and list(other.state_dict()) == list(model.state_dict())
    assert torch.equal(other(x), model(x))
    eulernet.set_h(other, 1.0)
    assert factors(model) == pytest.approx([0.5, 0.25]) and factors(other) == [1.0, 1.0]
    again = eulernet.patch(model, 0.125, example_inputs=x)
    assert factors(again) == [0.125] * 2 and type(eulernet.unpatch(again)[0]) is OwnCopy


def test_averaged_models_have_an_h_of_their_own(original: Net, model: Net, x: Tensor) -> None:
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    reference = AveragedModel(original, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    for seed in range(2):
        for net, averaged in ((model, average), (original, reference)):
            torch.manual_seed(seed)
            for parameter in net.parameters():
                nn.init.normal_(parameter)
            averaged.update_parameters(net)
    assert not torch.equal(average(x), model(x))
    assert factors(average.module) == FACTORS
    eulernet.set_h(model, 0.1)
    assert factors(average.module) == FACTORS
    eulernet.unpatch(average.module)
    assert torch.equal(average(x), reference(x))


def test_replicas_of_data_parallel_are_patched(model: Net, x: Tensor) -> None:
    """``nn.parallel.replicate`` copies each module this way and then gives the copies their parameters."""
    replica = model.plain._replicate_for_data_parallel()
    assert type(replica) is type(model.plain)
    replica.norm, replica.a = model.plain.norm, model.plain.a
    assert torch.equal(replica(x), model.plain(x))
    eulernet.set_h(model, 0.1)
    assert torch.equal(model.plain._replicate_for_data_parallel()(x), model.plain(x))


MODULE = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 6)

    def forward(self, x):
        return x + self.a(x)

class Child(Block):
    def forward(self, x):
        return super().forward(x) * 2

def build():
    torch.manual_seed(0)
    return nn.Sequential(Block(), Child())
"""


# ------------------------------------------------------------------------------------------------------ other processes


def in_a_fresh_process(folder: Path, script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-B", "-c", textwrap.dedent(script)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), ROOT])},
        capture_output=True,
        text=True,
        timeout=300,
    )


SAVE = """
    import torch, eulernet, pickled
    model, x = pickled.build(), torch.ones(2, 6)
    eulernet.patch(model, [0.25, 0.5], example_inputs=x)
    torch.save(model, "model.pt")
    torch.save(model(x), "output.pt")
"""

LOAD = """
    import torch
    model = torch.load("model.pt", weights_only=False)
    import eulernet, pickled
    x = torch.ones(2, 6)
    assert torch.equal(model(x), torch.load("output.pt"))
    assert [step.h for step in eulernet.steps(model)] == [0.25, 0.5]
    assert type(model[0]) is not pickled.Block and isinstance(model[0], pickled.Block)
    assert eulernet.unpatch(model) is model
    assert type(model[0]) is pickled.Block and type(model[1]) is pickled.Child
    assert torch.equal(model(x), pickled.build()(x))
"""


def test_what_is_saved_loads_in_a_fresh_process(tmp_path: Path) -> None:
    (tmp_path / "pickled.py").write_text(MODULE)
    for script in (SAVE, LOAD):
        result = in_a_fresh_process(tmp_path, script)
        assert result.returncode == 0, result.stderr


def test_where_an_unrelated_line_changed_it_loads_or_says_why_not(tmp_path: Path) -> None:
    (tmp_path / "pickled.py").write_text(MODULE)
    assert in_a_fresh_process(tmp_path, SAVE).returncode == 0
    (tmp_path / "pickled.py").write_text(MODULE + "\n# A later comment.\n")
    result = in_a_fresh_process(tmp_path, LOAD)
    # The same additions, or the clear error; never a model that computes something else.
    assert result.returncode == 0 or "EulernetError" in result.stderr


@pytest.mark.parametrize(
    "edit",
    [
        lambda text: text.replace("x + self.a(x)", "self.a(x) + x"),
        lambda text: text.replace("return x + self.a(x)", "y = self.a(x)\n        return x + y"),
        lambda text: text.replace("return x + self.a(x)", "return 2 * x + self.a(x)"),
    ],
    ids=["operands", "statement", "factor"],
)
def test_it_is_refused_beside_another_version_of_the_source(tmp_path: Path, edit: Callable[[str], str]) -> None:
    (tmp_path / "pickled.py").write_text(MODULE)
    assert in_a_fresh_process(tmp_path, SAVE).returncode == 0
    (tmp_path / "pickled.py").write_text(edit(MODULE))
    result = in_a_fresh_process(tmp_path, LOAD)
    assert result.returncode != 0
    last = result.stderr.strip().rpartition("EulernetError")[2]
    assert "EulernetError" in result.stderr
    for word in ("Block", "pickled", "source", "state_dict"):
        assert word in last, f"{word!r} is not in: {last}"


def test_it_is_refused_where_the_class_is_gone(tmp_path: Path) -> None:
    (tmp_path / "pickled.py").write_text(MODULE)
    assert in_a_fresh_process(tmp_path, SAVE).returncode == 0
    (tmp_path / "pickled.py").write_text(MODULE.replace("Block", "Brick"))
    result = in_a_fresh_process(tmp_path, LOAD)
    assert result.returncode != 0 and "Block" in result.stderr
