"""The steps that a checkpoint keeps: in a file beside the weights, in the metadata of a state dict, of safetensors."""

from __future__ import annotations

import argparse
import copy
import functools
import inspect
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from eulernet._checks import brief, unwrapped
from eulernet._errors import EulernetError, EulernetWarning
from eulernet._run.factor import LearnedFactor
from eulernet._run.learned import step_parameters
from eulernet._run.patched import FACTORS, KEY, bound, saved_steps
from eulernet._step import FILE, Step, Steps, step_name

_WEIGHTS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".tar")


def read_steps(h: Any, model: nn.Module) -> Any:
    """`h`, or where it is a checkpoint (a folder, a file, a state dict) the steps in it, by their names in `model`."""
    if isinstance(h, PathLike):
        path = Path(h)
        if not path.exists():
            raise EulernetError(f"h={str(path)!r}: there is no such file or folder")
        found = _in_folder(path) if path.is_dir() else _in_file(path)
        where = str(path)
    elif isinstance(h, Mapping) and _is_checkpoint(h):
        found, where = _in_mapping(h), "the state dict"
    else:
        return h
    if found is None:
        raise EulernetError(
            f"h: {where} holds no steps of eulernet: what was saved was not patched, or was copied without its "
            "metadata. Where h is known, give it: eulernet.patch(model, h=0.1). When you save, put the steps beside "
            "the weights: eulernet.steps(model).save(FOLDER)"
        )
    return _named_as_in(model, found)


def _is_checkpoint(h: Mapping[Any, Any]) -> bool:
    """A mapping from patterns to numbers is none."""
    values = list(h.values())
    weights = bool(values) and all(isinstance(v, torch.Tensor) for v in values) and any(v.dim() > 0 for v in values)
    return weights or hasattr(h, "_metadata") or KEY in h or any(isinstance(v, Mapping) for v in values)


def _in_folder(folder: Path) -> Steps | None:
    if (folder / FILE).is_file():
        return _in_file(folder / FILE)
    files = sorted(file for file in folder.iterdir() if file.suffix in _WEIGHTS)
    return next((steps for file in files if (steps := _in_file(file)) is not None), None)


def _in_file(file: Path) -> Steps | None:
    try:
        if file.suffix == ".json":
            return Steps.from_json(file.read_text())
        if file.suffix == ".safetensors":
            with file.open("rb") as stream:  # eight bytes tell how long the header is, which is JSON
                length = min(int.from_bytes(stream.read(8), "little"), file.stat().st_size)
                header = json.loads(stream.read(length))
            text = header.get("__metadata__", {}).get(KEY)
            return None if text is None else Steps.from_json(text)
    except EulernetError as error:
        raise EulernetError(f"h={str(file)!r}: {error}") from None
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise EulernetError(
            f"h={str(file)!r} is no {file.suffix.removeprefix('.')} file that can be read ({type(error).__name__}: "
            f"{str(error)[:200]}). Where h is known, give it: eulernet.patch(model, h=0.1)"
        ) from error
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # the options of the script, as timm keeps them
            loaded = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise EulernetError(
            f"h={str(file)!r}: torch.load(..., weights_only=True) cannot read it ({type(error).__name__}); load it as "
            "you do otherwise, and pass what it holds: eulernet.patch(model, h=checkpoint['state_dict'])"
        ) from error
    return _in_mapping(loaded) if isinstance(loaded, Mapping) else None


def _in_mapping(checkpoint: Mapping[Any, Any]) -> Steps | None:
    if isinstance(text := checkpoint.get(KEY), str):  # what the callbacks write
        return Steps.from_json(text)
    metadata = getattr(checkpoint, "_metadata", {})
    steps = [step for name, of in metadata.items() for step in _of_module(name, of.get(KEY, ()), checkpoint)]
    if steps:
        return Steps([replace(step, index=index) for index, step in enumerate(steps)])
    inner = (value for value in checkpoint.values() if isinstance(value, Mapping))
    return next((found for value in inner if (found := _in_mapping(value)) is not None), None)


def _learned(weights: Mapping[str, Any], key: str) -> float:
    log_h = weights.get(key)
    if not (isinstance(log_h, torch.Tensor) and log_h.numel() == 1):
        raise EulernetError(
            f"the state dict says that {key} is a learned h, and holds {brief(log_h)} there. Where h is "
            "known, give it: eulernet.patch(model, h=0.1)"
        )
    return float(log_h.double().exp())


