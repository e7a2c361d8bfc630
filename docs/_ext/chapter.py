"""What a chapter needs to speak of the code: ordinary links to files, which the build extends.

On a code host they are links to the file. Here, a link whose text is code leads to that place of
the annotated source:

    [`EMAVectorQuantizer.forward`](../vqgan/quantizer.py)
        A class, function or constant, or the module by its file name.

    [`(z_q - z_e).detach()`](../vqgan/gradient_estimators.py)
        The one line that holds the text. In a paragraph of its own, below the equation that it
        computes, the line itself is shown, with its number.

    [`straight_through`](../vqgan/gradient_estimators.py)
        In a paragraph of its own, the function is shown.

    [`# The generator's step`](../train_vqgan.py) to [`optimizer.step()`](../train_vqgan.py)
        In a paragraph of its own, the lines from the first text to the next line that holds the
        second are shown.

A text that no line holds, or more than one, is a warning: a chapter cannot drift from the code, and
holds no copies of it. (An example of how to use the package begins with its imports.)
"""

import ast
import re
from pathlib import Path

from annotated import Shows, is_link, numbered, raw
from docutils import nodes
from source import Source
from sphinx.application import Sphinx
from sphinx.util import logging

logger = logging.getLogger(__name__)


class SourceLinks(Shows):
    default_priority = 500  # after those that read the lists of modules

    def apply(self) -> None:
        for paragraph in list(self.document.findall(nodes.paragraph)):
            if is_apart(paragraph):
                self.show(paragraph)
        for link in list(self.document.findall(is_link)):
            self.resolve(link)

    def source(self, link: nodes.Element) -> Source | None:
        here = Path(self.env.doc2path(self.env.docname)).parent
        return self.site.source((here / link["reftarget"]).resolve())

    def show(self, paragraph: nodes.paragraph) -> None:
        """Replace a paragraph that is nothing but links to code by that code."""
        links = [child for child in paragraph if is_link(child)]
        between = "".join(child.astext() for child in paragraph if not is_link(child)).strip()
        source = self.source(links[0]) if links else None
        are_code = all(any(link.findall(nodes.literal)) for link in links)
        if source is None or not are_code or between != ("to" if len(links) == 2 else ""):
            return
        try:
            name, first = find(source, links[0].astext())
            if len(links) == 2:
                lines = range(first, find_end(source, links[1].astext(), first) + 1)
            elif isinstance(node := source.definitions.get(name), ast.FunctionDef):
                lines = [i for i in range(first, node.end_lineno + 1) if i not in docstring(node)]
            elif name is None:
                lines = statement(source, first)
            else:
                return
        except ValueError as error:
            logger.warning(str(error), location=paragraph)
            return
        self.depends_on_the_source()
        page, coloured = self.site.page_url(source, self.env.docname), self.coloured(source)
        deep = min(indent(source.lines[i - 1]) for i in lines if source.lines[i - 1])
        shown = [
            (i, re.sub(rf"^(<span class=.w.>)? {{{deep}}}", r"\1", coloured[i - 1])) for i in lines
        ]
        code = "".join(numbered(source, i, html, page) for i, html in shown)
        kind = "excerpt" if name or len(links) == 2 else "excerpt computes"
        paragraph.replace_self(
            raw(
                f'<div class="{kind}" data-path="{source.path}">'
                f'<p class="name"><a href="{page}#{source.line_id(first)}">{source.path}</a></p>'
                f'<div class="code highlight"><pre>{code}</pre></div></div>'
            )
        )

    def resolve(self, link: nodes.Element) -> None:
        """Let a link lead to where a page shows the code, where Sphinx would offer a download."""
        source, text = self.source(link), link.astext()
        if source is None:
            return
        page = self.site.page_url(source, self.env.docname)
        anchor, title = source.module, source.path
        if any(link.findall(nodes.literal)):
            try:
                name, line = find(source, text)
            except ValueError as error:
                logger.warning(str(error), location=link)
                return
            anchor = source.line_id(line) if name is None else f"{source.module}.{name}".strip(".")
            title += f", line {line}" if name is None else ""
        self.depends_on_the_source()
        children = [child.deepcopy() for child in link.children]
        attributes = {"refuri": f"{page}#{anchor}", "internal": True, "reftitle": title}
        link.replace_self(nodes.reference("", "", *children, **attributes))


def is_apart(paragraph: nodes.paragraph) -> bool:
    """Whether something stands above it: it is no item of a list and no cell of a table."""
    return paragraph.parent.index(paragraph) > 0


def find(source: Source, text: str) -> tuple[str | None, int]:
    """The name that a text is, "" for the module, or None; and its line. Raises ValueError."""
    name = text.removeprefix(f"{source.module.removeprefix('vqgan.')}.")
    if text in (source.path, Path(source.path).name):
        return "", 1
    if name in source.definitions:
        return name, source.definitions[name].lineno
    if name in source.constants:
        return name, source.constants[name]
    lines = source.find(text)
    if len(lines) != 1:
        raise ValueError(f"{len(lines)} lines of {source.path} hold {text!r}, and not one")
    return None, lines[0]


def find_end(source: Source, text: str, first: int) -> int:
    lines = source.find(text, start=first + 1)
    if not lines:
        raise ValueError(f"no line of {source.path} after {first} holds {text!r}")
    return lines[0]


def indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def docstring(node: ast.FunctionDef) -> range:
    """The lines of it."""
    if not ast.get_docstring(node):
        return range(0)
    return range(node.body[0].lineno, node.body[0].end_lineno + 1)


def statement(source: Source, line: int) -> range:
    """The lines of a short statement that a line belongs to, or else that line."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.stmt) and not hasattr(node, "body"):
            if node.lineno <= line <= node.end_lineno < node.lineno + 4:
                return range(node.lineno, node.end_lineno + 1)
    return range(line, line + 1)


def setup(app: Sphinx) -> dict:
    app.setup_extension("annotated")  # knows the modules
    app.add_transform(SourceLinks)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
