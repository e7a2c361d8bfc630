"""The commands that generate images: `vqgan sample` and `vqgan complete`."""

import argparse
import zlib

import torch
from torch import Tensor

from vqgan import completion, figures
from vqgan.arguments import output_path, path_text, sampling_flags, small_int
from vqgan.conditions import TRANSFORMS
from vqgan.console import progress_bar
from vqgan.data import eval_batch_size
from vqgan.device import choose_device
from vqgan.errors import InputError, user_input
from vqgan.image_folder import read_images, read_mask
from vqgan.images import from_uint8, to_unit
from vqgan.masked import MaskedTransformer
from vqgan.pretrained import Pipeline, load_pipeline
from vqgan.sampling import check_sampling, describe_sampling, sample_sliding_window
from vqgan.vqvae import VQAutoencoder
from vqgan.vqvae2 import VQVAE2

SAMPLES, COMPLETED = "samples.png", "completed.png"  # --out
COLUMNS = 8  # images per row
MAX_CHUNK_SIZE = 64  # images that are generated at once


def sample_flags(add) -> None:
    """The flags of `vqgan sample`."""
    sampling_flags(add, count=16, out=SAMPLES)
    image = "image to generate from, if that is the model's condition"
    add("--image", type=path_text, metavar="IMAGE", help=image)
    add("--as-is", action="store_true", help="IMAGE is already transformed (edges, gray, lowres)")
    add("--coarse", action="store_true", help="also show what the coarse tokens give (VQ-VAE-2)")
    add("--height", type=small_int, help="height in pixels, for textures larger than trained")
    add("--width", type=small_int, help="width in pixels, for textures larger than trained")


def complete_flags(add) -> None:
    """The flags of `vqgan complete`."""
    sampling_flags(add, count=8, out=COMPLETED)
    add("image", type=path_text, metavar="IMAGE", help="image, in any format that Pillow opens")
    add("--keep", help="part to keep: top (default) or left (half), or a box as in --hole")
    add(
        "--hole", metavar="BOX", help="part to generate: x0,y0,x1,y1 in pixels of the resized image"
    )
    mask = "the same as an image of IMAGE's size, white where pixels are to be generated"
    add("--mask", type=path_text, metavar="MASK", help=mask)
    add("--no-paste", action="store_true", help="show the decoder's pixels around the hole, too")


def sample(args: argparse.Namespace) -> None:
    """Generate new images with a trained transformer, in one PNG.

    There are --count images of each requested class or caption, one after the other. A larger count
    adds images to those of a smaller one, and a class has the same images whatever is beside it.
    """
    out = output_path(args.out, SAMPLES, [args.image] if args.image else [])
    pipeline, setting, device = _open(args)
    if args.as_is and args.image is None:
        raise InputError("--as-is is about an --image, and none was given: leave it out")
    if args.coarse and not isinstance(pipeline.tokenizer, VQVAE2):
        raise InputError("--coarse is about the two grids of a VQ-VAE-2: leave it out")
    height, width = _grid_size(args, pipeline)
    prompts = _prompts(args, pipeline)
    rows = []
    if args.image is not None:
        x = from_uint8(read_images([args.image], pipeline.tokenizer.image_size)).to(device)
        transformed = x if args.as_is else TRANSFORMS[pipeline.condition.transform](x)
        rows = [("original", to_unit(x).cpu())] if not args.as_is else []
        rows.append((pipeline.condition.transform, to_unit(transformed).cpu()))
        prompts = {"samples": pipeline.tokenizer.tokens(transformed)}
    tokenizer, pixels = pipeline.tokenizer, 2**pipeline.tokenizer.num_downsamples
    is_larger = (height, width) != tokenizer.grids[-1]
    chunk_size = min(MAX_CHUNK_SIZE, eval_batch_size(height * pixels))
    total = len(prompts) * args.count * (height * width if is_larger else tokenizer.seq_len)
    with progress_bar(desc="sampling", total=total, unit="token", unit_scale=True) as bar:
        for label, prompt in prompts.items():
            # Each label has its own generator, so its images are the same without the others. (And
            # not by hash(), which differs from process to process.)
            seed = zlib.crc32(f"{args.seed} {label}".encode(errors="surrogateescape"))
            generator = torch.Generator().manual_seed(seed)
            options = setting | {"generator": generator, "progress": bar.update}
            images, coarse = [], []
            for part in prompt.to(device).expand(args.count, -1).split(chunk_size):
                if is_larger:
                    window = (pipeline.transformer, tokenizer, part, height, width)
                    x = tokenizer.decode_indices(sample_sliding_window(*window, **options))
                else:
                    tokens = pipeline.transformer.sample(part, **options)
                    x = tokenizer.decode_tokens(tokens)
                    if args.coarse and isinstance(tokenizer, VQVAE2):
                        coarse.append(to_unit(tokenizer.decode_coarse(tokens)).cpu())
                images.append(to_unit(x).cpu())
            grids = {f"{label}, coarse": coarse} if args.coarse else {}
            for name, parts in (grids | {label: images}).items():
                chunks = torch.cat(parts).split(COLUMNS)
                rows += [(name if i == 0 else "", chunk) for i, chunk in enumerate(chunks)]
    figures.image_rows(out, rows, title=f"Samples ({describe_sampling(setting)})")
    print(f"images of {', '.join(prompts)}, {args.count} of each: written to {out}")


