"""The documents say what was measured, and name files and flags that exist."""

import csv
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import vqgan
from vqgan.cli_sample import COMPLETED, SAMPLES
from vqgan.cli_tokenizer import INDICES, RECONSTRUCTIONS

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
DOCUMENTS = [README, *sorted((ROOT / "docs").rglob("*.md")), ROOT / "tests/benchmarks/README.md"]
RECIPES = sorted((ROOT / "docs" / "results").glob("*/run.sh"))  # commands too long for a page
UNLINKED_PAGES = {"docs/index.md", "docs/api.md", "docs/source.md"}  # of the site
OUTPUTS = (SAMPLES, COMPLETED, RECONSTRUCTIONS, INDICES)  # of the command `vqgan`
# Headings of tables, and the keys of metrics.json that stand below them.
KEYS = {
    "bits per image": "bits_per_image",
    "norm. MSE": "nmse",
    "norm. MSE, sampled": "nmse_sampled",
    "PSNR / dB": "psnr",
    "SSIM": "ssim",
    "SSIM, sampled": "ssim_sampled",
    "SSIM, whole image": "ssim_global",
    "training loss": "final_loss",
    "reconstruction loss": "final_reconstruction",
    "fixed": "fixed_bits_per_image",
    "fitted": "fitted_bits_per_image",
    "with context": "context_bits_per_image",
    "perceptual": "perceptual",
    "Fréchet": "frechet",
    "class accuracy": "class_accuracy",
    "codes used (perplexity)": "codes_used",
    "codes used": "codes_used",
    "perplexity": "perplexity",
    "ms per step": "milliseconds_per_step",
    "with a prior": "prior_bits_per_image",
    "epochs": "epochs",
    "nats per token": "nats_per_token",
    "guidance": "guidance",
    "temperature": "temperature",
    "top-k": "top_k",
    "top-p": "top_p",
    "prompt": "prompt_accuracy",
    "bytes per image": "bytes",
    "with a transformer": "bytes_with_transformer",
    "training images": "training_images",
    "accuracy": "accuracy",
    "seam above": "seam_upper",
    "seam below": "seam_lower",
    "seam left": "seam_left",
    "seam right": "seam_right",
}


RESULT = r"\| \[`([\w-]+)/([\w-]+)`\]"  # a cell that names a run and one of its models


def rows_of_results(text):
    """Run, model and {heading: cell} of rows with a cell [`run/model`](...)."""
    headings = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        match = re.search(RESULT, line) if line.startswith("|") else None
        if match:
            yield *match.groups(), dict(zip(headings, cells, strict=True))
        elif line.startswith("|") and not line.startswith("| ---"):
            headings = cells


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_numbers_in_tables_are_those_of_the_runs(document):
    for run, model, cells in rows_of_results(document.read_text()):
        path = ROOT / "docs" / "results" / run / "metrics.json"
        content = json.loads(path.read_text())
        if model.startswith("samples-"):  # a row of the transformer's table, the first is 1
            result = content["samples"][int(model.removeprefix("samples-")) - 1]
        else:
            result = content["models"][model]
        for heading, key in KEYS.items():
            cell = cells.get(heading, "").split(" of ")[0].replace(",", "")
            if not cell:
                continue
            if cell == "all":  # codes, or their whole mass
                assert result[key] is None, (run, model, key)
                continue
            decimals = len(cell.strip("%").partition(".")[2])
            value = 100 * result[key] if cell.endswith("%") else result[key]
            assert cell.strip("%") == f"{value:.{decimals}f}", (run, model, key)


def test_every_row_of_a_run_is_compared():
    texts = [document.read_text() for document in DOCUMENTS]
    rows = [len(list(rows_of_results(text))) for text in texts]
    assert rows == [len(re.findall(RESULT, text)) for text in texts]
    assert rows[0] >= 10 and sum(rows) > 40  # the README's one table; those of the chapters


def test_result_pictures_are_small():
    pictures = (ROOT / "docs" / "results").rglob("*.png")
    assert not [str(path) for path in pictures if path.stat().st_size > 300_000]


