"""A benchmark's arguments that say what cannot be."""


class WrongArgument(ValueError):
    """An argument is out of range, or names what is not known; nothing was timed yet."""
