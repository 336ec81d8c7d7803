"""Failover and resume, over servers that are made of lists."""

from __future__ import annotations

from dataclasses import dataclass, field

import grpc
import pytest
from grpc_status import rpc_status

from fastchat_grpc.config import FailoverConfig
from fastchat_grpc.errors import (
    BackendFailed,
    Code,
    DeadlineExceeded,
    Draining,
    FailoverExhausted,
    FastChatError,
    InvalidArgument,
    ModelNotFound,
    NoLiveWorker,
    OutOfMemory,
    QueueFull,
    WorkerUnavailable,
)
from fastchat_grpc.rpc.failover import EOF, Failover
from fastchat_grpc.rpc.progress import PARSED, RAW, UNREAD, Progress
from fastchat_grpc.rpc.retry import RetryBudget, Verdict, judge
from fastchat_grpc.rpc.status import error_to_status
from fastchat_grpc.v1 import generation_pb2 as pb

LOST = WorkerUnavailable("gone")
FULL = QueueFull("full", retry_after_s=1.0)


def delta(text: str, *token_ids: int, index: int = 0) -> pb.GenerateResponse:
    return pb.GenerateResponse(delta=pb.Delta(index=index, text=text, token_ids=token_ids))


def end(index: int = 0) -> pb.GenerateResponse:
    return pb.GenerateResponse(completion=pb.Completion(index=index, finish_reason=pb.FINISH_REASON_STOP))


@dataclass
class Server:
    """What a server will say, then how it fails (None: it does not)."""

    events: list[pb.GenerateResponse] = field(default_factory=list)
    error: FastChatError | None = None
    resumable: bool = True
    asked: pb.GenerateRequest | None = None
    verdict: Verdict | None = None
    answered: int = 0
    closed: int = 0


class Attempt:
    def __init__(self, server: Server) -> None:
        self.server = server
        self.left = list(server.events)

    async def read(self) -> object:
        if self.left:
            return self.left.pop(0)
        if self.server.error is not None:
            raise status_of(self.server.error)
        return EOF

    def cancelled(self) -> FastChatError:
        raise AssertionError("nobody cancels here")

    def answered(self) -> None:
        self.server.answered += 1

    def failed(self, error: FastChatError, verdict: Verdict) -> FastChatError:
        self.server.verdict = verdict
        return error

    def close(self) -> None:
        self.server.closed += 1


def status_of(error: FastChatError) -> grpc.aio.AioRpcError:
    """An error as it comes over the wire."""
    status = rpc_status.to_status(error_to_status(error))
    return grpc.aio.AioRpcError(
        status.code, grpc.aio.Metadata(), grpc.aio.Metadata(*status.trailing_metadata), status.details
    )


class Router:
    """Offers servers in order, then none."""

    def __init__(self, *servers: Server) -> None:
        self.servers = servers
        self.used = 0

    async def next(self, progress: Progress[pb.GenerateResponse], last: Verdict | None) -> Attempt:
        if self.used == len(self.servers):
            raise NoLiveWorker("none left")
        server = self.servers[self.used]
        self.used += 1
        server.asked = pb.GenerateRequest()
        server.asked.CopyFrom(progress.request(resumable=server.resumable))
        return Attempt(server)


async def run(
    *servers: Server, request: pb.GenerateRequest | None = None, failover: Failover | None = None, **config: float
) -> list[pb.GenerateResponse]:
    failover = failover or Failover(FailoverConfig(**config))  # type: ignore[arg-type]
    request = request or pb.GenerateRequest(prompt="p")
    events = [event async for event in failover.generate(request, Router(*servers), PARSED)]
    assert all(server.closed == (server.asked is not None) for server in servers)
    return events


def text(events: list[pb.GenerateResponse], index: int = 0) -> str:
    return "".join(event.delta.text for event in events if event.HasField("delta") and event.delta.index == index)


class TestBeforeTheFirstEvent:
    @pytest.mark.parametrize("error", [LOST, FULL, Draining("bye")])
    async def test_another_server_is_asked_the_same(self, error: FastChatError) -> None:
        bad, good = Server(error=error), Server([delta("hi", 1), end()])
        assert text(await run(bad, good)) == "hi"
        assert bad.asked == good.asked
        assert not good.asked.HasField("resume")  # type: ignore[union-attr]
        assert (bad.answered, good.answered) == (0, 1)

    @pytest.mark.parametrize(
        "error",
        [
            InvalidArgument("f", "bad"),
            ModelNotFound("no"),
            OutOfMemory("big"),
            BackendFailed("x"),
            DeadlineExceeded("t"),
        ],
    )
    async def test_errors_that_would_come_anywhere_are_final(self, error: FastChatError) -> None:
        bad, spare = Server(error=error), Server([end()])
        with pytest.raises(type(error)):
            await run(bad, spare)
        assert spare.asked is None
        assert bad.verdict is Verdict.FINAL

    async def test_attempts_are_bounded(self) -> None:
        servers = [Server(error=LOST) for _ in range(5)]
        with pytest.raises(FailoverExhausted, match="3 attempts"):
            await run(*servers, max_attempts=3)
        assert [server.asked is not None for server in servers] == [True, True, True, False, False]

    async def test_a_full_fleet_says_that_it_is_full(self) -> None:
        with pytest.raises(QueueFull) as caught:
            await run(Server(error=FULL), Server(error=LOST))
        assert caught.value.retry_after_s == 1.0

    async def test_retries_end_with_the_budget(self) -> None:
        failover = Failover(FailoverConfig(retry_ratio=0.5, retry_reserve_per_s=0))
        done = 0
        for _ in range(20):
            try:
                await run(Server(error=LOST), Server([end()]), failover=failover)
                done += 1
            except FailoverExhausted:
                pass
        assert done == 10
        assert failover.retried == 10

    async def test_a_stream_that_ends_early_is_a_failure(self) -> None:
        assert text(await run(Server([]), Server([delta("x", 1), end()]))) == "x"


