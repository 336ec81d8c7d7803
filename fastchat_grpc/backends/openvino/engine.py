"""The worker's side of the OpenVINO process: jobs go out as messages, steps come back, a crash is survived."""

from __future__ import annotations

import asyncio
import itertools
import logging
import pickle
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from fastchat_grpc.backends.driver import Seeds, as_domain_error, token_logprob
from fastchat_grpc.backends.openvino import messages
from fastchat_grpc.backends.openvino.sampling import echoes, generation_config, grammar_field
from fastchat_grpc.core import FinishReason, TokenLogprob
from fastchat_grpc.errors import (
    BackendFailed,
    FastChatError,
    InvalidArgument,
    ModelLoadError,
    OutOfMemory,
    WorkerUnavailable,
)
from fastchat_grpc.text.job import Job
from fastchat_grpc.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

PROCESS = "fastchat_grpc.backends.openvino.process"
CLOSE_TIMEOUT_S = 10.0
MIN_BACKOFF_S, MAX_BACKOFF_S = 0.5, 30.0
_FINISH = {"stop": FinishReason.STOP, "length": FinishReason.LENGTH}


class OpenVinoEngine:
    """One process, started again when it dies. Used on the event loop only."""

    def __init__(self, load: messages.Load, tokenizer: Tokenizer) -> None:
        self._load = load
        self.tokenizer = tokenizer
        self._process: asyncio.subprocess.Process | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._choices: dict[int, tuple[EngineRequest, int]] = {}
        self._keys = itertools.count(1)
        self._ready = False
        self._closed = False
        self._processed_before = 0  # by processes that died
        self.processed_tokens = 0
        self.cache_usage = 0.0
        self.precision = ""
        """Number format of the arithmetic; empty: unknown."""

    async def start(self) -> None:
        """Start the process and wait until the model is loaded. Raises ModelLoadError."""
        await self._spawn()
        self._keeper = asyncio.create_task(self._keep())

    def add(self, request: EngineRequest, choices: Mapping[int, dict[str, Any]]) -> dict[int, int]:
        """Send choices, by index; returns their keys. Raises WorkerUnavailable while there is no process.

        They go in one message and so join the batch in one step: what rounding does is then the same each time.
        """
        if not self._ready:
            raise WorkerUnavailable("the engine is being started again; try elsewhere, or later")
        keys = {index: next(self._keys) for index in choices}
        self._choices |= {key: (request, index) for index, key in keys.items()}
        self._send([messages.Add(key=keys[index], **fields) for index, fields in choices.items()])
        return keys

    def stop(self, key: int) -> None:
        """Make no more tokens for a choice."""
        if self._choices.pop(key, None) is not None and self._ready:
            self._send(key)

    async def close(self) -> None:
        """End the process, and what still runs in it."""
        self._closed = True
        self._fail_all(WorkerUnavailable("the engine was closed"))
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
        await self._end_process()

    async def _spawn(self) -> None:
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            PROCESS,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        try:
            self._send(self._load)
            answer = await self._receive()
        except BaseException:
            await self._end_process()
            raise
        if not isinstance(answer, messages.Loaded):
            await self._end_process()
            reason = answer.message if isinstance(answer, messages.Failed) else "its process ended; see its output"
            raise ModelLoadError(f"OpenVINO cannot load {self._load.model}: {reason}")
        self.precision = answer.precision
        self._ready = True

    async def _keep(self) -> None:
        """Deliver what the process says; when it dies, fail what it held and start another."""
        while True:
            while (step := await self._receive()) is not None:
                self._deliver(step)
            self._ready = False
            assert self._process is not None
            status = await self._process.wait()
            logger.error("the OpenVINO process ended with status %s; starting another", status)
            self._processed_before = self.processed_tokens
            self._fail_all(BackendFailed(f"the engine's process ended with status {status} during this request"))
            await self._respawn()

    async def _respawn(self) -> None:
        backoff_s = MIN_BACKOFF_S
        while True:
            await asyncio.sleep(backoff_s)
            try:
                return await self._spawn()
            except ModelLoadError as error:
                logger.error("%s; trying again in %.1f s", error, backoff_s)
            backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)

    def _deliver(self, step: messages.Step) -> None:
        self.processed_tokens = self._processed_before + step.processed_tokens
        self.cache_usage = step.cache_usage
        for key, at in step.begun.items():
            if key in self._choices:
                self._choices[key][0].begun(at)
        for key, problem in step.refused.items():
            if key in self._choices:
                self._choices.pop(key)[0].refuse_grammar(problem)
        for key, problem in step.failed.items():
            if key in self._choices:
                request, _ = self._choices.pop(key)
                request.fail(InvalidArgument("", f"OpenVINO GenAI does not take the request: {problem[:300]}"))
        for output in step.outputs:
            if output.key in self._choices:
                self._deliver_output(output)

    def _deliver_output(self, output: messages.Output) -> None:
        request, index = self._choices[output.key]
        if output.finish:
            del self._choices[output.key]
        try:
            request.take(index, output)
        except Exception as error:  # of this request alone: the others go on
            request.fail(as_domain_error(error))

    def _fail_all(self, error: FastChatError) -> None:
        choices = list(self._choices.values())
        self._choices.clear()
        for request, _ in choices:
            request.fail(error)

    def _send(self, message: object) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        data = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
        self._process.stdin.write(messages.HEADER.pack(len(data)) + data)

    async def _receive(self) -> Any:
        """The next message, or None when the process has ended."""
        assert self._process is not None
        assert self._process.stdout is not None
        stream = self._process.stdout
        try:
            (length,) = messages.HEADER.unpack(await stream.readexactly(messages.HEADER.size))
            return pickle.loads(await stream.readexactly(length))
        except (asyncio.IncompleteReadError, ConnectionError):
            return None

    async def _end_process(self) -> None:
        self._ready = False
        child, self._process = self._process, None
        if child is None:
            return
        assert child.stdin is not None
        child.stdin.close()
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await child.wait()
        except TimeoutError:
            logger.warning("the OpenVINO process did not end in %.0f s; killing it", CLOSE_TIMEOUT_S)
        finally:
            if child.returncode is None:
                with suppress(ProcessLookupError):
                    child.kill()
                await child.wait()


