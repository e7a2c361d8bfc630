"""What the tests of priors and of sampling share: a tiny transformer, and loops without a cache."""

from types import SimpleNamespace

import torch

from vqgan.sampling import sample_sliding_window, sample_token, uniform_numbers
from vqgan.transformer import GPT

CPU = torch.device("cpu")
K, GRID, N, CONDITIONS = 11, (3, 4), 12, 5
TOKENIZER = SimpleNamespace(grids=[GRID])  # what a sliding window asks of one


def make(C=1, dtype=torch.float64, prior=GPT, **sizes):
    """A tiny transformer in eval mode, far enough from its start that everything has an effect."""
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "dropout": 0.0} | sizes
    model = prior(K, N, CONDITIONS, C, **sizes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.to(dtype).eval()


def data(C=1, B=3, N=12):
    return torch.randint(CONDITIONS, (B, C)), torch.randint(K, (B, N))


def seeded(seed=7):
    return torch.Generator().manual_seed(seed)


def sample_plainly(condition, next_logits, seed=7, given=None, **filters):
    """Twelve codes without a cache: next_logits(indices so far) gives the logits of the next."""
    uniform = uniform_numbers(12, len(condition), seeded(seed), CPU)
    indices = torch.zeros(len(condition), 0, dtype=torch.int64)
    for i in range(12):
        settings = {"temperature": 1.0, "top_k": None, "top_p": None} | filters
        code = sample_token(next_logits(indices), uniform[i], **settings)
        if given is not None:
            code = torch.where(given[:, i] < 0, code, given[:, i])
        indices = torch.cat([indices, code[:, None]], dim=1)
    return indices


def from_forward(model, condition):
    """next_logits for `sample_plainly`: a whole forward for each code."""

    def next_logits(indices):
        unread = torch.zeros(len(indices), 1, dtype=torch.int64)
        with torch.no_grad():
            return model(condition, torch.cat([indices, unread], dim=1))[:, -1]

    return next_logits


def large(model, condition, height, width, **settings):
    return sample_sliding_window(model, TOKENIZER, condition, height, width, **settings)


def samplers(model, condition):
    return (
        lambda **settings: model.sample(condition, **settings),
        lambda **settings: large(model, condition, 4, 4, **settings),
    )
