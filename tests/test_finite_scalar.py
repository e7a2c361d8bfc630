import math

import pytest
import torch
from vector_quantize_pytorch import FSQ as PeerFSQ
from vector_quantize_pytorch import LFQ as PeerLFQ

from vqgan.codebooks import make_quantizer
from vqgan.finite_scalar import FSQ, FSQ_LEVELS, LFQ


def z(D, *, scale=1.0, size=(2, 5, 4)):
    return scale * torch.randn(size[0], D, *size[1:])


# --- both ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "quantizer",
    [*(FSQ(levels) for K, levels in FSQ_LEVELS.items() if K <= 4096), FSQ([2, 3]), FSQ([1000])]
    + [LFQ(2**bits) for bits in range(1, 13)],
    ids=lambda quantizer: f"{type(quantizer).__name__}{quantizer.num_embeddings}",
)
def test_each_index_is_one_code_and_each_code_one_index(quantizer):
    """A code's index is its own, whatever lies between: lookup, and quantizing what it gives."""
    K = quantizer.num_embeddings
    indices = torch.arange(K).view(1, 1, K)
    codes = quantizer.lookup(indices)  # (1, D, 1, K)
    assert len(codes[0, :, 0].T.unique(dim=0)) == K and codes.abs().max() <= 1
    if isinstance(quantizer, FSQ):  # the inverse of the bound, whose value at a code is the code
        L = quantizer.levels[None, :, None, None]
        half = (L - 1) * (1 + quantizer.epsilon) / 2
        offset = torch.where(L % 2 == 0, 0.5, 0.0)
        codes = torch.atanh((codes * (L // 2) + offset) / half) - torch.atanh(offset / half)
    assert torch.equal(quantizer(codes).indices, indices)


@pytest.mark.parametrize("quantizer", [FSQ([8, 5, 3]), LFQ(64)])
def test_the_lookup_of_the_indices_is_what_was_quantized(quantizer):
    z_e = z(quantizer.embedding_dim, scale=3)
    z_q, indices, _ = quantizer.eval()(z_e)
    assert z_q.shape == z_e.shape and indices.shape == (2, 5, 4)
    assert torch.allclose(quantizer.lookup(indices), z_q, atol=1e-6)


@pytest.mark.parametrize("quantizer", [FSQ([8, 5, 3]), LFQ(64)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_the_indices_of_the_same_numbers(quantizer, dtype):
    z_e = z(quantizer.embedding_dim).to(dtype)
    expected = quantizer(z_e.float()).indices
    with torch.autocast("cpu", torch.bfloat16):
        z_q, indices, loss = quantizer(z_e)
    assert torch.equal(indices, expected) and z_q.dtype == loss.dtype == torch.float32
    half = make_quantizer("fsq", 512, 1, levels=[8, 5, 3]).to(dtype)
    assert half(z_e[:, :3]).z_q.dtype == half.lookup(expected % 120).dtype == dtype


def test_indices_and_shapes_that_do_not_fit_are_refused():
    for quantizer in (FSQ([3, 3]), LFQ(8)):
        K, D = quantizer.num_embeddings, quantizer.embedding_dim
        for bad in (-1, K):
            with pytest.raises(ValueError, match=f"0 to {K - 1}.*{bad}"):
                quantizer.lookup(torch.tensor([[[0, bad]]]))
        with pytest.raises(ValueError, match=rf"\(B, {D}, h, w\)"):
            quantizer(z(D + 1))


# --- FSQ -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [[8, 8, 8], [8, 5, 5, 5], [7, 5, 5, 5, 5], [3, 4]])
def test_fsq_is_that_of_vector_quantize_pytorch(levels):
    ours, peer, z_e = FSQ(levels), PeerFSQ(levels), z(len(levels), scale=2)
    z_q, indices, loss = ours(z_e)
    peer_z_q, peer_indices = peer(z_e)
    assert torch.equal(indices, peer_indices.long()) and loss == 0
    assert torch.allclose(z_q, peer_z_q, atol=1e-6)


@pytest.mark.parametrize("L", [2, 3, 8])
def test_the_gradient_of_fsq_is_that_of_its_bound(L):
    z_e = z(1).requires_grad_()
    FSQ([L])(z_e).z_q.sum().backward()
    half = (L - 1) * 1.001 / 2
    shift = math.atanh(0.5 / half) if L % 2 == 0 else 0.0
    expected = half * (1 - torch.tanh(z_e + shift) ** 2) / (L // 2)
    assert torch.allclose(z_e.grad, expected, rtol=1e-3, atol=1e-6)


def test_zero_is_a_code_of_fsq_and_large_numbers_are_the_outermost():
    quantizer = FSQ([8, 5])
    assert (quantizer(torch.zeros(1, 2, 1, 1)).z_q == 0).all()
    for sign, expected in ((1, [0.75, 1.0]), (-1, [-1.0, -1.0])):
        z_q = quantizer(torch.full((1, 2, 1, 1), sign * 100.0)).z_q.flatten()
        assert torch.allclose(z_q, torch.tensor(expected))


def test_the_presets_are_near_what_they_are_named_by():
    for K, levels in FSQ_LEVELS.items():
        assert abs(math.prod(levels) / K - 1) < 0.08
        assert make_quantizer("fsq", K, 64).num_embeddings == math.prod(levels)


@pytest.mark.parametrize("levels", [[], [8, 1], [1001], [0], [8] * 9])
def test_levels_that_cannot_be_are_refused(levels):
    with pytest.raises(ValueError, match="levels="):
        FSQ(levels)


# --- LFQ -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 4, 7])
def test_the_loss_of_lfq_is_that_of_vector_quantize_pytorch(bits):
    """With the same temperature. (The peer's first dimension is the highest bit.)"""
    ours = LFQ(2**bits, beta=0.25)
    ours.temperature = 2.0
    peer = PeerLFQ(dim=bits, commitment_loss_weight=0.25, entropy_loss_weight=0.1)
    z_e = z(bits, scale=0.5).requires_grad_()
    found = ours(z_e)
    expected = peer.train()(z_e.flip(1), inv_temperature=1 / 2.0)
    assert torch.equal(found.indices, expected.indices.long())
    assert torch.allclose(found.z_q, expected.quantized.flip(1))
    assert found.loss.item() == pytest.approx(expected.entropy_aux_loss.item(), abs=1e-5)
    gradients = [torch.autograd.grad(loss, z_e)[0] for loss in (found.loss, expected[2])]
    assert torch.allclose(*gradients, atol=1e-6)


@pytest.mark.parametrize("bits", [1, 2, 5])
def test_the_entropies_of_lfq_by_a_table_of_all_codes(bits):
    quantizer = LFQ(2**bits, beta=0.0)
    quantizer.entropy_weight, quantizer.temperature = 1.0, 1.5
    z_e = z(bits, scale=0.3)
    codes = quantizer.lookup(torch.arange(2**bits).view(1, 1, -1))[0, :, 0].T  # (K, D)
    vectors = z_e.permute(0, 2, 3, 1).reshape(-1, bits)
    p = torch.softmax(-torch.cdist(vectors, codes).square() / 1.5, dim=1)  # (N, K)
    entropy = -(p * p.log()).sum(dim=1).mean()
    mean_entropy = -(p.mean(dim=0) * p.mean(dim=0).log()).sum()
    assert quantizer(z_e).loss.item() == pytest.approx((entropy - mean_entropy).item(), abs=1e-5)


def test_the_gradient_of_the_loss_of_lfq_by_finite_differences():
    quantizer, z_e = LFQ(16), (0.5 + z(4).abs()).double().requires_grad_()
    quantizer.double()
    quantizer.as_vectors = lambda z: z.permute(0, 2, 3, 1).reshape(-1, 4)  # in float64
    quantizer.signs = quantizer.signs.double()
    torch.autograd.gradcheck(lambda z: quantizer(z).loss, z_e, eps=1e-6, atol=1e-5)


def test_the_entropy_term_separates_vectors_that_are_alike():
    """All vectors near one corner: following the gradient of the entropies, they spread."""
    quantizer = LFQ(16, beta=0.0)
    quantizer.entropy_weight, quantizer.temperature = 1.0, 1.0
    z_e = (0.1 + 0.05 * torch.randn(1, 4, 8, 8)).requires_grad_()
    optimizer = torch.optim.SGD([z_e], lr=2.0)
    used = []
    for _ in range(200):
        output = quantizer(z_e)
        used.append(len(output.indices.unique()))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    assert used[0] < 8 and used[-1] == 16


def test_a_far_vector_gives_finite_losses():
    z_e = torch.full((1, 12, 2, 2), 1e4).requires_grad_()
    quantizer = LFQ(2**12)
    quantizer.temperature = 0.01
    loss = quantizer(z_e).loss
    loss.backward()
    assert loss.isfinite() and z_e.grad.isfinite().all()


@pytest.mark.parametrize("K", [0, 1, 6, 100, 2**25])
def test_numbers_of_codes_that_are_no_power_of_two_are_refused(K):
    with pytest.raises(ValueError, match=f"num_embeddings={K}.*power of two"):
        LFQ(K)
