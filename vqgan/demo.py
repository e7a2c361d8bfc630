"""What the page of `vqgan demo` shows, as HTML: an image becomes codes, and codes an image.

    first tab    image -> tokens -> the visitor's tokens -> image
    second tab   class or caption -> tokens, one after the other -> image; the same for a hole

`cli_demo.py` makes the page of it. A `Demo` is shared by all visitors, and never changes; what
belongs to one of them is a `Choice`, or an image. The HTML holds its images, so no file is written.
"""

import base64
import colorsys
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vqgan import completion, pretrained
from vqgan.conditions import LUMA, TRANSFORMS
from vqgan.errors import InputError
from vqgan.evaluation import decode_tokens
from vqgan.image_folder import read_images
from vqgan.images import from_uint8, to_uint8, to_unit
from vqgan.metrics import fixed_length_bits, ssim
from vqgan.shapes import render_shapes, render_textures

NUM_EXAMPLES = 12
MAX_DECODED = 2**19  # pixels that are decoded to give codes their colors: 512 images of 32x32
BRUSH_SIDE = 16  # a hole is painted in 16x16 squares


class Choice(NamedTuple):
    """What a visitor of the first tab has chosen."""

    x: Tensor  # (1, 3, H, W) in [-1, 1]
    tokens: Tensor  # (1, N), of the encoder
    changed: Tensor  # (1, N), with the visitor's codes
    position: int  # the marked one, 0 to N - 1


