"""What each backend can do, declared once: the source of refusals, of `fastchat-grpc backends`, and of its tests.

A backend honours every feature except those that it lists in `refuses`, each with the reason that a
caller sees. `refuse_unsupported` turns the declaration into errors that name the field, and the
conformance suite checks both halves: what is refused is refused, and what is not is honoured.
Importing this module imports no engine.
"""

from __future__ import annotations

import enum
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from fastchat_grpc.core import (
    MAX_LOGPROBS,
    Capability,
    ChatPrompt,
    GenerateRequest,
    GrammarKind,
    Image,
    SamplingDefaults,
    TextPrompt,
    TokenPrompt,
)
from fastchat_grpc.errors import AdapterNotFound, UnsupportedField


class Feature(enum.Enum):
    """Something that a request may ask for; the value names it in tables."""

    TEXT_PROMPT = "text prompts"
    TOKEN_PROMPT = "token prompts"
    CHAT = "chat"
    IMAGES = "images"
    N = "n"
    SEED = "seed"
    TOP_K = "top_k"
    TOP_P = "top_p"
    MIN_P = "min_p"
    REPETITION_PENALTY = "repetition penalty"
    PRESENCE_PENALTY = "presence penalty"
    FREQUENCY_PENALTY = "frequency penalty"
    LOGIT_BIAS = "logit bias"
    MIN_NEW_TOKENS = "min tokens"
    STOP_TOKEN_IDS = "stop tokens"
    IGNORE_EOS = "ignore EOS"
    LOGPROBS = "logprobs"
    TOP_LOGPROBS = "top logprobs"
    PROMPT_LOGPROBS = "prompt logprobs"
    ECHO = "echo"
    KEEP_SPECIAL_TOKENS = "special tokens"
    TRUNCATE_PROMPT = "prompt truncation"
    JSON_OBJECT = "JSON object"
    JSON_SCHEMA = "JSON schema"
    REGEX = "regex"
    LARK = "Lark grammar"
    LORA = "LoRA"
    RESUME = "resume"
    RESUME_STATE = "resume with output penalties or a grammar"
    """Continues where penalties or a grammar depend on what another worker has made."""
    RESUME_SEED = "resume with a seed"
    """Draws the same random numbers as if nothing had happened: they go by the seed and the token's place alone."""
    EMBED = "embeddings"
    EMBED_OPTIONS = "raw or truncated embeddings"
    TOKEN_IDS = "output token ids"


