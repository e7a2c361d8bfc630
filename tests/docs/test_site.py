"""The site: it builds without a warning, shows the source as it is, and opens without a network."""

import ast
import io
import re
import shutil
import subprocess
import sys
import tokenize
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
from PIL import Image, ImageStat

for package in ("sphinx", "myst_parser", "furo", "latex2mathml"):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install -e '.[docs]'")

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
sys.path.append(str(DOCS / "_ext"))  # the site's own extensions

from chapter import find  # noqa: E402
from contents import CHAPTERS  # noqa: E402
from mathml import to_mathml  # noqa: E402
from prose import to_html, typeset  # noqa: E402
from source import Source  # noqa: E402

MODULES = sorted(path.relative_to(ROOT) for path in ROOT.glob("vqgan/[!_]*.py"))
MODULES += [
    Path("vqgan/__main__.py"),
    *(path.relative_to(ROOT) for path in ROOT.glob("train_*.py")),
]
DOCUMENTS = [ROOT / "README.md", *sorted(DOCS.glob("*.md")), DOCS / "results" / "README.md"]
LARGEST_PICTURE = 300_000  # bytes, so that a page opens at once
WIDE, NARROW = 1280, 390  # pixels: a small laptop, a telephone
PATIENCE = 120_000  # milliseconds that a page may take on a machine that is busy with a training


class Page(HTMLParser):
    """What the tests ask of a page: its ids, links, pictures, lines of code and prose."""

    def __init__(self, path: Path):
        super().__init__()
        self.ids, self.links, self.pictures = [], [], []
        self.lines = []  # [kind, file, number, text] of every line of code
        self.prose = {}  # file -> the text beside its code
        self.kind = self.file = None
        self.in_line = self.in_prose = 0  # how deep in a line of code, in prose
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        classes = (attributes.get("class") or "").split()
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.links += [attributes[key] for key in ("href", "src") if attributes.get(key)]
        if tag == "img":
            self.pictures.append((attributes["src"], attributes.get("alt")))
        if "annotated" in classes or "excerpt" in classes:
            self.kind, self.file = classes[0], attributes["data-path"]
        if tag == "span":
            if self.in_line:
                self.in_line += 1
            elif "line" in classes:
                self.in_line = 1
                self.lines.append([self.kind, self.file, None, ""])
        if "number" in classes:
            self.lines[-1][2] = int(attributes["data-line"])
        if tag == "div":
            if self.in_prose:
                self.in_prose += 1
            elif "prose" in classes:
                self.in_prose = 1
        if self.in_prose:
            self.prose[self.file] = self.prose.get(self.file, "") + " "

    def handle_endtag(self, tag):
        if tag == "span" and self.in_line:
            self.in_line -= 1
        if tag == "div" and self.in_prose:
            self.in_prose -= 1

    def handle_data(self, data):
        if self.in_line:
            self.lines[-1][3] += data
        if self.in_prose:
            self.prose[self.file] += data


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the built site. Any warning of Sphinx fails it."""
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "-q", str(DOCS), str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def pages(site):
    return {path.relative_to(site).as_posix(): Page(path) for path in sorted(site.rglob("*.html"))}


def lines_that_are_prose(text):
    """Numbers of the lines of docstrings and of comments that stand alone, and of empty lines."""
    lines = text.splitlines()
    numbers = {number for number, line in enumerate(lines, 1) if not line.strip()}
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT and token.line.strip().startswith("#"):
            numbers.add(token.start[0])
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
            node
        ):
            numbers |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return numbers


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_every_line_of_code_is_shown_once_and_as_it_is(pages, module):
    lines = (ROOT / module).read_text().splitlines()
    shown = [
        (number, text)
        for page in pages.values()
        for kind, file, number, text in page.lines
        if kind == "annotated" and file == str(module)
    ]
    numbers = [number for number, _ in shown]
    assert numbers == sorted(set(numbers))
    assert [text for _, text in shown] == [lines[number - 1] + "\n" for number in numbers]
    left_out = set(range(1, len(lines) + 1)) - set(numbers)
    assert left_out <= lines_that_are_prose((ROOT / module).read_text())


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_every_word_of_docstrings_and_comments_is_beside_the_code(pages, module):
    """Words of four letters or more, but those that are typeset as symbols."""
    text = (ROOT / module).read_text()
    lines = text.splitlines()
    shown_as_code = {
        number
        for page in pages.values()
        for _, file, number, _ in page.lines
        if file == str(module)
    }
    prose = [lines[i - 1] for i in lines_that_are_prose(text) - shown_as_code]
    prose = [line for line in prose if not line.strip().startswith("# ---")]  # headings of parts
    words = Counter(re.findall(r"[A-Za-z]{4,}", "\n".join(prose)))
    for symbol in ("alpha beta gamma delta epsilon lambda sigma sqrt prod grad Args").split():
        del words[symbol]
    beside = "".join(page.prose.get(str(module), "") for page in pages.values())
    missing = words - Counter(re.findall(r"[A-Za-z]{4,}", beside))
    assert not missing


def test_excerpts_are_the_source(pages):
    for name, page in pages.items():
        for kind, file, number, text in page.lines:
            if kind == "excerpt":
                line = (ROOT / file).read_text().splitlines()[number - 1]
                assert text.strip() == line.strip() and len(text) <= len(line) + 1, name


def test_chapters_hold_no_copies_of_code():
    """Python in a chapter is an example that begins with its imports; code comes by links."""
    for path in DOCS.glob("*.md"):
        for example in re.findall(r"^```python\n(.*?)^```", path.read_text(), re.M | re.S):
            assert re.match(r"(from|import) ", example), f"{path.name}: {example[:80]!r}"


@pytest.mark.parametrize("text", ["no such line", "return"])
def test_a_link_to_no_line_or_to_several_is_an_error(text):
    with pytest.raises(ValueError, match="lines of vqgan/metrics.py hold"):
        find(Source("vqgan/metrics.py"), text)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_a_code_host_shows_links_where_the_site_shows_code(document):
    """No role, directive or definition; and a link's text stands in the source file it leads to."""
    text = document.read_text()
    assert not re.findall(r"^[`:]{3,}\{.*|\{[\w:-]+\}`.*|^: .*", text, re.MULTILINE)
    for shown, target in re.findall(r"\[`([^`]+)`\]\(([^)#]+\.py)\)", text):
        path, shown = document.parent / target, " ".join(shown.split())
        name = shown.rpartition(".")[2] if re.fullmatch(r"[\w.]+", shown) else shown
        is_path = path.resolve().as_posix().endswith(shown)
        assert is_path or name in path.read_text(), f"{target} does not hold {shown!r}"


