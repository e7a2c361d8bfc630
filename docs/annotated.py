"""The source beside its prose: the directives and roles of this site that show code.

For a chapter (paths without a folder are the package's: "quantizer.py" is vqgan/quantizer.py):

    ```{annotated} quantizer.py
    ```
        The whole module, side by side. One page of the site shows each module, and names in any
        code lead there.

    ```{excerpt} quantizer.py: def straight_through
    :to: return
    ```
        Lines of the current source: from the one line that holds the text after the colon to the
        next that holds the text of `:to:` (without `:to:`, the one line).

    {line}`quantizer.py: z_e + (z_q - z_e).detach()`
        A link to the one line that holds the text: "vqgan/quantizer.py, line 91".

    {source}`Quantizer.forward`
        A link to a class, a function or a module ("quantizer.py", "metrics.ssim").

A text that is not there any more, or in more than one line, is a warning: a chapter cannot drift
from the code. Copy no code into a chapter.
"""

import re
from html import escape
from pathlib import Path

from docutils import nodes
from docutils.parsers.rst import directives
from prose import to_html
from source import ROOT, Piece, Source, Target, coloured_lines
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform
from sphinx.util.docutils import SphinxDirective, SphinxRole
from sphinx.util.osutil import relative_uri

DOCS = ROOT / "docs"


def full_path(path: str) -> str:
    return path if (ROOT / path).exists() else f"vqgan/{path}"


class Site:
    """All modules that pages show, and the page of each."""

    def __init__(self):
        self.sources: dict[str, Source] = {}
        self.pages: dict[str, str] = {}  # module -> "codebook"
        for page in sorted(DOCS.glob("*.md")):
            for path in re.findall(r"^```\{annotated\} (\S+)$", page.read_text(), re.MULTILINE):
                source = Source(full_path(path))
                self.sources[source.module] = source
                self.pages[source.module] = page.stem

    def url(self, target: Target, page: str) -> str:
        """The address of a definition, seen from a page."""
        module, name = target
        place = f"{module}.{name}" if name else module
        return self.address(module, place, page)

    def address(self, module: str, place: str, page: str) -> str:
        return f"{relative_uri(f'{page}.html', f'{self.pages[module]}.html')}#{place}"

    def resolve(self, text: str, scope: Target | None = None) -> Target | None:
        """What a name in backticks stands for, if it is one of ours.

        Looked for in the class and the module where it was written (`scope`), then as a file, as
        a name in a module ("metrics.ssim"), and as a name that one module has and no other.
        """
        text = text.removesuffix("()")
        module, path = scope or ("", "")
        if module:
            parts = path.split(".") if path else []
            inner = [".".join([*parts[:depth], text]) for depth in range(len(parts), -1, -1)]
            for name in inner:
                if self.sources[module].has(name):
                    return module, name
        for name, source in self.sources.items():
            if text in (source.path, Path(source.path).name):
                return name, ""
            prefix = f"{name.removeprefix('vqgan.')}."
            if text.startswith(prefix) and source.has(text.removeprefix(prefix)):
                return name, text.removeprefix(prefix)
        owners = [name for name, source in self.sources.items() if source.has(text)]
        return (owners[0], text) if len(owners) == 1 else None


class Shows(SphinxDirective):
    """What the directives that show code share."""

    required_arguments = 1
    final_argument_whitespace = True
    site: Site

    def start(self) -> None:
        for source in self.site.sources.values():  # names anywhere may move
            self.env.note_dependency(str(source.file))

    def link(self, scope: Target | None):
        """For `prose`: where a name in backticks leads."""

        def url(text: str) -> str | None:
            target = self.site.resolve(text, scope)
            return target and self.site.url(target, self.env.docname)

        return url

    def coloured(self, source: Source) -> list[str]:
        def url(target: Target) -> str:
            return self.site.url(target, self.env.docname)

        return coloured_lines(source, url, self.site.sources)

    def raw(self, html: str) -> list[nodes.Node]:
        return [nodes.raw("", html, format="html")]


class Annotated(Shows):
    def run(self) -> list[nodes.Node]:
        self.start()
        # The table of contents on the right would take the code's room.
        self.env.metadata[self.env.docname]["hide-toc"] = ""
        path = full_path(self.arguments[0])
        source = next(source for source in self.site.sources.values() if source.path == path)
        coloured = self.coloured(source)
        rows = [self.row(source, piece, coloured) for piece in source.pieces()]
        return self.raw(f'<div class="annotated" data-path="{path}">\n{"".join(rows)}</div>')

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
        code = "".join(numbered(source, line, coloured) for line in piece.code)
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


