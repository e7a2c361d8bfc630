"""A docstring or a comment as HTML: plain text in; paragraphs, definitions and equations out.

The source is written to be read in an editor, so nothing in it is markup. Its habits tell what is
what:

    lines that stand together       a paragraph
    Args: Returns: Raises:          a list of definitions, `name: what it is`
    indented lines                  equations, shapes or commands: kept in lines, and in columns
                                    where they stand in columns
    `name`                          code, and a link where it names something of ours

Mathematics is lightly typeset (z_e, x^2, lambda, sum_i, ->): what is not known for sure stays as it
is.
"""

import re
from collections.abc import Callable
from html import escape
from textwrap import dedent

SECTIONS = {
    "Args:": "Arguments",
    "Attributes:": "Attributes",
    "Returns:": "Returns",
    "Yields:": "Yields",
    "Raises:": "Raises",
}
# The HTML address of what a name in backticks stands for, or None.
Link = Callable[[str], str | None]


def to_html(text: str, link: Link) -> str:
    """A whole docstring or comment."""
    parts = []
    blocks = re.split(r"\n[ ]*\n", dedent(text).strip("\n"))
    for block in filter(None, blocks):
        lines, (first, _, rest) = block.splitlines(), block.partition("\n")
        if first in SECTIONS:
            parts.append(f'<p class="section">{SECTIONS[first]}</p>')
            parts.append(definitions(dedent(rest).splitlines(), link))
        elif all(line.startswith("    ") for line in lines) or len(columns(lines)) > 1:
            parts.append(equations(dedent(block).splitlines(), link))
        else:
            parts.append(paragraph(block, link))
    return "\n".join(parts)


def paragraph(text: str, link: Link) -> str:
    return f"<p>{typeset(' '.join(text.split()), link)}</p>"


# --- definitions ----------------------------------------------------------------------------------

TERM = re.compile(r'(?P<term>[\w*, ]+|"[^"]*"): +(?P<rest>.*)')


def definitions(lines: list[str], link: Link) -> str:
    """Items "name: what it is", each going on in deeper lines; or, without names, a paragraph."""
    items = []
    for line in lines:
        if line.startswith(" ") and items:
            items[-1].append(line)
        else:
            items.append([line])
    if not all(TERM.match(item[0]) for item in items):
        return paragraph("\n".join(lines), link)
    return f"<dl>{''.join(definition(item, link) for item in items)}</dl>"


def definition(lines: list[str], link: Link) -> str:
    """One item. After a colon at the end of a line, deeper items of its own may follow."""
    match = TERM.match(lines[0])
    text, deeper = [match["rest"]], dedent("\n".join(lines[1:])).splitlines()
    while deeper and not (text[-1].endswith(":") and TERM.match(deeper[0])):
        text.append(deeper.pop(0))
    names = [name.strip() for name in match["term"].split(",")]
    are_code = all(name.isidentifier() or name.startswith('"') for name in names)
    term = ", ".join(code(name, link) if are_code else escape(name) for name in names)
    nested = definitions(deeper, link) if deeper else ""
    return f"<div><dt>{term}</dt> <dd>{typeset(' '.join(text), link)}{nested}</dd></div>\n"


# --- indented blocks ------------------------------------------------------------------------------

TAG = re.compile(r"(.*?)\s+(\(eq\. [^()]*\))$")  # the number of an equation, at the end of a line


def equations(lines: list[str], link: Link) -> str:
    """Lines as rows of a table. Cells are what stands in columns in the source."""
    tags = [match[2] if (match := TAG.match(line)) else "" for line in lines]
    lines = [TAG.sub(r"\1", line) for line in lines]
    starts = columns(lines)
    rows = []
    for line, tag in zip(lines, tags, strict=True):
        ends = [*starts[1:], None]
        cells = [line[start:end].strip() for start, end in zip(starts, ends, strict=True)]
        if is_whole(line):
            cells = [line.strip()]
        if rows and not cells[0] and line.strip():  # goes on with what stands above it
            above, above_tag = rows[-1]
            rows[-1] = (
                [" ".join(pair).strip() for pair in zip(above, cells, strict=True)],
                above_tag,
            )
        else:
            rows.append((cells, tag))
    html = []
    for cells, tag in rows:
        span = f' colspan="{len(starts)}"' if len(cells) < len(starts) else ""
        row = "".join(f"<td{span}>{cell_html(cell, link)}</td>" for cell in cells)
        row += f'<td class="tag">{escape(tag)}</td>' if any(tags) else ""
        html.append(f"<tr>{row}</tr>\n")
    kind = "equations columns" if len(starts) > 1 else "equations"
    kind = "equations commands" if lines[0].startswith("python ") else kind
    return f'<table class="{kind}">\n{"".join(html)}</table>'


def is_whole(line: str) -> bool:
    """No gap of two spaces divides it."""
    return "  " not in line.strip() and not line.startswith(" ")


def columns(lines: list[str]) -> list[int]:
    """Places where a cell begins in two lines or more, after two spaces, and no line runs across.

    A bar at one place of all lines is a column too.
    """
    divided = [line for line in lines if not is_whole(line)]
    begins = [match.end() for line in divided for match in re.finditer(r"  (?=[^ ])", line)]
    starts = {
        place
        for place in begins
        if begins.count(place) > 1
        and all(line[place - 2 : place].strip() == "" for line in divided)
    }
    for bar in re.finditer(r" \| ", lines[0]):
        if len(lines) > 1 and all(line[bar.start() : bar.end()] == " | " for line in lines):
            starts |= {bar.start() + 1, bar.end()}
    return [0, *sorted(starts)]


