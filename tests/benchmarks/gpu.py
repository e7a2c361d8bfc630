"""All that a CUDA card is asked, in one command that is sized for less than ten minutes.

    python tests/benchmarks/gpu.py                          # runs/gpu/benchmark.json, and a table
    python tests/benchmarks/gpu.py --device cpu --quick     # everything, small, in minutes

The tests of the device; time and peak memory of training steps, quantizers and sampling against the
peers of the other benchmarks; a short training by each script. A peer that is not installed is left
out. A part that fails is reported, the others go on, and the exit status is 1.
"""

import argparse
import contextlib
import functools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import benchmark_quantizer
import benchmark_sampling
import benchmark_training_step
import benchmark_vqgan_step
import torch
from timing import median_seconds, peak_cuda_mebibytes

from vqgan.device import choose_device, choose_precision, describe_device
from vqgan.errors import InputError
from vqgan.files import write_json
from vqgan.masked import MaskedTransformer
from vqgan.training import versions

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("tests", "steps", "quantizer", "sampling", "training")
COLUMNS = {  # of the table, and how each is written
    "part": "{}", "contestant": "{}", "ms": "{:,.1f}", "ratio": "{:.2f}",
    "peak_MiB": "{:,.0f}", "per_second": "{:,.0f}", "unit": "{}", "note": "{}",
}  # fmt: skip
TIMEOUT = 300  # seconds that a process may take, so that one that hangs stops nothing else
Rows = list[dict]


def new_row(contestant: str, **values) -> dict:
    return dict.fromkeys(COLUMNS) | {"contestant": contestant} | values


# --- peers ---------------------------------------------------------------------------------------


def compare(makers: dict[str, Callable], *, rounds: int, items: int, unit: str, cuda: bool) -> Rows:
    """Contestants that take turns, each made by a call; ratios are to the first, the peer."""
    calls, rows = {}, []
    for name, make in makers.items():
        try:
            calls[name] = make()
        except ModuleNotFoundError as error:  # ours are imported above
            rows.append(new_row(name, note=f"left out: {error.name} is not installed"))
    times = median_seconds(calls, rounds)
    peer = times.get(next(iter(makers)))
    for name, seconds in times.items():
        values = {"ms": 1e3 * seconds, "ratio": peer and peer / seconds}
        values["peak_MiB"] = peak_cuda_mebibytes(calls[name]) if cuda else None
        rows.append(new_row(name, per_second=items / seconds, unit=unit, **values))
    return rows


def comparisons(device: torch.device, dtype: torch.dtype, quick: bool) -> Iterator[tuple]:
    """(kind, name, call) of each comparison; a call returns rows."""
    run = functools.partial(compare, cuda=device.type == "cuda")
    has_bf16 = dtype == torch.bfloat16

    B, rounds = (32, 3) if quick else (256, 20)
    x = torch.rand(B, 3, 32, 32, device=device) * 2 - 1
    ours = functools.partial(benchmark_training_step.our_step, x, device)
    makers = {"usual way, fp32": lambda: benchmark_training_step.usual_step(x, device)}
    makers["ours, fp32"] = lambda: ours(torch.float32)
    if has_bf16:
        makers["ours, bf16"] = lambda: ours(torch.bfloat16)
    call = functools.partial(run, makers, rounds=rounds, items=B, unit="images")
    yield "steps", f"VQ-VAE, batch {B}", call

    B = 8 if quick else 64
    prepare = functools.partial(benchmark_vqgan_step.prepare, device=device, batch_size=B)
    for precision in ("fp32", "bf16") if has_bf16 else ("fp32",):
        names = [f"{name}, {precision}" for name in ("diffusers", "ours")]
        makers = {name: functools.partial(prepare, name) for name in names}
        call = functools.partial(run, makers, rounds=rounds, items=B, unit="images")
        yield "steps", f"VQGAN, {precision}, batch {B}", call

    B = 16 if quick else 256
    for kind in benchmark_quantizer.KINDS:
        for K in (512, 4096) if quick else (512, 16_384):
            names = {"vector-quantize-pytorch": "peer", "ours": "ours"}
            options = {"num_embeddings": K, "kind": kind, "device": device, "batch_size": B}
            prepare = functools.partial(benchmark_quantizer.prepare, **options)
            makers = {title: functools.partial(prepare, name) for title, name in names.items()}
            items = B * benchmark_quantizer.SIDE**2
            call = functools.partial(run, makers, rounds=rounds, items=items, unit="vectors")
            yield "quantizer", f"{kind}, fp32, K = {K}", call

    side, rounds = (8, 1) if quick else (16, 3)
    model = benchmark_sampling.new_model(side, device)
    masked = benchmark_sampling.new_model(side, device, MaskedTransformer)
    for B in (1, 16):
        prepare = functools.partial(benchmark_sampling.prepare, model=model, batch_size=B)
        names = ("transformers", "ours", "without a cache")
        makers = {name: functools.partial(prepare, name) for name in names}
        for steps in (8, 12):
            settings = {"model": masked, "batch_size": B, "steps": steps}
            make = functools.partial(benchmark_sampling.prepare, "ours", **settings)
            makers[f"masked, {steps} rounds"] = make
        call = functools.partial(run, makers, rounds=rounds, items=B * side**2, unit="tokens")
        yield "sampling", f"{side**2} tokens, fp32, batch {B}", call


