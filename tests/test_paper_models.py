"""The paper's networks: sizes against published ones, shapes, and the residual steps that the library finds in them."""

import doctest

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import eulernet
from reproductions.models import VDCNN, CifarResNet, ResidualMLP, mlp, resnet, vdcnn
from reproductions.models.vdcnn import LargestInOrder


@pytest.mark.parametrize("module", [mlp, resnet, vdcnn], ids=lambda module: module.__name__)
def test_examples_in_docstrings_run(module: object) -> None:
    assert doctest.testmod(module).failed == 0  # type: ignore[arg-type]


def size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# ---- the CIFAR network
@pytest.mark.parametrize(
    ("depth", "millions", "digits"), [(20, 0.27, 2), (32, 0.46, 2), (44, 0.66, 2), (56, 0.85, 2), (110, 1.7, 1)]
)
def test_resnets_have_the_published_numbers_of_parameters(depth: int, millions: float, digits: int) -> None:
    """He et al. (2016), table 6, whose shortcuts have no parameters: ours add two projections with their BN."""
    projections = 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64
    assert round((size(CifarResNet(depth)) - projections) / 1e6, digits) == millions


@pytest.mark.parametrize("norm", [True, False], ids=["BN", "no BN"])
@pytest.mark.parametrize(("depth", "steps"), [(20, 9), (56, 27), (110, 54), (218, 108)])
def test_resnets_have_a_step_a_block(depth: int, steps: int, norm: bool) -> None:
    found = eulernet.find_steps(CifarResNet(depth, norm), example_inputs=torch.zeros(2, 3, 32, 32))
    assert [step.kind for step in found].count("projection") == 2
    assert {step.depth for step in found} == {len(found)} == {steps}
    assert not found.long and not found.unsupported and not found.unreached


def test_resnet_stages_halve_the_image_and_double_the_width() -> None:
    x, shapes = torch.zeros(3, 3, 32, 32), []
    network = CifarResNet(20)
    x = network.conv(x)
    for stage in network.stages:
        x = stage(x)
        shapes.append(tuple(x.shape[1:]))
    assert shapes == [(16, 32, 32), (32, 16, 16), (64, 8, 8)]
    assert network(torch.zeros(3, 3, 16, 16)).shape == (3, 10)


# ---- the text network
@pytest.mark.parametrize(("less", "more", "millions"), [(9, 17, 2.1), (17, 29, 0.3), (29, 49, 3.2)])
def test_vdcnns_grow_as_published(less: int, more: int, millions: float) -> None:
    """Conneau et al. (2017), table 2: 2.2, 4.3, 4.6 and 7.8 million, without the linear maps.

    What they count around the blocks is not said; the differences do not depend on it, and carry the error of two
    rounded numbers, 0.1.
    """
    assert (size(VDCNN(more).levels) - size(VDCNN(less).levels)) / 1e6 == pytest.approx(millions, abs=0.1)


@pytest.mark.parametrize(("original", "hidden"), [(False, 1024), (True, 2048)])
def test_vdcnn_head_is_that_of_the_paper(original: bool, hidden: int) -> None:
    shapes = [tuple(m.weight.shape) for m in VDCNN(9, original=original).head if isinstance(m, nn.Linear)]
    assert shapes == [(hidden, 4096), (hidden, hidden), (4, hidden)]


@pytest.mark.parametrize("original", [False, True], ids=["authors", "original"])
@pytest.mark.parametrize("norm", [True, False], ids=["BN", "no BN"])
@pytest.mark.parametrize(("depth", "steps"), [(9, 4), (17, 8), (29, 14), (49, 24)])
def test_vdcnns_have_a_step_a_block(depth: int, steps: int, norm: bool, original: bool) -> None:
    letters = torch.zeros(2, 128, dtype=torch.int64)
    found = eulernet.find_steps(VDCNN(depth, norm, original=original), example_inputs=letters)
    assert [step.kind for step in found].count("projection") == 3
    assert {step.depth for step in found} == {len(found)} == {steps}
    assert not found.long and not found.unsupported and not found.unreached


def test_vdcnn_has_as_many_convolutions_as_its_depth() -> None:
    for depth in vdcnn.BLOCKS:
        convolutions = [m for m in VDCNN(depth).modules() if isinstance(m, nn.Conv1d) and m.kernel_size == (3,)]
        assert len(convolutions) == depth


def test_k_max_pooling_keeps_the_largest_values_in_order() -> None:
    x = torch.tensor([[[3.0, 9.0, 1.0, 7.0, 8.0]]])
    assert LargestInOrder(3)(x).tolist() == [[[9.0, 7.0, 8.0]]]


def test_original_vdcnn_starts_as_he_says() -> None:
    weight = VDCNN(9, original=True).levels[3][1].conv2.weight
    assert weight.std().item() == pytest.approx((2 / (3 * 512)) ** 0.5, rel=0.01)  # 5 standard errors and more


class Functional(nn.Module):
    """Two levels of VDCNN as somebody else writes it: no block modules, plain tensors, sums in place."""

    def __init__(self) -> None:
        super().__init__()
        self.look_up = nn.Embedding(70, 16)
        self.stem = nn.Conv1d(16, 64, 3, padding=1)
        self.a = nn.ModuleList(nn.Conv1d(n, n, 3, padding=1) for n in (64, 128))
        self.b = nn.ModuleList(nn.Conv1d(n, n, 3, padding=1) for n in (64, 128))
        self.wider = nn.Conv1d(64, 128, 3, padding=1)
        self.match = nn.Conv1d(64, 128, 1)
        self.last = nn.Conv1d(128, 128, 3, padding=1)
        self.out = nn.Linear(128, 4)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.stem(self.look_up(ids).permute(0, 2, 1))
        y = self.b[0](F.relu(self.a[0](x)))
        y += x
        x = F.max_pool1d(F.relu(y), 2)
        y = self.last(F.relu(self.wider(x)))
        x = F.relu(torch.add(y, self.match(x)))
        x = F.relu(x + self.b[1](F.relu(self.a[1](x))))
        return self.out(x.amax(dim=-1))


def test_a_vdcnn_written_differently_is_patched_as_well() -> None:
    network, letters = Functional(), torch.randint(70, (2, 64))
    plain = network(letters)
    eulernet.patch(network, h=1, example_inputs=letters)
    assert torch.equal(network(letters), plain)
    assert [step.kind for step in eulernet.steps(network)] == ["identity", "projection", "identity"]
    eulernet.set_h(network, 0.1)
    assert not torch.allclose(network(letters), plain)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: CifarResNet(21), r"depth of 6n \+ 2, such as 20, 56, 110 or 218, not 21"),
        (lambda: VDCNN(10), "depth of 9, 17, 29, 49, not 10"),
    ],
)
def test_depths_that_do_not_exist_are_refused(build: object, words: str) -> None:
    assert callable(build)
    with pytest.raises(ValueError, match=words):
        build()


def test_residual_mlp_has_a_step_a_block() -> None:
    assert len(eulernet.find_steps(ResidualMLP(7), example_inputs=torch.zeros(2, 2))) == 7
