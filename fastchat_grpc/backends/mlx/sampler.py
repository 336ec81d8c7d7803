"""How the next token of one sequence is chosen in MLX, in the order of the contract."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from fastchat_grpc.core import SamplingParams
from fastchat_grpc.text.batch import Running
from fastchat_grpc.text.seeds import splitmix64
from fastchat_grpc.text.tokenizer import Tokenizer


def raw_logprobs(logits: Any) -> Any:
    """Log probabilities of each row of logits, in fp32."""
    import mlx.core as mx

    logits = logits.astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


class Chooser:
    """One sequence's logits processors and sampler, as mlx-lm calls them: once each per token, in order.

    mlx-lm computes a token ahead of what it has handed out, so raw log probabilities wait here for their token.
    The draw depends on the seed and the token's place alone: a sequence may be resumed elsewhere without a seam.
    """

    def __init__(self, running: Running, tokenizer: Tokenizer, draws: StepSampler) -> None:
        request = running.job.request
        self._sampling = request.sampling
        self._seed = running.seed
        self._prompt_length = running.prompt_length
        self._start = len(running.token_ids)
        self._place = self._start - running.prompt_length
        self._min_length = self._start + running.min_tokens
        self._ends = sorted({*request.stopping.stop_token_ids, *tokenizer.eos_token_ids})
        self._raw: deque[Any] | None = deque() if request.output.logprobs is not None else None
        self._draws = draws
        self.processors: Sequence[Callable[[Any, Any], Any]] = [self._process] if self._processes else []
        self.sampler: StepSampler | None = None if self._sampling.greedy else draws
        """None: mlx-lm's own, which takes the likeliest of a whole batch at once."""

    def take_raw(self) -> Any:
        """Raw log probabilities at the place of the token that was handed out last; (vocabulary,)."""
        assert self._raw is not None
        return raw_logprobs(self._raw.popleft())[0]

    def filter(self, logprobs: Any) -> Any:
        """Log probabilities of (1, vocabulary), with -inf for what top-p, top-k and min-p leave out."""
        return _filtered(logprobs, self._sampling) if self.filters else logprobs

    @property
    def filters(self) -> bool:
        """Whether `filter` changes anything."""
        return self._sampling.truncates

    def draw_key(self) -> tuple[int, int]:
        """MLX's random key of the next draw: 64 bits of the seed and the place."""
        self._place += 1
        return divmod(splitmix64(self._seed, self._place), 2**32)

    @property
    def _processes(self) -> bool:
        sampling = self._sampling
        return (
            not sampling.greedy
            or self._raw is not None
            or self._min_length > self._start
            or bool(sampling.logit_bias)
            or sampling.penalizes
        )

    def _process(self, tokens: Any, logits: Any) -> Any:
        """`tokens` are all so far, the prompt's included; logits: (1, vocabulary)."""
        import mlx.core as mx

        sampling = self._sampling
        if not sampling.greedy:
            self._draws.expect(self)
        if self._raw is not None:
            self._raw.append(logits)
        logits = logits.astype(mx.float32)
        if tokens.shape[0] < self._min_length:
            logits[:, mx.array(self._ends)] = -mx.inf
        if sampling.logit_bias:
            ids, biases = list(sampling.logit_bias), list(sampling.logit_bias.values())
            logits = logits.at[:, mx.array(ids)].add(mx.array(biases))
        if sampling.penalizes:
            logits = self._penalize(tokens, logits)
        return logits / sampling.temperature if sampling.scales else logits

    def _penalize(self, tokens: Any, logits: Any) -> Any:
        import mlx.core as mx

        sampling = self._sampling
        if sampling.repetition_penalty != 1:
            seen = logits[:, tokens]
            penalty = sampling.repetition_penalty
            logits[:, tokens] = mx.where(seen > 0, seen / penalty, seen * penalty)
        made = tokens[self._prompt_length :]
        if made.shape[0] and (sampling.presence_penalty or sampling.frequency_penalty):
            counts = mx.zeros((logits.shape[-1],)).at[made].add(1.0)
            logits = logits - sampling.frequency_penalty * counts - sampling.presence_penalty * (counts > 0)
        return logits


class StepSampler:
    """Draws the next tokens of a step's sequences. One for all of a generator, as mlx-lm calls a shared one once.

    mlx-lm hands it the rows of every sequence together, or row by row where others of the step are greedy, but not
    whose they are. Processors run before it, in the same order, and say so by `expect`.
    """

    def __init__(self) -> None:
        self._expected: deque[Chooser] = deque()

    def expect(self, chooser: Chooser) -> None:
        """The next row is this sequence's."""
        self._expected.append(chooser)

    def __call__(self, logprobs: Any) -> Any:
        """One token for each row of (sequences, vocabulary), which depends on its row and key alone (Gumbel-max)."""
        import mlx.core as mx

        choosers = [self._expected.popleft() for _ in range(logprobs.shape[0])]
        logprobs = logprobs.astype(mx.float32)
        if any(chooser.filters for chooser in choosers):
            rows = [chooser.filter(logprobs[n : n + 1]) for n, chooser in enumerate(choosers)]
            logprobs = mx.concatenate(rows, axis=0)
        keys = mx.array([chooser.draw_key() for chooser in choosers], dtype=mx.uint32)
        noise = mx.vmap(lambda key: mx.random.gumbel((logprobs.shape[-1],), key=key))(keys)
        return mx.argmax(logprobs + noise, axis=-1)


def _filtered(logprobs: Any, sampling: SamplingParams) -> Any:
    """Log probabilities of (1, vocabulary), with -inf for tokens that top-p, top-k or min-p leave out."""
    import mlx.core as mx

    order = mx.argsort(-logprobs, axis=-1)
    ranked = mx.take_along_axis(logprobs, order, axis=-1)
    keep = mx.ones(ranked.shape, dtype=mx.bool_)
    if sampling.top_p < 1:
        probabilities = mx.softmax(ranked, axis=-1)
        before = mx.cumsum(probabilities, axis=-1) - probabilities
        keep = before < sampling.top_p
    if sampling.top_k > 0:
        keep = keep & (mx.arange(ranked.shape[-1]) < sampling.top_k)
    if sampling.min_p > 0:
        keep = keep & (ranked >= ranked[:, :1] + mx.log(mx.array(sampling.min_p)))
    keep = mx.logical_or(keep, mx.arange(ranked.shape[-1]) == 0)
    return mx.put_along_axis(logprobs, order, mx.where(keep, ranked, -mx.inf), axis=-1)
