"""Files: written whole or not at all, and read with suspicion."""

import ast
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from vqgan.errors import InputError
from vqgan.files import (
    load_arrays,
    load_plain,
    read_json,
    save_plain,
    unused_path,
    write_atomically,
    write_json,
)

ROOT = Path(__file__).parents[1]

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


def test_the_next_unused_name(tmp_path):
    for expected in ("a.b.png", "a.b-2.png", "a.b-3.png"):
        path = unused_path(tmp_path / "a.b.png")
        assert path.name == expected
        path.touch()


# --- reading -----------------------------------------------------------------------------------


def rewritten(source, target, compression):
    """The same zip file with its members compressed otherwise."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for member in old.infolist():
            new.writestr(member.filename, old.read(member))


@pytest.fixture
def state(tmp_path):
    path = tmp_path / "a.pt"
    save_plain(path, {"weights": {"w": torch.arange(1000.0), "v": torch.ones(3)}, "step": 5})
    return path


def test_plain_data_comes_back(state):
    content = load_plain(state, remedy="none")
    assert content["step"] == 5 and torch.equal(content["weights"]["w"], torch.arange(1000.0))


def test_compressed_members_are_refused_before_they_are_read(state, tmp_path):
    """2 GB of zeros fit in 2 MB. The same file with stored members is read."""
    for compression, fits in ((zipfile.ZIP_STORED, True), (zipfile.ZIP_DEFLATED, False)):
        rewritten(state, tmp_path / "b.pt", compression)
        if fits:
            assert load_plain(tmp_path / "b.pt", remedy="none")["step"] == 5
        else:
            with pytest.raises(InputError, match="b.pt.*compressed.*name another"):
                load_plain(tmp_path / "b.pt", remedy="name another")


def test_every_flipped_bit_is_noticed(state):
    """In the content of each member. (What lies between them is padding, or read twice.)"""
    whole = state.read_bytes()
    with zipfile.ZipFile(state) as archive:
        members = [member for member in archive.infolist() if member.file_size]
        for member in members:
            content = archive.read(member)
            start = whole.index(content, member.header_offset)
            for offset in {0, len(content) // 2, len(content) - 1}:
                damaged = bytearray(whole)
                damaged[start + offset] ^= 4
                state.write_bytes(damaged)
                with pytest.raises(InputError, match="a.pt.*checksum"):
                    load_plain(state, remedy="none")
    assert len(members) >= 4


@pytest.mark.parametrize("kind", ["text", "dot", "cut pickle", "huge pickle", "empty"])
def test_other_files_are_named_in_one_line(tmp_path, kind):
    content = {
        "text": b"hello",
        "dot": b".x",
        "cut pickle": pickle.dumps({"a": 1})[:-3],
        "huge pickle": b"\x80\x04\x95" + b"\xff" * 8 + b"bytearray",
        "empty": b"",
    }[kind]
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(InputError, match="x.pt.*code in it was not run.*: none$") as caught:
        load_plain(tmp_path / "x.pt", remedy="none")
    assert "\n" not in str(caught.value)


def test_errors_of_the_system_are_no_damage(tmp_path):
    for path, error in ((tmp_path / "gone.pt", FileNotFoundError), (tmp_path, IsADirectoryError)):
        with pytest.raises(error):
            load_plain(path, remedy="none")


def test_only_the_named_arrays_are_read(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.arange(4), evil=np.array([print], dtype=object))
    assert load_arrays(tmp_path / "a.npz", ["x"])["x"].tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError):  # a pickle
        load_arrays(tmp_path / "a.npz", ["evil"])
    np.savez_compressed(tmp_path / "b.npz", x=np.zeros(10**6))
    with pytest.raises(ValueError, match="compressed"):
        load_arrays(tmp_path / "b.npz", ["x"])


@pytest.mark.parametrize("text", ["{", "[]", "1", "", 100_000 * "[", 5000 * "9", "\xff"])
def test_json_that_is_no_object_is_named(tmp_path, text):
    (tmp_path / "a.json").write_text(text, encoding="latin-1")
    with pytest.raises(InputError, match="a.json"):
        read_json(tmp_path / "a.json")


# --- one door ----------------------------------------------------------------------------------

# What reads or writes a file by itself, and where it may.
DOORS = {"load", "loads", "save", "savez", "savefig", "open", "write_text", "write_bytes", "dump"}
DOORS |= {"imsave", "read_text", "read_bytes", "load_file", "tofile", "fromfile"}
ALLOWED = {
    "files.py": {
        "torch.save",
        "torch.load",
        "np.load",
        "open",
        "json.loads",
        "path.read_bytes",
        "load",
    },
    "cli_tokenizer.py": {"np.savez", "save"},  # into memory
    "demo.py": {"save"},  # into memory
    "figures.py": {"figure.savefig"},  # into memory
    "image_folder.py": {"Image.open", "file.load"},
    "compvis.py": {"read_text"},  # a config
    "perceptual.py": {"path.read_bytes"},  # whose checksum is published
    "cli.py": {"json.loads"},  # of what was dumped there
    "training.py": {"path.read_text"},  # log.csv
    "console.py": {"os.open"},  # the null device
    "script.py": {"open"},  # the same
}


def test_every_file_passes_through_its_door():
    found = {}
    for path in [*(ROOT / "vqgan").glob("*.py"), *ROOT.glob("train_*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            whole = ast.unparse(node.func)  # "np.load", or "Path(x).read_text"
            name = whole.rpartition(".")[2]
            if name in DOORS:
                whole = whole if whole.count(".") < 2 and "(" not in whole else name
                found.setdefault(path.name, set()).add(whole)
    assert found == ALLOWED