def complete(args: argparse.Namespace) -> None:
    """Generate a part of an image with a trained transformer, in one PNG.

    The part is given by --keep, --hole or --mask. Around it, the image stays as it is.
    """
    out = output_path(args.out, COMPLETED, [args.image, *([args.mask] if args.mask else [])])
    pipeline, setting, device = _open(args)
    x = from_uint8(read_images([args.image], pipeline.tokenizer.image_size)).to(device)
    hole, kind = _hole(args, pipeline.tokenizer), pipeline.condition.kind  # (H, W)
    if kind == "none" or args.classes is not None or args.caption is not None:
        (condition, *others) = _prompts(args, pipeline).values()
        if others:
            raise InputError("a completion has one class or caption: give one")
        condition = condition.to(device)  # (1, C)
    elif kind != "image" and not pipeline.supports_guidance:
        raise InputError(f"this model needs a condition: give --{kind}")
    elif kind != "image" and args.guidance != 1:
        raise InputError("--guidance strengthens a condition, and none was given: leave it out")
    else:
        condition = None  # that of the image, or a dropped one
    missing = completion.missing_tokens(hole, pipeline.tokenizer.grids)  # (N,)
    total, images = args.count * len(missing), []
    chunk_size = min(MAX_CHUNK_SIZE, eval_batch_size(len(hole)))
    with progress_bar(desc="sampling", total=total, unit="token", unit_scale=True) as bar:
        generator = torch.Generator().manual_seed(args.seed)
        options = setting | {"generator": generator, "progress": bar.update}
        for copies in x.expand(args.count, -1, -1, -1).split(chunk_size):
            part = None if condition is None else condition.expand(len(copies), -1)
            images.append(completion.complete(pipeline, copies, hole.to(device), part, **options))
    completed = torch.cat(images)
    completed = to_unit(completed if args.no_paste else completion.paste(x.cpu(), completed, hole))
    original = to_unit(x).cpu()
    rows = [("original, and what is kept", torch.cat([original, torch.where(hole, 0.5, original)]))]
    label = "completions, as decoded" if args.no_paste else "completions"
    rows += [(label if i == 0 else "", c) for i, c in enumerate(completed.split(COLUMNS))]
    figures.image_rows(out, rows, title=f"Completions ({describe_sampling(setting)})")
    num_given = int((~missing).sum())
    print(
        f"{num_given} of {len(missing)} tokens kept (the hole touches the others); "
        f"{args.count} completions: {out}"
    )
    levels = missing.split([h * w for h, w in pipeline.tokenizer.grids])
    is_kept_later = any((~level[level.int().argmax() :]).any() for level in levels)
    if pipeline.transformer.causal and is_kept_later:
        print(
            "(a GPT generates row by row, so it did not foresee the kept tokens that come later; "
            "one of train_transformer.py --prior masked sees all of them)"
        )


def _open(args: argparse.Namespace) -> tuple[Pipeline, dict, torch.device]:
    """The models, on the device, and the checked keyword arguments of its `sample`."""
    device = choose_device(args.device)
    pipeline = load_pipeline(args.checkpoint, tokenizer=args.tokenizer)
    pipeline.transformer.to(device)
    pipeline.tokenizer.to(device)
    setting = {name: getattr(args, name) for name in ("temperature", "top_k", "top_p", "guidance")}
    if args.steps is not None and not isinstance(pipeline.transformer, MaskedTransformer):
        raise InputError("--steps is about a masked transformer, and this is a GPT: leave it out")
    setting |= {} if args.steps is None else {"steps": args.steps}
    with user_input():
        check_sampling(pipeline.transformer.num_embeddings, **setting)
    can_guide = pipeline.condition.kind != "none" and pipeline.supports_guidance
    if args.guidance != 1 and not can_guide:
        lacks = "no dropped conditions (--condition-drop above 0)"
        lacks = "no condition" if pipeline.condition.kind == "none" else lacks
        raise InputError(f"--guidance: the model was trained with {lacks}: leave it out")
    return pipeline, setting, device


