"""What a chapter needs to speak of the code: excerpts, and links to lines and names.

Paths without a folder are the package's: "quantizer.py" is vqgan/quantizer.py.

    ```{excerpt} quantizer.py: def straight_through
    :to: return
    ```
        Lines of the source as it is now: from the line that holds the text after the colon to the
        next one that holds the text of `:to:`; without `:to:`, one line. (No copies of code in a
        chapter; an example of how to use the package begins with its imports.)

    {line}`quantizer.py: z_e + (z_q - z_e).detach()`
        A link to the line that holds the text, shown as "vqgan/quantizer.py, line 92".

    {source}`VectorQuantizer.forward`
        A link to a class, function, constant or module: `metrics.ssim`, `train_vqgan.train`,
        `quantizer.py`.

A text that no line holds, or more than one, is a warning, and so is a name that leads nowhere: a
chapter cannot drift from the code. A link to a file as on GitHub, [..](../vqgan/metrics.py), leads
to the page that shows it.
"""

from pathlib import Path

from annotated import Shows, Site, full_path, numbered
from docutils import nodes
from docutils.parsers.rst import directives
from source import Source
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform
from sphinx.util.docutils import SphinxRole


def find_line(site: Site, argument: str) -> tuple[Source, int]:
    """The module and the one line of "quantizer.py: some text". Raises ValueError."""
    path, _, text = argument.partition(":")
    source, text = site.source(path), text.strip()
    if source is None:
        raise ValueError(f"no page shows {full_path(path)}")
    lines = source.find(text) if text else []
    if len(lines) != 1:
        raise ValueError(f"{len(lines)} lines of {source.path} hold {text!r}, and not one")
    return source, lines[0]


class Excerpt(Shows):
    option_spec = {"to": directives.unchanged_required}

    def run(self) -> list[nodes.Node]:
        self.start()
        try:
            source, first = find_line(self.site, self.arguments[0])
        except ValueError as error:
            return self.warning(str(error))
        last = first
        if "to" in self.options:
            ends = source.find(self.options["to"], start=first + 1)
            if not ends:
                text = self.options["to"]
                return self.warning(f"no line of {source.path} after {first} holds {text!r}")
            last = ends[0]
        page, coloured = self.site.page_url(source, self.env.docname), self.coloured(source)
        lines = "".join(numbered(source, i, coloured, page) for i in range(first, last + 1))
        return self.raw(
            f'<div class="excerpt" data-path="{source.path}">'
            f'<p class="name"><a href="{page}#{source.line_id(first)}">{source.path}</a></p>'
            f'<div class="code highlight"><pre>{lines}</pre></div></div>'
        )


class LinkRole(SphinxRole):
    """A role that is a link. A subclass says what it shows and where it leads."""

    site: Site

    def link(self) -> tuple[nodes.Node, str]:
        raise NotImplementedError

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        try:
            shown, address = self.link()
        except ValueError as error:
            return [], [self.inliner.reporter.warning(str(error), line=self.lineno)]
        return [nodes.reference("", "", shown, refuri=address, internal=True)], []


class LineRole(LinkRole):
    def link(self) -> tuple[nodes.Node, str]:
        source, line = find_line(self.site, self.text)
        page = self.site.page_url(source, self.env.docname)
        return nodes.Text(f"{source.path}, line {line}"), f"{page}#{source.line_id(line)}"


class SourceRole(LinkRole):
    def link(self) -> tuple[nodes.Node, str]:
        target = self.site.resolve(self.text)
        if target is None:
            raise ValueError(f"{self.text!r} names nothing of ours, or more than one thing")
        return nodes.literal("", self.text), self.site.url(target, self.env.docname)


class LinksToShownFiles(SphinxTransform):
    """Links to files that a page shows lead to that page, where Sphinx would offer a download."""

    default_priority = 500
    site: Site

    def apply(self) -> None:
        here = Path(self.env.doc2path(self.env.docname)).parent
        shown = {source.file: source.module for source in self.site.sources.values()}
        for node in list(self.document.findall(addnodes.download_reference)):
            module = shown.get((here / node["reftarget"]).resolve())
            if module:
                url = self.site.url((module, ""), self.env.docname)
                link = nodes.reference("", "", *node.children, refuri=url, internal=True)
                node.replace_self(link)


def setup(app: Sphinx) -> dict:
    app.setup_extension("annotated")  # knows the modules
    LinkRole.site = LinksToShownFiles.site = Shows.site
    app.add_directive("excerpt", Excerpt)
    app.add_role("line", LineRole())
    app.add_role("source", SourceRole())
    app.add_transform(LinksToShownFiles)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