def test_chapters_show_their_sections_and_their_neighbors_before_the_source(site):
    for number, name in enumerate(CHAPTERS):
        html = (site / f"{name}.html").read_text()
        listed = re.search(r'<nav class="on-this-page">.*?</nav>', html, re.S)
        sections = re.findall(r'<h2>.*?href="(#[^"]+)"', html)
        assert re.findall(r'href="(#[^"]+)"', listed[0]) == sections, name
        neighbors, source = html.find('<nav class="neighbors">'), html.find('id="the-source"')
        assert (neighbors < source) == ("#the-source" in sections), name
        for neighbor in (*CHAPTERS[:number][-1:], *CHAPTERS[number + 1 :][:1]):
            assert source < 0 or f'href="{neighbor}.html"' in html[neighbors:source], name


def test_the_glossary_is_linked_from_the_chapters():
    words = re.findall(r"^## (.*)$", (DOCS / "glossary.md").read_text(), re.MULTILINE)
    chapters = "".join((DOCS / f"{name}.md").read_text() for name in CHAPTERS)
    linked = set(re.findall(r"\(glossary\.md#([^)]+)\)", chapters))
    assert linked == {word.lower().replace(" ", "-") for word in words}


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_every_public_name_is_in_a_chapter_and_on_the_api_page(pages, module):
    dotted = str(module).removesuffix(".py").replace("/", ".")
    tree = ast.parse((ROOT / module).read_text())
    names = [node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)]
    in_chapters = {id for name, page in pages.items() if name != "api.html" for id in page.ids}
    assert dotted in in_chapters
    for name in names:
        if not name.startswith("_"):
            assert f"{dotted}.{name}" in in_chapters
            is_command = module.stem.startswith(("__main__", "cli", "train_"))
            assert is_command or f"api.{dotted}.{name}" in pages["api.html"].ids


def test_links_lead_somewhere(site, pages):
    for name, page in pages.items():
        assert len(page.ids) == len(set(page.ids)), f"{name} has an id twice"
        for link in page.links:
            if re.match(r"https?:|data:|mailto:", link):
                continue
            path, _, anchor = link.partition("#")
            target = (site / name).parent / unquote(path.partition("?")[0]) if path else site / name
            assert target.exists(), f"{name}: {link}"
            if anchor:
                key = target.resolve().relative_to(site.resolve()).as_posix()
                assert unquote(anchor) in pages[key].ids, f"{name}: {link}"


def test_pictures_are_small_and_have_a_text(site, pages):
    for name, page in pages.items():
        for source, text in page.pictures:
            size = ((site / name).parent / unquote(source)).stat().st_size
            assert size <= LARGEST_PICTURE, f"{name}: {source} has {size} bytes"
            # Where a picture has no text, Sphinx puts its path there.
            assert text and not text.endswith(".png"), f"{name}: {source} has no alt text"
            assert page.links.count(source) > 1, f"{name}: {source} is shown and not linked"


