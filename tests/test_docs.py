"""The documents say what was measured, and name files and flags that exist."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
KEYS = ("bits_per_image", "nmse", "psnr", "ssim", "ssim_whole_image")


def rows_of_results(text):
    """Rows "| model | run/model | bits | nMSE | PSNR | SSIM | whole | ..." of a document."""
    pattern = r"^\|[^|]*\| \[`([\w-]+)/([\w-]+)`\]\([^)]*\) \|(.*)\|$"
    for run, model, cells in re.findall(pattern, text, flags=re.MULTILINE):
        yield run, model, [cell.strip() for cell in cells.split("|")]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_numbers_in_tables_are_those_of_the_runs(document):
    for run, model, cells in rows_of_results(document.read_text()):
        path = ROOT / "docs" / "results" / run / "metrics.json"
        result = json.loads(path.read_text())["models"][model]
        for key, cell in zip(KEYS, cells[: len(KEYS)], strict=True):
            decimals = len(cell.partition(".")[2])
            assert cell.replace(",", "") == f"{result[key]:.{decimals}f}", (run, model, key)


def test_the_readme_has_a_table_of_results():
    assert len(list(rows_of_results((ROOT / "README.md").read_text()))) >= 4


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_to_files_lead_somewhere(document):
    for link in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
        if "://" not in link:
            assert (document.parent / link).exists(), link


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_flags_in_commands_exist(document):
    known = (ROOT / "vqgan" / "training.py").read_text()
    known += (ROOT / "train_vqvae.py").read_text() + (ROOT / "docs" / "make_figures.py").read_text()
    for command in re.findall(r"python [\w/]+\.py[^`\n]*", document.read_text()):
        for flag in re.findall(r"--[\w-]+", command):
            assert f'"{flag.replace("--no-", "--")}"' in known, command
