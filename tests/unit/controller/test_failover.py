"""Failover and resume, over servers that are made of lists."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field
from time import monotonic

import grpc
import pytest
from grpc_status import rpc_status

from fastchat_grpc.config import FailoverConfig
from fastchat_grpc.core import Capability
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
    NotResumable,
    NotSupported,
    OutOfMemory,
    QueueFull,
    Starting,
    TooManyCalls,
    UnsupportedField,
    WorkerUnavailable,
)
from fastchat_grpc.rpc.failover import EOF, Attempt, Call, Failover, Nobody
from fastchat_grpc.rpc.plan import Outlook
from fastchat_grpc.rpc.resume import (
    PARSED,
    RAW,
    UNREAD,
    ResumeState,
    fallback_seed,
    obstacle,
    resume_needs,
    resume_request,
)
from fastchat_grpc.rpc.retry import RetryBudget, Verdict, judge
from fastchat_grpc.rpc.status import error_to_status
from fastchat_grpc.v1 import generation_pb2 as pb

LOST = WorkerUnavailable("gone")
FULL = QueueFull("full", retry_after_s=1.0)


def delta(text: str, *token_ids: int, index: int = 0) -> pb.GenerateResponse:
    return pb.GenerateResponse(delta=pb.Delta(index=index, text=text, token_ids=token_ids))


def end(index: int = 0) -> pb.GenerateResponse:
    return pb.GenerateResponse(completion=pb.Completion(index=index, finish_reason=pb.FINISH_REASON_STOP))


FULLY = frozenset({Capability.RESUME, Capability.SEEDED_RESUME, Capability.STATEFUL_RESUME})


@dataclass
class Server:
    """What a server will say, then how it fails (None: it does not)."""

    events: list[pb.GenerateResponse] = field(default_factory=list)
    error: FastChatError | None = None
    can: frozenset[Capability] = FULLY
    fingerprint: str = ""
    backend: str = "engine"
    asked: pb.GenerateRequest | None = None
    verdict: Verdict | None = None
    answered: int = 0
    succeeded: int = 0
    closed: int = 0


class FakeCall:
    """A call of grpc.aio."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.left = list(server.events)

    async def read(self) -> object:
        if self.left:
            return self.left.pop(0)
        if self.server.error is not None:
            raise status_of(self.server.error)
        return EOF

    def cancel(self) -> None:
        self.server.closed += 1


class FakeAttempt(Attempt[pb.GenerateResponse]):
    def __init__(self, server: Server) -> None:
        super().__init__(FakeCall(server))
        self.server = server

    def answered(self) -> None:
        self.server.answered += 1

    def succeeded(self) -> None:
        self.server.succeeded += 1

    def failed(self, error: FastChatError, verdict: Verdict) -> FastChatError:
        self.server.verdict = verdict
        return error


def status_of(error: FastChatError) -> grpc.aio.AioRpcError:
    """An error as it comes over the wire."""
    status = rpc_status.to_status(error_to_status(error))
    return grpc.aio.AioRpcError(
        status.code, grpc.aio.Metadata(), grpc.aio.Metadata(*status.trailing_metadata), status.details
    )


class Fleet:
    """Offers servers in order, then none."""

    def __init__(self, request: pb.GenerateRequest, *servers: Server, outlook: Outlook = Outlook.CLOSED) -> None:
        self.request = request
        self.servers = list(servers)
        self.outlook = outlook
        self.arriving: list[Server] = []
        self.used = 0
        self.waits = 0
        self.waited_s = 0.0
        """Time for which the last wait was allowed to last."""
        self.fallback_seed = fallback_seed(request, random.Random())

    def pick(self, call: Call[pb.GenerateResponse]) -> FakeAttempt:
        if self.used == len(self.servers):
            raise Nobody(self.outlook, NoLiveWorker("none left"))
        server = self.servers[self.used]
        self.used += 1
        state = call.state
        if state is not None and not state.started:
            state.begins_where(obstacle(self.request, server.can), server.fingerprint, server.backend)
        server.asked = resume_request(
            self.request,
            state.snapshot() if state is not None and state.started else None,
            fallback_seed=self.fallback_seed,
        )
        return FakeAttempt(server)

    async def wait(self, call: Call[pb.GenerateResponse], timeout_s: float) -> None:
        self.waits += 1
        self.waited_s = timeout_s
        if self.arriving:
            self.servers.append(self.arriving.pop(0))
        else:
            await asyncio.sleep(timeout_s)