# --- processes -----------------------------------------------------------------------------------


def run_python(*arguments: str | Path) -> str:
    """What a Python process prints. Raises RuntimeError with its last lines if it fails."""
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT)
    if done.returncode:
        raise RuntimeError("; ".join((done.stdout + done.stderr).strip().splitlines()[-5:]))
    return done.stdout


def test_device(device: torch.device) -> Rows:
    """The tests marked `device`."""
    flags = ("-q", "-m", "device", "--device", str(device), "tests/test_on_device.py")
    return [new_row("pytest", note=run_python("-m", "pytest", *flags).strip().splitlines()[-1])]


def train(script: str, *flags: str | Path) -> Rows:
    """Images per second of each model of a script, by its metrics.json: with the first, slow steps.

    All images are in whole batches, since an incomplete one is left out.
    """
    with tempfile.TemporaryDirectory() as out:
        run_python(f"{script}.py", "--data", "shapes", "--out", out, *flags)
        metrics = json.loads((Path(out) / "metrics.json").read_text())
    rows = []
    for name, model in metrics["models"].items():
        rate = metrics["data"]["training_images"] * model["epochs"] / model["seconds"]
        note = f"{metrics['device']}, batch {model['batch_size']}"
        rows.append(new_row(name, per_second=rate, unit="images", note=note))
    return rows


def trainings(device: torch.device, quick: bool) -> Iterator[tuple]:
    """(kind, name, call) of each script."""
    images, epochs = (256, 1) if quick else (8192, 3)
    data = ("--device", str(device), "--num-rendered", str(images), "--limit", str(images))
    data += ("--epochs", str(epochs))
    short = ("--eval-classifier-epochs", "1")
    scripts = {
        "train_vqvae": (),
        "train_vqgan": (
            *short,
            "--classifier-epochs",
            "1",
            "--disc-start",
            "0",
            "--disc-warmup",
            "0",
        ),
        "train_transformer": (*short, "--num-samples", "16"),
    }
    scripts["train_transformer"] += ("--tokenizer", ROOT / "vqgan/pretrained/shapes/tokenizer.pt")
    for script, flags in scripts.items():
        yield "training", f"{script}.py", functools.partial(train, script, *data, *flags)


# --- report --------------------------------------------------------------------------------------


def markdown(rows: Rows) -> str:
    lines = [[name.replace("_", " ") for name in COLUMNS], ["---"] * len(COLUMNS)]
    for row in rows:
        cells = ["" if row[name] is None else COLUMNS[name].format(row[name]) for name in COLUMNS]
        lines.append([cell.replace("|", "/").replace("\n", " ") for cell in cells])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Benchmark this package on a device.")
    parser.add_argument("--device", default="cuda", help="cuda, cpu, ...")
    parser.add_argument("--quick", action="store_true", help="small sizes, few rounds")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=KINDS, help="some parts only")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu/benchmark.json"))
    args = parser.parse_args(arguments)
    try:
        device = choose_device(args.device)
    except InputError as error:
        parser.error(str(error))
    dtype = choose_precision("auto", device)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)

    content: dict = {"device": describe_device(device, dtype), "versions": versions()}
    content |= {"quick": args.quick, "seconds": 0.0, "failed": [], "rows": []}
    parts = [("tests", "device", functools.partial(test_device, device))]
    parts += [*comparisons(device, dtype, args.quick), *trainings(device, args.quick)]
    start = time.perf_counter()
    for kind, name, call in parts:
        if kind not in args.only:
            continue
        part = f"{kind}: {name}"
        print(f"{time.perf_counter() - start:4.0f} s, {part}", file=sys.stderr)
        torch.cuda.empty_cache()  # what is cached is no other process's to use
        try:
            with contextlib.redirect_stdout(sys.stderr):
                rows = call()
        except Exception as error:  # whatever it is, the other parts have their turn
            rows = [new_row("", note=f"failed: {type(error).__name__}: {error}")]
            content["failed"].append(part)
        content["rows"] += [row | {"part": part} for row in rows]
        content["seconds"] = round(time.perf_counter() - start, 1)
        write_json(args.out, content)

    print(f"{content['device']}, torch {torch.__version__}, {content['seconds']:.0f} s\n")
    print(markdown(content["rows"]))
    print("\nratio: how many times as fast as the part's first contestant")
    if device.type != "cuda":
        print("peak memory is left out: it is measured on CUDA only")
    return int(bool(content["failed"]))


if __name__ == "__main__":
    sys.exit(main())
