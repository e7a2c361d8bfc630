"""`python -m vqgan`: use a trained model without writing code.

python -m vqgan reconstruct CHECKPOINT IMAGE... --out reconstructions.png
"""

import argparse
import json
from pathlib import Path

import torch

from vqgan import figures, metrics
from vqgan.data import from_uint8, read_image, to_unit
from vqgan.errors import InputError
from vqgan.loading import image_size_of, load_model
from vqgan.training import HelpFormatter, choose_device, positive_int, run_script
from vqgan.vae import VAE


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m vqgan", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add = commands.add_parser(
        "reconstruct",
        help="images through a model: originals over reconstructions, in one PNG",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    ).add_argument
    add("checkpoint", metavar="CHECKPOINT", help="checkpoint.pt of a run, or a file of the authors")
    add("images", metavar="IMAGE", nargs="+", help="files that Pillow opens")
    add("--config", metavar="FILE.json", help="their ddconfig, embed_dim, n_embed: theirs need it")
    add("--image-size", type=positive_int, help="side in pixels; not given: the model's own")
    add("--out", default="reconstructions.png", help="the picture to write")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    return parser.parse_args()


def main() -> None:
    args = parse()
    reconstruct(args)


@torch.no_grad()
def reconstruct(args: argparse.Namespace) -> None:
    out = Path(args.out)
    if out.suffix.lower() != ".png":
        raise InputError(f"--out {args.out}: a name that ends in .png was expected")
    if out.exists() and any(out.samefile(path) for path in args.images if Path(path).exists()):
        raise InputError(f"--out {args.out} is one of the images: it would be overwritten")
    device = choose_device(args.device)
    model = load_model(args.checkpoint, config=_read_config(args.config)).to(device)
    size = args.image_size or image_size_of(model)
    if isinstance(model, VAE) and size != model.image_size:
        raise InputError(
            f"--image-size {size}: this VAE takes images of {model.image_size} pixels only; "
            "leave the flag out"
        )
    images = []
    for path in args.images:
        try:
            images.append(torch.tensor(read_image(Path(path), size)))
        except Exception as error:  # Pillow raises many types on broken files
            raise InputError(
                f"{path} cannot be read as an image ({error}): name a PNG, JPEG or another file "
                "that Pillow opens"
            ) from error
    x = from_uint8(torch.stack(images)).to(device)  # (N, 3, size, size)
    originals = to_unit(x).cpu()
    reconstructions = torch.cat([to_unit(model(part).reconstruction).cpu() for part in x.split(16)])
    for path, value in zip(args.images, metrics.psnr(originals, reconstructions), strict=True):
        print(f"{path}: PSNR {value:.2f} dB")
    title = f"{type(model).__name__}, {size}x{size} pixels"
    if not isinstance(model, VAE):
        h, w = model.encode(x[:1]).indices.shape[1:]
        K = model.quantizer.num_embeddings
        title += f": {h}x{w} codes of {K}, {metrics.code_bits(h, w, K):.0f} bits an image"
    figures.image_rows(
        out, [("original", originals), ("reconstruction", reconstructions)], title=title
    )
    print(f"{title}; written to {out}")


def _read_config(path: str | None) -> dict | None:
    if path is None:
        return None
    try:
        config = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise InputError(
            f"--config {path} cannot be read as JSON ({error}): give a file with the ddconfig of "
            "the checkpoint's YAML, with embed_dim and n_embed"
        ) from error
    if not isinstance(config, dict):
        raise InputError(f"--config {path} must hold an object {{...}}, not {config!r:.40}")
    return config


if __name__ == "__main__":
    run_script(main, resumable=False)
