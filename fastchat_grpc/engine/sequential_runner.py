"""Runs any model that transformers can generate with, one sequence at a time.

For encoder-decoders, recurrent states, and attention that cannot be packed. Each sequence keeps the cache
object that the model itself makes, so nothing needs to be known of its kind.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from fastchat_grpc.core import GenerateRequest, TokenPrompt
from fastchat_grpc.engine.model_runner import CacheSize, StepLogits, Wanted, by_adapter, wants_every
from fastchat_grpc.engine.request import Batch, Chunk, Request, Sequence

CACHE_NAMES = ("past_key_values", "cache_params", "state", "mems", "past_buckets_states")
"""Under which models return what the next call must be given (transformers.generation.utils)."""
MEASURED_LENGTHS = 16, 48
"""Tokens of the prompts by which the size of a cache is measured."""
RENAMED = {"mems": "past_key_values", "past_buckets_states": "past_key_values"}


@dataclass(slots=True)
class _State:
    """What a sequence carries from step to step."""

    cache: dict[str, Any] = field(default_factory=dict)
    encoder_outputs: Any = None
    rotary: list[dict[str, Any]] = field(default_factory=list)
    """What dynamic rotary embeddings know of the sequence's length."""


class SequentialRunner:
    """See the module's documentation. The block pool only counts, to bound how much the caches grow."""

    whole_prompts = True
    reuses_prefixes = False

    def __init__(self, model: Any, activate: Callable[[str], None]) -> None:
        self._model = model
        self._activate = activate
        self.device: torch.device = model.get_input_embeddings().weight.device
        self._encoder_decoder = bool(model.config.is_encoder_decoder)
        self._rotary = [m for m in model.modules() if getattr(m, "rope_type", None) == "dynamic"]
        self._fresh_rotary = [_rotary_state(module) for module in self._rotary]
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters

    def run(self, batch: Batch) -> StepLogits:
        wanted = Wanted(batch)
        parts = []
        for adapter, chunks in by_adapter(batch).items():
            self._activate(adapter)
            for chunk in chunks:
                parts.append(self._forward(chunk, every=wants_every(chunk)))
                wanted.rows([chunk])
        for parent, child in batch.forks:
            child.runner_state = _fork(parent.runner_state)
        return wanted.result(parts)

    def release(self, sequence: Sequence) -> None:
        sequence.runner_state = None

    def cache_sizes(self) -> dict[torch.device, CacheSize]:
        """Measured: two prompts of different lengths, and what the model keeps of each."""
        short, long = (self._kept_of(length) for length in MEASURED_LENGTHS)
        sizes: dict[torch.device, CacheSize] = {}
        for device, size in long.items():
            per_token = max(0, size - short.get(device, 0)) // (MEASURED_LENGTHS[1] - MEASURED_LENGTHS[0])
            sizes[device] = CacheSize(per_token, max(0, size - per_token * MEASURED_LENGTHS[1]))
        return sizes

    def _kept_of(self, length: int) -> dict[torch.device, int]:
        """Bytes that the model keeps of a prompt, by device."""
        tokens = [1] * length
        request = Request(spec=GenerateRequest(prompt=TokenPrompt((1,))), prompt=tokens, sink=None, arrival=0.0)
        sequence = Sequence(request=request, index=0, tokens=tokens, seed=0)
        self._activate("")
        self._forward(Chunk(sequence, 0, length, samples=True), every=False)
        tensors: dict[int, torch.Tensor] = {}
        _collect(sequence.runner_state, tensors, set())
        sizes: dict[torch.device, int] = {}
        for tensor in tensors.values():
            sizes[tensor.device] = sizes.get(tensor.device, 0) + tensor.untyped_storage().nbytes()
        return sizes

    def _forward(self, chunk: Chunk, *, every: bool) -> torch.Tensor:
        """Logits (1 or all tokens of the chunk, vocabulary) in float32."""
        sequence = chunk.sequence
        first = chunk.start == 0
        if first:
            sequence.runner_state = _State(rotary=self._fresh_rotary)
        state: _State = sequence.runner_state
        token_ids, fresh = sequence.tokens, chunk.count
        arguments: dict[str, Any] = {"use_cache": True, **state.cache}
        if self._encoder_decoder:
            if first:
                prompt = self._tensor(sequence.request.prompt)
                state.encoder_outputs = self._model.get_encoder()(input_ids=prompt, return_dict=True)
            arguments["encoder_outputs"] = state.encoder_outputs
            token_ids = [self.start_token, *sequence.tokens[sequence.prompt_length :]]
            fresh = len(token_ids) if first else chunk.count
        # A model without a cache is given everything again.
        known = bool(state.cache)
        inputs = self._model.prepare_inputs_for_generation(
            self._tensor(token_ids),
            next_sequence_length=fresh if known else None,
            is_first_iteration=first,
            **arguments,
        )
        if self._keeps_logits and not every:
            inputs["logits_to_keep"] = 1
        # They change with every call, and remember the longest sequence of all.
        for module, lengths in zip(self._rotary, state.rotary, strict=True):
            for name, value in lengths.items():
                setattr(module, name, value)
        output = self._model(**inputs, return_dict=True)
        state.rotary = [_rotary_state(module) for module in self._rotary]
        state.cache = {RENAMED.get(n, n): output[n] for n in CACHE_NAMES if output.get(n) is not None}
        logits: torch.Tensor = output.logits[0] if every else output.logits[0, -1:]
        return logits.float()

    @property
    def start_token(self) -> int:
        """Token that an encoder-decoder's output begins with."""
        for config in (self._model.generation_config, self._model.config):
            for name in ("decoder_start_token_id", "bos_token_id"):
                token = getattr(config, name, None)
                if token is not None:
                    return int(token[0] if isinstance(token, list) else token)
        return 0

    def _tensor(self, token_ids: list[int]) -> torch.Tensor:
        return torch.tensor([token_ids], device=self.device)


def _fork(state: _State) -> _State:
    return _State(copy.deepcopy(state.cache), state.encoder_outputs, state.rotary)


def _rotary_state(module: Any) -> dict[str, Any]:
    return {"max_seq_len_cached": module.max_seq_len_cached, "inv_freq": module.inv_freq}


def _collect(value: Any, found: dict[int, torch.Tensor], seen: set[int]) -> None:
    """All tensors within a value, by their storage, whatever objects hold them."""
    if isinstance(value, torch.Tensor):
        found[value.untyped_storage().data_ptr()] = value
        return
    if id(value) in seen or isinstance(value, (str, bytes, int, float, type(None), torch.nn.Module)):
        return
    seen.add(id(value))
    if isinstance(value, Mapping):
        parts: list[Any] = list(value.values())
    elif isinstance(value, (list, tuple, set, frozenset)):
        parts = list(value)
    elif isinstance(value, _State):
        parts = [value.cache, value.encoder_outputs]
    else:
        parts = list(vars(value).values()) if hasattr(value, "__dict__") else []
    for part in parts:
        _collect(part, found, seen)
