"""The commands: `python -m reproductions STUDY`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
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
from reproductions.errors import DataError
from reproductions.evidence.claims import Row
from reproductions.options import chosen, device_of, known_preset
from reproductions.records import FILE, Record, check_folder, write_records
from reproductions.studies import GRIDS, STUDIES

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

DATA = Path("data")
Out = Annotated[Path | None, typer.Option("--out", help="Folder for records and figures; default: runs/STUDY.")]


@app.command()
def euler(out: Out = None) -> None:
    """Fig. 1: Euler's method on x' = -2.3 x, for several step sizes."""
    from reproductions.studies import fig1_euler as study

    folder = check_folder(out or Path("runs/euler"), "euler")
    records = study.run()
    _finish(records, folder, study.statements(records))


@app.command("two-moon")
def two_moon(
    out: Out = None,
    seeds: Annotated[int, typer.Option(min=1, help="Trainings for each h and learning rate.")] = 10,
    preset: Annotated[str, typer.Option(help="small: the study; smoke: a small trial of it, in seconds.")] = "small",
) -> None:
    """Fig. 4: a residual network without normalisation on noisy points, h = 1 against h = 0.1."""
    from reproductions.studies import fig4_two_moon as study

    if preset not in study.PRESETS:
        raise typer.BadParameter(f"{preset!r} is none of {', '.join(study.PRESETS)}", param_hint="--preset")
    folder = check_folder(out or Path("runs/two-moon"), "two-moon")
    torch.set_num_threads(1)  # the tensors are too small to be worth sharing
    started = time.perf_counter()
    with _progress() as progress:
        records, networks = study.run(study.PRESETS[preset], seeds, _bar(progress))
    seconds = time.perf_counter() - started
    folder.mkdir(parents=True, exist_ok=True)
    study.save_networks(folder, networks)
    _finish(
        records,
        folder,
        [*study.statements(records), f"{len(records)} trainings in {seconds:.0f} s."],
    )


@app.command()
def cifar10(
    data_root: Annotated[
        Path, typer.Option(help="The folder that holds cifar-10-batches-bin or cifar-10-batches-py.")
    ] = DATA,
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

    from reproductions.data.cifar10 import load_cifar10
    from reproductions.studies import timm_on_cifar10 as study

    if not timm.is_model(model):
        raise typer.BadParameter(f"timm has no model {model!r}", param_hint="--model")
    where = device_of(device)
    if out is not None:
        check_folder(out, "cifar10")
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


# ---- grids of trials
Preset = Annotated[str, typer.Option(help="smoke, cpu, small or paper: from minutes on a CPU to the paper's protocol.")]
DataRoot = Annotated[Path, typer.Option(help="The folder that holds cifar-10-batches-bin (or -py) and ag_news.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, ...; default: cuda where there is one.")]
Seeds = Annotated[int, typer.Option(min=0, max=10, help="Trainings of each cell; 0: as many as the preset has.")]
AtOnce = Annotated[int, typer.Option(min=1, help="Trials side by side on a GPU.")]
Download = Annotated[bool, typer.Option("--download", help="Fetch the data if they are missing.")]
Only = Annotated[
    list[str] | None,
    typer.Option(help="Only the trials with FIELD=VALUE, such as depth=110; can be given several times."),
]
Ray = Annotated[str, typer.Option(help="Spread the trials over Ray: auto, local, or the address of a cluster.")]
TrialsOut = Annotated[Path, typer.Option("--out", help="Folder for records and figures; studies may share one.")]
TRIALS = Path("runs/trials")


@app.command()
def dynamics(
    data_root: DataRoot = DATA,
    preset: Preset = "smoke",
    device: Device = "",
    seeds: Seeds = 0,
    only: Only = None,
    at_once: AtOnce = 1,
    download: Download = False,
    ray: Ray = "",
    out: TrialsOut = TRIALS,
    init: Annotated[bool, typer.Option("--init", help="Only before training, at real depths; a minute.")] = False,
) -> None:
    """Fig. 2: weights and gradients of layer 2 over the iterations, h = 1 against h = 0.1."""
    if not init:
        return _grid("dynamics", data_root, preset, device, seeds, only or [], at_once, download, ray, out)
    from reproductions.evidence.claims import Results
    from reproductions.studies import fig2_dynamics as study

    folder = check_folder(Path("runs/dynamics-init") if out == TRIALS else out, "dynamics-init")
    with _progress() as progress:
        records = study.at_start(data_root, device_of(device), seeds or 3, _bar(progress))
    _finish(records, folder, [_rows(study.start_claims(Results(records)))])


def _measured_command(name: str) -> None:
    """The command of a study that is no grid, and whose `run` gives all its records at once."""
    study = STUDIES[name]

    def command(
        data_root: DataRoot = DATA,
        preset: Preset = "smoke",
        device: Device = "",
        seeds: Seeds = 0,
        out: Out = None,
    ) -> None:
        from reproductions.evidence.claims import Results
        from reproductions.presets import SEEDS

        known_preset(preset)
        folder = check_folder(out or Path(f"runs/{name}"), name)
        with _progress() as progress:
            records = study.run(preset, seeds or SEEDS[preset], data_root, device_of(device), _bar(progress))
        _finish(records, folder, [_rows(study.claims(Results(records), preset))])

    app.command(name, help=(study.__doc__ or "").splitlines()[0])(command)


for _name in ("bounds", "memory"):
    _measured_command(_name)


def _grid_command(name: str, about: str) -> None:
    def command(
        data_root: DataRoot = DATA,
        preset: Preset = "smoke",
        device: Device = "",
        seeds: Seeds = 0,
        only: Only = None,
        at_once: AtOnce = 1,
        download: Download = False,
        ray: Ray = "",
        out: TrialsOut = TRIALS,
    ) -> None:
        _grid(name, data_root, preset, device, seeds, only or [], at_once, download, ray, out)

    app.command(name, help=about)(command)


for _name, _study in GRIDS.items():
    if _name != "dynamics":  # its command has an option of its own
        _grid_command(_name, (_study.__doc__ or "").splitlines()[0])


def _grid(
    name: str,
    data_root: Path,
    preset: str,
    device: str,
    seeds: int,
    only: list[str],
    at_once: int,
    download: bool,
    ray: str,
    out: Path,
) -> None:
    """Run a study's trials, say what came out, draw the figures."""
    from reproductions.data import batches as sources
    from reproductions.evidence.claims import Results
    from reproductions.presets import SEEDS
    from reproductions.report import draw
    from reproductions.training import grid

    study = GRIDS[name]
    known_preset(preset, getattr(study, "ALSO", ()))
    trials = chosen(study.trials(preset, seeds or SEEDS[preset]), only)
    place = grid.Place(check_folder(out, "trials"), data_root, device_of(device), at_once, download)
    left = {trial.data for group in grid.groups(place, trials) for trial in group}
    _doubt(sources.check(sorted(left), data_root, download))
    grid.check_data(place, trials)
    done = len(grid.recorded(place, trials))
    if done:
        console.print(f"{done} of {len(trials)} trials have a record in {out / FILE}.", highlight=False, soft_wrap=True)
    with _progress() as progress:
        whole = progress.add_task(f"{name}: all trials", total=sum(map(grid.work, trials)))
        progress.advance(whole, sum(grid.work(trial) for trial in trials if trial.key in grid.keys_done(place, trials)))
        flight = progress.add_task("in flight", total=1.0)

        def show(label: str, share: float, work: float) -> None:
            if share < progress.tasks[flight].completed:  # the next one: its time is counted anew
                progress.reset(flight)
            progress.update(flight, description=label, completed=share)
            progress.advance(whole, work)

        if ray:
            from reproductions.training.ray_cluster import run

            records = run(ray, place, trials, show)
        else:
            records = grid.run(place, trials, show)
    console.print(_rows(study.claims(Results(records), preset)))
    failed = sum(record["result"]["failed"] for record in records)
    trials_in_words = f"{len(records)} trial{'s' if len(records) != 1 else ''}"
    console.print(f"{trials_in_words}, {failed} of them failed trainings.", highlight=False)
    for path in (out / FILE, *draw(out)):
        console.print(f"Wrote {path}", soft_wrap=True, highlight=False)


