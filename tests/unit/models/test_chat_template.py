"""Conversations to text: what reaches the template, and how its refusals are reported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from fastchat_grpc.core import ChatMessage, ChatPrompt, Image, Tool, ToolCall, ToolChoice
from fastchat_grpc.errors import InvalidArgument
from fastchat_grpc.models.chat_template import ChatTemplate
from fastchat_grpc.models.overrides import CHAT_TEMPLATES
from tests.e2e.tiny_models import CHATML, byte_level_tokenizer

SECRET = "xyzzy-private-content"


def template(source: Any, override: str | None = None) -> ChatTemplate:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level_tokenizer(), eos_token="<|im_end|>")
    tokenizer.chat_template = source
    return ChatTemplate(tokenizer, override)


def chat(*turns: tuple[str, Any], **settings: Any) -> ChatPrompt:
    return ChatPrompt(messages=tuple(ChatMessage(role=role, content=content) for role, content in turns), **settings)


def test_a_conversation_is_rendered_and_opened_for_the_answer() -> None:
    text = template(CHATML).render(chat(("system", "Be brief."), ("user", "Hi")))
    assert text == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_the_assistants_last_message_can_be_continued() -> None:
    text = template(CHATML).render(chat(("user", "Hi"), ("assistant", "Well, "), continue_final_message=True))
    assert text.endswith("<|im_start|>assistant\nWell, ")


TRIMS = (
    "{% for message in messages %}<{{ message.role }}>\n{{ message.content | trim }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>\n{% endif %}"
)


@pytest.mark.parametrize("begun", ["The answer is ", "<think>ok", "", "  two\n\n", "a"])
@pytest.mark.parametrize("source", [CHATML, TRIMS], ids=["keeps", "trims"])
def test_a_prompt_that_is_continued_ends_in_the_message_as_it_was_given(source: str, begun: str) -> None:
    text = template(source).render(chat(("user", "a"), ("assistant", begun), continue_final_message=True))
    expected = begun if source is CHATML else begun.lstrip()
    assert text.endswith("assistant" + ("\n" if source is CHATML else ">\n") + expected)


def test_a_message_in_parts_is_continued_at_its_last_one() -> None:
    text = template(TRIMS).render(chat(("user", "a"), ("assistant", ("one", "two ")), continue_final_message=True))
    assert text.endswith("<assistant>\none\ntwo ")


def test_a_message_is_continued_or_an_answer_begun_not_both() -> None:
    both = chat(
        ("user", "a"),
        ("assistant", "b"),
        continue_final_message=True,
        template_arguments_json='{"add_generation_prompt": true}',
    )
    with pytest.raises(InvalidArgument) as caught:
        template(CHATML).render(both)
    assert caught.value.field == "chat.continue_final_message"


def test_a_template_that_drops_the_final_message_cannot_continue_it() -> None:
    with pytest.raises(InvalidArgument, match="does not show the end"):
        template("{{ messages[0].content }}").render(
            chat(("user", "a"), ("assistant", "b"), continue_final_message=True)
        )


def test_parts_become_lines_of_one_text() -> None:
    assert "user\none\ntwo<" in template(CHATML).render(chat(("user", ("one", "two"))))


def test_an_image_is_refused_by_its_place() -> None:
    with pytest.raises(InvalidArgument) as caught:
        template(CHATML).render(chat(("user", "a"), ("user", ("text", Image(url="http://x/y.png")))))
    assert caught.value.field == "chat.messages[1].parts[1].image"


def test_developer_is_system_for_templates_that_do_not_know_it() -> None:
    assert "<|im_start|>system\nx" in template(CHATML).render(chat(("developer", "x"), ("user", "y")))
    knows = CHATML + "{# developer #}"
    assert "<|im_start|>developer\nx" in template(knows).render(chat(("developer", "x"), ("user", "y")))


def test_a_model_without_a_template_says_so() -> None:
    with pytest.raises(InvalidArgument, match="no chat template"):
        template(None).render(chat(("user", "x")))


def test_an_override_replaces_the_template() -> None:
    replaced = template(CHATML, override="{{ messages[0]['content'] }}!")
    assert replaced.source == "{{ messages[0]['content'] }}!"
    assert replaced.render(chat(("user", "x"))) == "x!"


def test_template_arguments_reach_the_template() -> None:
    source = "{{ enable_thinking }} {{ add_generation_prompt }}"
    arguments = '{"enable_thinking": false, "add_generation_prompt": false}'
    assert template(source).render(chat(("user", "x"), template_arguments_json=arguments)) == "False False"


@pytest.mark.parametrize("name", ["tokenize", "messages", "chat_template", "tools", "return_tensors", "conversation"])
def test_template_arguments_cannot_replace_the_servers_own(name: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        template(CHATML).render(chat(("user", "x"), template_arguments_json=json.dumps({name: "y"})))
    assert caught.value.field == f"chat.template_arguments_json.{name}"


def test_tools_and_calls_take_the_shape_that_templates_expect() -> None:
    source = "{{ tools | tojson }}|{% for m in messages %}{{ m | tojson }}{% endfor %}"
    call = ToolCall(id="c1", name="add", arguments_json='{"a": 1}')
    prompt = ChatPrompt(
        messages=(
            ChatMessage(role="assistant", tool_calls=(call,)),
            ChatMessage(role="tool", content="3", tool_call_id="c1", name="add"),
        ),
        tools=(Tool(name="add", description="Adds.", parameters_json='{"type": "object"}'), Tool(name="now")),
    )
    text = template(source).render(prompt)
    assert '"name": "add", "description": "Adds.", "parameters": {"type": "object"}' in text
    assert '"arguments": {"a": 1}' in text
    assert '"tool_call_id": "c1"' in text


def test_tools_are_refused_where_the_template_ignores_them_and_left_out_when_unwanted() -> None:
    with pytest.raises(InvalidArgument) as caught:
        template(CHATML).render(chat(("user", "x"), tools=(Tool(name="f"),)))
    assert caught.value.field == "chat.tools"
    assert template(CHATML).render(chat(("user", "x"), tools=(Tool(name="f"),), tool_choice=ToolChoice.NONE))


def test_a_template_for_tools_is_used_with_tools() -> None:
    both = template({"default": "plain", "tool_use": "with {{ tools | length }} tools"})
    assert both.render(chat(("user", "x"))) == "plain"
    assert both.render(chat(("user", "x"), tools=(Tool(name="f"),))) == "with 1 tools"


def test_a_templates_own_words_are_passed_on() -> None:
    source = "{{ raise_exception('Roles must alternate') }}"
    with pytest.raises(InvalidArgument, match="Roles must alternate"):
        template(source).render(chat(("user", SECRET)))


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('bad: ' + messages[0]['content']) }}",
        "{{ messages[0]['content'] + 1 }}",
        "{{ messages[5].content.nothing }}",
        "{{ messages[0]['content'].__class__.__mro__ }}",
        "{% for x in %}",
    ],
)
def test_refusals_of_a_template_quote_no_conversation(source: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        template(source).render(chat(("user", SECRET)))
    assert SECRET not in str(caught.value)
    assert caught.value.field == "chat"


def test_templates_cannot_change_the_conversation_or_reach_python() -> None:
    with pytest.raises(InvalidArgument):
        template("{{ messages.append(1) }}").render(chat(("user", "x")))


@pytest.mark.parametrize("name", sorted(CHAT_TEMPLATES))
def test_every_named_template_renders_a_conversation_in_order(name: str) -> None:
    turns = [("user", "first"), ("assistant", "second"), ("user", "third")]
    text = template(None, override=CHAT_TEMPLATES[name]).render(chat(*turns))
    places = [text.index(content) for _, content in turns]
    assert places == sorted(places)


def test_vicuna_and_llama_2_have_their_familys_format() -> None:
    turns = (("system", "S"), ("user", "hi"))
    assert template(None, CHAT_TEMPLATES["vicuna_v1.1"]).render(chat(*turns)) == "S USER: hi ASSISTANT:"
    assert template(None, CHAT_TEMPLATES["llama-2"]).render(chat(*turns)) == "[INST] <<SYS>>\nS\n<</SYS>>\n\nhi [/INST]"


RENDERS = """
import sys
from fastchat_grpc.rpc import convert
from fastchat_grpc.v1 import generation_pb2 as pb
from tests.unit.models.test_chat_template import template

