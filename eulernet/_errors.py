"""The one error and the one warning that eulernet raises."""


class EulernetError(ValueError):
    """What was asked cannot be done; the message says where, why, and what to call instead."""


class EulernetWarning(UserWarning):
    """It was done, but probably not what was meant; the message says why."""