class EngineRequest:
    """One job in the engine. Implements TokenEngine for `drive`."""

    def __init__(self, engine: OpenVinoEngine, adapter: str, seed: int) -> None:
        self._engine = engine
        self._adapter = adapter
        self._seed = seed
        self._job: Job | None = None
        self._keys: dict[int, int] = {}
        self._prompt_left = 0  # prompt tokens that the first choice brings before its own, with their logprobs
        self._prompt: list[TokenLogprob] = []
        self._held: list[tuple[int, messages.Output]] = []  # of other choices, until the prompt is shown

    def submit(self, job: Job) -> None:
        """See TokenEngine."""
        self._job = job
        if any(echoes(job, index) for index in job.pending):
            self._prompt_left = len(job.prompt_ids)
        else:
            job.show_prompt()
        try:
            self._keys = self._engine.add(self, {index: self._fields(job, index) for index in job.pending})
        except WorkerUnavailable as error:
            job.fail(error)

    def _fields(self, job: Job, index: int) -> dict[str, Any]:
        seed = Seeds.choice_seed(self._seed, index)
        return {
            "token_ids": tuple(job.prefix(index)),
            "config": generation_config(job, index, seed, self._engine.tokenizer),
            "grammar": grammar_field(job.request.grammar),
            "adapter": self._adapter,
        }

    def stop(self, job: Job, index: int) -> None:
        """See TokenEngine."""
        if index in self._keys:
            self._engine.stop(self._keys[index])

    def begun(self, at: float) -> None:
        """The engine reads the prompt since then."""
        assert self._job is not None
        self._job.started(at)

    def fail(self, error: Exception) -> None:
        """End the job with an error."""
        assert self._job is not None
        self._job.fail(error)

    def refuse_grammar(self, problem: str) -> None:
        """The grammar does not compile."""
        assert self._job is not None
        assert self._job.request.grammar is not None
        kind = self._job.request.grammar.kind.value
        self.fail(InvalidArgument(f"structured_output.{kind}", f"cannot be compiled: {problem}"))

    def take(self, index: int, output: messages.Output) -> None:
        """Take what the engine made for a choice."""
        assert self._job is not None
        if output.finish == "memory":
            self.fail(OutOfMemory("the KV cache has no room for this request; see --backend-option cache_gb"))
            return
        token_ids, values = output.token_ids, output.logprobs
        if self._prompt_left:
            if index != min(self._keys):
                self._held.append((index, output))
                return
            token_ids, values = self._take_prompt(token_ids, values)
        logprobs = self._logprobs(token_ids, values) if self._job.request.output.logprobs is not None else ()
        self._job.feed(index, token_ids, logprobs, _FINISH.get(output.finish))
        if self._held and not self._prompt_left:
            held, self._held = self._held, []
            for other, waiting in held:
                self.take(other, waiting)

    def _take_prompt(self, token_ids: list[int], values: list[float]) -> tuple[list[int], list[float]]:
        """Keep the prompt's share of an output and show the prompt when it is whole; returns the rest."""
        assert self._job is not None
        count = min(self._prompt_left, len(token_ids))
        self._prompt += self._logprobs(token_ids[:count], values[:count])
        self._prompt_left -= count
        if not self._prompt_left:
            first = token_logprob(self._engine.tokenizer, self._prompt[0].token_id, None)
            self._job.show_prompt((first, *self._prompt[1:]))
        return token_ids[count:], values[count:]

    def _logprobs(self, token_ids: list[int], values: list[float]) -> list[TokenLogprob]:
        return [token_logprob(self._engine.tokenizer, *pair) for pair in zip(token_ids, values, strict=True)]
