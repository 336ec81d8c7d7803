"""Requests of a generation, without their conversations."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain

from fastchat_grpc.core import (
    SAMPLING_NUMBERS,
    ChatPrompt,
    GenerateRequest,
    Grammar,
    GrammarKind,
    OutputOptions,
    Prompt,
    ResumedChoice,
    SamplingParams,
    StopConditions,
    TextPrompt,
    TokenPrompt,
    UnsetInt,
)
from fastchat_grpc.errors import InvalidArgument
from fastchat_grpc.rpc.convert.chat import chat_from_pb, chat_to_pb
from fastchat_grpc.rpc.convert.fields import present
from fastchat_grpc.v1 import generation_pb2 as pb


def generate_request_from_pb(message: pb.GenerateRequest) -> GenerateRequest:
    """Check and convert a GenerateRequest. Raises InvalidArgument."""
    sampling = _sampling_from_pb(message.sampling)
    if sampling.fallback_seed is None and message.resume.HasField("fallback_seed"):
        sampling = replace(sampling, fallback_seed=message.resume.fallback_seed)
    return GenerateRequest(
        prompt=_prompt_from_pb(message),
        model=message.model,
        sampling=sampling,
        stopping=_stopping_from_pb(message.stopping),
        output=_output_from_pb(message.output),
        grammar=_grammar_from_pb(message.structured_output) if message.HasField("structured_output") else None,
        request_id=message.request_id,
        priority=message.priority,
        lora_adapter=message.lora_adapter,
        session_key=message.session_key,
        resume=resumed_choices(message.resume) if message.HasField("resume") else None,
        resume_fingerprint=message.resume.model_fingerprint,
        resume_backend=message.resume.backend,
        **present(message, "truncate_prompt_tokens"),
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
        **present(message, *SAMPLING_NUMBERS, "seed", "fallback_seed"),
    )


def _stopping_from_pb(message: pb.StopConditions) -> StopConditions:
    return StopConditions(
        stop=tuple(message.stop),
        stop_token_ids=tuple(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
        include_stop=message.include_stop,
        **present(message, "max_new_tokens", "min_new_tokens"),
    )


def _output_from_pb(message: pb.OutputOptions) -> OutputOptions:
    return OutputOptions(
        echo=message.echo,
        cumulative_text=message.cumulative_text,
        keep_special_tokens=message.keep_special_tokens,
        **present(message, "n", "logprobs", "prompt_logprobs", "stream_interval"),
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


def resumed_choices(message: pb.Resume) -> tuple[ResumedChoice, ...]:
    """What is known of each choice, several entries of one added up. Raises InvalidArgument."""
    entries: dict[int, list[pb.ResumedChoice]] = {}
    for entry in message.choices:
        entries.setdefault(entry.index, []).append(entry)
    return tuple(
        ResumedChoice(
            index=index,
            output_token_ids=tuple(chain.from_iterable(entry.output_token_ids for entry in own)),
            text_length=sum(entry.text_length for entry in own),
            finished=any(entry.finished for entry in own),
        )
        for index, own in entries.items()
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
