"""One Envoy process: started with our configuration, watched, and stopped when its requests have ended."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import shutil
from collections import deque
from functools import partial
from pathlib import Path
from time import monotonic

from fastchat_grpc.config import GatewayConfig
from fastchat_grpc.errors import ConfigError
from fastchat_grpc.gateway.admin import Admin, AdminError
from fastchat_grpc.gateway.binary import find_envoy
from fastchat_grpc.gateway.machine import cores, refuse_taken, short_folder
from fastchat_grpc.gateway.render import bootstrap
from fastchat_grpc.rpc.supervise import Backoff, Supervised, Supervisor

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 30.0
POLL_S = 0.05
KILL_AFTER_S = 5.0
QUIET_S = 30.0
"""A controller that is away is spoken of this often."""
READ_AGAIN = Backoff(first_s=0.05, most_s=1.0)
_LOG_LINE = re.compile(r"^\[[^\]]*\]\[\d+\]\[(?P<level>\w+)\]\[[^\]]*\] (\[[^\]]*\] )?(?P<text>.*)$")
_LEVELS = {"warning": logging.WARNING, "error": logging.ERROR, "critical": logging.CRITICAL}


class EnvoyProcess:
    """Starts Envoy and stops it. Build and start it on the main thread: Envoy ends with the thread that started it.

    Args:
        supervisor: of the task that reads Envoy's log. Were that to end, Envoy would stand as soon as the pipe is full.
    """

    def __init__(self, config: GatewayConfig, supervisor: Supervisor) -> None:
        self._config = config
        self._supervisor = supervisor
        self._executable = find_envoy(config.envoy)
        self._folder: Path | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._admin: Admin | None = None
        self._reader: Supervised | None = None
        self._last_words: deque[str] = deque(maxlen=20)
        self._told_at = -QUIET_S
        self.ports: dict[str, int] = {}
        """Ports of the listeners, by name."""

    @property
    def pid(self) -> int:
        """Envoy's process; 0 while there is none."""
        return self._process.pid if self._process is not None else 0

    @property
    def admin_path(self) -> Path | None:
        """The socket of Envoy's admin interface; None before the start."""
        return self._admin.path if self._admin is not None else None

    async def start(self, module: Path | None = None) -> None:
        """Start, and return when requests are taken. Raises ConfigError if Envoy refuses its configuration.

        Args:
            module: resumes streams; None: they end with their workers.
        """
        for port in {self._config.port, self._config.tls_port if self._config.tls is not None else 0}:
            refuse_taken(self._config.host, port)
        self._folder = short_folder("admin.sock")
        self._admin = Admin(self._folder / "admin.sock")
        settings = self._folder / "envoy.json"
        settings.touch(mode=0o600)  # it may hold the join token
        tree = bootstrap(self._config, {"pipe": {"path": str(self._admin.path), "mode": 0o600}}, module)
        settings.write_text(json.dumps(tree))
        self._process = await asyncio.create_subprocess_exec(
            str(self._executable),
            *("--config-path", str(settings)),
            *("--log-level", "warning"),
            *("--drain-time-s", "1"),
            "--use-dynamic-base-id",
            *("--concurrency", str(self._config.concurrency or cores())),
            stdin=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
        self._read_log(self._process)
        try:
            await self._wait_ready()
        except BaseException:
            await self.kill()
            raise

    async def wait(self) -> int:
        """Return Envoy's exit status when it has ended."""
        assert self._process is not None, "start first"
        return await self._process.wait()

    async def stop(self, timeout_s: float) -> None:
        """Take nothing new, wait up to `timeout_s` for running requests, then end. Safe to call twice."""
        if self._process is not None and self._process.returncode is None and self._admin is not None:
            with contextlib.suppress(AdminError, TimeoutError):
                await self._admin.drain()
                async with asyncio.timeout(timeout_s):
                    while await self._admin.active_requests() and self._process.returncode is None:  # noqa: ASYNC110
                        await asyncio.sleep(POLL_S)
        await self.kill()

    async def kill(self) -> None:
        """End now."""
        process = self._process
        if process is not None and process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            try:
                await asyncio.wait_for(process.wait(), KILL_AFTER_S)
            except TimeoutError:
                process.kill()
                await process.wait()
        if self._reader is not None:
            await self._reader.ended()  # with the pipe
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    async def _wait_ready(self) -> None:
        assert self._process is not None
        assert self._admin is not None
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                while not await self._admin.ready():
                    if self._process.returncode is not None:
                        raise ConfigError(self._refusal())
                    await asyncio.sleep(POLL_S)
        except TimeoutError:
            raise ConfigError(f"Envoy did not start within {START_TIMEOUT_S:g} s") from None
        self.ports = await self._admin.ports()

    def _refusal(self) -> str:
        words = " ".join(self._last_words)
        if "Address already in use" in words or "cannot bind" in words:
            where = f"{self._config.host}:{self._config.port}"
            return f"Envoy cannot listen on {where}: the port is in use or the host is not of this machine"
        return f"Envoy refuses its configuration: {words[-600:] or 'it said nothing'}"

    def _read_log(self, process: asyncio.subprocess.Process) -> None:
        """Pass Envoy's warnings and errors on to our log, until its end."""
        assert process.stderr is not None
        read = partial(self._pass_on, process.stderr)
        self._reader = self._supervisor.spawn("reading Envoy's log", read, restart=READ_AGAIN)

    async def _pass_on(self, lines: asyncio.StreamReader) -> None:
        while True:
            try:
                line = await lines.readline()
            except ValueError:  # a line beyond the reader's limit, of which what was there is dropped
                logger.warning("envoy: a line of its log is too long and is left out")
                continue
            if not line:
                return
            self._say(line.decode("utf-8", "replace").rstrip())

    def _say(self, line: str) -> None:
        match = _LOG_LINE.match(line)
        level, text = (match["level"], match["text"]) if match is not None else ("warning", line)
        self._last_words.append(text)
        usual = text.startswith("caught ENVOY_SIG") or self._said_lately(text)
        logger.log(logging.DEBUG if usual else _LEVELS.get(level, logging.INFO), "envoy: %s", text)

    def _said_lately(self, text: str) -> bool:
        """Whether it is one more try to reach a controller that is away, of which there are several a second."""
        if " gRPC config stream to " not in text:
            return False
        now = monotonic()
        lately = now - self._told_at < QUIET_S
        if not lately:
            self._told_at = now
        return lately
