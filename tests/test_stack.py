"""K trainings as one network by groups are K trainings."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from reproductions.data import batches as sources
from reproductions.data.batches import Source
from reproductions.training.loop import SideBySide, Training
from reproductions.training.network import build
from reproductions.training.stack import Blocks, Stacked, stack, together
from reproductions.trial import Trial
from tests.helpers.small_data import small_data, small_files  # noqa: F401  fixtures

CPU = torch.device("cpu")
SMALL = Trial(depth=8, size=8, train=640, test=100, batch_size=32, epochs=2, milestones=(), log=True, precision="fp32")
NEWS = Trial(
    data="ag-news", model="vdcnn", depth=9, size=64, batch_size=16, epochs=2, milestones=(), log=True, precision="fp32"
)
ARMS = [replace(SMALL, h=1.0), replace(SMALL, h=0.1, seed=1), replace(SMALL, h="auto", seed=2)]
ARMS.append(replace(SMALL, h=1.0, initial=0.1))
MIXED = [
    replace(SMALL, weight_decay=1e-3),
    replace(SMALL, h=0.1, seed=1, clip=0.5),
    replace(SMALL, rate=0.01, warmup=10),
    replace(SMALL, h=0.3, seed=5, optimizer="adam", learning_rate=1e-3),
]


class Widened(Source):
    """Another source's samples in the dtype of a network."""

    def __init__(self, source: Source, dtype: torch.dtype) -> None:
        self.source, self.dtype = source, dtype
        self.tests = source.tests

    def __len__(self) -> int:
        return len(self.source)

    def draw(self, seed: int, epoch: int) -> Tensor:
        return self.source.draw(seed, epoch)

    def batch(self, drawn: Tensor) -> sources.Samples:
        inputs, labels = self.source.batch(drawn)
        return self._wide(inputs), labels

    def prepare(self, inputs: Tensor) -> Tensor:
        return self._wide(self.source.prepare(inputs))

    def _wide(self, inputs: Tensor) -> Tensor:
        return inputs.to(self.dtype) if inputs.is_floating_point() else inputs


def trainings(trials: list[Trial], root: Path, dtype: torch.dtype) -> list[Training]:
    made = [Training(one, Widened(sources.load(one, root, CPU), dtype), CPU) for one in trials]
    for training in made:
        training.network.to(dtype)
        training.rows = torch.zeros_like(training.rows, dtype=dtype)
        training.begin()
    return made


def trained(trials: list[Trial], root: Path, dtype: torch.dtype, way: str, steps: int) -> list[Training]:
    made = trainings(trials, root, dtype)
    go(together(made, way), steps)
    return made


def go(all_of_them: SideBySide, steps: int) -> None:
    for iteration in range(steps):
        for training in all_of_them.trainings:
            training.set_rate(iteration)
        all_of_them.step(all_of_them.sizes[iteration])


def difference(mine: Tensor, theirs: Tensor) -> float:
    return ((mine - theirs).abs().max() / theirs.abs().max().clamp(min=1e-30)).item()


def differences(stacked: list[Training], separate: list[Training], rows: int) -> list[float]:
    """Of the losses and norms of all iterations, and of all weights and BN statistics after them."""
    found = []
    for mine, theirs in zip(stacked, separate, strict=True):
        found.append(difference(mine.rows[:rows], theirs.rows[:rows]))
        states = mine.network.state_dict(), theirs.network.state_dict()
        found += [difference(states[0][n], states[1][n]) for n in states[0] if states[0][n].is_floating_point()]
    assert not any(map(math.isnan, found))
    return found


@pytest.mark.parametrize(
    ("trials", "steps"),
    [
        (ARMS, 20),
        (MIXED, 20),
        ([replace(one, norm=False, learning_rate=0.01) for one in ARMS], 20),
        ([replace(NEWS, h=h, seed=seed) for seed, h in enumerate((1.0, 0.1))], 5),
        ([replace(NEWS, h=h, norm=False, model="vdcnn-original", learning_rate=1e-3) for h in (1.0, 0.3)], 2),
    ],
    ids=["arms", "optimisers", "no BN", "texts", "original texts without BN"],
)
def test_a_stack_trains_as_each_alone(trials: list[Trial], steps: int, root: Path) -> None:
    stacked = trained(trials, root, torch.float64, "stacked", steps)
    separate = trained(trials, root, torch.float64, "separate", steps)
    assert max(differences(stacked, separate, steps)) < 1e-10
    assert len({training.rows[0, 0].item() for training in separate}) > 1


