"""Equations as MathML, made while the site is built: a browser shows them without any script.

LaTeX between $ or $$ becomes MathML by latex2mathml. That library copies a command which it does
not know into its output, so such a command is a warning here. For several lines write
`\\begin{split} a &= b \\\\ c &= d \\end{split}`; `\\begin{cases}` works too.
"""

import re
from xml.etree import ElementTree

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.util import logging

NAMESPACE = "{http://www.w3.org/1998/Math/MathML}"
# Elements whose children stand in a row; others, such as a fraction, have a fixed number of them.
ROWS = {NAMESPACE + tag for tag in ("math", "mrow", "mtd", "mstyle")}
BARS = ("|", "\N{DOUBLE VERTICAL LINE}")
# The library takes these for signs between two things. As a pair they have no space inside, and an
# exponent belongs to the whole.
PAIRS = {r"\lvert": r"\left|", r"\rvert": r"\right|", r"\lVert": r"\left\|", r"\rVert": r"\right\|"}
THIN_SPACE = {"width": "0.167em"}  # of TeX: three eighteenths of an em
logger = logging.getLogger(__name__)


def to_mathml(latex: str, display: str) -> str:
    """`display` is "inline" or "block". Raises ValueError for what cannot be shown."""
    for command, pair in PAIRS.items():
        latex = latex.replace(command, pair)
    try:
        root = ElementTree.fromstring(convert(latex, display=display))
    except Exception as error:  # the library's own, of many types; or the parser's
        raise ValueError(f"{type(error).__name__} {error}") from error
    for element in list(root.iter()):
        if "\\" in (element.text or ""):
            raise ValueError(f"latex2mathml does not know {element.text}")
        if element.text == "~":  # of \sim
            element.tag, element.text = NAMESPACE + "mo", "\N{TILDE OPERATOR}"
        if element.text in BARS:
            element.attrib.setdefault("stretchy", "false")  # as high as a letter, as in TeX
        if is_name(element) and element.tag == NAMESPACE + "mo":
            element.tag = NAMESPACE + "mi"  # argmin, sg: no operators, which have wide margins
    for element in list(root.iter()):
        if element.tag in ROWS:
            space_names(element)
    ElementTree.register_namespace("", NAMESPACE.strip("{}"))
    return ElementTree.tostring(root, encoding="unicode")


def is_name(element: ElementTree.Element) -> bool:
    """log, argmin, sg; with an index too."""
    if element.tag in {NAMESPACE + tag for tag in ("msub", "msup", "msubsup", "munder")}:
        return is_name(element[0])
    return bool(re.fullmatch(r"[A-Za-z\u2009]{2,}", element.text or "")) and (
        element.tag in (NAMESPACE + "mi", NAMESPACE + "mo")
    )


def space_names(row: ElementTree.Element) -> None:
    """A thin space between a name and a letter or number beside it, as TeX sets it: log p."""
    children = list(row)
    for left, right in zip(children, children[1:], strict=False):
        is_apart = any(e.tag in (NAMESPACE + "mo", NAMESPACE + "mspace") for e in (left, right))
        if (is_name(left) or is_name(right)) and not is_apart:
            space = ElementTree.Element(NAMESPACE + "mspace", THIN_SPACE)
            row.insert(list(row).index(right), space)


def render(translator, node: nodes.Element, display: str) -> None:
    try:
        html = to_mathml(node.astext(), display)
    except ValueError as error:
        text = "equation %r: %s (docs/_ext/mathml.py says what works)"
        logger.warning(text, node.astext(), error, location=node)
        raise nodes.SkipNode from error
    if display == "block":
        html = translator.starttag(node, "div", CLASS="math") + html + "</div>\n"
    translator.body.append(html)
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict:
    app.add_html_math_renderer(
        "mathml",
        inline_renderers=(lambda translator, node: render(translator, node, "inline"), None),
        block_renderers=(lambda translator, node: render(translator, node, "block"), None),
    )
    return {"parallel_read_safe": True, "parallel_write_safe": True}
