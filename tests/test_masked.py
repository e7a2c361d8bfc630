import itertools
import math

import pytest
import torch
from priors import CONDITIONS, K, N, data, make, seeded

from vqgan.masked import MaskedTransformer, remaining_masks
from vqgan.transformer import GPT


def make_masked(**sizes):
    return make(prior=MaskedTransformer, **sizes)


class KnownJoint(MaskedTransformer):
    """Its logits are the true conditionals of a joint distribution p of three tokens, (K, K, K)."""

    def __init__(self, p):
        super().__init__(len(p), 3, 1, 1, n_layer=1, n_head=1, n_embd=4)
        self.p = p

    def forward(self, condition, tokens):
        logits = []
        for row in tokens.tolist():
            is_known = [token != self.mask_token for token in row]
            # p with every known token fixed, (K or 1, ...)
            p = self.p
            for i, token in enumerate(row):
                p = p.narrow(i, token, 1) if is_known[i] else p
            others = [[j for j in range(3) if j != i] for i in range(3)]
            marginals = [p.sum(dim=o).expand(len(self.p)) for o in others]
            logits.append(torch.stack([(m / m.sum()).log() for m in marginals]))
        return torch.stack(logits)


# --- the network -------------------------------------------------------------------------------


@pytest.mark.parametrize("C", [1, 3])
def test_every_token_changes_the_logits_of_all_others(C):
    model, (condition, tokens) = make_masked(C=C), data(C)
    logits = model(condition, tokens)
    for i in range(N):
        changed = tokens.clone()
        changed[:, i] = (changed[:, i] + 1) % K
        assert (model(condition, changed) != logits).any(dim=2).all()  # also of earlier positions


def test_in_a_gpt_a_later_token_changes_no_earlier_prediction():
    model, (condition, tokens) = make(), data()
    changed = tokens.clone()
    changed[:, -2] = (changed[:, -2] + 1) % K
    same = (model(condition, changed) == model(condition, tokens)).all(dim=2)
    assert same[:, :-1].all() and not same[:, -1].any()


def test_the_mask_is_read_and_never_predicted():
    model, (condition, tokens) = make_masked(), data()
    masked = model(condition, torch.full_like(tokens, model.mask_token))
    assert masked.shape == (3, N, K) and model.head.out_features == K
    assert (masked != model(condition, tokens)).any()


def test_weights_of_both_priors_have_the_same_names():
    """And, but for a row for the mask and one for the last position, the same shapes."""
    ours, theirs = make_masked().state_dict(), make().state_dict()
    assert ours.keys() == theirs.keys()
    different = {name for name in ours if ours[name].shape != theirs[name].shape}
    assert different == {"tok_emb.weight", "pos_emb"}


# --- the loss and the price --------------------------------------------------------------------


def test_the_loss_by_hand(monkeypatch):
    model, (condition, tokens) = make_masked(), data()
    mask = torch.rand(3, N) < 0.5
    monkeypatch.setattr(model, "_random_mask", lambda *args: mask)
    p = model(condition, torch.where(mask, model.mask_token, tokens)).softmax(dim=2)
    losses = [-p[b, i, tokens[b, i]].log() for b, i in mask.nonzero().tolist()]
    torch.testing.assert_close(model.loss(condition, tokens).double(), sum(losses) / len(losses))


def test_only_masked_tokens_have_a_gradient(monkeypatch):
    model, (condition, tokens) = make_masked(), data()
    mask = torch.zeros(3, N, dtype=torch.bool)
    mask[:, 5] = True
    monkeypatch.setattr(model, "_random_mask", lambda *args: mask)
    seen = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda *args: seen.append(forward(*args)) or seen[0])
    loss = model.loss(condition, tokens)
    (gradient,) = torch.autograd.grad(loss, seen)
    assert torch.equal((gradient != 0).any(dim=2), mask)


@pytest.mark.parametrize(("schedule", "mean"), [("cosine", 2 / math.pi), ("uniform", 0.5)])
def test_schedules_mask_these_shares(schedule, mean, monkeypatch):
    model = make_masked(mask_schedule=schedule)
    counts = []
    random_mask = model._random_mask
    monkeypatch.setattr(
        model, "_random_mask", lambda m, *args: counts.append(m) or random_mask(m, *args)
    )
    torch.manual_seed(0)
    model.loss(*data(B=4000))
    counts = counts[0].double()
    assert counts.min() >= 1 and counts.max() == N
    expected = mean * N + 0.5  # rounded up
    assert abs(counts.mean().item() - expected) < 5 * N * 0.31 / math.sqrt(4000)


