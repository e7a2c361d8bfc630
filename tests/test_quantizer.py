import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from vector_quantize_pytorch import VectorQuantize

from vqgan import quantizer as quantizer_module
from vqgan.codebooks import make_quantizer
from vqgan.quantizer import EMAVectorQuantizer, VectorQuantizer, nearest_indices

BOTH = pytest.mark.parametrize("kind", [VectorQuantizer, EMAVectorQuantizer])


def make(kind, K=16, D=4, **kwargs):
    """A quantizer whose codes are far apart, and do not start from data."""
    quantizer = kind(K, D, data_init=False, **kwargs)
    with torch.no_grad():
        quantizer.codebook.copy_(torch.randn(K, D))
    if kind is EMAVectorQuantizer:
        quantizer.ema_sums.copy_(quantizer.codebook)
    return quantizer


# --- the search --------------------------------------------------------------------------------


def test_nearest_codes_by_brute_force(monkeypatch):
    vectors, codebook = torch.randn(300, 8), torch.randn(50, 8)
    expected = torch.cdist(vectors.double(), codebook.double()).argmin(dim=1)
    assert torch.equal(nearest_indices(vectors, codebook), expected)
    monkeypatch.setattr(quantizer_module, "MAX_DISTANCES_CPU", 7 * 50)  # in chunks of 7 vectors
    assert torch.equal(nearest_indices(vectors, codebook), expected)


@BOTH
def test_codes_are_the_nearest_and_indices_their_places(kind):
    quantizer, z_e = make(kind).eval(), torch.randn(2, 4, 5, 3)
    z_q, indices, _ = quantizer(z_e)
    assert z_q.shape == (2, 4, 5, 3) and indices.shape == (2, 5, 3) and indices.dtype == torch.int64
    for b, i, j in ((0, 0, 0), (1, 4, 2), (0, 3, 1)):
        distances = (z_e[b, :, i, j] - quantizer.codebook).square().sum(dim=1)
        assert indices[b, i, j] == distances.argmin()
    assert torch.allclose(z_q, quantizer.lookup(indices), atol=1e-6)


@BOTH
def test_half_precision_input_is_searched_in_float32(kind):
    """Codes that bfloat16 cannot tell apart are told apart under autocast."""
    quantizer = make(kind, K=64, D=2).eval()
    with torch.no_grad():
        quantizer.codebook.copy_(1 + torch.arange(128.0).view(64, 2) / 512)
    z_e = quantizer.codebook.detach().T.reshape(1, 2, 8, 8).clone()
    with torch.autocast("cpu", torch.bfloat16):
        z_q, indices, loss = quantizer(z_e)
    assert torch.equal(indices.flatten(), torch.arange(64))
    assert z_q.dtype == loss.dtype == torch.float32


@BOTH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_precision_are_searched_in_float32_too(kind, dtype):
    """These codes are exact in all precisions, their squared distances in float32 only."""
    codebook = 1 + torch.arange(128.0).view(64, 2) / 128
    quantizer = make(kind, K=64, D=2).eval()
    with torch.no_grad():
        quantizer.codebook.copy_(codebook)
    z_e = codebook.T.reshape(1, 2, 8, 8).to(dtype)
    z_q, indices, loss = quantizer.to(dtype)(z_e)
    assert torch.equal(indices.flatten(), torch.arange(64))
    assert z_q.dtype == quantizer.lookup(indices).dtype == dtype and loss.dtype == torch.float32
    assert torch.allclose(z_q, quantizer.lookup(indices), atol=1e-2) and loss < 1e-6


LOWER_PRECISION = """
import torch
from vqgan.quantizer import nearest_indices

def precision():
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
        return [backend.fp32_precision for backend in backends]
    return torch.get_float32_matmul_precision()

def spy(*args, **kwargs):
    seen.append(precision())
    return addmm(*args, **kwargs)

seen, addmm, torch.addmm = [], torch.addmm, spy
{setting}
before = precision()
nearest_indices(torch.randn(40, 8), torch.randn(16, 8))
assert seen in (["highest"], [["ieee", "ieee"]]), seen  # during the search
assert precision() == before, precision()  # and after it, what the script has set
"""


@pytest.mark.parametrize(
    "setting",
    [
        "torch.set_float32_matmul_precision('medium')",  # bfloat16 inside, where there is hardware
        "torch.backends.cuda.matmul.allow_tf32 = True",
        "torch.backends.fp32_precision = 'tf32'",  # the settings of torch 2.9, which do not mix
        "torch.backends.mkldnn.matmul.fp32_precision = 'bf16'",
    ],
)
def test_a_lower_matmul_precision_does_not_reach_the_search(setting):
    """Asked at the product itself: not every processor computes otherwise when it is allowed to.

    In a process of its own, since torch's two ways of setting it exclude each other.
    """
    if "fp32_precision" in setting and not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        pytest.skip("this torch has no such setting")
    code = LOWER_PRECISION.format(setting=setting)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@BOTH
