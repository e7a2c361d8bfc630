"""What a user sees: text of any alphabet, in a terminal, a file or a pipe, and progress bars.

`script.run_script` puts a `Console` in front of both output streams, so all prints pass here.
"""

import os
import sys
from collections.abc import Iterable
from typing import Any, TextIO

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 30  # of a progress bar in a file: two lines a minute


def printable(text: str, controls: str = "\n\t") -> str:
    """Escape control characters but a few: a stranger's file may hold those of a terminal.

    (`ascii` gives a character's escape, in quotes.)
    """
    return "".join(c if c.isprintable() or c in controls else ascii(c)[1:-1] for c in text)


class Console:
    """A text stream that can show every text, and whose reader may go away.

    Args:
        controls: control characters that are not escaped. (A progress bar needs two more, the
            carriage return and the escape.)
    """

    def __init__(self, stream: TextIO, controls: str = "\n\t"):
        self.stream, self.controls = stream, controls

    def write(self, text: str) -> int:
        """Write a text, with escapes for what the stream's encoding lacks."""
        if text.startswith("\r") and not self.stream.isatty():
            # A bar redraws its line. In a file, each drawing becomes a line of its own, and the
            # blanks that clear a bar become nothing.
            text = text.strip("\r ")
            text += "\n" if text else ""
        encoding = self.stream.encoding or "utf-8"
        shown = printable(text, self.controls).encode(encoding, "backslashreplace")
        self._call(self.stream.write, shown.decode(encoding))
        return len(text)

    def flush(self) -> None:
        """Write what is buffered."""
        self._call(self.stream.flush)

    def _call(self, function: Any, *args: str) -> None:
        try:
            function(*args)
        except BrokenPipeError:  # as after `| head`: the run goes on, and nobody reads its text
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def progress_bar(iterable: Iterable | None = None, **options: Any) -> tqdm:
    """A tqdm bar; `options` are tqdm's. In a file it writes a line now and then, not a page."""
    interval = 0.5 if sys.stderr.isatty() else SECONDS_BETWEEN_LINES
    return tqdm(iterable, mininterval=interval, **options)
