"""Where readers are and where they can go: the sidebar, the list "On this page", the next chapter.

The sidebar comes from the lists of links on the first page, which a code host shows as they are:

    ## Chapters

    1. [The path](path.md): a picture becomes codes, and codes become a picture

An item's link is the page's name in the sidebar. Pages that no list has come last.
"""

import re
from html import escape

from annotated import DOCS, HEADING, raw
from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform

LISTS = {"Chapters": 1, "More": 0}  # by their headings: how deep they are numbered
CHAPTERS = re.findall(r"^\d+\. \[.*?\]\((\S+)\.md\)", (DOCS / "index.md").read_text(), re.M)


class Contents(SphinxTransform):
    default_priority = 400

    def apply(self) -> None:
        if self.env.docname == self.config.root_doc:
            self.env.metadata[self.env.docname]["hide-toc"] = ""  # it is a list of links already
            self.sidebar()
        elif self.env.docname in CHAPTERS:
            self.on_this_page()

    def sidebar(self) -> None:
        listed = {self.env.docname}
        for section in list(self.document.findall(nodes.section)):
            heading = section[0].astext()
            if heading not in LISTS:
                continue
            links = section.findall(addnodes.pending_xref)
            entries = [(link.astext(), link["reftarget"]) for link in links]
            listed |= {page for _, page in entries}
            if heading == "More":
                entries += [(None, page) for page in sorted(self.env.found_docs - listed)]
            toctree = addnodes.toctree(
                "",
                parent=self.env.docname,
                caption=heading,
                entries=entries,
                includefiles=[page for _, page in entries],
                numbered=LISTS[heading],
                maxdepth=-1,
                titlesonly=True,
                hidden=True,
                includehidden=False,
                glob=False,
            )
            toctree.preserve_original_messages()  # translators would ask for them
            section += toctree

    def on_this_page(self) -> None:
        """Below the title, links to the sections."""
        # The theme's own list, on the right, would take the code's room.
        self.env.metadata[self.env.docname]["hide-toc"] = ""
        page = next(iter(self.document.findall(nodes.section)))
        items = [
            f'<li><a href="#{section["ids"][0]}">{escape(section[0].astext())}</a></li>'
            for section in page.findall(nodes.section)
            if section.parent is page
        ]
        page.insert(
            1, raw(f'<nav class="on-this-page"><p>On this page</p><ul>{"".join(items)}</ul></nav>')
        )


def add_neighbors(app: Sphinx, page: str, template: str, context: dict, doctree) -> None:
    """Put links to the chapters before and after above the source, since that is long."""
    heading = f'<section id="{nodes.make_id(HEADING)}">'
    if page in CHAPTERS and heading in context["body"]:
        links = [
            f'<a rel="{key}" href="{context[key]["link"]}">{context[key]["title"]}</a>'
            for key in ("prev", "next")
            if context[key]
        ]
        nav = f'<nav class="neighbors">{"".join(links)}</nav>\n'
        context["body"] = context["body"].replace(heading, nav + heading)


def setup(app: Sphinx) -> dict:
    app.add_transform(Contents)
    app.connect("html-page-context", add_neighbors)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