def test_memory_layout_does_not_matter(kind):
    quantizer, z_e = make(kind).eval(), torch.randn(2, 4, 5, 3)
    last = z_e.contiguous(memory_format=torch.channels_last)
    assert torch.equal(quantizer(z_e).indices, quantizer(last).indices)


# --- losses and gradients ----------------------------------------------------------------------


@BOTH
def test_the_decoders_gradient_reaches_the_encoder_unchanged(kind):
    quantizer, z_e = make(kind), torch.randn(2, 4, 3, 3, requires_grad=True)
    weights = torch.randn(2, 4, 3, 3)
    (quantizer(z_e).z_q * weights).sum().backward()
    assert torch.equal(z_e.grad, weights)


@BOTH
def test_beta_multiplies_the_commitment_whose_gradient_reaches_the_encoder(kind):
    """With the codebook frozen, d loss / d z_e = beta * 2 (z_e - e) / number of elements."""
    gradients = []
    for beta in (0.25, 1.0):
        torch.manual_seed(3)
        quantizer = make(kind, beta=beta)
        z_e = torch.randn(2, 4, 3, 3, requires_grad=True)
        out = quantizer.eval()(z_e)
        (gradient,) = torch.autograd.grad(out.loss, z_e)
        code = quantizer.lookup(out.indices).detach()
        assert torch.allclose(gradient, beta * 2 * (z_e - code) / z_e.numel(), atol=1e-7)
        gradients.append(gradient)
    assert torch.allclose(4 * gradients[0], gradients[1])


def test_the_codebook_gets_its_gradient_from_the_codebook_term_alone():
    """d loss / d e_k = sum over the vectors that chose k of 2 (e_k - z) / number of elements."""
    for beta in (0.25, 1.0):
        torch.manual_seed(3)
        quantizer, z_e = make(VectorQuantizer, beta=beta), torch.randn(2, 4, 3, 3)
        out = quantizer(z_e)
        out.loss.backward()
        expected = torch.zeros(16, 4)
        vectors = z_e.permute(0, 2, 3, 1).reshape(-1, 4)
        for vector, k in zip(vectors, out.indices.flatten(), strict=True):
            expected[k] += 2 * (quantizer.codebook[k].detach() - vector) / z_e.numel()
        assert torch.allclose(quantizer.codebook.grad, expected, atol=1e-6)


def test_losses_by_hand():
    z_e = torch.randn(2, 4, 3, 3)
    for kind, weight in ((VectorQuantizer, 1 + 0.25), (EMAVectorQuantizer, 0.25)):
        quantizer = make(kind).eval()
        out = quantizer(z_e)
        mse = F.mse_loss(z_e, quantizer.lookup(out.indices))
        assert torch.allclose(out.loss, weight * mse)


def test_no_optimizer_can_move_the_ema_codebook():
    assert list(EMAVectorQuantizer(8, 4).parameters()) == []


# --- moving averages ---------------------------------------------------------------------------


def test_ema_update_by_hand():
    quantizer = make(
        EMAVectorQuantizer, K=3, D=2, decay=0.9, epsilon=1e-2, restart_dead_codes=False
    )
    counts, sums = quantizer.ema_counts.clone(), quantizer.ema_sums.clone()
    z_e = torch.randn(1, 2, 4, 4)
    indices = quantizer(z_e).indices.flatten()
    vectors = z_e.permute(0, 2, 3, 1).reshape(-1, 2)
    for k in range(3):
        chosen = vectors[indices == k]
        counts[k] = 0.9 * counts[k] + 0.1 * len(chosen)
        sums[k] = 0.9 * sums[k] + 0.1 * chosen.sum(dim=0)
    total = counts.sum()
    smoothed = (counts + 1e-2) / (total + 3 * 1e-2) * total
    assert torch.allclose(quantizer.codebook, sums / smoothed[:, None], atol=1e-6)
    # The averages themselves are not smoothed.
    assert torch.allclose(quantizer.ema_counts, counts) and torch.allclose(quantizer.ema_sums, sums)


