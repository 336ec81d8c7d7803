"""The process in which OpenVINO GenAI runs: `python -m fastchat_grpc.backends.openvino.process`.

`ContinuousBatchingPipeline.step` holds Python's lock while it computes, so in the worker's own process
every step would stop the event loop; here it stops nothing but this one. A crash of the engine, too, ends
this process and not the worker. Messages (see `messages.py`) come in on standard input and go out on
standard output.
"""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any, BinaryIO

from fastchat_grpc.backends.openvino import graph, lora
from fastchat_grpc.backends.openvino.grammar import GrammarCheck
from fastchat_grpc.backends.openvino.grammar_process import GrammarLoad, GrammarProcess
from fastchat_grpc.backends.openvino.messages import Add, Failed, Load, Loaded, Output, Step, read_frames, write_frame
from fastchat_grpc.backends.openvino.quiet import forbid_telemetry

PREFILL_TOKENS = 256
"""Prompt tokens of one step, as SchedulerConfig has it by default."""


@dataclass(slots=True)
class Sequence:
    """A choice in the pipeline."""

    key: int
    handle: Any
    unread_prompt: int
    """Prompt tokens that are not known to be processed."""


class Lane:
    """One pipeline and its sequences. An adapter is compiled into a lane of its own: within one pipeline,
    all sequences have the same weights."""

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline
        self.sequences: dict[int, Sequence] = {}

    @property
    def busy(self) -> bool:
        """Whether a step has something to do, be it to free what was cancelled."""
        return bool(self.sequences) or self.pipeline.has_non_finished_requests()

    def step(self, report: Step) -> None:
        """One step; what it brought goes into the report."""
        self.pipeline.step()
        self._count_prefill(report)
        for sequence in list(self.sequences.values()):
            self._read(sequence, report)
        usage: float = self.pipeline.get_metrics().cache_usage
        report.cache_usage = max(report.cache_usage, min(1.0, usage / 100))

    def _read(self, sequence: Sequence, report: Step) -> None:
        token_ids: list[int] = []
        logprobs: list[float] = []
        finish = ""
        while sequence.handle.can_read():
            for output in sequence.handle.read().values():
                token_ids += output.generated_ids
                logprobs += output.generated_log_probs
                finish = _FINISH.get(output.finish_reason.name, "")
        if sequence.handle.get_status().name == "IGNORED":
            finish = "memory"
        if token_ids:
            report.processed_tokens += sequence.unread_prompt + len(token_ids)
            sequence.unread_prompt = 0
        if token_ids or finish:
            report.outputs.append(Output(sequence.key, token_ids, logprobs, finish))
        if finish:
            del self.sequences[sequence.key]

    def _count_prefill(self, report: Step) -> None:
        """Count the prompt tokens that this step has read, at most; the pipeline does not say."""
        room = PREFILL_TOKENS
        for sequence in self.sequences.values():
            if room > 0 and sequence.unread_prompt:
                count = min(room, max(0, sequence.unread_prompt - 1))
                sequence.unread_prompt -= count
                report.processed_tokens += count
                room -= count


_FINISH = {"STOP": "stop", "LENGTH": "length", "TOOL_CALL": "stop"}


@dataclass(frozen=True, slots=True)
class Checked:
    """Choices whose grammar has been compiled elsewhere, and why it cannot be, or None."""

    choices: list[Add]
    problem: str | None


