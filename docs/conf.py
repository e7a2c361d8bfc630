"""How Sphinx builds the site: `sphinx-build -W docs docs/_build`, then open docs/_build/index.html.

Nothing is fetched, neither while it is built nor when a page is opened: fonts are the system's,
equations are MathML, and the code is parsed, not imported.

For who writes a chapter: pages are plain Markdown that a code host shows as well. `_ext/chapter.py`
says how to show code and how to link to a line of it, `_ext/annotated.py` how a module is shown,
`_ext/contents.py` where the sidebar comes from, `_ext/mathml.py` what an equation may hold.
Pictures are ![what is seen](results/study/reconstructions.png), have a text, and at most 300 KB.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))  # the site's own extensions

project = "vqgan"
project_copyright = "MIT licence"
extensions = ["myst_parser", "mathml", "annotated", "chapter", "api", "contents", "pictures"]
exclude_patterns = ["_build"]

myst_enable_extensions = ["dollarmath"]  # $z_e$ and $$...$$, which code hosts typeset, too
myst_heading_anchors = 3  # headings down to ### can be linked to, as on GitHub
smartquotes = False  # "--resume" is a flag

html_theme = "furo"
html_title = "vqgan, annotated"
html_math_renderer = "mathml"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_copy_source = False
html_use_index = False  # no entries: search and the API page do its work
html_show_copyright = False
html_show_search_summary = False  # it would fetch pages, which a browser refuses for files
pygments_style = "a11y-high-contrast-light"
pygments_dark_style = "github-dark"
