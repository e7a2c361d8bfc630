"""Modules side by side, prose on the left and code on the right, at the end of a chapter.

A chapter lists them, and the build shows each below the list:

    ## The source

    - [`quantizer.py`](../vqgan/quantizer.py): the codebook and its two ways to learn

One page of the site shows each module. Every class, function and line of it can be linked to
(`codebook.html#vqgan.quantizer.VectorQuantizer.forward`, `codebook.html#vqgan-quantizer-L42`), and
names that lead to a definition of ours are links, in any module.
"""

import re
from functools import cache
from html import escape
from pathlib import Path

from docutils import nodes
from prose import to_html
from source import ROOT, Piece, Source, Target, coloured_lines
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform
from sphinx.util.osutil import relative_uri

DOCS = ROOT / "docs"
HEADING = "The source"
LISTED = re.compile(r"^- \[`\S+`\]\(\.\./(\S+\.py)\)", re.MULTILINE)


class Site:
    """All modules that pages show, and the page of each."""

    def __init__(self):
        self.sources: dict[str, Source] = {}  # by module: "vqgan.quantizer"
        self.pages: dict[str, str] = {}  # module -> "codebook"
        for page in sorted(DOCS.glob("*.md")):
            for path in LISTED.findall(page.read_text().partition(f"\n## {HEADING}\n")[2]):
                source = Source(path)
                self.sources[source.module] = source
                self.pages[source.module] = page.stem

    def source(self, file: Path) -> Source | None:
        """The module of a file, if a page shows it."""
        return next((each for each in self.sources.values() if each.file == file), None)

    def page_url(self, source: Source, page: str) -> str:
        """The address of the page that shows a module, seen from a page; "" on that page."""
        return relative_uri(f"{page}.html", f"{self.pages[source.module]}.html")

    def url(self, target: Target, page: str) -> str:
        """The address of a definition, seen from a page."""
        module, name = target
        return f"{self.page_url(self.sources[module], page)}#{module}{'.' if name else ''}{name}"

    def resolve(self, text: str, scope: Target | None = None) -> Target | None:
        """What a name in backticks stands for, if it is one of ours.

        Looked for in the class and the module where it was written (`scope`), then as a file, as
        a name in a module ("metrics.ssim"), and as a name that one module has and no other.
        """
        if scope:
            module, path = scope
            outer = path.split(".") if path else []
            for depth in range(len(outer), -1, -1):
                name = ".".join([*outer[:depth], text])
                if self.sources[module].has(name):
                    return module, name
        for module, source in self.sources.items():
            short = module.removeprefix("vqgan.")
            if text in (source.path, Path(source.path).name):
                return module, ""
            if text.startswith(f"{short}.") and source.has(text.removeprefix(f"{short}.")):
                return module, text.removeprefix(f"{short}.")
        owners = [module for module, source in self.sources.items() if source.has(text)]
        return (owners[0], text) if len(owners) == 1 else None


class Shows(SphinxTransform):
    """What all transforms that show code share."""

    default_priority = 400
    site: Site

    def link(self, scope: Target):
        """For `prose`: where a name in backticks leads."""

        def url(text: str) -> str | None:
            target = self.site.resolve(text, scope)
            return target and self.site.url(target, self.env.docname)

        return url

    def depends_on_the_source(self) -> None:
        for source in self.site.sources.values():  # names anywhere may move
            self.env.note_dependency(str(source.file))

    def coloured(self, source: Source) -> list[str]:
        return _coloured(self.site, source, self.env.docname)

    def sources_listed(self, section: nodes.section) -> list[Source]:
        """The modules that a list in the section names, by the links that its items begin with."""
        here = Path(self.env.doc2path(self.env.docname)).parent
        links = [
            next(iter(item.findall(is_link)), None) for item in section.findall(nodes.list_item)
        ]
        found = [link and self.site.source((here / link["reftarget"]).resolve()) for link in links]
        return [source for source in found if source]


def is_link(node: nodes.Node) -> bool:
    """Whether Sphinx would offer the file for a download: so it reads a link to a file."""
    return isinstance(node, addnodes.download_reference)


@cache
def _coloured(site: Site, source: Source, page: str) -> list[str]:
    return coloured_lines(source, lambda target: site.url(target, page), site.sources)


def raw(html: str) -> nodes.raw:
    return nodes.raw("", html, format="html")


class Annotated(Shows):
    def apply(self) -> None:
        for section in list(self.document.findall(nodes.section)):
            if section[0].astext() == HEADING:
                self.depends_on_the_source()
                # The table of contents on the right would take the code's room.
                self.env.metadata[self.env.docname]["hide-toc"] = ""
                section += [raw(self.table(source)) for source in self.sources_listed(section)]

    def table(self, source: Source) -> str:
        coloured = self.coloured(source)
        rows = [self.row(source, piece, coloured) for piece in source.pieces()]
        return f'<div class="annotated" data-path="{source.path}">\n{"".join(rows)}</div>'

    def row(self, source: Source, piece: Piece, coloured: list[str]) -> str:
        anchors = "".join(f'<span id="{source.line_id(line)}"></span>' for line in piece.hidden)
        if piece.heading:
            return f'<p class="divider">{anchors}{escape(piece.heading)}</p>\n'
        classes, own_id, prose = "piece", "", [anchors]
        if piece.name is not None:  # a module, whose name is empty, a class or a function
            place = f"{source.module}.{piece.name}".removesuffix(".")
            classes, own_id = "piece named" if piece.name else "piece module", f' id="{place}"'
            title = escape(piece.name or source.path)
            prose.append(f'<p class="name"><a href="#{place}">{title}</a></p>')
        elif piece.code and not source.lines[piece.code[0] - 1].startswith(" "):
            classes = "piece top"  # of the module, after a function
        link = self.link((source.module, piece.name or ""))
        prose += [to_html(text, link) for text in piece.prose]
        if piece.name == "":
            prose.append(contents(source))
        code = "".join(numbered(source, line, coloured[line - 1]) for line in piece.code)
        return (
            f'<div class="{classes}"{own_id}>\n'
            f'<div class="prose">{"".join(prose)}</div>\n'
            f'<div class="code highlight"><pre>{code}</pre></div>\n'
            "</div>\n"
        )


def contents(source: Source) -> str:
    """Links to what a module defines."""
    names = [name for name in source.definitions if "." not in name]
    links = [f'<a href="#{source.module}.{name}">{name}</a>' for name in names]
    return f'<p class="defines">{" ".join(links)}</p>' if len(names) > 1 else ""


def numbered(source: Source, line: int, html: str, page: str | None = None) -> str:
    """A line of code after its number, which is a link to the line.

    Without `page`, the line is where links to it and to the constants in it lead; with it, the line
    is in an excerpt, and `page` is the address of the page that shows the whole.
    """
    place, anchors = source.line_id(line), ""
    if page is None:
        names = [name for name, defined in source.constants.items() if defined == line]
        places = [place, *(f"{source.module}.{name}" for name in names)]
        anchors = "".join(f'<span id="{place}"></span>' for place in places)
    address = f"{page or ''}#{place}"
    return (
        f'<span class="line">{anchors}'
        f'<a class="number" href="{address}" data-line="{line}" aria-label="line {line}"></a>'
        f"<span>{html}\n</span></span>"
    )


def setup(app: Sphinx) -> dict:
    Shows.site = Site()
    app.add_transform(Annotated)
    # Another page for a module changes links on all pages: then Sphinx reads them all again.
    app.add_config_value("annotated_pages", {}, "env")
    app.config.annotated_pages = Shows.site.pages
    return {"parallel_read_safe": True, "parallel_write_safe": True}
