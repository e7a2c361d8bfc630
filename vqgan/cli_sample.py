"""The commands that generate: `vqgan sample` and `vqgan complete`."""

import argparse

import torch
from torch import Tensor
from tqdm import tqdm

from vqgan import figures
from vqgan.arguments import non_negative_float, png_path, positive_float, positive_int, seed_int
from vqgan.conditions import TRANSFORMS
from vqgan.data import eval_batch_size
from vqgan.device import choose_device
from vqgan.errors import InputError, user_input
from vqgan.evaluation import decode_tokens
from vqgan.image_folder import read_images
from vqgan.images import from_uint8, to_unit
from vqgan.pretrained import Pipeline, load_pipeline
from vqgan.sampling import check_sampling, describe_sampling, sample_sliding_window

COLUMNS = 8  # images in a row
MAX_CHUNK_SIZE = 64  # images that are generated together


def sampling_flags(add, *, count: int) -> None:
    """The flags that both commands have."""
    add("checkpoint", metavar="CHECKPOINT", help="of train_transformer.py")
    add("--class", dest="classes", nargs="+", metavar="NAME", help="for a model of classes")
    add("--caption", nargs="+", metavar="TEXT", help='as in "small red star on blue"')
    add("--count", type=positive_int, default=count, help="pictures of each")
    add("--temperature", type=non_negative_float, default=1.0, help="0: greedy, no chance")
    add("--top-k", type=int, help="sample from the k likeliest codes only")
    add("--top-p", type=positive_float, help="from the likeliest of this mass only, up to 1")
    add("--guidance", type=non_negative_float, default=1.0, help="scale; above 1: more as asked")
    add("--seed", type=seed_int, default=0, help="another gives other pictures")
    add("--tokenizer", metavar="CHECKPOINT", help="not given: tokenizer.pt beside CHECKPOINT")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")


def sample_flags(add) -> None:
    """Of `vqgan sample`."""
    sampling_flags(add, count=16)
    add("--image", metavar="IMAGE", help="for a model of pictures: what it is to work from")
    add("--as-is", action="store_true", help="IMAGE is a sketch (grey, small) already")
    add("--height", type=positive_int, help="in pixels; for textures: see the README")
    add("--width", type=positive_int, help="in pixels")
    add("--out", default="samples.png", help="the picture to write")


def complete_flags(add) -> None:
    """Of `vqgan complete`."""
    sampling_flags(add, count=8)
    add("image", metavar="IMAGE", help="a file that Pillow opens")
    add("--keep", default="top", help="top or left: that half; x0,y0,x1,y1: a box, in pixels")
    add("--out", default="completed.png", help="the picture to write")


def sample(args: argparse.Namespace) -> None:
    """New images of a trained transformer, in one PNG.

    There are --count of each class or caption that is asked for, one after the other.
    """
    out = png_path(args.out, [args.image] if args.image else [])
    pipeline, setting, device = _open(args)
    if args.as_is and args.image is None:
        raise InputError("--as-is says something of --image, and none was given: leave it out")
    size, (h, w) = pipeline.tokenizer.image_size, pipeline.tokenizer.grids[0]
    height, width = _grid_size(args, pipeline)
    prompts = _prompts(args, pipeline)
    rows = []
    if args.image is not None:
        x = from_uint8(read_images([args.image], size)).to(device)
        picture = x if args.as_is else TRANSFORMS[pipeline.condition.transform](x)
        rows = [("original", to_unit(x).cpu())] if not args.as_is else []
        rows.append((pipeline.condition.transform, to_unit(picture).cpu()))
        prompts = {"samples": pipeline.tokenizer.tokens(picture)}
    chunk_size = min(
        MAX_CHUNK_SIZE, eval_batch_size(height * 2**pipeline.tokenizer.num_downsamples)
    )
    generator = torch.Generator().manual_seed(args.seed)
    total = len(prompts) * args.count * height * width
    with tqdm(desc="sampling", total=total, unit="token", unit_scale=True) as progress:
        more = setting | {"generator": generator, "progress": progress.update}
        for label, prompt in prompts.items():
            images = []
            for part in prompt.to(device).expand(args.count, -1).split(chunk_size):
                if (height, width) == (h, w):
                    x = pipeline.tokenizer.decode_tokens(pipeline.transformer.sample(part, **more))
                else:
                    models = (pipeline.transformer, pipeline.tokenizer)
                    grid = sample_sliding_window(*models, part, height, width, **more)
                    x = pipeline.tokenizer.decode_indices(grid)
                images.append(to_unit(x).cpu())
            chunks = torch.cat(images).split(COLUMNS)
            rows += [(label if i == 0 else "", chunk) for i, chunk in enumerate(chunks)]
    figures.image_rows(out, rows, title=describe_sampling(setting))
    print(f"{args.count} pictures of {', '.join(prompts)}: written to {out}")