def _of_module(name: str, saved: Any, weights: Mapping[str, Any]) -> Iterator[Step]:
    """The steps of one module: each saved as its number there, and its h or the name of its parameter."""
    for number, h in saved_steps(saved):
        if h == "auto":
            continue
        if isinstance(h, str):
            h = _learned(weights, f"{name}.{h}" if name else h)
        called = step_name(name, number)
        yield Step(0, called, "", "identity", (), 1, 0, 0, h=h, module_name=name, number=number)


def _named_as_in(model: nn.Module, steps: Steps) -> Steps:
    """The steps named as in this model, where one of the two has a module around it (a wrapper, a LightningModule)."""
    modules = {name for name, _ in unwrapped(model).named_modules()}
    names = [step.module_name for step in steps]
    first = names[0] if names else ""
    parts = first.split(".")
    for cut in (parts[i:] for i in range(len(parts) + 1)):
        prefix, rest = first.removesuffix(".".join(cut)), ".".join(cut)
        longer = [name for name in modules if rest and (name == rest or name.endswith(f".{rest}"))]
        for before in [rest, *longer] if rest in modules else longer:
            added = before.removesuffix(rest)
            if all(name.startswith(prefix) and added + name.removeprefix(prefix) in modules for name in names):
                new = [added + name.removeprefix(prefix) for name in names]
                return Steps(
                    [
                        replace(step, name=step_name(name, step.number), module_name=name)
                        for step, name in zip(steps, new, strict=True)
                    ]
                )
    return steps  # whoever selects by them says which are unknown


# ---- writing


def saves_itself(cls: type) -> bool:
    """Whether the class has a method `save_pretrained`."""
    return inspect.isfunction(getattr(cls, "save_pretrained", None))


def with_steps(save: Callable[..., Any]) -> Callable[..., Any]:
    """The `save_pretrained` of a class (of Hugging Face, PEFT, diffusers, the Hub) that writes the steps as well."""
    signature = inspect.signature(save)

    @functools.wraps(save)
    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs)
        _, folder, *_ = given.arguments.values()
        if "state_dict" in signature.parameters:
            given.arguments["state_dict"] = _unshared(self, given.arguments.get("state_dict"))
        result = save(*given.args, **given.kwargs)
        if given.arguments.get("is_main_process", True) and Path(folder).is_dir():
            _write_steps(self, Path(folder), bool(given.arguments.get("push_to_hub")))
        return result

    return save_pretrained


def _unshared(model: nn.Module, weights: Any) -> Any:
    """The weights to save, where an h that steps share has memory of its own for each: safetensors takes no other."""
    own = {id(parameter) for parameter in step_parameters(model)}
    names = [name for name, p in model.named_parameters(remove_duplicate=False) if id(p) in own]
    if len(names) == len(own):
        return weights
    weights = copy.copy(model.state_dict() if weights is None else weights)
    weights.update({name: weights[name].clone() for name in names if name in weights})
    return weights


def _write_steps(model: nn.Module, folder: Path, pushed: bool) -> None:
    held = [(module, factor) for module in model.modules() for factor in module.__dict__.get(FACTORS, ())]
    if not all(f.bound_to(m).readable for m, f in held if isinstance(f, LearnedFactor)):
        warnings.warn(
            f"{folder} got no {FILE}: the steps have a learned h, which is sharded and cannot be read by one process. "
            f"Call in all processes: steps = eulernet.steps(model); and in one: steps.save({str(folder)!r})",
            EulernetWarning,
            stacklevel=3,
        )
    elif held:
        Steps([step for _, step, _ in bound(model, "steps")]).save(folder)
    if held and pushed:
        warnings.warn(
            f"save_pretrained(push_to_hub=True) does not push {folder / FILE}, the steps; call model.push_to_hub(REPO)",
            EulernetWarning,
            stacklevel=3,
        )


def saved_in(model: nn.Module) -> tuple[str, Steps] | None:
    """The folder that a model says it was loaded from, and the steps beside the weights there, where there are any."""
    for module in model.modules():
        source = getattr(module, "name_or_path", None)  # Hugging Face: what from_pretrained was called with
        if isinstance(source, str) and source and (Path(source) / FILE).is_file():
            try:
                return source, read_steps(Path(source), model)
            except EulernetError:
                return None
    return None
