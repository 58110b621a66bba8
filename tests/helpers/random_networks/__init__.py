"""Random residual networks, each with what its generator knows of it.

A network is Python source: a few small classes with `Network` on top, in a module that is imported from a file as any
other. The source is made from one template in which the text between `<<` and `>>` belongs to the *twin* alone: the
same network with its step factors written out, `x + self.h0 * f` where the network itself says `x + f`. Beside the two
sources the generator states which additions are steps, of which kind, and how often each runs in a forward; every line
that holds a step ends in the comment `# step`.

The files of this package, in the order in which a network comes about:

- `choices`: what a network may be put together from, and how a choice is drawn;
- `parts`: modules and functions that a source contains beside its own classes;
- `text`: the template and its classes, the two sources, and the steps by their names;
- `layers`: the skip and the branch; `additions`: the ways to add the two;
- `blocks`: classes with steps; `networks`: where blocks are called, up to the whole network;
- `running`: from the source to a module, with random parameters, inputs and factors.

>>> from hypothesis import find
>>> network = find(random_networks(), lambda network: len(network.steps) == 1)
>>> [step.module for step in network.steps]
['u0']
"""

from tests.helpers.random_networks.choices import FEATURES
from tests.helpers.random_networks.networks import random_networks
from tests.helpers.random_networks.running import imported, random_input, randomize, set_factors
from tests.helpers.random_networks.text import LEFT_ALONE, KnownStep, RandomNetwork

__all__ = [
    "FEATURES",
    "LEFT_ALONE",
    "KnownStep",
    "RandomNetwork",
    "imported",
    "random_input",
    "random_networks",
    "randomize",
    "set_factors",
]
