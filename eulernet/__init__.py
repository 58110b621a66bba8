"""A step factor for the residual networks that people use: `x + F(x)` becomes `x + h * F(x)`, in one line, in place."""

import sys

from eulernet import _source, _step, functional, kernels, nn, schedules
from eulernet._errors import EulernetError, EulernetWarning
from eulernet._fold import fold, param_groups
from eulernet._patch.patch import find_steps, is_patched, patch, set_h, steps, unpatch
from eulernet._patch.select import HLike, Selector
from eulernet._run import factor as _factor
from eulernet._step import LeftOut, Outside, Place, Reason, Step, Steps
from eulernet._tune.calibrate import calibrate
from eulernet._tune.depth_check import DepthCheck, depth_check
from eulernet._tune.diagnose import Diagnosis, diagnose
from eulernet._tune.meter import LossFn
from eulernet._tune.scheduler import HScheduler
from eulernet._tune.suggest import Suggestion, suggest_h
from eulernet._tune.watch import watch

__version__ = "0.1.0"

vars(schedules)["HScheduler"] = HScheduler  # it belongs to the models, which lie above the rules, and was there first
# Pickles from before 0.1.0 name these modules; they name `eulernet._patch._restore` besides.
sys.modules |= {"eulernet._rewrite": _source, "eulernet._report": _step, "eulernet._factor": _factor}

__all__ = [
    "DepthCheck",
    "Diagnosis",
    "EulernetError",
    "EulernetWarning",
    "HLike",
    "HScheduler",
    "LeftOut",
    "LossFn",
    "Outside",
    "Place",
    "Reason",
    "Selector",
    "Step",
    "Steps",
    "Suggestion",
    "__version__",
    "calibrate",
    "depth_check",
    "diagnose",
    "find_steps",
    "fold",
    "functional",
    "is_patched",
    "kernels",
    "nn",
    "param_groups",
    "patch",
    "schedules",
    "set_h",
    "steps",
    "suggest_h",
    "unpatch",
    "watch",
]
