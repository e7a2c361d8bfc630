"""Two processes on half of a batch each are one process on the whole (gloo, on the CPU)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from scripts import wait_for

from vqgan import distributed, metrics
from vqgan.classifier import train_classifier
from vqgan.data import TrainLoader
from vqgan.discriminator import PatchDiscriminator, adaptive_weight, generator_loss
from vqgan.errors import InputError
from vqgan.files import write_json
from vqgan.masked import MaskedTransformer
from vqgan.training import Log
from vqgan.transformer import GPT
from vqgan.vae import VAE
from vqgan.vqvae import VQVAE
from vqgan.vqvae2 import VQVAE2

ROOT = Path(__file__).parents[1]
SMALL = {"num_hiddens": 8, "num_residual_hiddens": 4, "embedding_dim": 4, "num_embeddings": 16}
NARROW = {name: size for name, size in SMALL.items() if name != "embedding_dim"}
MODELS = {
    "ema": lambda: VQVAE(**SMALL, image_size=16),
    "gradient": lambda: VQVAE(**SMALL, image_size=16, quantizer="gradient"),
    "cosine": lambda: VQVAE(**SMALL, image_size=16, cosine=True),
    "simvq": lambda: VQVAE(**SMALL, image_size=16, quantizer="simvq"),
    "residual": lambda: VQVAE(**SMALL, image_size=16, quantizer="residual", num_rounds=2),
    "fsq": lambda: VQVAE(**NARROW | {"num_embeddings": 64}, image_size=16, quantizer="fsq"),
    "lfq": lambda: VQVAE(**NARROW, image_size=16, quantizer="lfq"),
    "few": lambda: VQVAE(**SMALL | {"num_embeddings": 512}, image_size=16),
    "vqvae2": lambda: VQVAE2(**SMALL, image_size=16),
    "vae": lambda: VAE(image_size=16, latent_dim=4, num_hiddens=4),
    "gpt": lambda: GPT(16, 12, 3, 1, n_layer=1, n_head=2, n_embd=8, dropout=0.0),
    "masked": lambda: MaskedTransformer(16, 12, 3, 1, n_layer=1, n_head=2, n_embd=8, dropout=0.0),
}
STEPS, BATCH_SIZE = 20, 8
PRIORS = ("gpt", "masked")


def loss_of(name, model, x):
    if name in PRIORS:
        return model.loss(x[:, :1] % 3, x[:, 1:])
    output = model(x)
    if name == "vae":
        return output.loss / 256
    return F.mse_loss(output.reconstruction, x) + output.loss


def train(name):
    """Gradients and codebook after the first step, losses of all, and the last weights."""
    torch.manual_seed(0)
    model = MODELS[name]().train()
    if name in PRIORS:
        data = torch.randint(16, (32, 13), generator=torch.Generator().manual_seed(1))
        order = torch.randperm(32, generator=torch.Generator().manual_seed(2)).view(-1, BATCH_SIZE)
        batches = [distributed.part(data[row]) for row in order]
    else:
        images = torch.randint(256, (32, 3, 16, 16), generator=torch.Generator().manual_seed(1))
        loader = TrainLoader(images.to(torch.uint8), BATCH_SIZE)
        batches = [batch for _ in range(STEPS // len(loader) + 1) for batch in loader]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    distributed.average_gradients([optimizer])
    result = {"losses": []}
    for step in range(STEPS):
        loss = loss_of(name, model, batches[step % len(batches)])
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            result["gradients"] = {n: p.grad.clone() for n, p in model.named_parameters()}
            result["first"] = {n: b.clone() for n, b in model.named_buffers()}
        optimizer.step()
        result["losses"].append(distributed.mean(loss.detach()))
    result["weights"] = {n: w for n, w in model.state_dict().items() if isinstance(w, torch.Tensor)}
    return result


def weight_of_the_adversary():
    """Lambda of a batch, each process with its part."""
    torch.manual_seed(0)
    last_layer = torch.nn.Conv2d(3, 3, 3, padding=1)
    discriminator = PatchDiscriminator(32, 4)
    x = distributed.part(torch.rand(4, 3, 32, 32))
    x_hat = last_layer(x)
    adversarial = generator_loss(discriminator(x_hat), "hinge")
    weight = adaptive_weight(F.mse_loss(x_hat, x), adversarial, last_layer.weight, maximum=1e4)
    return {"lambda": weight.detach()}


def classifier():
    """What a classifier has learned: weights, and the statistics that its eval mode uses."""
    images = torch.randint(256, (32, 3, 32, 32), generator=torch.Generator().manual_seed(1))
    labels = torch.arange(32) % 4
    loader = TrainLoader(images.to(torch.uint8), 8, labels=labels)
    options = {"num_classes": 4, "width": 4, "epochs": 1, "seed": 0, "name": "classifier"}
    where = {"device": torch.device("cpu"), "dtype": torch.float32}
    return train_classifier(loader, **options, **where).state_dict()


def nan_in_one_process(folder):
    """Whether each process stops when a loss of one is not a number."""
    log = Log(Path(folder) / "log.csv", resume_at=0)
    rank = dist.get_rank() if dist.is_initialized() else 1
    log.record(1, {"loss": torch.tensor(float("nan") if rank else 1.0)})
    try:
        log.write_row(epoch=1.0)
    except InputError:
        return True
    return False


def all_results(folder):
    with torch.random.fork_rng():
        results = {name: train(name) for name in MODELS} | {"lambda": weight_of_the_adversary()}
    indices = torch.tensor([[0, 1], [0, 1], [2, 3], [4, 3]])
    results["used"] = metrics.codes_used(distributed.part(indices), 8)
    results["classifier"] = classifier()
    results["nan"] = nan_in_one_process(folder)
    return results


def work(rank, folder):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.set_num_threads(1)
    torch.save(all_results(f"{folder}/{rank}"), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Of one process, and of each of two."""
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(work, (str(folder),), nprocs=2)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as theirs, because sums are rounded by their order
    alone = all_results(folder / "alone")
    torch.set_num_threads(threads)
    return alone, *(torch.load(folder / f"{rank}.pt") for rank in (0, 1))


