"""Run the trials of a study: those that have no record yet, each from where it was left."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import eulernet
from reproductions.data.batches import Source, identify, load
from reproductions.errors import DataError
from reproductions.locks import Claims
from reproductions.records import FILE, Record, append_record, environment, read_records
from reproductions.training.loop import SideBySide, Training, settings
from reproductions.trial import CALIBRATE, Trial

Show = Callable[
    [str, float, float], None
]  # what is trained, the share of it that is done, the work since the last call


WAIT = 1.0  # seconds until it is asked again whether another process has done its trial


@dataclass(frozen=True)
class Place:
    """Where trials run: the folder of the records, the folder of the data, the device.

    `at_once` trials are trained side by side on the device. `download` lets missing data be fetched.
    """

    folder: Path
    data_root: Path
    device: torch.device
    at_once: int = 1
    download: bool = False

    def checkpoint(self, key: str) -> Path:
        return self.folder / "checkpoints" / f"{key}.pt"

    def network(self, key: str) -> Path:
        return self.folder / "networks" / f"{key}.pt"


def check_data(place: Place, trials: Iterable[Trial]) -> None:
    """See that the records in the folder were trained on the data that these trials would be.

    Raises:
        DataError: they were trained on others.
    """
    if not (place.folder / FILE).exists():
        return
    known = {r["data"]["name"]: r["data"] for r in read_records(place.folder) if "data" in r}
    for name in sorted({trial.data for trial in trials} & known.keys()):
        here, there = identify(name, place.data_root, place.download), known[name]
        if here["sha256"] != there["sha256"]:
            raise DataError(
                f"{place.folder / FILE} holds trials on another {name}, of {there['train']:,} training samples (sha256 "
                f"{there['sha256']}); {place.data_root} holds one of {here['train']:,} ({here['sha256']}). Results "
                "of both can't be compared: name another folder by --out, or those data by --data-root."
            )


def known_records(folders: Iterable[Path], data_root: Path, names: Iterable[str]) -> list[Record]:
    """The records in several folders, without those of trainings on other data of these names than `data_root` holds.

    Raises:
        DataError: a record or a data file is missing or damaged.
    """
    here = {name: identify(name, data_root)["sha256"] for name in names}

    def same(data: dict[str, Any]) -> bool:
        return not data or here.get(data["name"], data["sha256"]) == data["sha256"]

    found = [record for folder in folders if (folder / FILE).exists() for record in read_records(folder)]
    return [record for record in found if same(record.get("data", {}))]


def run(place: Place, trials: Sequence[Trial], show: Show = lambda label, share, work: None) -> list[Record]:
    """Train what has no record yet, and return the records of all trials, in their order.

    A process that is killed leaves the records of the trials that were done and a checkpoint of each that was not; the
    next one goes on there, and ends with the same results. Several processes may run in one folder: each trains what no
    other has claimed, and all wait for the last.

    Raises:
        DataError: a data file, a record or a checkpoint is missing or damaged, or there are records of other data.
    """
    check_data(place, trials)
    keep, own = keys_to_keep(trials), {trial.key for trial in trials}

    def train_claimed(claims: Claims, group: list[Trial]) -> bool:
        """Train and keep what of a group no other process has claimed; whether there was any.

        What begins with a network that another process is still to train is left for later.
        """
        mine = [trial for trial in group if claims.take(trial.key)]
        done = keys_done(place, [*mine, *(trial.base for trial in mine if trial.base)])
        ready = [t for t in mine if t.key not in done and not (t.base and t.base.key in own - done)]
        try:
            if ready:
                for record in train(place, ready, keep, show):
                    settle(place, record)
        finally:
            for trial in mine:
                claims.give_back(trial.key)
        return bool(ready)

    with Claims(place.folder) as claims:
        while left := list(groups(place, trials)):
            if not any([train_claimed(claims, group) for group in left]):  # all of them, then any
                time.sleep(WAIT)
    return recorded(place, trials)


def recorded(place: Place, trials: Iterable[Trial]) -> list[Record]:
    """The records that there are of some trials, in their order."""
    found = {r["key"]: r for r in read_records(place.folder)} if (place.folder / FILE).exists() else {}
    return [found[trial.key] for trial in trials if trial.key in found]


def keys_done(place: Place, trials: Iterable[Trial]) -> set[str]:
    return {record["key"] for record in recorded(place, trials)}


def settle(place: Place, record: Record) -> None:
    """Keep a record; the trial's checkpoint has had its day."""
    append_record(place.folder, record)
    place.checkpoint(record["key"]).unlink(missing_ok=True)


def keys_to_keep(trials: Iterable[Trial]) -> frozenset[str]:
    """The trials whose trained networks others begin with."""
    return frozenset(trial.base.key for trial in trials if trial.base)


def groups(place: Place, trials: Sequence[Trial]) -> Iterator[list[Trial]]:
    """What is left to train, in groups to be trained side by side; what others begin with comes first."""
    done = keys_done(place, trials)
    left = {trial.key: trial for trial in trials if trial.key not in done}

    def alike(trial: Trial) -> tuple[Any, ...]:
        fields = "data train held_out classes batch_size epochs precision optimizer size model depth".split()
        saved = place.checkpoint(trial.key)
        epoch = _epoch(saved)
        return (bool(trial.start), *(getattr(trial, name) for name in fields), epoch)

    kinds = {trial: alike(trial) for trial in left.values()}  # once: another process may go on with a training
    first = {kind: number for number, kind in enumerate(kinds.values())}
    ordered = sorted(kinds, key=lambda trial: (bool(trial.start), first[kinds[trial]]))
    for _, together in groupby(ordered, key=kinds.__getitem__):
        some = list(together)
        yield from (some[i : i + place.at_once] for i in range(0, len(some), place.at_once))


