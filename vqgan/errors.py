"""Errors that tell a user's mistake apart from a fault of the program.

A mistake in a user's flags, files or folders raises `InputError`, a `ValueError` with one line that
names what was given, what was expected and what to do; scripts print that line and stop. A function
that code calls with arguments it cannot take raises a plain `ValueError`, and keeps its traceback,
unless the arguments came from a user: the code that read them says so with `user_input`, and with
`file_input` if they came from a file.
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


@contextmanager
def file_input(complaint: str, advice: str = "") -> Iterator[None]:
    """Turn every error into an `InputError`, because a file is read, or downloaded, inside.

    A damaged file, a stranger's, or a server raises many types. The message is the complaint, the
    reason in brackets, and the advice.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{complaint} ({reason}){advice}") from error
