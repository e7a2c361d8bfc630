"""The commands that run a tokenizer: `vqgan reconstruct`, `vqgan encode` and `vqgan decode`."""

import argparse
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vqgan import figures, metrics
from vqgan.arguments import output_flags, output_path, path_text, small_int
from vqgan.checkpoint import fingerprint
from vqgan.compvis import read_config
from vqgan.data import eval_batch_size
from vqgan.device import choose_device
from vqgan.errors import InputError, user_input
from vqgan.files import load_arrays, write_atomically
from vqgan.image_folder import find_images, read_images
from vqgan.images import MAX_IMAGE_SIZE, from_uint8, to_uint8, to_unit
from vqgan.pretrained import (
    PRETRAINED,
    is_prior,
    load_model,
    load_pipeline,
    load_tokenizer,
    read_checkpoint,
)
from vqgan.vae import GaussianAutoencoder
from vqgan.vqvae import VQAutoencoder

RECONSTRUCTIONS, INDICES, DECODED = "reconstructions.png", "indices.npz", "decoded"  # --out
# The arrays of a file of `encode` that `decode` reads; the last three hold one value each.
ARRAYS = ("packed", "names", "grid_size", "num_embeddings", "checkpoint", "fingerprint")
COLUMNS, MAX_ROWS = 12, 16  # of reconstructions: more than 96 images are measured and not drawn
MAX_LINES = 100  # images whose size is compared with that of other formats


def image_flags(add, *, model: str, out: str) -> None:
    """The flags of the commands that read images."""
    add("checkpoint", type=path_text, metavar="CHECKPOINT", help=f"checkpoint of {model}")
    images = "images, in any format that Pillow opens, or folders of them"
    add("images", metavar="IMAGE", nargs="+", type=path_text, help=images)
    add("--image-size", type=small_int, help="side of images in pixels (default: the model's)")
    output_flags(add, "file to write", default=out)


def reconstruct_flags(add) -> None:
    """The flags of `vqgan reconstruct`."""
    image_flags(add, model="any model (of a transformer, its tokenizer)", out=RECONSTRUCTIONS)
    add("--config", type=path_text, metavar="FILE", help="config of a published VQGAN (YAML, JSON)")


def encode_flags(add) -> None:
    """The flags of `vqgan encode`."""
    image_flags(add, model="a VQ-VAE, a VQGAN or a transformer", out=INDICES)


def decode_flags(add) -> None:
    """The flags of `vqgan decode`."""
    add("indices", type=path_text, metavar="INDICES", help="file that `vqgan encode` wrote")
    model = "model that encoded INDICES, if it was moved"
    add("--checkpoint", type=path_text, metavar="CHECKPOINT", help=model)
    output_flags(add, "folder for PNG files", default=DECODED)


@torch.no_grad()
def reconstruct(args: argparse.Namespace) -> None:
    """Draw images above their reconstructions in one PNG, and print the PSNR of each."""
    paths = find_images(args.images)
    out, device = output_path(args.out, RECONSTRUCTIONS, paths), choose_device(args.device)
    config = None if args.config is None else read_config(args.config)
    if config is None and is_prior(read_checkpoint(args.checkpoint)):
        model: Any = load_pipeline(args.checkpoint).tokenizer.to(device)
    else:
        model = load_model(args.checkpoint, config=config).to(device)
    size = _size(model, args.image_size)
    rows: list[tuple[str, Tensor]] = []
    psnr: list[float] = []
    for chunk, pixels in _read_chunks(paths, size):
        x = from_uint8(pixels).to(device)
        originals, reconstructions = to_unit(x).cpu(), to_unit(model(x).reconstruction).cpu()
        values = metrics.psnr(originals, reconstructions).tolist()
        psnr += values
        for path, value in zip(chunk, values, strict=True):
            print(f"{path}: PSNR {value:.2f} dB")
        for part in zip(originals.split(COLUMNS), reconstructions.split(COLUMNS), strict=True):
            if len(rows) < MAX_ROWS:
                rows += zip(("original", "reconstruction"), part, strict=True)
    title = f"{type(model).__name__}, {size}x{size} pixels"
    if isinstance(model, VQAutoencoder):
        model.image_size, K = size, model.num_embeddings
        grids = " and ".join(f"{h}x{w}" for h, w in model.grids)
        bits = metrics.fixed_length_bits(model.seq_len, K)
        title += f": {grids} codes of {K}, {bits:.0f} bits per image"
    figures.image_rows(out, rows, title=title)
    print(f"{title}; {len(paths)} images, mean PSNR {np.mean(psnr):.2f} dB; written to {out}")