async def run(
    *servers: Server, request: pb.GenerateRequest | None = None, failover: Failover | None = None, **config: float
) -> list[pb.GenerateResponse]:
    failover = failover or Failover(FailoverConfig(**config))  # type: ignore[arg-type]
    request = request or pb.GenerateRequest(prompt="p")
    before = request.SerializeToString(deterministic=True)
    events = [event async for event in failover.generate(request, Fleet(request, *servers), PARSED)]
    assert all(server.closed == (server.asked is not None) for server in servers)
    assert request.SerializeToString(deterministic=True) == before, "the caller's message was changed"
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

    async def test_who_does_not_know_the_model_is_not_the_last_to_be_asked(self) -> None:
        unaware, spare = Server(error=ModelNotFound("no")), Server([end()])
        assert len(await run(unaware, spare)) == 1
        with pytest.raises(ModelNotFound):
            await run(Server(error=ModelNotFound("no")), Server(error=ModelNotFound("no")))

    @pytest.mark.parametrize("error", [NoLiveWorker("away"), Starting("wait"), Draining("bye")])
    @pytest.mark.parametrize("first", [True, False])
    async def test_a_model_that_one_of_them_may_have_is_not_unknown(self, error: FastChatError, first: bool) -> None:
        servers = [Server(error=error), Server(error=ModelNotFound("no"))]
        with pytest.raises(FastChatError) as told:
            await run(*(servers if first else servers[::-1]))
        assert told.value.code is Code.UNAVAILABLE

    async def test_attempts_are_bounded(self) -> None:
        servers = [Server(error=LOST) for _ in range(5)]
        with pytest.raises(FailoverExhausted, match="3 attempts"):
            await run(*servers, max_attempts=3)
        assert [server.asked is not None for server in servers] == [True, True, True, False, False]

    async def test_servers_that_start_or_drain_use_no_attempts_up(self) -> None:
        refusing = [Server(error=error) for error in (Starting("wait"), Draining("bye")) * 4]
        failover = Failover(FailoverConfig(max_attempts=1, retry_ratio=0, retry_reserve_per_s=0))
        assert text(await run(*refusing, Server([delta("hi", 1), end()]), failover=failover)) == "hi"

    async def test_a_full_fleet_says_that_it_is_full(self) -> None:
        with pytest.raises(QueueFull) as caught:
            await run(Server(error=FULL), Server(error=LOST))
        assert caught.value.retry_after_s == 1.0

    async def test_a_fleet_that_takes_no_further_calls_says_so(self) -> None:
        with pytest.raises(TooManyCalls):
            await run(Server(error=TooManyCalls("x", retry_after_s=1.0)), Server(error=LOST))

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

    async def test_what_leaves_nothing_to_generate_is_for_a_server_to_judge(self) -> None:
        bad = InvalidArgument("output.n", "must be at least 1")
        for n in (0, -1):
            with pytest.raises(InvalidArgument, match="at least 1"):
                await run(Server(error=bad), request=pb.GenerateRequest(prompt="p", output=pb.OutputOptions(n=n)))
        ended = pb.Resume(choices=[pb.ResumedChoice(finished=True)])
        assert not await run(asked := Server(), request=pb.GenerateRequest(prompt="p", resume=ended))
        assert asked.succeeded == 1
        with pytest.raises(ModelNotFound):
            await run(Server(error=ModelNotFound("x")), request=pb.GenerateRequest(prompt="p", resume=ended))

    async def test_a_choice_that_is_said_twice_to_have_ended_ends_no_other(self) -> None:
        ended = pb.Resume(choices=[pb.ResumedChoice(finished=True), pb.ResumedChoice(finished=True)])
        request = pb.GenerateRequest(prompt="p", output=pb.OutputOptions(n=2), resume=ended)
        first, second = Server([delta("a", 1, index=1)], LOST), Server([delta("b", 2, index=1), end(1)])
        assert text(await run(first, second, request=request), 1) == "ab"