def cell_html(cell: str, link: Link) -> str:
    """A command is code; in anything else gaps stay wide, and the rest is typeset."""
    parts = re.split(r" {2,}", cell)
    return '<span class="gap"></span>'.join(
        f"<code>{escape(part)}</code>"
        if part.startswith("python ")
        else typeset(part, link, in_equation=True)
        for part in parts
    )


# --- mathematics ----------------------------------------------------------------------------------

GREEK = {
    "alpha": "α",
    "beta": "β",
    "gamma": "γ",
    "delta": "δ",
    "epsilon": "ε",
    "lambda": "λ",
    "pi": "π",
    "sigma": "σ",
}
OPERATORS = {"sum": "∑", "prod": "∏", "grad": "∇", "argmin": "argmin", "mean": "mean"}
SYMBOLS = {"->": "→", "<=": "≤", ">=": "≥", "+-": "±", "||": "‖", "[.]": "[·]"}

TOKEN = re.compile(
    r"""
      `(?P<code>[^`]+)`
    | arXiv[ ](?P<arxiv>\d{4}\.\d{5}|\d{4}\.\d{4})
    | (?P<as_is> -{2,}[\w-]+>?                          # --resume, --to_unit-->
               | [\w/*]+\.(?:py|pt|md|json|csv|npz|png)\b )
    | (?P<symbol> -> | <= | >= | \+- | \|\| | \[\.\] )
    | \bsqrt(?: \((?P<root>\w+)\) | (?P<radical>(?=\()) )
    | \^(?: (?P<power>\w+) | \((?P<powers>[^()]*)\) )
    | (?P<by>\d+)x(?=\d+\b)                             # 16x16
    | (?P<times>(?<=\b\w)[ ]x[ ](?=\w\b) | (?<=\d)[ ]x[ ](?=\d))   # h x w, 16 x 16
    | (?P<minus>(?<![^ (\[=,])-(?=[ \w(]))          # -1, - 1, -log p; no hyphen
    | (?P<multiple>\d+)(?=[a-z]\b(?!-))              # 2t, not 1e-4
    | (?P<number>\d[\w.]*(?:[ ]M\b)?)                # 3HW, 1e-10, 1.8 M
    | (?P<base>[A-Za-z]+)_(?P<index><?[A-Za-z0-9]+(?:[+-]\d)?)(?![\w=])   # z_e, s_<i, s_N-2
    | (?P<log>log(?:2|10))\b
    | (?P<dotted>[A-Za-z]\w+(?:\.\w+)+)                  # np.cos
    | (?P<name>(?<!['’])[A-Za-z]\w*(?:=\w+)?)
    """,
    re.VERBOSE,
)


def code(text: str, link: Link) -> str:
    url = link(text)
    html = f"<code>{escape(text)}</code>"
    return f'<a href="{escape(url)}">{html}</a>' if url else html


def typeset(text: str, link: Link, in_equation: bool = False) -> str:
    """One stretch of text as HTML, its names and symbols typeset."""
    html, end = [], 0
    for match in TOKEN.finditer(text):
        html += [escape(text[end : match.start()], quote=False), token(match, link, in_equation)]
        end = match.end()
    return "".join(html) + escape(text[end:], quote=False)


def token(match: re.Match, link: Link, in_equation: bool) -> str:
    if match["code"]:
        return code(match["code"], link)
    if match["arxiv"]:
        return f'<a href="https://arxiv.org/abs/{match["arxiv"]}">{match[0]}</a>'
    if match["symbol"]:
        return SYMBOLS[match["symbol"]]
    if power := match["power"] or match["powers"]:
        return f"<sup>{typeset(power, link, in_equation=True)}</sup>"
    if match["root"]:
        return f"√{typeset(match['root'], link, in_equation=True)}"
    if match["radical"] is not None:
        return "√"
    if match["by"]:
        return f"{match['by']}×"
    if match["times"]:
        return " × "
    if match["minus"]:
        return "−"
    if match["base"]:
        return subscript(match["base"], match["index"], link) or f"<code>{match[0]}</code>"
    if match["dotted"]:
        return f"<code>{match[0]}</code>"
    if match["log"]:
        return f"log<sub>{match['log'][3:]}</sub>"
    if match["name"]:
        return name(match, in_equation)
    return escape(match[0])


def subscript(base: str, index: str, link: Link) -> str | None:
    """z_e, s_<i, x_hat, sum_j, L_GAN; None for log_var, top_k: names of the code."""
    if index == "hat" and len(base) == 1:
        return f"<i>{base}\N{COMBINING CIRCUMFLEX ACCENT}</i>"
    if len(index) > 3 or len(base) > 1 and base not in OPERATORS:
        return None
    symbol = OPERATORS.get(base) or f"<i>{base}</i>"
    return f"{symbol}<sub>{typeset(index, link, in_equation=True)}</sub>"


def name(match: re.Match, in_equation: bool) -> str:
    """A Greek letter, a variable of one letter, or a word, which stays as it is."""
    text, before, after = match[0], match.string[: match.start()], match.string[match.end() :]
    if text in GREEK:
        return f"<i>{GREEK[text]}</i>"
    if "_" in text:
        return f"<code>{text}</code>"
    is_article = text in ("a", "A") and re.match(r" [\w`\"(]", after)
    is_appendix = before.endswith("appendix ") or re.match(r"\.\d", after)
    if len(text) == 1 and not is_article and not is_appendix:
        return f"<i>{text}</i>"
    if in_equation and re.fullmatch(r"[A-Za-z]\d", text):
        return f"<i>{text[0]}</i>{text[1]}"
    return text
