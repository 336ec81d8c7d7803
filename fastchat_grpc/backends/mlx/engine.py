"""mlx-lm's batch generator behind the interface of an engine thread. Everything here runs in that thread."""

from __future__ import annotations

import ctypes.util
import logging
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

from fastchat_grpc.backends.driver import token_logprob
from fastchat_grpc.backends.mlx.sampler import Chooser, StepSampler, raw_logprobs
from fastchat_grpc.config import ModelConfig
from fastchat_grpc.core import TokenLogprob
from fastchat_grpc.errors import ConfigError, ModelLoadError
from fastchat_grpc.text.batch import Output, Running
from fastchat_grpc.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

_GROUP_SIZE = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class MlxLimits:
    """Sizes of batches."""

    max_running: int
    prefill_tokens: int
    prefill_batch: int


def load_model(folder: Path, settings: ModelConfig, bits: int | None) -> Any:
    """The model in MLX, on the device and in the type asked for, quantized where `bits` says so. ModelLoadError."""
    import mlx.core as mx
    from mlx import nn
    from mlx_lm.utils import load_model as load

    _choose_device(settings.device)
    try:
        model, _ = load(folder, lazy=True, trust_remote_code=settings.trust_remote_code)
        dtype = settings.dtype
        if dtype == "auto" and mx.default_device() == mx.Device(mx.cpu):
            dtype = "float32"  # MLX's half precision on a CPU is plain loops
        if dtype != "auto":
            model.set_dtype(getattr(mx, dtype))
        if bits is not None:
            nn.quantize(model, group_size=_GROUP_SIZE, bits=bits, class_predicate=_quantizable)
        mx.eval(model.parameters())
    except Exception as error:  # mlx-lm raises what its models, safetensors and MLX raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise ModelLoadError(f"mlx-lm cannot load {folder}: {reason}") from error
    return model