class TestAfterTheFirstEvent:
    async def test_the_next_server_is_told_what_the_caller_has(self) -> None:
        first = Server([delta("he", 1), delta("l\u00e9", 2, 3)], LOST)
        second = Server([delta("lo", 4), end()])
        assert text(await run(first, second)) == "hel\u00e9lo"
        assert second.asked is not None
        (choice,) = second.asked.resume.choices
        assert (list(choice.output_token_ids), choice.text_length, choice.finished) == ([1, 2, 3], 4, False)

    async def test_the_next_server_is_told_which_model_began(self) -> None:
        refused = Server(error=LOST, fingerprint="v0")
        second = Server([end()])
        await run(refused, Server([delta("a", 1)], LOST, fingerprint="v1"), second)
        assert second.asked is not None
        assert second.asked.resume.model_fingerprint == "v1"

    async def test_what_arrives_resumed_keeps_its_fingerprint(self) -> None:
        request = pb.GenerateRequest(prompt="p")
        request.resume.model_fingerprint = "v1"
        second = Server([end()])
        await run(Server([delta("a", 1)], LOST), second, request=request)
        assert second.asked is not None
        assert second.asked.resume.model_fingerprint == "v1"

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
        with pytest.raises(NotResumable, match="more than the 2 tokens"):
            await run(Server([delta("x", 1, 2), delta("y", 3)], LOST), spare, max_cached_tokens=2)
        assert spare.asked is None

    async def test_a_server_that_cannot_be_resumed_is_not(self) -> None:
        spare = Server([end()])
        with pytest.raises(NotResumable, match="gone; its model cannot be continued"):
            await run(Server([delta("x", 1)], LOST, can=frozenset()), spare)
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

    async def test_what_arrives_resumed_and_kills_its_servers_is_not_given_to_all_of_them(self) -> None:
        request = pb.GenerateRequest(prompt="x")
        request.resume.choices.add(index=0, output_token_ids=[7], text_length=1)
        servers = [Server(error=LOST) for _ in range(20)]
        with pytest.raises(FailoverExhausted):
            await run(*servers, request=request, max_resumes=2)
        assert sum(server.asked is not None for server in servers) == 3

    async def test_timings_of_a_resumed_generation_are_the_callers(self) -> None:
        late = end()
        late.completion.timings.total.FromNanoseconds(1)
        events = await run(Server([delta("a", 1)], LOST), Server([late]))
        timings = events[-1].completion.timings
        assert timings.total.ToNanoseconds() > 1
        assert timings.time_to_first_token.ToNanoseconds() <= timings.total.ToNanoseconds()


def sampled(**sampling: float) -> pb.GenerateRequest:
    request = pb.GenerateRequest(prompt="p")
    request.sampling.SetInParent()
    for name, value in sampling.items():
        setattr(request.sampling, name, value)
    return request


def seed_of(server: Server) -> int | None:
    assert server.asked is not None
    sampling = server.asked.sampling
    return sampling.fallback_seed if sampling.HasField("fallback_seed") else None


