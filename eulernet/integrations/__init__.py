"""One line in each trainer; a trainer is imported with its module here, and not before."""
