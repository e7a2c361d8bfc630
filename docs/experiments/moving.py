"""Shapes that glide and bounce, and a transformer that goes on with the film, frame by frame.

    python docs/experiments/moving.py

Yan, Zhang, Abbeel, Srinivas, "VideoGPT", 2021, arXiv 2104.10157, with a short memory: the next
frame's tokens follow a condition, the tokens of the two frames before. A second transformer gets
only one frame, which does not show the direction. Needs no run and no data: the frames are drawn,
and all three networks are trained here. Writes, in docs/results/moving/, in minutes of one core:

    moving.png      two films, and how both transformers go on with them
    moving.gif      the same for six films, in motion
    metrics.json    the error of the shape's position by frame, over films that were not trained on
"""

import argparse
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from _common import no_flags, results_of, write_metrics
from PIL import Image
from torch import Tensor

from vqgan import GPT, VQVAE, figures
from vqgan.console import progress_bar
from vqgan.data import pixel_variance
from vqgan.images import from_uint8, to_unit
from vqgan.script import run_script
from vqgan.shapes import COLORS, SHAPES
from vqgan.training import Stopwatch

OUT = results_of(__file__)
SIZE, RADIUS, SPEED = 16, 3.0, 2.0  # pixels, and pixels per frame
KINDS = {"circle": "yellow", "square": "blue"}
BACKGROUND = COLORS["black"]
SUPERSAMPLING = 4  # points per pixel and axis, so that a tenth of a pixel is seen
TRAINING, TEST = 36_000, 100  # films; those for training have three frames
GIVEN, LENGTH = 2, 16  # frames of a test film that are given, and that are generated
K, BATCH, MAX_LR = 128, 64, 3e-3
TOKENIZER_EPOCHS, GPT_EPOCHS = 1, 3
MEMORIES = {"two frames": 2, "one frame": 1}
SHOWN, ANIMATED = 2, 6  # films in the figure, and in the GIF


