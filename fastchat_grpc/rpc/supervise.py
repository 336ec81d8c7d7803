"""Background tasks that do not die silently: they are started again, loudly, and health follows them.

A task that fails is logged with its traceback and started again after a jittered backoff. One that fails
again and again, or that may not be started again, makes its supervisor unhealthy, and whoever owns the
supervisor says so to the outside. No task's failure touches another task.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from time import monotonic

logger = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 5.0
"""Time that cancelled tasks have to end before they are named in the log and left alone."""
QUIET_S = 300.0
"""An error that comes again within this time of its last report is counted, not reported."""
MAX_DISTINCT_ERRORS = 64

Factory = Callable[[], Awaitable[None]]
Clock = Callable[[], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Backoff:
    """When a task that failed is started again. Seconds."""

    first_s: float = 0.2
    most_s: float = 30.0
    """The delay doubles at each failure in a row, from `first_s` up to this; half of it is random."""
    steady_s: float = 30.0
    """A run that lasts this long ends a row of failures."""
    failing_after: int = 3
    """Failures in a row after which the task counts as unhealthy; it is still started again."""
    max_failures: int | None = None
    """Failures in a row after which it is not started again; None: it always is."""


ALWAYS = Backoff()
"""The usual: again and again, for ever."""


class Restarts:
    """The history of one task's runs and what follows from it. Pure: time and chance are given."""

    def __init__(self, backoff: Backoff | None, clock: Clock = monotonic, rng: random.Random | None = None) -> None:
        self._backoff = backoff
        self._clock = clock
        self._rng = rng or random.Random()
        self._started = clock()
        self.failures = 0
        """In a row."""
        self.dead = False
        """Whether it failed and is not started again."""

    @property
    def healthy(self) -> bool:
        """Whether the task does its work, apart from a failure now and then."""
        return not self.dead and (self._backoff is None or self.failures < self._backoff.failing_after)

    def start(self) -> None:
        """A run begins."""
        self._started = self._clock()

    def steady(self) -> None:
        """The present run has lasted long enough to forget the failures before it."""
        self.failures = 0

    def fail(self) -> float | None:
        """A run has failed: seconds until the next one, or None if there is none."""
        if self._backoff is None:
            self.dead = True
            return None
        if self._clock() - self._started >= self._backoff.steady_s:
            self.failures = 0
        self.failures += 1
        if self._backoff.max_failures is not None and self.failures >= self._backoff.max_failures:
            self.dead = True
            return None
        # The exponent is bounded, since a float is: the delay has long reached its most.
        delay_s = min(self._backoff.first_s * 2.0 ** min(self.failures - 1, 64), self._backoff.most_s)
        return delay_s * self._rng.uniform(0.5, 1.0)


class ErrorLog:
    """Which errors to report: each distinct one (type and place) once in a period, with a count of the rest."""

    def __init__(self, quiet_s: float = QUIET_S, clock: Clock = monotonic) -> None:
        self._quiet_s = quiet_s
        self._clock = clock
        self._seen: dict[tuple[object, ...], tuple[float, int]] = {}

    def report(self, name: str, error: BaseException) -> int | None:
        """How many such errors went unreported since the last report; None: this one shall, too."""
        key = (name, type(error), *_place(error))
        now = self._clock()
        reported_at, unreported = self._seen.pop(key, (float("-inf"), 0))
        if now - reported_at < self._quiet_s:
            self._seen[key] = (reported_at, unreported + 1)
            return None
        while len(self._seen) >= MAX_DISTINCT_ERRORS:
            del self._seen[next(iter(self._seen))]
        self._seen[key] = (now, 0)
        return unreported


class Supervised:
    """One task of a supervisor."""

    def __init__(self, name: str, restarts: Restarts) -> None:
        self.name = name
        self.restarts = restarts
        self.task: asyncio.Task[None] | None = None

    @property
    def running(self) -> bool:
        """Whether it runs or will be started again."""
        return self.task is not None and not self.task.done()

    def cancel(self) -> None:
        """Ask it to end; it is not started again."""
        if self.task is not None:
            self.task.cancel()

    async def ended(self) -> None:
        """Return when it has ended for good."""
        if self.task is not None:
            await asyncio.wait([self.task])


