"""What the client refuses before anything is sent."""

from __future__ import annotations

from typing import Any, get_type_hints

import pytest

from fastchat_grpc.client.requests import GenerateOptions, build_request
from fastchat_grpc.core import EmbedRequest, ResumedChoice
from fastchat_grpc.errors import InvalidArgument
from fastchat_grpc.rpc import convert

HUGE = 2**70
NUMBERS = [name for name, kind in get_type_hints(GenerateOptions).items() if kind in (int, float)]


@pytest.mark.parametrize("value", [HUGE, -HUGE, 2**31])
@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_that_no_message_can_carry_is_refused_by_name_value_and_limit(name: str, value: int) -> None:
    options: dict[str, Any] = {name: value}
    if name == "seed" and value == 2**31:
        convert.generate_request_to_pb(build_request("x", **options))  # it has 64 bits
        return
    with pytest.raises(InvalidArgument) as caught:
        build_request("x", **options)
    assert caught.value.field.rpartition(".")[2] == name
    assert str(value) in caught.value.message
    assert "must be" in caught.value.message


@pytest.mark.parametrize(
    ("field", "build"),
    [
        ("prompt_token_ids.ids[1]", lambda: build_request([1, 2**31])),
        ("stopping.stop_token_ids[0]", lambda: build_request("x", stop_token_ids=[2**31])),
        ("sampling.logit_bias", lambda: build_request("x", logit_bias={2**31: 1.0})),
        ("stopping.max_new_tokens", lambda: build_request("x", max_new_tokens=2**40, min_new_tokens=2**40)),
        ("inputs[0][0]", lambda: EmbedRequest(inputs=((HUGE,),))),
        ("resume.choices.text_length", lambda: ResumedChoice(index=0, text_length=2**31)),
    ],
)
def test_so_is_one_among_others(field: str, build: Any) -> None:
    with pytest.raises(InvalidArgument, match=r"must be .*2147483647, got") as caught:
        build()
    assert caught.value.field == field


def test_the_largest_numbers_travel() -> None:
    most = 2**31 - 1
    request = build_request(
        [most], max_new_tokens=most, top_k=most, priority=-(2**31), stop_token_ids=[most], logit_bias={most: 1.0}
    )
    assert convert.generate_request_from_pb(convert.generate_request_to_pb(request)).stopping.max_new_tokens == most