class TestSeeds:
    async def seed(self, can: frozenset[Capability] = FULLY, **sampling: float) -> int | None:
        server = Server([end()], can=can)
        await run(server, request=sampled(**sampling))
        return seed_of(server)

    async def test_one_is_given_where_sampling_is_random(self) -> None:
        assert await self.seed() is not None
        assert await self.seed() != await self.seed()

    async def test_a_seed_of_the_caller_or_of_a_relay_above_stays(self) -> None:
        assert await self.seed(seed=0) is None
        assert await self.seed(fallback_seed=7) == 7
        assert fallback_seed(pb.GenerateRequest(resume=pb.Resume(fallback_seed=7)), random.Random()) == 7

    async def test_greedy_requests_need_none(self) -> None:
        assert await self.seed(temperature=0.0) is None
        assert await self.seed(top_p=0.0) is None

    async def test_every_attempt_has_the_same(self) -> None:
        servers = [Server(error=LOST), Server([delta("x", 1)], LOST), Server([end()])]
        await run(*servers, request=sampled())
        assert len({seed_of(server) for server in servers}) == 1

    async def test_a_seeded_stream_ends_with_a_server_that_cannot_continue_its_numbers(self) -> None:
        spare = Server([end()])
        with pytest.raises(NotResumable, match="random numbers of a seed"):
            await run(Server([delta("x", 1)], LOST, can=frozenset({Capability.RESUME})), spare, request=sampled(seed=1))
        assert spare.asked is None

    async def test_the_next_server_is_told_which_backend_drew(self) -> None:
        refused, second = Server(error=LOST, backend="other"), Server([end()])
        await run(refused, Server([delta("x", 1)], LOST, backend="e"), second, request=sampled(seed=1))
        assert second.asked is not None
        assert second.asked.resume.backend == "e"

    async def test_a_seeded_stream_of_an_unknown_backend_breaks_with_its_server(self) -> None:
        spare = Server([end()])
        with pytest.raises(NotResumable, match="not known which backend"):
            await run(Server([delta("x", 1)], LOST, backend=""), spare, request=sampled(seed=1))
        assert spare.asked is None
        assert text(await run(Server([delta("x", 1)], LOST, backend=""), Server([end()]), request=sampled())) == "x"


class TestNeeds:
    """What a server must be able to do to go on with a request; named by what vLLM, SGLang and others cannot."""

    @pytest.mark.parametrize(
        ("request_", "more"),
        [
            (sampled(), set()),
            (sampled(seed=1), {Capability.SEEDED_RESUME}),
            (sampled(seed=1, temperature=0.0), set()),
            (sampled(presence_penalty=0.5), {Capability.STATEFUL_RESUME}),
            (sampled(frequency_penalty=-0.5), {Capability.STATEFUL_RESUME}),
            (sampled(repetition_penalty=1.5), set()),  # counts prompt and output alike: it sees both anywhere
            (
                pb.GenerateRequest(prompt="p", structured_output=pb.StructuredOutput(json_object=pb.JsonObject())),
                {Capability.STATEFUL_RESUME},
            ),
        ],
    )
    def test_they_follow_from_the_request(self, request_: pb.GenerateRequest, more: set[Capability]) -> None:
        resume = pb.Resume(choices=[pb.ResumedChoice(output_token_ids=[1])], model_fingerprint="v1", backend="e")
        needs = resume_needs(request_, resume)
        assert needs.capabilities == {Capability.RESUME, *more}
        assert needs.fingerprint == "v1"
        assert needs.backend == ("e" if Capability.SEEDED_RESUME in more else ""), "only random numbers are an engine's"

    def test_before_the_first_token_any_that_resumes_will_do(self) -> None:
        needs = resume_needs(sampled(seed=1, presence_penalty=1), pb.Resume(backend="e"))
        assert needs == (frozenset({Capability.RESUME}), "", "")

    def test_a_choice_that_has_ended_does_not_go_on_whatever_its_other_entries_say(self) -> None:
        choices = [pb.ResumedChoice(output_token_ids=[1]), pb.ResumedChoice(finished=True)]
        needs = resume_needs(sampled(presence_penalty=1), pb.Resume(choices=choices))
        assert needs.capabilities == {Capability.RESUME}

    def test_all_choices_of_a_seed_come_of_one_generator(self) -> None:
        resume = pb.Resume(choices=[pb.ResumedChoice(finished=True)], backend="e")
        needs = resume_needs(sampled(seed=1, presence_penalty=1), resume)
        assert needs == (frozenset({Capability.RESUME, Capability.SEEDED_RESUME}), "", "e")


