"""What to write for a model whose inputs are not known: an example that fits it."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from torch import nn

_DICTS = frozenset("batch data features windows_batch inputs_dict".split())  # arguments that are dicts by custom

_FORMS: list[tuple[type[nn.Module] | tuple[type[nn.Module], ...], Callable[..., str]]] = [
    ((nn.Embedding, nn.EmbeddingBag), lambda m: "torch.zeros(2, 16, dtype=torch.int64)"),
    (nn.Conv1d, lambda m: f"torch.zeros(2, {m.in_channels}, 1024)"),
    (nn.Conv2d, lambda m: f"torch.zeros(2, {m.in_channels}, 224, 224)"),
    (nn.Conv3d, lambda m: f"torch.zeros(2, {m.in_channels}, 16, 112, 112)"),
    (nn.Linear, lambda m: f"torch.zeros(2, {m.in_features})"),
    (nn.RNNBase, lambda m: f"torch.zeros(2, 16, {m.input_size})"),
    (nn.MultiheadAttention, lambda m: f"torch.zeros(2, 16, {m.embed_dim})"),
]


def example_for(model: nn.Module) -> str:
    """An example of `example_inputs` for a model, by the first of its layers and by the arguments of its `forward`.

    Example:
        >>> example_for(nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 4)))
        'torch.zeros(2, 16, dtype=torch.int64)'
    """
    parameters = [p for p in inspect.signature(model.forward).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    needed = [p for p in parameters if p.default is p.empty] or parameters[:1]
    if len(needed) == 1 and (needed[0].name in _DICTS or _says_dict(needed[0].annotation)):
        return "({'name': tensor, ...},)"
    forms = (form(m) for m in model.modules() for kinds, form in _FORMS if isinstance(m, kinds))
    first = next(forms, "torch.zeros(2, 3, 224, 224)")
    return first if len(needed) < 2 else f"({', '.join(p.name for p in needed)})"


def _says_dict(annotation: object) -> bool:
    text = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))
    return text.rpartition(".")[2].lower().startswith(("dict", "mapping"))
