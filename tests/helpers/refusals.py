"""An error is raised, says what it must say, and has changed nothing."""

import re
from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

import eulernet
from eulernet import EulernetError


def snapshot(model: nn.Module) -> list[Any]:
    return [
        [(name, type(module), sorted(vars(module)), module.training) for name, module in model.named_modules()],
        [(name, id(value)) for name, value in model.state_dict(keep_vars=True).items()],
        [hook for module in model.modules() for hook in (*module._forward_hooks, *module._forward_pre_hooks)],
    ]


def refused(model: nn.Module, call: Callable[[], Any], *words: str) -> EulernetError:
    """The call raises with all these words (regular expressions) and leaves the model as it was."""
    before, patched = snapshot(model), eulernet.is_patched(model)
    with pytest.raises(EulernetError) as caught:
        call()
    message = str(caught.value)
    for word in words:
        assert re.search(word, message), f"{word!r} is not in: {message}"
    assert snapshot(model) == before
    assert eulernet.is_patched(model) is patched
    return caught.value
