"""Files, in and out. Every file of the package passes through one of these functions.

    write_atomically, write_json, save_plain    what is written is whole, or not there
    load_plain, load_arrays, read_json          what is read may be damaged, or a stranger's
    lock_folder, unused_path                    nothing is overwritten unasked

A checkpoint is a zip file of plain tensors, numbers, strings, lists and dicts. It is read with
`weights_only=True`, so no code in it is run.
"""

import io
import json
import os
import sys
import warnings
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from vqgan import distributed
from vqgan.errors import InputError, file_input

# --- writing -------------------------------------------------------------------------------------


def write_atomically(path: Path, content: bytes) -> None:
    """Write a temporary file and rename it: a kill or a full disk leaves the old file intact.

    Of several processes that train together, the first one writes.
    """
    if not distributed.is_main():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, content: dict) -> None:
    """Write indented JSON, which people can read too, whole or not at all."""
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())


def save_plain(path: Path, state: dict) -> None:
    """Write plain tensors, numbers, strings, lists and dicts, whole or not at all."""
    buffer = io.BytesIO()  # on a full disk, torch.save raises something other than OSError
    torch.save(state, buffer)
    write_atomically(path, buffer.getvalue())


# --- reading -------------------------------------------------------------------------------------


def load_tensors(path: str | Path) -> Any:
    """Read a `.pt` file onto the CPU, without running code. (`load_plain` checks it.)"""
    return torch.load(path, map_location="cpu", weights_only=True)


def load_plain(path: str | Path, *, remedy: str, load: Callable = load_tensors) -> Any:
    """Read what `save_plain` or another torch.save wrote.

    Args:
        remedy: what the error advises.
        load: reads the file after it was checked.

    Raises:
        InputError: the file is of another kind, damaged, compressed, or carries code.
    """
    try:
        check_archive(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of odd formats; the error says enough
            return load(path)
    except (FileNotFoundError, IsADirectoryError, PermissionError):
        raise  # other kinds of OSError are torch's
    except Exception as error:  # pickle, zipfile and torch raise many types
        reason = str(error).split("\n")[0] if type(error) is ValueError else "is it damaged?"
        if "unsupported" in str(error).lower():
            reason = "it carries code, which was not run"
        raise InputError(f"{path} is no checkpoint of plain data ({reason}): {remedy}") from error


def check_archive(path: str | Path) -> None:
    """Raise `ValueError` unless a zip file is as torch.save and numpy.savez write it.

    They do not compress, and store nothing twice, so a small file cannot fill the memory. They
    write checksums, which torch does not look at: training would go on from flipped bits.
    """
    with open(path, "rb") as file:
        if not zipfile.is_zipfile(file):
            raise ValueError("it is damaged or another kind of file; code in it was not run")
        archive, size = zipfile.ZipFile(file), os.fstat(file.fileno()).st_size
        members = archive.infolist()
        is_stored = all(member.compress_type == zipfile.ZIP_STORED for member in members)
        if not is_stored or sum(member.file_size for member in members) > size:
            raise ValueError("its content is compressed, which torch and numpy never do")
        damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"the checksum of {damaged} is wrong: it is damaged")


def load_arrays(path: str | Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Read the named arrays of a numpy.savez file. Raises `ValueError`, or another of numpy's."""
    check_archive(path)
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in names}


def read_json(path: Path) -> dict:
    """Read a JSON object. Raises InputError if there is none, OSError if there is no file."""
    text = path.read_bytes()
    with file_input(f"{path} cannot be read as JSON", ": repair it"):
        content = json.loads(text)
        if not isinstance(content, dict):
            raise ValueError(f"an object {{...}} was expected, not {content!r:.40}")
        return content


# --- folders -------------------------------------------------------------------------------------


def lock_folder(folder: Path) -> IO:
    """Let no other process write to a folder while the file that is returned stays open.

    The operating system lifts the lock when the process ends, however it ends. Of several
    processes that train together, the first one holds it.

    Raises:
        InputError: another process holds the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / ".lock", "a")  # it stays open
    if not distributed.is_main():
        return file
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            # POSIX's lock. The other one (flock) would last as long as a worker process lives.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        raise InputError(f"another run writes to {folder}: wait, or give out=FOLDER") from error
    return file


def unused_path(path: Path) -> Path:
    """The path if nothing is there, else samples-2.png in place of samples.png, and so on."""
    number, unused = 1, path
    while unused.exists():
        number += 1
        unused = path.with_stem(f"{path.stem}-{number}")
    return unused