def main(args: argparse.Namespace) -> None:
    watch, rng = Stopwatch(), np.random.default_rng(0)
    torch.manual_seed(0)
    films = torch.cat([draw_films(TRAINING // 4, 3, rng) for _ in range(4)])  # (n, 3, 3, S, S)
    tokenizer = train_tokenizer(films[:, -1])
    tokens = tokenize(tokenizer, films)  # (n, 3, N)
    test = draw_films(TEST, GIVEN + LENGTH, rng)
    test_tokens = tokenize(tokenizer, test)
    rows = {"true": to_unit(from_uint8(test))}  # (n, T, 3, S, S)
    path = centers(rows["true"])  # (n, T, 2)
    results = {"tokenizer": {"error": errors(centers(decode(tokenizer, test_tokens)), path)}}
    results["standing still"] = {"error": errors(path[:, GIVEN - 1 : GIVEN], path)}
    windows = test_tokens.unfold(1, 3, 1).transpose(2, 3).flatten(0, 1)  # (n (T - 2), 3, N)
    for name, memory in MEMORIES.items():
        gpt = train_gpt(tokens, memory)
        rows[name] = decode(tokenizer, roll_out(gpt, test_tokens[:, :GIVEN], memory))
        found = centers(rows[name])
        step, true_step = (p[:, GIVEN] - path[:, GIVEN - 1] for p in (found, path))
        results[name] = {
            "error": errors(found, path),
            # How many first steps are less than a right angle from the true ones.
            "forward": (step * true_step).sum(dim=1).gt(0).double().mean().item(),
            "nats_per_token": gpt.loss(*split_last(windows, memory)).item(),
        }
    draw(rows)
    data = {"source": "films", "training_films": TRAINING, "test_films": TEST}
    write_metrics(OUT, watch, data, {"generated_frames": LENGTH, "models": results})
    print(f"moving.png, moving.gif and metrics.json are in {OUT}")


# --- films ---------------------------------------------------------------------------------------


def glide(num_films: int, length: int, rng: np.random.Generator) -> np.ndarray:
    """Centers (n, T, 2) in pixels, of a point that goes straight on and bounces off four walls."""
    direction = rng.normal(size=(num_films, 1, 2))
    velocity = SPEED * direction / np.linalg.norm(direction, axis=-1, keepdims=True)
    span = SIZE - 2 * RADIUS
    path = rng.uniform(0, span, size=(num_films, 1, 2)) + velocity * np.arange(length)[:, None]
    return RADIUS + span - np.abs(path % (2 * span) - span)  # folded at both walls


def draw_films(num_films: int, length: int, rng: np.random.Generator) -> Tensor:
    """Films uint8 (n, T, 3, S, S), each of one shape."""
    kind = rng.integers(len(KINDS), size=num_films)
    axis = (np.arange(SIZE * SUPERSAMPLING) + 0.5) / SUPERSAMPLING
    place = glide(num_films, length, rng)[..., None, None]  # (n, T, 2, 1, 1)
    x, y = (axis - place[:, :, 0]) / RADIUS, (axis[:, None] - place[:, :, 1]) / RADIUS
    films = np.empty((num_films, length, 3, SIZE, SIZE), dtype=np.uint8)
    blocks = (SIZE, SUPERSAMPLING, SIZE, SUPERSAMPLING)
    for number, (shape, color) in enumerate(KINDS.items()):
        inside = SHAPES[shape](x[kind == number], y[kind == number])
        coverage = inside.reshape(*inside.shape[:2], 1, *blocks).mean(axis=(4, 6))
        paint, ground = (np.array(c)[:, None, None] for c in (COLORS[color], BACKGROUND))
        films[kind == number] = ground + coverage * (paint - ground) + 0.5
    return torch.from_numpy(films)


def centers(films: Tensor) -> Tensor:
    """Where the shape is: films (n, T, 3, S, S) in [0, 1] -> (n, T, 2), x and y in pixels.

    The mean position of what differs from the background; the middle if nothing does.
    """
    ground = torch.tensor(BACKGROUND).view(3, 1, 1) / 255
    weight = ((films - ground).abs().amax(dim=2) - 0.15).clamp(min=0) + 1e-6  # (n, T, S, S)
    weight = weight / weight.sum(dim=(2, 3), keepdim=True)
    axis = torch.arange(SIZE) + 0.5
    return torch.stack([weight.sum(dim=2) @ axis, weight.sum(dim=3) @ axis], dim=2)


def errors(found: Tensor, true: Tensor) -> list[float]:
    """The mean distance in pixels for each frame after the given ones, from (n, T, 2) each."""
    return (found - true)[:, GIVEN:].norm(dim=-1).mean(dim=0).tolist()


# --- networks ------------------------------------------------------------------------------------


def fit(model: VQVAE | GPT, loss: Callable[[Tensor], Tensor], data: Tensor, epochs: int):
    """Train on random batches of the data's rows, and return the model, frozen."""
    steps = epochs * (len(data) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=MAX_LR)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=MAX_LR, total_steps=steps)
    for _ in progress_bar(range(steps), desc=type(model).__name__, unit="step"):
        batch_loss = loss(data[torch.randint(len(data), (BATCH,))])
        optimizer.zero_grad(set_to_none=True)
        batch_loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval().requires_grad_(False)


def train_tokenizer(frames: Tensor) -> VQVAE:
    """On frames uint8 (n, 3, S, S)."""
    model = VQVAE(SIZE, num_hiddens=64, embedding_dim=32, num_embeddings=K)
    variance = pixel_variance(frames)

    def loss(x: Tensor) -> Tensor:
        output = model(x)
        return F.mse_loss(output.reconstruction, x) / variance + output.loss

    return fit(model, loss, from_uint8(frames), TOKENIZER_EPOCHS)


def tokenize(tokenizer: VQVAE, films: Tensor) -> Tensor:
    """uint8 (n, T, 3, S, S) -> tokens (n, T, N)."""
    parts = [tokenizer.tokens(from_uint8(x)) for x in films.flatten(0, 1).split(1000)]
    return torch.cat(parts).unflatten(0, films.shape[:2])


def decode(tokenizer: VQVAE, tokens: Tensor) -> Tensor:
    """tokens (n, T, N) -> films (n, T, 3, S, S) in [0, 1]."""
    return to_unit(tokenizer.decode_tokens(tokens.flatten(0, 1))).unflatten(0, tokens.shape[:2])


def train_gpt(tokens: Tensor, memory: int) -> GPT:
    """Learn p(a frame | the `memory` frames before) from tokens (n, 3, N)."""
    N = tokens.shape[-1]
    gpt = GPT(K, N, K, memory * N, n_layer=2, n_head=4, n_embd=64, dropout=0.0)
    return fit(gpt, lambda films: gpt.loss(*split_last(films, memory)), tokens, GPT_EPOCHS)


def split_last(films: Tensor, memory: int) -> tuple[Tensor, Tensor]:
    """Films (n, T, N) -> the condition of the last frame (n, memory N), and this frame (n, N)."""
    return films[:, -1 - memory : -1].flatten(1), films[:, -1]


def roll_out(gpt: GPT, given: Tensor, memory: int) -> Tensor:
    """Go on from the given frames (n, GIVEN, N): tokens of whole films (n, T, N)."""
    generator = torch.Generator().manual_seed(0)
    film = list(given.unbind(dim=1))
    for _ in range(LENGTH):  # every frame is a condition of the next
        film.append(gpt.sample(torch.cat(film[-memory:], dim=1), generator=generator))
    return torch.stack(film, dim=1)


# --- pictures ------------------------------------------------------------------------------------


def draw(rows: dict[str, Tensor]) -> None:
    """Films (n, T, 3, S, S) in [0, 1] by name: the first as rows of frames, and more as a GIF."""
    title = "Two frames are given. The others are generated from the last two, or from the last"
    named = [(name, films[i]) for i in range(SHOWN) for name, films in rows.items()]
    figures.image_rows(OUT / "moving.png", named, title=title)
    frames, file = [], OUT / "frame.png"
    for t in range(GIVEN + LENGTH):
        title = f"frame {t + 1}: {'given' if t < GIVEN else 'generated'}"
        named = [(name, films[:ANIMATED, t]) for name, films in rows.items()]
        figures.image_rows(file, named, title=title)
        frames.append(Image.open(file).convert("P", palette=Image.Palette.ADAPTIVE, colors=64))
    file.unlink()
    options = {"append_images": frames[1:], "duration": 200, "loop": 0}  # of 200 ms, for ever
    frames[0].save(OUT / "moving.gif", save_all=True, **options)


if __name__ == "__main__":
    run_script(no_flags("Go on with films of a moving shape.").parse_args, main, resumable=False)
