"""Where a gateway goes on with a stream that has lost its worker: `ContinueStream`.

The gateway's module carries the stream, and asks here after each attempt that ended early. What is done next follows
the same table as the relay (`rpc.plan`); workers are searched for, waited for and judged as there. What one stream has
been through is kept with its ticket; a controller that did not issue it takes it over with what the gateway tells.
"""

from __future__ import annotations

import asyncio
import base64
import logging
from contextlib import suppress
from dataclasses import replace
from time import monotonic
from urllib.parse import quote

from google.api.httpbody_pb2 import HttpBody

from fastchat_grpc.controller.dispatch import PickRequest
from fastchat_grpc.controller.envoy.als import Verdicts, read_status
from fastchat_grpc.controller.envoy.eds import Endpoints
from fastchat_grpc.controller.envoy.pick import Pick
from fastchat_grpc.controller.envoy.tickets import Ticket, Tickets
from fastchat_grpc.controller.fleet import Reservation, Worker
from fastchat_grpc.controller.relay import Relay
from fastchat_grpc.controller.search import Search
from fastchat_grpc.errors import (
    AdapterNotFound,
    Code,
    FailoverExhausted,
    FastChatError,
    ModelNotFound,
    NoLiveWorker,
    NotResumable,
    WorkerUnavailable,
)
from fastchat_grpc.openai import sse
from fastchat_grpc.rpc.failover import Nobody
from fastchat_grpc.rpc.plan import Outlook, Situation, Step, next_step
from fastchat_grpc.rpc.resume import ResumeNeeds
from fastchat_grpc.rpc.retry import Verdict, judge
from fastchat_grpc.rpc.status import error_from_status, error_to_status
from fastchat_grpc.v1 import registry_pb2 as pb

logger = logging.getLogger(__name__)

HOLD_S = 4.0
"""A question is answered within this time, if only with "ask again"; the gateway leaves a controller that is silent."""
_HARMLESS = (Verdict.STARTING, Verdict.LEAVING)


class Journey:
    """What one stream has been through, and what it needs of the next worker."""

    def __init__(self, pick: Pick, search: Search, wait_s: float) -> None:
        self.pick = pick
        self.search = search
        self.wait_s = wait_s
        self.waits_until = monotonic() + wait_s
        self.started = False
        self.displaced = False
        self.attempts = 1
        self.losses = 0
        self.funded = True
        self.verdict: Verdict | None = None
        self.error: FastChatError | None = None
        self.waits_with: pb.ContinueStreamRequest | None = None
        """The question that was answered with "ask again"."""
        self.fingerprint = self.backend = ""

    def learn(self, fingerprint: str, backend: str) -> None:
        """Who began it, by its own word, else as it registered."""
        if self.started and not self.fingerprint and not self.backend:
            origin = self.search.origin
            self.fingerprint = fingerprint or (origin.fingerprint if origin is not None else "")
            self.backend = backend or (origin.backend if origin is not None else "")

    def wanted(self) -> PickRequest:
        """What the next worker must have."""
        pick = self.pick
        wanted = PickRequest(adapter=pick.adapter, prefers=pick.prefers)
        if self.started:
            backend = self.backend if pick.seeded else ""
            return wanted.going_on(ResumeNeeds(pick.needs, self.fingerprint, backend))
        return wanted.going_on(pick.resumed) if pick.resumed is not None else wanted

    @property
    def patience_s(self) -> float:
        """Time left to wait in, whichever controllers are asked in it."""
        return self.waits_until - monotonic()

    @property
    def resumed(self) -> bool:
        """Whether a worker gets it as the rest of something."""
        return self.started or self.pick.resumed is not None

    def situation(self) -> Situation:
        """Where it stands."""
        return Situation(
            last=self.verdict,
            started=self.resumed,
            displaced=self.displaced or self.resumed,
            attempts=self.attempts,
            losses=self.losses,
            funded=self.funded,
            patience_s=self.patience_s,
        )


