"""`python -m vqgan` (or `vqgan`): use trained models without writing code.

    python -m vqgan sample CHECKPOINT --class cat       new pictures, of a transformer
    python -m vqgan complete CHECKPOINT IMAGE           a picture's other half
    python -m vqgan reconstruct CHECKPOINT IMAGE...     pictures through a model
    python -m vqgan encode CHECKPOINT IMAGE...          pictures as codes, a few dozen bytes each
    python -m vqgan decode CODES                        and back
    python -m vqgan info CHECKPOINT                     what a checkpoint is
    python -m vqgan export CHECKPOINT                   what of a transformer's run is worth sharing

CHECKPOINT is the checkpoint.pt of a run, or the name of a model that comes with the package.
"""

import argparse
import io
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from vqgan import figures, metrics
from vqgan.conditions import PICTURES
from vqgan.data import evaluation_batch, from_uint8, read_image, to_uint8, to_unit
from vqgan.errors import InputError
from vqgan.loading import (
    SHIPPED,
    Pair,
    checkpoint_path,
    fingerprint,
    image_size_of,
    load_model,
    load_pair,
    load_tokenizer,
    read_checkpoint,
)
from vqgan.training import (
    HelpFormatter,
    choose_device,
    non_negative_float,
    positive_float,
    positive_int,
    run_script,
    save_model,
    seed_int,
    write_atomically,
)
from vqgan.transformer import check_sampling, describe_sampling
from vqgan.vae import VAE

COLUMNS = 8  # pictures in a row


