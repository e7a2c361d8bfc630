"""What the tests of the scripts share: to run one here or in a process, and to compare runs."""

import subprocess
import sys
import time
from unittest import mock

import pytest
import torch

from vqgan.script import run_script


def run_in_process(script, out, *flags):
    """The script, in this process; returns its run folder."""
    argv = [f"{script.__name__}.py", "--out", str(out), *map(str, flags)]
    with mock.patch.object(sys, "argv", argv):
        run_script(script.parse, script.main)
    return out


def error_in_process(script, out, *flags):
    """The one line with which the script stops."""
    with pytest.raises(SystemExit) as stopped:
        run_in_process(script, out, *flags)
    assert isinstance(stopped.value.code, str) and "\n" not in stopped.value.code
    return stopped.value.code


def start_process(script, out, *flags, **kwargs):
    """The script, in a process of its own."""
    command = [sys.executable, script.__file__, "--out", str(out), *map(str, flags)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, **pipes, **kwargs)


def wait_for(condition, process):
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def lines(path):
    return path.read_text().count("\n") if path.exists() else 0


def model_folder(out, name):
    """Where a run keeps a model: a run of one model has no subfolder."""
    return out / name if (out / name).is_dir() else out


def weights(out, name):
    return torch.load(model_folder(out, name) / "checkpoint.pt", weights_only=True)["weights"]


def same_weights(a, b):
    """Two state dicts, equal bit for bit."""
    assert a.keys() == b.keys()
    return all(
        torch.equal(a[name], b[name]) if torch.is_tensor(a[name]) else a[name] == b[name]
        for name in a
    )