def complete(args: argparse.Namespace) -> None:
    """The rest of an image, generated by a transformer, in one PNG.

    The image becomes tokens; those that --keep names stay, and the others are generated.
    """
    out = png_path(args.out, [args.image])
    pipeline, setting, device = _open(args)
    x = from_uint8(read_images([args.image], pipeline.tokenizer.image_size)).to(
        device
    )  # (1, 3, H, W)
    tokens = pipeline.tokenizer.tokens(x)  # (1, N)
    mask = _mask(args.keep, pipeline)  # (h, w)
    if args.classes is not None or args.caption is not None:
        (condition, *others) = _prompts(args, pipeline).values()
        if others:
            raise InputError("a completion is of one class or caption: give one")
    elif pipeline.condition.kind == "image":
        condition = pipeline.tokenizer.tokens(TRANSFORMS[pipeline.condition.transform](x))
    elif pipeline.condition.kind == "none":
        condition = pipeline.condition.start_tokens(1)
    elif not pipeline.supports_guidance:
        raise InputError(
            f"this model needs to be told a condition: give --{pipeline.condition.kind}"
        )
    elif args.guidance != 1:
        raise InputError("--guidance exaggerates a condition, and none was given: leave it out")
    else:  # the condition is dropped
        condition = torch.full((1, pipeline.condition.length), pipeline.transformer.null_token)
    given = torch.where(mask.to(device).flatten(), tokens, -1).expand(args.count, -1)
    with tqdm(desc="sampling", total=given.numel(), unit="token", unit_scale=True) as progress:
        generator = torch.Generator().manual_seed(args.seed)
        more = setting | {"generator": generator, "progress": progress.update}
        prompt = condition.to(device).expand(args.count, -1)
        sampled = pipeline.transformer.sample(prompt, given=given, **more)
    completed = to_unit(decode_tokens(pipeline.tokenizer, sampled))
    pixels = 2**pipeline.tokenizer.num_downsamples
    mask = mask.repeat_interleave(pixels, 0).repeat_interleave(pixels, 1)
    shown = torch.where(mask, to_unit(x).cpu(), 0.5)
    rows = [("original, and what is kept", torch.cat([to_unit(x).cpu(), shown]))]
    rows += [("completions" if i == 0 else "", c) for i, c in enumerate(completed.split(COLUMNS))]
    figures.image_rows(out, rows, title=describe_sampling(setting))
    num_given = int((given[0] >= 0).sum())
    print(f"{num_given} of {given.shape[1]} codes kept; {args.count} completions: {out}")


def _open(args: argparse.Namespace) -> tuple[Pipeline, dict, torch.device]:
    """Transformer and tokenizer on the device, and the keyword arguments of `GPT.sample`."""
    device = choose_device(args.device)
    pipeline = load_pipeline(args.checkpoint, tokenizer=args.tokenizer)
    pipeline.transformer.to(device)
    pipeline.tokenizer.to(device)
    names = ("temperature", "top_k", "top_p", "guidance")
    setting = {name: getattr(args, name) for name in names}
    with user_input():
        check_sampling(pipeline.transformer.num_embeddings, **setting)
    if args.guidance != 1 and pipeline.condition.kind == "none":
        raise InputError("--guidance strengthens a condition, and this model has none")
    if args.guidance != 1 and not pipeline.supports_guidance:
        raise InputError("--guidance needs a model with --condition-drop above 0: leave it out")
    return pipeline, setting, device


def _grid_size(args: argparse.Namespace, pipeline: Pipeline) -> tuple[int, int]:
    """--height and --width in tokens."""
    pixels = 2**pipeline.tokenizer.num_downsamples  # of the side that a token stands for
    size = pipeline.tokenizer.image_size
    height, width = args.height or size, args.width or size
    if height % pixels or width % pixels or min(height, width) < size:
        raise InputError(f"{height}x{width} pixels: give multiples of {pixels}, {size} or more")
    if (height, width) != (size, size) and pipeline.condition.kind == "image":
        raise InputError("a model of pictures has their size only: leave --height, --width out")
    return height // pixels, width // pixels


def _prompts(args: argparse.Namespace, pipeline: Pipeline) -> dict[str, Tensor]:
    """What is asked for: a label, and tokens (1, C); refused where the model takes another kind."""
    condition = pipeline.condition
    given = {"class": args.classes, "caption": args.caption}
    if args.command == "sample":  # a completion's image is not its condition
        given["image"] = args.image
    for kind, value in given.items():
        if value is not None and kind != condition.kind:
            remedy = f"give --{condition.kind}" if condition.kind in given else "leave it out"
            raise InputError(f"--{kind}: this model's condition is {condition.kind}; {remedy}")
    if condition.kind == "class":
        names = list(dict.fromkeys(args.classes or condition.names))  # not given: all of them
        return dict(zip(names, condition.encode_classes(names).split(1), strict=True))
    if condition.kind == "caption":
        if not args.caption:
            words = ", ".join(word for word in condition.names if word)
            raise InputError(f"this model needs a --caption; the words that it knows: {words}")
        return dict(
            zip(args.caption, condition.encode_captions(args.caption).split(1), strict=True)
        )
    if condition.kind == "image" and args.image is None:
        raise InputError(f"this model works from {condition.transform}: name one with --image")
    return {"samples": condition.start_tokens(1)}


def _mask(keep: str, pipeline: Pipeline) -> Tensor:
    """Which tokens to keep, (h, w) bool: those whose pixels lie all inside of the box."""
    size, (h, w) = pipeline.tokenizer.image_size, pipeline.tokenizer.grids[0]
    boxes = {"top": (0, 0, size, size // 2), "left": (0, 0, size // 2, size)}
    try:
        x0, y0, x1, y1 = boxes.get(keep) or (int(number) for number in keep.split(","))
    except ValueError as error:
        raise InputError(f"--keep {keep}: give top, left, or a box, as in 0,0,16,16") from error
    pixels = size // h
    top, left = torch.arange(h)[:, None] * pixels, torch.arange(w) * pixels
    mask = (left >= x0) & (left + pixels <= x1) & (top >= y0) & (top + pixels <= y1)
    if not mask.any() or mask.all():
        raise InputError(
            f"--keep {keep} keeps {int(mask.sum())} of {mask.numel()} codes: give a box with some "
            f"of the {size}x{size} pixels and not all (a code stands for {pixels}x{pixels})"
        )
    return mask
