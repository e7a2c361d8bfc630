"""Errors that tell a user's mistake apart from a fault of the program.

A mistake in a user's flags, files or folders raises `InputError`, a `ValueError` with one line that
names what was given, what was expected and what to do; scripts print that line and stop. A function
that code calls with arguments it cannot take raises a plain `ValueError`, and keeps its traceback,
unless the arguments came from a user: the code that read them says so with `user_input`.
"""

from collections.abc import Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """Input that cannot be used; the message says why, and what would work."""


@contextmanager
def user_input() -> Iterator[None]:
    """Turn a `ValueError` into an `InputError`, because a user gave what is checked inside."""
    try:
        yield
    except ValueError as error:
        raise InputError(str(error)) from error
