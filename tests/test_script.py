"""How a script ends: one line for a user's mistake, a traceback for a fault of the program."""

import argparse
import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vqgan.errors import InputError
from vqgan.script import name_flags, run_script

ROOT = Path(__file__).parents[1]


def run(error, *, resumable=True):
    """What a script ends with whose main raises an error."""

    def main(args):
        assert args.image_size == 30
        raise error

    def parse():
        return argparse.Namespace(image_size=30)

    with pytest.raises(SystemExit) as stopped:
        run_script(parse, main, resumable=resumable)
    assert "\n" not in stopped.value.code
    return stopped.value.code


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (InputError("no such data"), "error: no such data"),
        (InputError("image_size=30 is odd"), "error: --image-size 30 is odd"),
        (InputError("two\nlines, and a bell\a"), r"two lines, and a bell\x07"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device: make room"),
        (OSError(errno.EACCES, "Permission denied", "a.pt"), "'a.pt': check the permissions"),
        (OSError(errno.EISDIR, "Is a directory", "log.csv"), "'log.csv': a folder is where"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "x"), "too long"),
        (FileNotFoundError(2, "not there", "a.pt"), "a.pt"),
        (FileExistsError(17, "there already", "run"), "--out"),
        (MemoryError(), "out of memory"),
        (OverflowError("int too large to convert to float"), "int too large"),
        (torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate"), "--batch-size"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory"),
    ],
)
def test_a_users_mistake_ends_a_script_with_one_line(error, shown):
    assert shown in run(error)


def test_what_cannot_be_resumed_is_not_told_to():
    error = torch.OutOfMemoryError("CUDA out of memory.")
    assert "--resume" in run(error) and "--resume" not in run(error, resumable=False)


@pytest.mark.parametrize("resumable", [True, False])
def test_ctrl_c_ends_a_script_with_the_usual_status(resumable, capsys):
    def main(args):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stopped:
        run_script(argparse.Namespace, main, resumable=resumable)
    shown = capsys.readouterr().err
    assert stopped.value.code == 130 and shown.startswith("stopped") and shown.count("\n") == 1
    assert ("--resume" in shown) == resumable


@pytest.mark.parametrize("error", [ZeroDivisionError, ValueError, RuntimeError])
def test_a_fault_of_the_program_keeps_its_traceback(error):
    def main(args):
        raise error("a fault")

    with pytest.raises(error, match="a fault"):
        run_script(argparse.Namespace, main)


def test_a_mistake_in_the_flags_ends_with_one_line_too():
    def parse():
        raise InputError("--resume: there is no run")

    with pytest.raises(SystemExit, match="error: --resume: there is no run"):
        run_script(parse, lambda args: None)


def test_a_user_is_told_of_flags_where_the_library_says_arguments():
    flags = {"image_size", "top_k", "data"}
    for message, expected in (
        ("image_size=30 does not fit", "--image-size 30 does not fit"),
        ("give data=shapes, or data=FOLDER", "give --data shapes, or --data FOLDER"),
        ("top_k=40: give 1 to 32", "--top-k 40: give 1 to 32"),
        ("n_head=3 must divide n_embd=16", "n_head=3 must divide n_embd=16"),  # no such flag
        ("image_size must be odd", "image_size must be odd"),
    ):
        assert name_flags(message, flags) == expected


# --- what is printed -----------------------------------------------------------------------------

PROGRAM = r"""
import argparse, sys
from vqgan.console import progress_bar
from vqgan.script import run_script

def main(args):
    print("猫, caf\udce9.png, \x1b[31mred")
    for i in progress_bar(range(3), desc="bar"):
        print(i, flush=True)
    open(sys.argv[1], "w").write("the end")

run_script(argparse.Namespace, main)
"""


def start(tmp_path, **environment):
    """The program, whose output streams are pipes."""
    (tmp_path / "program.py").write_text(PROGRAM, encoding="utf-8")
    command = [sys.executable, str(tmp_path / "program.py"), str(tmp_path / "end")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, **pipes)


@pytest.mark.parametrize(("encoding", "cat"), [("utf-8", "猫"), ("cp1252", r"\u732b")])
def test_every_text_can_be_shown_and_none_commands_the_terminal(tmp_path, encoding, cat):
    out, err = start(tmp_path, PYTHONIOENCODING=encoding).communicate(timeout=120)
    assert out.startswith(rf"{cat}, caf\udce9.png, \x1b[31mred")
    assert (tmp_path / "end").read_text() == "the end"


def test_a_progress_bar_in_a_file_is_lines_and_few(tmp_path):
    out, err = start(tmp_path).communicate(timeout=120)
    bars = [line for line in err.splitlines() if line]
    assert 1 <= len(bars) <= 2 and all(line.startswith("bar:") for line in bars)
    assert "\r" not in err and "100%" in bars[-1]


def test_a_stream_that_a_shell_closed_is_not_missed(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM, encoding="utf-8")
    command = f"'{sys.executable}' '{tmp_path}/program.py' '{tmp_path}/end' >&- 2>&-"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    assert subprocess.run(command, shell=True, env=environment, timeout=120).returncode == 0
    assert (tmp_path / "end").read_text() == "the end"


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_reader_that_goes_away_ends_nothing(tmp_path, stream):
    """As with `| head -1`."""
    process = start(tmp_path)
    getattr(process, stream).close()
    other = process.stderr if stream == "stdout" else process.stdout
    shown = other.read()
    assert process.wait(timeout=120) == 0 and (tmp_path / "end").read_text() == "the end"
    assert "Traceback" not in shown and "BrokenPipe" not in shown
