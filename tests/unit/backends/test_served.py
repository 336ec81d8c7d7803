"""What foreign engines are told of a model folder, and what they say of their load."""

from __future__ import annotations

import json
from pathlib import Path

from fastchat_grpc.backends.echo import EchoTokenizer
from fastchat_grpc.backends.openvino import model as openvino_model
from fastchat_grpc.backends.openvino.model import OpenVinoModel
from fastchat_grpc.config import ModelConfig
from fastchat_grpc.text.job import Job
from tests.unit.backends.asking import request

YARN = {"factor": 4.0, "original_max_position_embeddings": 32768}


def test_a_model_exported_for_openvino_is_as_long_as_the_one_it_came_from(tmp_path: Path) -> None:
    stated = {"max_position_embeddings": 32768, "rope_scaling": {"type": "yarn", **YARN}}
    (tmp_path / "config.json").write_text(json.dumps(stated))
    settings = ModelConfig(path=str(tmp_path))
    exported = openvino_model.folder_facts(OpenVinoModel(tmp_path, tmp_path, tmp_path), settings)
    assert exported.served_context(None) == 131072


def test_a_job_holds_its_prompt_once_and_what_each_choice_has() -> None:
    job = Job(request("abc", n=2), [1, 2, 3], EchoTokenizer(), context_length=64, stream_interval=1)
    assert job.held_tokens == 3
    job.feed(0, [97, 98])
    job.feed(1, [97])
    assert job.held_tokens == 6
    job.fail(ValueError())
    assert job.held_tokens == 0
