"""Make each of the steps `s + h F(s)`."""

from eulernet._patch.subclass import restore as _restore  # noqa: F401  its name in the pickles from before 0.1.0
