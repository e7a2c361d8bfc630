"""The command that opens a page in the browser: `vqgan demo`.

The page is made with Gradio, an extra of this package. It is served to this computer alone, needs
no network, and keeps nothing: what belongs to a visitor ends with the session of the browser, and
the file that an upload passes through is deleted as soon as it is read.
"""

import argparse
from contextlib import contextmanager
from typing import Any

import torch

from vqgan.arguments import path_text
from vqgan.demo import BRUSH_SIDE, Demo, show
from vqgan.device import choose_device
from vqgan.errors import InputError
from vqgan.images import to_unit

CODES = """An image becomes {N} whole numbers. Each square of the grid holds one of {K} *codes*, and
these numbers are all that the decoder sees. Change one, and see what it does to the image."""
GENERATE = """A transformer chooses the codes, and the decoder makes an image of them. Then paint a
hole into the image, and let the transformer fill it."""
CSS = """.row { display: flex; flex-wrap: wrap; gap: 0.7rem; font-size: 0.8rem }
figure, figure img { width: 10.8rem; margin: 0 } img { image-rendering: pixelated }
.row button figure, .row button img { width: 3.4rem } .paint i.hole { background: #555 }
figure:has(.paint), .paint, .paint + img { width: 18rem } figure { position: relative }
.paint { position: absolute; height: 18rem; display: grid; cursor: crosshair; touch-action: none;
grid-template-columns: repeat(16, 1fr) } .codes.all { width: 28rem; max-height: 26rem;
overflow-y: auto; padding: 3px } .codes button { aspect-ratio: 1; font-size: 0.7rem;
border: 1px solid #8884; overflow: hidden } .codes.all button { font-size: 0.55rem }
.codes { display: grid; width: 20rem; grid-template-columns: repeat(16, 1fr) }
.codes button[aria-pressed=true] { outline: 3px solid #d55e00; z-index: 1 }"""
CLICK = """element.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (button) trigger("select", {kind: button.name, number: Number(button.value)}); });"""
PAINT = """for (const kind of ["pointerdown", "pointerover"])
    element.addEventListener(kind, (event) => {
        if (event.buttons && event.target.localName === "i") event.target.className = "hole"; });"""
READ_HOLE = """(_, ...others) =>
    [[...document.querySelectorAll(".paint i")].map((square) => !!square.className), ...others]"""
SETTINGS = ("temperature", "top_k", "top_p", "guidance")


def painting(x: torch.Tensor) -> str:
    """An image (1, 3, H, W) in [-1, 1], to paint a hole in."""
    return show(to_unit(x), "Paint a hole here, with the mouse", squares=BRUSH_SIDE**2)