# --- prose and equations --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, html",
    [
        (
            "z_e, s_<i, x_hat",
            "<i>z</i><sub><i>e</i></sub>, <i>s</i><sub>&lt;<i>i</i></sub>, <i>x\u0302</i>",
        ),
        ("|z - e|^2", "|<i>z</i> − <i>e</i>|<sup>2</sup>"),
        ("2^(levels - 1)", "2<sup>levels − 1</sup>"),
        ("sum_i log p", "∑<sub><i>i</i></sub> log <i>p</i>"),
        ("lambda of eq. 7", "<i>λ</i> of eq. 7"),
        ("1/sqrt(12), sqrt(a + b)", "1/√12, √(<i>a</i> + <i>b</i>)"),
        # What is no mathematics stays.
        ("a straight-through step, A.1", "a straight-through step, A.1"),
        ("1e-4, 1.8 M, np.cos", "1e-4, 1.8 M, <code>np.cos</code>"),
        ("log_var `z_e`", "<code>log_var</code> <code>z_e</code>"),
        ("--resume, D's", "--resume, <i>D</i>'s"),
        ("<class>", "&lt;class&gt;"),
    ],
)
def test_typesetting(text, html):
    assert typeset(text, lambda name: None) == html


def test_lines_that_stand_in_columns_stay_in_columns():
    html = to_html(
        "    a + b   the first\n    c       the second,\n            at length", lambda n: None
    )
    rows = re.findall(r"<tr>(.*?)</tr>", html)
    cells = [re.findall(r"<td>(.*?)</td>", row) for row in rows]
    assert [row[1] for row in cells] == ["the first", "the second, at length"]


def test_names_and_signs_in_an_equation_have_the_space_that_they_need():
    assert "<mi>log</mi><mspace" in to_mathml(r"\log p", "inline")
    assert "<mi>sg</mi><mo" in to_mathml(r"\operatorname{sg}[e]", "inline")
    assert "<mo>\N{TILDE OPERATOR}</mo>" in to_mathml(r"z \sim q", "inline")


@pytest.mark.parametrize("latex", [r"a \nonsense b", r"\begin{aligned} a &= b \end{aligned}", "a_"])
def test_an_equation_that_cannot_be_shown_is_an_error(latex):
    with pytest.raises(ValueError):
        to_mathml(latex, "inline")


# --- in a browser, without a network --------------------------------------------------------------

MEASURE = """() => {
    const box = (element) => {
        const {left, right, top, bottom, width, height} = element.getBoundingClientRect();
        return {left, right, top, bottom, width, height};
    };
    // The theme cuts off what is too wide for the page, and scrolls its content instead.
    const scrolled = [document.documentElement, ...document.querySelectorAll(".content")];
    return {
        width: Math.max(...scrolled.map((element) => element.scrollWidth)),
        equations: [...document.querySelectorAll("math")].map(box),
        cut: [...document.querySelectorAll("pre")]
            .filter((code) => code.scrollWidth > code.clientWidth).length,
        pieces: [...document.querySelectorAll(".piece")]
            .filter((piece) => piece.querySelector(".prose").innerText.trim())
            .filter((piece) => piece.querySelector(".line"))
            .map((piece) => ({
                module: piece.classList.contains("module"),
                prose: box(piece.querySelector(".prose")),
                code: box(piece.querySelector(".code")),
                hidden: piece.querySelector("pre").scrollWidth
                    - piece.querySelector("pre").clientWidth,
            })),
    };
}"""


# The lowest contrast of text with its ground, by the kind of element, where it is below 4.5 to 1.
CONTRASTS = """() => {
    const numbers = (color) => color.match(/[\\d.]+/g).map(Number);
    const light = ([r, g, b]) => [r, g, b]
        .map((c) => c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4)
        .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
    const ground = (element) => {
        for (; element; element = element.parentElement) {
            const color = numbers(getComputedStyle(element).backgroundColor);
            if (color[3] !== 0) return color;
        }
        return [255, 255, 255];
    };
    const low = {}, seen = new Set();
    for (const element of document.querySelectorAll("article *, .sidebar-tree *, .neighbors *")) {
        const {localName, className, parentElement} = element;
        const kind = `${parentElement.className} > ${localName}.${className}`;
        const texts = [...element.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
        if (!texts || seen.has(kind) || !element.checkVisibility()) continue;
        seen.add(kind);
        const [a, b] = [numbers(getComputedStyle(element).color), ground(element)].map(light);
        const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        if (contrast < 4.5) low[kind] = contrast;
    }
    return low;
}"""


