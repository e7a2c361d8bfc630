"""What a device has to do right, with a tiny model of every kind.

    python -m pytest -m device --device cuda

Without the option it is the CPU. A new model is tested as soon as it is in `MODELS`.
"""

import copy
import inspect
import os
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from vqgan.codebooks import make_quantizer
from vqgan.data import ImageDataset
from vqgan.device import autocast, choose_device, has_fused_optimizers, prepare_model
from vqgan.pretrained import MODELS
from vqgan.training import Run, Session
from vqgan.transformer import GPT, Prior

# cuBLAS adds in the same order every time only if this is set before its first use.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

pytestmark = pytest.mark.device

K, D, SIDE, N = 32, 8, 16, 16  # codes, their dimensions, pixels, tokens
SIZES = {
    "image_size": SIDE, "resolution": SIDE, "latent_dim": D, "num_hiddens": 16,
    "num_residual_hiddens": 8, "channels": 8, "latent_channels": D, "embedding_dim": D,
    "num_embeddings": K, "seq_len": N, "condition_vocabulary": 5, "condition_length": 1,
    "n_layer": 2, "n_head": 2, "n_embd": 16,
}  # fmt: skip


# Beside "ema", the default.
QUANTIZER_ARGS: dict[str, dict] = {
    "gradient": {},
    "fsq": {"levels": [8, K // 8]},
    "lfq": {},
    "simvq": {"gradient_estimator": "rotation"},
    "residual": {"num_rounds": 2},
}


def kinds():
    """Every model with those of SIZES that it takes; a VQ-VAE once with each quantizer."""
    for name, model_class in MODELS.items():
        arguments = inspect.signature(model_class).parameters
        model_args = {key: value for key, value in SIZES.items() if key in arguments}
        yield pytest.param((model_class, model_args), id=name)
        for quantizer, options in QUANTIZER_ARGS.items():
            if name == "VQVAE" or (quantizer == "gradient" and "quantizer" in arguments):
                others = model_args | {"quantizer": quantizer} | options
                yield pytest.param((model_class, others), id=f"{name}-{quantizer}")


@pytest.fixture(autouse=True)
def one_thread():
    """Networks as small as these wait longer for a second thread than it saves."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def device(request):
    return choose_device(request.config.getoption("--device"))


@pytest.fixture(params=kinds())
def kind(request):
    model_class, model_args = request.param
    try:
        inspect.signature(model_class).bind(**model_args)
    except TypeError as error:
        pytest.skip(f"SIZES does not build a {model_class.__name__}: {error}")
    return request.param


@pytest.fixture
def x():
    return torch.rand(8, 3, SIDE, SIDE) * 2 - 1


def build(kind, device):
    """The same weights on every device."""
    model_class, model_args = kind
    torch.manual_seed(0)
    return prepare_model(model_class(**model_args), device, compile=False)


def as_tokens(x):
    """Conditions (B, 1) and tokens (B, N) that are made of pixels, to train a prior with."""
    tokens = ((x.float().flatten(1)[:, :N] + 1) / 2 * (K - 1)).round().long()
    return tokens[:, :1] % SIZES["condition_vocabulary"], tokens


def is_prior(model):
    return isinstance(model, Prior)


def training_loss(model, x):
    if is_prior(model):
        return model.loss(*as_tokens(x))
    output = model(x)
    return F.mse_loss(output.reconstruction.float(), x) + output.loss


@torch.no_grad()
def outputs(model, x):
    """What the networks compute: logits, or what the encoder gives, and an image of given latents.

    (The latents are given, since a rounding may choose another code, and so another image.)
    """
    if is_prior(model):
        return [model(*as_tokens(x)).float()]
    latent = torch.randn(model.encode(x)[0].shape, generator=torch.Generator().manual_seed(0))
    return [model.encoder(x).float(), model.decode(latent.to(x)).float()]


def relative_error(a, b):
    return ((a.cpu() - b.cpu()).norm() / b.cpu().norm()).item()


# --- models ------------------------------------------------------------------------------------


def test_a_forward_pass_gives_finite_values_of_the_right_shape(kind, device, x):
    model, x = build(kind, device).eval(), x.to(device)
    if is_prior(model):
        assert model(*as_tokens(x)).shape == (len(x), N, K) and training_loss(model, x).isfinite()
        return
    output = model(x)
    assert output.reconstruction.shape == x.shape and output.reconstruction.isfinite().all()
    assert output.loss.shape == () and output.loss.isfinite()
    if hasattr(model, "quantizer"):
        assert output.indices.min() >= 0 and output.indices.max() < K
        decoded = model.decode_indices(output.indices)
        assert relative_error(decoded, output.reconstruction) < 1e-4


def test_float32_is_that_of_the_cpu_in_float64(kind, device, x):
    model = build(kind, device).eval()
    reference = copy.deepcopy(model).to("cpu").double()
    for ours, exact in zip(
        outputs(model, x.to(device)), outputs(reference, x.double()), strict=True
    ):
        # On CUDA convolutions use TF32, whose 10 bits are off by up to 0.05% in every layer.
        assert ours.shape == exact.shape
        assert relative_error(ours, exact) < (1e-2 if device.type == "cuda" else 1e-5)


def test_bfloat16_is_close_to_float32(kind, device, x):
    model, x = build(kind, device).eval(), x.to(device)
    with autocast(device, torch.bfloat16):
        rounded = outputs(model, x)
    for ours, exact in zip(rounded, outputs(model, x), strict=True):
        # Its 7 bits are off by up to 0.4% in every layer; were it 0, autocast would do nothing.
        assert 1e-4 < relative_error(ours, exact) < 5e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_reach_all_parameters(kind, device, x, dtype):
    model, x = build(kind, device), x.to(device)
    with autocast(device, dtype):
        loss = training_loss(model, x)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        # A bias of all keys adds the same to each logit of a query, which the softmax ignores.
        assert parameter.grad.any() or name.endswith(".k.bias"), name


class Stopped(Exception):
    """In place of a kill."""


def train(kind, run, stop=None):
    """Train as the scripts do; returns the weights."""
    model = build(kind, run.device)
    fused = has_fused_optimizers(run.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=fused)
    parts = {"model_args": kind[1], "optimizers": {"adam": optimizer}, "loader": run.loader(8)}
    session = Session(run, run.out, model=model, **parts)
    for step, x in session:
        if step == stop:
            raise Stopped
        with autocast(run.device, run.dtype):
            loss = training_loss(model, x)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        session.log({"loss": loss})
    return model.state_dict()


def test_a_stopped_and_resumed_training_is_the_unstopped_one(kind, device, tmp_path):
    """Bit for bit, which shows a wrong random state or a lost moment better than a tolerance.

    On CUDA `index_add_` and the gradients of convolutions and attention add in any order, and so
    two runs differ, stopped or not. torch's deterministic algorithms fix that order.
    """
    images = torch.randint(0, 256, (24, 3, SIDE, SIDE), dtype=torch.uint8)
    run = Run(
        out=tmp_path / "whole",
        data=ImageDataset(images, images[:5], None, None, ()),
        variance=0.25,
        device=device,
        dtype=torch.bfloat16,
        epochs=3,
        seed=4,
        flip=True,
        checkpoint_every=4,
        resume=False,
        metadata={"data": "noise", "image_size": SIDE, "command": "python train.py"},
    )
    stopped = replace(run, out=tmp_path / "stopped")
    torch.use_deterministic_algorithms(True)
    try:
        expected = train(kind, run)
        with pytest.raises(Stopped):
            train(kind, stopped, stop=6)
        weights = train(kind, replace(stopped, resume=True))
    finally:
        torch.use_deterministic_algorithms(False)
    assert weights.keys() == expected.keys()
    assert not [name for name in weights if not torch.equal(weights[name], expected[name])]


# --- quantizers --------------------------------------------------------------------------------


@pytest.fixture
def tf32():
    """Rounded matrix multiplications, which a script may allow and the search must not use."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["ema", "gradient"])
def test_a_quantizer_searches_and_learns_in_float32(name, device, dtype, tf32):
    """Under autocast too, and against the equations in float64 on the CPU."""
    K, D, beta, gamma = 512, 16, 0.25, 0.99
    options = {"beta": beta, "data_init": False}
    options |= {"restart_dead_codes": False} if name == "ema" else {}
    quantizer = make_quantizer(name, K, D, **options).to(device)
    with torch.no_grad():
        quantizer.codebook.normal_()
        if name == "ema":
            quantizer.ema_sums.copy_(quantizer.codebook)
    e = quantizer.codebook.detach().cpu().double()
    z_e = torch.randn(8, D, 16, 16).to(device, dtype).requires_grad_()
    upstream = torch.randn(8, D, 16, 16).to(device)
    with autocast(device, torch.bfloat16):
        z_q, indices, loss = quantizer(z_e)
    ((z_q * upstream).sum() + loss).backward()

    vectors = z_e.detach().cpu().double().permute(0, 2, 3, 1).flatten(0, 2)  # (2048, D)
    indices = indices.cpu().flatten()
    distances = torch.cdist(vectors, e, compute_mode="donot_use_mm_for_euclid_dist").square()
    excess = distances.gather(1, indices[:, None])[:, 0] - distances.min(dim=1).values
    assert excess.max() < 1e-4  # the nearest code, or one as near to within float32

    counts = torch.bincount(indices, minlength=K).double()
    sums = torch.zeros_like(e).index_add_(0, indices, vectors)
    if name == "ema":
        n, m = gamma + (1 - gamma) * counts, gamma * e + (1 - gamma) * sums  # eq. 6 and 7
        smoothed = (n + 1e-5) / (n.sum() + K * 1e-5) * n.sum()
        assert relative_error(quantizer.codebook, m / smoothed[:, None]) < 1e-5
    else:
        gradient = 2 / vectors.numel() * (counts[:, None] * e - sums)
        assert relative_error(quantizer.codebook.grad, gradient) < 1e-5
    # Straight-through: the gradient of z_q, and that of the commitment.
    commitment = 2 * beta / vectors.numel() * (vectors - e[indices])
    expected = upstream.cpu() + commitment.view(8, 16, 16, D).permute(0, 3, 1, 2)
    assert relative_error(z_e.grad, expected) < (1e-5 if dtype == torch.float32 else 5e-3)


# --- priors ------------------------------------------------------------------------------------


def test_a_seed_samples_the_same_tokens_as_on_the_cpu(device):
    """But for rare ones: a number that falls on the border of two tokens takes either."""
    arguments = inspect.signature(GPT).parameters
    reference = GPT(**{name: size for name, size in SIZES.items() if name in arguments}).eval()
    with torch.no_grad():
        for parameter in reference.parameters():  # far from uniform
            parameter.add_(0.3 * torch.randn_like(parameter))
    condition = torch.randint(SIZES["condition_vocabulary"], (64, 1))
    model = copy.deepcopy(reference).to(device)
    generators = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    tokens = model.sample(condition.to(device), generator=generators[0]).cpu()
    chunks = [reference.sample(part, generator=generators[1]) for part in condition.split(16)]
    # By sequence, since a token changes all that follow.
    assert (tokens == torch.cat(chunks)).all(dim=1).float().mean() > 0.95
    assert len(tokens.unique(dim=0)) > 32
