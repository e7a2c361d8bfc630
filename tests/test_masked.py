import itertools
import math

import pytest
import torch
from priors import CONDITIONS, K, N, data, make, seeded

from vqgan import masked
from vqgan.masked import MaskedTransformer, random_masks, remaining_masks
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
    monkeypatch.setattr(masked, "random_masks", lambda *args: mask)
    p = model(condition, torch.where(mask, model.mask_token, tokens)).softmax(dim=2)
    losses = [-p[b, i, tokens[b, i]].log() for b, i in mask.nonzero().tolist()]
    torch.testing.assert_close(model.loss(condition, tokens).double(), sum(losses) / len(losses))


def test_only_masked_tokens_have_a_gradient(monkeypatch):
    model, (condition, tokens) = make_masked(), data()
    mask = torch.zeros(3, N, dtype=torch.bool)
    mask[:, 5] = True
    monkeypatch.setattr(masked, "random_masks", lambda *args: mask)
    seen = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda *args: seen.append(forward(*args)) or seen[0])
    loss = model.loss(condition, tokens)
    (gradient,) = torch.autograd.grad(loss, seen)
    assert torch.equal((gradient != 0).any(dim=2), mask)


@pytest.mark.parametrize(("schedule", "mean"), [("cosine", 2 / math.pi), ("uniform", 0.5)])
def test_schedules_mask_these_shares(schedule, mean, monkeypatch):
    model, counts = make_masked(mask_schedule=schedule), []
    monkeypatch.setattr(
        masked, "random_masks", lambda numbers, m: counts.append(m) or random_masks(numbers, m)
    )
    torch.manual_seed(0)
    model.loss(*data(B=4000))
    counts = counts[0].double()
    assert counts.min() >= 1 and counts.max() == N
    expected = mean * N + 0.5  # rounded up
    assert abs(counts.mean().item() - expected) < 5 * N * 0.31 / math.sqrt(4000)


def test_every_choice_of_positions_is_as_likely():
    numbers = torch.rand(12_000, 4, generator=seeded())
    masks = random_masks(numbers, torch.full((12_000,), 2))
    chosen, counts = masks.long().unique(dim=0, return_counts=True)
    assert len(chosen) == 6 and (chosen.sum(dim=1) == 2).all()  # all pairs of four positions
    assert abs(counts / 12_000 - 1 / 6).max() < 5 * math.sqrt(5 / 36 / 12_000)


def test_the_uniform_schedule_trains_the_bound():
    model, (condition, tokens) = make_masked(mask_schedule="uniform"), data()
    torch.manual_seed(1)
    loss = model.loss(condition, tokens)
    torch.manual_seed(1)
    assert torch.equal(loss, model.nats_per_token(condition, tokens).mean())


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
    generator = seeded()
    parts = [
        model.nats_per_token(c, t, generator)
        for c, t in zip(condition.split(2), tokens.split(2), strict=True)
    ]
    torch.testing.assert_close(
        torch.cat(parts), model.nats_per_token(condition, tokens, seeded()), rtol=1e-6, atol=0
    )
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


@pytest.mark.parametrize("steps", range(1, N + 1))
def test_no_mask_is_left_after_any_number_of_rounds(steps):
    model, (condition, tokens) = make_masked(), data(B=4)
    given = torch.where(torch.arange(N) < torch.tensor([[0], [1], [7], [N]]), tokens, -1)
    sampled = model.sample(condition, given=given, steps=steps, generator=seeded())
    assert sampled.min() >= 0 and sampled.max() < K
    assert torch.equal(sampled[given >= 0], given[given >= 0])


@pytest.mark.parametrize("steps", [1, 2, 5, N])
def test_every_round_keeps_one_token_at_least_and_the_last_all(steps):
    missing = torch.tensor([N, 5, 1, 0])
    left = [missing]
    for step in range(steps):
        done = (torch.full((4,), step + 1.0) / missing.clamp(1, steps).double()).clamp(max=1)
        left.append(remaining_masks(missing, left[-1], done))
    kept = -torch.stack(left).diff(dim=0)
    assert (kept >= (torch.stack(left[:-1]) > 0)).all() and (left[-1] == 0).all()


def test_the_schedule_of_the_rounds_by_hand():
    left, missing = torch.tensor([64]), torch.tensor([64])
    for t in range(1, 9):
        left = remaining_masks(missing, left, torch.tensor([t / 8]).double())
        assert left.item() == (math.floor(64 * math.cos(math.pi / 2 * t / 8)) if t < 8 else 0)


class Fixed(MaskedTransformer):
    """The same logits (K,) at every position, whatever is masked; it remembers what it read."""

    def __init__(self, logits, seq_len=8):
        super().__init__(len(logits), seq_len, 1, 1, n_layer=1, n_head=1, n_embd=4)
        self.logits, self.read = logits, []

    def forward(self, condition, tokens):
        self.read.append(tokens.clone())
        return self.logits.expand(*tokens.shape, -1)


NOTHING = torch.zeros(4000, 1, dtype=torch.int64)


