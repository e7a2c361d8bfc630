"""The page of `vqgan demo`, clicked in a browser that reaches nothing but this computer."""

import base64
import io
import os
import re
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import CLASSES, save_pair
from PIL import Image

from vqgan.conditions import class_condition
from vqgan.masked import MaskedTransformer
from vqgan.vqvae import VQVAE

pytest.importorskip("gradio", reason="gradio is not installed: pip install -e '.[demo]'")
reason = "playwright is not installed: pip install -e '.[browser]'"
api = pytest.importorskip("playwright.sync_api", reason=reason)
CHROMIUM = shutil.which("chromium")
if CHROMIUM is None:
    pytest.skip("chromium is not installed: apt-get install chromium", allow_module_level=True)

ROOT = Path(__file__).parents[2]
PATIENCE = 120_000  # milliseconds that a page may take on a machine that is busy with a training
# Notes how many squares of the generated grid are filled, whenever it changes.
WATCH = """() => {
    const count = () => [...document.querySelectorAll(".codes:not(.all) button")]
        .filter((button) => button.checkVisibility() && button.innerText).length;
    window.counts = [];
    new MutationObserver(() => window.counts.push(count()))
        .observe(document.body, {subtree: true, childList: true});
}"""


def vivid_vqvae(**model_args):
    """An untrained VQ-VAE is almost gray; with larger weights, a change can be seen in 8 bits."""
    model = VQVAE(**model_args)
    with torch.no_grad():
        for weight in model.decoder.parameters():
            weight.mul_(3)
    return model


@contextmanager
def serve(folder, checkpoint):
    """The address of a page of this checkpoint; afterwards, no file of a visitor is left."""
    environment = os.environ | {"GRADIO_TEMP_DIR": str(folder / "files"), "PYTHONUNBUFFERED": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "vqgan", "demo", "--no-browser", "--device", "cpu", checkpoint]
    server = subprocess.Popen(
        command, stdout=subprocess.PIPE, cwd=folder, env=environment, text=True
    )
    try:
        yield re.search(r"http://127\.0\.0\.1:\d+", server.stdout.readline())[0]
    finally:
        server.terminate()
        server.wait(timeout=60)
    left = [file for file in folder.rglob("*") if file.is_file() and file.stat().st_size]
    assert left == [*folder.glob("pair/**/*.pt")]


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    with serve(tmp_path_factory.mktemp("shipped"), "shapes") as url:
        yield url


@pytest.fixture(scope="module")
def masked(tmp_path_factory, shapes):
    """A masked transformer over the codes of a VQ-VAE, 8x8, both untrained."""
    folder, images = tmp_path_factory.mktemp("masked"), shapes.train_images[:64]
    options = {"prior": MaskedTransformer, "kind": vivid_vqvae, "num_downsamples": 2}
    save_pair(folder / "pair", class_condition(CLASSES), images, **options)
    with serve(folder, "pair") as url:
        yield url


@pytest.fixture(scope="module")
def browser():
    with api.sync_playwright() as playwright:
        # As root, as in a container, Chromium refuses to start with its sandbox. No name is
        # resolved, so nothing but addresses of this computer can be reached.
        options = ["--no-sandbox", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser):
    """Opens a page as a new visitor; in the end, nothing was said or asked of other computers."""
    contexts, said, asked = [], [], []

    def open_page(url):
        contexts.append(browser.new_context())
        page = contexts[-1].new_page()
        page.set_default_timeout(PATIENCE)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.on("websocket", lambda socket: asked.append(socket.url))
        page.goto(url)
        page.wait_for_selector("button[name=code]")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert said == []
    assert {re.split("[:/]+", url)[1] for url in asked if not url.startswith("data:")} == {
        "127.0.0.1"
    }


def pixels(image):
    """What an <img> shows, uint8 (H, W, 3)."""
    data = image.get_attribute("src").removeprefix("data:image/png;base64,")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))).astype(int)


def images(page):
    """The five images of the first tab."""
    return [pixels(image) for image in page.query_selector_all(".row > figure img")]


def codes(page):
    """The visible grid's codes."""
    found = page.query_selector_all("button[name=position]")
    return [button.inner_text() for button in found if button.is_visible()]


