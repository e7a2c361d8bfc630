"""A user's mistake, told apart from a fault of the program.

What a user's flags, files or folders can cause raises `InputError`, a `ValueError` with one line
that names what was given, what was expected and what to do; scripts print that line and stop. A
function that code calls with tensors it cannot take raises a plain `ValueError`, and keeps its
traceback.
"""


class InputError(ValueError):
    """What was given cannot be used; the message says why, and what would work."""
