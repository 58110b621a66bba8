"""The studies, in the order of the report: to add one, write its file and add its line to `STUDIES`.

A study is a module with some of these:

- `TITLE`: its heading in the report;
- `trials(preset, seeds)`: the trainings of a grid of `Trial`s; the command line then has a command of its name;
- `claims(results, preset)`: what is said of the records, row by row;
- `figures(results)`: its pictures, each with the name of its file.
"""

from __future__ import annotations

from types import ModuleType

from reproductions.studies import (
    depth_transfer,
    fig1_euler,
    fig2_dynamics,
    fig3_depth,
    fig4_two_moon,
    fig5_noise,
    fig6_choice_of_h,
    finetuning,
    long_memory,
    propositions,
    robustness,
    throughput,
    timm_on_cifar10,
)

STUDIES: dict[str, ModuleType] = {
    "euler": fig1_euler,
    "dynamics": fig2_dynamics,
    "depth": fig3_depth,
    "two-moon": fig4_two_moon,
    "noise": fig5_noise,
    "select": fig6_choice_of_h,
    "robust": robustness,
    "finetune": finetuning,
    "bounds": propositions,
    "cifar10": timm_on_cifar10,
    "transfer": depth_transfer,
    "memory": long_memory,
    "throughput": throughput,
}

GRIDS = {name: study for name, study in STUDIES.items() if hasattr(study, "trials")}
