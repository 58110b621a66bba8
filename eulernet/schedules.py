"""h from depth: the rules of the literature. h over training time: `HScheduler`.

A rule is a function of a `Step`: `eulernet.patch(model, h=eulernet.schedules.inverse())`. D is the depth of the step's
residual stream, the number of its additions: 54 in a ResNet-110 for CIFAR, 24 in a ViT of 12 blocks, each of which adds
twice. Where a source counts L blocks of two additions, D = 2 L, and the rules say what that makes of their constant.

With the rules stands what they mean for the learning rate. To first order, an optimiser's step changes what the network
computes by an amount that grows as lr * sum(h^2) under SGD and as lr * sum(h) under Adam, the sums over the D steps: h
scales each branch, and under SGD the branch's gradient as well. "The learning rate goes as ..." says what keeps this
amount the same at all depths.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from eulernet._checks import positive, whole_number
from eulernet._step import Step

if TYPE_CHECKING:  # it lies above; the package puts it here
    from eulernet._tune.scheduler import HScheduler

__all__ = ["HScheduler", "constant", "decreasing", "inverse", "inverse_sqrt", "transfer"]


@dataclass(frozen=True)
class constant:
    """h for every step, at any depth.

    The paper's main experiments have h = 0.1 (Zhang et al., IJCAI 2019, Section 4). Other networks with a constant:
    Inception-ResNet 0.1 to 0.2, EDSR 0.1, NFNet 0.2, Granite 0.22.

    The learning rate goes as 1 / D, under SGD and under Adam, as in a network with h = 1; for another h, as 1 / h^2
    under SGD and 1 / h under Adam.

    Args:
        h: the step factor, positive.

    Raises:
        EulernetError: h is not a positive, finite number.

    Example:
        >>> import torch, eulernet
        >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> first, second = eulernet.find_steps(layer, example_inputs=torch.zeros(2, 5, 8))
        >>> rule = constant(0.1)
        >>> rule, rule(first), rule(second)
        (constant(h=0.1), 0.1, 0.1)
    """

    h: float

    def __post_init__(self) -> None:
        positive(self.h, "h", "constant(0.1)")

    def __call__(self, step: Step) -> float:
        return float(self.h)


@dataclass(frozen=True)
class inverse_sqrt:
    """c / sqrt(D). With c = 1 it is what h="auto" means.

    It keeps the variance of the stream bounded as D grows: tau-ResNet (arXiv:1903.07120), Stable ResNet with uniform
    scaling (arXiv:2010.12859), Depth-muP (arXiv:2310.02244); for weights that are initialised independently, any other
    power of D ends in an explosion or in the identity (Marion et al., arXiv:2206.06929). Beside the optima that the
    paper found by grid search (Zhang et al., IJCAI 2019, Fig. 6):

        D                  8      9           24     54         108
        1 / sqrt(D)        0.354  0.333       0.204  0.136      0.096
        best in the paper  0.5    0.1 to 2    0.3    near 0.1   near 0.1

    Where a source counts L blocks of two additions, its 1 / sqrt(L) is `inverse_sqrt(c=2**0.5)`.

    The learning rate is the same at all depths under SGD, and goes as 1 / sqrt(D) under Adam.

    Args:
        c: a positive number.

    Raises:
        EulernetError: c is not a positive, finite number.

    Example:
        >>> import torch, eulernet
        >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> model = torch.nn.TransformerEncoder(layer, 8)
        >>> steps = eulernet.find_steps(model, example_inputs=torch.zeros(2, 5, 8))
        >>> rule = inverse_sqrt()
        >>> rule, steps[0].depth, rule(steps[0])
        (inverse_sqrt(c=1), 16, 0.25)
    """

    c: float = 1

    def __post_init__(self) -> None:
        positive(self.c, "c", "inverse_sqrt(c=1)")

    def __call__(self, step: Step) -> float:
        return self.c / math.sqrt(step.depth)


@dataclass(frozen=True)
class inverse:
    """c / D.

    With it the bounds of Propositions 1 and 2 (Zhang et al., IJCAI 2019) do not depend on the depth: in the spectral
    norm gradients grow by at most (1 + c W / D)^D < exp(c W), and noise by at most h D W = c W. CompleteP
    (arXiv:2505.01618) has it for transformers, Marion et al. (arXiv:2206.06929) for weights that change smoothly from
    layer to layer. It is smaller than the optima of the paper's grid search in deep networks (0.009 against 0.1 at
    D = 108).

    Where a source counts L blocks of two additions, its 1 / L is `inverse(c=2)`.

    The learning rate goes as D under SGD, and is the same at all depths under Adam.

    Args:
        c: a positive number.

    Raises:
        EulernetError: c is not a positive, finite number.

    Example:
        >>> import torch, eulernet
        >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> model = torch.nn.TransformerEncoder(layer, 8)
        >>> steps = eulernet.find_steps(model, example_inputs=torch.zeros(2, 5, 8))
        >>> rule = inverse(c=2)
        >>> rule, steps[0].depth, rule(steps[0])
        (inverse(c=2), 16, 0.125)
    """

    c: float = 1

    def __post_init__(self) -> None:
        positive(self.c, "c", "inverse(c=1)")

    def __call__(self, step: Step) -> float:
        return self.c / step.depth


@dataclass(frozen=True)
class transfer:
    """(base_depth / D)^alpha: what is tuned at the depth `base_depth` is used at the depth D.

    At the base depth h = 1, and the patched model computes the bits of the original. With m = D / base_depth:

        source                              alpha   rate    Adam's epsilon   AdamW's decay
        CompleteP (arXiv:2505.01618)        1       1       1 / m            1
        Depth-muP (arXiv:2310.02244)        1/2     1 / sqrt(m) under Adam, 1 under SGD
        in between                          alpha   m^(alpha - 1) under Adam, m^(2 alpha - 1) under SGD

    are the factors of what the branches hold; all else keeps its own. `eulernet.param_groups(model, lr=...,
    transfer=...)` makes the groups. With alpha = 1 the rate under Adam is one number for all depths and parameters, and
    nothing but this rule is needed. Whether it pays is measured in `docs/train-deeper.md`; `eulernet.depth_check` shows
    for a model at hand what moves with depth. Initial values that fall with depth themselves, as GPT-2's output
    projections do by 1 / sqrt(D), count the depth twice: `patch` says so, and how to have it once.

    Args:
        base_depth: D of the model that was tuned, counted as `Step.depth` counts it: 2 n for a transformer of n blocks
            that add twice, `eulernet.find_steps(base_model)[0].depth`.
        alpha: a positive number; the sources have 1/2 and 1.

    Raises:
        EulernetError: `base_depth` is no positive whole number, or alpha is not a positive, finite number.

    Example:
        >>> import torch, eulernet
        >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> model = torch.nn.TransformerEncoder(layer, 8)
        >>> steps = eulernet.find_steps(model, example_inputs=torch.zeros(2, 5, 8))
        >>> rule = transfer(base_depth=4)
        >>> rule, steps[0].depth, rule(steps[0]), transfer(base_depth=4, alpha=0.5)(steps[0])
        (transfer(base_depth=4, alpha=1.0), 16, 0.25, 0.5)
    """

    base_depth: int
    alpha: float = 1.0

    def __post_init__(self) -> None:
        whole_number(self.base_depth, "base_depth", "transfer(base_depth=8)", least=1)
        positive(self.alpha, "alpha", "transfer(base_depth=8, alpha=1.0)")

    def deeper(self, step: Step) -> float:
        """m, how many times deeper than the base the step's stream is."""
        return step.depth / self.base_depth

    def __call__(self, step: Step) -> float:
        return float((self.base_depth / step.depth) ** self.alpha)


@dataclass(frozen=True)
class decreasing:
    """1 / (sqrt(l) * log(l + 1)), where l is the step's position in its stream, from 1, and log the natural logarithm.

    Stable ResNet with decreasing scaling (arXiv:2010.12859): sum(h^2) stays finite however deep the network is, so that
    a step's h does not depend on how many follow. The first step gets 1 / log(2) = 1.44, more than 1: so the formula
    says, and it is not capped here. A module that is called several times has the h of its first call.

    The learning rate is the same at all depths under SGD, and goes as log(D) / sqrt(D) under Adam.

    Example:
        >>> import torch, eulernet
        >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> rule = decreasing()
        >>> steps = eulernet.find_steps(layer, example_inputs=torch.zeros(2, 5, 8))
        >>> rule, [(step.position, round(rule(step), 3)) for step in steps]
        (decreasing(), [(1, 1.443), (2, 0.644)])
    """

    def __call__(self, step: Step) -> float:
        return 1 / (math.sqrt(step.position) * math.log(step.position + 1))


FALLING = (inverse_sqrt, inverse, decreasing, transfer)  # with depth