@app.command()
def campaign(
    minutes: Annotated[float, typer.Option(min=0.0, help="How long the machine is at hand.")],
    data_root: DataRoot = DATA,
    out: Annotated[Path, typer.Option("--out", help="Folder for what has to come back.")] = Path("runs/campaign"),
    preset: Annotated[str, typer.Option(help="paper; smoke: toy sizes, to see that all of it runs.")] = "paper",
    device: Device = "",
    way: Annotated[str, typer.Option(help="Only this way: 'stacked', 'compiled' or 'separate'.")] = "",
    launched: Annotated[bool, typer.Option("--launched", help="Capture no CUDA graph.")] = False,
) -> None:
    """The cells of campaign.md in order of worth, as many as fit the time; what has a record is not run again."""
    from reproductions import campaign as study
    from reproductions.evidence.claims import Results
    from reproductions.training.stack import WAYS

    for name, value, known in (("--preset", preset, study.EPOCHS), ("--way", way, ("", *WAYS))):
        if value not in known:
            raise typer.BadParameter(f"{value!r} is none of {', '.join(filter(None, known))}", param_hint=name)
    folder, where = check_folder(out, "trials"), device_of(device)
    whole = study.Campaign(folder, data_root, where, 60 * minutes, preset, way, launched, [RESULTS / "trials"])
    trained = whole.run()
    if chosen := whole.notes.get("chosen"):
        console.print(_rows(study.primary(Results(whole.records()), preset, chosen["epochs"], chosen["precision"])))
    if not trained:
        raise DataError(f"no trial came to its end; {folder / 'probe.json'} says why. Give more by --minutes.")


