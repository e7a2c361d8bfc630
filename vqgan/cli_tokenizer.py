"""The commands that run a tokenizer: `vqgan reconstruct`, `vqgan encode` and `vqgan decode`."""

import argparse
import importlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vqgan import figures, metrics
from vqgan.arguments import png_path, positive_int
from vqgan.checkpoint import fingerprint, write_atomically
from vqgan.data import eval_batch_size
from vqgan.device import choose_device
from vqgan.errors import InputError, user_input
from vqgan.image_folder import read_images
from vqgan.images import from_uint8, to_uint8, to_unit
from vqgan.pretrained import load_model, load_pipeline, load_tokenizer, read_checkpoint
from vqgan.vae import GaussianAutoencoder
from vqgan.vqvae import VQAutoencoder


def image_flags(add, *, model: str, out: str) -> None:
    """The flags of the commands that read images."""
    add("checkpoint", metavar="CHECKPOINT", help=f"checkpoint of {model}")
    add("images", metavar="IMAGE", nargs="+", help="image files, in any format that Pillow opens")
    add("--image-size", type=positive_int, help="side of images in pixels (default: the model's)")
    add("--out", default=out, help="file to write")
    add("--device", default="auto", help="device to compute on: auto, cpu, cuda, cuda:1 or mps")


def reconstruct_flags(add) -> None:
    """The flags of `vqgan reconstruct`."""
    image_flags(add, model="any model (of a transformer, its tokenizer)", out="reconstructions.png")
    add("--config", metavar="FILE", help="config of a published VQGAN, as YAML or JSON")


def encode_flags(add) -> None:
    """The flags of `vqgan encode`."""
    image_flags(add, model="a VQ-VAE, a VQGAN or a transformer", out="indices.npz")


def decode_flags(add) -> None:
    """The flags of `vqgan decode`."""
    add("indices", metavar="INDICES", help="file that `vqgan encode` wrote")
    add("--checkpoint", metavar="CHECKPOINT", help="model that encoded INDICES, if it was moved")
    add("--out", default="decoded", help="folder to write PNG files to")
    add("--device", default="auto", help="device to compute on: auto, cpu, cuda, cuda:1 or mps")


@torch.no_grad()
def reconstruct(args: argparse.Namespace) -> None:
    """Draw images above their reconstructions in one PNG, and print the PSNR of each."""
    out, device = png_path(args.out, args.images), choose_device(args.device)
    config = _read_config(args.config)
    if config is None and read_checkpoint(args.checkpoint)["model"] == "GPT":
        model: Any = load_pipeline(args.checkpoint).tokenizer.to(device)
    else:
        model = load_model(args.checkpoint, config=config).to(device)
    size = _size(model, args.image_size)
    x = from_uint8(read_images(args.images, size)).to(device)  # (N, 3, size, size)
    parts = x.split(eval_batch_size(size))
    originals = to_unit(x).cpu()
    reconstructions = torch.cat([to_unit(model(part).reconstruction).cpu() for part in parts])
    for path, value in zip(args.images, metrics.psnr(originals, reconstructions), strict=True):
        print(f"{path}: PSNR {value:.2f} dB")
    title = f"{type(model).__name__}, {size}x{size} pixels"
    if isinstance(model, VQAutoencoder):
        h, w = model.encode(x[:1]).indices.shape[1:]
        K = model.num_embeddings
        title += f": {h}x{w} codes of {K}, {metrics.fixed_length_bits(h * w, K):.0f} bits per image"
    rows = [("original", originals), ("reconstruction", reconstructions)]
    figures.image_rows(out, rows, title=title)
    print(f"{title}; written to {out}")


@torch.no_grad()
def encode(args: argparse.Namespace) -> None:
    """Compress images to indices into the codebook, a few dozen bytes per image.

    Each index takes just enough bits, packed into bytes; the file names the model that decodes it.
    """
    out, device = Path(args.out), choose_device(args.device)
    if out.suffix != ".npz":
        raise InputError(f"--out {args.out}: a name that ends in .npz was expected")
    model = _tokenizer(args.checkpoint).to(device)
    size = _size(model, args.image_size)
    pixels = read_images(args.images, size)  # uint8 (N, 3, size, size)
    parts = pixels.split(eval_batch_size(size))
    indices = torch.cat([model.encode(from_uint8(part).to(device)).indices for part in parts])
    packed = _pack(indices.cpu().numpy(), model.num_embeddings)  # (N, bytes)
    file = io.BytesIO()
    np.savez(
        file,
        indices=packed,
        grid_size=np.array(indices.shape[1:]),
        num_embeddings=np.array(model.num_embeddings),
        names=np.array([Path(image).stem for image in args.images]),
        checkpoint=np.array(args.checkpoint),
        fingerprint=np.array(fingerprint(model)),
    )
    write_atomically(out, file.getvalue())
    for image, original, row in zip(args.images, pixels, packed, strict=True):
        print(
            f"{image}: {len(row)} bytes as indices; the same {size}x{size} pixels are "
            f"{len(_image_file(original, 'JPEG'))} bytes as JPEG (quality 75), "
            f"{len(_image_file(original, 'PNG'))} as PNG"
        )
    bits = _bits(model.num_embeddings)
    print(f"{len(packed)} images, {indices[0].numel()} indices of {bits} bits each: {out}")


