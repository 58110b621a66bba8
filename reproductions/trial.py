"""The configuration of one training of a study."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

import eulernet

CLASSES = {"cifar10": 10, "ag-news": 4}
RULES: dict[str, Any] = {"auto": "auto", "1/D": eulernet.schedules.inverse()}
CALIBRATE = "calibrate"


@dataclass(frozen=True)
class Trial:
    """The configuration of one training. The defaults are the paper's for CIFAR-10.

    Attributes:
        data: the data set, `cifar10` or `ag-news`.
        model: `resnet`, `vdcnn` (the authors' variant) or `vdcnn-original`.
        depth: of the network.
        norm: whether it has batch normalisation.
        h: the step factor that `eulernet.patch` gives it: a number, `auto`, `1/D`, or `calibrate` for what
            `eulernet.calibrate` makes of the first batch.
        initial: factor on the initial values of the last affine map of each branch.
        rate: factor on the learning rate of these maps.
        optimizer: `sgd` with momentum 0.9, `adam`, `rmsprop` or `adagrad`.
        learning_rate: at the start; divided by 10 after the share of the epochs that each of `milestones` names.
        weight_decay: on all parameters.
        warmup: iterations over which the learning rate grows from 0.
        clip: largest norm of all gradients together; 0 for any.
        batch_size: samples an iteration; the last of an epoch may have fewer.
        epochs: how often each training sample is seen.
        train: use the first so many training samples; 0 for all.
        test: use the first so many test samples; 0 for all.
        held_out: keep the last so many of the training samples for validation.
        size: side of the images, letters of the texts; 0 for all (32 and 1,024).
        classes: train and test on this part of the classes, from the first to before the last; `()` for all.
        start: the trial whose trained network (of the same seed) this one begins with, patched with `preserve=True`.
        noise: what the training data are corrupted with (`mosaic`, `gaussian`, `letters`, `labels`), drawn once.
        level: how much of it.
        probes: corruptions of the test inputs under which the trained network is tested as well.
        precision: `fp32`, `tf32` (fp32 with TF32 convolutions where there are any) or `bf16` (the branches alone).
        log: whether weight and gradient norms are recorded.
        seed: of the initial values, of the order of the samples, and of all other randomness.
    """

    data: str = "cifar10"
    model: str = "resnet"
    depth: int = 20
    norm: bool = True
    h: float | str = 1.0
    initial: float = 1.0
    rate: float = 1.0
    optimizer: Literal["sgd", "adam", "rmsprop", "adagrad"] = "sgd"
    learning_rate: float = 0.1
    milestones: tuple[float, ...] = (0.5, 0.75)
    weight_decay: float = 0.0
    warmup: int = 0
    clip: float = 0.0
    batch_size: int = 128
    epochs: int = 80
    train: int = 0
    test: int = 0
    held_out: int = 0
    size: int = 0
    classes: tuple[int, ...] = ()
    start: Trial | None = None
    noise: str = ""
    level: float = 0.0
    probes: tuple[tuple[str, float], ...] = ()
    precision: str = "tf32"
    log: bool = False
    seed: int = 0

    @property
    def key(self) -> str:
        """The hash of the configuration; what is as it is by default has no part in it.

        Example:
            >>> Trial().key == Trial(depth=20).key, Trial().key == Trial(depth=56).key
            (True, False)
        """
        config = asdict(self)
        changed = {f.name: config[f.name] for f in fields(self) if getattr(self, f.name) != f.default}
        return hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def base(self) -> Trial | None:
        """The trial whose trained network this one begins with."""
        return replace(self.start, seed=self.seed) if self.start else None

    @property
    def class_count(self) -> int:
        return self.classes[1] - self.classes[0] if self.classes else CLASSES[self.data]

    def config(self) -> dict[str, Any]:
        """As a record has it."""
        config: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return config
