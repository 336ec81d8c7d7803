"""Between our requests and vLLM's: parameters in, tokens and log probabilities out, errors and statistics."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from fastchat_grpc.backends import driver
from fastchat_grpc.backends.base import Steps
from fastchat_grpc.backends.driver import Piece
from fastchat_grpc.core import FinishReason, GenerateRequest, Grammar, GrammarKind, TokenLogprob
from fastchat_grpc.errors import BackendFailed, FastChatError, InvalidArgument, UnsupportedField, WorkerUnavailable
from fastchat_grpc.text.job import Job
from fastchat_grpc.text.tokenizer import Tokenizer

NO_OUTPUT = "vLLM cannot compile it, or no output can follow it"
MAX_TEMPERATURE = 2.0
"""vLLM refuses more."""
_FINISH_REASONS = {
    "stop": FinishReason.STOP,
    "length": FinishReason.LENGTH,
    "abort": FinishReason.ABORT,
    "repetition": FinishReason.STOP,
}
_GIVEN_UP = "error"


def sampling_parameters(
    job: Job, index: int, *, seed: int | None, stop_token_ids: Iterable[int], prompt_logprobs: int | None
) -> Any:
    """vLLM's SamplingParams for one choice. vLLM ends it at stop tokens and at its length; stop strings are ours."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    sampling, stopping = job.request.sampling.plain(), job.request.stopping
    try:
        return SamplingParams(
            temperature=0.0 if sampling.greedy else sampling.temperature,
            top_p=1.0 if sampling.greedy else sampling.top_p,
            top_k=max(sampling.top_k, 0),
            min_p=sampling.min_p,
            repetition_penalty=sampling.repetition_penalty,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            seed=seed,
            logit_bias=dict(sampling.logit_bias) or None,
            max_tokens=job.max_tokens(index),
            min_tokens=job.min_tokens(index),
            stop_token_ids=sorted({*stopping.stop_token_ids, *stop_token_ids}),
            ignore_eos=stopping.ignore_eos,
            logprobs=job.request.output.logprobs,
            prompt_logprobs=prompt_logprobs,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            structured_outputs=_structured_outputs(job.request.grammar),
            skip_clone=True,
        )
    except (TypeError, ValueError) as error:  # a wrong request is its caller's fault, not this worker's failure
        raise translated_refusal(error, job.request.grammar) from error


def prompt_logprobs(tokenizer: Tokenizer, job: Job, positions: Sequence[Any]) -> tuple[TokenLogprob, ...]:
    """Log probabilities of the prompt's tokens, from vLLM's list of them."""
    count = job.request.output.prompt_logprobs or 0
    pairs = zip(job.prompt_ids, positions, strict=False)
    return tuple(_logprob(tokenizer, token_id, position, count) for token_id, position in pairs)


class Statistics:
    """Load, as vLLM reports it after every step of its engine. Written and read on the event loop."""

    def __init__(self) -> None:
        self.kv_cache_usage = 0.0
        self.processed_tokens = 0
        self.preemptions = 0
        self.steps = Steps()
        """What vLLM tells of its steps: their tokens, and how many requests run. It does not say how long they take."""

    def logger(self) -> Any:
        """A factory of what vLLM calls a stat logger, writing here."""
        from vllm.v1.metrics.loggers import StatLoggerBase

        statistics = self

        class Logger(StatLoggerBase):  # type: ignore[misc]  # vLLM has no types here
            def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
                pass

            def record(self, scheduler_stats: Any, iteration_stats: Any, *args: Any, **kwargs: Any) -> None:
                statistics.record(scheduler_stats, iteration_stats)

            def log_engine_initialized(self) -> None:
                pass

        return Logger

    def record(self, scheduler: Any, iteration: Any) -> None:
        """One step of the engine."""
        if scheduler is not None:
            self.kv_cache_usage = float(scheduler.kv_cache_usage)
        if iteration is not None:
            # A step that only reads a part of a long prompt reports no tokens, but is progress.
            tokens = iteration.num_generation_tokens + iteration.num_prompt_tokens
            self.processed_tokens += max(1, tokens)
            self.preemptions += getattr(iteration, "num_preempted_reqs", 0)
            self.steps.tokens.observe(tokens)
            if scheduler is not None:
                self.steps.sequences.observe(scheduler.num_running_reqs)
        elif scheduler is not None and scheduler.num_running_reqs:
            self.processed_tokens += 1


