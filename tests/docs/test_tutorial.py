"""The tutorial notebook: what is committed is whole, and it runs from start to end.

The run stands outside of the plain suite, for it needs Jupyter's kernel, and trains. It is skipped
unless TUTORIAL_STEPS says how long the two trainings shall be (the notebook reads it too):

    pip install -e '.[test,notebook]'
    TUTORIAL_STEPS=20 python -m pytest tests/docs/test_tutorial.py

A minute or two with 20 steps; the reader's have 2,000 and 3,500.
"""

import ast
import json
import os
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "docs" / "tutorial.ipynb"
LARGEST = 1_200_000  # bytes, pictures included


def code_cells(cells):
    return [cell for cell in cells if cell["cell_type"] == "code"]


def pictures(cells):
    outputs = [output for cell in code_cells(cells) for output in cell["outputs"]]
    return sum("image/png" in output.get("data", {}) for output in outputs)


def printed(cells):
    outputs = [output for cell in code_cells(cells) for output in cell["outputs"]]
    text = "".join("".join(output.get("text", "")) for output in outputs)
    assert not any(output["output_type"] == "error" for output in outputs)
    return text


def nats(text):
    """What a code of a test image costs: the four lines that say it, last the transformer's."""
    baselines = re.findall(r"^(?:uniform|unigram|bigram) +([\d.]+) nats", text, re.MULTILINE)
    return [float(value) for value in (*baselines, re.search(r"test images: ([\d.]+)", text)[1])]


def test_the_committed_notebook_was_run_once_from_start_to_end():
    assert NOTEBOOK.stat().st_size < LARGEST
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    counts = [cell["execution_count"] for cell in code_cells(cells)]
    assert counts == list(range(1, len(counts) + 1))
    assert pictures(cells) >= 7
    uniform, unigram, bigram, transformer = nats(printed(cells))
    assert transformer < bigram < unigram < uniform


def test_the_committed_notebook_has_no_short_trainings():
    """Its outputs are those of the numbers of steps that its code gives."""
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    source = "".join("".join(cell["source"]) for cell in code_cells(cells))
    steps = re.search(r"autoencoder_steps, transformer_steps = (.*)", source)[1]
    last = [f"step {number}:" for number in ast.literal_eval(steps)]
    assert all(line in printed(cells) for line in last)


def test_the_notebook_runs():
    if "TUTORIAL_STEPS" not in os.environ:
        pytest.skip("give TUTORIAL_STEPS=20 to run the notebook")
    needed = "pip install -e '.[notebook]'"
    nbformat = pytest.importorskip("nbformat", reason=needed)
    nbclient = pytest.importorskip("nbclient", reason=needed)
    pytest.importorskip("ipykernel", reason=needed)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    committed = pictures(notebook.cells)
    client = nbclient.NotebookClient(
        notebook,
        timeout=1200,  # seconds a cell
        kernel_name="python3",
        resources={"metadata": {"path": ROOT}},  # where it runs, so that vqgan is found
    )
    client.execute()  # raises where a cell fails, with its traceback
    assert pictures(notebook.cells) == committed
    uniform, _, _, transformer = nats(printed(notebook.cells))
    assert 0 < transformer < uniform + 0.5  # a few steps: about as good as knowing nothing
