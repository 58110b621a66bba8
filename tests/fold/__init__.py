"""h in the weights."""