def number_formats(model: Any) -> tuple[str, str]:
    """Of a loaded model: its quantization, such as "int8", or nothing; and the type that it computes in."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    bits = {f"int{layer.bits}" for _, layer in model.named_modules() if hasattr(layer, "bits")}
    kinds = {array.dtype for _, array in tree_flatten(model.parameters()) if mx.issubdtype(array.dtype, mx.floating)}
    return "+".join(sorted(bits)), "+".join(sorted(str(kind).removeprefix("mlx.core.") for kind in kinds))


def use_fast_blas(wanted: str) -> None:
    """Let OpenBLAS multiply matrices where MLX runs on a CPU of Linux: its wheel brings the reference BLAS only.

    Call it before MLX is imported. `wanted` is a library file, "auto" for the system's OpenBLAS, or "off".

    Raises:
        ConfigError: the library cannot be loaded.
    """
    if wanted == "off" or sys.platform != "linux":
        return
    library = ctypes.util.find_library("openblas") if wanted == "auto" else wanted
    if library is None:
        logger.warning("no OpenBLAS is installed: MLX multiplies matrices on the CPU about ten times slower")
        return
    try:
        # Its names are global now, and so come before those of the library that MLX brings.
        ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise ConfigError(f"--backend-option blas={wanted} cannot be loaded: {error}") from error


def _choose_device(wanted: str) -> None:
    import mlx.core as mx

    if wanted == "cpu":
        mx.set_default_device(mx.cpu)
    elif wanted != "auto":
        kinds = {"mps": mx.metal.is_available, "cuda": mx.cuda.is_available}
        if wanted not in kinds or not kinds[wanted]():
            raise ModelLoadError(f"--device {wanted}: this build of MLX has no such device; use auto or cpu")


def _quantizable(path: str, module: Any) -> bool:
    return hasattr(module, "to_quantized") and module.weight.shape[-1] % _GROUP_SIZE == 0


@dataclass(slots=True, eq=False)
class _Work:
    running: Running
    chooser: Chooser
    started: bool = False
    raw: deque[Any] = field(default_factory=deque)


class MlxEngine:
    """Implements `text.batch.BatchEngine`."""

    shares_prompts = False
    kv_cache_usage = 0.0  # the batch generator does not say; its backend estimates it
    kv_free_tokens = 0

    def __init__(self, model: Any, tokenizer: Tokenizer, limits: MlxLimits) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._limits = limits
        self._work: dict[int, _Work] = {}
        self._uids: dict[Running, int] = {}
        self._draws = StepSampler()
        self._generator: Any = self._make_generator()
        self.processed_tokens = 0
        self.embedding_size = self._find_embedding_size()

    @property
    def busy(self) -> bool:
        return bool(self._work)

    def add(self, running: Running) -> None:
        from mlx_lm.generate import StopSequences

        request = running.job.request
        ends = set(request.stopping.stop_token_ids)
        if not request.stopping.ignore_eos:
            ends |= self._tokenizer.eos_token_ids
        chooser = Chooser(running, self._tokenizer, self._draws)
        (uid,) = self._generator.insert(
            [list(running.token_ids)],
            max_tokens=[running.max_tokens],
            samplers=[chooser.sampler],
            logits_processors=[chooser.processors],
            stop_sequences=[StopSequences([(token_id,) for token_id in sorted(ends)])],
        )
        self._work[uid] = _Work(running, chooser)
        self._uids[running] = uid

    def remove(self, running: Running) -> None:
        uid = self._uids.pop(running, None)
        if uid is not None:
            del self._work[uid]
            self._generator.remove([uid])

    def step(self) -> Iterator[Output]:
        yield from self._score_prompts()
        prompts, tokens = self._generator.next()
        for response in prompts:
            yield from self._begin(response.uid)
            self.processed_tokens += 1
        for response in tokens:
            self.processed_tokens += 1
            yield self._output(response)

    def reset(self) -> None:
        self._work.clear()
        self._uids.clear()
        self._generator.close()
        self._draws = StepSampler()  # a step that failed may have left it with what it expected
        self._generator = self._make_generator()

    def close(self) -> None:
        import mlx.core as mx

        self._work.clear()
        self._uids.clear()
        self._generator.close()
        self._generator = self._model = None
        mx.synchronize()
        mx.clear_cache()
        # A stream that outlives its thread aborts the process when that exits.
        mx.clear_streams()

    def embed(self, token_ids: Sequence[int], normalize: bool) -> list[float]:
        """The mean of a text's last hidden states."""
        import mlx.core as mx
        from mlx_lm.models.cache import make_prompt_cache

        cache = make_prompt_cache(self._model)
        total: Any = None
        for start in range(0, len(token_ids), self._limits.prefill_tokens):
            piece = mx.array([token_ids[start : start + self._limits.prefill_tokens]])
            hidden = self._model.model(piece, cache=cache)[0].astype(mx.float32).sum(axis=0)
            total = hidden if total is None else total + hidden
            mx.eval(total)
        vector: Any = total / len(token_ids)
        if normalize:
            vector = vector / mx.maximum(mx.linalg.norm(vector), 1e-12)
        self.processed_tokens += len(token_ids)
        return [float(x) for x in vector.tolist()]

    def _make_generator(self) -> Any:
        import mlx.core as mx
        from mlx_lm.generate import BatchGenerator

        return BatchGenerator(
            self._model,
            completion_batch_size=self._limits.max_running,
            prefill_batch_size=self._limits.prefill_batch,
            prefill_step_size=self._limits.prefill_tokens,
            stream=mx.new_stream(mx.default_device()),
        )

    def _find_embedding_size(self) -> int:
        """Components of a hidden state; 0 where the model does not show them."""
        import mlx.core as mx

        inner = getattr(self._model, "model", None)
        if inner is None:
            return 0
        try:
            hidden = inner(mx.array([[0]]))
        except Exception as error:  # not every architecture can be called so
            logger.info("no embeddings: the hidden states cannot be reached (%s)", type(error).__name__)
            return 0
        return int(hidden.shape[-1]) if isinstance(hidden, mx.array) and hidden.ndim == 3 else 0

    def _begin(self, uid: int) -> Iterator[Output]:
        work = self._work.get(uid)
        if work is not None and not work.started:
            work.started = True
            yield Output(work.running, started_at=monotonic())

    def _output(self, response: Any) -> Output:
        work = self._work[response.uid]
        request = work.running.job.request
        logprobs: tuple[TokenLogprob, ...] = ()
        if request.output.logprobs is not None:
            row = work.chooser.take_raw()
            logprobs = (self._logprob(row, response.token, request.output.logprobs),)
        if response.finish_reason is not None:
            # mlx-lm has dropped it; how the choice ends is for our own rules, which see the same token.
            del self._work[response.uid]
            del self._uids[work.running]
        return Output(work.running, (int(response.token),), logprobs)

    def _score_prompts(self) -> Iterator[Output]:
        """Log probabilities of prompts, by a pass of their own: the batch generator gives none."""
        for work in list(self._work.values()):
            if work.running.scores_prompt and not work.started:
                yield from self._begin(self._uids[work.running])
                yield Output(work.running, prompt_logprobs=tuple(self._score(work.running)))

    def _score(self, running: Running) -> Iterator[TokenLogprob]:
        import mlx.core as mx
        from mlx_lm.models.cache import make_prompt_cache

        token_ids, count = running.token_ids, running.job.request.output.prompt_logprobs or 0
        yield token_logprob(self._tokenizer, token_ids[0], None)
        cache = make_prompt_cache(self._model)
        for start in range(0, len(token_ids) - 1, self._limits.prefill_tokens):
            piece = token_ids[start : min(start + self._limits.prefill_tokens, len(token_ids) - 1)]
            rows = raw_logprobs(self._model(mx.array([list(piece)]), cache=cache)[0])
            mx.eval(rows)
            for i in range(len(piece)):
                yield self._logprob(rows[i], token_ids[start + i + 1], count)

    def _logprob(self, row: Any, token_id: int, alternatives: int) -> TokenLogprob:
        import mlx.core as mx

        top: list[tuple[int, float]] = []
        if alternatives:
            best = mx.argpartition(-row, alternatives - 1)[:alternatives]
            best = best[mx.argsort(-row[best])]
            top = list(zip(best.tolist(), row[best].tolist(), strict=True))
        return token_logprob(self._tokenizer, int(token_id), float(row[int(token_id)].item()), top)
