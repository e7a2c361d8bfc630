"""A user's mistake, told apart from a fault of the program.

The library raises `InputError` (a `ValueError`) with one line that names what was given, what was
expected and what to do. Scripts print that line and stop; any other exception keeps its traceback.
"""


class InputError(ValueError):
    """What was given cannot be used; the message says why, and what would work."""
