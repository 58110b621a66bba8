"""h as a parameter."""
