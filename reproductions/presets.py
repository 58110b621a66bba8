"""How large a study is: from minutes on two CPU cores to the paper's protocol."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PRESETS = {
    "smoke": "a slice of the data, minutes on 2 CPU cores: shows that all of it runs, and nothing else",
    "cpu": "5,000 images of 16 x 16 pixels, 4,000 texts of 256 letters: an hour on a CPU",
    "small": "all the data, fewer epochs, depths and seeds: 20 minutes on a GPU",
    "paper": "the paper's protocol",
}
# What some studies have besides: what campaign.py and desk.py run on a machine that is at hand for minutes or hours.
BRIEF = {
    "gpu": "15 minutes of a GPU: all images, 20 epochs (the rule of campaign.py), branches in bf16",
    "desk": "hours of a CPU: the paper's depths on 11,000 images of 8 x 8, 8,000 texts of 128 letters, levelled off",
}
SEEDS = {"smoke": 1, "cpu": 3, "small": 3, "paper": 5, **dict.fromkeys(BRIEF, 5)}

Part = Mapping[str, Any]  # some fields of a Trial

IMAGES: dict[str, Part] = {
    "smoke": {"size": 16, "train": 256, "test": 200, "batch_size": 64, "epochs": 1, "milestones": ()},
    "cpu": {"size": 16, "train": 5000, "test": 1000, "batch_size": 64, "epochs": 2, "milestones": ()},
    "small": {"epochs": 30},
    "paper": {},
    "gpu": {"epochs": 20, "precision": "bf16"},
    "desk": {"size": 8, "train": 11_000, "held_out": 1000, "batch_size": 64, "epochs": 15, "precision": "fp32"},
}
_NEWS: Part = {"data": "ag-news", "model": "vdcnn", "batch_size": 64, "milestones": ()}
TEXTS: dict[str, Part] = {
    "smoke": {**_NEWS, "size": 128, "train": 128, "test": 100, "epochs": 1},
    "cpu": {**_NEWS, "size": 256, "train": 4000, "test": 1000, "epochs": 2},
    "small": {**_NEWS, "epochs": 3},
    "desk": {
        **{**_NEWS, "size": 128, "train": 8000, "test": 2000, "epochs": 4, "learning_rate": 0.01},
        **{"milestones": (0.5, 0.75), "precision": "fp32"},
    },
    "paper": {**_NEWS, "epochs": 15},
}

# What is compared. Under SGD a step factor h is a start of the branches' last maps at h times their values, and a
# learning rate of these maps of h^2 times its own: the controls have one of these each.
PLAIN: Part = {"h": 1.0}
EULER: Part = {"h": 0.1}
AUTO: Part = {"h": "auto"}  # 1/sqrt(D)
START: Part = {"h": 1.0, "initial": 0.1}
RATE: Part = {"h": 1.0, "rate": 0.01}
