"""The house: which room may know which, how large it may be, and what it may speak of."""

import ast
import io
import re
import subprocess
import sys
import tokenize
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "vqgan"
SCRIPTS = ("train_vqvae", "train_vqgan", "train_transformer")
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")

# Models and parts: what a reader opens first, and what a program can use without the rest.
PARTS = "images vae vqvae vqvae2 vqgan discriminator transformer sampling conditions".split()
PARTS += "quantizer gradient_estimators finite_scalar simvq residual codebooks".split()
SURROUNDINGS = (
    "data image_folder shapes arguments script figures report training evaluation eval_networks "
    "demo"
)
SURROUNDINGS = {*SURROUNDINGS.split(), *(name for name in MODULES if name.startswith("cli"))}
NOT_FOR_PARTS = {"torchvision", "matplotlib", "argparse"}


@cache
def tree(name):
    path = ROOT / f"{name}.py" if name in SCRIPTS else PACKAGE / f"{name}.py"
    return ast.parse(path.read_text())


@cache
def imports(name):
    """What a module imports: "vqgan.x" as "x", all else by its first name; also inside functions.

    The package itself is left out: it may be asked for its version by all (see below).
    """
    found = set()
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{name} imports relatively"
            names = [alias.name for alias in node.names] if node.module == "vqgan" else []
            found |= {node.module, *(f"vqgan.{name}" for name in names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    ours = {what.removeprefix("vqgan.") for what in found if what.startswith("vqgan.")}
    found = {what.split(".")[0] for what in found} - {"vqgan"} | (ours & {*MODULES})
    return frozenset(found)


def reached(name, path=()):
    """Everything that is imported with a module: what -> the way there."""
    ways = {}
    for other in sorted(imports(name)):
        ways.setdefault(other, (*path, name, other))
        if other in MODULES and other not in path:
            for further, way in reached(other, (*path, name)).items():
                ways.setdefault(further, way)
    return ways


# --- imports -----------------------------------------------------------------------------------


def test_imports_are_read_from_the_source():
    """Against a module whose imports are known, or the tests below would test nothing."""
    assert {"quantizer", "torch", "typing"} <= imports("vqvae")
    assert {"images", "training", "tokens"} <= imports("train_transformer")
    assert "torchmetrics" in imports("eval_networks")  # inside of a function
    assert reached("simvq")["warnings"] == ("simvq", "quantizer", "warnings")


def test_the_package_itself_is_asked_for_its_version_only():
    """It imports what users need, so a module that takes more from it would close a circle."""
    for name in MODULES:
        for node in ast.walk(tree(name)):
            if isinstance(node, ast.ImportFrom) and node.module == "vqgan":
                assert {alias.name for alias in node.names} <= {*MODULES, "__version__"}, name
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert node.value.id != "vqgan" or node.attr == "__version__", name
    body = tree("__init__").body
    (version,) = [i for i, node in enumerate(body) if ast.unparse(node).startswith("__version__ =")]
    imports_ours = [i for i, node in enumerate(body) if isinstance(node, ast.ImportFrom)]
    assert version < min(imports_ours)


def test_imports_have_no_circle():
    order, visiting = [], []

    def visit(name):
        assert name not in visiting, " -> ".join([*visiting, name])
        if name not in order:
            visiting.append(name)
            for other in sorted(imports(name) & {*MODULES}):
                visit(other)
            order.append(visiting.pop())

    for name in MODULES:
        visit(name)
    assert sorted(order) == MODULES


@pytest.mark.parametrize("name", PARTS)
def test_models_and_parts_know_no_data_no_flags_and_no_figures(name):
    wrong = [way for what, way in reached(name).items() if what in SURROUNDINGS | NOT_FOR_PARTS]
    assert not wrong, [" -> ".join(way) for way in wrong]


@pytest.mark.parametrize("name", ["perceptual", "classifier"])
def test_networks_that_look_at_images_know_no_data_set_no_flags_and_no_figures(name):
    wrong = [way for what, way in reached(name).items() if what in SURROUNDINGS]
    wrong += [way for what, way in reached(name).items() if what in {"argparse", "matplotlib"}]
    assert not wrong, [" -> ".join(way) for way in wrong]


MODELS = {*PARTS, "perceptual", "classifier", "compvis", "pretrained"} - {"images"}


@pytest.mark.parametrize("name", ["figures", "metrics", "prices"])
def test_figures_and_measures_know_no_model(name):
    assert not {*reached(name)} & (MODELS | SURROUNDINGS - {name})


@pytest.mark.parametrize("name", ["training", "checkpoint"])
def test_a_session_and_its_checkpoints_are_of_any_model(name):
    assert not {*reached(name)} & (MODELS | {"arguments", "figures", "report", *SCRIPTS})


def test_a_model_is_imported_without_what_only_scripts_need():
    """In a process of its own: what Python really loads."""
    ours = sorted(SURROUNDINGS | {"tokens", "perceptual"})
    code = f"""
import sys
import vqgan.vqvae
unwanted = {{"torchvision", "matplotlib"}} | {{f"vqgan.{{name}}" for name in {ours}}}
print(sorted(unwanted & sys.modules.keys()))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_the_package_does_not_know_its_scripts():
    assert not [name for name in MODULES if imports(name) & {*SCRIPTS, "tests", "docs"}]


@pytest.mark.parametrize("name", [part for part in PARTS if part != "conditions"])
def test_models_blame_no_user(name):
    """They raise `ValueError`; the place that reads flags or files knows whether a user gave it."""
    assert "errors" not in reached(name)


# --- limits ------------------------------------------------------------------------------------
# They count code: no blank lines, comments or docstrings (explaining is what we are for).


def docstrings(module):
    """Nodes of strings that stand alone: docstrings, of attributes too."""
    return [
        node.value
        for node in ast.walk(module)
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    ]


def lines_of_code(source):
    """Numbers of the lines of a source that hold code."""
    beside = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    beside |= {tokenize.ENDMARKER, tokenize.ENCODING}
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in beside:
            lines |= {*range(token.start[0], token.end[0] + 1)}
    for node in docstrings(ast.parse(source)):
        lines -= {*range(node.lineno, node.end_lineno + 1)}
    return frozenset(lines)


@cache
def code_lines(name):
    path = ROOT / f"{name}.py" if name in SCRIPTS else PACKAGE / f"{name}.py"
    return lines_of_code(path.read_text())


def too_long_functions(name, *, limit=60, exempt=()):
    found = []
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name not in exempt:
            start = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            length = len(code_lines(name) & {*range(start, node.end_lineno + 1)})
            if length > limit:
                found.append(f"{name}.{node.name}: {length}")
    return found


def test_code_is_counted_without_blank_lines_comments_and_docstrings():
    source = [
        '"""Two lines',
        'of docstring."""',
        "",
        "# a comment",
        "x = 1  # code, and a comment",
        "class A:",
        '    """A docstring."""',
        "    y: int",
        '    "Of an attribute."',
        "    z = (1,",
        "         # between",
        '         """a value""")',
    ]
    assert lines_of_code("\n".join(source)) == {5, 6, 8, 10, 12}
    assert len(code_lines("__main__")) == 3


def test_no_file_is_longer_than_one_reads_at_once():
    too_long = {name: len(code_lines(name)) for name in MODULES if len(code_lines(name)) > 250}
    assert not too_long


def test_no_function_is_longer_than_a_screen():
    too_long = [line for name in MODULES for line in too_long_functions(name)]
    for name in SCRIPTS:
        too_long += too_long_functions(name, exempt=("train", "parse"))
    assert not too_long


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_import_the_package_before_torch(name):
    """It makes waiting threads sleep, and OpenMP asks for that once, when torch is imported."""
    lines = [ast.unparse(node) for node in tree(name).body if isinstance(node, ast.Import)]
    assert lines.index("import vqgan") < lines.index("import torch")


def test_scripts_show_their_mathematics_soon():
    limits = {"train_vqvae": 190, "train_vqgan": 260, "train_transformer": 230}
    lengths = {name: len(code_lines(name)) for name in SCRIPTS}
    assert not {name: n for name, n in lengths.items() if n > limits[name]}


def test_the_package_is_one_that_a_student_can_read():
    lengths = {name: len(code_lines(name)) for name in ["__init__", *MODULES]}
    assert sum(lengths.values()) <= 5211, sorted(lengths.items(), key=lambda item: -item[1])


# --- what a library speaks of ------------------------------------------------------------------

SPOKEN = re.compile(r"--[a-z]|train_\w+\.py|pip install")
FOR_USERS = {"arguments", "script", *(name for name in MODULES if name.startswith("cli"))}


@pytest.mark.parametrize("name", sorted({*MODULES} - FOR_USERS))
def test_a_library_names_arguments_and_neither_flags_nor_scripts(name):
    explaining = {id(node) for node in docstrings(tree(name))}
    wrong = []
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if id(node) not in explaining and SPOKEN.search(node.value):
                wrong.append(f"line {node.lineno}: {node.value}")
    assert not wrong
