"""The error of a user's input."""


class InputError(ValueError):
    """Something the user gave that cannot work; its message is the one line the user sees."""
