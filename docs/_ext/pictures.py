"""Each picture links to its file, where it can be seen larger.

A chart, which is mostly white, is inverted on dark pages (`site.css`); images keep their colors.
"""

import re
from pathlib import Path

from PIL import Image
from sphinx.application import Sphinx

WHITE = 250  # of 255, and more
CHART = 0.8  # of all pixels are white


def is_chart(path: Path) -> bool:
    if path.suffix != ".png":
        return False
    histogram = Image.open(path).convert("L").histogram()
    return sum(histogram[WHITE:]) / sum(histogram) > CHART


def add_links(app: Sphinx, page: str, template: str, context: dict, doctree) -> None:
    paths = {name: app.srcdir / path for path, (_, name) in app.env.images.items()}

    def linked(match: re.Match) -> str:
        image, file, name = match.groups()
        classes = "picture chart" if is_chart(paths[name]) else "picture"
        return f'<a class="{classes}" href="{file}">{image}</a>'

    pattern = r'(<img [^>]*src="([^"]*_images/([^"]+))"[^>]*>)'
    context["body"] = re.sub(pattern, linked, context.get("body", ""))


def setup(app: Sphinx) -> dict:
    app.connect("html-page-context", add_links)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