def test_in_float32_the_first_losses_agree(root: Path) -> None:
    """Later ones need not: at this learning rate a change by one ulp grows as much."""
    stacked = trained(ARMS, root, torch.float32, "stacked", 1)
    separate = trained(ARMS, root, torch.float32, "separate", 1)
    for mine, theirs in zip(stacked, separate, strict=True):
        assert mine.rows[0, 0].item() == pytest.approx(theirs.rows[0, 0].item(), rel=1e-6)


def test_after_one_has_left_the_others_go_on(root: Path) -> None:
    stacked, separate = (trainings(ARMS[:3], root, torch.float64) for _ in range(2))
    for some, way in ((stacked, "stacked"), (separate, "separate")):
        go(together(some, way), 5)
        go(together([some[0], some[2]], way), 5)
    assert max(differences(stacked[::2], separate[::2], 10) + differences(stacked[1:2], separate[1:2], 5)) < 1e-10


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_in_its_trial(bad: float, root: Path) -> None:
    made, separate = (trainings(ARMS, root, torch.float64) for _ in range(2))
    with torch.no_grad():
        made[2].network.conv.weight[0, 0, 0, 0] = bad
    go(Stacked(made), 10)
    others = [0, 1, 3]
    go(SideBySide([separate[index] for index in others]), 10)
    assert not made[2].network.head.weight.isfinite().all()
    assert max(differences([made[i] for i in others], [separate[i] for i in others], 10)) < 1e-10


def test_what_a_trial_saves_is_its_own_and_no_more(root: Path, tmp_path: Path) -> None:
    alone, *made = trainings([ARMS[0], *ARMS], root, torch.float32)
    Stacked(made)
    for name, training in (("alone", alone), ("stacked", made[0])):
        torch.save(training.state(), tmp_path / name)
    assert (tmp_path / "stacked").stat().st_size < 1.01 * (tmp_path / "alone").stat().st_size
    before = made[0].weights()
    go(Stacked(made), 1)
    assert not torch.equal(before["conv.weight"], made[0].network.conv.weight)


def test_one_trial_alone_is_the_plain_network(root: Path) -> None:
    (made,) = trainings(ARMS[:1], root, torch.float32)
    assert type(together([made], "stacked")) is SideBySide


def test_tests_and_results_are_those_of_each_alone(root: Path) -> None:
    trials = [replace(one, held_out=80, depth=8, epochs=1) for one in ARMS[:2]]
    found = []
    for way in ("stacked", "separate"):
        made = trainings(trials, root, torch.float64)
        engine = together(made, way)
        engine.epoch()
        found.append(engine.results())
    for mine, theirs in zip(*found, strict=True):
        assert list(mine) == list(theirs)
        for name in ("test_accuracy", "validation_accuracy", "test_accuracy_reestimated", "h"):
            assert mine[name] == theirs[name], name
        assert mine["curve"]["train_loss"] == pytest.approx(theirs["curve"]["train_loss"], rel=1e-12)
        assert mine["feature_steps"] == pytest.approx(theirs["feature_steps"], rel=1e-9)


def test_reestimated_statistics_are_those_of_each_alone(root: Path) -> None:
    made, separate = (trainings(ARMS[:2], root, torch.float64) for _ in range(2))
    stacked = Stacked(made)
    with torch.no_grad():
        made[0].network.bn.running_var.fill_(math.nan)  # is forgotten
    stacked.reestimate()
    for training in separate:
        training.reestimate()
    assert max(differences(made, separate, 1)) < 1e-10


def test_in_a_stack_in_bf16_the_residual_stream_is_fp32(root: Path) -> None:
    made = trainings([replace(one, precision="bf16") for one in ARMS[:2]], root, torch.float32)
    stacked = Stacked(made)
    seen: list[torch.dtype] = []
    branches: list[torch.dtype] = []
    for block in stacked.blocks:
        block.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    inner = stacked.fast

    def watched(*arguments: object) -> Tensor:
        branches.append(torch.get_autocast_dtype("cpu"))
        return inner(*arguments)

    stacked.fast = watched
    go(stacked, 1)
    assert set(seen) == {torch.float32} and set(branches) == {torch.bfloat16}
    assert all(training.rows[0].isfinite().all() for training in made)


def test_h_costs_no_pass_over_the_features(root: Path) -> None:
    """No kernel of a forward with h = 0.1 that one with h = 1 has not."""
    names = []
    for h in (1.0, 0.1):
        network = stack([build(replace(SMALL, h=h, depth=8)) for _ in range(2)])
        x = torch.randn(4, 6, 8, 8)
        with torch.profiler.profile() as profile:
            network(x)
        large = [e.name for e in profile.events() if e.name.startswith("aten::")]
        names.append(sorted(large))
    assert names[0] == names[1]
    assert sum(isinstance(m, Blocks) for m in network.modules()) == 3
    assert not any(isinstance(m, nn.Conv2d) and m.groups == 1 for m in network.modules())
