"""Experiments: each writes the folder of results that has its name."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
EXPERIMENTS = sorted(DOCS.glob("experiments/[!_]*.py"))


def test_docs_has_no_other_python():
    paths = [path.relative_to(DOCS) for path in DOCS.rglob("*.py")]
    paths = [path for path in paths if path.parts[0] != "_build"]
    others = [path for path in paths if str(path.parent) not in ("_ext", "experiments")]
    assert others == [Path("conf.py")]


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_an_experiment_writes_the_folder_of_its_name(path, monkeypatch):
    monkeypatch.syspath_prepend(path.parent)  # where Python looks when it is run
    spec = importlib.util.spec_from_file_location(f"experiment_{path.stem}", path)
    experiment = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(experiment)
    assert experiment.OUT == Path("docs/results") / path.stem
    assert f"docs/results/{path.stem}/" in experiment.__doc__
    assert f"python docs/experiments/{path.name}" in experiment.__doc__
    # Every file that it says it writes is committed, and it writes no others' by name.
    files = set(re.findall(r"[\w-]+\.(?:png|json)\b", experiment.__doc__))
    assert files and all((DOCS / "results" / path.stem / name).exists() for name in files)
    assert not re.search(r"[\"']docs[/\"']", path.read_text().replace(experiment.__doc__, ""))


def test_no_experiment_hides_a_module_of_python():
    """Its folder comes first where Python looks: `compression`, of 3.14, breaks gzip."""
    names = {path.stem for path in DOCS.glob("experiments/*.py")}
    names |= {path.stem for path in DOCS.glob("_ext/*.py")}
    assert not names & {*sys.stdlib_module_names, "compression"}


def test_an_experiment_repeats_what_is_committed(tmp_path):
    """The one that takes seconds, in an empty folder: the same files, of the same things."""
    script = DOCS / "experiments" / "path.py"
    subprocess.run([sys.executable, script], cwd=tmp_path, check=True, capture_output=True)
    written, committed = tmp_path / "docs" / "results" / "path", DOCS / "results" / "path"
    assert {file.name for file in written.iterdir()} == {file.name for file in committed.iterdir()}
    new, old = (json.loads((path / "metrics.json").read_text()) for path in (written, committed))
    assert new["command"] == "python docs/experiments/path.py"
    assert new.keys() == old.keys()
    assert new["caption"] == old["caption"]
    for name, tensor in old["tensors"].items():
        assert all(new["tensors"][name][key] == tensor[key] for key in ("shape", "dtype"))
    assert new["ssim"] == pytest.approx(old["ssim"], abs=0.01)