def numbered(source: Source, line: int, coloured: list[str], page: str | None = None) -> str:
    """A line of code after its number, which is a link to the line.

    Without `page`, the line is where links to it and to the constants in it lead; with it, an
    excerpt of what `page` shows.
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
        f"<span>{coloured[line - 1]}\n</span></span>"
    )


class Excerpt(Shows):
    option_spec = {"to": directives.unchanged_required}

    def run(self) -> list[nodes.Node]:
        self.start()
        source, first = find_line(self.site, self.arguments[0])
        if first is None:
            return [self.state.document.reporter.warning(source, line=self.lineno)]
        last = first
        if "to" in self.options:
            last = next(iter(source.find(self.options["to"], start=first + 1)), None)
            if last is None:
                text = f"no line after {source.path}:{first} holds {self.options['to']!r}"
                return [self.state.document.reporter.warning(text, line=self.lineno)]
        page = relative_uri(f"{self.env.docname}.html", f"{self.site.pages[source.module]}.html")
        coloured = self.coloured(source)
        lines = "".join(numbered(source, i, coloured, page) for i in range(first, last + 1))
        return self.raw(
            f'<div class="excerpt" data-path="{source.path}"><p class="name">'
            f'<a href="{page}#{source.line_id(first)}">{source.path}</a></p>'
            f'<div class="code highlight"><pre>{lines}</pre></div></div>'
        )


def find_line(site: Site, argument: str) -> tuple[Source, int] | tuple[str, None]:
    """Of "quantizer.py: some text" the module and the one line, or else what is wrong with it."""
    path, _, text = argument.partition(": ")
    source = next((s for s in site.sources.values() if s.path == full_path(path)), None)
    if source is None:
        return f"no page shows {full_path(path)}", None
    lines = source.find(text.strip())
    if not text.strip() or len(lines) != 1:
        return f"{len(lines)} lines of {source.path} hold {text.strip()!r}, not one", None
    return source, lines[0]


class LineRole(SphinxRole):
    site: Site

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        source, line = find_line(self.site, self.text)
        if line is None:
            return [], [self.inliner.reporter.warning(source, line=self.lineno)]
        address = self.site.address(source.module, source.line_id(line), self.env.docname)
        text = f"{source.path}, line {line}"
        return [nodes.reference("", text, refuri=address, internal=True)], []


class SourceRole(SphinxRole):
    site: Site

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        target = self.site.resolve(self.text)
        if target is None:
            warning = f"{self.text!r} names nothing of ours, or more than one thing"
            return [], [self.inliner.reporter.warning(warning, line=self.lineno)]
        node = nodes.reference("", refuri=self.site.url(target, self.env.docname), internal=True)
        node += nodes.literal("", self.text)
        return [node], []


class LinksToShownFiles(SphinxTransform):
    """A link to a file that a page shows ("../vqgan/metrics.py") leads to that page.

    As it stands it leads to the file, on GitHub too; Sphinx would offer a download.
    """

    default_priority = 500
    site: Site

    def apply(self) -> None:
        here = Path(self.env.doc2path(self.env.docname)).parent
        shown = {source.file.resolve(): source.module for source in self.site.sources.values()}
        for node in list(self.document.findall(addnodes.download_reference)):
            module = shown.get((here / node["reftarget"]).resolve())
            if module:
                address = self.site.url((module, ""), self.env.docname)
                node.replace_self(
                    nodes.reference("", "", *node.children, refuri=address, internal=True)
                )


def setup(app: Sphinx) -> dict:
    site = Site()
    for part in (Shows, LineRole, SourceRole, LinksToShownFiles):
        part.site = site
    app.add_directive("annotated", Annotated)
    app.add_directive("excerpt", Excerpt)
    app.add_role("line", LineRole())
    app.add_role("source", SourceRole())
    app.add_transform(LinksToShownFiles)
    # Another page for a module changes links on all pages: read them all again.
    app.add_config_value("annotated_pages", {}, "env")
    app.config.annotated_pages = site.pages
    return {"parallel_read_safe": True, "parallel_write_safe": True}