def _epoch(saved: Path) -> int:
    """The epochs that a checkpoint has seen; none where there is no checkpoint, or none any more."""
    try:
        return int(_load(saved)["epoch"]) if saved.exists() else 0
    except FileNotFoundError:  # another process has just ended the training
        return 0


def work(trial: Trial) -> float:
    """How much there is to do, roughly: layers times samples times places, a place of a text as ten of an image."""
    samples = trial.epochs * (trial.train or (50_000 if trial.data == "cifar10" else 77_000))
    return trial.depth * samples * ((trial.size or 32) ** 2 if trial.data == "cifar10" else 10 * (trial.size or 1024))


def train(
    place: Place, trials: Sequence[Trial], keep: frozenset[str], show: Show = lambda label, share, work: None
) -> list[Record]:
    """Train a group side by side, from its checkpoints where there are any; returns its records.

    Args:
        place: where.
        trials: the group.
        keep: keys of trials whose networks are to be kept.
        show: called with what is trained, the share of it that is done, and the work done since the last call.
    """
    with settings(trials[0].precision):
        return _train(place, trials, keep, show)


def _train(place: Place, trials: Sequence[Trial], keep: frozenset[str], show: Show) -> list[Record]:
    begun = [_begun(place, trial) for trial in trials]
    trainings = [one for one in begun if isinstance(one, Training)]
    label = name(trials)
    total, seen = sum(map(work, trials)), 0.0
    side_by_side: SideBySide | None = None
    while alive := [training for training in trainings if not training.done]:
        if side_by_side is None or side_by_side.trainings != alive:
            side_by_side = SideBySide(alive)
        epoch, epochs, iterations = alive[0].epoch, alive[0].trial.epochs, len(alive[0].sizes)

        def progress(done: int, epoch: int = epoch, epochs: int = epochs, iterations: int = iterations) -> None:
            nonlocal seen
            share = (epoch + done / iterations) / epochs
            show(label, share, (share - seen) * total)
            seen = share

        side_by_side.epoch(progress)
        for training in alive:
            _save(place.checkpoint(training.trial.key), training.state())
    show(label, 1.0, (1.0 - seen) * total)
    return [_record(place, one, keep) if isinstance(one, Training) else one for one in begun]


def name(trials: Sequence[Trial]) -> str:
    """What the progress bar calls a group."""
    trial = trials[0]
    more = f" and {len(trials) - 1} more" if len(trials) > 1 else ""
    h = f"{trial.h:g}" if isinstance(trial.h, float) else trial.h
    halves = "".join(f", {part} x {x:g}" for part in ("initial", "rate") if (x := getattr(trial, part)) != 1)
    return f"{trial.model}-{trial.depth}, h = {h}{halves}, seed {trial.seed}{more}"


def _begun(place: Place, trial: Trial) -> Training | Record:
    """The training, at its checkpoint; or the record of one that failed before it began, since nothing calibrates h."""
    source = load(trial, place.data_root, place.device, place.download)
    start: dict[str, Tensor] | None = None
    if trial.base:
        path = place.network(trial.base.key)
        if not path.exists():
            raise DataError(
                f"{path} is missing, the network that {trial.key} begins with; to train it again delete the line with "
                f"{trial.base.key} in {place.folder / FILE}."
            )
        start = _load(path)
    try:
        training = Training(trial, source, place.device, start)
    except eulernet.EulernetError as error:
        if trial.h != CALIBRATE:
            raise
        nothing = dict.fromkeys(("h", "train_loss", "test_accuracy", "best_test_accuracy"))
        result = {"failed": True, "error": str(error), **nothing}
        return _as_record(place, trial, source, result, 0.0)
    saved = place.checkpoint(trial.key)
    if saved.exists():
        try:
            training.load(_load(saved))
        except (KeyError, RuntimeError) as error:  # of another version of this code
            raise _damaged(saved, error) from error
    return training


def _record(place: Place, training: Training, keep: frozenset[str]) -> Record:
    trial = training.trial
    if trial.key in keep:
        _save(place.network(trial.key), training.weights())
    return _as_record(place, trial, training.source, training.result(), training.seconds)


def _as_record(place: Place, trial: Trial, source: Source, result: dict[str, Any], seconds: float) -> Record:
    return {
        "study": "trials",
        "key": trial.key,
        "config": trial.config(),
        "data": dict(source.data),
        "result": result,
        "seconds": seconds,
        "environment": environment(place.device),
    }


def _load(path: Path) -> Any:
    """To the CPU, whatever it was saved from: the log is kept there, networks and optimisers copy what they need."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged file raises almost anything
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> DataError:
    return DataError(
        f"{path} is damaged, or of another version: {type(error).__name__}. Delete it (rm {path}) and give "
        "the command again: what it was kept of begins anew."
    )


def _save(path: Path, value: Any) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(value, path.with_suffix(".unfinished"))
    os.replace(path.with_suffix(".unfinished"), path)
