"""A step factor for the residual networks that people use: `x + F(x)` becomes `x + h * F(x)`, in one line, in place."""

from eulernet import functional, schedules
from eulernet._calibrate import calibrate
from eulernet._diagnose import Diagnosis, diagnose
from eulernet._errors import EulernetError, EulernetWarning
from eulernet._fold import fold, param_groups
from eulernet._patch import find_steps, is_patched, patch, set_h, steps, unpatch
from eulernet._report import Place, Step, Steps
from eulernet._suggest import suggest_h
from eulernet._watch import watch
from eulernet.schedules import HScheduler

__all__ = [
    "Diagnosis",
    "EulernetError",
    "EulernetWarning",
    "HScheduler",
    "Place",
    "Step",
    "Steps",
    "calibrate",
    "diagnose",
    "find_steps",
    "fold",
    "functional",
    "is_patched",
    "param_groups",
    "patch",
    "schedules",
    "set_h",
    "steps",
    "suggest_h",
    "unpatch",
    "watch",
]