class Engine:
    """The lanes by adapter, "" being the base model, and the loop that steps them."""

    def __init__(self, load: Load) -> None:
        import openvino_genai

        self._genai = openvino_genai
        adapters = self._adapters(load)
        tokenizer = openvino_genai.Tokenizer(load.vocabulary) if load.vocabulary else None
        self._lanes = {"": Lane(self._pipeline(load, tokenizer, None))}
        for name, adapter in adapters.items():
            with lora.wholly_applied(name):
                self._lanes[name] = Lane(self._pipeline(load, tokenizer, adapter))
        self._grammars: GrammarProcess | None = None
        if tokenizer is not None:
            here = GrammarCheck(tokenizer, load.model, load.vocabulary_size)
            self._grammars = GrammarProcess(
                GrammarLoad(vocabulary=load.vocabulary, model=load.model, vocabulary_size=load.vocabulary_size),
                prepare=here.problem,
            )
        self._checking: set[int] = set()  # keys of choices whose grammar is being compiled
        self._processed_tokens = 0

    def _adapters(self, load: Load) -> dict[str, Any]:
        """The adapters, fitted to the model, by name. Raises ValueError."""
        if not load.adapters:
            return {}
        mode = self._genai.AdapterConfig.Mode.MODE_STATIC
        places = graph.places(Path(load.model))
        fitted = {file.name: lora.fit(file, places) for file in load.adapters}
        return {name: self._genai.AdapterConfig(self._genai.Adapter(it), 1.0, mode) for name, it in fitted.items()}

    def _pipeline(self, load: Load, tokenizer: Any, adapter: Any) -> Any:
        scheduler = self._genai.SchedulerConfig()
        for name, value in load.scheduler.items():
            setattr(scheduler, name, value)
        properties = dict(load.properties) | ({} if adapter is None else {"adapters": adapter})
        if tokenizer is None:
            return self._genai.ContinuousBatchingPipeline(load.model, scheduler, load.device, properties)
        return self._genai.ContinuousBatchingPipeline(load.model, tokenizer, scheduler, load.device, **properties)

    def serve(self, inbox: queue.SimpleQueue[Any], out: BinaryIO) -> None:
        """Take messages and step until the input ends."""
        while True:
            report = Step()
            busy = any(lane.busy for lane in self._lanes.values())
            if not self._take(inbox, report, wait=not busy):
                return
            for lane in self._lanes.values():
                if lane.busy:
                    lane.step(report)
            self._processed_tokens += report.processed_tokens
            report.processed_tokens = self._processed_tokens
            write_frame(out, report)

    def _take(self, inbox: queue.SimpleQueue[Any], report: Step, wait: bool) -> bool:
        """Apply the messages that are there; False when the input has ended."""
        while True:
            try:
                message = inbox.get(block=wait)
            except queue.Empty:
                return True
            wait = False
            if message is None:
                return False
            match message:
                case int(key):
                    self._stop(key)
                case Checked(choices, problem):
                    self._add_checked(choices, problem, report)
                case choices if choices[0].grammar is not None and self._grammars is not None:
                    self._check(choices, inbox)
                case choices:
                    self._add_all(choices, report)

    def _check(self, choices: list[Add], inbox: queue.SimpleQueue[Any]) -> None:
        """Have the grammar of one request's choices compiled elsewhere; they join afterwards, in one step."""
        assert self._grammars is not None
        assert choices[0].grammar is not None
        self._checking |= {choice.key for choice in choices}
        self._grammars.check(choices[0].grammar, lambda problem: inbox.put(Checked(choices, problem)))

    def _add_checked(self, choices: list[Add], problem: str | None, report: Step) -> None:
        wanted = [choice for choice in choices if choice.key in self._checking]  # the others were stopped meanwhile
        self._checking -= {choice.key for choice in choices}
        if problem is None:
            self._add_all(wanted, report)
        else:
            report.refused |= {choice.key: problem for choice in wanted}

    def _add_all(self, choices: list[Add], report: Step) -> None:
        for choice in choices:
            try:
                self._add(choice, report)
            except Exception as error:  # the library raises RuntimeError for everything; others run on
                report.failed[choice.key] = _reason(error)

    def _add(self, message: Add, report: Step) -> None:
        lane = self._lanes[message.adapter]
        handle = lane.pipeline.add_request(message.key, _tensor(message.token_ids), self._config(message))
        lane.sequences[message.key] = Sequence(message.key, handle, len(message.token_ids))
        report.begun[message.key] = monotonic()

    def _config(self, message: Add) -> Any:
        config = self._genai.GenerationConfig()
        config.apply_chat_template = False
        for name, value in message.config.items():
            setattr(config, name, value)
        if message.grammar is not None:
            name, value = message.grammar
            config.structured_output_config = self._genai.StructuredOutputConfig(**{name: value})
        return config

    def _stop(self, key: int) -> None:
        self._checking.discard(key)
        for lane in self._lanes.values():
            sequence = lane.sequences.pop(key, None)
            if sequence is not None:
                sequence.handle.cancel()


def _tensor(token_ids: tuple[int, ...]) -> Any:
    import numpy as np
    import openvino

    return openvino.Tensor(np.array([token_ids], dtype=np.int64))


def _read_into(inbox: queue.SimpleQueue[Any], stream: BinaryIO) -> None:
    try:
        for message in read_frames(stream):
            inbox.put(message)
    finally:
        inbox.put(None)


def main() -> None:
    """Load as told, then serve until the input ends."""
    forbid_telemetry()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends this process
    # The libraries print to standard output; frames go to a copy of it that they do not know.
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_read_into, args=(inbox, sys.stdin.buffer), daemon=True).start()
    load = inbox.get()
    if load is None:
        return
    started = monotonic()
    try:
        engine = Engine(load)
    except Exception as error:  # the library raises RuntimeError for everything
        write_frame(out, Failed(message=_reason(error)))
        return
    write_frame(out, Loaded(seconds=monotonic() - started, precision=_precision(load)))
    engine.serve(inbox, out)


def _precision(load: Load) -> str:
    """Number format that the device computes in, by these properties: its own choice is not the same everywhere."""
    import numpy as np
    import openvino
    from openvino import opset13

    try:
        one = opset13.parameter([1], np.float32)
        model = openvino.Model([opset13.result(opset13.relu(one))], [one])
        compiled = openvino.Core().compile_model(model, load.device, dict(load.properties))
        name: str = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    except Exception:  # a device that does not tell, or a property that is for language models only
        return ""
    return {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}.get(name, name)


def _reason(error: Exception) -> str:
    """The line of an OpenVINO error that says most: its last that is not a place in its source."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if not line.startswith(("Exception from", "Check ")) and "/src/" not in line]
    return (telling or lines or [type(error).__name__])[-1]


if __name__ == "__main__":
    main()
