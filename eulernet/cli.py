"""The command line: `eulernet inspect timm:resnet50` shows the steps of a model without changing anything."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import inspect as python_inspect
import itertools
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

import eulernet
from eulernet import EulernetError, Step, Steps
from eulernet._find.inputs import guess_inputs
from eulernet._plot import new_figure, together

app = typer.Typer(
    name="eulernet",
    help="Find the residual steps y = s + F(s) of a PyTorch model, and what step factor h they get.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_KIND_STYLES = {"identity": "green", "projection": "yellow", "parallel": "magenta", "long": "red", "gated": "cyan"}
_SHOWN = 6  # lines of a list below the table, before "and 12 more"
_LARGE = 2_000_000_000  # parameters above which a model is built on the meta device only


# ---- the commands


@app.callback(invoke_without_command=True)
def main(show_version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if show_version:
        print(f"eulernet {eulernet.__version__}, torch {torch.__version__}")
        raise typer.Exit


@app.command("inspect")
def inspect_(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="timm:NAME, torchvision:NAME, hf:TYPE, hf:FOLDER, or package.module:BUILDER of your own.",
        ),
    ],
    inputs: Annotated[
        list[str] | None,
        typer.Option(
            "--input",
            metavar="[NAME=]SHAPE[:DTYPE]",
            help="Shape of an input, such as 1,3,224,224 or input_ids=1,16:int64; once for each input.",
        ),
    ] = None,
    h: Annotated[
        str | None,
        typer.Option("--h", metavar="NUMBER|auto", help="Show the step factors that patch(model, h) would give."),
    ] = None,
    show_all: Annotated[bool, typer.Option("--all", help="One line a step, nothing grouped or shortened.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the steps as JSON, for programs.")] = False,
    picture: Annotated[
        Path | None,
        typer.Option(
            "--picture", metavar="FILE", help="Draw them as well, into a file .svg, .png or .pdf; by matplotlib."
        ),
    ] = None,
) -> None:
    """Show the residual steps of a model. Weights are random; nothing is downloaded."""
    try:
        # What a model's own code prints or warns of is no part of the answer; what eulernet says is in the steps.
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
            warnings.simplefilter("ignore")
            if picture is not None:
                new_figure(1, 1, picture)  # says what is wrong with it before anything is built
            built, steps = _inspect(model, inputs or [], _factor(h))
            if picture is not None:
                steps.plot(picture, title=model if h is None else f"{model}, h = {h}")
    except EulernetError as error:
        Console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True, highlight=False)
        raise typer.Exit(1) from None
    if as_json:
        print(steps.to_json())
    else:
        _print(Console(), model, built, steps, show_all)
        if picture is not None:
            print(f"\nDrawn: {picture}")


def _factor(text: str | None) -> float | Literal["auto"] | None:
    if text is None:
        return None
    if text == "auto":
        return "auto"
    try:
        return float(text)
    except ValueError:
        raise EulernetError(f"--h {text!r} is not a number and not auto; write --h 0.1, or --h auto") from None


def _inspect(spec: str, inputs: Sequence[str], h: float | Literal["auto"] | None) -> tuple[nn.Module, Steps]:
    """The model and its steps, with their h if one is given."""
    _example_inputs(inputs, torch.device("meta"))  # what is wrong with them is said before anything is built
    build = _builder(spec)
    model = _build(spec, build)
    try:
        return model, _steps(model, inputs, h)
    except EulernetError:
        # Some models need real numbers to run (Faster R-CNN sorts its boxes), which the meta device does not have.
        if _device(model).type != "meta" or sum(p.numel() for p in model.parameters()) > _LARGE:
            raise
    model = build()
    return model, _steps(model, inputs, h)


def _steps(model: nn.Module, inputs: Sequence[str], h: float | Literal["auto"] | None) -> Steps:
    example_inputs = _example_inputs(inputs, _device(model))
    if example_inputs is None and guess_inputs(model) is None:
        raise EulernetError(
            f"{type(model).__name__} does not say what it takes. Give the shape of its input, --input 2,3,224,224, or "
            "of each argument by name, --input input_ids=2,16:int64"
        )
    steps = eulernet.find_steps(model, example_inputs=example_inputs)
    if h is None:
        return steps
    eulernet.patch(model, h, example_inputs=example_inputs)
    return steps.with_h([step.h for step in eulernet.steps(model)])


def _device(model: nn.Module) -> torch.device:
    return next(itertools.chain(model.parameters(), model.buffers()), torch.empty(0)).device


# ---- building a model from its name


def _builder(spec: str) -> Callable[[], nn.Module]:
    """The function that builds the model named by `spec`; every mistake in the name is an error here."""
    source, separator, name = spec.partition(":")
    if not (source and separator and name):
        raise EulernetError(
            f"{spec!r} does not say where the model comes from. Write timm:NAME, torchvision:NAME, hf:TYPE, "
            f"hf:FOLDER or package.module:BUILDER, for example: eulernet inspect timm:{spec.strip(':') or 'resnet50'}"
        )
    return _LIBRARIES[source](name) if source in _LIBRARIES else _own(source, name)


def _build(spec: str, build: Callable[[], nn.Module]) -> nn.Module:
    """Build a library's model on the meta device: at once, without memory, whatever its size."""
    try:
        if spec.partition(":")[0] not in _LIBRARIES:
            model = build()
        else:
            try:
                with torch.device("meta"):
                    model = build()
            except (NotImplementedError, RuntimeError) as error:
                if "meta" not in str(error):
                    raise
                model = build()  # its constructor reads numbers, as those of torchvision's RegNets do
    except (Exception, SystemExit) as error:
        raise EulernetError(
            f"building {spec} failed: {type(error).__name__}: {error}. A model of your own is built by a function "
            "without arguments: def build(): return Model(), then eulernet inspect package.module:build"
        ) from error
    if not isinstance(model, nn.Module):
        raise EulernetError(f"{spec} gave a {type(model).__name__}; it must return the model, a torch.nn.Module")
    return model


