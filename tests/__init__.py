"""The tests of eulernet: `python -m pytest -m "not sweep"` runs the quick ones."""
