"""A user's mistake, told apart from a fault of the program.

What a user's flags, files or folders can cause raises `InputError`, a `ValueError` with one line
that names what was given, what was expected and what to do; scripts print that line and stop. A
function that code calls with arguments it cannot take raises a plain `ValueError`, and keeps its
traceback, unless the arguments came from a user: the place that read them says so with
`user_input`.
"""

from collections.abc import Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """What was given cannot be used; the message says why, and what would work."""


@contextmanager
def user_input() -> Iterator[None]:
    """Turn a `ValueError` into an `InputError`: what is checked inside was given by a user."""
    try:
        yield
    except ValueError as error:
        raise InputError(str(error)) from error
