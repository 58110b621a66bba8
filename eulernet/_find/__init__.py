"""Find which additions are residual steps. The owner's model never runs: a copy of it does."""