def change(page, position, code):
    """Click a square, and a code to put there, and wait until it is there."""
    page.click(f'button[name=position][value="{position}"]:visible')
    page.wait_for_selector(f'button[value="{position}"][aria-pressed=true]')
    page.click(f'button[name=code][value="{code}"]')
    page.wait_for_selector(f'button[value="{position}"]:visible:text-is("{code}")')


def generate(page, button):
    """Click a button of the second tab; returns how many squares were filled, one after another."""
    page.evaluate(WATCH)
    page.get_by_role("button", name=button).click()
    page.wait_for_function("window.counts.length > 1 && window.counts.at(-1) === 64")
    page.wait_for_timeout(500)
    return page.evaluate("window.counts")


def paint(page):
    """Paint the pixels 8 to 15 of rows 16 to 23."""
    box = page.query_selector(".paint").bounding_box()
    step = box["width"] / 16
    for row in range(8, 12):
        y = box["y"] + (row + 0.5) * step
        page.mouse.move(box["x"] + 4.5 * step, y)
        page.mouse.down()
        page.mouse.move(box["x"] + 7.5 * step, y, steps=12)
        page.mouse.up()
    hole = np.zeros((32, 32), dtype=bool)
    hole[16:24, 8:16] = True
    return hole


def test_a_code_of_a_vqvae_changes_its_receptive_field_only(visit, masked):
    page = visit(masked)
    change(page, 0, 5)
    first = images(page)[2]
    change(page, 0, 20)
    differs = (first != images(page)[2]).any(axis=2)
    assert differs.any() and not differs[19:].any() and not differs[:, 19:].any()


def test_a_code_of_the_shipped_vqgan_changes_mostly_what_is_near(visit, shipped):
    page, fractions = visit(shipped), []
    for position, code in ((18, 32), (21, 3), (35, 100), (45, 212), (27, 248), (42, 130)):
        before = images(page)[2]
        change(page, position, code)
        change_of_pixels = ((images(page)[2] - before) ** 2).sum(axis=2)
        row, column = divmod(position, 8)
        near = change_of_pixels[4 * row - 4 : 4 * row + 8, 4 * column - 4 : 4 * column + 8]
        fractions.append(near.sum() / change_of_pixels.sum())
    assert np.mean(fractions) >= 0.8


def test_two_visitors_do_not_disturb_each_other(visit, shipped):
    one, other = visit(shipped), visit(shipped)
    untouched = codes(other)
    change(one, 9, 7)
    one.click('button[name=example][value="5"]')
    change(other, 54, 8)
    expected = [*untouched]
    expected[54] = "8"
    assert codes(other) == expected != codes(one)
    assert codes(visit(shipped)) == untouched


def test_an_upload_is_shown_and_a_text_file_is_named(visit, shipped, images):
    page = visit(shipped)
    original = np.asarray(Image.open(images[0])).astype(int)
    # What is there before the upload, so that a fast one is not missed.
    first = page.wait_for_selector(".row > figure img").get_attribute("src")
    page.set_input_files("input[type=file]", images[0])
    page.wait_for_function("(src) => document.querySelector('.row > figure img').src !== src",
                           arg=first)  # fmt: skip
    shown = pixels(page.query_selector(".row > figure img"))
    assert np.array_equal(shown, original)
    notes = {"name": "notes.txt", "mimeType": "text/plain", "buffer": b"no image"}
    page.set_input_files("input[type=file]", files=[notes])
    page.wait_for_selector("text=notes.txt cannot be read as an image")
    assert np.array_equal(pixels(page.query_selector(".row > figure img")), original)


@pytest.mark.parametrize("name", ["shipped", "masked"])
def test_the_grid_fills_and_a_hole_is_filled(visit, name, request):
    page = visit(request.getfixturevalue(name))
    page.get_by_role("tab", name="Generate and fill").click()
    page.wait_for_selector(".paint")
    counts = [count for count in generate(page, "Generate an image") if count]
    assert counts == sorted(counts) and len(set(counts)) >= 4
    before = pixels(page.query_selector(".paint + img"))
    page.get_by_role("button", name="Fill the hole").click()
    page.wait_for_selector("text=there is no hole yet")
    hole = paint(page)
    assert len(page.query_selector_all(".paint i.hole")) == 16
    generate(page, "Fill the hole")
    page.wait_for_function("!document.querySelector('.paint i.hole')")
    after = pixels(page.query_selector(".paint + img"))
    assert np.array_equal(after[~hole], before[~hole])
    assert (after != before).any(axis=2)[hole].mean() > 0.9
