"""A generator step of the VQGAN, forward and backward, against diffusers' VQModel of equal sizes.

    pip install -e '.[benchmark]'
    python tests/benchmarks/benchmark_vqgan_step.py

The same layers in the same order, as many parameters, a gradient-trained codebook in both, squared
error and quantizer loss, no optimizer. diffusers' as it comes (contiguous memory), in float32 and
under bfloat16 autocast; this package's as the script prepares it (channels last).
"""

import importlib.metadata

import torch
import torch.nn.functional as F
from timing import environment, median_seconds, peak_extra_mebibytes

from vqgan.device import autocast, choose_device, choose_precision, prepare_model
from vqgan.vqgan import VQGAN

BATCH_SIZE = 64


def diffusers_step(x, dtype):
    from diffusers import VQModel

    model = VQModel(
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        latent_channels=64,
        num_vq_embeddings=1024,
        norm_num_groups=8,
        vq_embed_dim=32,
    ).to(x.device)

    def step():
        with autocast(x.device, dtype):
            reconstruction, quantizer_loss = model(x, return_dict=False)[:2]
        model.zero_grad(set_to_none=True)
        (F.mse_loss(reconstruction.float(), x) + quantizer_loss).backward()

    return model, step


def our_step(x, dtype):
    model = prepare_model(VQGAN(quantizer="gradient"), x.device, compile=False)

    def step():
        with autocast(x.device, dtype):
            output = model(x)
        model.zero_grad(set_to_none=True)
        (F.mse_loss(output.reconstruction.float(), x) + output.loss).backward()

    return model, step


CONTESTANTS = {
    "diffusers, fp32": (diffusers_step, torch.float32),
    "ours, fp32": (our_step, torch.float32),
    "diffusers, bf16": (diffusers_step, torch.bfloat16),
    "ours, bf16": (our_step, torch.bfloat16),
}


def prepare(name, device="auto", batch_size=BATCH_SIZE):
    """One contestant's step."""
    torch.manual_seed(0)
    make, dtype = CONTESTANTS[name]
    x = torch.rand(batch_size, 3, 32, 32, device=choose_device(str(device))) * 2 - 1
    return make(x, dtype)[1]


def main() -> None:
    device = choose_device("auto")
    x = torch.rand(BATCH_SIZE, 3, 32, 32, device=device) * 2 - 1
    sizes = {
        name: sum(p.numel() for p in make(x, dtype)[0].parameters())
        for name, (make, dtype) in CONTESTANTS.items()
    }
    assert len(set(sizes.values())) == 1, f"not the same network: {sizes}"
    names = list(CONTESTANTS)
    if choose_precision("auto", device) == torch.float32:
        names = [name for name in names if "fp32" in name]
    times = median_seconds({name: prepare(name) for name in names}, rounds=12)
    version = importlib.metadata.version("diffusers")
    print(f"{environment()}, diffusers {version}, {device}, batch {BATCH_SIZE}")
    for name in names:
        peer = times[name.replace("ours", "diffusers")]
        line = f"{name:>15} {1e3 * times[name]:>6.0f} ms {peer / times[name]:>6.2f}x"
        if device.type == "cpu":  # what is measured is the memory of the process
            memory = peak_extra_mebibytes(prepare, name)
            line += f" {memory:>8.0f} MiB above the weights"
        print(line)


if __name__ == "__main__":
    main()
