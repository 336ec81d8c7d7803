"""Compiles grammars before they reach the engine's pipeline.

OpenVINO GenAI compiles a grammar in the middle of a step, which every stream waits for, and one that does not
compile leaves the pipeline unusable for every request. So each grammar first runs through a pipeline of its own,
over a model with the real vocabulary and next to no weights; when that one breaks, another takes its place.

It does so twice: in a process of its own (`grammar_process.py`), which may end or be ended; and, once it is
known to compile, in a thread of the engine's process. What is compiled belongs to the tokenizer, which the small
pipeline there shares with the large one, so that the latter finds it done.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

_PLACE = re.compile(r"^.*?\.(cc|cpp|h|hpp):\d+:\s*")  # time and line of source before the compiler's message
_HEAD_SIZE = 64  # the least that the attention kernel takes


class GrammarCheck:
    """Compiles grammars for one tokenizer. Holds Python's lock for none of it. For one thread at a time."""

    def __init__(self, tokenizer: Any, model: str, vocabulary_size: int) -> None:
        self._tokenizer = tokenizer
        self._model = Path(model)
        self._vocabulary_size = vocabulary_size
        self._pipeline: Any = None

    def problem(self, grammar: tuple[str, str]) -> str | None:
        """Why a grammar (field of StructuredOutputConfig, and value) does not compile, or None."""
        import numpy as np
        import openvino
        import openvino_genai

        if self._pipeline is None:
            self._pipeline = self._make()
        name, value = grammar
        config = openvino_genai.GenerationConfig(max_new_tokens=1)
        config.structured_output_config = openvino_genai.StructuredOutputConfig(**{name: value})
        try:
            self._pipeline.generate([openvino.Tensor(np.zeros((1, 1), np.int64))], [config])
        except RuntimeError as error:
            self._pipeline = None
            return _PLACE.sub("", " ".join(str(error).split())) or "it does not compile"
        return None

    def _make(self) -> Any:
        import openvino
        import openvino_genai

        scheduler = openvino_genai.SchedulerConfig()
        scheduler.num_kv_blocks = 8
        with tempfile.TemporaryDirectory() as folder:
            openvino.save_model(smallest_model(self._vocabulary_size), f"{folder}/openvino_model.xml")
            for name in ("config.json", "generation_config.json"):
                if (self._model / name).is_file():
                    shutil.copy(self._model / name, folder)
            return openvino_genai.ContinuousBatchingPipeline(folder, self._tokenizer, scheduler, "CPU")


def smallest_model(vocabulary_size: int) -> Any:
    """A language model of one attention head and no knowledge, shaped as the pipeline expects a decoder.

    Inputs are those of an exported decoder: input_ids, attention_mask and position_ids [batch, tokens],
    beam_idx [batch]; the cache is state; the output is logits [batch, tokens, vocabulary].
    """
    import numpy as np
    import openvino
    from openvino import opset6, opset13

    def constant(value: Any, kind: Any = np.int64) -> Any:
        return opset13.constant(np.array(value, dtype=kind))

    def parameter(name: str, rank: int, kind: Any = np.int64) -> Any:
        node = opset13.parameter([-1] * rank, kind, name=name)
        node.output(0).get_tensor().set_names({name})
        return node

    ids, mask, positions = (parameter(name, 2) for name in ("input_ids", "attention_mask", "position_ids"))
    beams = parameter("beam_idx", 1, np.int32)
    rows = constant(np.zeros((vocabulary_size, 1)), np.float32)
    hidden = opset13.matmul(
        opset13.gather(rows, ids, constant(0)), constant(np.ones((1, _HEAD_SIZE)), np.float32), False, False
    )
    hidden = opset13.add(hidden, opset13.unsqueeze(opset13.convert(positions, np.float32), constant(2)))
    head = opset13.transpose(opset13.reshape(hidden, constant([0, 0, 1, _HEAD_SIZE]), True), constant([0, 2, 1, 3]))
    batch = opset13.gather(opset13.shape_of(ids), constant([0]), constant(0))
    empty = opset13.broadcast(
        constant(0.0, np.float32), opset13.concat([batch, constant([1]), constant([0]), constant([_HEAD_SIZE])], 0)
    )
    caches, sinks = [], []
    for name in ("key", "value"):
        variable = f"past_key_values.0.{name}present.0.{name}"
        shape = openvino.PartialShape([-1, 1, -1, _HEAD_SIZE])
        past = opset13.gather(opset6.read_value(empty, variable, np.float32, shape), beams, constant(0))
        caches.append(opset13.concat([past, head], 2))
        sinks.append(opset6.assign(caches[-1], variable))
    wide_mask = opset13.unsqueeze(opset13.unsqueeze(opset13.convert(mask, np.float32), constant(1)), constant(1))
    attended = opset13.scaled_dot_product_attention(head, caches[0], caches[1], wide_mask)
    flat = opset13.reshape(opset13.transpose(attended, constant([0, 2, 1, 3])), constant([0, 0, _HEAD_SIZE]), True)
    columns = constant(np.zeros((1, vocabulary_size)), np.float32)
    logits = opset13.matmul(opset13.reduce_mean(flat, constant([2]), True), columns, False, False)
    logits.output(0).get_tensor().set_names({"logits"})
    return openvino.Model([opset13.result(logits)], sinks, [ids, mask, positions, beams], "grammar_check")
