"""The engine: one thread that owns a model and runs all requests through it, step by step.

Other threads only enqueue commands, so the scheduler, the cache and the requests need no lock. What a
step brings forth leaves in one call of `deliver`, however many requests and tokens it was; whoever
consumes it, or does not, never holds the batch up.
"""

from __future__ import annotations

import logging
import queue
import random
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from time import monotonic
from typing import Any

import torch

from fastchat_grpc.core import Event, GenerateRequest, Timings, TokenLogprob
from fastchat_grpc.engine.failures import is_broken, is_out_of_memory
from fastchat_grpc.engine.logprobs import token_logprobs, unknown_logprob
from fastchat_grpc.engine.model_runner import ModelRunner, StepLogits
from fastchat_grpc.engine.output_rules import OutputRules
from fastchat_grpc.engine.request import Batch, Request, Sequence
from fastchat_grpc.engine.sampler import Sampler
from fastchat_grpc.engine.scheduler import Scheduler
from fastchat_grpc.errors import BackendFailed, FastChatError, OutOfMemory, WorkerUnavailable
from fastchat_grpc.models.ending import end_process
from fastchat_grpc.text import prompt as prompts
from fastchat_grpc.text.choice import Choice, ChoiceLimits
from fastchat_grpc.text.grammar import CompiledGrammar
from fastchat_grpc.text.reasoning import Marks
from fastchat_grpc.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

SEED_MASK = 2**64 - 1
CLOSE_TIMEOUT_S = 60.0
"""How long closing waits for the step that runs: a long prompt on a slow machine takes some seconds."""


@dataclass(slots=True)
class Delivery:
    """What one request gets from one step. `closed`: nothing follows, but the error if there is one."""

    sink: Any
    events: list[Event]
    closed: bool = False
    error: Exception | None = None


@dataclass(slots=True)
class Job:
    """Work on the model beside generation, such as embedding: done in pieces, between steps."""

    pieces: Iterator[None]
    future: Future[Any]
    """Cancelling it stops the job before its next piece. The job itself sets the result."""