def _grid_size(args: argparse.Namespace, pipeline: Pipeline) -> tuple[int, int]:
    """The height and width in tokens, of the finest grid."""
    pixels = 2**pipeline.tokenizer.num_downsamples  # per token, in each direction
    size = pipeline.tokenizer.image_size
    height, width = args.height or size, args.width or size
    if height % pixels or width % pixels or min(height, width) < size:
        raise InputError(f"height={height}, width={width}: give multiples of {pixels} from {size}")
    is_larger = (height, width) != (size, size)
    if is_larger and pipeline.condition.kind == "image":
        raise InputError("a model conditioned on images has one size: leave --height, --width out")
    if is_larger and isinstance(pipeline.transformer, MaskedTransformer):
        raise InputError("a masked transformer has one size: leave --height, --width out")
    if is_larger and len(pipeline.tokenizer.grids) > 1:
        raise InputError("tokens of several grids have one size: leave --height, --width out")
    return height // pixels, width // pixels


def _prompts(args: argparse.Namespace, pipeline: Pipeline) -> dict[str, Tensor]:
    """The requested conditions: label -> tokens (1, C); InputError if the model takes others."""
    condition = pipeline.condition
    given = {"class": args.classes, "caption": args.caption}
    if args.command == "sample":  # a completion's image is not its condition
        given["image"] = args.image
    for kind, value in given.items():
        if value is not None and kind != condition.kind:
            remedy = f"give --{condition.kind}" if condition.kind in given else "leave it out"
            raise InputError(f"--{kind}: this model's condition is {condition.kind}; {remedy}")
    if condition.kind == "class":
        names = list(dict.fromkeys(args.classes or condition.names))  # all by default
        return dict(zip(names, condition.encode_classes(names).split(1), strict=True))
    if condition.kind == "caption":
        if not args.caption:
            words = ", ".join(word for word in condition.names if word)
            raise InputError(f"this model needs a --caption of these words: {words}")
        tokens = condition.encode_captions(args.caption).split(1)
        return dict(zip(args.caption, tokens, strict=True))
    if condition.kind == "image" and args.image is None:
        raise InputError(f"this model generates from {condition.transform}: name one with --image")
    return {"samples": condition.start_tokens(1)}


def _hole(args: argparse.Namespace, tokenizer: VQAutoencoder) -> Tensor:
    """The pixels to generate, (H, W) bool: white in --mask, inside --hole, or outside --keep."""
    size = tokenizer.image_size
    flags = {name: getattr(args, name) for name in ("keep", "hole", "mask")}
    given = [name for name, value in flags.items() if value is not None]
    if len(given) > 1:
        raise InputError(f"--{given[0]} and --{given[1]} both say what is generated: give one")
    name = given[0] if given else "keep"
    text = flags[name] if given else "top"
    flag = f"--{name} {text}"
    if name == "mask":
        hole = read_mask(args.mask, args.image, size)
    else:
        boxes = {"top": (0, 0, size, size // 2), "left": (0, 0, size // 2, size)}
        named = boxes if name == "keep" else {}
        try:
            x0, y0, x1, y1 = named.get(text) or map(int, text.split(","))
        except ValueError as error:
            raise InputError(
                f"{flag}: give {'top, left, or ' * bool(named)}a box, as in 0,0,16,16"
            ) from error
        if min(x0, y0) < 0 or max(x1, y1) > size:
            raise InputError(
                f"{flag}: the resized image has {size}x{size} pixels, give a box inside"
            )
        inside = torch.zeros(size, size, dtype=torch.bool)
        inside[y0:y1, x0:x1] = True
        hole = inside if name == "hole" else ~inside
    if not hole.any() or hole.all():
        part = "no pixel" if not hole.any() else "every pixel"
        raise InputError(f"{flag}: {part} of {size}x{size} would be generated: give another")
    if completion.missing_tokens(hole, tokenizer.grids).all():
        raise InputError(f"{flag}: the hole touches every token, so none is kept: keep more")
    return hole
