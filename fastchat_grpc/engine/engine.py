"""The engine: continuous batching of one model, a step at a time. One thread owns it, so nothing in it needs a lock.

It takes choices of requests as token ids, and its steps give their next tokens with log probabilities. Text, stop
strings, usage and events are made of them elsewhere (`text.job`), beside the next step.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from time import monotonic

import torch

from fastchat_grpc.core import FinishReason, TokenLogprob
from fastchat_grpc.engine.failures import is_broken, is_out_of_memory
from fastchat_grpc.engine.logprobs import token_logprobs, unknown_logprob
from fastchat_grpc.engine.model_runner import ModelRunner, StepLogits
from fastchat_grpc.engine.output_rules import OutputRules
from fastchat_grpc.engine.request import Batch, Request, Sequence
from fastchat_grpc.engine.sampler import Sampler
from fastchat_grpc.engine.scheduler import Scheduler
from fastchat_grpc.errors import BackendFailed, OutOfMemory, WorkerUnavailable
from fastchat_grpc.models.ending import end_process
from fastchat_grpc.text.batch import Output, Running
from fastchat_grpc.text.job import Job
from fastchat_grpc.text.stop import EndTokens
from fastchat_grpc.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)


class Engine:
    """Implements `text.batch.BatchEngine`."""

    shares_prompts = True

    def __init__(
        self,
        runner: ModelRunner,
        scheduler: Scheduler,
        tokenizer: Tokenizer,
        *,
        context_length: int,
        rules: OutputRules | None = None,
        clock: Callable[[], float] = monotonic,
        die: Callable[[str], None] = end_process,
    ) -> None:
        self.scheduler = scheduler
        self.generated_tokens = 0
        self.processed_tokens = 0
        """Prompt, output and embedded tokens computed since start: what a watchdog looks at."""
        self._runner = runner
        scheduler.on_free = runner.release
        self._tokenizer = tokenizer
        self._sampler = Sampler(tokenizer.eos_token_ids, rules, context_length)
        self._clock = clock
        self._die = die
        self._requests: dict[Job, Request] = {}
        self._sequences: dict[Running, Sequence] = {}
        self._numbers = 0

    @property
    def busy(self) -> bool:
        return bool(self.scheduler.running or self.scheduler.waiting)

    @property
    def kv_cache_usage(self) -> float:
        return self.scheduler.pool.usage

    @property
    def kv_free_tokens(self) -> int:
        return self.scheduler.pool.available * self.scheduler.pool.block_size

    def add(self, running: Running) -> None:
        request = self._requests.get(running.job) or self._new_request(running.job)
        known = running.token_ids[running.prompt_length :]
        sequence = Sequence(
            request=request, index=running.index, tokens=[*running.token_ids], seed=running.seed, running=running
        )
        if running.job.grammar is not None:
            sequence.grammar = running.job.grammar.begin(known)
        self._requests[running.job] = request
        leader = next((s for s in request.sequences if not s.output_length), None)
        request.sequences.append(sequence)
        self._sequences[running] = sequence
        if leader is not None and not known:
            leader.followers.append(sequence)
        else:
            self.scheduler.add(sequence)

    def remove(self, running: Running) -> None:
        sequence = self._sequences.get(running)
        if sequence is not None:
            self._retire(sequence)

    @torch.inference_mode()
    def step(self) -> list[Output]:
        """One forward pass for all sequences that run, and a token for each whose prompt is done."""
        batch = self.scheduler.next_batch()
        if batch is None:
            return []
        began = self._clock()
        outputs = self._begin(batch, began)
        try:
            result = self._runner.run(batch)
            self._take_prompt_logprobs(result)
            sampled = batch.sampled
            tokens, logprobs, failed = self._sample(result, sampled)
        except Exception as error:
            return outputs + self._step_failed(batch, error)
        self._commit(batch, began)
        self.generated_tokens += len(tokens)
        for row, (sequence, token) in enumerate(zip(sampled, tokens, strict=True)):
            outputs += self._advance_safely(sequence, token, logprobs.get(row), failed.get(row))
        return outputs

    def reset(self) -> None:
        for sequence in list(self._sequences.values()):
            self._retire(sequence)

    def close(self) -> None:
        self.reset()

    def end_if_broken(self, error: Exception) -> None:
        """After an error on the device: end the process where the device computes nothing any more.

        Raises:
            WorkerUnavailable: it does not.
        """
        if is_broken(self._runner.device):
            self._die(f"the device {self._runner.device} computes nothing any more")
            raise WorkerUnavailable("the device of this worker has failed") from error

    # A step.

    def _begin(self, batch: Batch, now: float) -> list[Output]:
        """Say of requests whose prompts begin when that was, and how much of them was in the cache."""
        outputs = []
        for chunk in batch.chunks:
            sequence, request = chunk.sequence, chunk.sequence.request
            if not request.started:
                request.started = True
                cached = min(chunk.start, len(request.prompt))
                outputs.append(Output(_running(sequence), started_at=now, cached_tokens=cached))
        return outputs

    def _sample(
        self, result: StepLogits, sampled: list[Sequence]
    ) -> tuple[list[int], dict[int, TokenLogprob], dict[int, Exception]]:
        """Tokens, log probabilities where they are wanted by row, and the errors of single rows."""
        if not sampled:
            return [], {}, {}
        wanted = [row for row, s in enumerate(sampled) if s.request.spec.output.logprobs is not None]
        rows = torch.tensor(result.sampled, device=result.logits.device)
        same = result.sampled == list(range(len(result.logits)))
        logits = result.logits if same else result.logits[rows]
        # The sampler overwrites its input, and log probabilities come from the raw logits.
        raw = logits[wanted] if wanted else None
        failed = self._sampler.constrain(logits, sampled)
        tokens = self._sampler.sample(logits, sampled)
        if raw is None:
            return tokens, {}, failed
        counts = [sampled[row].request.spec.output.logprobs or 0 for row in wanted]
        entries = token_logprobs(raw, [tokens[row] for row in wanted], counts, self._tokenizer)
        return tokens, dict(zip(wanted, entries, strict=True)), failed

    def _commit(self, batch: Batch, began: float) -> None:
        self.scheduler.commit(batch)
        self.scheduler.grow()
        self.scheduler.pace(batch, self._clock() - began)
        self.processed_tokens += sum(chunk.count for chunk in batch.chunks)

    def _advance_safely(
        self, sequence: Sequence, token: int, logprob: TokenLogprob | None, error: Exception | None
    ) -> list[Output]:
        """Give a sequence its next token. What goes wrong with it is its request's error alone."""
        if sequence.finished:  # another choice of its request has failed in this step
            return []
        try:
            if error is not None:
                raise error
            return [self._advance(sequence, token, logprob)]
        except Exception as failure:
            return self._fail(sequence.request, failure)

    def _advance(self, sequence: Sequence, token: int, logprob: TokenLogprob | None) -> Output:
        running = _running(sequence)
        sequence.tokens.append(token)
        if sequence.grammar is not None:
            sequence.grammar.accept(token)
        reason = _finish_reason(sequence, token)
        output = Output(
            running,
            token_ids=(token,),
            logprobs=() if logprob is None else (logprob,),
            finish_reason=reason,
            prompt_logprobs=_prompt_logprobs(sequence.request),
        )
        if reason is not None:
            self._retire(sequence)  # at last: whose output cannot be made is still of its request, and fails with it
        return output

    def _take_prompt_logprobs(self, result: StepLogits) -> None:
        for chunk, slices in result.prompts:
            request = chunk.sequence.request
            known, prompt = request.prompt_logprobs, request.prompt
            if not known:
                known[0] = unknown_logprob(prompt[0], self._tokenizer)
            position = chunk.start + 1  # of the token that the next row's logits are for
            for logits in slices:
                following = prompt[position : position + len(logits)]
                if not following:
                    break
                counts = [request.spec.output.prompt_logprobs or 0] * len(following)
                entries = token_logprobs(logits[: len(following)], following, counts, self._tokenizer)
                known.update(enumerate(entries, start=position))
                position += len(following)

    # Requests coming and going.

    def _new_request(self, job: Job) -> Request:
        self._numbers += 1
        ends = EndTokens(job.request, self._tokenizer.eos_token_ids)
        return Request(spec=job.request, prompt=job.prompt_ids, number=self._numbers, ends=ends)

    def _retire(self, sequence: Sequence) -> None:
        """Forget a sequence and free what it holds."""
        running, request = _running(sequence), sequence.request
        sequence.finished = True
        self.scheduler.remove(sequence)
        self.scheduler.requeue_followers(sequence)
        sequence.sampling_state = None
        del self._sequences[running]
        request.sequences.remove(sequence)
        if not request.sequences:
            del self._requests[running.job]
        if not self._requests:
            self._sampler.forget()

    def _fail(self, request: Request, error: Exception) -> list[Output]:
        outputs = [Output(_running(sequence), error=error) for sequence in request.sequences]
        for sequence in list(request.sequences):
            self._retire(sequence)
        return outputs

    def _step_failed(self, batch: Batch, error: Exception) -> list[Output]:
        """Fail the requests of a step that raised; the engine goes on. Short of memory, try a smaller step first."""
        if is_out_of_memory(error):
            log.warning("out of memory in a step of %d tokens", sum(chunk.count for chunk in batch.chunks))
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if self.scheduler.shrink(batch):
                return []
            largest = max(batch.sequences, key=lambda s: len(s.tokens)).request
            return self._fail(largest, OutOfMemory(f"no memory for a request of {len(largest.prompt)} prompt tokens"))
        log.error("a step failed, and %d sequences with it", len(batch.sequences), exc_info=error)
        self.end_if_broken(error)
        failure = BackendFailed(f"the model failed in a step: {type(error).__name__}")
        requests = {id(sequence.request): sequence.request for sequence in batch.sequences}
        return [output for request in requests.values() for output in self._fail(request, failure)]


def _running(sequence: Sequence) -> Running:
    assert sequence.running is not None
    return sequence.running


def _finish_reason(sequence: Sequence, token: int) -> FinishReason | None:
    """How a sequence ends with a token, as far as tokens tell. Stop strings are seen by whoever makes text of them."""
    running, ends = _running(sequence), sequence.request.ends
    assert ends is not None
    if ends.at(token, sequence.output_length):
        return FinishReason.STOP
    made = len(sequence.tokens) - len(running.token_ids)
    return FinishReason.LENGTH if made >= running.max_tokens else None


def _prompt_logprobs(request: Request) -> tuple[TokenLogprob, ...] | None:
    """Log probabilities of the prompt where they are wanted, once."""
    if not request.wants_prompt_logprobs:
        return None
    known, request.prompt_logprobs = request.prompt_logprobs, {}
    request.scored = True
    return tuple(known[position] for position in range(len(known)))