def test_ema_is_that_of_vector_quantize_pytorch():
    ours = EMAVectorQuantizer(32, 8, decay=0.9, data_init=False, restart_dead_codes=False)
    theirs = VectorQuantize(dim=8, codebook_size=32, decay=0.9, accept_image_fmap=True)
    inner = theirs._codebook
    inner.embed.data.copy_(ours.codebook[None])
    inner.embed_avg.data.copy_(ours.codebook[None])
    for _ in range(5):
        z_e = torch.randn(4, 8, 6, 6)
        z_q, indices, _ = ours(z_e)
        their_z_q, their_indices, _ = theirs(z_e)
        assert torch.equal(indices, their_indices)
        assert torch.allclose(z_q, their_z_q, atol=1e-5)
    assert torch.allclose(ours.codebook, inner.embed[0], atol=1e-5)
    assert torch.allclose(ours.ema_counts, inner.cluster_size[0], atol=1e-5)


def test_an_unchosen_code_stays_where_it_is():
    """Without restarts, and from counts of one: no code flies away."""
    quantizer = EMAVectorQuantizer(8, 4, data_init=False, restart_dead_codes=False)
    start = quantizer.codebook.clone()
    far = 100 + torch.randn(2, 4, 4, 4)  # all of it chooses one code
    for _ in range(50):
        indices = quantizer(far).indices
    unchosen = [k for k in range(8) if k not in indices]
    assert len(unchosen) == 7
    assert torch.allclose(quantizer.codebook[unchosen], start[unchosen], rtol=1e-3, atol=1e-4)


@BOTH
def test_evaluation_changes_nothing(kind):
    quantizer = kind(16, 4).eval()
    before = {k: v.clone() for k, v in quantizer.state_dict().items() if torch.is_tensor(v)}
    quantizer(torch.randn(2, 4, 5, 5))
    assert not quantizer.initialized
    for name, value in before.items():
        assert torch.equal(quantizer.state_dict()[name], value)


# --- start from data, and restarts -------------------------------------------------------------


@BOTH
def test_codes_start_as_vectors_of_the_first_batch(kind):
    quantizer, z_e = kind(16, 4), torch.randn(2, 4, 5, 5)
    vectors = z_e.permute(0, 2, 3, 1).reshape(-1, 4)
    quantizer.init_from_batch(vectors)
    is_code = (vectors[:, None] == quantizer.codebook).all(dim=2)  # (50, 16)
    assert (is_code.sum(dim=0) == 1).all() and is_code.sum(dim=1).max() == 1  # no replacement


@BOTH
def test_fewer_vectors_than_codes_are_drawn_with_replacement_and_noise(kind):
    quantizer, vectors = kind(100, 4), torch.randn(10, 4)
    with pytest.warns(UserWarning, match="10 vectors for 100 codes"):
        quantizer.init_from_batch(vectors)
    assert torch.cdist(quantizer.codebook.detach(), vectors).min(dim=1).values.max() < 0.2
    assert len(quantizer.codebook.unique(dim=0)) == 100


@BOTH
def test_the_start_happens_once_and_is_part_of_the_state(kind):
    quantizer = kind(16, 4)
    quantizer(torch.randn(2, 4, 5, 5))
    resumed = kind(16, 4)
    resumed.load_state_dict(quantizer.state_dict())
    assert resumed.initialized
    far = 1000 + torch.randn(2, 4, 5, 5)
    resumed(far)
    assert resumed.codebook.max() < far.min()  # moved at most: a new start would be on the data


def is_initialized_again(quantizer):
    """Whether a training batch takes the codes' place: it is far away, where no average gets to."""
    far = 1000 + torch.randn(2, 4, 5, 5)
    return quantizer.train()(far) and quantizer.codebook.max() >= far.min()


@BOTH
@pytest.mark.parametrize("strict", [True, False])
def test_a_codebook_that_is_loaded_is_never_initialized_again(kind, strict):
    """Not even if the file says nothing about it, as one that somebody else wrote."""
    weights = make(kind).state_dict()
    del weights["_extra_state"]
    loaded = kind(16, 4)
    loaded.load_state_dict(weights, strict=strict)
    assert "_extra_state" not in weights  # the caller's own
    assert torch.equal(loaded.codebook, weights["codebook"])
    assert not is_initialized_again(loaded)
    inside = nn.ModuleDict({"quantizer": kind(16, 4)})
    weights = {f"quantizer.{name}": value for name, value in weights.items()}
    inside.load_state_dict(weights, strict=strict)
    assert not is_initialized_again(inside["quantizer"])


@BOTH
def test_without_a_codebook_or_with_one_that_waits_for_data_it_is_still_initialized(kind):
    weights = kind(16, 4).state_dict()
    for part in (weights, {}, {"ema_counts": torch.ones(16)}):
        loaded = kind(16, 4)
        loaded.load_state_dict(part, strict=False)
        assert is_initialized_again(loaded)


