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

from pygments.lexers import PythonLexer
from pygments.token import STANDARD_TYPES, Token

ROOT = Path(__file__).parents[1]
DIVIDER = re.compile(r"# --- (.*?) -+$")  # "# --- losses -----": the heading of a part
Definition = ast.ClassDef | ast.FunctionDef
# A place that a name leads to: ("vqgan.quantizer", "Quantizer.forward"); "" for the module.
Target = tuple[str, str]


@dataclass
class Piece:
    first: int  # line, from 1
    name: str | None = None  # of the class or function that begins here; "" for the module
    heading: str | None = None  # of a divider, which has nothing else
    prose: list[str] = field(default_factory=list)
    code: list[int] = field(default_factory=list)  # lines
    hidden: list[int] = field(default_factory=list)  # lines that became prose


class Source:
    def __init__(self, path: str):
        """`path` from the root of the repository: "vqgan/quantizer.py"."""
        self.path = path
        self.file = ROOT / path
        self.module = path.removesuffix(".py").replace("/", ".")
        self.text = self.file.read_text()
        self.lines = self.text.splitlines()
        self.tree = ast.parse(self.text)
        # What is defined at the top and in classes, and the line of each: a constant has one too.
        self.definitions: dict[str, Definition] = dict(_definitions(self.tree, ""))
        self.constants: dict[str, int] = dict(_constants(self.tree))

    def line_id(self, line: int) -> str:
        return f"{self.module.replace('.', '-')}-L{line}"

    def find(self, text: str, start: int = 1) -> list[int]:
        """Lines from `start` on that hold a text."""
        return [i for i, line in enumerate(self.lines, 1) if i >= start and text in line]

    # --- pieces -----------------------------------------------------------------------------------

    def pieces(self) -> list[Piece]:
        docstrings, names, ends = self._docstrings(), {1: ""}, set()
        imports = [node for node in self.tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        ends.update(node.end_lineno + 1 for node in imports[-1:])
        for name, node in self.definitions.items():
            # A class's docstring tells of its constructor, so the two stand beside each other.
            if not name.endswith("__init__") or ast.get_docstring(node):
                names[first_line(node)] = name
            ends.add(node.end_lineno + 1)
        comments = self._comments()

        pieces = []
        for number, line in enumerate(self.lines, 1):
            piece = pieces[-1] if pieces else None
            divider = DIVIDER.match(line.strip())
            begins = number in names or number in ends or (number in comments and not divider)
            goes_on = number in comments and number - 1 in comments and not piece.heading
            if divider:
                pieces.append(Piece(number, heading=divider[1], hidden=[number]))
            elif piece is None or piece.heading or begins and piece.code and not goes_on:
                pieces.append(Piece(number, name=names.get(number)))
            elif number in names:  # a comment above a function belongs to it
                piece.name = names[number]
            piece = pieces[-1]
            if number in comments and not divider:
                text = line.strip().removeprefix("#").removeprefix(" ")
                if goes_on:
                    piece.prose[-1] += f"\n{text}"
                else:
                    piece.prose.append(text)
                piece.hidden.append(number)
            elif number in docstrings:
                if docstrings[number]:
                    piece.prose.append(docstrings[number])
                piece.hidden.append(number)
            elif line.strip() and not divider:
                if piece.code:  # with the empty lines between, but not those at the ends
                    between = range(piece.code[-1] + 1, number)
                    piece.code += [i for i in between if i not in piece.hidden]
                piece.code.append(number)
        return [piece for piece in pieces if piece.code or piece.hidden]

    def _docstrings(self) -> dict[int, str]:
        """For each line of a docstring its text, at the first line, and "" at the others."""
        lines = {}
        for node in [self.tree, *self.definitions.values()]:
            if text := ast.get_docstring(node):
                string = node.body[0]
                lines |= dict.fromkeys(range(string.lineno, string.end_lineno + 1), "")
                lines[string.lineno] = text
        return lines

    def _comments(self) -> set[int]:
        """Lines that hold a comment and nothing else."""
        tokens = tokenize.generate_tokens(io.StringIO(self.text).readline)
        places = [token.start for token in tokens if token.type == tokenize.COMMENT]
        return {line for line, column in places if not self.lines[line - 1][:column].strip()}

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


def first_line(node: Definition) -> int:
    return min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])


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
        if kind is Token.Name.Namespace and text in sources:  # from vqgan.data import ...
            target = text, ""
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
