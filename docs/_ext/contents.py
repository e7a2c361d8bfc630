"""The site's contents: the lists of links on its first page, which a code host shows as they are.

    ## Chapters

    1. [The path](path.md): a picture becomes codes, and codes become a picture

An item's link is the page's name in the sidebar. Pages that no list has come last.
"""

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform

LISTS = {"Chapters": 1, "More": 0}  # by their headings: how deep they are numbered


class Contents(SphinxTransform):
    default_priority = 400

    def apply(self) -> None:
        if self.env.docname != self.config.root_doc:
            return
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


def setup(app: Sphinx) -> dict:
    app.add_transform(Contents)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
