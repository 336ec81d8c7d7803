"""What a worker knows of itself: its load, its speed, and whether it makes progress."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from time import monotonic

from fastchat_grpc.backends.base import Backend, BackendLoad
from fastchat_grpc.core import Load, WorkerState
from fastchat_grpc.rpc.supervise import ErrorLog
from fastchat_grpc.worker.generation import LocalGeneration

logger = logging.getLogger(__name__)

SAMPLE_S = 0.25
SPEED_WINDOW_S = 5.0


class Monitor:
    """Reads load for heartbeats, and watches for a wedged engine and for callers that do not read.

    A backend that cannot say its load makes the worker DEGRADED until it can; it ends nothing.

    Args:
        stall_s: seconds without progress, with requests that wait for the engine, after which the worker
            says DEGRADED.
        on_change: called when the controllers should know early: with True when the state has changed, with
            False when the load has changed much.
        send_timeout_s: how long what was generated may stay unread before the request loses its slot.
    """

    def __init__(
        self,
        backend: Backend,
        generation: LocalGeneration,
        stall_s: float,
        on_change: Callable[[bool], None],
        send_timeout_s: float = 60.0,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._backend = backend
        self._generation = generation
        self._stall_s = stall_s
        self._on_change = on_change
        self._send_timeout_s = send_timeout_s
        self._clock = clock
        self._state = WorkerState.STARTING
        self._read = BackendLoad(max_running=0)
        self._unreadable = False
        self._errors = ErrorLog(clock=clock)
        self._progress = (0, clock())
        self._stalled = False
        self._speed = 0.0
        self._tokens = (0, clock())
        self._told = Load()

    def set_state(self, state: WorkerState) -> None:
        """Enter a state of the worker's life: SERVING, then DRAINING, and perhaps SERVING again."""
        self._state = state
        now = self._clock()  # what came before, such as loading, is no stall and no speed
        self._progress = (self._read.processed_tokens, now)
        self._tokens = (self._generation.output_tokens, now)
        self._on_change(True)

    def load(self) -> Load:
        """Load at this moment, which is told."""
        if self._state is WorkerState.STARTING:
            return Load(state=WorkerState.STARTING)
        self._backend_load()
        self._told = self.last_load()
        return self._told

    @property
    def backend_load(self) -> BackendLoad:
        """The backend's load as it was last read, some heartbeats ago at most. May be read in any thread."""
        return self._read

    def last_load(self) -> Load:
        """Load at this moment, but for what the backend says. May be called in any thread."""
        if self._state is WorkerState.STARTING:
            return Load(state=WorkerState.STARTING)
        admission, backend = self._generation.admission, self._read
        degraded = (self._stalled or self._unreadable) and self._state is WorkerState.SERVING
        return Load(
            state=WorkerState.DEGRADED if degraded else self._state,
            running=admission.running,
            waiting=admission.waiting,
            max_running=admission.max_running,
            max_waiting=admission.max_waiting,
            kv_cache_usage=backend.kv_cache_usage or 0.0,
            tokens_per_second=self._speed,
            kv_free_tokens=backend.kv_free_tokens,
            oldest_waiting_s=admission.oldest_waiting_s,
        )

    async def run(self) -> None:
        """Sample until cancelled."""
        while True:
            await asyncio.sleep(SAMPLE_S)
            self.sample()
            if dropped := self._generation.drop_unread(self._send_timeout_s):
                logger.warning("%d requests were not read for %g s and lose their slots", dropped, self._send_timeout_s)

    def sample(self) -> None:
        """Look once at speed, progress and load."""
        now = self._clock()
        self._measure_speed(now)
        self._watch_progress(now)
        if self._changed_much():
            self._on_change(False)

    def _changed_much(self) -> bool:
        """Whether what the controllers were told misleads them.

        It does when the worker has become full, or has room again, and when the queue has changed by a quarter of
        the capacity; by two at least, or a small worker would report each request.
        """
        admission, told = self._generation.admission, self._told
        queue_length = admission.running + admission.waiting
        if (queue_length >= admission.max_running) != (told.queue_length >= admission.max_running):
            return True
        return abs(queue_length - told.queue_length) >= max(2, admission.max_running // 4)

    def _backend_load(self) -> BackendLoad:
        """The backend's load, or the last one that it could say."""
        try:
            self._read = self._backend.load()
        except Exception as error:
            if self._errors.report("load", error) is not None:
                logger.exception("the backend cannot say its load: this worker is DEGRADED until it can")
            self._set_unreadable(True)
        else:
            self._set_unreadable(False)
        return self._read

    def _set_unreadable(self, unreadable: bool) -> None:
        if unreadable is not self._unreadable:
            self._unreadable = unreadable
            self._on_change(True)

    def _measure_speed(self, now: float) -> None:
        tokens, since = self._tokens
        elapsed = now - since
        if elapsed >= SPEED_WINDOW_S / 5:
            current = (self._generation.output_tokens - tokens) / elapsed
            self._speed += (current - self._speed) * min(1.0, elapsed / SPEED_WINDOW_S * 2)
            self._tokens = (self._generation.output_tokens, now)

    def _watch_progress(self, now: float) -> None:
        processed, since = self._progress
        current = self._backend_load().processed_tokens
        # Not what admission counts as running: a caller that does not read its stream holds a slot, and the
        # engine has nothing to do for it.
        awaiting = self._generation.awaiting
        if awaiting == 0 or current != processed:
            self._progress = (current, now)
            if self._stalled:
                self._stalled = False
                logger.warning("the engine makes progress again")
                self._on_change(True)
        elif now - since >= self._stall_s and not self._stalled:
            self._stalled = True
            logger.error(
                "no token for %.0f s with %d requests waiting for one: this worker is DEGRADED until there is progress",
                now - since,
                awaiting,
            )
            self._on_change(True)
