"""What a worker knows of itself: its load, its speed, and whether it makes progress."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from time import monotonic

from fastchat_grpc.backends.base import Backend
from fastchat_grpc.core import Load, WorkerState
from fastchat_grpc.worker.generation import LocalGeneration

logger = logging.getLogger(__name__)

SAMPLE_S = 0.25
SPEED_WINDOW_S = 5.0


class Monitor:
    """Reads load for heartbeats and watches for a wedged engine.

    Args:
        stall_s: seconds without progress, with requests running, after which the worker says DEGRADED.
        on_change: called when the load has changed so much that the controllers should know early.
    """

    def __init__(
        self,
        backend: Backend,
        generation: LocalGeneration,
        stall_s: float,
        on_change: Callable[[], None],
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._backend = backend
        self._generation = generation
        self._stall_s = stall_s
        self._on_change = on_change
        self._clock = clock
        self._state = WorkerState.STARTING
        self._progress = (0, clock())
        self._stalled = False
        self._speed = 0.0
        self._tokens = (0, clock())
        self._told = Load()

    def set_state(self, state: WorkerState) -> None:
        """Enter a state of the worker's life: SERVING, then DRAINING."""
        self._state = state
        self._progress = self._tokens = (0, self._clock())  # what came before, such as loading, is no stall
        self._on_change()

    def load(self) -> Load:
        """Load at this moment."""
        if self._state is WorkerState.STARTING:
            return Load(state=WorkerState.STARTING)
        admission = self._generation.admission
        degraded = self._stalled and self._state is WorkerState.SERVING
        self._told = Load(
            state=WorkerState.DEGRADED if degraded else self._state,
            running=admission.running,
            waiting=admission.waiting,
            max_running=admission.max_running,
            max_waiting=admission.max_waiting,
            kv_cache_usage=self._backend.load().kv_cache_usage,
            tokens_per_second=self._speed,
        )
        return self._told

    async def run(self) -> None:
        """Sample until cancelled."""
        while True:
            await asyncio.sleep(SAMPLE_S)
            self.sample()

    def sample(self) -> None:
        """Look once at speed, progress and load."""
        now = self._clock()
        self._measure_speed(now)
        self._watch_progress(now)
        admission = self._generation.admission
        queue_length = admission.running + admission.waiting
        # A quarter of the capacity, up or down, changes where a controller should send work.
        if abs(queue_length - self._told.queue_length) >= max(1, admission.max_running // 4):
            self._on_change()

    def _measure_speed(self, now: float) -> None:
        tokens, since = self._tokens
        elapsed = now - since
        if elapsed >= SPEED_WINDOW_S / 5:
            current = (self._generation.output_tokens - tokens) / elapsed
            self._speed += (current - self._speed) * min(1.0, elapsed / SPEED_WINDOW_S * 2)
            self._tokens = (self._generation.output_tokens, now)

    def _watch_progress(self, now: float) -> None:
        processed, since = self._progress
        current = self._backend.load().processed_tokens
        idle = self._generation.admission.running == 0
        if idle or current != processed:
            self._progress = (current, now)
            if self._stalled:
                self._stalled = False
                logger.warning("the engine makes progress again")
                self._on_change()
        elif now - since >= self._stall_s and not self._stalled:
            self._stalled = True
            logger.error(
                "no token for %.0f s with %d requests running: this worker is DEGRADED until there is progress",
                now - since,
                self._generation.admission.running,
            )
            self._on_change()