def _timm(name: str) -> Callable[[], nn.Module]:
    timm = _import("timm", "timm")
    name = name.partition(".")[0]  # what follows names weights, and none are loaded
    _check_known("timm model", name, timm.list_models(), "timm.list_models()")
    return lambda: timm.create_model(name, pretrained=False)


def _torchvision(name: str) -> Callable[[], nn.Module]:
    models = _import("torchvision.models", "vision")
    _check_known("torchvision model", name, models.list_models(), "torchvision.models.list_models()")
    accepted = python_inspect.signature(models.get_model_builder(name)).parameters
    no_weights = {key: None for key in ("weights", "weights_backbone") if key in accepted}
    return lambda: models.get_model(name, **no_weights)


def _hugging_face(name: str) -> Callable[[], nn.Module]:
    transformers = _import("transformers", "hf")
    if Path(name).is_dir():
        try:
            config = transformers.AutoConfig.from_pretrained(name, local_files_only=True)
        except (OSError, ValueError) as error:
            raise EulernetError(f"the folder {name} holds no configuration of transformers: {error}") from error
    elif os.sep in name:
        raise EulernetError(
            f"there is no folder {name}, and nothing is downloaded from the hub. Write hf:FOLDER with a folder that "
            "holds a config.json, or hf:TYPE, for example hf:bert"
        )
    else:
        types = list(transformers.CONFIG_MAPPING)
        hint = "AutoConfig's list; a local folder is written hf:./folder, and nothing is downloaded from the hub"
        _check_known("Hugging Face model type", name, types, hint)
        config = transformers.AutoConfig.for_model(name)
    for architecture in getattr(config, "architectures", None) or ():
        if hasattr(transformers, architecture):
            return lambda: getattr(transformers, architecture)(config)
    for auto in ("AutoModel", *sorted(n for n in dir(transformers) if n.startswith("AutoModelFor"))):
        if type(config) in getattr(getattr(transformers, auto), "_model_mapping", ()):
            return lambda: getattr(transformers, auto).from_config(config)
    raise EulernetError(f"transformers has a configuration of type {name}, but no model for it")


