"""The forms that an addition can take: operators, functions, methods, in place."""

from __future__ import annotations

import itertools
import operator
import types
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.ao.nn.quantized import FloatFunctional

from tests.traps.base import PROJECTION, Expected, Form, Trap, mlp, trap


@trap
class Plus(Form):
    """The plain form."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.a(x)


@trap
class BranchFirst(Form):
    """The branch is the left operand."""

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + x


@trap
class Minus(Form):
    """A step against the branch."""

    def forward(self, x: Tensor) -> Tensor:
        return x - self.a(x)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        return x - h[0] * self.a(x)


@trap
class InPlaceMinus(Minus):
    """A step against the branch, in place."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.clone()
        y -= self.a(x)
        return y


@trap
class TorchAdd(Form):
    """``torch.add``."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.add(x, self.a(x))


@trap
class TorchAddByKeyword(Form):
    """``torch.add`` with keywords, the branch first."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.add(other=x, input=self.a(x))


@trap
class TorchAddAlpha(Form):
    """A branch that has a factor already."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.add(x, self.a(x), alpha=0.5)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        return x + h[0] * (0.5 * self.a(x))


@trap
class TorchAddAlphaOnTheSkip(Form):
    """The factor that is there already belongs to the skip: h must not multiply it."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.add(self.a(x), x, alpha=0.5)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        return 0.5 * x + h[0] * self.a(x)


@trap
class TorchSubAlpha(Form):
    """``torch.sub`` with a factor."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sub(x, self.a(x), alpha=0.5)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        return x - h[0] * (0.5 * self.a(x))


@trap
class MethodAdd(Form):
    """``Tensor.add``."""

    def forward(self, x: Tensor) -> Tensor:
        return x.add(self.a(x))


@trap
class MethodAddAlpha(Form):
    """``Tensor.add`` with a factor."""

    def forward(self, x: Tensor) -> Tensor:
        return x.add(self.a(x), alpha=2)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        return x + h[0] * (2 * self.a(x))


@trap
class MethodAddInPlace(Form):
    """``Tensor.add_`` into the branch."""

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x).add_(x)


@trap
class MethodAddInPlaceStatement(Form):
    """``Tensor.add_`` into the skip, its result not used."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.clone()
        y.add_(self.a(x))
        return y


@trap
class InPlaceBranch(Form):
    """``+=`` into the branch, as in torchvision's ResNet."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.a(x)
        out += x
        return out


@trap
class InPlaceSkip(Form):
    """``+=`` into the skip."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.clone()
        y += self.a(x)
        return y


@trap
class InPlaceSlice(Form):
    """``+=`` into a slice: the other tokens stay as they are. A slice is a shape-matching map."""

    expected = PROJECTION

    def forward(self, x: Tensor) -> Tensor:
        y = x.clone()
        y[:, 1:] += self.a(x)[:, 1:]
        return y

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        return torch.cat((x[:, :1], x[:, 1:] + h[0] * self.a(x)[:, 1:]), dim=1)


BOTH_PARTS = tuple(Expected(f"<root>:{i}", kind="projection") for i in range(2))  # of one sum: no chain of two


@trap
class InPlaceSlices(Form):
    """``+=`` into one slice after the other, of what was made of the state before."""

    expected = BOTH_PARTS

    def forward(self, x: Tensor) -> Tensor:
        made, y = self.a(x), x.clone()
        y[:, :2] += made[:, :2]
        y[:, 2:] += made[:, 2:]
        return y

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        made = self.a(x)
        return torch.cat((x[:, :2] + h[0] * made[:, :2], x[:, 2:] + h[1] * made[:, 2:]), dim=1)


@trap
class InPlaceNarrow(InPlaceSlices):
    """The same through views that have no index."""

    def forward(self, x: Tensor) -> Tensor:
        made, y = self.a(x), x.clone()
        y.narrow(1, 0, 2).add_(made.narrow(1, 0, 2))
        y.narrow(1, 2, y.shape[1] - 2).add_(made[:, 2:])
        return y


@trap
class InPlaceOverlap(InPlaceSlices):
    """Some tokens are in both slices."""

    def forward(self, x: Tensor) -> Tensor:
        made, y = self.a(x), x.clone()
        y[:, :3] += made[:, :3]
        y[:, 1:] += made[:, 1:]
        return y

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        made, place = self.a(x), torch.arange(x.shape[1])[:, None]
        return x + h[0] * made * (place < 3) + h[1] * made * (place >= 1)


@trap
class PutIntoABuffer(Trap):
    """The state is put into new tensors first: as it is, behind others, part by part."""

    expected = tuple(Expected(f"<root>:{i}", depth=3, kind="projection" if i else "identity") for i in range(3))

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = mlp(), mlp(), mlp()

    def forward(self, x: Tensor) -> Tensor:
        whole = torch.zeros_like(x)
        whole[:] = x
        whole += self.a(x)
        longer = whole.new_zeros(x.shape[0], x.shape[1] + 1, x.shape[2])
        longer[:, 1:] = whole
        longer[:, 1:] += self.b(whole)
        state, parts = longer[:, 1:], torch.empty_like(x)
        parts[:, :2] = state[:, :2]
        parts[:, 2:] = state[:, 2:]
        return parts + self.c(state)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        for factor, branch in zip(h, (self.a, self.b, self.c), strict=True):
            x = x + factor * branch(x)
        return x


