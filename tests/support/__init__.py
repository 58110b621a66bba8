"""The rows of docs/support.md: a line of code each, which is run, and what is to come of it."""

from tests.support import compiled, inside, parallel, trainers, weights
from tests.support.base import Row

ROWS: list[Row] = [*compiled.ROWS, *parallel.ROWS, *weights.ROWS, *inside.ROWS, *trainers.ROWS]