class Supervisor:
    """Owns background tasks on one event loop. `spawn` them, and `close` it once.

    Args:
        on_health: awaited with False when a task is dead or fails again and again, and with True when every
            task is well again. An error of its own is logged.
    """

    def __init__(
        self,
        on_health: Callable[[bool], Awaitable[None]] | None = None,
        *,
        clock: Clock = monotonic,
        rng: random.Random | None = None,
    ) -> None:
        self._on_health = on_health
        self._clock = clock
        self._rng = rng or random.Random()
        self._errors = ErrorLog(clock=clock)
        self._tasks: dict[asyncio.Task[None], Supervised] = {}
        self._dead: list[str] = []
        self._told = True
        self._telling = asyncio.Lock()
        self._tellers: set[asyncio.Task[None]] = set()
        self._closed = False

    @property
    def healthy(self) -> bool:
        """Whether every task does its work."""
        return not self._dead and all(task.restarts.healthy for task in self._tasks.values())

    @property
    def unhealthy(self) -> list[str]:
        """Names of the tasks that are dead or fail again and again."""
        return [*self._dead, *(task.name for task in self._tasks.values() if not task.restarts.healthy)]

    def spawn(
        self,
        name: str,
        factory: Factory,
        *,
        restart: Backoff | None = ALWAYS,
        on_death: Callable[[BaseException], None] | None = None,
    ) -> Supervised:
        """Run `factory()` in the background until it returns, is cancelled, or stays dead.

        Args:
            name: what it does, for the log: "heartbeat to 10.0.0.1:21001".
            factory: makes the coroutine of one run; called anew for each.
            restart: when to start it again after an error; None: never.
            on_death: called with the error when it is not started again, as where the process must stop.

        After `close` nothing is started.
        """
        supervised = Supervised(name, Restarts(restart, self._clock, self._rng))
        if self._closed:
            return supervised
        if name in self._dead:
            self._dead.remove(name)  # this one takes its place
        work = self._supervise(supervised, factory, restart.steady_s if restart else None, on_death)
        supervised.task = task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks[task] = supervised
        task.add_done_callback(self._forget)
        return supervised

    async def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Cancel every task and wait until they have ended. Safe to call twice, and to cancel."""
        self._closed = True
        tasks = {**self._tasks}
        for task in tasks:
            task.cancel()
        for teller in self._tellers:
            teller.cancel()
        if not tasks:
            return
        _, left = await asyncio.wait(tasks, timeout=timeout_s)
        for task in left:
            logger.error("%s has not ended %g s after it was cancelled", tasks[task].name, timeout_s)

    async def _supervise(
        self,
        supervised: Supervised,
        factory: Factory,
        steady_s: float | None,
        on_death: Callable[[BaseException], None] | None,
    ) -> None:
        restarts = supervised.restarts
        while True:
            restarts.start()
            try:
                await self._run_once(supervised, factory, steady_s)
            except (Exception, asyncio.CancelledError) as error:
                if _was_cancelled(error):
                    raise
                delay_s = restarts.fail()
                self._report(supervised.name, error, delay_s)
                if delay_s is None:
                    self._dead.append(supervised.name)
                    if on_death is not None:
                        on_death(error)
                await self._tell()
                if delay_s is None:
                    return
                await asyncio.sleep(delay_s)
            else:
                return

    async def _run_once(self, supervised: Supervised, factory: Factory, steady_s: float | None) -> None:
        """One run; while it lasts, the failures before it are forgotten in time."""
        timer = None
        if steady_s is not None and supervised.restarts.failures:
            timer = asyncio.get_running_loop().call_later(steady_s, self._recovered, supervised)
        try:
            await factory()
        finally:
            if timer is not None:
                timer.cancel()

    def _recovered(self, supervised: Supervised) -> None:
        if not supervised.restarts.healthy:
            logger.info("%s works again", supervised.name)
        supervised.restarts.steady()
        teller = asyncio.get_running_loop().create_task(self._tell())
        self._tellers.add(teller)
        teller.add_done_callback(self._tellers.discard)

    def _report(self, name: str, error: BaseException, delay_s: float | None) -> None:
        unreported = self._errors.report(name, error)
        if delay_s is not None and unreported is None:
            return
        follows = "it is not started again" if delay_s is None else f"it is started again in {delay_s:.1f} s"
        before = f" ({unreported} times more since it was last reported)" if unreported else ""
        logger.error("%s failed%s; %s", name, before, follows, exc_info=error)

    async def _tell(self) -> None:
        """Tell the owner what has become of health, in order, and the newest only."""
        async with self._telling:
            if self._on_health is None or self._closed or self.healthy is self._told:
                return
            healthy = self.healthy
            if not healthy:
                logger.error("unhealthy: %s", ", ".join(self.unhealthy))
            try:
                await self._on_health(healthy)
            except Exception:
                logger.exception("health could not be told")
            else:
                self._told = healthy

    def _forget(self, task: asyncio.Task[None]) -> None:
        supervised = self._tasks.pop(task)
        # Only what `on_death` raised, or SystemExit and its like, comes this far.
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("the supervision of %s failed", supervised.name, exc_info=error)


def _was_cancelled(error: BaseException) -> bool:
    """Whether somebody cancelled the present task.

    grpc raises CancelledError in a task that nobody cancelled, where the call it awaits was: that is a failure.
    """
    task = asyncio.current_task()
    return isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling() > 0


def _place(error: BaseException) -> tuple[str, int]:
    """File and line where an error was raised."""
    place = ("", 0)
    traceback = error.__traceback__
    while traceback is not None:
        place = (traceback.tb_frame.f_code.co_filename, traceback.tb_lineno)
        traceback = traceback.tb_next
    return place