def test_every_result_picture_is_on_a_page():
    shown = {
        (document.parent / link).resolve()
        for document in DOCUMENTS
        for link in re.findall(r"\]\(([^)\s]+\.png)\)", document.read_text())
    }
    pictures = set((ROOT / "docs" / "results").resolve().rglob("*.png"))
    assert pictures and not sorted(str(path) for path in pictures - shown)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_to_files_lead_somewhere(document):
    for link in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
        if "://" not in link:
            assert (document.parent / link).exists(), link


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_by_name_are_defined_on_a_line_each(document):
    text = document.read_text()
    names = {name for name in re.findall(r"\]\[([\w-]+)\]", text)}
    assert names == set(re.findall(r"^\[([\w-]+)\]: \S+$", text, re.MULTILINE))


# --- the README ----------------------------------------------------------------------------------

SET_UP = "python3 -m venv .venv && "  # begins a line that is pasted into a fresh clone


def code_blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def test_the_readme_is_short():
    text = README.read_text()
    assert 180 <= len(text.splitlines()) <= 220
    assert len(text.split()) <= 2200


def test_the_first_link_of_the_readme_is_the_first_chapter():
    links = re.findall(r"(?<!!)\[[^]]*\]\(([^)]+)\)", README.read_text())
    assert next(link for link in links if "://" not in link) == "docs/path.md"


def test_the_readme_leads_to_every_page():
    text = README.read_text()
    pages = [path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md")]
    assert not [page for page in pages if page not in text and page not in UNLINKED_PAGES]


def test_the_readme_soon_has_a_command():
    above = "\n".join(README.read_text().splitlines()[:40])
    assert "pip install ." in above and code_blocks(above, "bash")


def test_commands_of_the_readme_fit_their_box():
    blocks = code_blocks(README.read_text(), "bash")
    lines = [line for block in blocks for line in block.splitlines()]
    assert not [line for line in lines if len(line) > 100 and not line.startswith(SET_UP)]


def test_the_readme_sets_up_in_one_line_each():
    """A line that trains, a line that runs the tests; before these, a picture by one command."""
    text = README.read_text()
    train, test = re.findall(f"^{re.escape(SET_UP)}.*", text, re.MULTILINE)
    assert ".venv/bin/pip install . && .venv/bin/python train_vqvae.py --data shapes" in train
    assert test.endswith("pytest") and "pip install -e '.[test]'" in test
    assert 0 < text.index("vqgan sample shapes") < text.index(train) < text.index(test)


def test_the_python_of_the_readme_runs(tmp_path):
    (code,) = code_blocks(README.read_text(), "python")
    assert code.startswith("from vqgan import ") and len(code.splitlines()) <= 10
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)
    assert (tmp_path / "stars.png").stat().st_size > 1000


def test_the_citation_is_of_this_version():
    yaml = pytest.importorskip("yaml")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0" and citation["version"] == vqgan.__version__
    assert all({"type", "title", "authors", "year"} <= set(r) for r in citation["references"])