class TestAfterTheFirstEvent:
    async def test_the_next_server_is_told_what_the_caller_has(self) -> None:
        first = Server([delta("he", 1), delta("l\u00e9", 2, 3)], LOST)
        second = Server([delta("lo", 4), end()])
        assert text(await run(first, second)) == "hel\u00e9lo"
        assert second.asked is not None
        (choice,) = second.asked.resume.choices
        assert (list(choice.output_token_ids), choice.text_length, choice.finished) == ([1, 2, 3], 4, False)

    async def test_several_losses_add_up(self) -> None:
        servers = [Server([delta(c, i)], LOST) for i, c in enumerate("abc")]
        last = Server([end()])
        assert text(await run(*servers, last)) == "abc"
        assert list(last.asked.resume.choices[0].output_token_ids) == [0, 1, 2]  # type: ignore[union-attr]

    async def test_every_choice_keeps_its_own_state(self) -> None:
        request = pb.GenerateRequest(prompt="p", output=pb.OutputOptions(n=3))
        first = Server([delta("a", 1, index=0), delta("bb", 2, 3, index=1), end(0)], LOST)
        second = Server([delta("c", 4, index=2), end(2), end(1)])
        events = await run(first, second, request=request)
        choices = {choice.index: choice for choice in second.asked.resume.choices}  # type: ignore[union-attr]
        assert choices[0].finished
        assert list(choices[1].output_token_ids) == [2, 3]
        assert 2 not in choices
        assert sum(event.HasField("completion") for event in events) == 3

    async def test_a_prompt_is_not_sent_twice(self) -> None:
        prompt = pb.GenerateResponse(prompt=pb.Prompt(text="p"))
        second = Server([end()])
        await run(Server([prompt], LOST), second)
        assert second.asked is not None
        assert second.asked.HasField("resume")
        assert not second.asked.resume.choices

    async def test_nothing_is_repeated_once_all_choices_have_ended(self) -> None:
        spare = Server([end()])
        await run(Server([delta("x", 1), end()], LOST), spare)
        assert spare.asked is None

    async def test_resumes_are_bounded_and_can_be_turned_off(self) -> None:
        for limit in (0, 2):
            servers = [Server([delta("x", 1)], LOST) for _ in range(6)]
            with pytest.raises(FailoverExhausted if limit else WorkerUnavailable):
                await run(*servers, max_resumes=limit)
            assert sum(server.asked is not None for server in servers) == limit + 1

    async def test_resumes_cost_no_budget(self) -> None:
        servers = [Server([delta("x", 1)], LOST), Server([end()])]
        await run(*servers, retry_ratio=0, retry_reserve_per_s=0)

    async def test_an_output_beyond_the_cache_breaks_with_its_server(self) -> None:
        spare = Server([end()])
        with pytest.raises(WorkerUnavailable):
            await run(Server([delta("x", 1, 2), delta("y", 3)], LOST), spare, max_cached_tokens=2)
        assert spare.asked is None

    async def test_a_server_that_cannot_be_resumed_is_not(self) -> None:
        spare = Server([end()])
        with pytest.raises(WorkerUnavailable):
            await run(Server([delta("x", 1)], LOST, resumable=False), spare)
        assert spare.asked is None

    async def test_a_full_server_is_passed_over_when_resuming(self) -> None:
        assert (
            text(await run(Server([delta("a", 1)], LOST), Server(error=FULL), Server([delta("b", 2), end()]))) == "ab"
        )

    async def test_a_request_that_was_resumed_before_goes_on_from_there(self) -> None:
        request = pb.GenerateRequest(prompt="p", output=pb.OutputOptions(n=2))
        request.resume.choices.add(index=0, output_token_ids=[7], text_length=1)
        request.resume.choices.add(index=1, finished=True)
        first, second = Server([delta("b", 8)], LOST), Server([end()])
        await run(first, second, request=request)
        choices = {choice.index: choice for choice in second.asked.resume.choices}  # type: ignore[union-attr]
        assert (list(choices[0].output_token_ids), choices[0].text_length) == ([7, 8], 2)
        assert choices[1].finished

    async def test_timings_of_a_resumed_generation_are_the_callers(self) -> None:
        late = end()
        late.completion.timings.total.FromNanoseconds(1)
        events = await run(Server([delta("a", 1)], LOST), Server([late]))
        timings = events[-1].completion.timings
        assert timings.total.ToNanoseconds() > 1
        assert timings.time_to_first_token.ToNanoseconds() <= timings.total.ToNanoseconds()


