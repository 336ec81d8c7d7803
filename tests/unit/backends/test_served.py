"""What foreign engines are told of a model folder, and what they say of their load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastchat_grpc.backends.driver import Job
from fastchat_grpc.backends.echo import EchoTokenizer
from fastchat_grpc.backends.openvino import model as openvino_model
from fastchat_grpc.backends.openvino.model import OpenVinoModel
from fastchat_grpc.backends.served import stated_context
from fastchat_grpc.config import ModelConfig
from tests.unit.backends.asking import request

YARN = {"factor": 4.0, "original_max_position_embeddings": 32768}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, None),
        ({"max_position_embeddings": 4096}, 4096),
        ({"n_positions": 1024}, 1024),
        # Qwen2.5 and Qwen3 as their pages tell to write it down for long texts: 131,072 tokens.
        ({"max_position_embeddings": 32768, "rope_scaling": {"type": "yarn", **YARN}}, 131072),
        ({"max_position_embeddings": 40960, "rope_parameters": {"rope_type": "yarn", **YARN}}, 131072),
        ({"max_position_embeddings": 4096, "rope_scaling": {"type": "linear", "factor": 2.0}}, 8192),
        # Llama 3.1 and Phi-3 state the length that they reach.
        ({"max_position_embeddings": 131072, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, 131072),
        ({"max_position_embeddings": 131072, "rope_scaling": {"type": "longrope", "factor": 32.0}}, 131072),
        ({"max_position_embeddings": 32768, "rope_scaling": None}, 32768),
        ({"max_position_embeddings": 32768, "rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, 32768),
    ],
)
def test_the_context_is_as_long_as_the_scaling_of_positions_makes_it(config: dict[str, Any], expected: int) -> None:
    assert stated_context(config) == expected


def test_a_model_exported_for_openvino_is_as_long_as_the_one_it_came_from(tmp_path: Path) -> None:
    stated = {"max_position_embeddings": 32768, "rope_scaling": {"type": "yarn", **YARN}}
    (tmp_path / "config.json").write_text(json.dumps(stated))
    settings = ModelConfig(path=str(tmp_path))
    exported = openvino_model.model_folder(OpenVinoModel(tmp_path, tmp_path, tmp_path), settings)
    assert exported.context(settings) == 131072


def test_a_job_holds_its_prompt_once_and_what_each_choice_has() -> None:
    job = Job(request("abc", n=2), [1, 2, 3], EchoTokenizer(), context_length=64, stream_interval=1)
    assert job.held_tokens == 3
    job.feed(0, [97, 98])
    job.feed(1, [97])
    assert job.held_tokens == 6
    job.fail(ValueError())
    assert job.held_tokens == 0