@app.command()
def desk(
    data_root: DataRoot = DATA,
    out: TrialsOut = TRIALS,
    workers: Annotated[int, typer.Option(min=1, help="Processes of one thread each.")] = 2,
    minutes: Annotated[float, typer.Option(min=0.0, help="How long; what is unfinished then is begun anew.")] = 180,
    only: Only = None,
) -> None:
    """On CPU cores: the paper's depths on small images and short texts, 5 seeds, in order of worth."""
    from reproductions import desk as study
    from reproductions.data import batches as sources
    from reproductions.evidence.claims import Results
    from reproductions.training.grid import known_records

    trials = chosen(study.trials(), only or [])
    check_folder(out, "trials")
    _doubt(sources.check(sorted({trial.data for trial in trials}), data_root))
    study.run(trials, out, data_root, workers, 60 * minutes, [RESULTS / "trials"])
    records = known_records((out, RESULTS / "trials"), data_root, {trial.data for trial in trials})
    console.print(_rows(study.primary(Results(records))))


@app.command()
def throughput(
    data_root: DataRoot = DATA,
    device: Device = "",
    data: Annotated[str, typer.Option(help="cifar10 or ag-news.")] = "cifar10",
    depth: Annotated[int, typer.Option(help="Of the network; 0: 20 for images, 9 for texts.")] = 0,
    iterations: Annotated[int, typer.Option(min=1, help="That are timed, after the graph is captured.")] = 100,
    out: Annotated[Path | None, typer.Option(help="Folder for the records; none are written without it.")] = None,
) -> None:
    """Samples a second of 1, 4, 8 and 16 trials side by side, in fp32, TF32 and bf16."""
    from reproductions.studies import throughput as study

    if out is not None:
        check_folder(out, "throughput")
    with _progress() as progress:
        records = study.run(data_root, device_of(device), data, depth, iterations, _bar(progress))
    console.print(study.table(records))
    if out is not None:
        console.print(f"Wrote {write_records(out, records)}", soft_wrap=True, highlight=False)