class TestSeeds:
    async def seed(self, *, resumable: bool = True, **sampling: float) -> int | None:
        request = pb.GenerateRequest(prompt="p")
        request.sampling.SetInParent()
        for name, value in sampling.items():
            setattr(request.sampling, name, value)
        server = Server([end()], resumable=resumable)
        await run(server, request=request)
        assert server.asked is not None
        return server.asked.sampling.seed if server.asked.sampling.HasField("seed") else None

    async def test_one_is_given_where_sampling_is_random(self) -> None:
        assert await self.seed() is not None
        assert await self.seed() != await self.seed()

    async def test_a_seed_of_the_caller_stays(self) -> None:
        assert await self.seed(seed=0) == 0

    async def test_greedy_requests_need_none(self) -> None:
        assert await self.seed(temperature=0.0) is None
        assert await self.seed(top_p=0.0) is None

    async def test_a_server_that_cannot_resume_gets_none(self) -> None:
        assert await self.seed(resumable=False) is None

    async def test_every_attempt_has_the_same(self) -> None:
        servers = [Server(error=LOST), Server([delta("x", 1)], LOST), Server([end()])]
        await run(*servers)
        assert len({server.asked.sampling.seed for server in servers if server.asked}) == 1


class TestCalls:
    async def test_a_unary_call_moves_on_and_returns_the_first_answer(self) -> None:
        failover = Failover(FailoverConfig())
        router = Router(Server(error=LOST), Server([delta("answer", 1)]))
        assert (await failover.call(router)).delta.text == "answer"

    async def test_a_unary_call_fails_with_a_final_error(self) -> None:
        failover = Failover(FailoverConfig())
        with pytest.raises(InvalidArgument):
            await failover.call(Router(Server(error=InvalidArgument("f", "bad")), Server([end()])))


async def test_closing_a_generation_closes_its_attempt() -> None:
    server = Server([delta("a", 1), delta("b", 2), end()])
    events = Failover(FailoverConfig()).generate(pb.GenerateRequest(prompt="p"), Router(server), PARSED)
    await anext(events)
    await events.aclose()
    assert server.closed == 1


def test_the_budget_refills_with_time() -> None:
    now = 0.0
    budget = RetryBudget(FailoverConfig(retry_ratio=0, retry_reserve_per_s=1), clock=lambda: now)
    assert [budget.withdraw() for _ in range(11)] == [True] * 10 + [False]
    now = 2.0
    assert [budget.withdraw() for _ in range(3)] == [True, True, False]


def transport(code: Code, message: str) -> FastChatError:
    return type("Transport", (FastChatError,), {"code": code, "reason": code.name})(message)


@pytest.mark.parametrize(
    ("error", "verdict"),
    [
        (transport(Code.RESOURCE_EXHAUSTED, "Received message larger than max (9 vs. 4)"), Verdict.FINAL),
        (transport(Code.INTERNAL, "Received RST_STREAM with error code 2"), Verdict.LOST),
        (transport(Code.UNKNOWN, "Stream removed"), Verdict.LOST),
        (transport(Code.CANCELLED, "Cancelling all calls"), Verdict.LOST),
        (transport(Code.INTERNAL, "bug"), Verdict.FINAL),
        (NoLiveWorker("of a child"), Verdict.REFUSED),
        (FailoverExhausted("of a child"), Verdict.FINAL),
    ],
)
def test_errors_are_judged_by_whose_fault_they_are(error: FastChatError, verdict: Verdict) -> None:
    assert judge(error) is verdict


class TestProgress:
    """Raw events are kept as they came and read late; nobody may notice."""

    def progress(self, limit: int = 10_000, n: int = 1) -> Progress[bytes]:
        return Progress(pb.GenerateRequest(prompt="p", output=pb.OutputOptions(n=n)), RAW, limit)

    @pytest.mark.parametrize("count", [1, UNREAD - 1, UNREAD, 3 * UNREAD + 1])
    def test_raw_events_add_up_whenever_they_are_read(self, count: int) -> None:
        progress = self.progress()
        progress.request(resumable=True)
        for i in range(count):
            progress.observe(delta("\u00e9\U0001f98a", i).SerializeToString())
        (choice,) = progress.request(resumable=True).resume.choices
        assert list(choice.output_token_ids) == list(range(count))
        assert choice.text_length == 2 * count

    def test_raw_completions_are_counted_without_reading(self) -> None:
        progress = self.progress(n=2)
        for index in (1, 0):
            assert not progress.complete
            progress.observe(end(index).SerializeToString())
        assert progress.complete

    def test_no_more_than_the_limit_is_kept(self) -> None:
        progress = self.progress(limit=UNREAD)
        for i in range(10 * UNREAD):
            progress.observe(delta("x", i).SerializeToString())
        assert not progress.resumable
        assert len(progress._unread) == 0
        assert not progress._choices