@pytest.mark.parametrize("name", MODELS)
def test_the_first_step_is_that_of_one_process(name, results):
    one, two, _ = (result[name] for result in results)
    for part in ("gradients", "first"):
        for key, expected in one[part].items():
            size = expected.abs().max().item()
            torch.testing.assert_close(two[part][key], expected, rtol=1e-5, atol=1e-5 * size + 2e-7)


@pytest.mark.parametrize("name", MODELS)
def test_twenty_losses_are_those_of_one_process(name, results):
    one, two, _ = (torch.stack(result[name]["losses"]) for result in results)
    torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-5)
    assert len(one) == STEPS and one[-1] != one[0]


@pytest.mark.parametrize("name", MODELS)
def test_both_processes_have_the_same_weights_to_the_bit(name, results):
    _, first, second = (result[name]["weights"] for result in results)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_lambda_is_that_of_one_process(results):
    one, first, second = (result["lambda"]["lambda"] for result in results)
    torch.testing.assert_close(first, one, rtol=1e-5, atol=0)
    assert torch.equal(first, second)


def test_codes_of_the_whole_batch_are_counted(results):
    assert [result["used"].item() for result in results] == [5, 5, 5]


def test_processes_share_a_classifier_with_its_statistics(results):
    _, first, second = (result["classifier"] for result in results)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert any("running" in key for key in first)


def test_a_loss_that_is_no_number_in_one_process_stops_all(results):
    assert all(result["nan"] for result in results)


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        write_json(tmp_path / f"{rank}.json", {})
    assert [path.name for path in tmp_path.iterdir()] == ["0.json"]


def test_one_process_is_left_alone():
    x = torch.rand(4, 3)
    assert distributed.num_processes() == 1 and distributed.is_main()
    for function in (distributed.part, distributed.whole, distributed.total, distributed.mean):
        assert function(x) is x
    assert torch.equal(distributed.rows(x, torch.tensor([2, 0])), x[[2, 0]])
    assert distributed.start(torch.device("cpu")) == torch.device("cpu")


# --- the script --------------------------------------------------------------------------------

FLAGS = ["--data", "shapes", "--num-rendered", "100", "--limit", "32", "--models", "vqvae"]
FLAGS += ["--epochs", "2", "--checkpoint-every", "2", "--device", "cpu", "--precision", "fp32"]


def start_torchrun(*flags):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    command += ["2", str(ROOT / "train_vqvae.py"), *map(str, flags)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, **pipes)


def torchrun(*flags):
    process = start_torchrun(*flags)
    stdout, stderr = process.communicate(timeout=300)
    return subprocess.CompletedProcess(flags, process.returncode, stdout, stderr)


def test_a_run_of_two_processes_resumes_and_writes_once(tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "out"
    flags = [*FLAGS, "--batch-size", "8"]
    done = torchrun(*flags, "--out", whole)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("metrics.json, logs, checkpoints and figures are in") == 1
    # Stopped in the middle of an epoch, after the checkpoint of step 2 of 4.
    process = start_torchrun(*flags, "--out", out)
    wait_for(lambda: (out / "checkpoint.pt").exists(), process)
    process.terminate()
    process.communicate()
    assert torchrun("--resume", "--out", out).returncode == 0
    first, second = (torch.load(path / "checkpoint.pt")["weights"] for path in (whole, out))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert '"processes": 2' in (whole / "metrics.json").read_text()
    # One process goes on, and says so.
    command = [sys.executable, str(ROOT / "train_vqvae.py"), "--resume", "--epochs", "3"]
    alone = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True)
    assert "trained by 2 processes so far, and now by 1" in alone.stdout, alone.stderr


def test_a_batch_that_cannot_be_shared_is_one_line(tmp_path):
    done = torchrun(*FLAGS, "--batch-size", "7", "--out", tmp_path / "run")
    assert done.returncode != 0
    assert done.stderr.count("error: batch_size=7: give a multiple of 2, the processes") == 1