@pytest.fixture(scope="module")
def browser():
    reason = "playwright is not installed: pip install -e '.[browser]'"
    api = pytest.importorskip("playwright.sync_api", reason=reason)
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed: apt-get install chromium")
    with api.sync_playwright() as playwright:
        # As root, as in a container, Chromium refuses to start with its sandbox.
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def visits(browser, site, pages):
    """Of every page: what it said and asked for, low contrasts, and measures in both widths."""
    visits = {}
    context = browser.new_context(offline=True)
    context.set_default_timeout(PATIENCE)
    for name in pages:
        page, said, asked = context.new_page(), [], []
        page.on("console", lambda message, said=said: said.append(message.text))
        page.on("pageerror", lambda error, said=said: said.append(str(error)))
        page.on("request", lambda request, asked=asked: asked.append(request.url))
        page.set_viewport_size({"width": WIDE, "height": 900})
        page.goto((site / name).as_uri())
        wide, contrasts = page.evaluate(MEASURE), page.evaluate(CONTRASTS)
        page.emulate_media(color_scheme="dark")
        contrasts |= page.evaluate(CONTRASTS)
        page.set_viewport_size({"width": NARROW, "height": 900})
        visits[name] = {"said": said, "asked": asked, "contrasts": contrasts, WIDE: wide}
        visits[name][NARROW] = page.evaluate(MEASURE)
        page.close()
    context.close()
    return visits


def test_pages_load_from_the_disk_alone(visits):
    for name, visit in visits.items():
        assert visit["said"] == [], name
        assert all(url.startswith(("file:", "data:")) for url in visit["asked"]), name


def test_text_can_be_read_in_light_and_in_dark(visits):
    for name, visit in visits.items():
        assert visit["contrasts"] == {}, name


def test_no_page_scrolls_sideways(visits):
    for name, visit in visits.items():
        for width in (WIDE, NARROW):
            assert visit[width]["width"] <= width, f"{name} scrolls sideways at {width} pixels"


@pytest.mark.parametrize("name", ["path.html", "study.html"])
def test_on_a_dark_page_charts_are_dark_and_images_keep_their_colors(browser, site, name):
    context = browser.new_context(offline=True, color_scheme="dark")
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    page.goto((site / name).as_uri())
    for link in page.query_selector_all(".picture"):
        shown = Image.open(io.BytesIO(link.query_selector("img").screenshot()))
        address, classes = link.get_attribute("href"), link.get_attribute("class").split()
        colors = ImageStat.Stat(shown.convert("RGB")).mean
        if "chart" in classes or address.endswith(".svg"):
            assert max(colors) < 0.3 * 255, (address, colors)
        else:
            file = ImageStat.Stat(Image.open(site / address).convert("RGB")).mean
            assert colors == pytest.approx(file, abs=4), address
    context.close()


def test_the_lab_sheet_fits_on_a_sheet(browser, site):
    page = browser.new_page(offline=True)
    page.set_default_timeout(PATIENCE)
    page.goto((site / "sheet.html").as_uri())
    for paper in ("A4", "Letter"):
        assert len(re.findall(rb"/Type /Page\b", page.pdf(format=paper))) == 1, paper
    page.close()


def test_equations_have_a_size(visits):
    assert any(visit[WIDE]["equations"] for visit in visits.values())
    for name, visit in visits.items():
        for box in visit[WIDE]["equations"] + visit[NARROW]["equations"]:
            assert box["width"] > 0 and box["height"] > 0, name


def test_code_stands_beside_its_prose_where_there_is_room(visits):
    assert sum(len(visit[WIDE]["pieces"]) for visit in visits.values()) > 100
    for name, visit in visits.items():
        for piece in visit[WIDE]["pieces"]:
            prose, code = piece["prose"], piece["code"]
            assert code["left"] >= prose["right"] and code["top"] == prose["top"], name
            # Lines of 100 characters fit; imports, beside the module's long prose, may scroll.
            assert piece["module"] or piece["hidden"] <= 0, name


def test_code_stands_below_its_prose_on_a_narrow_screen(visits):
    for name, visit in visits.items():
        for piece in visit[NARROW]["pieces"]:
            prose, code = piece["prose"], piece["code"]
            assert code["top"] >= prose["bottom"] and code["left"] == prose["left"], name
        assert visit[NARROW]["cut"] == 0, name


def test_search_finds_a_word_of_the_source(browser, site):
    page = browser.new_page(offline=True)
    page.set_default_timeout(PATIENCE)
    page.goto((site / "search.html").as_uri() + "?q=straight-through")
    page.wait_for_selector("ul.search li")
    links = page.eval_on_selector_all("ul.search a", "links => links.map(link => link.href)")
    assert any("codebook.html" in link for link in links)
    page.close()