request = pb.GenerateRequest.FromString(sys.stdin.buffer.read())
if sys.argv[1:] == ["relayed"]:  # as a relay does that knows the request from its OpenAI surface
    request = convert.generate_request_to_pb(convert.generate_request_from_pb(request))
source = "{{ tools | tojson }}|{{ z }}{{ names | tojson }}{{ names.values() | list }}"
print(template(source).render(convert.generate_request_from_pb(request).prompt))
"""


def test_every_process_renders_the_same_prompt_from_the_same_bytes() -> None:
    """Maps of protobuf have no order, and other numbers than JSON: schemas travel as text."""
    from fastchat_grpc.v1 import generation_pb2 as pb

    schema = '{"type": "object", "z": 1, "a": 1.0, "minimum": 9007199254740993, "m": {"y": [1], "x": -0.0, "b": 1e3}}'
    arguments = '{"z": 1, "names": {"zeta": 3, "alpha": 2.0, "mid": 18446744073709551617}}'
    request = pb.GenerateRequest(
        chat=pb.ChatInput(
            messages=[pb.ChatMessage(role="user", content="x")],
            tools=[pb.Tool(name="f", parameters_json=schema)],
            template_arguments_json=arguments,
        )
    )
    expected = (
        '[{"type": "function", "function": {"name": "f", "description": "", "parameters": {"type": "object", "z": 1, '
        '"a": 1.0, "minimum": 9007199254740993, "m": {"y": [1], "x": -0.0, "b": 1000.0}}}}]'
        '|1{"zeta": 3, "alpha": 2.0, "mid": 18446744073709551617}[3, 2.0, 18446744073709551617]'
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RENDERS, *mode],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONHASHSEED": seed},
        )
        for seed, mode in (("1", []), ("2", []), ("3", ["relayed"]))
    ]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write(request.SerializeToString())
        process.stdin.close()
    for process in processes:
        assert process.stdout is not None
        with process.stdout as out:
            assert out.read().decode().splitlines()[-1] == expected
        assert process.wait() == 0


@pytest.mark.parametrize("choice", [ToolChoice.REQUIRED, "f"])
def test_a_call_that_is_forced_needs_no_template_that_shows_tools(choice: ToolChoice | str) -> None:
    asked = chat(("user", "Hi"), tools=(Tool(name="f"),), tool_choice=choice)
    assert template(CHATML.replace("tools", "")).render(asked).endswith("assistant\n")
    with pytest.raises(InvalidArgument, match="takes no tools"):
        template(TRIMS).render(chat(("user", "Hi"), tools=(Tool(name="f"),)))


THINKS = (
    "{% for m in messages %}<{{ m.role }}>"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}{% endfor %}"
)


def test_a_template_that_asks_for_thoughts_gets_them() -> None:
    turns = (ChatMessage(role="user", content="a"), ChatMessage(role="assistant", content="b", reasoning="hm"))
    asked = ChatPrompt(messages=turns)
    assert template(THINKS).render(asked) == "<user>a<assistant><think>hm</think>b"
    assert "hm" not in template(CHATML).render(asked)
