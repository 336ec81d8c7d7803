"""One thread that steps a batch: the driver of engines without a loop of their own.

The thread owns the engine and everything in it. The event loop only puts orders into a queue, and gets what
a step made in one call, so nothing of the engine needs a lock.

    event loop:  submit / stop / call ---orders---> thread:  take orders; one call; step; repeat
                 Job.feed <------ one call per step -------
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from time import monotonic
from typing import Any, TypeVar

from fastchat_grpc.backends.base import Steps
from fastchat_grpc.backends.driver import as_domain_error
from fastchat_grpc.errors import WorkerUnavailable
from fastchat_grpc.models.ending import end_process
from fastchat_grpc.text.batch import BatchEngine, Output, Running
from fastchat_grpc.text.job import Job

logger = logging.getLogger(__name__)

T = TypeVar("T")
CLOSE_TIMEOUT_S = 60.0
"""How long closing waits for the step that runs: a long prompt on a slow machine takes some seconds."""


class EngineThread:
    """Runs a BatchEngine; implements `text.job.TokenEngine`. Make it on the event loop, then `await start()`."""

    def __init__(
        self,
        name: str,
        make_engine: Callable[[], BatchEngine],
        seed_of: Callable[[Job, int], int],
        die: Callable[[str], None] = end_process,
    ) -> None:
        self._make_engine = make_engine
        self._seed_of = seed_of
        self._die = die
        self._loop = asyncio.get_running_loop()
        self._orders: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._sequences: dict[tuple[Job, int], Running] = {}  # of the event loop
        self._waiting: dict[Job, list[Running]] = {}  # siblings that wait for the prompt's log probabilities
        self._answers: set[asyncio.Future[Any]] = set()  # of calls; of the event loop
        self._running: set[Running] = set()  # of the thread
        self._calls: deque[Callable[[], None]] = deque()  # of the thread
        self._engine: BatchEngine | None = None
        self._shares_prompts = False
        self._closed = False
        self.steps = Steps()
        """What its steps were like."""
        self._ready: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    async def start(self) -> None:
        """Start the thread and wait for its engine. Raises what making it raises."""
        self._thread.start()
        await asyncio.wrap_future(self._ready)

    def submit(self, job: Job) -> None:
        request = job.request
        scores_prompt = request.output.prompt_logprobs is not None and request.resume is None
        sequences = [
            Running(
                job=job,
                index=index,
                token_ids=job.prefix(index),
                max_tokens=job.max_tokens(index),
                min_tokens=job.min_tokens(index),
                seed=self._seed_of(job, index),
                scores_prompt=scores_prompt and position == 0,
            )
            for position, index in enumerate(job.pending)
        ]
        for sequence in sequences:
            self._sequences[job, sequence.index] = sequence
        if scores_prompt and not self._shares_prompts:
            # The prompt's event comes before any token, so the other choices wait for the one that scores it.
            self._waiting[job] = sequences[1:]
            sequences = sequences[:1]
        if not scores_prompt:
            job.show_prompt()
        self._add(sequences)

    def stop(self, job: Job, index: int) -> None:
        sequence = self._sequences.pop((job, index), None)
        if sequence is None or self._closed:
            return
        waiting = self._waiting.get(job, [])
        if sequence in waiting:
            waiting.remove(sequence)
        if not waiting:
            self._waiting.pop(job, None)
        self._order(lambda: self._remove(sequence))

    @property
    def held_tokens(self) -> int:
        """Tokens that the running requests hold keys and values of."""
        return sum(job.held_tokens for job in {sequence.job for sequence in self._sequences.values()})

    async def call(self, function: Callable[[], T]) -> T:
        """Run a function in the thread, between two steps, of which each pair has one such function between them.

        Cancelling the wait for it keeps a function that has not begun from running.

        Raises:
            WorkerUnavailable: the thread ended before it came to it.
        """
        answer: asyncio.Future[T] = self._loop.create_future()

        def run() -> None:
            if answer.cancelled():
                return
            try:
                self._tell(partial(_answer, answer, function()))
            except Exception as error:
                self._tell(partial(_refuse, answer, error))

        self._order(lambda: self._calls.append(run))
        self._answers.add(answer)
        try:
            return await answer
        finally:
            self._answers.discard(answer)

    async def close(self) -> None:
        """End every request and the thread. Safe to call twice."""
        if not self._closed:
            self._end("the worker closes")
            self._orders.put(None)
        if self._thread.ident is None:
            return
        await asyncio.to_thread(self._thread.join, CLOSE_TIMEOUT_S)
        if self._thread.is_alive():
            logger.error("the engine is still in a step after %.0f s and is left to end by itself", CLOSE_TIMEOUT_S)

    def _end(self, reason: str) -> None:
        self._closed = True
        for job in {sequence.job for sequence in self._sequences.values()}:
            job.fail(WorkerUnavailable(reason))
        self._sequences.clear()
        self._waiting.clear()
        for answer in self._answers:
            _refuse(answer, WorkerUnavailable(reason))

    def _add(self, sequences: Sequence[Running]) -> None:
        def add() -> None:
            for sequence in sequences:
                self._begin(sequence)

        self._order(add)

    def _order(self, order: Callable[[], None]) -> None:
        if self._closed:
            raise WorkerUnavailable("the worker closes")
        self._orders.put(order)

    # In the thread.

    def _run(self) -> None:
        if not self._ready.set_running_or_notify_cancel():  # whoever wanted it has gone
            return
        try:
            self._engine = self._make_engine()
            self._shares_prompts = self._engine.shares_prompts
        except BaseException as error:
            self._ready.set_exception(error)
            return
        self._ready.set_result(None)
        try:
            while self._take_orders():
                if self._calls:
                    self._calls.popleft()()
                if self._engine.busy:
                    self._deliver(self._step())
        except Exception as error:
            # Nobody would answer any more, and the worker would look idle.
            as_domain_error(error)  # says in the log what it was
            self._tell(lambda: self._end("the engine of this worker has failed"))
            self._die(f"the thread {self._thread.name} ended")
        finally:
            self._engine.close()
            self._engine = None

    def _take_orders(self) -> bool:
        """Carry out what is in the queue, waiting for it where there is nothing else to do. False: the end."""
        assert self._engine is not None
        while True:
            try:
                order = self._orders.get(block=not (self._engine.busy or self._calls))
            except queue.Empty:
                return True
            if order is None:
                return False
            order()

    def _begin(self, sequence: Running) -> None:
        assert self._engine is not None
        try:
            self._engine.add(sequence)
            self._running.add(sequence)
        except Exception as error:
            self._deliver([Output(sequence, error=as_domain_error(error))])

    def _remove(self, sequence: Running) -> None:
        assert self._engine is not None
        if sequence in self._running:
            self._running.discard(sequence)
            self._engine.remove(sequence)

    def _step(self) -> Sequence[Output]:
        assert self._engine is not None
        began, processed = monotonic(), self._engine.processed_tokens
        try:
            outputs = list(self._engine.step())
        except Exception as error:
            failure = as_domain_error(error)
            self.steps.failures += 1
            outputs = [Output(sequence, error=failure) for sequence in self._running]
            self._engine.reset()
        else:
            self._count(outputs, monotonic() - began, self._engine.processed_tokens - processed)
        for position, output in enumerate(outputs):
            if output.error is not None:
                outputs[position] = replace(output, error=as_domain_error(output.error))
            if output.finish_reason is not None or output.error is not None:
                self._running.discard(output.sequence)
        return outputs

    def _count(self, outputs: Sequence[Output], seconds: float, tokens: int) -> None:
        if not outputs and not tokens:
            return  # nothing ran
        self.steps.seconds.observe(seconds)
        self.steps.sequences.observe(len({id(output.sequence) for output in outputs if output.token_ids}))
        if tokens:
            self.steps.tokens.observe(tokens)

    def _deliver(self, outputs: Sequence[Output]) -> None:
        if outputs:
            self._tell(lambda: self._receive(outputs))

    def _tell(self, what: Callable[[], object]) -> None:
        try:
            self._loop.call_soon_threadsafe(what)
        except RuntimeError:  # the loop is closed: nobody is left to tell
            logger.debug("the event loop is closed; dropping what the engine made")

    # On the event loop.

    def _receive(self, outputs: Sequence[Output]) -> None:
        for output in outputs:
            if (output.sequence.job, output.sequence.index) in self._sequences:
                try:
                    self._pass_on(output)
                except Exception as error:
                    self._fail(output.sequence, as_domain_error(error))

    def _pass_on(self, output: Output) -> None:
        sequence, job = output.sequence, output.sequence.job
        if output.error is not None:
            self._fail(sequence, output.error)
            return
        if output.started_at is not None:
            job.started(output.started_at)
        job.cached_tokens = max(job.cached_tokens, output.cached_tokens)
        if output.prompt_logprobs is not None:
            job.show_prompt(output.prompt_logprobs)
            if waiting := self._waiting.pop(job, []):
                self._add(waiting)
        if output.finish_reason is not None:
            self._forget(sequence)
        if output.token_ids or output.finish_reason is not None:
            job.feed(sequence.index, output.token_ids, output.logprobs, output.finish_reason)

    def _fail(self, sequence: Running, error: Exception) -> None:
        self._waiting.pop(sequence.job, None)
        sequence.job.fail(error)

    def _forget(self, sequence: Running) -> None:
        self._sequences.pop((sequence.job, sequence.index), None)


def _answer(answer: asyncio.Future[T], result: T) -> None:
    if not answer.done():
        answer.set_result(result)


def _refuse(answer: asyncio.Future[Any], error: Exception) -> None:
    if not answer.done():
        answer.set_exception(error)