def _own(module_name: str, path: str) -> Callable[[], nn.Module]:
    """`package.module:builder`: a function or class that returns a model when called without arguments."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name + ".").startswith(error.name + "."):
            raise EulernetError(f"importing {module_name} failed: {error}") from error
        raise EulernetError(
            f"there is no module {error.name!r} to import from {os.getcwd()}; a model of a library is written "
            "timm:NAME, torchvision:NAME or hf:TYPE"
        ) from None
    except (Exception, SystemExit) as error:  # the latter of a script that reads its arguments
        raise EulernetError(
            f"importing {module_name} failed: {type(error).__name__}: {error}. It must define the model, and run "
            'nothing but below if __name__ == "__main__":'
        ) from error
    for attribute in path.split("."):
        if not hasattr(found, attribute):
            names = [n for n in dir(found) if not n.startswith("_")]
            _check_known(f"name in {module_name}", attribute, names, f"dir({module_name})")
        found = getattr(found, attribute)
    if isinstance(found, nn.Module):
        return lambda: found
    if not callable(found):
        raise EulernetError(
            f"{module_name}:{path} is of type {type(found).__name__}, not a function that builds a model, without "
            "arguments: def build(): return Model(), then eulernet inspect package.module:build"
        )
    return found  # type: ignore[no-any-return]


_LIBRARIES = {"timm": _timm, "torchvision": _torchvision, "hf": _hugging_face}


def _import(name: str, extra: str) -> ModuleType:
    package = name.partition(".")[0]
    try:
        importlib.import_module(package)
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise EulernetError(f"importing {package} failed: {error}") from error
        raise EulernetError(f"{package} is not installed; run: pip install 'eulernet[{extra}]'") from None


def _check_known(what: str, name: str, known: Iterable[str], where: str) -> None:
    known = list(known)
    if name in known:
        return
    close = difflib.get_close_matches(name, known, n=5, cutoff=0.5) or [n for n in known if name in n][:5]
    meant = f"; did you mean {', '.join(close)}?" if close else "."
    raise EulernetError(f"there is no {what} {name!r}{meant} All names: {where}")


# ---- inputs


def _example_inputs(texts: Sequence[str], device: torch.device) -> Any:
    """`["1,3,224,224"]` to a tuple of tensors, `["input_ids=1,16:int64"]` to a dict of them, none to None."""
    parsed = [_input(text, device) for text in texts]
    if not parsed:
        return None
    named = {name: tensor for name, tensor in parsed if name}
    if not named:
        return tuple(tensor for _, tensor in parsed)
    if len(named) < len(parsed):
        raise EulernetError("give every --input a name, or none of them, and each name once")
    return named


def _input(text: str, device: torch.device) -> tuple[str, Tensor]:
    match = re.fullmatch(r"(?:(\w+)=)?(\d+(?:,\d+)*)(?::(\w+))?", text.replace(" ", ""))
    dtype = getattr(torch, match[3] or "float32", None) if match else None
    if match is None or not isinstance(dtype, torch.dtype):
        raise EulernetError(
            f"--input {text!r} is not a shape; write --input 1,3,224,224, or --input input_ids=1,16:int64 for an "
            "argument by name and of another dtype"
        )
    try:
        shape = [int(size) for size in match[2].split(",")]
        return match[1] or "", _tensor(shape, dtype, device)
    except (RuntimeError, TypeError, ValueError, OverflowError, MemoryError) as error:  # whatever torch has against it
        reason = str(error).partition("\n")[0][:200]
        raise EulernetError(
            f"--input {text[:80]!r} cannot be made ({reason}); write a shape that fits into memory and a dtype of "
            "numbers, --input 1,3,224,224, or --input input_ids=1,16:int64"
        ) from None


def _tensor(shape: list[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    if dtype.is_floating_point:
        return torch.randn(shape, device=device).to(dtype)
    return torch.ones(shape, dtype=dtype, device=device)


# ---- what is shown


def _print(console: Console, spec: str, model: nn.Module, steps: Steps, show_all: bool) -> None:
    parameters = sum(p.numel() for p in model.parameters())
    console.print(
        f"[bold]{escape(spec)}[/]: {escape(type(model).__name__)}, {parameters / 1e6:.1f} M parameters, "
        f"[bold]{len(steps)}[/] residual steps\n"
    )
    if show_all:
        console.print(steps)
        _sums(console, steps)
        return
    if not len(steps):
        console.print("No addition of the form s + F(s) was found.")
    else:
        console.print(_table(console, _groups(steps)))
    _section(console, "Long steps, left alone unless include= names them", map(_line, steps.long))
    _section(console, "Gated updates, left alone unless include= names them", map(_line, steps.gated))
    _section(console, "Seen, and not supported", steps.unsupported)
    _section(console, "Modules with parameters that the example input never reached", steps.unreached)
    _section(console, "Notes", steps.notes)
    _section(console, "Sums that are no steps (--all lists them)", steps.reasons())
    if steps.outside.of:
        console.print(f"\n{escape(str(steps.outside))}", highlight=False)


def _sums(console: Console, steps: Steps) -> None:
    """The sums that are no steps, one line a place and reason."""
    if steps.left_out:
        table = Table(box=None, pad_edge=False, header_style="bold")
        for title in ("module", "class", "no step, since", "calls", "where"):
            table.add_column(title, justify="right" if title == "calls" else "left", overflow="fold")
        for left in steps.left_out:
            where = f"{left.file}:{left.line}" if left.file else "an operator"
            table.add_row(left.module_name, left.module_class, left.reason, str(left.calls), where)
        console.print()
        console.print(table)


def _table(console: Console, groups: Sequence[Sequence[Step]]) -> Table:
    """One row a group. Columns that say nothing (one stream, one call) or do not fit into the terminal are left out."""
    shown = list(itertools.chain.from_iterable(groups))
    columns: dict[str, Callable[[Sequence[Step]], str]] = {
        "step": lambda group: together(step.name for step in group),
        "steps": lambda group: str(len(group)),
        "class": lambda group: group[0].module_class,
        "kind": lambda group: group[0].kind,
        "calls": lambda group: str(group[0].calls),
        "stream": lambda group: str(group[0].stream),
        "depth": lambda group: str(group[0].depth),
        "h": lambda group: f"{group[0].h:g}",
        "where": lambda group: _where(group[0]),
    }
    silent = {
        "calls": all(step.calls == 1 for step in shown),
        "stream": len({step.stream for step in shown}) == 1,
        "h": all(step.h is None for step in shown),
    }
    styles = {"step": "bold", "h": "cyan", "where": "dim"}
    titles = [title for title in columns if not silent.get(title)]
    for left_out in ((), ("where",), ("where", "class")):
        table = Table(box=None, pad_edge=False, header_style="bold")
        kept = [title for title in titles if title not in left_out]
        for title in kept:
            number = title in ("steps", "calls", "stream", "depth", "h")
            table.add_column(title, justify="right" if number else "left", no_wrap=number, overflow="fold")
        for group in groups:
            style = {**styles, "kind": _KIND_STYLES.get(group[0].kind, "")}
            table.add_row(*(Text(columns[title](group), style.get(title, "")) for title in kept))
        if Measurement.get(console, console.options.update(width=10_000), table).maximum <= console.width:
            break
    return table


def _groups(steps: Iterable[Step]) -> list[list[Step]]:
    """Steps that differ in the last number of their name only, together, in the order of their first."""
    groups: dict[object, list[Step]] = {}
    for step in steps:
        before, _, after = _split(step.name)
        key = (before, after, step.module_class, step.kind, step.places, step.calls, step.stream, step.depth, step.h)
        groups.setdefault(key, []).append(step)
    return list(groups.values())


def _split(name: str) -> tuple[str, str, str]:
    """`blocks.3.mlp:0` to `("blocks.", "3", ".mlp:0")`, around the last component that is a number."""
    numbers = list(re.finditer(r"(?<![^.])\d+(?=[.:]|$)", name))
    if not numbers:
        return name, "", ""
    start, end = numbers[-1].span()
    return name[:start], name[start:end], name[end:]


def _where(step: Step) -> str:
    return ", ".join(f"{Path(place.file).name}:{place.line}" for place in step.places)


def _line(step: Step) -> str:
    return f"{step.name} ({step.module_class}, {_where(step)})"


def _section(console: Console, title: str, lines: Iterable[str]) -> None:
    lines = list(lines)
    if not lines:
        return
    console.print(f"\n[bold]{title}[/] ({len(lines)})")
    shown = lines if len(lines) <= _SHOWN + 1 else lines[:_SHOWN]
    for line in shown:
        console.print(Text(f"  {line}"))
    if len(shown) < len(lines):
        console.print(f"  [dim]and {len(lines) - len(shown)} more, with --all[/]")


if __name__ == "__main__":
    app()