@pytest.mark.parametrize(("scale", "lowest", "highest"), [(0.0, 0.999, 1.0), (1e4, 0.7, 0.8)])
def test_noise_decides_the_order_and_confidence_without_it(scale, lowest, highest):
    """Of two kinds of tokens, 3 in 4 and 1 in 4, the first round keeps one of eight."""
    model = Fixed(torch.tensor([3.0, 1.0]).log())
    model.sample(NOTHING, steps=8, choice_temperature=scale, generator=seeded())
    first = model.read[1]  # what is known after the first round
    known = first[first != model.mask_token]
    assert len(known) == len(NOTHING)
    assert lowest <= (known == 0).double().mean() <= highest


def test_noise_is_gumbels_and_ends_with_the_rounds():
    """In the first of two rounds s is half the scale. Of a likely and an unlikely token, of
    probabilities p and q, it keeps the likely one in p^(1/s) / (p^(1/s) + q^(1/s)) of all cases.
    """
    model, p, q = Fixed(torch.tensor([3.0, 1.0]).log(), seq_len=2), 0.75, 0.25
    model.sample(NOTHING, steps=2, choice_temperature=2.0, generator=seeded())
    first = model.read[1]
    kept = first[first != model.mask_token]  # one of each pair
    expected = p**2 + 2 * p * q * p / (p + q)  # both are likely, or one of them
    assert abs((kept == 0).double().mean() - expected) < 5 * 0.37 / math.sqrt(len(NOTHING))
    # In the last round there is no noise left: one token is masked, and it is kept.
    assert len(model.read) == 2


def test_rounds_draw_their_own_numbers():
    """Tokens of equal logits are independent of each other and of the round that kept them."""
    model = Fixed(torch.zeros(2))
    sampled = model.sample(NOTHING, steps=8, generator=seeded()).double()
    correlation = torch.corrcoef(sampled.T) - torch.eye(8)
    assert correlation.abs().max() < 5 / math.sqrt(len(NOTHING))
    assert (sampled.mean(dim=0) - 0.5).abs().max() < 5 * 0.5 / math.sqrt(len(NOTHING))


def test_a_token_that_is_masked_again_is_drawn_anew():
    """So unlikely tokens, which are masked again first, get rarer with every round."""
    model, p = Fixed(torch.tensor([2.0, 0.0])), 1 / (1 + math.exp(-2))
    once, often = (model.sample(NOTHING, steps=n, generator=seeded()) for n in (1, 8))
    assert abs((once == 0).double().mean() - p) < 0.01
    assert (often == 0).double().mean() > p + 0.03


def test_settings_reach_the_tokens():
    model, (condition, _) = make_masked(), data()
    greedy = model.sample(condition, temperature=0, generator=seeded())
    assert torch.equal(model.sample(condition, top_k=1, generator=seeded()), greedy)
    assert torch.equal(model.sample(condition, top_p=1e-6, generator=seeded()), greedy)
    hot = Fixed(torch.tensor([2.0, 0.0]))
    for temperature, settings in ((1.0, {}), (2.0, {"temperature": 2.0})):
        sampled = hot.sample(NOTHING, steps=1, generator=seeded(), **settings)  # nothing is redrawn
        share = (sampled == 0).double().mean()
        expected = 1 / (1 + math.exp(-2 / temperature))
        assert abs(share - expected) < 5 * 0.5 / math.sqrt(8 * len(NOTHING))


def test_guidance_by_hand():
    model, (condition, tokens) = make_masked(), data()
    masks = torch.full_like(tokens, model.mask_token)
    conditioned, null = model(condition, masks), torch.full_like(condition, model.null_token)
    guided = model(null, masks) + 2.5 * (conditioned - model(null, masks))
    sampled = model.sample(condition, steps=1, temperature=0, guidance=2.5)
    assert torch.equal(sampled, guided.argmax(dim=2))


def test_given_tokens_stay_even_if_logits_are_not_numbers():
    model = Fixed(torch.full((5,), torch.nan))
    given = torch.where(torch.arange(8) < 4, 3, -1).expand(2, -1)
    sampled = model.sample(torch.zeros(2, 1, dtype=torch.int64), given=given, steps=3)
    assert (sampled[:, :4] == 3).all()


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


def test_a_sequence_fills_round_by_round():
    model, (condition, tokens) = make_masked(), data()
    given = tokens.clone()
    given[:, 3:] = -1
    settings = {"given": given, "steps": 4}
    steps = list(model.sample_progressive(condition, generator=seeded(), **settings))
    last = model.sample(condition, generator=seeded(), **settings)
    kept = []
    model.sample(condition, generator=seeded(), progress=kept.append, **settings)
    assert [int((step >= 0).sum()) for step in steps] == [sum(kept[: i + 1]) for i in range(4)]
    for step in [given, *steps]:
        assert torch.equal(step, torch.where(step < 0, -1, last))
    assert torch.equal(steps[-1], last)


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
        ({"steps": N + 1}, "steps=13: give 1 to 12"),
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
    with pytest.raises(ValueError, match="tokens must lie in 0 to 10"):
        model.loss(condition, tokens + K)
    with pytest.raises(ValueError, match="mask_schedule=none: give one of cosine, uniform"):
        make_masked(mask_schedule="none")
    assert not issubclass(MaskedTransformer, GPT)
