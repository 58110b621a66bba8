"""Where the expression of the addition stands: lines, nested functions, other methods."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from tests.traps.base import DIM, Expected, Form, Trap, each, mlp, trap, two


class Pair(Trap):
    """Two steps in one module."""

    expected = two()

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = mlp(), mlp()

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        x = x + h[0] * self.a(x)
        return x + h[1] * self.b(x)


@trap
class TwoOnALine(Pair):
    """Two steps on one line."""

    # fmt: off
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.a(x); x = x + self.b(x)  # noqa: E702
        return x
    # fmt: on


@trap
class OneWithinAnother(Pair):
    """One step is an operand of the other."""

    def forward(self, x: Tensor) -> Tensor:
        return (y := x + self.a(x)) + self.b(y)


@trap
class OnSeveralLines(Pair):
    """Expressions with line breaks and comments in them."""

    # fmt: off
    def forward(self, x: Tensor) -> Tensor:
        x = (
            x  # the skip
            + self.a(  # the branch
                x
            )
        )
        return x \
            + self.b(x)
    # fmt: on


@trap
class BehindOtherAlphabets(Pair):
    """Columns count bytes, not characters."""

    # fmt: off
    def forward(self, x: Tensor) -> Tensor:
        größe = {"ширина": x, "高さ": 2}; x = größe["ширина"] + self.a(größe["ширина"])  # noqa: E702
        return {"é": x}["é"] + self.b(x)
    # fmt: on


@trap
class LeftIsEvaluatedFirst(Form):
    """The operands take what the one before them left."""

    def forward(self, x: Tensor) -> Tensor:
        states = [x.relu(), x]
        return states.pop() + self.a(states.pop())

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        return x + h[0] * self.a(x.relu())


@trap
class DropoutOnBothOperands(Form):
    """Two dropouts must not change places, or each gets the other's random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.a(x)) + self.drop(x)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        branch = self.drop(self.a(x))
        return self.drop(x) + h[0] * branch


@trap
class NameGivenInTheLeftOperand(Form):
    """The right operand uses a name that the left one binds (post-norm)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(DIM)

    def forward(self, x: Tensor) -> Tensor:
        return (y := self.norm(x)) + self.a(y)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        x = self.norm(x)
        return x + h[0] * self.a(x)


@trap
class ConditionalExpression(Trap):
    """One class whose instances differ: some have a step there and some have none."""

    expected = each("blocks.0", "blocks.2")

    class Maybe(nn.Module):
        def __init__(self, residual: bool) -> None:
            super().__init__()
            self.residual, self.a = residual, mlp()

        def forward(self, x: Tensor) -> Tensor:
            return x + self.a(x) if self.residual else self.a(x) + 1

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(self.Maybe(residual) for residual in (True, False, True)))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        first, middle, last = (block.a for block in self.blocks)
        x = middle(x + h[0] * first(x)) + 1
        return x + h[1] * last(x)


@trap
class InAComprehension(Form):
    """A comprehension is a function of its own in Python 3.11."""

    expected = (Expected(calls=2, depth=2),)

    def forward(self, x: Tensor) -> Tensor:
        return [x := x + self.a(x) for _ in range(2)][-1]

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        x = x + h[0] * self.a(x)
        return x + h[0] * self.a(x)


@trap
class InAGenerator(Pair):
    """The frame that adds is a generator's."""

    def states(self, x: Tensor) -> Iterator[Tensor]:
        for branch in (self.a,):
            x = x + branch(x)
            yield x
        yield x + self.b(x)

    def forward(self, x: Tensor) -> Tensor:
        return list(self.states(x))[-1]


@trap
class InALambda(Form):
    """A lambda that is called by somebody else."""

    def forward(self, x: Tensor) -> Tensor:
        return functools.reduce(lambda y, branch: y + branch(y), [self.a], x)


@trap
class InANestedFunction(Form):
    """A nested function that uses ``self``."""

    def forward(self, x: Tensor) -> Tensor:
        def step(y: Tensor) -> Tensor:
            return y + self.a(y)

        return step(x)


@trap
class InANestedFunctionWithoutSelf(Form):
    """A nested function that does not use ``self``."""

    def forward(self, x: Tensor) -> Tensor:
        branch = self.a

        def step(y: Tensor) -> Tensor:
            return y + branch(y)

        return step(x)


@trap
class FirstArgumentOfAnotherName(Form):
    """The first argument is not called ``self``."""

    def forward(module, x: Tensor) -> Tensor:
        return x + module.a(x)


@trap
class PrivateNames(Trap):
    """Names with two underscores are mangled with the class's name."""

    def __init__(self) -> None:
        super().__init__()
        self.__branch = mlp()

    def forward(self, x: Tensor) -> Tensor:
        __y = x
        return __y + self.__branch(__y)

    def reference(self, x: Tensor, *, h: Sequence[float]) -> Tensor:
        return x + h[0] * self.__branch(x)


@trap
class KeywordOnly(Form):
    """Keyword-only arguments with defaults, and defaults of positional ones."""

    def forward(self, x: Tensor, sign: int = 1, *, again: bool = True) -> Tensor:
        return x + sign * self.a(x) if again else x


@trap
class InAMethod(Form):
    """``forward`` only calls the method that adds, as in torchvision."""

    def _forward_impl(self, x: Tensor) -> Tensor:
        return x + self.a(x)

    def forward(self, x: Tensor) -> Tensor:
        return self._forward_impl(x)


@trap
class InAStaticMethod(Form):
    """The function that adds has no module among its arguments."""

    @staticmethod
    def plus(x: Tensor, f: Tensor) -> Tensor:
        return x + f

    def forward(self, x: Tensor) -> Tensor:
        return self.plus(x, self.a(x))