def check_limits(request: GenerateRequest) -> None:
    """Refuse what vLLM would refuse, under the names of our fields."""
    sampling = request.sampling
    if sampling.temperature > MAX_TEMPERATURE:
        raise UnsupportedField(
            "sampling.temperature", f"vLLM allows at most {MAX_TEMPERATURE:g}, got {sampling.temperature:g}"
        )


def _structured_outputs(grammar: Grammar | None) -> Any:
    if grammar is None:
        return None
    from vllm.sampling_params import StructuredOutputsParams

    match grammar.kind:
        case GrammarKind.JSON_OBJECT:
            return StructuredOutputsParams(json_object=True)
        case GrammarKind.JSON_SCHEMA:
            return StructuredOutputsParams(json=grammar.source)
        case GrammarKind.REGEX:
            return StructuredOutputsParams(regex=grammar.source)
        case GrammarKind.LARK:
            return StructuredOutputsParams(grammar=grammar.source)


def piece(tokenizer: Tokenizer, request: GenerateRequest, output: Any) -> Piece:
    """What is new in a vLLM output of kind DELTA. Raises `given_up` of one that vLLM has ended with an error."""
    if output.finish_reason == _GIVEN_UP:
        raise given_up(request.grammar)
    token_ids = list(output.token_ids)
    logprobs: list[TokenLogprob] = []
    if request.output.logprobs is not None:
        count = request.output.logprobs
        logprobs = [
            _logprob(tokenizer, token_id, position, count)
            for token_id, position in zip(token_ids, output.logprobs, strict=True)
        ]
    reason = None if output.finish_reason is None else _FINISH_REASONS[output.finish_reason]
    return Piece(token_ids, logprobs, reason)


def _logprob(tokenizer: Tokenizer, token_id: int, position: Any, count: int) -> TokenLogprob:
    """vLLM's {token id: Logprob} of one place; the chosen token is always in it, its rank may exceed `count`."""
    if position is None:
        return driver.token_logprob(tokenizer, token_id, None)
    ranked = sorted((entry.rank, other, entry.logprob) for other, entry in position.items() if entry.rank <= count)
    top = [(other, logprob) for _, other, logprob in ranked]
    return driver.token_logprob(tokenizer, token_id, position[token_id].logprob, top)


def given_up(grammar: Grammar | None) -> FastChatError:
    """The error of a request that vLLM has ended, for which it gives no reason. Of one with a grammar that is the
    grammar: vLLM compiles it in its engine, after its check, and there some fail that the check has passed."""
    if grammar is None:
        return BackendFailed("vLLM has given the request up")
    return InvalidArgument(f"structured_output.{grammar.kind.value}", NO_OUTPUT)


def translated(error: Exception, grammar: Grammar | None = None) -> FastChatError:
    """A vLLM error as one of ours, of a request with this grammar. vLLM's refusals name fields and limits, and
    quote no prompt."""
    from vllm.exceptions import VLLMClientError
    from vllm.v1.engine.exceptions import EngineDeadError

    if isinstance(error, FastChatError):
        return error
    if isinstance(error, EngineDeadError):
        return WorkerUnavailable("the vLLM engine has died; the worker must be restarted")
    if isinstance(error, VLLMClientError):
        return translated_refusal(error, grammar)
    return driver.as_domain_error(error)


def translated_refusal(error: Exception, grammar: Grammar | None) -> InvalidArgument:
    """A refusal of vLLM, about the grammar where it is."""
    if grammar is not None and "grammar" in str(error).lower():
        return InvalidArgument(f"structured_output.{grammar.kind.value}", f"cannot be compiled: {error}")
    return InvalidArgument("", f"vLLM refused the request: {error}")
