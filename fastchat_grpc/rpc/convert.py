"""Messages to domain types and back. The inside of the program never sees a message.

Presence decides: an unset optional field takes the default of the domain type. Conversion checks
what the wire allows and the domain does not, and raises InvalidArgument with the field's path.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from google.protobuf import duration_pb2

from fastchat_grpc.core import (
    SAMPLING_NUMBERS,
    Capability,
    ChatMessage,
    ChatPrompt,
    Completion,
    Delta,
    EmbedRequest,
    EmbedResult,
    Event,
    FinishReason,
    GenerateRequest,
    Grammar,
    GrammarKind,
    Image,
    Load,
    ModelInfo,
    Origin,
    OutputOptions,
    Prompt,
    PromptEcho,
    ResumedChoice,
    SamplingParams,
    StopConditions,
    TextPrompt,
    Timings,
    TokenLogprob,
    TokenPrompt,
    Tool,
    ToolCall,
    ToolChoice,
    TopLogprob,
    UnsetInt,
    Usage,
    WorkerState,
)
from fastchat_grpc.errors import InvalidArgument
from fastchat_grpc.v1 import generation_pb2 as pb

_INT32_MAX, _INT64_MAX = 2**31 - 1, 2**63 - 1
_FINISH_TO_PB = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.ABORT: pb.FINISH_REASON_ABORT,
    FinishReason.CONTENT_FILTER: pb.FINISH_REASON_CONTENT_FILTER,
}
_FINISH_FROM_PB = {number: reason for reason, number in _FINISH_TO_PB.items()}
_CHOICE_TO_PB: dict[ToolChoice, Any] = {c: pb.ToolChoiceMode.Value(f"TOOL_CHOICE_MODE_{c.name}") for c in ToolChoice}
_CHOICE_FROM_PB = {number: choice for choice, number in _CHOICE_TO_PB.items()} | {0: ToolChoice.AUTO}
_STATE_TO_PB = {
    WorkerState.STARTING: pb.WORKER_STATE_STARTING,
    WorkerState.SERVING: pb.WORKER_STATE_SERVING,
    WorkerState.DEGRADED: pb.WORKER_STATE_DEGRADED,
    WorkerState.DRAINING: pb.WORKER_STATE_DRAINING,
}
_STATE_FROM_PB = {number: state for state, number in _STATE_TO_PB.items()}
_CAPABILITY_TO_PB: dict[Capability, Any] = {c: pb.Capability.Value(f"CAPABILITY_{c.name}") for c in Capability}
_CAPABILITY_FROM_PB = {number: c for c, number in _CAPABILITY_TO_PB.items()}


_NOBODY = Origin()


def duration(seconds: float) -> duration_pb2.Duration:
    """Seconds to a Duration."""
    message = duration_pb2.Duration()
    message.FromNanoseconds(int(seconds * 1e9))
    return message


def seconds(message: duration_pb2.Duration) -> float:
    """A Duration to seconds."""
    return message.seconds + message.nanos / 1e9


def _present(message: Any, *names: str) -> dict[str, Any]:
    """The optional fields that are set, for use as keyword arguments."""
    return {name: getattr(message, name) for name in names if message.HasField(name)}


# ---------------------------------------------------------------------------------- requests


def generate_request_from_pb(message: pb.GenerateRequest) -> GenerateRequest:
    """Check and convert a GenerateRequest. Raises InvalidArgument."""
    return GenerateRequest(
        prompt=_prompt_from_pb(message),
        model=message.model,
        sampling=_sampling_from_pb(message.sampling),
        stopping=_stopping_from_pb(message.stopping),
        output=_output_from_pb(message.output),
        grammar=_grammar_from_pb(message.structured_output) if message.HasField("structured_output") else None,
        request_id=message.request_id,
        priority=message.priority,
        lora_adapter=message.lora_adapter,
        session_key=message.session_key,
        resume=_resume_from_pb(message.resume) if message.HasField("resume") else None,
        resume_fingerprint=message.resume.model_fingerprint,
        resume_backend=message.resume.backend,
        **_present(message, "truncate_prompt_tokens"),
    )


def generate_request_to_pb(request: GenerateRequest) -> pb.GenerateRequest:
    """Convert a GenerateRequest."""
    sampling, stopping, output = request.sampling, request.stopping, request.output
    message = pb.GenerateRequest(
        model=request.model,
        sampling=pb.SamplingParams(
            seed=sampling.seed,
            fallback_seed=sampling.fallback_seed,
            logit_bias=dict(sampling.logit_bias),
            **sampling.given,  # type: ignore[arg-type]  # unset stays unset, for the model's own defaults
        ),
        stopping=pb.StopConditions(
            max_new_tokens=None if isinstance(stopping.max_new_tokens, UnsetInt) else stopping.max_new_tokens,
            min_new_tokens=stopping.min_new_tokens,
            stop=stopping.stop,
            stop_token_ids=stopping.stop_token_ids,
            ignore_eos=stopping.ignore_eos,
            include_stop=stopping.include_stop,
        ),
        output=pb.OutputOptions(
            n=output.n,
            logprobs=output.logprobs,
            prompt_logprobs=output.prompt_logprobs,
            echo=output.echo,
            stream_interval=output.stream_interval,
            cumulative_text=output.cumulative_text,
            keep_special_tokens=output.keep_special_tokens,
        ),
        structured_output=_grammar_to_pb(request.grammar) if request.grammar is not None else None,
        request_id=request.request_id,
        priority=request.priority,
        lora_adapter=request.lora_adapter,
        session_key=request.session_key,
        truncate_prompt_tokens=request.truncate_prompt_tokens,
        resume=_resume_to_pb(request) if request.resume is not None else None,
    )
    match request.prompt:
        case TextPrompt(text):
            message.prompt = text
        case TokenPrompt(token_ids):
            message.prompt_token_ids.ids.extend(token_ids)
        case ChatPrompt() as chat:
            message.chat.CopyFrom(chat_to_pb(chat))
    return message


def _prompt_from_pb(message: pb.GenerateRequest | pb.CountTokensRequest | pb.TokenizeRequest) -> Prompt:
    match message.WhichOneof("input"):
        case "prompt":
            return TextPrompt(message.prompt)
        case "prompt_token_ids" if isinstance(message, pb.GenerateRequest):
            return TokenPrompt(tuple(message.prompt_token_ids.ids))
        case "chat":
            return chat_from_pb(message.chat)
    raise InvalidArgument("input", "set prompt, prompt_token_ids or chat")


def text_or_chat(message: pb.CountTokensRequest | pb.TokenizeRequest) -> Prompt:
    """The input of a request that takes a text or a conversation. Raises InvalidArgument."""
    return _prompt_from_pb(message)


def _sampling_from_pb(message: pb.SamplingParams) -> SamplingParams:
    return SamplingParams(
        logit_bias=dict(message.logit_bias),
        **_present(message, *SAMPLING_NUMBERS, "seed", "fallback_seed"),
    )


def _stopping_from_pb(message: pb.StopConditions) -> StopConditions:
    return StopConditions(
        stop=tuple(message.stop),
        stop_token_ids=tuple(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
        include_stop=message.include_stop,
        **_present(message, "max_new_tokens", "min_new_tokens"),
    )


def _output_from_pb(message: pb.OutputOptions) -> OutputOptions:
    return OutputOptions(
        echo=message.echo,
        cumulative_text=message.cumulative_text,
        keep_special_tokens=message.keep_special_tokens,
        **_present(message, "n", "logprobs", "prompt_logprobs", "stream_interval"),
    )


def _grammar_from_pb(message: pb.StructuredOutput) -> Grammar:
    kind = message.WhichOneof("grammar")
    if kind is None:
        raise InvalidArgument("structured_output", "set json_object, json_schema, regex or lark")
    source = "" if kind == "json_object" else getattr(message, kind)
    if kind != "json_object" and not source:
        raise InvalidArgument(f"structured_output.{kind}", "must not be empty")
    return Grammar(GrammarKind(kind), source)


def _grammar_to_pb(grammar: Grammar) -> pb.StructuredOutput:
    match grammar.kind:
        case GrammarKind.JSON_OBJECT:
            return pb.StructuredOutput(json_object=pb.JsonObject())
        case GrammarKind.JSON_SCHEMA:
            return pb.StructuredOutput(json_schema=grammar.source)
        case GrammarKind.REGEX:
            return pb.StructuredOutput(regex=grammar.source)
        case GrammarKind.LARK:
            return pb.StructuredOutput(lark=grammar.source)


def _resume_from_pb(message: pb.Resume) -> tuple[ResumedChoice, ...]:
    return tuple(
        ResumedChoice(
            index=choice.index,
            output_token_ids=tuple(choice.output_token_ids),
            text_length=choice.text_length,
            finished=choice.finished,
        )
        for choice in message.choices
    )


def _resume_to_pb(request: GenerateRequest) -> pb.Resume:
    return pb.Resume(
        model_fingerprint=request.resume_fingerprint,
        backend=request.resume_backend,
        choices=[
            pb.ResumedChoice(
                index=choice.index,
                output_token_ids=choice.output_token_ids,
                text_length=choice.text_length,
                finished=choice.finished,
            )
            for choice in request.resume or ()
        ],
    )


# -------------------------------------------------------------------------------------- chat


def chat_from_pb(message: pb.ChatInput) -> ChatPrompt:
    """Check and convert a conversation. Raises InvalidArgument."""
    return ChatPrompt(
        messages=tuple(_message_from_pb(item, f"chat.messages[{i}]") for i, item in enumerate(message.messages)),
        tools=tuple(
            Tool(name=tool.name, description=tool.description, parameters_json=tool.parameters_json)
            for tool in message.tools
        ),
        tool_choice=_choice_from_pb(message.tool_choice),
        template_arguments_json=message.template_arguments_json,
        continue_final_message=message.continue_final_message,
    )


def chat_to_pb(chat: ChatPrompt) -> pb.ChatInput:
    """Convert a conversation."""
    return pb.ChatInput(
        messages=[_message_to_pb(message) for message in chat.messages],
        tools=[
            pb.Tool(name=tool.name, description=tool.description, parameters_json=tool.parameters_json)
            for tool in chat.tools
        ],
        tool_choice=_choice_to_pb(chat.tool_choice),
        template_arguments_json=chat.template_arguments_json,
        continue_final_message=chat.continue_final_message,
    )


def _choice_from_pb(message: pb.ToolChoice) -> ToolChoice | str:
    if message.WhichOneof("choice") == "function":
        return message.function
    choice = _CHOICE_FROM_PB.get(message.mode)
    if choice is None:
        raise InvalidArgument("chat.tool_choice.mode", f"is no mode of this version: {message.mode}")
    return choice


def _choice_to_pb(choice: ToolChoice | str) -> pb.ToolChoice | None:
    if isinstance(choice, str):
        return pb.ToolChoice(function=choice)
    return pb.ToolChoice(mode=_CHOICE_TO_PB[choice]) if choice is not ToolChoice.AUTO else None


def _message_from_pb(message: pb.ChatMessage, path: str) -> ChatMessage:
    content: str | tuple[str | Image, ...] = message.content
    if message.parts:
        if message.content:
            raise InvalidArgument(path, "set content or parts, not both")
        content = tuple(_part_from_pb(part, f"{path}.parts[{i}]") for i, part in enumerate(message.parts))
    return ChatMessage(
        role=message.role,
        content=content,
        name=message.name,
        tool_calls=tuple(
            ToolCall(id=call.id, name=call.name, arguments_json=call.arguments_json) for call in message.tool_calls
        ),
        tool_call_id=message.tool_call_id,
        reasoning=message.reasoning,
    )


def _part_from_pb(part: pb.ContentPart, path: str) -> str | Image:
    match part.WhichOneof("part"):
        case "text":
            return part.text
        case "image":
            if part.image.WhichOneof("source") is None:
                raise InvalidArgument(f"{path}.image", "set data or url")
            return Image(data=part.image.data, url=part.image.url, media_type=part.image.media_type)
    raise InvalidArgument(path, "set text or image")


def _message_to_pb(message: ChatMessage) -> pb.ChatMessage:
    result = pb.ChatMessage(
        role=message.role,
        name=message.name,
        tool_call_id=message.tool_call_id,
        reasoning=message.reasoning,
        tool_calls=[
            pb.ToolCall(id=call.id, name=call.name, arguments_json=call.arguments_json) for call in message.tool_calls
        ],
    )
    if isinstance(message.content, str):
        result.content = message.content
    else:
        result.parts.extend(_part_to_pb(part) for part in message.content)
    return result


def _part_to_pb(part: str | Image) -> pb.ContentPart:
    if isinstance(part, str):
        return pb.ContentPart(text=part)
    if part.data:
        return pb.ContentPart(image=pb.Image(data=part.data, media_type=part.media_type))
    return pb.ContentPart(image=pb.Image(url=part.url, media_type=part.media_type))


# ------------------------------------------------------------------------------------ events


def event_to_pb(event: Event) -> pb.GenerateResponse:
    """Convert an event of a generation."""
    match event:
        case Delta():
            return pb.GenerateResponse(
                delta=pb.Delta(
                    index=event.index,
                    text=event.text,
                    token_ids=event.token_ids,
                    logprobs=[logprob_to_pb(entry) for entry in event.logprobs],
                    usage=_usage_to_pb(event.usage),
                    cumulative_text=event.cumulative_text,
                    reasoning=event.reasoning,
                )
            )
        case Completion():
            return pb.GenerateResponse(completion=_completion_to_pb(event))
        case PromptEcho():
            return pb.GenerateResponse(
                prompt=pb.Prompt(
                    text=event.text,
                    token_ids=event.token_ids,
                    logprobs=[logprob_to_pb(entry) for entry in event.logprobs],
                )
            )


def event_from_pb(message: pb.GenerateResponse, logprobs: tuple[TokenLogprob, ...] | None = None) -> Event:
    """Convert an event of a generation back. Raises ValueError on an event of a newer contract.

    Args:
        logprobs: those of the event, where they have been converted already.
    """
    match message.WhichOneof("event"):
        case "delta":
            delta = message.delta
            return Delta(
                index=delta.index,
                text=delta.text,
                token_ids=tuple(delta.token_ids),
                logprobs=_logprobs(delta.logprobs) if logprobs is None else logprobs,
                usage=_usage_from_pb(delta.usage),
                cumulative_text=delta.cumulative_text,
                reasoning=delta.reasoning,
            )
        case "completion":
            return _completion_from_pb(message.completion)
        case "prompt":
            prompt = message.prompt
            return PromptEcho(
                text=prompt.text,
                token_ids=tuple(prompt.token_ids),
                logprobs=_logprobs(prompt.logprobs) if logprobs is None else logprobs,
            )
    raise ValueError("GenerateResponse without a known event")


def _logprobs(messages: Iterable[pb.TokenLogprob]) -> tuple[TokenLogprob, ...]:
    return tuple(map(logprob_from_pb, messages))


def _completion_to_pb(event: Completion) -> pb.Completion:
    message = pb.Completion(
        index=event.index,
        finish_reason=_FINISH_TO_PB[event.finish_reason],
        usage=_usage_to_pb(event.usage),
        timings=pb.Timings(
            queued=duration(event.timings.queued_s),
            time_to_first_token=duration(event.timings.time_to_first_token_s),
            total=duration(event.timings.total_s),
        ),
    )
    if isinstance(event.matched, str):
        message.stop_string = event.matched
    elif event.matched is not None:
        message.stop_token_id = event.matched
    if event.origin is not None:
        message.model = event.origin.model
        message.worker_id = event.origin.worker_id
        message.request_id = event.origin.request_id
        message.model_fingerprint = event.origin.model_fingerprint
    return message


def _completion_from_pb(message: pb.Completion) -> Completion:
    match message.WhichOneof("matched"):
        case "stop_string":
            matched: str | int | None = message.stop_string
        case "stop_token_id":
            matched = message.stop_token_id
        case _:
            matched = None
    return Completion(
        index=message.index,
        finish_reason=_FINISH_FROM_PB.get(message.finish_reason, FinishReason.ABORT),
        matched=matched,
        usage=_usage_from_pb(message.usage),
        timings=Timings(
            queued_s=seconds(message.timings.queued),
            time_to_first_token_s=seconds(message.timings.time_to_first_token),
            total_s=seconds(message.timings.total),
        ),
        origin=_origin_from_pb(message),
    )


def _origin_from_pb(message: pb.Completion) -> Origin | None:
    origin = Origin(
        model=message.model,
        worker_id=message.worker_id,
        request_id=message.request_id,
        model_fingerprint=message.model_fingerprint,
    )
    return origin if origin != _NOBODY else None


def _usage_to_pb(usage: Usage) -> pb.Usage:
    return pb.Usage(
        prompt_token_count=usage.prompt_tokens,
        completion_token_count=usage.completion_tokens,
        total_token_count=usage.total_tokens,
        cached_token_count=usage.cached_tokens,
        reasoning_token_count=usage.reasoning_tokens,
    )


def _usage_from_pb(message: pb.Usage) -> Usage:
    return Usage(
        prompt_tokens=message.prompt_token_count,
        completion_tokens=message.completion_token_count,
        cached_tokens=message.cached_token_count,
        reasoning_tokens=message.reasoning_token_count,
    )


def logprob_to_pb(entry: TokenLogprob) -> pb.TokenLogprob:
    """Convert the log probability of a token."""
    return pb.TokenLogprob(
        token_id=entry.token_id,
        token=entry.token,
        token_bytes=entry.token_bytes,
        logprob=entry.logprob,
        top=[
            pb.TopLogprob(token_id=top.token_id, token=top.token, token_bytes=top.token_bytes, logprob=top.logprob)
            for top in entry.top
        ],
    )


def logprob_from_pb(message: pb.TokenLogprob) -> TokenLogprob:
    """Convert the log probability of a token back."""
    return TokenLogprob(
        token_id=message.token_id,
        token=message.token,
        token_bytes=message.token_bytes,
        logprob=message.logprob if message.HasField("logprob") else None,
        top=tuple(TopLogprob(top.token_id, top.token, top.token_bytes, top.logprob) for top in message.top),
    )


# -------------------------------------------------------------------------------- embeddings


def embed_request_from_pb(message: pb.EmbedRequest) -> EmbedRequest:
    """Check and convert an EmbedRequest. Raises InvalidArgument."""
    inputs: list[str | tuple[int, ...]] = []
    for i, item in enumerate(message.inputs):
        match item.WhichOneof("input"):
            case "text":
                inputs.append(item.text)
            case "token_ids":
                inputs.append(tuple(item.token_ids.ids))
            case _:
                raise InvalidArgument(f"inputs[{i}]", "set text or token_ids")
    return EmbedRequest(
        inputs=tuple(inputs),
        model=message.model,
        normalize=not message.skip_normalization,
        **_present(message, "truncate"),
    )


def embed_request_to_pb(request: EmbedRequest) -> pb.EmbedRequest:
    """Convert an EmbedRequest."""
    return pb.EmbedRequest(
        model=request.model,
        inputs=[
            pb.EmbedInput(text=item) if isinstance(item, str) else pb.EmbedInput(token_ids=pb.TokenIds(ids=item))
            for item in request.inputs
        ],
        truncate=request.truncate,
        skip_normalization=not request.normalize,
    )


def embed_result_to_pb(result: EmbedResult) -> pb.EmbedResponse:
    """Convert embeddings."""
    return pb.EmbedResponse(
        embeddings=[pb.Embedding(values=vector) for vector in result.embeddings],
        usage=_usage_to_pb(Usage(prompt_tokens=result.prompt_tokens)),
    )


def embed_result_from_pb(message: pb.EmbedResponse) -> EmbedResult:
    """Convert embeddings back."""
    return EmbedResult(
        embeddings=[list(embedding.values) for embedding in message.embeddings],
        prompt_tokens=message.usage.prompt_token_count,
    )


# --------------------------------------------------------------------------- models and load


@lru_cache(maxsize=4096)
def model_to_pb(model: ModelInfo) -> pb.ModelInfo:
    """Convert a model's description. Not to be changed: equal descriptions share one message."""
    return pb.ModelInfo(
        name=model.name,
        context_length=model.context_length,
        capabilities=sorted(_CAPABILITY_TO_PB[c] for c in model.capabilities),
        base_model=model.base_model,
        backend=model.backend,
        embedding_size=model.embedding_size,
        vocabulary_size=model.vocabulary_size,
        fingerprint=model.fingerprint,
        revision=model.revision,
        quantization=model.quantization,
        tokenizer_fingerprint=model.tokenizer_fingerprint,
        max_output_length=model.max_output_length,
    )