def build(demo: Demo) -> Any:
    """The page, as the `Blocks` of Gradio."""
    import gradio as gr

    @contextmanager
    def mistakes():  # of a visitor: a sentence on the page, and no traceback
        try:
            yield
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from error

    def html(value, heading="", js=None):
        template = f"<p><b>{heading}</b></p>${{value}}"
        return gr.HTML(value, html_template=template, js_on_load=js, apply_default_css=False)

    def click(choice, event: gr.EventData):
        choice = demo.click(choice, event.kind, event.number)
        return choice, *demo.board(choice)

    def upload(path):
        with mistakes():
            choice = demo.upload(path)
        return choice, *demo.board(choice)

    def generate(hole, x, prompt, seed, *settings):
        options = dict(zip(SETTINGS, settings, strict=True))
        with mistakes():
            for grid, image in demo.generate(x, hole, prompt, seed, **options):
                yield grid, painting(image), image

    first, examples = demo.choose(demo.examples[:1]), ""
    for i, x in enumerate(to_unit(demo.examples).split(1)):
        examples += f'<button name="example" value="{i}">{show(x)}</button>'
    codes = "".join(demo.square(code, "code", code) for code in demo.palette)
    codes = f'<div class="codes all">{codes}</div>'
    quiet = {"show_progress": "hidden"}  # the grid shows it
    with gr.Blocks(title="vqgan", analytics_enabled=False) as page:
        with gr.Tab("Change a code"):
            choice = gr.State(first)
            gr.Markdown(CODES.format(N=demo.tokenizer.seq_len, K=len(demo.colors)))
            gallery = html(f'<div class="row">{examples}</div>', "1. Choose an image", CLICK)
            file = gr.UploadButton("or upload one", size="sm")
            board = [html(demo.board(first)[0])]
            with gr.Row():
                board.append(html(demo.board(first)[1], "2. Click a square of its grid", CLICK))
                palette = html(codes, "3. Click another code to put there", CLICK)
            for part in (gallery, board[1], palette):
                part.select(click, choice, [choice, *board], **quiet)
            file.upload(upload, file, [choice, *board], **quiet)
        if demo.pipeline is not None:
            with gr.Tab("Generate and fill"):
                gr.Markdown(GENERATE)
                image, hole = gr.State(first.x), gr.JSON([], visible=False)
                with gr.Row():
                    with gr.Column(scale=1, min_width=240):
                        inputs = [hole, image, *controls(demo)]
                        new = gr.Button("Generate an image", variant="primary")
                    with gr.Column(scale=1, min_width=300):
                        canvas = html(painting(first.x), js=PAINT)
                        fill = gr.Button("Fill the hole", variant="primary")
                        take = gr.Button("Take the first tab's image")
                    with gr.Column(scale=1, min_width=330):
                        grid = html(demo.grid(torch.full_like(first.tokens, -1)))
                new.click(generate, inputs, [grid, canvas, image], **quiet)
                fill.click(generate, inputs, [grid, canvas, image], js=READ_HOLE, **quiet)
                take.click(lambda c: (painting(c.x), c.x), choice, [canvas, image], **quiet)
    return page


def controls(demo: Demo) -> list:
    """The settings of `Demo.generate`: prompt, seed, and SETTINGS."""
    import gradio as gr

    condition, can_drop = demo.pipeline.condition, demo.pipeline.supports_guidance
    if condition.kind == "class":
        prompt = gr.Dropdown([*condition.names, *[("any", "")] * can_drop], label="class")
    else:
        info = f"of these words: {', '.join(filter(None, condition.names))}"
        prompt = gr.Textbox(label="caption", info=info, visible=condition.kind == "caption")
    K, can_guide = len(demo.colors), can_drop and condition.kind != "none"
    return [
        prompt,
        gr.Number(0, label="seed", precision=0, minimum=0),
        gr.Slider(0, 2, 1, label="temperature", info="0: the likeliest code"),
        gr.Slider(1, K, K, step=1, label="top-k", info="only the k likeliest"),
        gr.Slider(0.05, 1, 1, label="top-p", info="only the likeliest, p in all"),
        gr.Slider(1, 8, 3 if can_guide else 1, label="guidance", info="1: none", visible=can_guide),
    ]


def demo_flags(add) -> None:
    """The flags of `vqgan demo`."""
    help = "of a transformer, or of a VQ-VAE or VQGAN"
    add("checkpoint", nargs="?", type=path_text, default="shapes", metavar="CHECKPOINT", help=help)
    add("--no-browser", action="store_true", help="only print the address of the page")
    add("--device", default="auto", help="device to compute on: auto, cpu, cuda, cuda:1 or mps")


def demo(args: argparse.Namespace) -> None:
    """Open a page to change the codes of an image, to generate, and to fill holes."""
    try:
        import gradio as gr
    except ModuleNotFoundError as error:
        raise InputError(f"the page needs Gradio ({error}): pip install 'gradio>=6'") from error
    page = build(Demo(args.checkpoint, choose_device(args.device)))
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    page.queue(default_concurrency_limit=4)  # so that a visitor does not wait for another
    options = {"share": False, "inbrowser": not args.no_browser, "quiet": True, "css": CSS}
    options |= {"max_file_size": "50mb", "footer_links": [], "theme": gr.themes.Default(**fonts)}
    _, url, _ = page.launch(server_name="127.0.0.1", prevent_thread_lock=True, **options)
    print(f"the page is at {url} (Ctrl-C ends it)", flush=True)
    page.block_thread()
