"""Which h."""
