"""The first experiments, their data and their command."""
