"""One training step of the VQ-VAE at batch 256 against the same network written the usual way.

    python tests/benchmarks/benchmark_training_step.py

The usual way is what many notebooks have: float32, contiguous memory, a one-hot matrix for the
lookup and for the moving averages, and the default Adam. Same sizes, same loss, same machine.
"""

import torch
import torch.nn.functional as F
from timing import environment, median_seconds
from torch import nn

from vqgan.device import autocast, choose_device, choose_precision, prepare_model
from vqgan.vqvae import VQVAE

BATCH_SIZE = 256


class OneHotQuantizer(nn.Module):
    """Distances to all codes at once, and N x K one-hot matrices in place of indices."""

    def __init__(self, num_embeddings: int = 512, embedding_dim: int = 64, decay: float = 0.99):
        super().__init__()
        self.num_embeddings, self.decay = num_embeddings, decay
        self.register_buffer("codebook", torch.randn(num_embeddings, embedding_dim))
        self.register_buffer("counts", torch.ones(num_embeddings))
        self.register_buffer("sums", self.codebook.clone())

    def forward(self, z_e):
        z_e = z_e.permute(0, 2, 3, 1).contiguous()
        vectors = z_e.view(-1, z_e.shape[-1])
        distances = (
            vectors.square().sum(dim=1, keepdim=True)
            + self.codebook.square().sum(dim=1)
            - 2 * vectors @ self.codebook.T
        )
        indices = distances.argmin(dim=1)
        one_hot = torch.zeros(len(vectors), self.num_embeddings, device=z_e.device)
        one_hot.scatter_(1, indices[:, None], 1)
        z_q = (one_hot @ self.codebook).view_as(z_e)
        with torch.no_grad():
            self.counts.mul_(self.decay).add_(one_hot.sum(dim=0), alpha=1 - self.decay)
            self.sums.mul_(self.decay).add_(one_hot.T @ vectors, alpha=1 - self.decay)
            total = self.counts.sum()
            smoothed = (self.counts + 1e-5) / (total + self.num_embeddings * 1e-5) * total
            self.codebook.copy_(self.sums / smoothed[:, None])
        loss = 0.25 * F.mse_loss(z_e, z_q.detach())
        z_q = z_e + (z_q - z_e).detach()
        return z_q.permute(0, 3, 1, 2).contiguous(), indices, loss


def usual_step(x, device):
    model = VQVAE()
    model.quantizer = OneHotQuantizer()
    model.to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-4)

    def step():
        z_q, _, loss = model.quantizer(model.encoder(x))
        loss = loss + F.mse_loss(model.decoder(z_q), x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def our_step(x, device, dtype):
    model = prepare_model(VQVAE(), device, compile=False)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-4, fused=device.type in ("cpu", "cuda"))

    def step():
        with autocast(device, dtype):
            output = model(x)
            loss = output.loss + F.mse_loss(output.reconstruction.float(), x)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return step


def main() -> None:
    device = choose_device("auto")
    dtype = choose_precision("auto", device)
    torch.manual_seed(0)
    x = torch.rand(BATCH_SIZE, 3, 32, 32, device=device) * 2 - 1
    contestants = {
        "the usual way": usual_step(x, device),
        "ours, fp32": our_step(x, device, torch.float32),
    }
    if dtype == torch.bfloat16:
        contestants["ours, bf16"] = our_step(x, device, dtype)
    times = median_seconds(contestants, rounds=8)
    print(f"{environment()}, {device}, batch {BATCH_SIZE}")
    for name, seconds in times.items():
        ratio = times["the usual way"] / seconds
        print(
            f"{name:>14} {1e3 * seconds:>8.0f} ms {BATCH_SIZE / seconds:>7.0f} img/s {ratio:>5.2f}x"
        )


if __name__ == "__main__":
    main()