@torch.no_grad()
def encode(args: argparse.Namespace) -> None:
    """Compress images to indices into the codebook, a few dozen bytes per image.

    The file holds `indices`, int32 (N, h, w), and the same `packed` into just enough bits for each,
    uint8 (N, bytes). It names the model that decodes it. (A model with several grids has tokens
    instead, int32 (N, seq_len), and a `grid_size` for each grid.)
    """
    paths = find_images(args.images)
    out, device = output_path(args.out, INDICES, paths), choose_device(args.device)
    model = _tokenizer(args.checkpoint).to(device)
    size, parts = _size(model, args.image_size), []
    model.image_size = size
    bits = _bits(model.num_embeddings)
    for chunk, pixels in _read_chunks(paths, size):
        parts.append(model.tokens(from_uint8(pixels).to(device)).cpu().int())
        num_bytes = -(-parts[0][0].numel() * bits // 8)  # rounded up
        for path, original in zip(chunk, pixels, strict=True):
            if len(paths) > MAX_LINES:
                break
            print(
                f"{path}: {num_bytes} bytes as indices; the same {size}x{size} pixels are "
                f"{len(_image_file(original, 'JPEG'))} bytes as JPEG (quality 75), "
                f"{len(_image_file(original, 'PNG'))} as PNG"
            )
    tokens, grids = torch.cat(parts), np.array(model.grids)
    grid_size = grids[0] if len(grids) == 1 else grids
    indices = tokens.unflatten(1, model.grids[0]).numpy() if len(grids) == 1 else tokens.numpy()
    file = io.BytesIO()
    np.savez(
        file,
        indices=indices,
        packed=_pack(indices, model.num_embeddings),
        grid_size=grid_size,
        num_embeddings=np.array(model.num_embeddings),
        names=np.array([path.stem for path in paths]),
        checkpoint=np.array(args.checkpoint),
        fingerprint=np.array(fingerprint(model)),
    )
    write_atomically(out, file.getvalue())
    print(f"{len(indices)} images, {indices[0].size} indices of {bits} bits each: {out}")


@torch.no_grad()
def decode(args: argparse.Namespace) -> None:
    """Decode indices to images with the model that encoded them, one PNG per image."""
    out, device = output_path(args.out, DECODED), choose_device(args.device)
    try:
        packed, names, grid, *scalars = load_arrays(args.indices, ARRAYS).values()
        grids, (K, path, encoder) = np.atleast_2d(grid), (scalar.item() for scalar in scalars)
        if grids.ndim != 2 or grids.shape[1] != 2 or grids.min() < 1 or grid.dtype.kind != "i":
            raise ValueError(f"grids of {grids.tolist()}")
        seq_len = int(grids.prod(axis=1).sum())
        if packed.dtype != np.uint8 or packed.shape != (len(names), -(-seq_len * _bits(K) // 8)):
            raise ValueError(f"{packed.dtype} {packed.shape} for {len(names)} images")
        if names.ndim != 1 or names.dtype.kind != "U" or not isinstance(path, str):
            raise ValueError("names that are no texts")
    except FileNotFoundError:
        raise
    except Exception as error:  # numpy, zipfile and zlib raise many types
        reason = "damaged?" if "pickle" in str(error) else error  # for numpy all else is one
        raise InputError(f"{args.indices} is not a file of `encode` ({reason})") from error
    # A file from elsewhere may name any path, but only one of this folder is opened unasked.
    is_regular = Path(path).is_file() or Path(path).is_dir()  # and no pipe or device
    is_here = path in PRETRAINED or (is_regular and not Path(path).is_absolute())
    if args.checkpoint is None and (not is_here or ".." in Path(path).parts):
        raise InputError(f"{args.indices} was encoded with {path}: give --checkpoint {path}")
    model = _tokenizer(args.checkpoint or path)
    if (fingerprint(model), model.num_embeddings) != (encoder, K):
        wrong = args.checkpoint or path
        raise InputError(f"{wrong} did not encode {args.indices}: give --checkpoint {path}")
    model.to(device)
    side = int(grids.max()) * 2**model.num_downsamples
    if side > MAX_IMAGE_SIZE:
        raise InputError(f"{args.indices} has images of {side} pixels, not 1 to {MAX_IMAGE_SIZE}")
    model.image_size = side
    if model.grids != [tuple(shape) for shape in grids.tolist()]:
        raise InputError(f"{args.indices} is damaged: its model has other grids")
    chunk_size = eval_batch_size(side)
    for start in range(0, len(packed), chunk_size):
        part = torch.from_numpy(_unpack(packed[start : start + chunk_size], seq_len, K))
        if part.max() >= K:
            raise InputError(f"{args.indices} is damaged: it has an index {part.max()} of {K}")
        for i, pixels in enumerate(to_uint8(model.decode_tokens(part.to(device))).cpu(), start):
            # A name from elsewhere may hold anything, and a file system takes 255 bytes.
            name = re.sub(r"[^\w.-]", "_", Path(names[i]).name)[:60]
            file_name = f"{i + 1:0{len(str(len(packed)))}}-{name}.png"
            write_atomically(out / file_name, _image_file(pixels, "PNG"))
    print(f"{len(packed)} images, {packed.shape[1]} bytes each: written to {out}")


def _read_chunks(paths: list[Path], size: int) -> Iterator[tuple[list[Path], Tensor]]:
    """Chunks of paths, and their images uint8 (n, 3, size, size): a large folder fits in memory."""
    for start in range(0, len(paths), eval_batch_size(size)):
        chunk = paths[start : start + eval_batch_size(size)]
        yield chunk, read_images(chunk, size)


def _tokenizer(checkpoint: str) -> VQAutoencoder:
    """Load a VQ-VAE, a VQGAN, or the tokenizer of a transformer."""
    if is_prior(read_checkpoint(checkpoint)):
        return load_pipeline(checkpoint).tokenizer
    return load_tokenizer(checkpoint)[0]


def _size(model: GaussianAutoencoder | VQAutoencoder, size: int | None) -> int:
    """--image-size, or the model's own size; raises InputError if the model cannot take it."""
    size = size or model.image_size
    with user_input():
        model.check_resolution(size, size)
    return size


# --- indices in bytes ----------------------------------------------------------------------------


def _bits(num_embeddings: int) -> int:
    """The bits of an index from 0 to K - 1."""
    return max(1, (num_embeddings - 1).bit_length())


def _pack(indices: np.ndarray, num_embeddings: int) -> np.ndarray:
    """int32 (N, ...) -> uint8 (N, bytes), each index in just enough bits, the lowest first."""
    binary = (indices[..., None] >> np.arange(_bits(num_embeddings))) & 1  # (N, ..., bits)
    return np.packbits(binary.reshape(len(indices), -1).astype(np.uint8), axis=1)


def _unpack(packed: np.ndarray, seq_len: int, num_embeddings: int) -> np.ndarray:
    """The inverse of `_pack`: uint8 (N, bytes) -> int64 (N, seq_len)."""
    bits = _bits(num_embeddings)
    binary = np.unpackbits(packed, axis=1)[:, : seq_len * bits].reshape(-1, seq_len, bits)
    return (binary.astype(np.int64) << np.arange(bits)).sum(axis=2)


def _image_file(pixels: Tensor, format: str) -> bytes:
    """The content of an image file of uint8 (3, H, W)."""
    file = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file, format)
    return file.getvalue()