def test_every_choice_of_positions_is_as_likely():
    model = make_masked()
    masks = model._random_mask(torch.full((6000,), 2), seeded())
    assert (masks.sum(dim=1) == 2).all()
    share = masks.double().mean(dim=0)
    torch.testing.assert_close(share, torch.full_like(share, 2 / N), atol=0.025, rtol=0)


def test_the_estimate_of_the_bound_is_the_mean_over_all_masks():
    torch.manual_seed(0)
    model = MaskedTransformer(4, 3, CONDITIONS, 1, n_layer=1, n_head=1, n_embd=8, dropout=0)
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    condition, tokens = torch.zeros(1, 1, dtype=torch.int64), torch.tensor([[3, 0, 2]])
    bound = 0.0  # m uniform from 1 to 3, all masks of m positions alike
    for m in (1, 2, 3):
        for positions in itertools.combinations(range(3), m):
            mask = torch.zeros(1, 3, dtype=torch.bool)
            mask[0, list(positions)] = True
            loss = model._losses(condition, tokens, mask).sum() / m
            bound += loss.item() / 3 / math.comb(3, m)
    many = model.nats_per_token(condition.expand(20_000, -1), tokens.expand(20_000, -1), seeded())
    error = many.std().item() / math.sqrt(len(many))
    assert error > 0 and abs(many.mean().item() - bound) < 4 * error


def test_with_the_true_conditionals_the_bound_is_the_likelihood():
    torch.manual_seed(0)
    p = torch.rand(2, 2, 2).double() + 0.1
    model = KnownJoint(p / p.sum())
    grids = list(itertools.product(range(2), repeat=3))
    for tokens in grids[:3]:
        # The order-agnostic bound is tight: every order's product of conditionals is p.
        true = -model.p[tokens].log().item() / 3
        estimates = []
        for m in (1, 2, 3):
            for positions in itertools.combinations(range(3), m):
                mask = torch.zeros(1, 3, dtype=torch.bool)
                mask[0, list(positions)] = True
                losses = model._losses(torch.zeros(1, 1).long(), torch.tensor([tokens]), mask)
                estimates.append(losses.sum().item() / m / 3 / math.comb(3, m))
        assert sum(estimates) == pytest.approx(true, rel=1e-6)


def test_one_seed_estimates_with_the_same_masks():
    model, (condition, tokens) = make_masked(), data()
    first, second = (model.nats_per_token(condition, tokens, seeded()) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, model.nats_per_token(condition, tokens, seeded(8)))


def test_the_price_of_a_gpt_is_its_loss():
    model, (condition, tokens) = make(), data()
    nats = model.nats_per_token(condition, tokens)
    assert nats.shape == (3,)
    torch.testing.assert_close(nats.mean(), model.loss(condition, tokens))


# --- sampling ----------------------------------------------------------------------------------


def test_one_round_at_temperature_zero_is_the_argmax():
    model, (condition, tokens) = make_masked(), data()
    given = torch.where(torch.rand(3, N) < 0.5, tokens, -1)
    expected = model(condition, torch.where(given < 0, model.mask_token, given)).argmax(dim=2)
    sampled = model.sample(condition, given=given, steps=1, temperature=0)
    assert torch.equal(sampled, torch.where(given < 0, expected, given))


@pytest.mark.parametrize("steps", range(1, N + 3))
def test_no_mask_is_left_after_any_number_of_rounds(steps):
    model, (condition, tokens) = make_masked(), data(B=4)
    given = torch.where(torch.arange(N) < torch.tensor([[0], [1], [7], [N]]), tokens, -1)
    sampled = model.sample(condition, given=given, steps=steps, generator=seeded())
    assert sampled.min() >= 0 and sampled.max() < K
    assert torch.equal(sampled[given >= 0], given[given >= 0])


@pytest.mark.parametrize("steps", [1, 2, 5, N])
def test_every_round_keeps_one_token_at_least_and_the_last_all(steps):
    missing = torch.tensor([N, 5, 1, 0])
    rounds = torch.cat([missing[None], remaining_masks(missing, steps)])
    kept = -rounds.diff(dim=0)
    assert (kept >= (rounds[:-1] > 0)).all() and (rounds[-1] == 0).all()