@pytest.mark.parametrize("name", [*OUTPUTS, "samples-2.png", "decoded/1-a.png", "exported-2/a.pt"])
def test_what_the_command_writes_is_not_committed(name):
    """By default it writes to the folder where it is called; results are committed all the same."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("this is no clone")
    for path, ignored in ((name, True), (f"docs/results/captions/{name}", False)):
        done = subprocess.run(["git", "check-ignore", "-q", "--no-index", path], cwd=ROOT)
        assert (done.returncode == 0) == ignored, path


# --- commands ------------------------------------------------------------------------------------


def joined(path):
    """The text, with commands that go on in the next line in one."""
    return re.sub(r"\\\n\s*", "", path.read_text())


def flags_of(*paths):
    """The source of a script, and of what it imports of ours: there its flags are."""
    texts = [path.read_text() for path in paths]
    for module in re.findall(r"^from ([\w.]+) import", "\n".join(texts), re.MULTILINE):
        files = (ROOT / f"{module.replace('.', '/')}.py", paths[0].parent / f"{module}.py")
        texts += [file.read_text() for file in files if file.exists()]
    return "\n".join(texts)


@pytest.mark.parametrize(
    "document", DOCUMENTS + RECIPES, ids=lambda path: str(path.relative_to(ROOT))
)
def test_flags_in_commands_exist(document):
    scripts = r"(?:python ([\w/]+\.py)|python -m vqgan|(?<=`)vqgan|^vqgan)([^`\n]*)"
    for script, flags in re.findall(scripts, joined(document), re.MULTILINE):
        known = flags_of(*[ROOT / script] if script else (ROOT / "vqgan").glob("cli*.py"))
        for flag in re.findall(r"--[\w-]+", flags):
            assert f'"{flag.replace("--no-", "--")}"' in known or flag == "--help", (
                script,
                flag,
            )


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_long_commands_stand_in_files_of_their_own(document):
    for command in re.findall(r"python [\w/]+\.py[^`\n]*", document.read_text()):
        assert len(command) <= 120, command


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.parent.name)
def test_a_recipe_is_a_shell_script(recipe):
    if shutil.which("bash") is None:
        pytest.skip("bash is not installed")
    done = subprocess.run(["bash", "-n", recipe], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr


def parsed(command):
    """A script and {flag: its values}, whatever the order of the flags."""
    script, *words = shlex.split(command.removeprefix("python "))
    flags = {}
    for word in words:
        if word.startswith("--"):
            flags[word] = values = []
        else:
            values.append(word)
    return script, flags


def trained_by(folder):
    """Whether the metrics of a folder are those of a training, not of an experiment."""
    metrics = folder / "metrics.json"
    return metrics.exists() and "python train_" in json.loads(metrics.read_text())["command"]


@pytest.mark.parametrize(
    "recipe",
    [path for path in RECIPES if trained_by(path.parent)],
    ids=lambda path: path.parent.name,
)
def test_a_recipe_is_the_command_that_was_run(recipe):
    """The last ones of metrics.json: a copy of a run has those of the run before its own."""
    text = joined(recipe).replace("$data", "--data data/cifar10-images")
    commands = re.findall(r"^python train_.*", text, re.MULTILINE)
    run = json.loads((recipe.parent / "metrics.json").read_text())["command"].split(" && ")
    assert commands
    assert [parsed(command) for command in commands] == [parsed(c) for c in run[-len(commands) :]]


# --- numbers in prose ----------------------------------------------------------------------------

NUMBERS = ROOT / "docs" / "numbers.csv"


def read_numbers():
    """Rows of docs/numbers.csv. A page and a file are relative to docs/."""
    with NUMBERS.open(newline="") as file:
        return list(csv.DictReader(file))


def value_at(content, key):
    """What stands at a dotted path. A part of it may hold dots itself, as `beta-0.25` does."""
    if key == "":
        return content
    parts = key.split(".")
    for i in range(1, len(parts) + 1):
        part, rest = ".".join(parts[:i]), ".".join(parts[i:])
        if isinstance(content, list):
            return value_at(content[int(part)], rest)
        if part in content:
            return value_at(content[part], rest)
    raise KeyError(key)


def written(row):
    """The number of a row as its page has to write it."""
    path = ROOT / "docs" / row["file"]
    if path.suffix == ".csv":  # a log: `-1.quantizer` is a column of its last row
        with path.open(newline="") as file:
            return format(float(value_at(list(csv.DictReader(file)), row["key"])), row["format"])
    return format(value_at(json.loads(path.read_text()), row["key"]), row["format"])


def check_number(row):
    page = " ".join((ROOT / "docs" / row["page"]).read_text().split())
    phrase, number = " ".join(row["phrase"].split()), written(row)
    assert phrase in page, f"{row['page']} does not say {phrase!r}"
    # The whole number: 18 is in neither 180 nor 1.18.
    assert re.search(rf"(?<![\d.,]){re.escape(number)}(?!\d|[.,]\d)", phrase), (
        f"{row['page']} says {phrase!r}, and {row['key']} in {row['file']} is {number}"
    )


@pytest.mark.parametrize("row", read_numbers(), ids=lambda row: f"{row['page']}: {row['phrase']}")
def test_numbers_in_prose_are_those_of_the_runs(row):
    check_number(row)


def test_numbers_in_prose_are_sorted_by_page():
    pages = [row["page"] for row in read_numbers()]
    assert pages == sorted(pages)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"phrase": "64 codes of 9 bits are 512"}, AssertionError),  # the page does not say so
        ({"phrase": "64 codes of 8 bits"}, AssertionError),  # holds no 512
        ({"key": "image_bits"}, AssertionError),  # another value
        ({"format": ".1f"}, AssertionError),  # 512.0
        ({"key": "fixed_length"}, KeyError),
        ({"file": "results/path/numbers.json"}, FileNotFoundError),
    ],
    ids=lambda part: next(iter(part.items()), part)[0] if isinstance(part, dict) else "",
)
def test_a_wrong_row_is_found(change, error):
    (row,) = [row for row in read_numbers() if row["key"] == "fixed_length_bits"]
    with pytest.raises(error):
        check_number(row | change)