class Demo:
    """The models of a page, and what it shows.

    Args:
        checkpoint: of a transformer, which brings its tokenizer, or of a tokenizer alone.
    """

    def __init__(self, checkpoint: str, device: torch.device):
        state = pretrained.read_checkpoint(checkpoint)
        self.pipeline: Any = None
        if pretrained.is_prior(state):
            self.pipeline = pretrained.load_pipeline(checkpoint)
            self.pipeline.transformer.to(device)
            tokenizer = self.pipeline.tokenizer
        else:
            tokenizer, _ = pretrained.load_tokenizer(checkpoint)
        self.tokenizer, self.device = tokenizer.to(device), device
        K, size = tokenizer.num_embeddings, tokenizer.image_size
        # Evenly spaced codes, if there are too many to decode them all.
        codes = torch.linspace(0, K - 1, min(K, MAX_DECODED // size**2)).round().long()
        alone = codes[:, None].repeat(1, tokenizer.seq_len).to(device)
        self.colors = torch.full((K, 3), 0.9)  # of an image that has one code everywhere
        self.colors[codes] = to_unit(decode_tokens(tokenizer, alone)).mean(dim=(2, 3))
        self.palette = sorted(codes.tolist(), key=lambda i: colorsys.rgb_to_hsv(*self.colors[i]))
        render = render_textures if state["metadata"].get("data") == "textures" else render_shapes
        images = torch.from_numpy(render(NUM_EXAMPLES, seed=(0, 2))[0])  # of no training set
        self.examples = from_uint8(F.interpolate(images, size)).to(device)

    # --- the first tab ----------------------------------------------------------------------------

    def choose(self, x: Tensor) -> Choice:
        """Encode an image (1, 3, H, W)."""
        tokens, (_, w) = self.tokenizer.tokens(x), self.tokenizer.grids[-1]
        return Choice(x, tokens, tokens, position=(tokens.shape[1] - w) // 2)  # near the middle

    def upload(self, path: str) -> Choice:
        """Encode an image from a file, and delete the file."""
        try:
            image = read_images([path], self.tokenizer.image_size)
        except InputError as error:  # names the file as the visitor does
            raise InputError(str(error).replace(f"{Path(path).parent}/", "")) from error
        finally:
            Path(path).unlink()
        return self.choose(from_uint8(image).to(self.device))

    def click(self, choice: Choice, kind: str, number: int) -> Choice:
        """Choose an "example", a "position" to mark, or the "code" to put there."""
        if kind == "example":
            return self.choose(self.examples[[number]])
        if kind == "position":
            return choice._replace(position=number)
        changed = choice.changed.clone()
        changed[0, choice.position] = number
        return choice._replace(changed=changed)

    def board(self, choice: Choice) -> tuple[str, str]:
        """The images of a choice, and its grid with a word on the marked position."""
        chosen, code = (int(t[0, choice.position]) for t in (choice.tokens, choice.changed))
        tokens = torch.cat([choice.tokens, choice.changed, torch.full_like(choice.tokens, code)])
        decoded, changed, alone = to_unit(decode_tokens(self.tokenizer, tokens)).split(1)
        x, gap = to_unit(choice.x).cpu(), (changed - decoded).abs()
        bits = fixed_length_bits(self.tokenizer.seq_len, self.tokenizer.num_embeddings)
        quality = f"squared error {F.mse_loss(decoded, x):.4f}, SSIM {ssim(x, decoded).item():.2f}"
        images = show(x, f"The image, {8 * x.numel():,} bits")
        images += show(decoded, f"Decoded from its codes, {bits:,.0f} bits: {quality}")
        images += show(changed, "Decoded from your codes")
        gap = gap * (gap > 0.5 / 255)  # less is rounding, which no screen shows
        images += show(gap / gap.max().clamp(min=1 / 255), "Where the last two differ (brightened)")
        images += show(alone, f"An image of code {code} alone")
        word = "which the encoder chose" if code == chosen else f"and the encoder chose {chosen}"
        word = f"<p>The marked square holds <b>code {code}</b>, {word}.</p>"
        return f'<div class="row">{images}</div>', self.grid(choice.changed, choice.position) + word

    def grid(self, tokens: Tensor, marked: int = -1) -> str:
        """The grids of tokens (1, N), where -1 is an empty square, and the marked position."""
        html, codes = "", enumerate(tokens[0].tolist())
        squares = [self.square(code, "position", i, marked) for i, code in codes]
        for h, w in self.tokenizer.grids:
            html += f'<div class="codes" style="grid-template-columns: repeat({w}, 1fr)">'
            html += "".join(squares[: h * w]) + "</div>"
            squares = squares[h * w :]
        return html

    def square(self, code: int, kind: str, number: int, marked: int = -1) -> str:
        """A code in its color, as a button that stands for a number of this kind."""
        color = self.colors[code] if code >= 0 else torch.ones(3)
        ink = "black" if color @ torch.tensor(LUMA) > 0.5 else "white"
        style = f"background: rgb({', '.join(f'{255 * c:.0f}' for c in color)}); color: {ink}"
        pressed = str(number == marked).lower()
        button = f'<button name="{kind}" value="{number}" aria-pressed="{pressed}"'
        return f'{button} style="{style}">{code if code >= 0 else ""}</button>'

    # --- the second tab ---------------------------------------------------------------------------

    def condition(self, prompt: str, x: Tensor) -> Tensor:
        """The condition (1, C): a class, a caption, or of the image x; a dropped one for ""."""
        condition, null = self.pipeline.condition, self.pipeline.transformer.null_token
        if condition.kind == "image":
            return self.tokenizer.tokens(TRANSFORMS[condition.transform](x))
        if condition.kind == "none":
            return condition.start_tokens(1).to(self.device)
        if prompt:
            encode = {"class": condition.encode_classes, "caption": condition.encode_captions}
            return encode[condition.kind]([prompt]).to(self.device)
        if not self.pipeline.supports_guidance:
            raise InputError(f"this model needs a {condition.kind}: give one")
        return torch.full((1, condition.length), null, device=self.device)

    def generate(
        self, x: Tensor, hole: list[bool], prompt: str, seed: int, **settings: Any
    ) -> Iterator[tuple[str, Tensor]]:
        """After every token, or round: the grid, as HTML, and the image so far, (1, 3, H, W).

        Args:
            x: (1, 3, H, W), the image that the hole is in, or that is the model's condition.
            hole: of the BRUSH_SIDE x BRUSH_SIDE squares; if there are none, the image is new.
            settings: of `sample_progressive`.
        """
        if hole and not any(hole):
            raise InputError("there is no hole yet: paint one into the image with the mouse")
        squares = torch.tensor(hole or [True] * BRUSH_SIDE**2, device=self.device).float()
        mask = F.interpolate(squares.view(1, 1, BRUSH_SIDE, -1), x.shape[2:])[0, 0].bool()
        condition = self.condition(prompt, completion.paint_over(x, mask) if hole else x)
        if hole:
            settings["given"] = completion.prepare(self.pipeline, x, mask, condition)[1]
        settings["generator"] = torch.Generator().manual_seed(seed)
        for tokens in self.pipeline.transformer.sample_progressive(condition, **settings):
            decoded = self.tokenizer.decode_tokens(tokens.clamp(min=0))
            missing = self.tokenizer.split_tokens(tokens < 0)[-1]  # (1, h, w), of the finest grid
            missing = F.interpolate(missing[None].float(), x.shape[2:]).bool()
            image = completion.paste(x, torch.where(missing, 0, decoded), mask)  # 0: gray
            yield self.grid(tokens), image


def show(unit: Tensor, caption: str = "", squares: int = 0) -> str:
    """An image (1, 3, H, W) in [0, 1], with a caption, and with squares to paint a hole in."""
    pixels = to_uint8(2 * unit[0].cpu() - 1).permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(png := io.BytesIO(), "PNG")
    image = f'<img src="data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}" alt="">'
    paint = f'<div class="paint">{"<i></i>" * squares}</div>' if squares else ""
    return f"<figure>{paint}{image}<figcaption>{caption}</figcaption></figure>"
