"""A stand-in for SGLang 0.5.23 that speaks what the backend uses of it, and nothing else.

Mirrors `sglang.srt.entrypoints.engine.Engine.async_generate` with stream=True and incremental_streaming_output
(chunks with "output_ids" since the last, output log probabilities cut likewise, input ones in every chunk,
"finish_reason" in meta_info), `TokenizerManager.generate_request`, `abort_request` and its signal handlers,
`SamplingParams.verify`, and `ServerArgs.add_cli_args`. The "model" says the prompt again, then EOS.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import signal
import sys
import threading
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest

from tests.unit.backends.folders import EOS, VOCABULARY_SIZE

ENGINES: list[Engine] = []
"""Engines made so far; a test looks at the last."""
_PARAMETERS = {
    "max_new_tokens", "min_new_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty",
    "presence_penalty", "frequency_penalty", "stop_token_ids", "ignore_eos", "logit_bias", "sampling_seed",
    "json_schema", "regex", "ebnf",
}  # fmt: skip


@dataclass
class EmbeddingReqInput:
    """As sglang.srt.managers.io_struct has it, as far as it is used."""

    text: Any = None
    input_ids: Any = None


class ServerArgs:
    """Only the arguments that tests name."""

    @staticmethod
    def add_cli_args(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--model-path", type=str)
        parser.add_argument("--mem-fraction-static", type=float)
        parser.add_argument("--enable-deterministic-inference", action="store_true")
        parser.add_argument("--is-embedding", action="store_true")
        parser.add_argument("--attention-backend", choices=["triton", "torch_native"])


class TokenizerManager:
    """What of it the backend reaches: context_len, generate_request and abort_request."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.context_len = engine.settings.get("context_length") or 128
        self.aborted: list[str] = []
        self.running: set[str] = set()
        self._loop: asyncio.AbstractEventLoop | None = None

    def abort_request(self, rid: str = "", abort_all: bool = False) -> None:
        self.aborted.append(rid)

    async def generate_request(self, obj: Any, request: Any) -> AsyncGenerator[dict[str, Any], None]:
        self._auto_create_handle_loop()
        if isinstance(obj, EmbeddingReqInput):
            yield {"embedding": [float(len(obj.input_ids)), 1.0], "meta_info": {"prompt_tokens": len(obj.input_ids)}}
            return
        rid = obj["rid"]
        self.running.add(rid)
        try:
            async for chunk in self._generate(obj):
                yield chunk
        finally:
            self.running.discard(rid)

    def _auto_create_handle_loop(self) -> None:
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            if threading.current_thread() is threading.main_thread():
                self._loop.add_signal_handler(signal.SIGTERM, lambda: None)
        assert self._loop is asyncio.get_running_loop(), "SGLang is used from one loop"

    async def _generate(self, obj: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        parameters, ids = obj["sampling_params"], obj["input_ids"]
        _verify(parameters)
        if len(ids) >= self.context_len:
            raise ValueError(f"The input ({len(ids)} tokens) is longer than the model's context length.")
        if bytes(i for i in ids if i < 256) == b"refuse":
            yield self._chunk(obj, [], 0, {"type": "abort", "message": "bad schema", "status_code": 400})
            return
        if bytes(i for i in ids if i < 256) == b"grammar":
            message = "Failed to compile regex grammar: it is empty"
            yield self._chunk(obj, [], 0, {"type": "abort", "message": message, "status_code": 400})
            return
        if bytes(i for i in ids if i < 256) == b"lose":
            yield self._chunk(obj, [], 0, {"type": "abort", "message": "server died", "status_code": 503})
            return
        made, size = 0, 1
        while True:
            chunk = [self._token(parameters, ids, made + i) for i in range(size)]
            chunk, reason = _cut(parameters, chunk, made)
            made += len(chunk)
            yield self._chunk(obj, chunk, made, reason)
            if reason is not None:
                return
            size = size % 3 + 1
            await asyncio.sleep(0 if b"slow" not in bytes(i for i in ids if i < 256) else 0.01)

    @staticmethod
    def _token(parameters: dict[str, Any], ids: list[int], place: int) -> int:
        ends = place and place % len(ids) == 0 and not parameters["ignore_eos"]
        return EOS if ends and place >= parameters["min_new_tokens"] else ids[place % len(ids)]

    def _chunk(self, obj: dict[str, Any], ids: list[int], made: int, reason: dict[str, Any] | None) -> dict[str, Any]:
        count = obj["top_logprobs_num"]
        meta: dict[str, Any] = {
            "id": obj["rid"],
            "finish_reason": reason,
            "prompt_tokens": len(obj["input_ids"]),
            "completion_tokens": made,
            "cached_tokens": 1,
        }
        if obj["return_logprob"]:
            meta["output_token_logprobs"] = [(math.log(0.5), i, None) for i in ids]
            meta["input_token_logprobs"] = []
            if obj["logprob_start_len"] == 0:
                first, *rest = obj["input_ids"]
                meta["input_token_logprobs"] = [(None, first, None), *((-1.0, i, None) for i in rest)]
            if count:
                top = [(-0.5 - k, k, None) for k in range(count)]
                meta["output_top_logprobs"] = [top for _ in ids]
                meta["input_top_logprobs"] = [None, *(top for _ in meta["input_token_logprobs"][1:])]
        return {"text": "not used", "output_ids": ids, "meta_info": meta}


class Engine:
    """As sglang.srt.entrypoints.engine.Engine, as far as it is used."""

    def __init__(self, **settings: Any) -> None:
        if settings["model_path"].endswith("broken"):
            raise RuntimeError("no such weights\nand more")
        assert settings["incremental_streaming_output"] is True
        self.settings = settings
        self.requests: list[dict[str, Any]] = []
        self.shut_down = 0
        self.tokenizer_manager = TokenizerManager(self)
        ENGINES.append(self)

    async def async_generate(
        self,
        prompt: Any = None,
        sampling_params: dict[str, Any] | None = None,
        input_ids: list[int] | None = None,
        return_logprob: bool = False,
        logprob_start_len: int | None = None,
        top_logprobs_num: int | None = None,
        lora_path: str | None = None,
        stream: bool = False,
        rid: str | None = None,
    ) -> AsyncGenerator[dict[str, Any], None]:
        assert prompt is None
        assert stream
        request = {
            "sampling_params": sampling_params,
            "input_ids": input_ids,
            "return_logprob": return_logprob,
            "logprob_start_len": logprob_start_len,
            "top_logprobs_num": top_logprobs_num,
            "lora_path": lora_path,
            "rid": rid,
        }
        self.requests.append(request)
        return self.tokenizer_manager.generate_request(request, None)

    def shutdown(self) -> None:
        self.shut_down += 1


def _verify(parameters: dict[str, Any]) -> None:
    """The checks of sglang.srt.sampling.sampling_params."""
    assert set(parameters) <= _PARAMETERS, set(parameters) - _PARAMETERS
    if not 0.0 < parameters["top_p"] <= 1.0:
        raise ValueError("top_p must be in (0, 1]")
    if parameters["top_k"] < 1 and parameters["top_k"] != -1:
        raise ValueError("top_k must be -1 (disable) or at least 1")
    if not 0.0 < parameters["repetition_penalty"] <= 2.0:
        raise ValueError("repetition_penalty must be in (0, 2]")
    if not parameters["min_new_tokens"] <= parameters["max_new_tokens"]:
        raise ValueError("min_new_tokens must be in [0, max_new_tokens]")
    for token_id in parameters.get("logit_bias") or {}:
        assert isinstance(token_id, str)
        if not 0 <= int(token_id) < VOCABULARY_SIZE:
            raise ValueError("logit_bias must has keys in the vocabulary")


def _cut(parameters: dict[str, Any], ids: list[int], made: int) -> tuple[list[int], dict[str, Any] | None]:
    """End at a stop token or at the length, as Req.check_finished does."""
    for i, token_id in enumerate(ids, start=1):
        stops = not parameters["ignore_eos"] and token_id in parameters["stop_token_ids"]
        if stops and made + i > parameters["min_new_tokens"]:
            return ids[:i], {"type": "stop", "matched": token_id}
        if made + i >= parameters["max_new_tokens"]:
            return ids[:i], {"type": "length", "length": parameters["max_new_tokens"]}
    return ids, None


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `import sglang` find the stand-in."""
    contents: dict[str, dict[str, Any]] = {
        "sglang": {},
        "sglang.srt": {},
        "sglang.srt.entrypoints": {},
        "sglang.srt.entrypoints.engine": {"Engine": Engine},
        "sglang.srt.managers": {},
        "sglang.srt.managers.io_struct": {"EmbeddingReqInput": EmbeddingReqInput},
        "sglang.srt.server_args": {"ServerArgs": ServerArgs},
    }
    for name, members in contents.items():
        module = ModuleType(name)
        module.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, module)
