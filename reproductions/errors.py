"""What is wrong with files, folders or options, said in words."""


class DataError(ValueError):
    """A data file is missing or damaged; the message names it and says what was expected."""
