"""What patching costs: `python -m benchmarks` measures, prints a table and writes JSON."""
