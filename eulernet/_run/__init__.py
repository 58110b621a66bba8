"""What runs instead of the addition."""