GRAMMARS = {
    GrammarKind.JSON_OBJECT: Feature.JSON_OBJECT,
    GrammarKind.JSON_SCHEMA: Feature.JSON_SCHEMA,
    GrammarKind.REGEX: Feature.REGEX,
    GrammarKind.LARK: Feature.LARK,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Traits:
    """A backend as declared."""

    summary: str
    extra: str = ""
    """Extra of the package that installs what it needs; empty: nothing is needed."""
    modules: tuple[str, ...] = ()
    """Modules that must be importable for it to run."""
    devices: tuple[str, ...] = ("cpu",)
    formats: tuple[str, ...] = ()
    """Model formats that it takes."""
    refuses: Mapping[Feature, str] = field(default_factory=lambda: MappingProxyType({}))
    max_top_logprobs: int = MAX_LOGPROBS

    def supports(self, feature: Feature) -> bool:
        """Whether requests may ask for it."""
        return feature not in self.refuses

    def with_features(self, *features: Feature) -> Traits:
        """The same without refusals of these features."""
        return replace(self, refuses={f: reason for f, reason in self.refuses.items() if f not in features})

    @property
    def installed(self) -> bool:
        """Whether the modules it needs are here. Imports none of them, only their parents."""
        return all(_is_importable(module) for module in self.modules)

    def capabilities(self, *, chat: bool = True, embed: bool = True) -> frozenset[Capability]:
        """Capabilities of a model, given whether it has a chat template and embeddings."""
        found = {Capability.GENERATE}
        if chat and self.supports(Feature.CHAT):
            found.add(Capability.CHAT)
        if embed and self.supports(Feature.EMBED):
            found.add(Capability.EMBED)
        if self.supports(Feature.LOGPROBS):
            found.add(Capability.LOGPROBS)
        if self.supports(Feature.SEED):
            found.add(Capability.SEED)
        if self.supports(Feature.RESUME):
            found.add(Capability.RESUME)
            if self.supports(Feature.RESUME_SEED):
                found.add(Capability.SEEDED_RESUME)
            if self.supports(Feature.RESUME_STATE):
                found.add(Capability.STATEFUL_RESUME)
        if self.supports(Feature.IMAGES):
            found.add(Capability.VISION)
        if self.supports(Feature.JSON_SCHEMA):
            found.add(Capability.STRUCTURED_OUTPUT)
        return frozenset(found)


_Check = Callable[[GenerateRequest], bool]
CHECKS: tuple[tuple[Feature, str, _Check], ...] = (
    (Feature.TEXT_PROMPT, "prompt", lambda r: isinstance(r.prompt, TextPrompt)),
    (Feature.TOKEN_PROMPT, "prompt_token_ids", lambda r: isinstance(r.prompt, TokenPrompt)),
    (Feature.CHAT, "chat", lambda r: isinstance(r.prompt, ChatPrompt)),
    (Feature.IMAGES, "chat.messages.parts.image", lambda r: _has_images(r)),
    (Feature.N, "output.n", lambda r: r.output.n > 1),
    (Feature.SEED, "sampling.seed", lambda r: r.sampling.seed is not None),
    (Feature.TOP_K, "sampling.top_k", lambda r: r.sampling.top_k > 0),
    (Feature.TOP_P, "sampling.top_p", lambda r: r.sampling.top_p < 1 and not r.sampling.greedy),
    (Feature.MIN_P, "sampling.min_p", lambda r: r.sampling.min_p > 0),
    (Feature.REPETITION_PENALTY, "sampling.repetition_penalty", lambda r: r.sampling.repetition_penalty != 1),
    (Feature.PRESENCE_PENALTY, "sampling.presence_penalty", lambda r: r.sampling.presence_penalty != 0),
    (Feature.FREQUENCY_PENALTY, "sampling.frequency_penalty", lambda r: r.sampling.frequency_penalty != 0),
    (Feature.LOGIT_BIAS, "sampling.logit_bias", lambda r: bool(r.sampling.logit_bias)),
    (Feature.MIN_NEW_TOKENS, "stopping.min_new_tokens", lambda r: r.stopping.min_new_tokens > 0),
    (Feature.STOP_TOKEN_IDS, "stopping.stop_token_ids", lambda r: bool(r.stopping.stop_token_ids)),
    (Feature.IGNORE_EOS, "stopping.ignore_eos", lambda r: r.stopping.ignore_eos),
    (Feature.LOGPROBS, "output.logprobs", lambda r: r.output.logprobs is not None),
    (Feature.TOP_LOGPROBS, "output.logprobs", lambda r: (r.output.logprobs or 0) > 0),
    (Feature.PROMPT_LOGPROBS, "output.prompt_logprobs", lambda r: r.output.prompt_logprobs is not None),
    (Feature.TOP_LOGPROBS, "output.prompt_logprobs", lambda r: (r.output.prompt_logprobs or 0) > 0),
    (Feature.ECHO, "output.echo", lambda r: r.output.echo),
    (Feature.KEEP_SPECIAL_TOKENS, "output.keep_special_tokens", lambda r: r.output.keep_special_tokens),
    (Feature.TRUNCATE_PROMPT, "truncate_prompt_tokens", lambda r: r.truncate_prompt_tokens is not None),
    (Feature.LORA, "lora_adapter", lambda r: bool(r.lora_adapter)),
    (Feature.RESUME, "resume", lambda r: r.resume is not None),
    (Feature.RESUME_STATE, "resume", lambda r: _resumes_state(r)),
    (Feature.RESUME_SEED, "resume", lambda r: _resumes_seed(r)),
)
"""How a request asks for a feature, and the field to name when it is refused. Grammars are checked by kind."""


def refuse_unsupported(request: GenerateRequest, traits: Traits) -> None:
    """Raise UnsupportedField for the first thing that a request asks for and the backend refuses."""
    for feature, path, asks in CHECKS:
        if feature in traits.refuses and asks(request):
            raise UnsupportedField(path, traits.refuses[feature])
    if request.grammar is not None:
        feature = GRAMMARS[request.grammar.kind]
        if feature in traits.refuses:
            raise UnsupportedField(f"structured_output.{request.grammar.kind.value}", traits.refuses[feature])
        if request.stopping.ignore_eos:
            raise UnsupportedField("stopping.ignore_eos", "cannot be combined with structured_output, which must end")
    alternatives = request.output.logprobs or 0
    if alternatives > traits.max_top_logprobs:
        raise UnsupportedField(
            "output.logprobs", f"at most {traits.max_top_logprobs} alternatives are supported here, got {alternatives}"
        )


_DEFAULTED = {
    "top_p": Feature.TOP_P,
    "top_k": Feature.TOP_K,
    "min_p": Feature.MIN_P,
    "repetition_penalty": Feature.REPETITION_PENALTY,
}


def supported_defaults(defaults: SamplingDefaults, traits: Traits) -> SamplingDefaults:
    """A model's default sampling without what the backend refuses: nobody has asked for it."""
    refused = {name: None for name, feature in _DEFAULTED.items() if feature in traits.refuses}
    return replace(defaults, **refused) if refused else defaults


def adapter_not_found(name: str, loaded: Mapping[str, object]) -> AdapterNotFound:
    """The error for an adapter that is not loaded."""
    known = ", ".join(loaded) or "none"
    return AdapterNotFound(f"lora_adapter: no adapter {name[:128]!r} is loaded; loaded: {known}")


def _has_images(request: GenerateRequest) -> bool:
    if not isinstance(request.prompt, ChatPrompt):
        return False
    contents = (message.content for message in request.prompt.messages)
    return any(isinstance(part, Image) for content in contents if not isinstance(content, str) for part in content)


def _continues(request: GenerateRequest) -> bool:
    """Whether choices go on that have output already."""
    return any(choice.output_token_ids and not choice.finished for choice in request.resume or ())


def _resumes_state(request: GenerateRequest) -> bool:
    """Whether choices go on whose next token depends on how their output so far was made."""
    sampling = request.sampling
    penalized = bool(sampling.presence_penalty or sampling.frequency_penalty)
    return _continues(request) and (penalized or request.grammar is not None)


def _resumes_seed(request: GenerateRequest) -> bool:
    """Whether choices go on whose next token depends on how many random numbers were drawn."""
    return _continues(request) and request.sampling.seed is not None and not request.sampling.greedy


def _is_importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


VLLM_DIALECT = (
    Feature.TOKEN_PROMPT,
    Feature.TOP_K,
    Feature.MIN_P,
    Feature.REPETITION_PENALTY,
    Feature.MIN_NEW_TOKENS,
    Feature.STOP_TOKEN_IDS,
    Feature.IGNORE_EOS,
    Feature.KEEP_SPECIAL_TOKENS,
    Feature.TRUNCATE_PROMPT,
    Feature.REGEX,
)
"""What a server of the OpenAI API can do if it takes vLLM's members beside that."""

_NO_GRAMMAR = "the {} backend cannot constrain its output"


def no_grammars(backend: str, kinds: tuple[Feature, ...] = tuple(GRAMMARS.values())) -> dict[Feature, str]:
    """Refusals of grammars, for a backend that has none (of these kinds)."""
    return dict.fromkeys(kinds, _NO_GRAMMAR.format(backend))


TRAITS: Mapping[str, Traits] = MappingProxyType(
    {
        "echo": Traits(
            summary="Says the prompt back; for tests and dry runs",
            refuses={
                **no_grammars("echo"),
                Feature.IMAGES: "the echo backend reads text only",
                Feature.LORA: "the echo backend has no adapters",
            },
        ),
        "transformers": Traits(
            summary="Any causal model of Hugging Face transformers, with continuous batching",
            extra="transformers",
            modules=("torch", "transformers"),
            devices=("cpu", "cuda", "mps", "xpu", "npu"),
            formats=("Hugging Face", "GGUF", "LoRA"),
            refuses={Feature.IMAGES: "images are not supported by this backend"},
        ),
        "openvino": Traits(
            summary="OpenVINO GenAI with continuous batching, for Intel and AMD CPUs",
            extra="openvino",
            modules=("openvino_genai",),
            devices=("cpu", "xpu"),
            formats=("OpenVINO", "GGUF", "Hugging Face (exported once)", "LoRA"),
            refuses={
                Feature.IMAGES: "images are not supported by this backend",
                Feature.LOGIT_BIAS: "OpenVINO GenAI has no logit bias",
                Feature.TOP_LOGPROBS: "OpenVINO GenAI gives the log probability of the chosen token only; set it to 0",
                Feature.PROMPT_LOGPROBS: "prefix caching leaves them out; start with --backend-option prefix_cache=off",
                Feature.LARK: "OpenVINO GenAI takes JSON schemas and regular expressions, not Lark grammars",
                Feature.RESUME_STATE: "OpenVINO GenAI cannot continue where output penalties or a grammar left off",
                Feature.RESUME_SEED: "OpenVINO GenAI cannot continue the random numbers of a seed in the middle",
                Feature.EMBED: "OpenVINO GenAI's pipeline gives no hidden states",
            },
        ),
        "vllm": Traits(
            summary="vLLM's asynchronous engine, in the worker's process",
            extra="vllm",
            modules=("vllm",),
            devices=("cuda", "cpu", "xpu"),
            formats=("Hugging Face", "LoRA"),
            refuses={
                Feature.IMAGES: "images are not supported by this backend",
                Feature.RESUME_STATE: "vLLM cannot continue penalties of the output, or a grammar, in the middle",
                Feature.RESUME_SEED: "vLLM cannot continue the random numbers of a seed in the middle",
            },
        ),
        "llama_cpp": Traits(
            summary="llama.cpp with continuous batching, for GGUF files",
            extra="llama-cpp",
            modules=("llama_cpp",),
            devices=("cpu", "cuda", "mps"),
            formats=("GGUF",),
            refuses={
                Feature.IMAGES: "images are not supported by this backend",
                Feature.LORA: "this backend takes no adapters; merge them into the GGUF file",
            },
        ),
        "sglang": Traits(
            summary="SGLang's engine, in the worker's process",
            extra="sglang",
            modules=("sglang",),
            devices=("cuda", "cpu", "xpu", "npu"),
            formats=("Hugging Face", "LoRA"),
            refuses={
                Feature.IMAGES: "images are not supported by this backend",
                Feature.LARK: "SGLang has no Lark grammars",
                Feature.RESUME_STATE: "SGLang cannot continue penalties of the output, or a grammar, in the middle",
            },
        ),
        "lightllm": Traits(
            summary="A LightLLM server, by its generate_stream",
            extra="lightllm",
            modules=("httpx2", "transformers"),
            devices=("cuda",),
            formats=("Hugging Face",),
            refuses={
                **dict.fromkeys(
                    GRAMMARS.values(),
                    "start LightLLM with --output_constraint_mode outlines (regular expressions) or xgrammar (JSON), "
                    "and say so with --backend-option constraints",
                ),
                Feature.IMAGES: "images are not supported by this backend",
                Feature.SEED: "LightLLM has no seeds",
                Feature.LARK: "LightLLM has no Lark grammars",
                Feature.MIN_P: "LightLLM has no min_p",
                Feature.LOGIT_BIAS: "LightLLM has no logit_bias",
                Feature.TOP_LOGPROBS: "LightLLM gives the chosen token's log probability only",
                Feature.PROMPT_LOGPROBS: "LightLLM streams no log probabilities of prompts",
                Feature.LORA: "this backend takes no adapters",
                Feature.RESUME_STATE: "LightLLM cannot continue penalties of the output in the middle",
                Feature.RESUME_SEED: "LightLLM has no seeds",
                Feature.EMBED: "LightLLM has no embeddings",
            },
        ),
        "mlx": Traits(
            summary="mlx-lm's batch generator, for Macs; runs on Linux too",
            extra="mlx",
            modules=("mlx_lm",),
            devices=("mps", "cpu", "cuda"),
            formats=("Hugging Face", "MLX"),
            refuses={
                **no_grammars("mlx"),
                Feature.IMAGES: "images are not supported by this backend",
                Feature.LORA: "this backend takes no adapters; fuse them with mlx_lm.fuse",
            },
        ),
        "upstream": Traits(
            summary="Any server of the OpenAI API: vLLM, SGLang, TGI, llama.cpp, Ollama, hosted ones",
            extra="upstream",
            modules=("httpx2",),
            devices=("the server's",),
            formats=("the server's",),
            refuses={
                **dict.fromkeys(
                    VLLM_DIALECT,
                    "needs a server of vLLM's dialect: --backend-option dialect=vllm",
                ),
                **dict.fromkeys(
                    (Feature.PROMPT_LOGPROBS, Feature.TOKEN_IDS),
                    "the OpenAI API names no token ids",
                ),
                **dict.fromkeys(
                    (Feature.RESUME, Feature.RESUME_STATE, Feature.RESUME_SEED),
                    "the OpenAI API cannot continue an output",
                ),
                Feature.LARK: "the OpenAI API takes no Lark grammars",
                Feature.EMBED: "start with --backend-option embeddings=on where the server makes them",
                Feature.EMBED_OPTIONS: "the OpenAI API has no such field",
            },
        ),
        "multi": Traits(
            summary="Several models in one worker, each with a backend of its own",
            devices=("its models'",),
            formats=("a TOML list of models",),
        ),
    }
)
"""Every backend by its name."""
