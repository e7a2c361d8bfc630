"""How a script and the command run: what they print, and how they end.

A user's mistake ends them with one line and exit status 1, Ctrl-C with 130; a fault of the program
keeps its traceback.
"""

import argparse
import errno
import os
import re
import sys
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout

import torch

from vqgan import distributed
from vqgan.console import Console, printable
from vqgan.errors import InputError

# What a user can do about an error of the operating system.
OS_REMEDIES = {
    errno.ENOENT: "check the path",
    errno.EEXIST: "a file is where a folder should be; name another --out",
    errno.ENOTDIR: "a file is where a folder should be; name another --out",
    errno.EISDIR: "a folder is where a file should be; name another",
    errno.EACCES: "check the permissions of this path",
    errno.EROFS: "the disk is read-only; name another --out",
    errno.ENOSPC: "make room on the disk; saved files are intact",
    errno.EFBIG: "make room on the disk; saved files are intact",
}


def run_script(
    parse: Callable[[], argparse.Namespace],
    main: Callable[[argparse.Namespace], None],
    *,
    resumable: bool = True,
) -> None:
    """Run main(parse()); a user's mistake ends it with one line and exit status 1.

    `resumable` says whether the script knows --resume.
    """
    flags: set[str] = set()
    formatwarning = warnings.formatwarning
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"  # without a source line
    # A shell may have closed a stream, and of several processes one speaks.
    heard = (s if distributed.is_main() else None for s in (sys.stdout, sys.stderr))
    out, err = (s or open(os.devnull, "w") for s in heard)
    streams = Console(out), Console(err, controls="\n\t\r\x1b")
    try:
        with redirect_stdout(streams[0]), redirect_stderr(streams[1]):  # type: ignore[type-var]
            try:
                args = parse()
                flags = set(vars(args))
                main(args)
            finally:
                warnings.formatwarning = formatwarning
                sys.stdout.flush()
    except InputError as error:
        message = name_flags(str(error), flags)
    except KeyboardInterrupt:
        resume = "; --resume continues from the last checkpoint, or from the start without one"
        if distributed.is_main():
            print("stopped" + (resume if resumable else ""), file=sys.stderr)
        sys.exit(130)  # 128 + SIGINT, as shells expect of Ctrl-C
    except OSError as error:
        message = f"{error}: {OS_REMEDIES.get(error.errno or 0, 'saved files are intact')}"
    except (MemoryError, OverflowError, RuntimeError) as error:
        if distributed.num_processes() > 1 and "peer" in str(error):
            sys.exit("error: another process has stopped, and its error is above")
        # CUDA raises a separate class for this, the CPU only another message.
        is_memory = any(text in str(error) for text in ("can't allocate", "overflowed"))
        is_memory = is_memory or not isinstance(error, RuntimeError)
        if not (is_memory or isinstance(error, torch.OutOfMemoryError)):
            raise
        remedy = "give fewer or smaller images"
        if resumable:
            remedy = "--resume, or start again with a smaller --batch-size or a smaller model"
        reason = (str(error) or "a number is too large").splitlines()[0]
        message = f"out of memory ({reason}): free memory and {remedy}"
    else:
        distributed.stop()
        return
    sys.exit("error: " + printable(message.replace("\n", " ")) if distributed.is_main() else 1)


def name_flags(message: str, flags: set[str]) -> str:
    """Name arguments as a user gave them: "image_size=30" -> "--image-size 30"."""

    def flag(match: re.Match) -> str:
        name = match[1]
        return f"--{name.replace('_', '-')} " if name in flags else match[0]

    # At the beginning, or after a space, a bracket or a colon.
    return re.sub(r"(?<![^\s(:])([a-z]\w*)=", flag, message)
