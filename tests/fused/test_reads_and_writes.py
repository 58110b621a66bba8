"""Where code reads or writes what a kernel would put off, it is not put off."""

import copy
from typing import Any

import pytest
import torch
from timm.layers import DropPath
from torch import Tensor, nn

import eulernet
from eulernet import kernels
from tests.helpers.checks import run, train
from tests.helpers.fused import DEVICE, InStatements, images, randomized

pytest.importorskip("triton")

# The interpreter of Triton 3.6 makes numbers of arrays with one element. NumPy warns of it, and refuses it from 2.4 on.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")


class Odd(nn.Module):
    """A batch norm whose result is not simply added."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.drop_path = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), DropPath(0.5)
        self.kept: Any = None


class ReadBetween(Odd):
    def forward(self, x: Tensor) -> Tensor:
        out = self.bn(self.conv(x))
        self.kept = out.mean()
        out += x
        return out


class ReadAfter(Odd):
    def forward(self, x: Tensor) -> Tensor:
        out = self.bn(self.conv(x))
        y = x + out
        return y * out.sigmoid()


class ReadByAFunction(Odd):
    def forward(self, x: Tensor) -> Tensor:
        out = self.bn(self.conv(x))
        self.kept = lambda: out.mean()
        return x + out


class ReadInALoop(Odd):
    def forward(self, x: Tensor) -> Tensor:
        out = x
        for _ in range(2):
            x = x + out.mean() * 0.1
            out = self.bn(self.conv(x))
            x = x + out
        return x + out.mean()


class ReadWithAllLocals(Odd):
    def forward(self, x: Tensor) -> Tensor:
        out = self.bn(self.conv(x))
        self.kept = locals()["out"].mean()
        return x + out


class ReadAfterAnError(Odd):
    def forward(self, x: Tensor) -> Tensor:
        out = self.conv(x)
        try:
            out = self.bn(out)
            out = out + x.view(-1)[:0].view(x.shape) if self.kept else out + x
        except RuntimeError:
            return out * 2
        return out


class Augmented(Odd):
    def forward(self, x: Tensor) -> Tensor:
        out = self.bn(self.conv(x))
        out *= 2
        out += x
        return out


class TwoSums(Odd):
    def forward(self, x: Tensor) -> Tensor:
        out = self.bn(self.conv(x))
        self.kept = out + 1
        y = out + x
        return y


class Chosen(Odd):
    def forward(self, x: Tensor) -> Tensor:
        out = self.conv(x)
        if self.kept is None:
            out = self.bn(out)
        else:
            out, _ = self.bn(out) * 2, None
        return x + self.drop_path(out)


class Twice(Odd):
    """Each of two sums has the result of one batch norm as its branch."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn(self.conv(x))
        y = x + out
        return y + torch.relu(x + out)


@pytest.mark.parametrize(
    "build",
    [ReadBetween, ReadAfter, ReadByAFunction, ReadInALoop, ReadWithAllLocals, ReadAfterAnError, Augmented, TwoSums,
     Chosen, Twice],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore::eulernet.EulernetWarning")
def test_a_result_that_is_read_elsewhere_is_a_tensor(build: type[Odd], launches: list[str]) -> None:
    model, x = randomized(build()).double(), images().double()
    eulernet.patch(model, h=0.3, example_inputs=x)
    for kept in (None, True):
        model.kept = kept
        model.zero_grad()
        plain = copy.deepcopy(model)
        expected, also_expected = train(plain, ((x,), {})), run(plain, ((x,), {}))
        with kernels.mode("triton"):
            actual, also_actual = train(model, ((x,), {})), run(model, ((x,), {}))
        for a, e in zip([*actual, *also_actual], [*expected, *also_expected], strict=True):
            torch.testing.assert_close(a, e)
        read, also_read = (m.kept() if callable(m.kept) else m.kept for m in (model, plain))
        if isinstance(also_read, Tensor):
            torch.testing.assert_close(read, also_read)


def test_masks_are_drawn_where_the_original_draws_them() -> None:
    """The dropout of the skip draws after drop path, and the batch norm's statistics are those of one call."""
    model, x = randomized(InStatements()), images()
    eulernet.patch(model, h=0.3, example_inputs=x)
    plain = copy.deepcopy(model)
    torch.manual_seed(1)
    expected, after = plain(x), torch.rand(1)
    torch.manual_seed(1)
    with kernels.mode("triton"):
        actual = model(x)
    assert torch.equal(torch.rand(1), after)
    torch.testing.assert_close(actual, expected)
    assert model.bn3.num_batches_tracked == plain.bn3.num_batches_tracked == 1


class WritesBehind(Odd):
    """Writes into what batch norm was called with, as only a model without training can."""

    def forward(self, x: Tensor) -> Tensor:
        given = self.conv(x)
        out = self.bn(given)
        self.kept = given.mul_(2)
        out += x
        return out


class WritesBehindTwoNames(Odd):
    def forward(self, x: Tensor) -> Tensor:
        out = given = self.conv(x)
        out = self.bn(out)
        self.kept = given.mul_(2)
        out += x
        return out


class WritesBehindALaterName(Odd):
    def forward(self, x: Tensor) -> Tensor:
        out = self.conv(x)
        if self.kept is None:
            given = out
            out = self.bn(out)
            given.mul_(2)
        out += x
        return out


class WritesInTheAddition(Odd):
    def forward(self, x: Tensor) -> Tensor:
        out = given = self.conv(x)
        out = self.bn(out)
        return x + 0 * given.mul_(2) + out


class WritesAfterTheBranch(Odd):
    def forward(self, x: Tensor) -> Tensor:
        given = self.conv(x)
        return self.bn(given) + x.add(0 * given.mul_(2))


class ReadsBesideTheBranch(Odd):
    def forward(self, x: Tensor) -> Tensor:
        out = self.conv(x)
        out = self.bn(out)
        return self.drop_path(out) + x.add(0 * out.mul_(2))


class WritesIntoWhatIsKept(Odd):
    """By a reference that the source of the block does not show."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv(x)
        out = self.bn(out)
        self.kept.mul_(2)
        out += x
        return out


@pytest.mark.parametrize("inference", [False, True], ids=["", "inference mode"])
@pytest.mark.parametrize(
    "build",
    [WritesBehind, WritesBehindTwoNames, WritesBehindALaterName, WritesInTheAddition, WritesAfterTheBranch,
     ReadsBesideTheBranch],
)  # fmt: skip
def test_nothing_waits_whose_input_others_may_write_into(
    build: type[Odd], inference: bool, launches: list[str]
) -> None:
    """In inference mode no version of a tensor would tell."""
    x, model = images(), randomized(build()).eval()
    eulernet.patch(model, h=0.3, example_inputs=x)
    with torch.inference_mode(inference), torch.no_grad():
        model.kept = None
        expected = model(x)
        model.kept = None
        with kernels.mode("triton"):
            torch.testing.assert_close(model(x), expected)
    assert launches == []


def test_what_waits_must_not_change() -> None:
    """Where the source does not show that it does, it is an error."""
    x = images()
    with torch.no_grad():
        model = WritesIntoWhatIsKept().to(DEVICE).eval()
        model.conv.register_forward_hook(lambda module, args, out: setattr(model, "kept", out))
        eulernet.patch(model, h=0.3, example_inputs=x)
        expected = model(x)
        with (
            kernels.mode("triton"),
            pytest.raises(eulernet.EulernetError, match=r'modified in place .*mode\("torch"\)'),
        ):
            model(x)
        with kernels.mode("torch"):
            torch.testing.assert_close(model(x), expected)