def model_from_pb(message: pb.ModelInfo) -> ModelInfo:
    """Convert a model's description back; capabilities of a newer contract are dropped."""
    return ModelInfo(
        name=message.name,
        context_length=message.context_length,
        capabilities=frozenset(_CAPABILITY_FROM_PB[c] for c in message.capabilities if c in _CAPABILITY_FROM_PB),
        base_model=message.base_model,
        backend=message.backend,
        embedding_size=message.embedding_size,
        vocabulary_size=message.vocabulary_size,
        fingerprint=message.fingerprint,
        revision=message.revision,
        quantization=message.quantization,
        tokenizer_fingerprint=message.tokenizer_fingerprint,
        max_output_length=message.max_output_length,
    )


def capability_from_pb(number: int, path: str) -> Capability:
    """The capability of a number in the contract. Raises InvalidArgument for one that is unknown here."""
    found = _CAPABILITY_FROM_PB.get(number)
    if found is None:
        raise InvalidArgument(path, f"is no capability of this version: {number}")
    return found


def state_to_pb(state: WorkerState) -> Any:
    """The number of a state in the contract."""
    return _STATE_TO_PB[state]


def load_to_pb(load: Load) -> pb.WorkerLoad:
    """Convert a load. What is more than a field holds, as the sum of a fleet may be, is as much as it holds."""
    return pb.WorkerLoad(
        state=_STATE_TO_PB[load.state],
        running_count=min(load.running, _INT32_MAX),
        waiting_count=min(load.waiting, _INT32_MAX),
        max_running_count=min(load.max_running, _INT32_MAX),
        max_waiting_count=min(load.max_waiting, _INT32_MAX),
        kv_cache_usage=load.kv_cache_usage,
        tokens_per_second=load.tokens_per_second,
        kv_free_token_count=min(load.kv_free_tokens, _INT64_MAX),
        oldest_waiting_age=None if load.oldest_waiting_s is None else duration(load.oldest_waiting_s),
    )


def load_from_pb(message: pb.WorkerLoad) -> Load:
    """Convert a load back. An unset state counts as SERVING."""
    return Load(
        state=_STATE_FROM_PB.get(message.state, WorkerState.SERVING),
        running=message.running_count,
        waiting=message.waiting_count,
        max_running=message.max_running_count,
        max_waiting=message.max_waiting_count,
        kv_cache_usage=message.kv_cache_usage,
        tokens_per_second=message.tokens_per_second,
        kv_free_tokens=message.kv_free_token_count,
        oldest_waiting_s=seconds(message.oldest_waiting_age) if message.HasField("oldest_waiting_age") else None,
    )
