"""Stage two, by filling in: a transformer predicts any tokens of an image from all the others.

Chang, Zhang, Jiang, Liu, Freeman, "MaskGIT: Masked Generative Image Transformer", 2022,
arXiv 2202.04200. The blocks are those of `GPT` without the causal mask, so each position sees the
whole image. What is to be predicted is hidden behind one more token, the mask:

    s                 tokens (B, N) of an image
    M                 the positions that are masked, m of N
    L = -mean_{i in M} log p(s_i | s without M, c)                                         (eq. 1)

Sampling starts with nothing but masks. Each of a few rounds predicts all masked tokens at once,
and keeps those that the model is most confident of. The others are masked again (section 3.2).

The price of an image cannot be read off as with a GPT, but bounded. If m is drawn uniformly from 1
to N, and then m of the positions, the loss is an unbiased estimate of

    -1/N E_order[log p(s | order, c)]  >=  -1/N log p(s | c)                  nats per token

where tokens are generated one by one in a random order (Hoogeboom et al. 2022, "Autoregressive
Diffusion Models", arXiv 2110.02037, section 3).
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from vqgan import distributed, sampling
from vqgan.quantizer import check_range
from vqgan.transformer import Prior

MASK_SCHEDULES = ("cosine", "uniform")
DEFAULT_STEPS = 10  # rounds of sampling; the paper takes 8 to 12


class MaskedTransformer(Prior):
    """Predicts masked tokens from all the others; see `Prior` for the sizes.

    Args:
        mask_schedule: how many tokens are masked in training. "uniform" draws m from 1 to N, which
            trains the bound on the likelihood itself. "cosine" masks a fraction cos(pi/2 u), with u
            uniform in [0, 1): more of them, as in the first rounds of sampling (section 3.3).

    Raises:
        ValueError: as `Prior`, and for a schedule that is not in `MASK_SCHEDULES`.
    """

    causal = False

    def __init__(
        self,
        num_embeddings: int,
        seq_len: int,
        condition_vocabulary: int,
        condition_length: int,
        n_layer: int = 6,
        n_head: int = 8,
        n_embd: int = 256,
        dropout: float = 0.1,
        mask_schedule: str = "cosine",
    ):
        sizes = (num_embeddings, seq_len, condition_vocabulary, condition_length)
        super().__init__(*sizes, n_layer, n_head, n_embd, dropout)
        if mask_schedule not in MASK_SCHEDULES:
            names = ", ".join(MASK_SCHEDULES)
            raise ValueError(f"mask_schedule={mask_schedule}: give one of {names}")
        self.mask_schedule = mask_schedule
        self.mask_token = num_embeddings  # is read, and never predicted

    # --- training -----------------------------------------------------------------------------

    def forward(self, condition: Tensor, tokens: Tensor) -> Tensor:
        """Predict every token from the condition and from all tokens.

        Args:
            condition: (B, C) int64, 0 to condition_vocabulary - 1, or `null_token`.
            tokens: (B, N) int64, 0 to K - 1, or `mask_token`.

        Returns:
            logits (B, N, K). They mean something where a token is masked.

        Raises:
            ValueError: other shapes, or ids out of range (on the CPU, as with a `GPT`).
        """
        self.check_condition(condition)
        if tokens.shape != (len(condition), self.seq_len):
            expected = (len(condition), self.seq_len)
            raise ValueError(f"tokens must be {expected}, not {tuple(tokens.shape)}")
        check_range(tokens, 0, self.mask_token, "tokens")
        x = self.forward_blocks(condition, tokens)  # (B, C + N, n_embd)
        return self.head(x[:, self.condition_length :])

    def loss(self, condition: Tensor, tokens: Tensor) -> Tensor:
        """The mean of -log p over the masked tokens, (); see `mask_schedule`."""
        if self.mask_schedule == "uniform":
            return self.nats_per_token(condition, tokens).mean()  # each image counts once
        numbers = self._uniform_numbers(tokens)  # (B, 1 + N)
        fraction = torch.cos(math.pi / 2 * numbers[:, 0])
        mask = random_masks(numbers[:, 1:], (self.seq_len * fraction).ceil())
        count = distributed.mean(mask.sum().float())
        return self._losses(condition, tokens, mask).sum() / count  # and here each token

    def nats_per_token(
        self, condition: Tensor, tokens: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """An unbiased estimate for each image, (B,), of an upper bound on -1/N log p.

        The mean over an image's m masked tokens, where m is uniform from 1 to N.

        Args:
            generator: one with the same seed gives the same masks, for any model of N tokens.
        """
        numbers = self._uniform_numbers(tokens, generator)  # (B, 1 + N)
        m = (self.seq_len * numbers[:, 0]).floor() + 1  # (B,), 1 to N
        mask = random_masks(numbers[:, 1:], m)
        return self._losses(condition, tokens, mask).sum(dim=1) / mask.sum(dim=1)

    def _uniform_numbers(self, tokens: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw what an image is masked by, (B, 1 + N) in [0, 1): how many tokens, and which."""
        if generator is not None:  # row by row, so that chunks do not matter
            size = (len(tokens), 1 + self.seq_len)
            return torch.rand(size, generator=generator, device=generator.device).to(tokens.device)
        B = distributed.num_processes() * len(tokens)
        return distributed.part(torch.rand(B, 1 + self.seq_len, device=tokens.device))

    def _losses(self, condition: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """-log p of the masked tokens given the others, (B, N), and 0 for those."""
        check_range(tokens, 0, self.num_embeddings - 1, "tokens")
        logits = self(condition, tokens.masked_fill(mask, self.mask_token)).float()  # (B, N, K)
        losses = F.cross_entropy(logits.transpose(1, 2), tokens, reduction="none")
        return losses * mask

    # --- sampling -----------------------------------------------------------------------------

    @torch.no_grad()
    def sample_progressive(
        self,
        condition: Tensor,
        *,
        given: Tensor | None = None,
        steps: int | None = None,
        choice_temperature: float = 4.5,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        guidance: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Iterator[Tensor]:
        """Generate sequences in a few rounds. The model's mode is left as it was.

        After round t of T, cos(pi/2 t/T) of the tokens that were missing at the start are masked
        again, those of the lowest confidence: the log-probability of the chosen token, plus Gumbel
        noise, whose scale falls from `choice_temperature` to 0. If fewer than T tokens are missing,
        there is a round for each of them.

        Args:
            given: (B, N) int64, tokens to keep, and -1 where one is to be generated. Every
                generated token sees all of them.
            steps: T, the number of rounds, 1 to N; None is `DEFAULT_STEPS`, or N if that is less.
            choice_temperature: 0 keeps the most confident tokens; a large one keeps any.
            the others: as in `GPT.sample_progressive`.

        Yields:
            tokens (B, N) int64 after every round: those that it kept, and -1 where none is yet.

        Raises:
            ValueError: other shapes, ids out of range, or a setting out of range.
        """
        B, N = len(condition), self.seq_len
        self.check_condition(condition)
        steps = min(DEFAULT_STEPS, N) if steps is None else steps
        sampling.check_sampling(
            self.num_embeddings, temperature, top_k, top_p, guidance, steps, choice_temperature
        )
        given = torch.full((B, N), -1) if given is None else given
        self.check_given(given, B)
        if steps > N:
            raise ValueError(f"steps={steps}: give 1 to {N}, the number of tokens")
        missing = (given < 0).sum(dim=1).cpu()  # (B,)
        rounds = missing.clamp(min=1, max=steps)  # T of each sequence
        # Two numbers for each round and token: one samples it, the other is for its confidence.
        uniform = sampling.uniform_numbers(steps * 2 * N, B, generator, condition.device)
        uniform = uniform.T.view(B, steps, 2, N)
        condition = self.with_unconditioned(condition, guidance)  # (B or 2 B, C)
        tokens = given.to(condition.device)
        tokens = tokens.masked_fill(tokens < 0, self.mask_token)
        masked = missing
        with sampling.eval_mode(self):
            for step in range(steps):
                is_masked = tokens == self.mask_token
                logits = self(condition, tokens.repeat(len(condition) // B, 1))
                logits = sampling.classifier_free_guidance(logits, guidance).flatten(0, 1)
                u, v = uniform[:, step].unbind(dim=1)  # (B, N) each
                chosen = sampling.sample_token(logits, u.flatten(), temperature, top_k, top_p)
                log_p = logits.log_softmax(dim=1).gather(1, chosen[:, None]).view(B, N)
                gumbel = -(-v.log()).clamp(min=1e-20).log()  # v = 1 would give infinity
                done = ((step + 1) / rounds.double()).clamp(max=1)  # (B,), t / T
                noise = choice_temperature * (1 - done)[:, None].to(log_p) * gumbel
                confidence = (log_p + noise).masked_fill(~is_masked, math.inf)
                tokens = torch.where(is_masked, chosen.view(B, N), tokens)
                rank = confidence.argsort(dim=1).argsort(dim=1)  # 0 for the least confident
                masked = remaining_masks(missing, masked, done)
                again = (rank < masked[:, None].to(rank)) & is_masked
                tokens = tokens.masked_fill(again, self.mask_token)
                yield tokens.masked_fill(again, -1)
                if not masked.any():
                    break


def random_masks(numbers: Tensor, m: Tensor) -> Tensor:
    """Choose m (B,) of N positions by random numbers (B, N), all choices alike: (B, N) bool."""
    rank = numbers.argsort(dim=1).argsort(dim=1)  # a random permutation in each row
    return rank < m[:, None]


def remaining_masks(missing: Tensor, masked: Tensor, done: Tensor) -> Tensor:
    """How many tokens are masked after a round, (B,) int64.

    cos(pi/2 t/T) of those that were missing, rounded down, and fewer than after the round before.

    Args:
        missing, masked: how many were masked at the start, and after the round before.
        done: t / T, up to 1, float64.
    """
    fraction = torch.cos(math.pi / 2 * done)  # 6e-17 after the last round
    return torch.minimum((missing * fraction).long(), masked - 1).clamp(min=0)