class TestWaiting:
    def fleet(self, first: Server, *arriving: Server, outlook: Outlook = Outlook.OPEN) -> Fleet:
        fleet = Fleet(pb.GenerateRequest(prompt="p"), first, outlook=outlook)
        fleet.arriving = list(arriving)
        return fleet

    async def ask(self, fleet: Fleet, wait_s: float = 0.05) -> list[pb.GenerateResponse]:
        failover = Failover(FailoverConfig(wait_s=wait_s))
        return [event async for event in failover.generate(fleet.request, fleet, PARSED)]

    @pytest.mark.parametrize("error", [LOST, Draining("bye"), FULL, NoLiveWorker("of a child")])
    async def test_a_stream_that_has_begun_waits_whatever_ended_it(self, error: FastChatError) -> None:
        fleet = self.fleet(Server([delta("a", 1)], error), Server([delta("b", 2), end()]))
        assert text(await self.ask(fleet)) == "ab"

    async def test_fullness_and_drains_do_not_use_resumes_up(self) -> None:
        fleet = self.fleet(Server([delta("a", 1)], LOST), *(Server(error=e) for e in [FULL, Draining("x")] * 10))
        fleet.arriving.append(Server([delta("b", 2), end()]))
        assert text(await self.ask(fleet)) == "ab"

    async def test_each_outage_has_its_own_patience(self) -> None:
        failover = Failover(FailoverConfig(wait_s=0.3))
        fleet = self.fleet(Server([delta("a", 1)], LOST))
        patient = 0.0

        async def wait(call: Call[pb.GenerateResponse], timeout_s: float) -> None:
            nonlocal patient
            patient = timeout_s
            await asyncio.sleep(0.1)
            last = len(fleet.servers) == 4
            fleet.servers.append(Server([delta("b", 2), end()]) if last else Server([delta("a", 1)], LOST))

        fleet.wait = wait  # type: ignore[method-assign]
        assert text([event async for event in failover.generate(fleet.request, fleet, PARSED)]) == "aaaab"
        assert patient == 0.3

    async def test_the_error_says_what_broke_and_that_nobody_came(self) -> None:
        fleet = self.fleet(Server([delta("a", 1)], LOST))
        with pytest.raises(NoLiveWorker, match=r"the stream broke \(gone\), .* none left"):
            await self.ask(fleet)

    async def test_the_error_says_why_a_stream_cannot_go_on(self) -> None:
        unable = Server(error=UnsupportedField("resume", "penalties cannot be continued"))
        with pytest.raises(NotResumable, match=r"broke \(gone\), .* penalties cannot be continued"):
            await run(Server([delta("a", 1)], LOST), unable)

    async def test_the_error_reads_as_one_sentence_where_nothing_but_an_inability_is_known(self) -> None:
        with pytest.raises(
            NotResumable, match=r"^the stream broke, and the worker .* cannot: resume: it is of no use$"
        ):
            await run(Server([delta("a", 1)], InvalidArgument("resume", "it is of no use")))

    async def test_a_server_that_cannot_go_on_is_passed_over(self) -> None:
        unable = Server(error=UnsupportedField("resume", "penalties cannot be continued"))
        assert text(await run(Server([delta("a", 1)], LOST), unable, Server([delta("b", 2), end()]))) == "ab"

    async def test_a_waiting_call_is_under_way(self) -> None:
        failover = Failover(FailoverConfig(wait_s=30))
        fleet = self.fleet(Server([delta("a", 1)], LOST))
        events = failover.generate(fleet.request, fleet, PARSED)
        await anext(events)
        waiting = asyncio.ensure_future(anext(events))
        while not fleet.waits:
            await asyncio.sleep(0)
        assert failover.running == 1
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert failover.running == 0

    async def test_the_deadline_ends_the_wait(self) -> None:
        failover = Failover(FailoverConfig(wait_s=30))
        fleet = self.fleet(Server([delta("a", 1)], LOST))
        with pytest.raises(DeadlineExceeded):
            async for _ in failover.generate(fleet.request, fleet, PARSED, monotonic() + 0.05):
                pass
        assert fleet.waits > 0
        assert fleet.waited_s <= 0.05