class Engine:
    """Continuous batching of one model. `start` it, `submit` and `abort` from any thread, `close` it."""

    def __init__(
        self,
        runner: ModelRunner,
        scheduler: Scheduler,
        tokenizer: Tokenizer,
        deliver: Callable[[list[Delivery]], None],
        *,
        context_length: int,
        stream_interval: int,
        seed: int | None = None,
        encoder_decoder: bool = False,
        reasoning: Marks | None = None,
        rules: OutputRules | None = None,
        clock: Callable[[], float] = monotonic,
        die: Callable[[str], None] = end_process,
    ) -> None:
        self.scheduler = scheduler
        self.generated_tokens = 0
        self.processed_tokens = 0
        """Prompt and output tokens computed since start: what a watchdog looks at."""
        self._runner = runner
        scheduler.on_free = runner.release
        self._tokenizer = tokenizer
        self._sampler = Sampler(tokenizer.eos_token_ids, rules, context_length)
        self._deliver = deliver
        self._context_length = context_length
        self._stream_interval = stream_interval
        self._encoder_decoder = encoder_decoder
        self._reasoning = reasoning
        self._seeds: random.Random = random.SystemRandom() if seed is None else random.Random(seed)
        self._clock = clock
        self._die = die
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._requests: dict[int, Request] = {}
        self._jobs: deque[Job] = deque()
        self._outbox: dict[int, Delivery] = {}
        self._numbers = 0
        self._closing = False
        self._closed = False
        self._entrance = threading.Lock()
        """Held to enter a command, and to close: each command is carried out, or refused."""
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # Called from any thread.

    def start(self) -> None:
        """Begin to serve."""
        self._thread.start()

    def submit(
        self,
        spec: GenerateRequest,
        prompt: list[int],
        sink: Any,
        *,
        arrival: float,
        grammar: CompiledGrammar | None = None,
    ) -> Request:
        """Queue a request; its events are delivered to `sink`. The prompt fits the context.

        Raises:
            WorkerUnavailable: the engine was closed.
        """
        request = Request(spec=spec, prompt=prompt, sink=sink, arrival=arrival, grammar=grammar)
        self._command(lambda: self._enter(request))
        return request

    def abort(self, request: Request) -> None:
        """Stop a request before the next step; nothing more is delivered to its sink."""
        self._commands.put(lambda: self._leave(request))

    def run_job(self, pieces: Iterator[None], future: Future[Any]) -> None:
        """Do other work on the model, piece by piece, between steps. Raises WorkerUnavailable as `submit` does."""
        self._command(lambda: self._jobs.append(Job(pieces, future)))

    def close(self) -> None:
        """Stop the thread, fail what runs, and free the cache. Safe to call twice, and before `start`."""
        self._closing = True
        self._commands.put(lambda: None)
        if self._thread.is_alive():
            self._thread.join(CLOSE_TIMEOUT_S)
        if self._thread.is_alive():
            log.error("the engine is still in a step after %.0f s and is left to end by itself", CLOSE_TIMEOUT_S)

    def _command(self, command: Callable[[], None]) -> None:
        with self._entrance:
            if self._closed:
                raise _was_closed()
            self._commands.put(command)

    # The engine thread.

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                while not self._closing:
                    self._turn()
            self._end()
        except BaseException:
            # Nobody would answer any more, and the worker would look idle.
            log.exception("the engine thread ended")
            self._die("the engine thread ended")

    def _turn(self) -> None:
        """One round of the loop. What fails here is the engine itself: nothing it knows of a request can be trusted."""
        try:
            self._take_commands()
            self._work_on_job()
            self._step()
        except Exception as error:
            log.exception("the engine failed; all its requests fail")
            self._fail_all(BackendFailed(f"the engine failed: {type(error).__name__}"))
        try:
            self._flush()
        except Exception as error:
            log.exception("events could not be delivered; all requests fail")
            self._fail_all(BackendFailed(f"events could not be delivered: {type(error).__name__}"))
            self._flush()

    def _end(self) -> None:
        """Answer everybody, those too who came while the last step ran."""
        with self._entrance:
            self._closed = True
        while not self._commands.empty():
            self._commands.get()()
        self._fail_all(_was_closed())
        for job in self._jobs:
            if job.future.set_running_or_notify_cancel():
                job.future.set_exception(_was_closed())
        self._jobs.clear()
        self._flush()

    def _take_commands(self) -> None:
        """Carry out what other threads want; wait for it where there is nothing else to do."""
        idle = not (self.scheduler.running or self.scheduler.waiting or self._jobs)
        if idle:
            self._sampler.forget()
        try:
            while True:
                self._commands.get(block=idle)()
                idle = False
        except queue.Empty:
            pass

    def _step(self) -> None:
        """One forward pass for all sequences that run, and a token for each whose prompt is done."""
        batch = self.scheduler.next_batch()
        if batch is None:
            return
        began = self._mark_started(batch)
        try:
            result = self._runner.run(batch)
            self._take_prompt_logprobs(result)
            sampled = batch.sampled
            tokens, logprobs, failed = self._sample(result, sampled)
        except Exception as error:
            self._step_failed(batch, error)
            return
        self.scheduler.commit(batch)
        self.scheduler.grow()
        self.scheduler.pace(batch, self._clock() - began)
        self.processed_tokens += sum(chunk.count for chunk in batch.chunks)
        self.generated_tokens += len(tokens)
        for row, (sequence, token) in enumerate(zip(sampled, tokens, strict=True)):
            if row in failed:
                self._guarded(sequence.request, _fail_with, failed[row])
            else:
                self._guarded(sequence.request, self._advance, sequence, token, logprobs.get(row))

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

    def _advance(self, sequence: Sequence, token: int, logprob: TokenLogprob | None) -> None:
        """Give a sequence its next token, and the caller what became ready by it."""
        sequence.tokens.append(token)
        if sequence.first_token_at is None:
            sequence.first_token_at = self._clock()
        self._echo(sequence.request)
        if sequence.choice is None:
            sequence.choice = self._make_choice(sequence)
        if sequence.grammar is not None:
            sequence.grammar.accept(token)
        sequence.choice.push(token, logprob)
        self._emit(sequence)

    def _emit(self, sequence: Sequence) -> None:
        choice, request = sequence.choice, sequence.request
        assert choice is not None
        if not choice.due:
            return
        events: list[Event] = []
        if (delta := choice.delta()) is not None:
            events.append(delta)
        if choice.finish_reason is not None:
            events.append(choice.completion(self._timings(sequence)))
            self._retire(sequence)
        self._post(request, events)
        if request.done:
            self._close_request(request, None)

    def _echo(self, request: Request) -> None:
        """Send the prompt where it is wanted, before the first token of any choice."""
        if request.echoed:
            return
        request.echoed = True
        entries = tuple(request.prompt_logprobs[i] for i in range(len(request.prompt_logprobs)))
        event = prompts.echo(self._tokenizer, request.spec, request.prompt, entries)
        if event is not None:
            self._post(request, [event])

    def _take_prompt_logprobs(self, result: StepLogits) -> None:
        for chunk, slices in result.prompts:
            request = chunk.sequence.request
            known, prompt = request.prompt_logprobs, request.prompt
            if not known:
                known[0] = unknown_logprob(prompt[0], self._tokenizer)
            position = chunk.start + 1  # of the token that the next row foretells
            for logits in slices:
                following = prompt[position : position + len(logits)]
                if not following:
                    break
                counts = [request.spec.output.prompt_logprobs or 0] * len(following)
                entries = token_logprobs(logits[: len(following)], following, counts, self._tokenizer)
                known.update(enumerate(entries, start=position))
                position += len(following)

    # Requests coming and going.

    def _enter(self, request: Request) -> None:
        if request.cancelled:
            return
        self._numbers += 1
        request.number = self._numbers
        self._requests[id(request)] = request
        self._guarded(request, self._open_sequences, request)

    def _open_sequences(self, request: Request) -> None:
        spec = request.spec
        seed = self._seeds.getrandbits(64) if spec.sampling.seed is None else spec.sampling.seed & SEED_MASK
        leader: Sequence | None = None
        for index in range(spec.output.n):
            resumed = spec.resumed_choice(index)
            if resumed.finished:
                continue
            sequence = Sequence(
                request=request, index=index, tokens=[*request.prompt, *resumed.output_token_ids], seed=seed
            )
            request.sequences.append(sequence)
            if request.grammar is not None:
                sequence.grammar = request.grammar.begin(resumed.output_token_ids)
            if resumed.output_token_ids:
                sequence.choice = self._make_choice(sequence)
            elif leader is not None:
                leader.followers.append(sequence)
                continue
            else:
                leader = sequence
            self.scheduler.add(sequence)
        for sequence in list(request.sequences):
            if sequence.choice is not None and sequence.choice.finish_reason is not None:
                self._emit(sequence)
        if not request.sequences:
            self._close_request(request, None)

    def _leave(self, request: Request) -> None:
        request.cancelled = True
        request.closed = True
        self._outbox.pop(id(request), None)
        self._forget(request)

    def _fail(self, request: Request, error: Exception) -> None:
        self._close_request(request, error)

    def _fail_all(self, error: Exception) -> None:
        for request in list(self._requests.values()):
            self._fail(request, error)

    def _close_request(self, request: Request, error: Exception | None) -> None:
        if not request.closed:
            delivery = self._delivery(request)
            delivery.closed, delivery.error = True, error
            request.closed = True
        self._forget(request)

    def _forget(self, request: Request) -> None:
        self._requests.pop(id(request), None)
        for sequence in request.sequences:
            if not sequence.finished:
                self._retire(sequence)

    def _retire(self, sequence: Sequence) -> None:
        sequence.finished = True
        self.scheduler.remove(sequence)
        self.scheduler.requeue_followers(sequence)
        sequence.sampling_state = None

    # When things go wrong.

    def _guarded(self, request: Request, do: Callable[..., None], *arguments: Any) -> None:
        """Do something for one request; if it fails, only that request does."""
        if request.closed:
            return
        try:
            do(*arguments)
        except FastChatError as error:
            self._fail(request, error)
        except Exception as error:
            log.exception("request %s failed", request.spec.request_id or request.number)
            self._fail(request, BackendFailed(f"the engine failed on this request: {type(error).__name__}"))

    def _step_failed(self, batch: Batch, error: Exception) -> None:
        """Fail the requests of a step that raised; the engine goes on. Short of memory, try a smaller step first."""
        if is_out_of_memory(error):
            log.warning("out of memory in a step of %d tokens", sum(chunk.count for chunk in batch.chunks))
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if self.scheduler.shrink(batch):
                return
            largest = max(batch.sequences, key=lambda s: len(s.tokens)).request
            self._fail(largest, OutOfMemory(f"no memory for a request of {len(largest.prompt)} prompt tokens"))
            return
        log.error("a step failed, and %d sequences with it", len(batch.sequences), exc_info=error)
        if is_broken(self._runner.device):
            self._fail_all(WorkerUnavailable("the device of this worker has failed"))
            self._die(f"the device {self._runner.device} computes nothing any more")
            return
        for sequence in batch.sequences:
            self._fail(sequence.request, BackendFailed(f"the model failed in a step: {type(error).__name__}"))

    # Small parts.

    def _make_choice(self, sequence: Sequence) -> Choice:
        limits = ChoiceLimits(
            prompt_tokens=sequence.prompt_length,
            context_length=self._context_length,
            stream_interval=self._stream_interval,
            cached_tokens=sequence.request.cached_tokens,
            prompt_takes_room=not self._encoder_decoder,
            reasoning=self._reasoning,
        )
        prompt = [] if self._encoder_decoder else sequence.request.prompt
        return Choice(sequence.request.spec, sequence.index, self._tokenizer, limits, prompt)

    def _mark_started(self, batch: Batch) -> float:
        now = self._clock()
        for chunk in batch.chunks:
            request = chunk.sequence.request
            if request.prefill_started is None:
                request.prefill_started = now
                request.cached_tokens = min(chunk.start, len(request.prompt))
        return now

    def _timings(self, sequence: Sequence) -> Timings:
        request, now = sequence.request, self._clock()
        return Timings(
            queued_s=(request.prefill_started or now) - request.arrival,
            time_to_first_token_s=(sequence.first_token_at or now) - request.arrival,
            total_s=now - request.arrival,
        )

    def _work_on_job(self) -> None:
        """Do a piece of the first job; jobs take turns."""
        if not self._jobs:
            return
        job = self._jobs.popleft()
        if job.future.cancelled():
            return
        try:
            next(job.pieces)
            self._jobs.append(job)
        except StopIteration:
            pass
        except Exception as error:
            if not isinstance(error, FastChatError):
                log.exception("a job failed")
                error = BackendFailed(f"the model failed: {type(error).__name__}")
            if job.future.set_running_or_notify_cancel():
                job.future.set_exception(error)

    def _delivery(self, request: Request) -> Delivery:
        return self._outbox.setdefault(id(request), Delivery(request.sink, []))

    def _post(self, request: Request, events: list[Event]) -> None:
        if not request.closed:
            self._delivery(request).events.extend(events)

    def _flush(self) -> None:
        if self._outbox:
            deliveries, self._outbox = list(self._outbox.values()), {}
            self._deliver(deliveries)


def _fail_with(error: Exception) -> None:
    raise error


def _was_closed() -> WorkerUnavailable:
    return WorkerUnavailable("the engine was closed")