def parse() -> argparse.Namespace:
    """The command and its flags; `command` is the name of the function that does it."""
    parser = argparse.ArgumentParser(
        prog="vqgan",
        description="Use trained models. CHECKPOINT: the checkpoint.pt of a run, or one that comes "
        f"with the package: {', '.join(SHIPPED)}.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, help: str):
        subparser = commands.add_parser(
            name, help=help, description=help, formatter_class=HelpFormatter, allow_abbrev=False
        )
        return subparser.add_argument

    def sampling_flags(add, *, count: int) -> None:
        add("--class", dest="classes", nargs="+", metavar="NAME", help="for a model of classes")
        add("--caption", nargs="+", metavar="TEXT", help='as in "small red star on blue"')
        add("--count", type=positive_int, default=count, help="pictures of each")
        add("--temperature", type=non_negative_float, default=1.0, help="0: greedy, no chance")
        add("--top-k", type=int, help="draw from the likeliest codes only")
        add("--top-p", type=positive_float, help="from the likeliest of this mass only, up to 1")
        add("--guidance", type=non_negative_float, default=1.0, help="above 1: exaggerate the ask")
        add("--seed", type=seed_int, default=0, help="another gives other pictures")
        add("--tokenizer", metavar="CHECKPOINT", help="not given: tokenizer.pt beside CHECKPOINT")

    device = {"default": "auto", "help": "auto, cpu, cuda, cuda:1, mps"}

    add = command("sample", "new pictures of a trained transformer, in one PNG")
    add("checkpoint", metavar="CHECKPOINT", help="of train_transformer.py")
    sampling_flags(add, count=16)
    add("--image", metavar="IMAGE", help="for a model of pictures: what it is to work from")
    add("--as-is", action="store_true", help="IMAGE is a sketch (grey, small) already")
    add("--height", type=positive_int, help="in pixels; for textures: see the README")
    add("--width", type=positive_int, help="in pixels")
    add("--out", default="samples.png", help="the picture to write")
    add("--device", **device)

    add = command("complete", "the rest of a picture, written by a transformer, in one PNG")
    add("checkpoint", metavar="CHECKPOINT", help="of train_transformer.py")
    add("image", metavar="IMAGE", help="a file that Pillow opens")
    add(
        "--keep",
        default="top",
        help="top or left: that half; or x0,y0,x1,y1: a box, in pixels of the model's pictures",
    )
    sampling_flags(add, count=8)
    add("--out", default="completed.png", help="the picture to write")
    add("--device", **device)

    config = {"metavar": "FILE.json", "help": "for a checkpoint of the paper's authors: its "}
    config["help"] += "ddconfig, embed_dim, n_embed"
    size = {"type": positive_int, "help": "side in pixels; not given: the model's own"}

    add = command("reconstruct", "images through a model: originals over reconstructions, one PNG")
    add("checkpoint", metavar="CHECKPOINT", help="of any model; of a transformer: its tokenizer")
    add("images", metavar="IMAGE", nargs="+", help="files that Pillow opens")
    add("--config", **config)
    add("--image-size", **size)
    add("--out", default="reconstructions.png", help="the picture to write")
    add("--device", **device)

    add = command("encode", "images as codes: a few dozen bytes each")
    add("checkpoint", metavar="CHECKPOINT", help="of a VQ-VAE, a VQGAN or a transformer")
    add("images", metavar="IMAGE", nargs="+", help="files that Pillow opens")
    add("--image-size", **size)
    add("--out", default="codes.npz", help="the file to write")
    add("--device", **device)

    add = command("decode", "codes as images again: a PNG for each")
    add("codes", metavar="CODES", help="a file of `encode`")
    add("--checkpoint", metavar="CHECKPOINT", help="not given: the one that encoded")
    add("--out", default="decoded", help="the folder to write to")
    add("--device", **device)

    add = command("info", "what a checkpoint is, trained on what, for how long, with what result")
    add("checkpoint", metavar="CHECKPOINT", help="of any model")

    add = command(
        "export", "a transformer and its tokenizer, to share: half precision, no optimizer"
    )
    add("checkpoint", metavar="CHECKPOINT", help="of train_transformer.py")
    add("--out", default="exported", help="the folder to write to")
    return parser.parse_args()


def main() -> None:
    """Call the function of the command."""
    args = parse()
    commands = (sample, complete, reconstruct, encode, decode, info, export)
    {function.__name__: function for function in commands}[args.command](args)


# --- with a transformer --------------------------------------------------------------------------


def sample(args: argparse.Namespace) -> None:
    """New pictures, --count of each class or caption that is asked for, one after the other."""
    out = _png(args.out, [args.image] if args.image else [])
    pair, device = _load_pair(args)
    setting = _sampling_setting(args, pair)
    if args.as_is and args.image is None:
        raise InputError("--as-is says something of --image, and none was given: leave it out")
    h, w = pair.transformer.grid_size
    pixels = pair.image_size // h  # of the side that a code stands for
    height, width = (side or pair.image_size for side in (args.height, args.width))
    if height % pixels or width % pixels:
        raise InputError(f"{height}x{width} pixels were asked for: give multiples of {pixels}")
    is_large = (height // pixels, width // pixels) != (h, w)
    if is_large and pair.condition.kind == "image":
        raise InputError("a model of pictures writes their size only: leave --height, --width out")

    asked = _ask(args, pair)
    rows = []
    if args.image is not None:
        x = _read_images([args.image], pair.image_size).to(device)
        picture = x if args.as_is else PICTURES[pair.condition.picture](x)
        rows = [("original", to_unit(x).cpu())] if not args.as_is else []
        rows.append((pair.condition.picture, to_unit(picture).cpu()))
        asked = {"samples": pair.tokenizer.encode(picture).indices.flatten(1)}
    generator = torch.Generator().manual_seed(args.seed)
    total = len(asked) * args.count * (height // pixels) * (width // pixels)
    with tqdm(desc="writing", total=total, unit="code", unit_scale=True) as progress:
        for label, tokens in asked.items():
            pictures = []
            for part in tokens.to(device).expand(args.count, -1).split(_at_once(height)):
                more = {"generator": generator, "progress": progress.update}
                if is_large:
                    codes = pair.transformer.sample_large(
                        part, height // pixels, width // pixels, **setting, **more
                    )
                else:
                    codes = pair.transformer.sample(part, **setting, **more)
                pictures.append(to_unit(pair.tokenizer.decode_indices(codes)).cpu())
            for i, chunk in enumerate(torch.cat(pictures).split(COLUMNS)):
                rows.append((label if i == 0 else "", chunk))
    figures.image_rows(out, rows, title=describe_sampling(setting))
    print(f"{args.count} pictures of {', '.join(asked)}: written to {out}")


def complete(args: argparse.Namespace) -> None:
    """A picture becomes codes; those that --keep names stay, and the others are written anew."""
    out = _png(args.out, [args.image])
    pair, device = _load_pair(args)
    setting = _sampling_setting(args, pair)
    x = _read_images([args.image], pair.image_size).to(device)  # (1, 3, H, W)
    indices = pair.tokenizer.encode(x).indices  # (1, h, w)
    keep = _kept(args.keep, pair)  # (h, w)
    if args.classes is not None or args.caption is not None:
        (tokens, *others) = _ask(args, pair).values()
        if others:
            raise InputError("a completion is of one class or caption: give one")
    elif pair.condition.kind == "image":
        tokens = pair.tokenizer.encode(PICTURES[pair.condition.picture](x)).indices.flatten(1)
    elif pair.condition.kind == "none":
        tokens = pair.condition.of_nothing(1)
    elif not pair.knows_nothing:
        raise InputError(f"this model needs to be told a condition: give --{pair.condition.kind}")
    elif args.guidance != 1:
        raise InputError("--guidance exaggerates a condition, and none was given: leave it out")
    else:  # the condition is not told
        tokens = torch.full((1, pair.condition.length), pair.transformer.nothing)
    known = torch.where(keep.to(device), indices, -1).expand(args.count, -1, -1)
    with tqdm(desc="writing", total=known.numel(), unit="code", unit_scale=True) as progress:
        codes = pair.transformer.sample(
            tokens.to(device).expand(args.count, -1),
            known=known,
            generator=torch.Generator().manual_seed(args.seed),
            progress=progress.update,
            **setting,
        )
    parts = codes.split(_at_once(pair.image_size))
    completed = torch.cat([to_unit(pair.tokenizer.decode_indices(part)).cpu() for part in parts])
    pixels = pair.image_size // pair.transformer.grid_size[0]
    mask = keep.repeat_interleave(pixels, 0).repeat_interleave(pixels, 1)
    given = torch.where(mask, to_unit(x).cpu(), 0.5)
    rows = [("original, and what is kept", torch.cat([to_unit(x).cpu(), given]))]
    rows += [("completions" if i == 0 else "", c) for i, c in enumerate(completed.split(COLUMNS))]
    figures.image_rows(out, rows, title=describe_sampling(setting))
    print(f"{int(keep.sum())} of {keep.numel()} codes kept; {args.count} completions: {out}")


def _load_pair(args: argparse.Namespace) -> tuple[Pair, torch.device]:
    """Transformer and tokenizer, on the device, and the device."""
    device = choose_device(args.device)
    pair = load_pair(args.checkpoint, tokenizer=args.tokenizer)
    return pair._replace(
        transformer=pair.transformer.to(device), tokenizer=pair.tokenizer.to(device)
    ), device


def _sampling_setting(args: argparse.Namespace, pair: Pair) -> dict:
    """Keyword arguments of `GPT.sample`."""
    setting = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}
    setting["guidance"] = args.guidance
    check_sampling(pair.transformer.num_embeddings, **setting)
    if args.guidance != 1 and pair.condition.kind == "none":
        raise InputError(
            "--guidance exaggerates what is asked for, and this model is asked nothing"
        )
    if args.guidance != 1 and not pair.knows_nothing:
        raise InputError(
            "--guidance needs a model that was trained with some of its conditions dropped, and "
            "this one was not (--condition-drop 0): leave it out"
        )
    return setting


def _ask(args: argparse.Namespace, pair: Pair) -> dict[str, Tensor]:
    """What is asked for: a label, and tokens (1, C); refused where the model takes another kind."""
    condition = pair.condition
    given = {"class": args.classes, "caption": args.caption}
    if args.command == "sample":  # a completion's image is not its condition
        given["image"] = args.image
    for kind, value in given.items():
        if value is not None and kind != condition.kind:
            remedy = f"give --{condition.kind}" if condition.kind in given else "leave it out"
            raise InputError(
                f"--{kind} was given, but this model's condition is {condition.kind}: {remedy}"
            )
    if condition.kind == "class":
        names = list(dict.fromkeys(args.classes or condition.names))  # not given: all of them
        return dict(zip(names, condition.of_classes(names).split(1), strict=True))
    if condition.kind == "caption":
        if not args.caption:
            words = ", ".join(word for word in condition.names if word)
            raise InputError(f"this model needs a --caption; the words that it knows: {words}")
        return dict(zip(args.caption, condition.of_captions(args.caption).split(1), strict=True))
    if condition.kind == "image" and args.image is None:
        raise InputError(
            f"this model writes pictures from {condition.picture}: name one with --image"
        )
    return {"samples": condition.of_nothing(1)}


def _kept(keep: str, pair: Pair) -> Tensor:
    """Which codes to keep, (h, w) bool: those whose pixels lie all inside of the box."""
    size, (h, w) = pair.image_size, pair.transformer.grid_size
    boxes = {"top": (0, 0, size, size // 2), "left": (0, 0, size // 2, size)}
    try:
        x0, y0, x1, y1 = boxes.get(keep) or (int(number) for number in keep.split(","))
    except ValueError as error:
        raise InputError(
            f"--keep {keep}: give top, left, or a box x0,y0,x1,y1 in pixels, as in 0,0,16,16"
        ) from error
    pixels = size // h
    top, left = torch.arange(h)[:, None] * pixels, torch.arange(w) * pixels
    kept = (left >= x0) & (left + pixels <= x1) & (top >= y0) & (top + pixels <= y1)
    if not kept.any() or kept.all():
        raise InputError(
            f"--keep {keep} keeps {int(kept.sum())} of {kept.numel()} codes: give a box that holds "
            f"some of the picture's {size}x{size} pixels and not all (a code stands for "
            f"{pixels}x{pixels})"
        )
    return kept


# --- with a tokenizer ----------------------------------------------------------------------------


@torch.no_grad()
def reconstruct(args: argparse.Namespace) -> None:
    """Images through a model (of a transformer: its tokenizer), and the PSNR of each."""
    out = _png(args.out, args.images)
    device = choose_device(args.device)
    config = _read_config(args.config)
    if config is not None or read_checkpoint(args.checkpoint)["model"] == "VAE":
        model = load_model(args.checkpoint, config=config)
        own_size = image_size_of(model)
    else:
        model, own_size = _tokenizer(args.checkpoint)
    size = args.image_size or own_size
    model = model.to(device)
    if isinstance(model, VAE) and size != model.image_size:
        raise InputError(
            f"--image-size {size}: this VAE takes images of {model.image_size} pixels only; "
            "leave the flag out"
        )
    x = _read_images(args.images, size).to(device)  # (N, 3, size, size)
    originals = to_unit(x).cpu()
    reconstructions = torch.cat(
        [to_unit(model(part).reconstruction).cpu() for part in x.split(_at_once(size))]
    )
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


@torch.no_grad()
def encode(args: argparse.Namespace) -> None:
    """Codes as numbers of just enough bits each, packed into bytes, and what decodes them."""
    out = Path(args.out)
    if out.suffix != ".npz":
        raise InputError(f"--out {args.out}: a name that ends in .npz was expected")
    device = choose_device(args.device)
    model, own_size = _tokenizer(args.checkpoint)
    size = args.image_size or own_size
    x = _read_images(args.images, size)
    indices = torch.cat(
        [model.to(device).encode(part.to(device)).indices for part in x.split(_at_once(size))]
    )
    K = model.quantizer.num_embeddings
    bits = _bits(K)
    numbers = indices.flatten(1).cpu().numpy()  # (N, h w)
    binary = (numbers[..., None] >> np.arange(bits)) & 1  # (N, h w, bits), the lowest bit first
    packed = np.packbits(binary.reshape(len(numbers), -1).astype(np.uint8), axis=1)  # (N, bytes)
    file = io.BytesIO()
    np.savez(
        file,
        codes=packed,
        grid_size=np.array(indices.shape[1:]),
        num_embeddings=np.array(K),
        names=np.array([Path(image).stem for image in args.images]),
        checkpoint=np.array(args.checkpoint),
        fingerprint=np.array(fingerprint(model.cpu())),
    )
    write_atomically(out, file.getvalue())
    for image, pixels, code in zip(args.images, to_uint8(x), packed, strict=True):
        print(
            f"{image}: {len(code)} bytes as codes; the same {size}x{size} pixels are "
            f"{_file_size(pixels, 'JPEG')} bytes as JPEG (quality 75), {_file_size(pixels, 'PNG')} "
            "as PNG"
        )
    print(f"{len(packed)} images, {numbers.shape[1]} codes of {bits} bits each: {out}")


@torch.no_grad()
def decode(args: argparse.Namespace) -> None:
    """The other way: bytes to codes, and these to a PNG each, by the model that encoded them."""
    device = choose_device(args.device)
    try:
        with np.load(args.codes, allow_pickle=False) as file:
            content = {name: file[name] for name in file.files}
        packed, (h, w), names = content["codes"], content["grid_size"].tolist(), content["names"]
        K, path, encoder = (
            content[name].item() for name in ("num_embeddings", "checkpoint", "fingerprint")
        )
        bits = _bits(K)
        binary = np.unpackbits(packed, axis=1)[:, : h * w * bits].reshape(len(names), h * w, bits)
        indices = torch.from_numpy((binary.astype(np.int64) << np.arange(bits)).sum(axis=2))
        indices = indices.view(-1, h, w)
        if indices.max() >= K:
            raise ValueError(f"code {indices.max()} of {K}")
    except Exception as error:  # numpy's, zipfile's and zlib's, of many types
        reason = "damaged?" if "pickle" in str(error) else error  # numpy takes all else for pickles
        raise InputError(
            f"{args.codes} cannot be read as codes ({reason}): give a file that `encode` wrote"
        ) from error
    model, _ = _tokenizer(args.checkpoint or path)
    if (fingerprint(model), model.quantizer.num_embeddings) != (encoder, K):
        raise InputError(
            f"{args.checkpoint or path} is not the model that encoded {args.codes} ({path}): its "
            "codes mean other things; name that one with --checkpoint"
        )
    indices = indices.to(device)
    model.to(device)
    images = torch.cat([to_uint8(model.decode_indices(part)) for part in indices.split(64)])
    width = len(str(len(images)))
    for i, (name, pixels) in enumerate(zip(names, images.cpu(), strict=True), start=1):
        file_name = f"{i:0{width}}-{Path(name).name}.png"  # a name from elsewhere may have folders
        write_atomically(Path(args.out) / file_name, _file(pixels, "PNG"))
    print(f"{len(images)} images, {packed.shape[1]} bytes each: written to {args.out}")


def _tokenizer(checkpoint: str):
    """A VQ-VAE, a VQGAN, or a transformer's tokenizer, and its image size."""
    state = read_checkpoint(checkpoint)
    if state["model"] == "GPT":
        pair = load_pair(checkpoint)
        return pair.tokenizer, pair.image_size
    model, state = load_tokenizer(checkpoint)
    return model, state["about"].get("image_size") or image_size_of(model)


def _bits(num_embeddings: int) -> int:
    """Of a number from 0 to K - 1."""
    return max(1, (num_embeddings - 1).bit_length())


def _file(pixels: Tensor, format: str) -> bytes:
    """uint8 (3, H, W) as an image file."""
    file = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file, format)
    return file.getvalue()


def _file_size(pixels: Tensor, format: str) -> int:
    return len(_file(pixels, format))


# --- about checkpoints ---------------------------------------------------------------------------


def info(args: argparse.Namespace) -> None:
    """Print what a checkpoint says of itself, and what was measured of its model."""
    state = read_checkpoint(args.checkpoint)
    about = state.get("about") or {}
    parameters = sum(p.numel() for p in load_model(args.checkpoint).parameters())
    print(f"{state['model']}, {parameters:,} parameters")
    for name, value in state["arguments"].items():
        print(f"    {name}: {value}")
    if "condition" in about:
        condition = about["condition"]
        names = ", ".join(name for name in condition["names"] if name)
        what = names or condition["picture"] or "one start token"
        print(f"condition: {condition['kind']} ({what})")
        print(f"tokenizer: {about['tokenizer']}")
    if about:
        print(f"trained on {about['data']}, {about['image_size']} pixels: {about['command']}")
    if "step" in state:
        print(f"{state['step']:,} steps, {state['seconds'] / 60:.1f} minutes")
    for name, value in _result(args.checkpoint, state).items():
        if isinstance(value, int | float):
            print(f"    {name}: {value:.6g}")


def _result(checkpoint: str, state: dict) -> dict:
    """What was measured of a model: in its checkpoint, or in the metrics.json of its run."""
    if "result" in (state.get("about") or {}):
        return state["about"]["result"]
    path = checkpoint_path(checkpoint)
    for metrics_path, name in (
        (path.parent / "metrics.json", "transformer" if state["model"] == "GPT" else ""),
        (path.parent.parent / "metrics.json", path.parent.name),
    ):
        try:
            return json.loads(metrics_path.read_text())["models"][name]
        except (OSError, ValueError, KeyError):
            continue
    print("(no metrics.json of it: its run was not finished, or is elsewhere)")
    return {}


def export(args: argparse.Namespace) -> None:
    """Copy a pair in half precision, without what only training needs; results go with it."""
    pair, out = load_pair(args.checkpoint), Path(args.out)
    path = checkpoint_path(args.checkpoint)
    if (out / "checkpoint.pt").exists():
        raise InputError(f"--out {out} holds a checkpoint.pt already: name another folder")
    state = read_checkpoint(path)
    save_model(out / "tokenizer.pt", read_checkpoint(path.with_name("tokenizer.pt")), half=True)
    tokenizer, _ = load_tokenizer(out / "tokenizer.pt")  # rounded: other weights, another hash
    state["about"] |= {"tokenizer_fingerprint": fingerprint(tokenizer)}
    state["about"] |= {"result": _result(args.checkpoint, state)}
    save_model(out / "checkpoint.pt", state, half=True)
    size = sum((out / name).stat().st_size for name in ("tokenizer.pt", "checkpoint.pt"))
    print(f"{type(pair.tokenizer).__name__} and transformer, {size / 1e6:.1f} MB: {out}")


def _at_once(side: int) -> int:
    """Pictures of this side in pixels that are written or decoded together."""
    return min(64, evaluation_batch(side))


# --- files ---------------------------------------------------------------------------------------


def _png(out: str, images: list[str] = ()) -> Path:
    """The picture to write, which must not be one of those that are read."""
    path = Path(out)
    if path.suffix.lower() != ".png":
        raise InputError(f"--out {out}: a name that ends in .png was expected")
    if path.exists() and any(path.samefile(image) for image in images if Path(image).exists()):
        raise InputError(f"--out {out} is one of the images: it would be overwritten")
    return path


def _read_images(paths: list[str], size: int) -> Tensor:
    """Image files -> (N, 3, size, size) in [-1, 1]."""
    images = []
    for path in paths:
        try:
            images.append(torch.tensor(read_image(Path(path), size)))
        except Exception as error:  # Pillow raises many types on broken files
            raise InputError(
                f"{path} cannot be read as an image ({error}): name a PNG, JPEG or another file "
                "that Pillow opens"
            ) from error
    return from_uint8(torch.stack(images))


def _read_config(path: str | None) -> dict | None:
    """The JSON of --config; None where the flag was not given."""
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


def command_line() -> None:
    """What the installed command `vqgan` calls."""
    run_script(main, resumable=False)


if __name__ == "__main__":
    command_line()