class TestCalls:
    async def test_a_unary_call_moves_on_and_returns_the_first_answer(self) -> None:
        failover = Failover(FailoverConfig())
        fleet = Fleet(pb.GenerateRequest(), Server(error=LOST), good := Server([delta("answer", 1)]))
        assert (await failover.call(fleet)).delta.text == "answer"
        assert good.succeeded == 1

    async def test_a_unary_call_fails_with_a_final_error(self) -> None:
        failover = Failover(FailoverConfig())
        with pytest.raises(InvalidArgument):
            await failover.call(Fleet(pb.GenerateRequest(), Server(error=InvalidArgument("f", "bad")), Server([end()])))


async def test_closing_a_generation_closes_its_attempt() -> None:
    server = Server([delta("a", 1), delta("b", 2), end()])
    request = pb.GenerateRequest(prompt="p")
    events = Failover(FailoverConfig()).generate(request, Fleet(request, server), PARSED)
    await anext(events)
    await events.aclose()
    assert (server.closed, server.succeeded) == (1, 0)


async def test_a_worker_succeeds_with_its_completion_not_with_its_first_token() -> None:
    broken, good = Server([delta("a", 1)], LOST), Server([delta("b", 2), end()])
    await run(broken, good)
    assert (broken.answered, broken.succeeded, good.succeeded) == (1, 0, 1)


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
        (NoLiveWorker("of a child"), Verdict.EMPTY),
        (Starting("of a child"), Verdict.STARTING),
        (Draining("bye"), Verdict.LEAVING),
        (FULL, Verdict.FULL),
        (TooManyCalls("x"), Verdict.FULL),
        (FailoverExhausted("of a child"), Verdict.FINAL),
        (NotResumable("of a child"), Verdict.FINAL),
    ],
)
def test_errors_are_judged_by_whose_fault_they_are(error: FastChatError, verdict: Verdict) -> None:
    assert judge(error) is verdict


@pytest.mark.parametrize("error", [InvalidArgument("f", "x"), NotSupported("x")])
def test_a_refusal_to_go_on_is_the_servers_inability(error: FastChatError) -> None:
    assert judge(error) is Verdict.FINAL
    assert judge(error, resumed=True) is Verdict.UNABLE


class TestResumeState:
    """Raw events are kept as they came and read late; nobody may notice."""

    def progress(self, limit: int = 10_000, n: int = 1) -> ResumeState[bytes]:
        return ResumeState(pb.GenerateRequest(prompt="p", output=pb.OutputOptions(n=n)), RAW, limit)

    @pytest.mark.parametrize("count", [1, UNREAD - 1, UNREAD, 3 * UNREAD + 1])
    def test_raw_events_add_up_whenever_they_are_read(self, count: int) -> None:
        progress = self.progress()
        for i in range(count):
            progress.observe(delta("\u00e9\U0001f98a", i).SerializeToString())
        (choice,) = progress.snapshot().choices
        assert list(choice.output_token_ids) == list(range(count))
        assert choice.text_length == 2 * count

    def test_reasoning_is_what_the_caller_has_too(self) -> None:
        progress = self.progress()
        thought = pb.GenerateResponse(delta=pb.Delta(reasoning="why", token_ids=[1, 2]))
        for event in (thought, delta("so", 3)):
            progress.observe(event.SerializeToString())
        (choice,) = progress.snapshot().choices
        assert choice.text_length == len("whyso")

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
        assert progress.obstacle
        assert len(progress._unread) == 0

    def test_large_events_are_read_soon(self) -> None:
        progress = self.progress()
        top = [pb.TopLogprob(token_id=i, token="x" * 50) for i in range(20)]
        large = pb.GenerateResponse(delta=pb.Delta(token_ids=[1], logprobs=[pb.TokenLogprob(token_id=1, top=top)]))
        for _ in range(UNREAD - 1):
            progress.observe(large.SerializeToString())
        assert sum(map(len, progress._unread)) < 32_768 + len(large.SerializeToString())

    def test_what_is_forgotten_is_not_kept(self) -> None:
        progress = self.progress(limit=UNREAD)
        for i in range(10 * UNREAD):
            progress.observe(delta("x", i).SerializeToString())
        assert progress.obstacle
        assert not progress._choices
