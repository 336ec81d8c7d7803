"""The thread that steps a batch, with an engine that counts."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from typing import Any

import pytest

from fastchat_grpc.backends import driver
from fastchat_grpc.backends.echo import EchoTokenizer
from fastchat_grpc.backends.engine_thread import EngineThread
from fastchat_grpc.core import Completion, Delta, Event, PromptEcho
from fastchat_grpc.errors import BackendFailed, InvalidArgument, WorkerUnavailable
from fastchat_grpc.text.batch import Output, Running
from fastchat_grpc.text.job import Job
from tests.unit.backends.asking import request


class CountingEngine:
    """Makes the letters a, b, c, ... for every sequence; holds back while `gate` is closed."""

    shares_prompts = False

    def __init__(self) -> None:
        self.running: dict[Running, int] = {}
        self.added: list[int] = []
        self.processed_tokens = 0
        self.gate = threading.Event()
        self.gate.set()
        self.fail_next_step = False
        self.closed = False

    @property
    def busy(self) -> bool:
        return bool(self.running)

    def add(self, running: Running) -> None:
        if running.token_ids == list(b"bad"):
            raise InvalidArgument("input", "bad")
        self.added.append(running.index)
        self.running[running] = 0

    def remove(self, running: Running) -> None:
        self.running.pop(running, None)

    def step(self) -> Iterator[Output]:
        self.gate.wait(10)
        if self.fail_next_step:
            self.fail_next_step = False
            raise RuntimeError("broken")
        for running, count in list(self.running.items()):
            if running.scores_prompt and count == 0:
                yield Output(running, started_at=0.0, prompt_logprobs=())
            self.running[running] = count + 1
            yield Output(running, (ord("a") + count,))

    def reset(self) -> None:
        self.running.clear()

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def engine() -> CountingEngine:
    return CountingEngine()


@pytest.fixture
async def thread(engine: CountingEngine) -> AsyncIterator[EngineThread]:
    thread = EngineThread("test", lambda: engine, lambda job, index: 0)
    await thread.start()
    yield thread
    engine.gate.set()
    await thread.close()


def job(prompt: str = "abc", **fields: Any) -> Job:
    return Job(request(prompt, **fields), list(prompt.encode()), EchoTokenizer(), context_length=64, stream_interval=1)


async def run(thread: EngineThread, asked: Job) -> list[Event]:
    async with asyncio.timeout(10), aclosing(driver.drive(asked, thread)) as events:
        return [event async for event in events]


def text(events: list[Event], index: int = 0) -> str:
    return "".join(event.text for event in events if isinstance(event, Delta) and event.index == index)


async def test_several_requests_share_steps(thread: EngineThread) -> None:
    first, second = await asyncio.gather(run(thread, job(max_new_tokens=3)), run(thread, job(max_new_tokens=5)))
    assert (text(first), text(second)) == ("abc", "abcde")
    assert isinstance(first[-1], Completion)


async def test_a_choice_that_ended_by_our_stops_leaves_the_engine(thread: EngineThread, engine: CountingEngine) -> None:
    events = await run(thread, job(stop=("c",), max_new_tokens=20))
    assert text(events) == "ab"
    assert await thread.call(lambda: len(engine.running)) == 0


async def test_the_prompt_is_scored_before_any_other_choice_begins(thread: EngineThread) -> None:
    events = await run(thread, job(n=3, prompt_logprobs=0, max_new_tokens=2))
    assert isinstance(events[0], PromptEcho)
    assert [text(events, index) for index in range(3)] == ["ab", "ab", "ab"]


async def test_closing_a_stream_removes_its_sequence(thread: EngineThread, engine: CountingEngine) -> None:
    async with aclosing(driver.drive(job(max_new_tokens=30), thread)) as events:
        await anext(events)
    assert await thread.call(lambda: len(engine.running)) == 0


async def test_a_sequence_that_cannot_begin_fails_alone(thread: EngineThread) -> None:
    good, bad = await asyncio.gather(
        run(thread, job(max_new_tokens=3)), run(thread, job("bad")), return_exceptions=True
    )
    assert isinstance(bad, InvalidArgument)
    assert isinstance(good, list)
    assert text(good) == "abc"


async def test_a_failed_step_ends_what_runs_and_the_next_request_works(
    thread: EngineThread, engine: CountingEngine
) -> None:
    engine.fail_next_step = True
    with pytest.raises(BackendFailed, match="RuntimeError"):
        await run(thread, job())
    assert text(await run(thread, job(max_new_tokens=2))) == "ab"


async def test_close_ends_what_runs_and_the_thread(thread: EngineThread, engine: CountingEngine) -> None:
    engine.gate.clear()
    events = driver.drive(job(), thread)
    waiting = asyncio.ensure_future(anext(events))
    await asyncio.sleep(0)
    closing = asyncio.ensure_future(thread.close())
    with pytest.raises(WorkerUnavailable):
        await waiting
    engine.gate.set()
    await closing
    assert engine.closed
    await thread.close()
    with pytest.raises(WorkerUnavailable):
        await run(thread, job())


async def test_an_engine_that_cannot_be_made_is_the_starters_error() -> None:
    def fail() -> CountingEngine:
        raise InvalidArgument("model", "missing")

    thread = EngineThread("test", fail, lambda job, index: 0)
    with pytest.raises(InvalidArgument):
        await thread.start()
    await thread.close()


@pytest.mark.parametrize("what", ["reset", "remove"])
async def test_a_thread_that_cannot_go_on_fails_what_runs_and_ends_the_process(what: str) -> None:
    """Else requests would wait for ever, and the worker would look idle."""

    class Broken(CountingEngine):
        def reset(self) -> None:
            raise OSError("the device is lost")

        def remove(self, running: Running) -> None:
            raise OSError("the device is lost")

    engine, ends = Broken(), []
    thread = EngineThread("test", lambda: engine, lambda job, index: 0, die=ends.append)
    await thread.start()
    engine.fail_next_step = what == "reset"
    with pytest.raises(WorkerUnavailable):
        async with aclosing(driver.drive(job(max_new_tokens=30), thread)) as stopped:
            async for _ in stopped:
                await run(thread, job(stop=("a",)))  # is removed at its first letter
                await run(thread, job())
    await thread.close()
    assert ends == ["the thread test ended"]
    assert engine.closed


async def test_a_call_runs_in_the_thread_and_brings_its_error_back(thread: EngineThread) -> None:
    assert await thread.call(lambda: threading.current_thread().name) == "test"
    with pytest.raises(ZeroDivisionError):
        await thread.call(lambda: 1 // 0)


async def test_it_counts_its_steps_and_those_that_fail(thread: EngineThread, engine: CountingEngine) -> None:
    asked = job(max_new_tokens=4)
    events = await run(thread, asked)
    await thread.call(lambda: None)  # what was counted after the last token is counted now
    steps = thread.steps
    assert steps.seconds.count == steps.sequences.count >= 4
    assert steps.sequences.total >= 4, "one sequence got a token of each"
    assert steps.tokens.count == 0, "this engine does not count what it processes"
    assert steps.failures == 0
    completion = events[-1]
    assert isinstance(completion, Completion)
    timings = completion.timings
    assert 0 <= timings.prepared_s <= timings.time_to_first_token_s <= timings.total_s
    engine.fail_next_step = True
    with pytest.raises(BackendFailed):
        await run(thread, job(max_new_tokens=4))
    assert thread.steps.failures == 1