@torch.no_grad()
def decode(args: argparse.Namespace) -> None:
    """Decode indices to images with the model that encoded them, one PNG per image."""
    device = choose_device(args.device)
    try:
        with np.load(args.indices, allow_pickle=False) as file:
            content = {name: file[name] for name in file.files}
        numbers = ("num_embeddings", "checkpoint", "fingerprint")
        K, path, encoder = (content[name].item() for name in numbers)
        names, packed = content["names"], content["indices"]
        indices = torch.from_numpy(_unpack(packed, content["grid_size"].tolist(), K))
        if len(names) != len(indices) or indices.max() >= K:
            raise ValueError(f"index {indices.max()} of {K}")
    except Exception as error:  # numpy, zipfile and zlib raise many types
        reason = "damaged?" if "pickle" in str(error) else error  # for numpy all else is one
        raise InputError(f"{args.indices} is not a file of `encode` ({reason})") from error
    model = _tokenizer(args.checkpoint or path)
    if (fingerprint(model), model.num_embeddings) != (encoder, K):
        wrong = args.checkpoint or path
        raise InputError(f"{wrong} did not encode {args.indices}: give --checkpoint {path}")
    model, parts = model.to(device), indices.to(device).split(64)
    images = torch.cat([to_uint8(model.decode_indices(part)) for part in parts]).cpu()
    width = len(str(len(images)))
    for i, (name, pixels) in enumerate(zip(names, images, strict=True), start=1):
        file_name = f"{i:0{width}}-{Path(name).name}.png"  # a name from elsewhere may have folders
        write_atomically(Path(args.out) / file_name, _image_file(pixels, "PNG"))
    print(f"{len(images)} images, {packed.shape[1]} bytes each: written to {args.out}")


def _tokenizer(checkpoint: str) -> VQAutoencoder:
    """Load a VQ-VAE, a VQGAN, or the tokenizer of a transformer."""
    if read_checkpoint(checkpoint)["model"] == "GPT":
        return load_pipeline(checkpoint).tokenizer
    return load_tokenizer(checkpoint)[0]


def _size(model: GaussianAutoencoder | VQAutoencoder, size: int | None) -> int:
    """--image-size, or the model's own size; raises InputError if the model cannot take it."""
    size = size or model.image_size
    with user_input():
        model.check_resolution(size, size)
    return size


def _read_config(path: str | None) -> dict | None:
    """The content of --config, JSON or YAML; None if the flag was not given."""
    if path is None:
        return None
    try:
        is_yaml = Path(path).suffix in (".yaml", ".yml")
        parse = importlib.import_module("yaml").safe_load if is_yaml else json.loads
        config = parse(Path(path).read_text())
    except ModuleNotFoundError as error:
        raise InputError(f"--config {path} is YAML: add the extra 'yaml', or give JSON") from error
    except Exception as error:  # a YAMLError is not a ValueError
        reason = " ".join(str(error).split())
        raise InputError(f"--config {path} cannot be read as JSON or YAML ({reason})") from error
    if not isinstance(config, dict):
        raise InputError(f"--config {path} must hold an object {{...}}, not {config!r:.40}")
    return config


# --- indices in bytes ----------------------------------------------------------------------------


def _bits(num_embeddings: int) -> int:
    """The bits of an index from 0 to K - 1."""
    return max(1, (num_embeddings - 1).bit_length())


def _pack(indices: np.ndarray, num_embeddings: int) -> np.ndarray:
    """int64 (N, h, w) -> uint8 (N, bytes), each index in just enough bits, the lowest first."""
    binary = (indices[..., None] >> np.arange(_bits(num_embeddings))) & 1  # (N, h, w, bits)
    return np.packbits(binary.reshape(len(indices), -1).astype(np.uint8), axis=1)


def _unpack(packed: np.ndarray, grid: list[int], num_embeddings: int) -> np.ndarray:
    """The inverse of `_pack`: uint8 (N, bytes) -> int64 (N, h, w), where `grid` is h, w."""
    (h, w), bits = grid, _bits(num_embeddings)
    binary = np.unpackbits(packed, axis=1)[:, : h * w * bits].reshape(len(packed), h, w, bits)
    return (binary.astype(np.int64) << np.arange(bits)).sum(axis=3)


def _image_file(pixels: Tensor, format: str) -> bytes:
    """The content of an image file of uint8 (3, H, W)."""
    file = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file, format)
    return file.getvalue()
