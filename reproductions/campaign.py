"""What a GPU that is at hand for some minutes does: the cells of campaign.md in order of worth, as far as they fit.

The rule that chooses was fixed before anything was run. A probe measures the ways to train K trials at once. The first
cell has 5 seeds of each arm, always, and the largest number of epochs of EPOCHS that fits the time left: in TF32, if
ENOUGH of them fit; else in TF32 or with the branches in bf16, whichever has room for more. While it runs, it is made
shorter to the next number if the measured pace asks for that and nothing that was trained would have been different. A
later cell has the same number and precision, and is begun only if it is expected to end in time. Where the folder holds
the probe of an earlier campaign on such a device, this one goes on with what was chosen there, and probes nothing.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch._dynamo

import eulernet
from reproductions.data.batches import load
from reproductions.evidence.claims import Results, Row, compare
from reproductions.presets import AUTO, EULER, IMAGES, PLAIN, RATE, START, Part
from reproductions.records import Record, append_record, environment
from reproductions.studies import fig6_choice_of_h as select
from reproductions.training.grid import Place, check_data, known_records, work
from reproductions.training.grid import name as named
from reproductions.training.loop import WARM_UP, SideBySide, Training, fastest_convolutions, settings
from reproductions.training.network import learning_rate
from reproductions.training.stack import Stacked, together
from reproductions.trial import Trial

EPOCHS = {"paper": (80, 50, 30, 20, 15, 10, 5, 3), "smoke": (3, 2, 1)}
ENOUGH = {"paper": 30, "smoke": 2}
SEEDS = {"paper": 5, "smoke": 2}
DEPTHS = {"paper": (110, 218), "smoke": (8, 14)}
AT_ONCE = 10  # trials of a group
PROBE = 75.0  # seconds that the probe may take
VARIANT = 40.0  # seconds that one of its variants may take
HANGS = 20.0  # seconds over that, after which it is taken to hang
RESERVE = 20.0  # seconds kept for results and writing
BEGIN = 12.0  # seconds to build, warm up and capture a group
MARGIN = 1.1  # on what is expected


class OutOfTime(Exception):
    """The time that was given is over."""


@dataclass(frozen=True)
class Way:
    """How trials are trained at once: one of `stack.WAYS`, in a captured graph or launched by the host."""

    kind: str
    precision: str
    captured: bool
    speed: float  # `grid.work` a second, of all trials together
    leaks: bool = False  # a NaN of one trial reaches others

    def epoch(self, trials: Sequence[Trial]) -> float:
        """Seconds that an epoch of the trials is expected to take; a test on a fifth of the images is forward alone."""
        return (1 + 0.2 / 3) * sum(work(one) / one.epochs for one in trials) / self.speed

    def seconds(self, trials: Sequence[Trial]) -> float:
        """Seconds that the trials are expected to take."""
        return BEGIN + MARGIN * trials[0].epochs * self.epoch(trials)


# ---- the cells
def cells(preset: str, epochs: int, precision: str) -> list[tuple[str, list[Trial]]]:
    """The cells in order of worth: a title, and trials of which those beside each other form groups."""
    deep, deeper = DEPTHS[preset]
    scale = {**IMAGES[preset], "precision": precision}
    full: Part = {**scale, "epochs": epochs, "milestones": (0.5, 0.75), "log": True}
    early: Part = {**scale, "epochs": 3 if preset == "paper" else 1, "milestones": (), "log": True}
    seeds = range(SEEDS[preset])

    def trials(base: Part, depth: int, *arms: Part) -> list[Trial]:
        return [Trial(**{**base, **arm, "depth": depth, "seed": seed}) for arm in arms for seed in seeds]

    large = [replace(select.short(preset, "resnet", deep, h), precision=precision) for h in (5.0, 10.0, 20.0)]
    many = range(select.FAILURE_SEEDS if preset == "paper" else 2)
    return [
        (f"ResNet-{deep} in full, h = 1 and 0.1: Figs 2 and 3, two points of 6", trials(full, deep, PLAIN, EULER)),
        (f"ResNet-{deeper}, the first iterations: Fig. 2", trials(early, deeper, PLAIN, EULER)),
        ("failures at large h: Fig. 6", [replace(one, seed=seed) for one in large for seed in many]),
        ("controls: the start alone, the learning rate alone", trials(full, deep, START, RATE)),
        ("controls: h = auto, an empty branch at the start", trials(full, deep, AUTO, {"initial": 0.0})),
        ("controls: warm-up, weight decay", trials(full, deep, {"warmup": 400}, {"weight_decay": 1e-4})),
        (f"ResNet-{deeper} in full, h = 1 and 0.1", trials(full, deeper, PLAIN, EULER)),
    ]


def primary(results: Results, preset: str, epochs: int, precision: str) -> list[Row]:
    """The primary hypotheses on the first cell, written before it was run."""
    trials = cells(preset, epochs, precision)[0][1]
    pair, last = (trials[0], trials[SEEDS[preset]]), trials[0].depth - 1
    rows = []
    for claim, name, higher in (
        ("tests better", "test_accuracy", True),
        ("trains better (loss)", "train_loss", False),
        ("has the smaller averaged weight norm of layer 2", "log/layer 2/mean_weight", False),
        ("has the smaller largest gradient of layer 2", "log/layer 2/largest_gradient", False),
        (f"has the smaller late gradients of layer {last}", f"log/layer {last}/late_gradient", False),
        (f"has the less bumpy late gradients of layer {last}", f"log/layer {last}/late_variation", False),
    ):
        claim = f"resnet {last + 1}: h = 0.1 {claim} than h = 1"
        rows.append(compare(results, claim, [pair], name, higher=higher, form="{:+.3g}"))
    return rows


# ---- the probe
@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise OutOfTime in here after some seconds; what hangs so that it can't be raised ends the process."""

    def ring(number: int, frame: object) -> None:
        raise OutOfTime(f"took longer than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01))
    faulthandler.dump_traceback_later(seconds + HANGS, exit=True, file=sys.__stderr__ or sys.stderr)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def variants(device: torch.device) -> list[tuple[str, str]]:
    """Ways and precisions, the ones first that are needed most."""
    if device.type != "cuda":
        return [("stacked", "fp32"), ("separate", "fp32")]
    both = [("stacked", "tf32"), ("separate", "tf32"), ("stacked", "bf16"), ("compiled", "bf16")]
    return [*both, ("separate", "bf16"), ("compiled", "tf32")]


def measure(trainings: Sequence[Training], kind: str, row: dict[str, Any]) -> None:
    """Samples a second of an epoch's whole batches, into `row`: launched by the host, and captured in a graph."""
    device, size = trainings[0].device, trainings[0].sizes[0]
    for training in trainings:
        training.begin()
        training.set_rate(0)
    engine = together(trainings, kind)
    whole = engine.sizes.count(size)

    def timed(run: Callable[[], object], times: int) -> float:
        for training in trainings:
            training.position.zero_()
            training.iteration.zero_()
        _wait(device)
        started = time.perf_counter()
        for _ in range(times):
            run()
        _wait(device)
        return time.perf_counter() - started

    def speed(seconds: float, times: int) -> float:
        return len(trainings) * size * times / seconds

    with fastest_convolutions(device.type == "cuda"):
        row["warm_up_seconds"] = timed(lambda: engine._warm_up(size), min(WARM_UP, whole))
        times = min(3, whole)
        row["launched"] = speed(timed(lambda: engine._warm_up(size), times), times)
    if isinstance(engine, Stacked):
        row["nan_leaks"] = leaks(engine, size)
    if engine.captures:
        engine.warmed = WARM_UP
        row["capture_seconds"] = timed(lambda: engine.step(size), 1)
        once = timed(lambda: engine.step(size), 3) / 3
        times = max(3, min(whole, int(1.0 / once)))
        row["captured"] = speed(timed(lambda: engine.step(size), times), times)


def leaks(engine: Stacked, size: int) -> bool:
    """Whether a NaN in one trial makes gradients of another one NaN."""
    poisoned, *others = engine.trainings
    kept = poisoned.weights()
    with torch.no_grad():
        next(poisoned.network.parameters()).fill_(float("nan"))
    engine.differentiate(size)
    sums = [p.grad.sum() for training in others for p in training.network.parameters() if p.grad is not None]
    leaked = not torch.stack(sums).isfinite().all().item()
    poisoned.network.load_state_dict(kept)
    return leaked


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ---- the campaign
@dataclass
class Campaign:
    """A campaign in a folder, from `started` on for `seconds`.

    Attributes:
        preset: `paper`, or `smoke` for networks of 8 and 14 layers on a slice of the data.
        way: try this one of `stack.WAYS` alone; all without it.
        launched: let the host launch each kernel, and capture no graph.
    """

    out: Path
    data_root: Path
    device: torch.device
    seconds: float
    preset: str = "paper"
    way: str = ""
    launched: bool = False
    recorded: Sequence[Path] = ()
    started: float = field(default_factory=time.perf_counter)
    notes: dict[str, Any] = field(default_factory=dict)

    def left(self) -> float:
        return self.seconds - (time.perf_counter() - self.started)

    def note(self, text: str) -> None:
        line = f"{time.perf_counter() - self.started:6.1f} s  {text}"
        print(line, flush=True)
        self.notes.setdefault("events", []).append(line)
        self._write()

    def _write(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        unfinished = self.out / "probe.unfinished"
        unfinished.write_text(json.dumps(self.notes, indent=1) + "\n")
        os.replace(unfinished, self.out / "probe.json")

    def run(self) -> int:
        """Work through the cells; returns how many trials have a record of this campaign."""
        self.notes |= {"environment": environment(self.device), "seconds": self.seconds, "preset": self.preset}
        self.notes |= {"rule": " ".join((__doc__ or "").split("\n\n")[1].split()), "variants": []}
        check_data(Place(self.out, self.data_root, self.device), cells(self.preset, 1, "fp32")[0][1])
        before, earlier = len(self.records()), self.earlier()
        with eulernet.kernels.mode("torch"):  # what is measured here is the engine, not the library's kernels
            if earlier is None:
                ways = self.probe()
                if not ways:
                    self.note("no way to train works here")
                    return 0
                epochs, ways = self.choose(ways)
            else:
                epochs, ways = earlier
            for number, (title, trials) in enumerate(cells(self.preset, epochs, ways[0].precision)):
                self.cell(title, trials, ways, must=number == 0)
                ways = [way for way in ways if not way.leaks] or ways  # later cells have trials that diverge
        self.note(f"done; {self.left():.0f} s left")
        return len(self.records()) - before

    def records(self) -> list[Record]:
        """Those of this folder and of `recorded`, as far as they are of these data."""
        return known_records((self.out, *self.recorded), self.data_root, ["cifar10"])

    # ---- which way, how many epochs
    def earlier(self) -> tuple[int, list[Way]] | None:
        """What an earlier campaign in this folder, on such a device, has chosen."""
        path = self.out / "probe.json"
        notes = json.loads(path.read_text()) if path.exists() else {}
        on = notes.get("environment", {})
        alike = all(on.get(key) == self.notes["environment"][key] for key in ("device", "torch"))
        chosen = notes.get("chosen")
        if chosen is None or not alike or notes.get("preset") != self.preset or self.way not in ("", chosen["kind"]):
            return None
        self.notes = {**notes, "seconds": self.seconds, "rule": self.notes["rule"]}
        way = Way(**{key: chosen[key] for key in ("kind", "precision", "captured", "speed", "leaks")})
        self.note(f"as chosen before: {way}, {chosen['epochs']} epochs")
        return chosen["epochs"], [replace(way, captured=way.captured and not self.launched)]

    def probe(self) -> list[Way]:
        """All ways that work here."""
        first = cells(self.preset, EPOCHS[self.preset][-1], "bf16")[0][1][:AT_ONCE]
        if self.device.type != "cuda":
            first = [replace(one, precision="fp32") for one in first]
        trainings = [Training(one, load(one, self.data_root, self.device), self.device) for one in first]
        self.note(f"{len(first)} networks of depth {first[0].depth} are built")
        ends = self.left() - PROBE
        ways: list[Way] = []
        for kind, precision in variants(self.device):
            row: dict[str, Any] = {"way": kind, "precision": precision, "at_once": len(first)}
            if self.way not in ("", kind):
                continue
            self.notes["variants"].append(row)
            time_left = min(VARIANT, self.left() - ends)
            if time_left < 3 and ways:
                row["error"] = "not tried: the probe's time was over"
                continue
            for training in trainings:
                training.trial = replace(training.trial, precision=precision)
            try:
                with limited(time_left), settings(precision):
                    measure(trainings, kind, row)
            except Exception as error:  # what one way cannot do is no reason not to try the next
                row["error"] = f"{type(error).__name__}: {str(error)[:500]}"
            self._free()
            torch._dynamo.reset()
            scale = work(first[0]) / (first[0].epochs * (first[0].train or 50_000))  # of one sample
            for captured in (True, False):
                speed = row.get("captured" if captured else "launched")
                if speed and not (captured and self.launched):
                    ways.append(Way(kind, precision, captured, speed * scale, row.get("nan_leaks", False)))
            shown = {key: f"{value:,.0f}" for key, value in row.items() if key in ("launched", "captured")}
            self.note(f"{kind}, {precision}: {shown} images a second {row.get('error', '')}")
        return sorted(ways, key=lambda way: -way.speed)

    def choose(self, ways: list[Way]) -> tuple[int, list[Way]]:
        """The number of epochs by the rule, and the ways of the precision that goes with it, the fastest first."""
        room = {}
        for precision in dict.fromkeys(sorted((way.precision for way in ways), reverse=True)):  # TF32 before bf16
            fastest = next(way for way in ways if way.precision == precision)
            fitting = [n for n in EPOCHS[self.preset] if self._fits(n, fastest)]
            room[precision] = fitting[0] if fitting else EPOCHS[self.preset][-1]
        precision = next(iter(room))
        if room[precision] < ENOUGH[self.preset]:
            precision = max(room, key=lambda one: room[one])
        chosen = [way for way in ways if way.precision == precision]
        self.notes["chosen"] = {**vars(chosen[0]), "epochs": room[precision], "room": room}
        self.note(f"chosen: {chosen[0]}, {room[precision]} epochs; room by precision: {room}")
        return room[precision], chosen

    def _fits(self, epochs: int, way: Way) -> bool:
        trials = cells(self.preset, epochs, way.precision)[0][1]
        return way.seconds(trials) + RESERVE < self.left()

    # ---- a cell
    def cell(self, title: str, trials: Sequence[Trial], ways: Sequence[Way], must: bool = False) -> None:
        """Train what has no record yet, group by group, if it `must` be or is expected to end in time."""
        done = {record.get("key") for record in self.records()}
        missing = [one for one in trials if one.key not in done]
        for some in (missing[start : start + AT_ONCE] for start in range(0, len(missing), AT_ONCE)):
            expected = ways[0].seconds(some)
            if not must and expected + RESERVE > self.left():
                self.note(f"not begun, {expected:.0f} s expected, {self.left():.0f} s left: {title}")
                return
            self.note(f"begun, {expected:.0f} s expected, {self.left():.0f} s left: {title}; {named(some)}")
            for way in ways:
                try:
                    with settings(way.precision):
                        self.group(some, way)
                    break
                except OutOfTime:
                    self.note(f"stopped for time: {title}")
                    return
                except Exception as error:  # the next way may do it
                    self.note(f"{way.kind}, captured: {way.captured}: {type(error).__name__}: {str(error)[:500]}")
                    self._free()

    def group(self, trials: Sequence[Trial], way: Way) -> None:
        """Train a group and write its records."""
        trainings = [Training(one, load(one, self.data_root, self.device), self.device) for one in trials]
        engine: SideBySide | None = None
        while alive := [training for training in trainings if not training.done]:
            if fresh := engine is None or engine.trainings != alive:
                engine = together(alive, way.kind)
                engine.captures &= way.captured
            started = time.perf_counter()
            try:
                engine.epoch(self._watch)
            except OutOfTime:
                self._keep_unfinished(trainings)
                raise
            pace = time.perf_counter() - started
            if fresh:  # with the set-up in it
                pace = min(pace, way.epoch([training.trial for training in alive]))
            left = [training for training in alive if not training.done]
            for training in alive:
                if training not in left and len(left) > 0:  # its loss is not finite: it leaves the others
                    self._record(training, training.result(), way)
            self._say(alive, pace)
            if left:
                if not fresh:
                    self._shorten(left, pace)
                if pace + RESERVE / 2 > self.left():
                    self._keep_unfinished(left)
                    raise OutOfTime
            else:
                for training, result in zip(alive, engine.results(), strict=True):
                    self._record(training, result, way)
                self.note(f"{len(trainings)} trials are done")

    def _watch(self, iterations: int) -> None:
        if self.left() < RESERVE / 4:
            raise OutOfTime

    def _shorten(self, trainings: Sequence[Training], pace: float) -> None:
        """Take fewer epochs, if at this pace there is no time for all, and nothing so far would have been different."""
        trial, done = trainings[0].trial, trainings[0].epoch
        if (trial.epochs - done) * pace + RESERVE < self.left():
            return
        fewer = [n for n in EPOCHS[self.preset] if done < n < trial.epochs and same_so_far(trial, n, done)]
        fitting = [n for n in fewer if (n - done) * pace + RESERVE < self.left()] or fewer[-1:]
        if trial.milestones and fitting:
            self.note(f"{pace:.1f} s an epoch: {fitting[0]} epochs instead of {trial.epochs}")
            for training in trainings:
                training.trial = replace(training.trial, epochs=fitting[0])

    def _say(self, trainings: Sequence[Training], pace: float) -> None:
        last = {key: [t.curve[key][-1] for t in trainings] for key in ("train_loss", "test_accuracy")}
        shown = "; ".join(f"{key} {' '.join(f'{value:.3f}' for value in values)}" for key, values in last.items())
        trial = trainings[0].trial
        print(
            f"  epoch {trainings[0].epoch} of {trial.epochs}, {pace:.1f} s, {self.left():.0f} s left: {shown}",
            flush=True,
        )

    def _record(self, training: Training, result: dict[str, Any], way: Way) -> None:
        trial = training.trial
        how = {"way": way.kind, "captured": way.captured}
        record = {"study": "trials", "key": trial.key, "config": trial.config(), "result": result}
        record["data"] = dict(training.source.data)
        append_record(self.out, record | {"seconds": training.seconds, "environment": environment(self.device) | how})

    def _keep_unfinished(self, trainings: Sequence[Training]) -> None:
        """What is known of trainings that did not end: no result of a trial, but curves to look at."""
        with (self.out / "unfinished.jsonl").open("a") as file:
            for training in trainings:
                known = {"config": training.trial.config(), "epochs_done": training.epoch, "curve": training.curve}
                file.write(json.dumps(known) + "\n")

    def _free(self) -> None:
        """Give back what a way held; one that failed while it was captured may have left its stream the current one."""
        if self.device.type == "cuda":
            with suppress(RuntimeError):
                torch.cuda.set_stream(torch.cuda.default_stream(self.device))
                torch.cuda.empty_cache()


def same_so_far(trial: Trial, epochs: int, done: int) -> bool:
    """Whether the learning rates of the epochs that are done are those of a trial of another number of epochs.

    Example:
        >>> same_so_far(Trial(epochs=50), 30, 15), same_so_far(Trial(epochs=50), 30, 16)
        (True, False)
    """
    other = replace(trial, epochs=epochs)
    return all(learning_rate(trial, n, 10**6) == learning_rate(other, n, 10**6) for n in range(done))
