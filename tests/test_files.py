"""Files: written whole or not at all, and read with suspicion."""

import os

import pytest
import torch

from vqgan.files import save_plain, write_atomically, write_json

# --- writing -----------------------------------------------------------------------------------


def test_a_failed_write_leaves_the_old_file_whole(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def no_space(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    for write in (
        lambda: write_atomically(path, b"new and longer"),
        lambda: write_json(path, {"new": 1}),
        lambda: save_plain(path, {"new": torch.zeros(9)}),
    ):
        with pytest.raises(OSError, match="No space"):
            write()
        assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_folders_are_made_and_json_is_for_people_too(tmp_path):
    write_json(tmp_path / "a" / "b.json", {"x": [1], "y": None})
    text = (tmp_path / "a" / "b.json").read_text()
    assert text.startswith('{\n  "x": [\n    1\n') and text.endswith("}\n")
