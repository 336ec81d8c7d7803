"""The module by which the gateway's Envoy goes on with a stream at another worker: `resume/*.c`, made here and now.

It speaks Envoy's ABI for dynamic modules, which holds from one minor version to the next alone and is not checked by
Envoy: it only warns. So it is loaded by versions that it was verified with. Where it cannot be had, the gateway does
without: streams then end with their workers.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
from pathlib import Path

from fastchat_grpc.config import MAX_MESSAGE_BYTES, GatewayConfig, GatewayMode
from fastchat_grpc.errors import NoLiveWorker
from fastchat_grpc.gateway.clusters import controller_cluster, workers_cluster
from fastchat_grpc.gateway.shape import Tree, extension
from fastchat_grpc.native.library import CannotCompile, made_library
from fastchat_grpc.rpc.http_errors import error_object

logger = logging.getLogger(__name__)

VERIFIED = ("1.40",)
"""Minor versions of Envoy that the module was verified with."""
SOURCES = Path(__file__).parent / "resume"
FLAGS = ("-O2", "-std=c11", "-fstack-protector-strong", "-fvisibility=hidden", "-shared", "-fPIC")
VERSION_TIMEOUT_S = 20.0
STATE_BYTES = 4 * 1024 * 1024
"""State that is kept for one stream; a longer answer ends with its worker. About 100,000 tokens."""
PARKED_BYTES = 256 * 1024
"""What comes for a caller that does not read, before its stream leaves the worker until it does."""
UNREAD_BYTES = 2 * MAX_MESSAGE_BYTES
"""The same for a stream that no worker could go on with: then it is ended."""
ASK_MS = 8_000
"""How long a controller may take to say where a stream goes on. It answers in half of that, if only "ask again"."""
WITHOUT = "streams end with their workers: the module that resumes them is left out; %s"


async def resume_module(config: GatewayConfig, executable: Path) -> Path | None:
    """The module for an Envoy; None, with a line in the log, where there is none."""
    if config.mode is not GatewayMode.DIRECT or not config.resume:
        return None
    version = await envoy_version(executable)
    if version.rpartition(".")[0] not in VERIFIED:
        what = f"Envoy {version}" if version else f"{executable}, which does not say its version,"
        logger.warning(WITHOUT, f"it was verified with Envoy {', '.join(VERIFIED)}, and {what} is none of them")
        return None
    try:
        return await asyncio.to_thread(made_library, SOURCES, "gateway", FLAGS)
    except CannotCompile as error:
        logger.warning(WITHOUT, f"it cannot be compiled: {error}")
        return None


async def envoy_version(executable: Path) -> str:
    """An Envoy's version, such as "1.40.0"; empty where it does not say it."""
    try:
        process = await asyncio.create_subprocess_exec(
            str(executable),
            "--version",
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
    except OSError:
        return ""
    try:
        said, _ = await asyncio.wait_for(process.communicate(), VERSION_TIMEOUT_S)
    except TimeoutError:
        return ""
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    found = re.search(rb"version: *[^/\s]*/(\d+\.\d+\.\d+)", said)
    return found[1].decode() if found is not None else ""


def resume_filter(config: GatewayConfig, module: Path | None) -> list[Tree]:
    """The filter before the router: it has the streams that a worker was picked for, and leaves it the rest."""
    if module is None:
        return []
    kind = "envoy.extensions.filters.http.dynamic_modules.v3.DynamicModuleFilter"
    text = {"@type": "type.googleapis.com/google.protobuf.StringValue", "value": settings(config)}
    loaded = {"module": {"local": {"filename": str(module)}}, "do_not_close": True}
    return [
        extension("fastchat_grpc.resume", kind, dynamic_module_config=loaded, filter_name="resume", filter_config=text)
    ]


def settings(config: GatewayConfig) -> str:
    """What the module is told: see `resume/settings.h`."""
    lines = [
        f"controller {workers_cluster(i)} {controller_cluster(i)}" for i in range(len(config.controller_addresses))
    ]
    if config.join_token is not None:
        lines.append(f"authorization Bearer {config.join_token}")
    numbers = {
        "state": STATE_BYTES,
        "message": MAX_MESSAGE_BYTES + 65_536,
        "parked": PARKED_BYTES,
        "unread": UNREAD_BYTES,
        "ask_ms": ASK_MS,
    }
    lines += [f"{name} {value}" for name, value in numbers.items()]
    # What ends a stream of events in failure: the module puts its own words in the middle, which need no escaping.
    before, _, behind = json.dumps(error_object(NoLiveWorker("MESSAGE"))).partition("MESSAGE")
    lines += [f"farewell {before}", f"farewell_end {behind}"]
    return "\n".join(lines) + "\n"