class GoingOn:
    """Answers gateways' questions.

    Args:
        relay: its dispatcher, and how far it carries requests.
    """

    def __init__(self, relay: Relay, endpoints: Endpoints, tickets: Tickets, verdicts: Verdicts) -> None:
        self._dispatcher = relay.dispatcher
        self._registry = relay.dispatcher.registry
        self._failover = relay.failover
        self._endpoints = endpoints
        self._tickets = tickets
        self._verdicts = verdicts

    async def answer(self, question: pb.ContinueStreamRequest) -> pb.ContinueStreamResponse:
        """Where the stream goes on. Raises InvalidArgument for a pick that is none."""
        pick = Pick.decode(question.pick)
        if self._tickets.has_ended(pick.ticket):
            return pb.ContinueStreamResponse()  # which nobody reads any more
        ticket = self._tickets.get(pick.ticket)
        if question.unread:
            if ticket is not None:
                ticket.release()
            return pb.ContinueStreamResponse()
        if ticket is None:
            ticket = self._tickets.adopt(pick.ticket, pick.gateway)
        journey = ticket.journey
        if journey is None:
            journey = ticket.journey = self._begin(pick, ticket)
        known = journey.waits_with == question
        if not known:
            self._note(ticket, journey, question)
        journey.waits_with = None
        # What has begun is taken to other controllers, who may know somebody now, before anybody waits.
        return await self._next(ticket, journey, question, 0.0 if journey.started and not known else HOLD_S)

    def _begin(self, pick: Pick, ticket: Ticket) -> Journey:
        search = Search(self._dispatcher, pick.model, pick.key)
        if ticket.reservation is not None:
            worker = ticket.reservation.worker
            search.origin = worker.model(pick.model)
            search.tries(worker.spec.instance_id)
        return Journey(pick, search, self._failover.config.wait_s)

    # ---------------------------------------------------------------------------- what has happened

    def _note(self, ticket: Ticket, journey: Journey, question: pb.ContinueStreamRequest) -> None:
        """An attempt has ended."""
        journey.waits_until = monotonic() + journey.wait_s
        journey.started = question.started
        journey.learn(question.model_fingerprint, question.backend)
        worker = self._worker(ticket, question)
        if question.parked:
            ticket.release()
            journey.verdict = None
            if worker is not None:
                journey.search.forgive(worker.spec.instance_id)
            return
        status = read_status(question.status_code, question.status_details) if question.status_code else None
        error = error_from_status(status) if status is not None else WorkerUnavailable("the connection to it broke")
        journey.verdict = verdict = judge(error, resumed=journey.resumed)
        journey.error = error
        if worker is not None:
            self._verdicts.apply(ticket if ticket.place == question.place else None, worker, error, verdict)
            journey.search.failed(worker.spec.instance_id, verdict)
        ticket.release()
        journey.displaced = journey.displaced or verdict in (Verdict.LOST, Verdict.LEAVING)
        if journey.resumed:
            journey.losses = max(journey.losses + (verdict is Verdict.LOST), question.loss_count)
        elif verdict in _HARMLESS or (verdict is Verdict.FULL and journey.displaced):
            journey.attempts -= 1
        elif verdict is not Verdict.FINAL and journey.attempts < journey.pick.choices:
            journey.funded = self._failover.budget.withdraw()

    def _worker(self, ticket: Ticket, question: pb.ContinueStreamRequest) -> Worker | None:
        """Who had the stream, as far as this controller knows."""
        if ticket.reservation is not None and ticket.place == question.place:
            return ticket.reservation.worker
        if question.worker_id:
            with suppress(FastChatError):
                return self._registry.worker(question.worker_id)
        return next(iter(self._registry.at(question.place)), None)

    # ---------------------------------------------------------------------------- what is done next

    async def _next(
        self, ticket: Ticket, journey: Journey, question: pb.ContinueStreamRequest, hold_s: float
    ) -> pb.ContinueStreamResponse:
        limits = replace(self._failover.config, max_attempts=max(1, journey.pick.choices))
        until = monotonic() + hold_s
        while next_step(journey.situation(), Outlook.READY, limits) is Step.TRY:
            if not ticket.open:  # void, or the stream has ended while it was waited: nothing would be released
                return pb.ContinueStreamResponse(ask_again=True)
            try:
                reservation = self._reserve(journey)
            except Nobody as nobody:
                if next_step(journey.situation(), nobody.outlook, limits) is Step.STOP:
                    return _nobody(journey, nobody)
            except FastChatError as error:
                return _refusal(journey, error)
            else:
                return self._move(ticket, journey, reservation)
            if (left_s := until - monotonic()) <= 0:
                journey.waits_with = pb.ContinueStreamRequest()
                journey.waits_with.CopyFrom(question)
                return pb.ContinueStreamResponse(ask_again=True)
            await self._news(journey, max(0.0, min(left_s, journey.patience_s)))
        return _stopped(journey)

    def _reserve(self, journey: Journey) -> Reservation:
        gateway = journey.pick.gateway
        wanted = journey.wanted()._replace(reaches=lambda worker: self._place(worker, gateway) is not None)
        try:
            return journey.search.reserve(wanted)
        except (ModelNotFound, AdapterNotFound) as error:  # whoever picked knew it; this controller may yet hear of it
            raise Nobody(Outlook.OPEN, NoLiveWorker(error.message, metadata=error.metadata)) from None

    def _place(self, worker: Worker, gateway: str) -> str | None:
        return self._endpoints.location(worker, gateway)

    def _move(self, ticket: Ticket, journey: Journey, reservation: Reservation) -> pb.ContinueStreamResponse:
        place = self._place(reservation.worker, journey.pick.gateway)
        assert place is not None, "it was picked by this"
        ticket.move_on(place, reservation)
        if journey.resumed:
            self._failover.resumed += 1
        else:
            self._failover.retried += 1
            journey.attempts += 1
            journey.search.origin = reservation.worker.model(journey.search.model)
        logger.debug("a stream goes on at %s", reservation.worker.spec.worker_id)
        return pb.ContinueStreamResponse(place=place, cluster=self._endpoints.cluster(journey.pick.gateway))

    async def _news(self, journey: Journey, timeout_s: float) -> None:
        """Return when a worker may have come, or the gateway has learned of one."""
        room = asyncio.ensure_future(journey.search.wait(journey.wanted(), timeout_s))
        acked = asyncio.ensure_future(self._endpoints.acked())
        try:
            await asyncio.wait({room, acked}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            room.cancel()
            acked.cancel()
            await asyncio.gather(room, acked, return_exceptions=True)


def _nobody(journey: Journey, nobody: Nobody) -> pb.ContinueStreamResponse:
    """Nobody can take it, and waiting is of no use, or was of none."""
    if not journey.resumed:
        return _as_the_worker_said(journey) or _refusal(journey, nobody.error)
    broke = f"the stream broke ({journey.error.message})" if journey.error is not None else "the stream waited"
    if journey.verdict is Verdict.UNABLE and journey.error is not None:
        why = f"the stream broke, and the worker that was asked to go on cannot: {journey.error.message}"
        return _refusal(journey, NotResumable(why))
    return _refusal(journey, type(nobody.error)(f"{broke}, and to go on with it {nobody.error.message}"))


def _stopped(journey: Journey) -> pb.ContinueStreamResponse:
    """No further attempt is allowed."""
    said = _as_the_worker_said(journey)
    if said is not None and (journey.verdict is Verdict.FINAL or not journey.started):
        return said
    why = journey.error.message if journey.error is not None else ""
    if not journey.started:
        return _refusal(journey, NoLiveWorker(f"the worker was lost: {why}"))
    return _refusal(journey, FailoverExhausted(f"gave up after {journey.losses} lost workers; the last: {why}"))


def _as_the_worker_said(journey: Journey) -> pb.ContinueStreamResponse | None:
    """Its own status is the answer; None where it gave none."""
    return None if journey.error is None or type(journey.error) is WorkerUnavailable else pb.ContinueStreamResponse()


def _refusal(journey: Journey, error: FastChatError) -> pb.ContinueStreamResponse:
    if error.code in (Code.UNAVAILABLE, Code.RESOURCE_EXHAUSTED) and error.retry_after_s is None:
        error.retry_after_s = 1.0
    last = HttpBody(data=sse.failure(error)) if journey.pick.events and journey.started else None
    return pb.ContinueStreamResponse(
        status_code=int(error.code),
        status_message=quote(error.message, safe=" !#$&'()*+,/:;=?@[]~-._"),
        status_details=base64.b64encode(error_to_status(error).SerializeToString()).decode().rstrip("="),
        last_message=last.SerializeToString() if last is not None else b"",
    )
