"""The studies of reproductions/."""
