"""Stage two: a transformer predicts a sequence of tokens, one after the other, under a condition.

Radford et al., "Language Models are Unsupervised Multitask Learners", 2019 (GPT-2), over the codes
of Esser, Rombach, Ommer 2021, arXiv 2012.09841, section 3.2, eq. 9 and 10:

    p(s | c) = prod_i p(s_i | s_<i, c)          L = -mean_i log p(s_i | s_<i, c)

s are the tokens of an image, the indices of its codes in the order that the tokenizer gives them
(`VQAutoencoder.tokens`). c is the condition: a few tokens before them, with a separate embedding
table (`conditions.py`). The network has K outputs, so it can generate no token of a condition.

Data flow, with C tokens of condition and N of the image, of which the last is only predicted:

    condition (B, C), tokens (B, N) -> x (B, C + N - 1, n_embd) -> blocks -> the same
    positions C - 1 to C + N - 2 -> head -> logits (B, N, K)

    position  0 ... C-1 | C     C+1   ...  C+N-2
    reads     condition | s_1   s_2   ...  s_N-1
    predicts  ...   s_1 | s_2   s_3   ...  s_N
"""

import math
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqgan import sampling
from vqgan.quantizer import check_range


class SelfAttention(nn.Module):
    """softmax(q k^T / sqrt(d) + mask) v in H heads of d = n_embd / H.

    Vaswani et al., "Attention Is All You Need", 2017, arXiv 1706.03762, section 3.2. (Here H is the
    number of heads, `n_head`, and not the height of an image as elsewhere.)

    Args:
        causal: a position sees those before it and itself; the mask is -inf for later positions.
            If not, it sees all positions, and there is no mask.
    """

    def __init__(self, n_embd: int, n_head: int, dropout: float, causal: bool):
        super().__init__()
        self.n_head, self.dropout, self.causal = n_head, dropout, causal
        self.qkv = nn.Linear(n_embd, 3 * n_embd)
        self.proj = nn.Linear(n_embd, n_embd)

    def forward(self, x: Tensor, cache: sampling.KeyValueCache | None = None) -> Tensor:
        """x (B, T, n_embd) -> the same. With a cache, x holds the T positions after those in it."""
        B, T, n_embd = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)  # (B, H, T, d)
        if cache is not None:
            k, v = cache.append(k, v)
        # With a cache, all positions come at once, or a single one that may see all before it.
        is_causal = self.causal and T > 1
        y = F.scaled_dot_product_attention(
            q, k, v, dropout_p=self.dropout if self.training else 0.0, is_causal=is_causal
        )  # (B, H, T, d)
        return self.proj(y.transpose(1, 2).reshape(B, T, n_embd))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): pre-norm, as in GPT-2."""

    def __init__(self, n_embd: int, n_head: int, dropout: float, causal: bool):
        super().__init__()
        self.norm1 = nn.LayerNorm(n_embd, eps=1e-5)
        self.attention = SelfAttention(n_embd, n_head, dropout, causal)
        self.norm2 = nn.LayerNorm(n_embd, eps=1e-5)
        self.mlp = nn.Sequential(
            nn.Linear(n_embd, 4 * n_embd),  # four times as wide inside, as in every GPT
            nn.GELU(),  # the exact one, x Phi(x), not the approximation by tanh
            nn.Linear(4 * n_embd, n_embd),
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, cache: sampling.KeyValueCache | None = None) -> Tensor:
        x = x + self.dropout(self.attention(self.norm1(x), cache))
        return x + self.dropout(self.mlp(self.norm2(x)))


class Prior(nn.Module):
    """A transformer over the tokens of an image: what `GPT` and `MaskedTransformer` share.

    Each is trained by `loss(condition, tokens)`, priced by `nats_per_token(condition, tokens)`, and
    generates with `sample(condition, ...)`, or with `sample_progressive` for all tokens so far.

    Args:
        num_embeddings: K, the size of the tokenizer's codebook.
        seq_len: N, the number of tokens of an image.
        condition_vocabulary: the number of different condition tokens, 0 to this - 1.
        condition_length: C, the number of tokens of a condition. It is at least 1, because a GPT
            predicts the first token of the image from the last of them.
        n_layer, n_head, n_embd: the number of blocks, the attention heads of each, and the width.
        dropout: the fraction of activations that are dropped in training.

    The embedding table of conditions has one more row, for the `null_token`, which replaces a
    condition that was dropped. Guidance needs it (see `sample`).

    Raises:
        ValueError: a size is below 1, or the heads do not divide the width.
    """

    causal: bool  # whether a position sees only those before it
    sample_progressive: Callable[..., Iterator[Tensor]]

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
    ):
        super().__init__()
        sizes = {"num_embeddings": num_embeddings, "seq_len": seq_len, "n_layer": n_layer}
        sizes |= {"condition_vocabulary": condition_vocabulary, "n_head": n_head, "n_embd": n_embd}
        sizes |= {"condition_length": condition_length}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, not {size}")
        if n_embd % n_head:
            raise ValueError(f"n_head={n_head} must divide n_embd={n_embd}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), not {dropout}")
        self.num_embeddings, self.seq_len, self.n_head = num_embeddings, seq_len, n_head
        self.condition_vocabulary, self.condition_length = condition_vocabulary, condition_length
        self.null_token = condition_vocabulary  # replaces a condition that was dropped

        self.cond_emb = nn.Embedding(condition_vocabulary + 1, n_embd)
        # What is read: a GPT never reads the last token, and a masked model also a mask token.
        num_read = condition_length + (seq_len - 1 if self.causal else seq_len)
        self.tok_emb = nn.Embedding(num_embeddings + (not self.causal), n_embd)
        # One row per position that is read; their number is the "block size" of other code.
        self.pos_emb = nn.Parameter(torch.empty(num_read, n_embd))
        self.dropout = nn.Dropout(dropout)
        blocks = (Block(n_embd, n_head, dropout, self.causal) for _ in range(n_layer))
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(n_embd, eps=1e-5)
        self.head = nn.Linear(n_embd, num_embeddings, bias=False)
        self._initialize(n_layer)

    def _initialize(self, n_layer: int) -> None:
        """Initialize as GPT-2: normal weights of deviation 0.02, biases of zero.

        Each of the 2 n_layer branches adds its variance to x, so the last weights of each branch
        are scaled by 1 / sqrt(2 n_layer) (Radford et al. 2019, section 2.3).
        """
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:  # the others are the norms' scales, which stay at one
                is_last_of_a_branch = name.endswith(("proj.weight", "mlp.2.weight"))
                shrink = 1 / math.sqrt(2 * n_layer) if is_last_of_a_branch else 1.0
                nn.init.normal_(parameter, std=0.02 * shrink)

    def parameter_groups(self, weight_decay: float) -> list[dict]:
        """Group parameters for AdamW: only the matrices of linear layers have weight decay.

        A row of an embedding table moves only when its token occurs, so decay would erase the rows
        of rare tokens.
        """
        matrices = [layer.weight for layer in self.modules() if isinstance(layer, nn.Linear)]
        chosen = {id(parameter) for parameter in matrices}
        others = [parameter for parameter in self.parameters() if id(parameter) not in chosen]
        decaying = {"params": matrices, "weight_decay": weight_decay}
        return [decaying, {"params": others, "weight_decay": 0.0}]

    def with_unconditioned(self, condition: Tensor, guidance: float) -> Tensor:
        """Append null tokens as conditions: (B, C) -> (2 B, C), or (B, C) for a scale of 1."""
        if guidance == 1:
            return condition
        return torch.cat([condition, torch.full_like(condition, self.null_token)])

    def forward_blocks(self, condition: Tensor, tokens: Tensor) -> Tensor:
        """Read a condition (B, C) and the T tokens after it: features (B, C + T, n_embd)."""
        x = torch.cat([self.cond_emb(condition), self.tok_emb(tokens)], dim=1)
        x = self.dropout(x + self.pos_emb[: x.shape[1]])
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def sample(
        self, condition: Tensor, *, progress: Callable[[int], None] | None = None, **settings: Any
    ) -> Tensor:
        """Generate sequences: the last tokens of `sample_progressive`, which has the settings.

        Args:
            condition: (B, C) int64.
            progress: called after every step with the number of new tokens, of all sequences. (The
                first counts those given, too.)

        Returns:
            tokens (B, N) int64, 0 to K - 1.
        """
        num_known = 0
        # Closed if the callback raises, so that the model is back in its mode.
        with closing(self.sample_progressive(condition, **settings)) as steps:  # type: ignore
            for tokens in steps:
                if progress is not None:
                    before, num_known = num_known, int((tokens >= 0).sum())
                    progress(num_known - before)
        return tokens

    def check_condition(self, condition: Tensor) -> None:
        """Raise `ValueError` for another shape than (B, C), or tokens out of range."""
        if condition.dim() != 2 or condition.shape[1] != self.condition_length:
            shape = tuple(condition.shape)
            raise ValueError(f"condition must be (B, {self.condition_length}), not {shape}")
        check_range(condition, 0, self.null_token, "tokens of a condition")

    def check_given(self, given: Tensor, batch_size: int) -> None:
        """Raise `ValueError` for another shape than (B, N), or tokens out of range."""
        if given.shape != (batch_size, self.seq_len):
            shape = (batch_size, self.seq_len)
            raise ValueError(f"given must be {shape}, not {tuple(given.shape)}")
        check_range(given.cpu(), -1, self.num_embeddings - 1, "given tokens")


class GPT(Prior):
    """Predicts each token from those before it; see `Prior` for the arguments."""

    causal = True

    # --- training -----------------------------------------------------------------------------

    def forward(self, condition: Tensor, tokens: Tensor) -> Tensor:
        """Predict every token from the condition and the tokens before it.

        Args:
            condition: (B, C) int64, 0 to condition_vocabulary - 1, or `null_token`.
            tokens: (B, T) int64, 0 to K - 1, 1 <= T <= N. The last is not read.

        Returns:
            logits (B, T, K); those of token i depend on the condition and on tokens 0 to i - 1.

        Raises:
            ValueError: other shapes, or ids out of range. (Ranges are checked on the CPU only,
                since every step would wait for a GPU. A GPU stops by itself, less clearly.)
        """
        return self.head(self.forward_features(condition, tokens))

    def forward_features(self, condition: Tensor, tokens: Tensor) -> Tensor:
        """The features that the head predicts each token from, (B, T, n_embd); see `forward`."""
        self.check_condition(condition)
        if tokens.dim() != 2 or len(tokens) != len(condition):
            raise ValueError(f"tokens must be ({len(condition)}, T), not {tuple(tokens.shape)}")
        if not 1 <= tokens.shape[1] <= self.seq_len:
            raise ValueError(f"{tokens.shape[1]} tokens were given: give 1 to {self.seq_len}")
        check_range(tokens, 0, self.num_embeddings - 1, "tokens")
        x = self.forward_blocks(condition, tokens[:, :-1])  # (B, C + T - 1, n_embd)
        return x[:, self.condition_length - 1 :]

    def loss(self, condition: Tensor, tokens: Tensor) -> Tensor:
        """The mean negative log-likelihood in nats per token, (); see `forward`."""
        logits = self(condition, tokens).float()  # (B, T, K)
        return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())

    def nats_per_token(
        self, condition: Tensor, tokens: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """The mean negative log-likelihood of each image, (B,); exact, so nothing is drawn."""
        logits = self(condition, tokens).float()  # (B, N, K)
        return F.cross_entropy(logits.transpose(1, 2), tokens, reduction="none").mean(dim=1)

    # --- sampling -----------------------------------------------------------------------------

    @torch.no_grad()
    def sample_progressive(
        self,
        condition: Tensor,
        *,
        given: Tensor | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        guidance: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Iterator[Tensor]:
        """Generate sequences token by token. The model's mode is left as it was.

        Every position is read once and its keys and values are cached, so a token costs the work of
        one position and not of all before it.

        Args:
            condition: (B, C) int64.
            given: (B, N) int64, tokens to keep, and -1 where one is to be generated. Each token
                sees those before it, given or generated. So a given beginning is continued, but
                tokens that are given further on were not foreseen by those before them.
            temperature: the divisor of the logits. Below 1 likely tokens get likelier, and at 0 the
                likeliest is always taken (greedy sampling, which looks gray and repetitive).
            top_k: sample from the k likeliest tokens only, 1 to K; None takes all.
            top_p: sample from the fewest likeliest tokens whose probabilities sum to at least p,
                in (0, 1]; None takes all. (Holtzman et al. 2020, arXiv 1904.09751, section 3.1.)
            guidance: the scale of classifier-free guidance (`sampling.classifier_free_guidance`). 1
                is none, 0 leaves the condition out, and more strengthens it. It takes a model that
                was trained with some of its conditions dropped, and twice the work.
            generator: the source of random numbers, on any device. One on the CPU gives the same
                first sequences for any B, and the same ones if they are sampled in chunks. None
                takes a new one, seeded by the operating system. The global random state is not
                touched.

        Yields:
            tokens (B, N) int64 after every position: 0 to K - 1, and -1 where none is yet. It is
            always the same tensor, which the next step fills further.

        Raises:
            ValueError: other shapes, ids out of range, or a setting out of range.
        """
        B, N = len(condition), self.seq_len
        self.check_condition(condition)
        sampling.check_sampling(self.num_embeddings, temperature, top_k, top_p, guidance)
        given = torch.full((B, N), -1) if given is None else given
        self.check_given(given, B)
        tokens = given.clone().to(condition.device)
        uniform = sampling.uniform_numbers(N, B, generator, condition.device)
        condition = self.with_unconditioned(condition, guidance)  # (B or 2 B, C)
        caches = self._new_caches(len(condition))
        with sampling.eval_mode(self):
            x = self.cond_emb(condition)  # (B or 2 B, C, n_embd)
            for i in range(N):
                logits = self._next_logits(x, caches)  # (B or 2 B, K)
                logits = sampling.classifier_free_guidance(logits, guidance)  # (B, K)
                token = sampling.sample_token(logits, uniform[i], temperature, top_k, top_p)  # (B,)
                tokens[:, i] = torch.where(tokens[:, i] < 0, token, tokens[:, i])
                x = self.tok_emb(tokens[:, i]).repeat(len(condition) // B, 1)[:, None]  # one
                yield tokens

    def _new_caches(self, batch_size: int) -> list[sampling.KeyValueCache]:
        """An empty cache for each block."""
        length, n_embd = self.pos_emb.shape
        shape = (batch_size, self.n_head, length, n_embd // self.n_head)
        return [sampling.KeyValueCache(*shape, like=self.pos_emb) for _ in self.blocks]

    def _next_logits(self, x: Tensor, caches: list[sampling.KeyValueCache]) -> Tensor:
        """Read the next T positions from the embeddings x (B, T, n_embd) of their tokens.

        Returns the logits (B, K) of the token that follows the last of them.
        """
        start = caches[0].length
        x = x + self.pos_emb[start : start + x.shape[1]]
        for block, cache in zip(self.blocks, caches, strict=True):
            x = block(x, cache)
        return self.head(self.norm(x[:, -1]))