class InParts(Trap):
    """Branches of the state before, each added into a part of it."""

    expected = BOTH_PARTS

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = mlp(), mlp()

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        return torch.cat((x[:, :2] + h[0] * self.a(x)[:, :2], x[:, 2:] + h[1] * self.b(x)[:, 2:]), dim=1)


@trap
class PartsThatAreChangedAgain(InParts):
    """A part is multiplied, and a token masked, before the next part is added to."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        first, last, y = self.a(x)[:, :2], self.b(x)[:, 2:], x.clone()
        one, other = y[:, :2], y[:, 2:]
        one.add_(first).mul_(2.0)
        y[:, 0] = 0
        other.add_(last)
        return y

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        x = self.stem(x)
        one, other = 2 * (x[:, :2] + h[0] * self.a(x)[:, :2]), x[:, 2:] + h[1] * self.b(x)[:, 2:]
        return torch.cat((torch.zeros_like(one[:, :1]), one[:, 1:], other), dim=1)


@trap
class InPlaceViews(InParts):
    """Both views are made before either is written into."""

    def __init__(self) -> None:
        super().__init__()
        self.c = mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = self.c(x)
        first, last, y = self.a(x)[:, :2], self.b(x)[:, 2:], x.clone()
        one, other = y[:, :2], y[:, 2:]
        one += first
        other += last
        return y

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        return super().reference(self.c(x), h=h)


@trap
class SliceScatter(InParts):
    """Out of place, one part after the other."""

    def forward(self, x: Tensor) -> Tensor:
        first, last, end = self.a(x)[:, :2], self.b(x)[:, 2:], x.shape[1]
        x = torch.slice_scatter(x, x[:, :2] + first, 1, 0, 2)
        return torch.slice_scatter(x, x[:, 2:] + last, 1, 2, end)


@trap
class InPlaceModalities(Form):
    """Mixture of transformers: text and image tokens have a map each."""

    expected = BOTH_PARTS

    def __init__(self) -> None:
        super().__init__()
        self.b = mlp()

    def forward(self, x: Tensor) -> Tensor:
        y = x.clone()
        y[..., :2, :] += self.a(x[:, :2])
        y[..., 2:, :] += self.b(x[:, 2:])
        return y

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        return torch.cat((x[:, :2] + h[0] * self.a(x[:, :2]), x[:, 2:] + h[1] * self.b(x[:, 2:])), dim=1)


@trap
class InPlaceEntry(Form):
    """``+=`` into an entry of a dictionary."""

    def forward(self, x: Tensor) -> Tensor:
        features = {"x": x.clone()}
        features["x"] += self.a(x)
        return features["x"]


@trap
class InPlaceAttribute(Form):
    """``+=`` into an attribute."""

    def forward(self, x: Tensor) -> Tensor:
        state = types.SimpleNamespace(x=x.clone())
        state.x += self.a(x)
        return state.x


@trap
class InPlaceIndexOnce(Form):
    """``+=`` at an index that may be evaluated once only."""

    def forward(self, x: Tensor) -> Tensor:
        states, index = [x.clone(), torch.zeros_like(x)], itertools.count()
        states[next(index)] += self.a(x)
        return states[0] + next(index)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        return x + h[0] * self.a(x) + 1


@trap
class InPlaceSeenThroughAView(Form):
    """An in-place addition shows in every view of the tensor."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.a(x)
        view = out.flatten(1)
        out += x
        return view * 2

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        return 2 * (x + h[0] * self.a(x)).flatten(1)


@trap
class OperatorAdd(Form):
    """``operator.add``."""

    def forward(self, x: Tensor) -> Tensor:
        return operator.add(x, self.a(x))


@trap
class OperatorInPlaceAdd(Form):
    """``operator.iadd``."""

    def forward(self, x: Tensor) -> Tensor:
        return operator.iadd(self.a(x), x)


@trap
class DunderAdd(Form):
    """The special method, called by name."""

    def forward(self, x: Tensor) -> Tensor:
        return x.__add__(self.a(x))


@trap
class AFloatFunctional(Form):
    """``FloatFunctional.add``: a module whose forward is never called."""

    expected = (Expected("plus"),)

    def __init__(self) -> None:
        super().__init__()
        self.plus = FloatFunctional()

    def forward(self, x: Tensor) -> Tensor:
        return self.plus.add(x, self.a(x))


class Add(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b


@trap
class AdditionModule(Form):
    """A module that adds: the branch was begun by its caller."""

    expected = (Expected("add"),)

    def __init__(self) -> None:
        super().__init__()
        self.add = Add()

    def forward(self, x: Tensor) -> Tensor:
        return self.add(x, self.a(x))


@trap
class WideningAddition(Form):
    """A float32 stream with a bfloat16 branch: the result is float32, and h * F is not rounded to bfloat16."""

    def branch(self, x: Tensor) -> Tensor:
        return self.a(x).bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        return x + h[0] * self.branch(x).to(x.dtype)


@trap
class NarrowingInPlaceAddition(Form):
    """In place the dtype of the left side stays, here that of the branch."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.a(x).bfloat16()
        out += x
        return out

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        return (x + h[0] * self.a(x).bfloat16().to(x.dtype)).bfloat16()