@BOTH
def test_earlier_files_say_in_a_dict_whether_the_codes_are_initialized(kind):
    for initialized in (True, False):
        loaded = kind(16, 4, data_init=initialized)
        weights = kind(16, 4).state_dict() | {"_extra_state": {"initialized": initialized}}
        loaded.load_state_dict(weights)
        assert loaded.initialized is initialized


@BOTH
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_state_consists_of_tensors_and_needs_no_waiting_for_the_device(kind, device):
    with torch.device(device):
        state = kind(16, 4).state_dict()
        assert all(torch.is_tensor(value) for value in state.values())
        assert state["_extra_state"].device.type == "cpu"
    assert state["codebook"].device.type == device


def test_a_codebook_that_comes_without_averages_stays_where_it_is():
    """As from a quantizer without them. Old averages would put the old codes back."""
    weights = make(VectorQuantizer).state_dict()
    loaded = EMAVectorQuantizer(16, 4, restart_dead_codes=False)
    with pytest.raises(RuntimeError, match="ema_sums"):
        loaded.load_state_dict(weights)
    loaded = EMAVectorQuantizer(16, 4, restart_dead_codes=False)
    loaded.load_state_dict(weights, strict=False)
    indices = loaded(100 + torch.randn(2, 4, 5, 5)).indices
    unchosen = [k for k in range(16) if k not in indices]
    assert len(unchosen) > 10
    assert torch.allclose(loaded.codebook[unchosen], weights["codebook"][unchosen], rtol=1e-3)


def test_dead_codes_restart_with_count_and_sum():
    """Codes far from all data are moved onto vectors of the batch, and stay there."""
    quantizer = make(EMAVectorQuantizer, K=8, D=4)
    quantizer.codebook[4:] += 1000
    quantizer.ema_sums.copy_(quantizer.codebook)
    quantizer.ema_counts[:4], quantizer.ema_counts[4:] = 10.0, 0.01
    quantizer.ema_sums[:4] *= 10
    quantizer.ema_sums[4:] *= 0.01
    z_e = torch.randn(2, 4, 5, 5)
    quantizer(z_e)
    vectors = z_e.permute(0, 2, 3, 1).reshape(-1, 4)
    assert torch.cdist(quantizer.codebook[4:], vectors).min(dim=1).values.max() < 0.01
    assert (quantizer.ema_counts[4:] > 1).all()
    ratio = quantizer.ema_sums / quantizer.ema_counts[:, None]
    assert torch.allclose(ratio, quantizer.codebook, atol=1e-3)
    quantizer(z_e)  # the next update does not throw them back
    assert quantizer.codebook.abs().max() < 10


def test_restarts_and_the_start_from_data_prevent_the_collapse():
    """Codes that start as noise far from the data collapse; either switch alone helps."""
    torch.manual_seed(0)
    data = 20 + torch.randn(4, 4, 16, 16)
    used = {}
    for data_init in (False, True):
        for restart_dead_codes in (False, True):
            quantizer = EMAVectorQuantizer(
                32, 4, data_init=data_init, restart_dead_codes=restart_dead_codes
            )
            for _ in range(100):
                indices = quantizer(data + 0.1 * torch.randn_like(data)).indices
            used[data_init, restart_dead_codes] = len(indices.unique())
    assert used[False, False] <= 3
    assert used[True, False] >= 25
    assert used[False, True] == used[True, True] == 32


# --- bad input ---------------------------------------------------------------------------------


@BOTH
def test_indices_outside_of_the_codebook_are_refused(kind):
    quantizer = kind(16, 4)
    for bad in (-1, 16):
        with pytest.raises(ValueError, match=f"0 to 15.*{bad}"):
            quantizer.lookup(torch.tensor([[[0, bad]]]))


@BOTH
def test_shapes_that_do_not_fit_are_refused(kind):
    with pytest.raises(ValueError, match=r"\(B, 4, h, w\).*\(2, 5, 3, 3\)"):
        kind(16, 4)(torch.randn(2, 5, 3, 3))


@pytest.mark.parametrize("name", ["ema", "gradient"])
def test_a_codebook_without_codes_or_dimensions_is_refused(name):
    assert isinstance(make_quantizer(name, 1, 1), VectorQuantizer | EMAVectorQuantizer)
    for sizes in ((0, 4), (4, 0)):
        with pytest.raises(ValueError, match="num_embeddings.*embedding_dim.*1"):
            make_quantizer(name, *sizes)