def test_the_schedule_of_the_rounds_by_hand():
    by_hand = [[math.floor(64 * math.cos(math.pi / 2 * t / 8))] for t in range(1, 8)] + [[0]]
    assert remaining_masks(torch.tensor([64]), 8).tolist() == by_hand


def test_the_most_confident_tokens_are_kept(monkeypatch):
    """At temperature 0 and without noise: what is still masked in round two was less likely."""
    model, (condition, _) = make_masked(), data()
    seen, forward = [], model.forward
    monkeypatch.setattr(
        model, "forward", lambda *args: seen.append((args[1], forward(*args))) or seen[-1][1]
    )
    model.sample(condition, steps=2, temperature=0, choice_temperature=0)
    (_, logits), (second, _) = seen
    confidence = logits.softmax(dim=2).amax(dim=2)
    for row, still_masked in zip(confidence, second == model.mask_token, strict=True):
        assert still_masked.sum() == math.floor(N * math.cos(math.pi / 4))
        assert row[still_masked].max() <= row[~still_masked].min()


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_seed_gives_the_same_first_sequences_for_any_count_and_in_chunks(guidance):
    model, (condition, _) = make_masked(), data(B=5)
    settings = {"guidance": guidance, "steps": 4}
    whole = model.sample(condition, generator=seeded(), **settings)
    assert torch.equal(model.sample(condition[:2], generator=seeded(), **settings), whole[:2])
    generator = seeded()
    parts = [model.sample(part, generator=generator, **settings) for part in condition.split(2)]
    assert torch.equal(torch.cat(parts), whole)


def test_guidance_1_is_none_and_0_leaves_the_condition_out():
    model, (condition, _) = make_masked(), data()
    plain = model.sample(condition, generator=seeded())
    assert torch.equal(model.sample(condition, guidance=1, generator=seeded()), plain)
    null = torch.full_like(condition, model.null_token)
    unconditioned = model.sample(null, generator=seeded())
    assert torch.equal(model.sample(condition, guidance=0, generator=seeded()), unconditioned)
    assert not torch.equal(plain, unconditioned)


def test_progress_adds_up_and_the_mode_is_left_alone():
    model, (condition, _) = make_masked(dropout=0.5), data()
    model.train()
    kept = []
    model.sample(condition, steps=5, generator=seeded(), progress=kept.append)
    assert sum(kept) == 3 * N and len(kept) == 5 and model.training


def test_an_overfitted_transformer_gives_its_grids_back():
    torch.manual_seed(0)
    model = MaskedTransformer(K, N, 3, 1, n_layer=2, n_head=2, n_embd=32, dropout=0)
    condition, tokens = torch.arange(3)[:, None], torch.randint(K, (3, N))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(200):
        optimizer.zero_grad()
        model.loss(condition.repeat(8, 1), tokens.repeat(8, 1)).backward()
        optimizer.step()
    for steps in (1, 4, N):
        assert torch.equal(model.sample(condition, steps=steps, generator=seeded()), tokens)


# --- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"steps": 0}, "steps=0: give 1"),
        ({"choice_temperature": -1.0}, "choice_temperature=-1.0: give 0"),
        ({"temperature": -1.0}, "temperature"),
        ({"given": torch.zeros(2, N, dtype=torch.int64)}, "given must be"),
        ({"given": torch.full((3, N), K)}, "given tokens must lie in -1 to 10"),
    ],
)
def test_settings_out_of_range_are_refused(change, expected):
    model, (condition, _) = make_masked(), data()
    with pytest.raises(ValueError, match=expected):
        model.sample(condition, **change)


def test_tokens_that_do_not_fit_are_refused():
    model, (condition, tokens) = make_masked(), data()
    with pytest.raises(ValueError, match=r"tokens must be \(3, 12\)"):
        model(condition, tokens[:, :-1])
    with pytest.raises(ValueError, match="tokens must lie in 0 to 11"):
        model(condition, tokens + K)
    with pytest.raises(ValueError, match="mask_schedule=none: give one of cosine, uniform"):
        make_masked(mask_schedule="none")
    assert not issubclass(MaskedTransformer, GPT)