@app.command()
def transfer(
    data_root: Annotated[Path, typer.Option(help="The folder that holds ag_news.")] = DATA,
    preset: Annotated[
        str, typer.Option(help="desk: an hour of two cores; gpu: 8 minutes of one, wider; smoke: half a minute.")
    ] = "smoke",
    workers: Annotated[int, typer.Option(min=1, help="Trainings at a time, each in a process of one thread.")] = 2,
    device: Annotated[str, typer.Option(help="Where to train, such as cuda.")] = "cpu",
    minutes: Annotated[float, typer.Option(help="Begin nothing that would not be done by then.")] = math.inf,
    out: Out = None,
) -> None:
    """Depth transfer: is the learning rate of a shallow GPT that of a deep one; what h does for it."""
    from reproductions.studies import depth_transfer as study
    from reproductions.training import pool

    if preset not in study.DEEP:
        raise typer.BadParameter(f"{preset!r} is none of {', '.join(study.DEEP)}", param_hint="--preset")
    folder = check_folder(out or Path("runs/transfer"), "transfer")
    cells = study.cells(preset)
    with _progress() as progress:
        whole = progress.add_task("transfer", total=1.0)

        def show(label: str, share: float) -> None:
            progress.update(whole, description=label, completed=share)

        records = pool.run(cells, folder, data_root, workers, minutes, show, device)
    console.print(f"{len(records)} of {len(cells)} trainings have a record in {folder / FILE}.", soft_wrap=True)


@app.command()
def figures(
    results: Annotated[Path, typer.Option(help="Folder with records, or of such folders.")] = RESULTS,
) -> None:
    """Draw all figures anew from stored records."""
    from reproductions.report import draw

    folders = sorted(path.parent for path in results.rglob(FILE))
    if not folders:
        raise DataError(
            f"{results} holds no {FILE}, nor does a folder below it; run a study first, or name it by --results."
        )
    for folder in folders:
        for path in draw(folder):
            console.print(f"Wrote {path}", soft_wrap=True, highlight=False)


@app.command()
def report(
    results: Annotated[Path, typer.Option(help="Folder with records, or of such folders.")] = RESULTS,
) -> None:
    """Draw all figures anew, and write REPORT.md: what came of each claim of the paper."""
    from reproductions.report import write

    figures(results)
    console.print(f"Wrote {write(results)}", soft_wrap=True, highlight=False)


def _doubt(said: Sequence[str]) -> None:
    """Warn of data that are not the official ones."""
    for line in said:
        errors.print(f"[yellow]warning:[/] {escape(line)}. What comes out is not comparable with published numbers.")


def _bar(progress: Progress) -> Callable[[str, float], None]:
    """A bar for each label, told the share that is done."""
    tasks: dict[str, TaskID] = {}

    def show(label: str, share: float) -> None:
        if label not in tasks:
            tasks[label] = progress.add_task(label, total=1.0)
        progress.update(tasks[label], completed=share)

    return show


def _rows(rows: Sequence[Row]) -> Table:
    table = Table(box=None, pad_edge=False, show_lines=False)
    for title in ("claim", "what came out", "verdict"):
        table.add_column(title, overflow="fold")
    for row in rows:
        table.add_row(row.claim, row.outcome, row.verdict)
    return table


def _finish(records: list[Record], folder: Path, statements: Sequence[str | Table]) -> None:
    """Write the records, draw the figures from what was written, say what was measured."""
    from reproductions.report import draw

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
    except (DataError, EulernetError, OSError) as error:  # of the last: a full disk, a file that may not be read
        errors.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True, highlight=False)
        raise SystemExit(1) from None
