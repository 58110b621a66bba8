"""The commands: `python -m reproductions STUDY`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from eulernet import EulernetError
from reproductions.data import DataError
from reproductions.records import FILE, Record, write_records

app = typer.Typer(
    name="python -m reproductions",
    help="The experiments of 'Towards Robust ResNet' (IJCAI 2019), run with eulernet.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()
errors = Console(stderr=True)
RESULTS = Path(__file__).parent / "results"

Out = Annotated[Path | None, typer.Option("--out", help="Folder for records and figures; default: runs/STUDY.")]


@app.command()
def euler(out: Out = None) -> None:
    """Fig. 1: Euler's method on x' = -2.3 x, for several step sizes."""
    from reproductions import euler as study

    records = study.run()
    _finish(records, out or Path("runs/euler"), study.statements(records))


@app.command("two-moon")
def two_moon(
    out: Out = None,
    seeds: Annotated[int, typer.Option(min=1, help="Trainings for each h and learning rate.")] = 10,
    preset: Annotated[str, typer.Option(help="small: the study; smoke: a small trial of it, in seconds.")] = "small",
) -> None:
    """Fig. 4: a residual network without normalisation on noisy points, h = 1 against h = 0.1."""
    from reproductions import two_moon as study

    if preset not in study.PRESETS:
        raise typer.BadParameter(f"{preset!r} is none of {', '.join(study.PRESETS)}", param_hint="--preset")
    torch.set_num_threads(1)  # the tensors are too small to be worth sharing
    started = time.perf_counter()
    with _progress() as progress:
        tasks: dict[str, TaskID] = {}

        def show(label: str, share: float) -> None:
            if label not in tasks:
                tasks[label] = progress.add_task(label, total=1.0)
            progress.update(tasks[label], completed=share)

        records, networks = study.run(study.PRESETS[preset], seeds, show)
    seconds = time.perf_counter() - started
    folder = out or Path("runs/two-moon")
    folder.mkdir(parents=True, exist_ok=True)
    study.save_networks(folder, networks)
    _finish(
        records,
        folder,
        [*study.statements(records), f"{len(records)} trainings in {seconds:.0f} s."],
    )


@app.command()
def cifar10(
    data_root: Annotated[Path, typer.Option(help="The folder that holds cifar-10-batches-bin or cifar-10-batches-py.")],
    model: Annotated[str, typer.Option(help="A model of timm.")] = "resnet18",
    h: Annotated[float, typer.Option("--h", help="The step factor.")] = 0.1,
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 100,
    batch_size: Annotated[int, typer.Option(min=1)] = 128,
    learning_rate: Annotated[float, typer.Option()] = 0.1,
    seed: Annotated[int, typer.Option()] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...; default: cuda where there is one.")] = "",
    download: Annotated[
        bool, typer.Option("--download", help="Let torchvision fetch the data if they are missing.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Folder for the record; none is written without it.")] = None,
) -> None:
    """A network of timm, patched in one line, trained for some steps on CIFAR-10."""
    import timm

    from reproductions import cifar10 as study
    from reproductions.data import load_cifar10

    if not timm.is_model(model):
        raise typer.BadParameter(f"timm has no model {model!r}", param_hint="--model")
    try:
        where = torch.empty(0, device=device or ("cuda" if torch.cuda.is_available() else "cpu")).device
    except (AssertionError, RuntimeError) as error:  # torch raises either for a device that is not there
        raise typer.BadParameter(str(error), param_hint="--device") from None
    config = study.Config(model, h, steps, batch_size, learning_rate, seed=seed)
    train, test = load_cifar10(data_root, download)
    with _progress() as progress:
        tasks: dict[str, TaskID] = {}

        def show(doing: str, done: int, total: int) -> None:
            phase = doing.partition(",")[0]
            if phase not in tasks or (progress.tasks[tasks[phase]].finished and done < total):
                tasks[phase] = progress.add_task(doing, total=total)
            progress.update(tasks[phase], description=doing, completed=done)

        record = study.run(config, train, test, where, show)
    for line in study.statements(record):
        console.print(line, highlight=False)
    if out is not None:
        console.print(f"Wrote {write_records(out, [record])}", soft_wrap=True, highlight=False)


@app.command()
def figures(
    results: Annotated[Path, typer.Option(help="Folder with records, or of such folders.")] = RESULTS,
) -> None:
    """Draw all figures anew from stored records."""
    from reproductions.figures import draw

    folders = sorted(path.parent for path in results.rglob(FILE))
    if not folders:
        raise DataError(
            f"{results} holds no {FILE}, nor does a folder below it; run a study first, or name it by --results."
        )
    for folder in folders:
        for path in draw(folder):
            console.print(f"Wrote {path}", soft_wrap=True, highlight=False)


def _finish(records: list[Record], folder: Path, statements: Sequence[str | Table]) -> None:
    """Write the records, draw the figures from what was written, say what was measured."""
    from reproductions.figures import draw

    written = [write_records(folder, records)]
    written += draw(folder)
    for line in statements:
        console.print(line, highlight=False)
    for path in written:
        console.print(f"Wrote {path}", soft_wrap=True, highlight=False)


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )


def main() -> None:
    """Run the command line; what a user can mend is one line and exit code 1."""
    try:
        app()
    except (DataError, EulernetError) as error:
        errors.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True, highlight=False)
        raise SystemExit(1) from None
