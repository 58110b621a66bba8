"""The same trials on many machines: Ray hands the groups to workers, which share the study's folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby

from reproductions.errors import DataError
from reproductions.locks import Claims
from reproductions.records import Record
from reproductions.training import grid
from reproductions.training.grid import Place, Show
from reproductions.trial import Trial

RETRIES = 5  # of a group whose worker died


def run(
    address: str, place: Place, trials: Sequence[Trial], show: Show = lambda label, share, work: None
) -> list[Record]:
    """As `grid.run`, on a Ray cluster. A group whose worker dies is given to another, which goes on at the checkpoint.

    All machines see the study's folder and the data under the same path.

    Args:
        address: of the cluster; `auto` for the one of this machine, `local` to start one for this study alone.
        place: as in `grid.run`.
        trials: as in `grid.run`.
        show: as in `grid.run`; called when a group is done.

    Raises:
        DataError: Ray is not installed or not reached, or a data file is missing or damaged.
    """
    try:
        import ray
    except ImportError:
        raise DataError("--ray needs Ray; run: pip install 'eulernet[ray]'") from None
    try:
        ray.init(address=None if address == "local" else address, log_to_driver=False, include_dashboard=False)
    except (ConnectionError, ValueError) as error:
        raise DataError(
            f"no Ray cluster at {address!r}: {str(error).rstrip('.')}. Start one with: ray start --head"
        ) from error
    grid.check_data(place, trials)
    place = replace(place, folder=place.folder.resolve(), data_root=place.data_root.resolve())
    gpus = 1 if place.device.type == "cuda" else 0
    train = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=RETRIES)(grid.train)
    keep = grid.keys_to_keep(trials)
    claims = Claims(place.folder)
    try:
        _claim(claims, place, trials)
        # What others begin with comes first.
        for _, groups in groupby(grid.groups(place, trials), key=lambda group: bool(group[0].start)):
            pending = {train.remote(place, group, keep): group for group in groups}
            while pending:
                (done, *_), _ = ray.wait(list(pending))
                group = pending.pop(done)
                try:
                    records = ray.get(done)
                except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError) as error:
                    raise DataError(
                        f"{grid.name(group)}: its worker died {RETRIES + 1} times, as one that lacks memory does. "
                        "What is done is kept: give the command again, on machines with more memory, to go on"
                    ) from error
                for record in records:
                    grid.settle(place, record)
                show(grid.name(group), 1.0, sum(map(grid.work, group)))
    finally:
        claims.file.close()
        ray.shutdown()
    return grid.recorded(place, trials)


def _claim(claims: Claims, place: Place, trials: Sequence[Trial]) -> None:
    busy = [trial for group in grid.groups(place, trials) for trial in group if not claims.take(trial.key)]
    if busy:
        raise DataError(
            f"another process trains {grid.name(busy)} in {place.folder}: wait for it, or name another folder by --out"
        )
