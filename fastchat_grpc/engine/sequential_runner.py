"""Runs any model that transformers can generate with, one sequence at a time.

For encoder-decoders, recurrent states, and attention that cannot be packed. Each sequence keeps the cache
object that the model itself makes, so nothing needs to be known of its kind.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field
from typing import Any

import torch

from fastchat_grpc.core import GenerateRequest, TokenPrompt
from fastchat_grpc.engine.head import LogitsInSlices
from fastchat_grpc.engine.lengths import DynamicRotary
from fastchat_grpc.engine.model_runner import CacheSize, StepLogits, by_adapter, wants_every
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

    def __init__(self, model: Any, activate: Callable[[str], None], *, logprob_tokens: int = 2**31 - 1) -> None:
        """`logprob_tokens`: of how many tokens of a prompt logits are made at once."""
        self._model = model
        self._activate = activate
        self._logprob_tokens = logprob_tokens
        self.device: torch.device = model.get_input_embeddings().weight.device
        self._encoder_decoder = bool(model.config.is_encoder_decoder)
        self._rotary = DynamicRotary(model)
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters

    def run(self, batch: Batch) -> StepLogits:
        parts: list[torch.Tensor] = []
        prompts: list[tuple[Chunk, Iterator[torch.Tensor]]] = []
        rows: dict[int, int] = {}
        for adapter, chunks in by_adapter(batch).items():
            self._activate(adapter)
            for chunk in chunks:
                rows[id(chunk.sequence)] = len(parts)
                if wants_every(chunk):
                    logits, slices = self._forward_with_all(chunk, adapter)
                    prompts.append((chunk, slices))
                else:
                    logits = self._forward(chunk)
                parts.append(logits)
        for parent, child in batch.forks:
            child.runner_state = _fork(parent.runner_state)
        sampled = [chunk.sequence for chunk in batch.chunks if chunk.samples] + [parent for parent, _ in batch.forks]
        return StepLogits(torch.cat(parts), [rows[id(sequence)] for sequence in sampled], prompts)

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
        request = Request(spec=GenerateRequest(prompt=TokenPrompt((1,))), prompt=tokens)
        sequence = Sequence(request=request, index=0, tokens=tokens, seed=0)
        self._activate("")
        self._forward(Chunk(sequence, 0, length, samples=True))
        tensors: dict[int, torch.Tensor] = {}
        _collect(sequence.runner_state, tensors, set())
        sizes: dict[torch.device, int] = {}
        for tensor in tensors.values():
            sizes[tensor.device] = sizes.get(tensor.device, 0) + tensor.untyped_storage().nbytes()
        return sizes

    def _forward(self, chunk: Chunk) -> torch.Tensor:
        """Logits (1, vocabulary) of a chunk's last token, in float32."""
        inputs = self._inputs(chunk)
        if self._keeps_logits:
            inputs["logits_to_keep"] = 1
        return self._moved_on(chunk.sequence, self._model(**inputs, return_dict=True))

    def _forward_with_all(self, chunk: Chunk, adapter: str) -> tuple[torch.Tensor, Iterator[torch.Tensor]]:
        """As `_forward`, and the logits of all of the chunk's tokens, made when they are asked for."""
        forward = LogitsInSlices(self._model, self._inputs(chunk))

        def slices() -> Iterator[torch.Tensor]:
            self._activate(adapter)
            yield from forward.slices(self._logprob_tokens)

        return self._moved_on(chunk.sequence, forward.output), slices()

    def _inputs(self, chunk: Chunk) -> dict[str, Any]:
        """What the model is called with for a chunk."""
        sequence = chunk.sequence
        first = chunk.start == 0
        if first:
            sequence.runner_state = _State(rotary=self._rotary.fresh)
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
        self._rotary.restore(state.rotary)
        return dict(inputs)

    def _moved_on(self, sequence: Sequence, output: Any) -> torch.Tensor:
        """Keep what the next step needs; returns the last token's logits."""
        state: _State = sequence.runner_state
        state.rotary = self._rotary.state()
        state.cache = {RENAMED.get(n, n): output[n] for n in CACHE_NAMES if output.get(n) is not None}
        logits: torch.Tensor = output.logits[0, -1:]
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

    def _tensor(self, token_ids: Tokens[int]) -> torch.Tensor:
        return torch.tensor([token_ids], device=self.device)


def _fork(state: _State) -> _State:
    return _State(copy.deepcopy(state.cache), state.encoder_outputs, state.rotary)


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
