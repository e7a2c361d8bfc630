"""A module of this repository as the site sees it: its pieces, its names, its coloured lines.

Nothing is imported: the text is parsed. A piece is what stands in one row of the page, some prose
and the code that it belongs to. A new one begins at every class, function and method, at every
comment that stands on lines of its own, and where the code goes on after imports or a function.
"""

import ast
import io
import re
import tokenize
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import NamedTuple

from pygments.lexers import PythonLexer
from pygments.token import STANDARD_TYPES

ROOT = Path(__file__).resolve().parents[2]
DIVIDER = re.compile(r"# --- (.*?) -+$")  # "# --- losses -----": the heading of a part
Definition = ast.ClassDef | ast.FunctionDef
# A place that a name leads to: ("vqgan.quantizer", "VectorQuantizer.forward"); "" for the module.
Target = tuple[str, str]


class Text(NamedTuple):
    text: str
    end: int  # the line after it


@dataclass
class Piece:
    name: str | None = None  # of the class or function that begins here; "" for the module
    heading: str | None = None  # of a divider, which has nothing else
    prose: list[str] = field(default_factory=list)
    hidden: list[int] = field(default_factory=list)  # lines that became prose, from 1
    code: list[int] = field(default_factory=list)  # lines


class Source:
    def __init__(self, path: str):
        """`path` from the root of the repository: "vqgan/quantizer.py"."""
        self.path = path
        self.file = ROOT / path
        self.module = path.removesuffix(".py").replace("/", ".")
        self.text = self.file.read_text()
        self.lines = self.text.splitlines()
        self.tree = ast.parse(self.text)
        # "VectorQuantizer.forward" and the like; and what is assigned at the top, with its line.
        self.definitions: dict[str, Definition] = dict(_definitions(self.tree, ""))
        self.constants: dict[str, int] = dict(_constants(self.tree))

    def line_id(self, line: int) -> str:
        return f"{self.module.replace('.', '-')}-L{line}"

    def find(self, text: str, start: int = 1) -> list[int]:
        """Lines from `start` on that hold a text."""
        return [i for i, line in enumerate(self.lines, 1) if i >= start and text in line]

    # --- pieces -----------------------------------------------------------------------------------

    def pieces(self) -> list[Piece]:
        comments = self._comments()
        prose = self._docstrings() | comments
        hidden = {i for first, text in prose.items() for i in range(first, text.end)}
        names, ends = self._beginnings()
        pieces = [Piece(name="")]
        for number, line in enumerate(self.lines, 1):
            if divider := DIVIDER.match(line.strip()):
                pieces += [Piece(heading=divider[1], hidden=[number]), Piece()]
                continue
            begins = number in names or number in ends or number in comments
            # A comment above a function has no code of its own: it belongs to the function.
            if begins and (pieces[-1].code or pieces[-1].name == ""):
                pieces.append(Piece())
            piece = pieces[-1]
            if number in names:
                piece.name = names[number]
            if number in prose:
                piece.prose.append(prose[number].text)
            if number in hidden:
                piece.hidden.append(number)
            elif line.strip():
                if piece.code:  # empty lines stay between lines of code, not around them
                    between = range(piece.code[-1] + 1, number)
                    piece.code += [i for i in between if i not in hidden]
                piece.code.append(number)
        return [piece for piece in pieces if piece.code or piece.hidden]

    def _beginnings(self) -> tuple[dict[int, str], set[int]]:
        """Lines at which classes and functions begin; lines after these and after the imports."""
        names, ends = {}, set()
        for name, node in self.definitions.items():
            # A class's docstring tells of its constructor, so the two stand beside each other.
            if not name.endswith("__init__") or ast.get_docstring(node):
                names[min([node.lineno, *(d.lineno for d in node.decorator_list)])] = name
            ends.add(node.end_lineno + 1)
        imports = [node for node in self.tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        return names, ends | {node.end_lineno + 1 for node in imports[-1:]}

    def _docstrings(self) -> dict[int, Text]:
        """By their first lines."""
        texts = {}
        for node in [self.tree, *self.definitions.values()]:
            if text := ast.get_docstring(node):
                string = node.body[0]
                texts[string.lineno] = Text(text, string.end_lineno + 1)
        return texts

    def _comments(self) -> dict[int, Text]:
        """Comments that have lines of their own, by their first lines; dividers are none."""
        texts, first = {}, 0
        for token in tokenize.generate_tokens(io.StringIO(self.text).readline):
            line = token.line.strip()
            if token.type != tokenize.COMMENT or token.string != line or DIVIDER.match(line):
                continue
            number, text = token.start[0], line.removeprefix("#").removeprefix(" ")
            if first and texts[first].end == number:
                texts[first] = Text(f"{texts[first].text}\n{text}", number + 1)
            else:
                first = number
                texts[first] = Text(text, number + 1)
        return texts

    # --- names ------------------------------------------------------------------------------------

    def has(self, name: str) -> bool:
        return name in self.definitions or name in self.constants

    def names(self, sources: dict[str, "Source"]) -> dict[str, Target]:
        """What names at the top of the module stand for: its own, and what it imports of ours."""
        names = {}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if target := _imported(node.module, alias.name, sources):
                        names[alias.asname or alias.name] = target
        own = [*self.definitions, *self.constants]
        return names | {name: (self.module, name) for name in own if "." not in name}

    def references(self, sources: dict[str, "Source"]) -> dict[tuple[int, int], Target]:
        """(line, column) of each name in the code that leads to a definition of ours."""
        finder = _References(self, sources)
        finder.visit(self.tree)
        return finder.found


def _definitions(parent: ast.Module | Definition, prefix: str):
    """Classes, functions, methods; of functions within functions those with a docstring."""
    for node in parent.body:
        if isinstance(node, Definition):
            if not isinstance(parent, ast.FunctionDef) or ast.get_docstring(node):
                yield prefix + node.name, node
                yield from _definitions(node, f"{prefix}{node.name}.")


def _constants(tree: ast.Module):
    for statement in tree.body:
        if isinstance(statement, ast.Assign):
            for target in statement.targets:
                names = [node for node in ast.walk(target) if isinstance(node, ast.Name)]
                yield from ((name.id, name.lineno) for name in names)


def _imported(module: str, name: str, sources: dict[str, Source]) -> Target | None:
    if f"{module}.{name}" in sources:  # from vqgan import metrics
        return f"{module}.{name}", ""
    if module in sources and sources[module].has(name):
        return module, name
    return None


class _References(ast.NodeVisitor):
    def __init__(self, source: Source, sources: dict[str, Source]):
        self.source, self.sources = source, sources
        self.names = source.names(sources)
        self.locals: set[str] = set()  # names that a function has for itself
        self.scope = ""  # the class that is read
        self.found: dict[tuple[int, int], Target] = {}

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if node.module in self.sources:  # from vqgan.data import ...: "data" leads to the module
            last = node.module.rpartition(".")[2]
            end = node.col_offset + len(f"from {node.module}")
            self.found[node.lineno, end - len(last)] = node.module, ""
        for alias in node.names:
            if target := _imported(node.module, alias.name, self.sources):
                self.found[alias.lineno, alias.col_offset] = target

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        outer, self.scope = self.scope, node.name
        self.generic_visit(node)
        self.scope = outer

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        outer = self.locals
        own = {a.arg for a in ast.walk(node.args) if isinstance(a, ast.arg)}
        own |= {
            n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
        }
        self.locals = outer | own
        self.generic_visit(node)
        self.locals = outer

    def visit_Name(self, node: ast.Name) -> None:
        target = self.target(node)
        if target and isinstance(node.ctx, ast.Load) and node.id != "self":
            self.found[node.lineno, node.col_offset] = target

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if target := self.target(node):
            self.found[node.end_lineno, node.end_col_offset - len(node.attr)] = target
        self.generic_visit(node)

    def target(self, node: ast.expr) -> Target | None:
        """What an expression such as `metrics.ssim` or `self.lookup` leads to."""
        if isinstance(node, ast.Name):
            if node.id == "self" and self.scope:
                return self.source.module, self.scope
            return None if node.id in self.locals else self.names.get(node.id)
        if isinstance(node, ast.Attribute) and (parent := self.target(node.value)):
            return member(parent, node.attr, self.sources)
        return None


def member(parent: Target, name: str, sources: dict[str, Source]) -> Target | None:
    """A name in a module, or in a class, or in one that the class builds on."""
    module, path = parent
    source = sources[module]
    full = f"{path}.{name}" if path else name
    if source.has(full):
        return module, full
    node = source.definitions.get(path)
    for base in node.bases if isinstance(node, ast.ClassDef) else []:
        known = source.names(sources).get(base.id) if isinstance(base, ast.Name) else None
        if known and (found := member(known, name, sources)):
            return found
    return None


# --- colours --------------------------------------------------------------------------------------


def coloured_lines(source: Source, url, sources: dict[str, Source]) -> list[str]:
    """Each line as HTML, in Pygments' classes; `url(target)` is where a name leads, or None."""
    references = source.references(sources)
    lines, line, column = [""], 1, 0
    for kind, text in PythonLexer(stripnl=False).get_tokens(source.text):
        target = references.get((line, column))
        for i, part in enumerate(text.split("\n")):
            if i:
                lines.append("")
                line, column = line + 1, 0
            html = _span(kind, part)
            if target and (address := url(target)):
                html = f'<a href="{escape(address)}">{html}</a>'
            lines[-1] += html
            column += len(part)
    return lines


def _span(kind, text: str) -> str:
    while kind not in STANDARD_TYPES:
        kind = kind.parent
    name = STANDARD_TYPES[kind]
    html = escape(text, quote=False)
    return f'<span class="{name}">{html}</span>' if name and text else html
