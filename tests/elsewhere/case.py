"""How a model of someone else's package is written down: what builds it, what it takes, how many steps it has."""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

import torch
from torch import nn

from eulernet._find.inputs import as_arguments
from tests.helpers.zoo import Specimen, first_that_runs


class Call:
    """A call that is made when it is needed, by its dotted name, so that a table needs no package to be read.

    Arguments that are calls themselves, in lists and dicts as well, are made first.
    """

    def __init__(self, name: str, *args: Any, **options: Any) -> None:
        self.name = name
        self.args = args
        self.options = options

    def __call__(self) -> Any:
        module, _, attribute = self.name.rpartition(".")
        try:
            function = getattr(importlib.import_module(module), attribute)
        except ModuleNotFoundError:  # a class's own builder
            module, _, name = module.rpartition(".")
            function = getattr(getattr(importlib.import_module(module), name), attribute)
        return function(*made(self.args), **made(self.options))


def made(value: Any) -> Any:
    """`value` with the calls in it made."""
    if isinstance(value, Call):
        return value()
    if isinstance(value, dict):
        return {key: made(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(made(item) for item in value)
    return value


def floats(*shape: int) -> Call:
    """Normal numbers of that shape."""
    return Call("torch.randn", *shape)


def ids(below: int, *shape: int) -> Call:
    """Whole numbers from 0 up to and without `below`."""
    return Call("torch.randint", below, shape)


class Case(NamedTuple):
    """A model of another package.

    Attributes:
        model: builds it.
        inputs: as for `example_inputs`: a tensor, a tuple of positional arguments or a dict of keyword arguments.
        steps: how many residual steps it has, long ones left out. About half were counted in the source before the
            library saw the model; some hundred (of spandrel, diffusers, monai, pytorchcv) are the library's own count,
            which guards against change.
        long: how many long ones.
        missed: how many steps more there are that the library cannot scale, each of which it has to name.
        cannot: what the original itself cannot do: "float64", "autocast", "channels_last", "train".
        rounded: whether its branches end in float32, whatever it is given.
        name: where it is not the class's.
    """

    model: Call
    inputs: Any
    steps: int
    long: int = 0
    missed: int = 0
    cannot: str = ""
    rounded: bool = False
    name: str = ""

    def __str__(self) -> str:
        return self.name or self.model.name.rpartition(".")[2]


def specimen(case: Case) -> Specimen:
    """The model with random weights, and its inputs."""

    def build() -> Specimen:
        model = case.model()
        assert isinstance(model, nn.Module)
        torch.manual_seed(0)
        example = made(case.inputs)
        arguments = as_arguments(example)
        return Specimen(model, arguments, arguments, example, frozenset(case.cannot.split()), case.rounded)

    return first_that_runs(iter([build]))
