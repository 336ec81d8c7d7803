"""Which tokens are told, and where they begin in the text that the caller sees."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fastchat_grpc.core import Delta, FinishReason, TokenLogprob
from tests.unit.openai.fakes import FakePort, ask_chat, ask_text, stream_chat, stream_text


def entry(data: bytes) -> TokenLogprob:
    """A token of a byte-level vocabulary."""
    return TokenLogprob(1, data.decode("utf-8", "replace"), data, -0.5)


class Tokens(FakePort):
    """Says tokens of which some do not show."""

    def __init__(self, *events: tuple[str, list[bytes]]) -> None:
        super().__init__(pieces=[text for text, _ in events], finish=FinishReason.STOP)
        self._said = [tuple(entry(data) for data in tokens) for _, tokens in events]

    async def generate(self, request: Any) -> Any:
        said = iter(self._said)
        async for event in super().generate(request):
            yield replace(event, logprobs=next(said)) if isinstance(event, Delta) else event


def port() -> Tokens:
    # The text before a stop string is held back; the stop string and the end do not show.
    return Tokens(("He", [b"He"]), ("", [b"l", b"lo"]), ("llo", [b"\n", b"</s>"]))


async def test_the_tokens_of_a_chat_join_to_its_content() -> None:
    choice = (await ask_chat(port(), logprobs=True))["choices"][0]
    assert "".join(item["token"] for item in choice["logprobs"]["content"]) == choice["message"]["content"] == "Hello"
    chunks = await stream_chat(port(), logprobs=True)
    told = [item for chunk in chunks[:-1] for item in (chunk["choices"][0]["logprobs"] or {}).get("content", ())]
    assert told == choice["logprobs"]["content"]


async def test_every_token_of_a_text_has_its_entry_inside_the_text() -> None:
    logprobs = (await ask_text(port(), logprobs=0))["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["He", "l", "lo", "\n", "</s>"]
    assert logprobs["text_offset"] == [0, 2, 3, 5, 5]
    chunks = await stream_text(port(), logprobs=0)
    told = [chunk["choices"][0]["logprobs"] for chunk in chunks[:-1] if chunk["choices"][0]["logprobs"]]
    assert [token for item in told for token in item["tokens"]] == logprobs["tokens"]
    assert [offset for item in told for offset in item["text_offset"]] == logprobs["text_offset"]
