"""A step factor for the residual networks that people use: `x + F(x)` becomes `x + h * F(x)`, in one line, in place."""

from eulernet import functional
from eulernet._calibrate import calibrate
from eulernet._diagnose import Diagnosis, diagnose
from eulernet._errors import EulernetError, EulernetWarning
from eulernet._patch import find_steps, is_patched, patch, set_h, steps, unpatch
from eulernet._report import Place, Step, Steps
from eulernet._watch import watch

__all__ = [
    "Diagnosis",
    "EulernetError",
    "EulernetWarning",
    "Place",
    "Step",
    "Steps",
    "calibrate",
    "diagnose",
    "find_steps",
    "functional",
    "is_patched",
    "patch",
    "set_h",
    "steps",
    "unpatch",
    "watch",
]
