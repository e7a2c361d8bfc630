"""What the tests of the command share: to run it here, and small untrained models in files."""

import runpy
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from vqgan.checkpoint import fingerprint, load_checkpoint, save_checkpoint, save_model
from vqgan.data import TrainLoader
from vqgan.images import from_uint8
from vqgan.transformer import GPT
from vqgan.vae import VAE, SpatialVAE
from vqgan.vqgan import VQGAN
from vqgan.vqvae import VQVAE

DATA = Path(__file__).parent / "data"
ARGUMENTS = {
    VAE: {"image_size": 32, "num_hiddens": 8},
    SpatialVAE: {"num_hiddens": 8, "num_downsamples": 3},
    VQVAE: {"num_hiddens": 8, "num_embeddings": 16},
    VQGAN: {"channels": 8, "num_embeddings": 16},
}
K = 24  # codes, of five bits: no power of two
CLASSES = ("cat", "dog", "horse")
ABOUT = {"data": "shapes", "image_size": 32, "command": "python train_vqvae.py --data shapes"}


def save(path, kind):
    """A checkpoint of a small model, untrained."""
    model = kind(**ARGUMENTS[kind])
    images = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    save_checkpoint(
        path, model=model, model_args=ARGUMENTS[kind], optimizers={},
        batches=TrainLoader(images, 2), step=0, seconds=0.0,
    )  # fmt: skip
    return model.eval()


def save_tokenizer(path, images, seed=0, kind=VQVAE, **model_args):
    torch.manual_seed(seed)
    model_args = {"num_hiddens": 8, "num_embeddings": K, "num_downsamples": 3} | model_args
    model = kind(**model_args)
    with torch.no_grad():
        model.train().encode(from_uint8(images[:64]))  # the codebook starts from them
    save_checkpoint(
        path, model=model.eval(), model_args=model_args, optimizers={},
        batches=TrainLoader(images, 2), step=120, seconds=90.0, metadata=ABOUT,
    )  # fmt: skip
    return model


def save_pair(
    folder, condition, images, condition_drop=0.1, kind=VQVAE, prior=GPT, **tokenizer_args
):
    """As train_transformer.py writes it, untrained; its codes are far from alike."""
    path = folder / "vqvae" / "checkpoint.pt"
    tokenizer = save_tokenizer(path, images, kind=kind, **tokenizer_args)
    save_model(folder / "tokenizer.pt", load_checkpoint(folder / "vqvae" / "checkpoint.pt"))
    model_args = {
        "num_embeddings": tokenizer.num_embeddings,
        "seq_len": tokenizer.seq_len,
        "condition_vocabulary": condition.vocabulary,
        "condition_length": condition.length,
        "n_layer": 1,
        "n_head": 2,
        "n_embd": 16,
        "dropout": 0.1,
    }
    model = prior(**model_args)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    metadata = ABOUT | {
        "command": "python train_transformer.py --tokenizer vqvae/checkpoint.pt",
        "condition": condition.to_dict(),
        "condition_drop": condition_drop,
        "tokenizer": "vqvae/checkpoint.pt",
        "tokenizer_fingerprint": fingerprint(tokenizer),
    }
    save_checkpoint(
        folder / "checkpoint.pt", model=model, model_args=model_args,
        optimizers={"adamw": torch.optim.AdamW(model.parameters())}, batches=TrainLoader(images, 2),
        step=240, seconds=120.0, extra_state={"last": model}, metadata=metadata,
    )  # fmt: skip


def main(*model_args):
    with mock.patch.object(sys, "argv", ["vqgan", *map(str, model_args)]):
        runpy.run_module("vqgan", run_name="__main__")


def error_of(*model_args):
    with pytest.raises(SystemExit) as stopped:
        main(*model_args)
    assert isinstance(stopped.value.code, str) and "\n" not in stopped.value.code
    return stopped.value.code


def is_picture(path):
    return np.asarray(Image.open(path).convert("L")).std() > 5
