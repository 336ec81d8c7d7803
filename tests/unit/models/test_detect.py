"""What a folder's configuration says of the model in it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastchat_grpc.config import ModelConfig
from fastchat_grpc.errors import ModelLoadError
from fastchat_grpc.models.architectures import other_task
from fastchat_grpc.models.detect import ModelKind, detect

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def folder(path: Path, architecture: str | None, model_type: str, **more: object) -> Path:
    config = {"model_type": model_type, **SIZES, **more}
    if architecture is not None:
        config["architectures"] = [architecture]
    (path / "config.json").write_text(json.dumps(config))
    return path


def kind_of(path: Path) -> ModelKind:
    return detect(path, ModelConfig(path=str(path))).kind


@pytest.mark.parametrize(
    ("architecture", "model_type", "kind"),
    [
        ("LlamaForCausalLM", "llama", ModelKind.DECODER),
        ("GPT2LMHeadModel", "gpt2", ModelKind.DECODER),
        (None, "llama", ModelKind.DECODER),
        ("T5ForConditionalGeneration", "t5", ModelKind.ENCODER_DECODER),
        ("BartForConditionalGeneration", "bart", ModelKind.ENCODER_DECODER),
        ("BartModel", "bart", ModelKind.ENCODER_DECODER),
        ("T5EncoderModel", "t5", ModelKind.EMBEDDING),
        ("BertModel", "bert", ModelKind.EMBEDDING),
        ("BertForMaskedLM", "bert", ModelKind.EMBEDDING),
        ("BertForPreTraining", "bert", ModelKind.EMBEDDING),
        ("XLMRobertaModel", "xlm-roberta", ModelKind.EMBEDDING),
        ("Qwen2Model", "qwen2", ModelKind.EMBEDDING),
        (None, "bert", ModelKind.EMBEDDING),
    ],
)
def test_a_model_is_served_as_what_it_is(
    tmp_path: Path, architecture: str | None, model_type: str, kind: ModelKind
) -> None:
    assert kind_of(folder(tmp_path, architecture, model_type)) is kind


@pytest.mark.parametrize(
    ("architecture", "model_type"),
    [
        ("XLMRobertaForSequenceClassification", "xlm-roberta"),  # bge-reranker
        ("BertForSequenceClassification", "bert"),
        ("Qwen3ForSequenceClassification", "qwen3"),
        ("DebertaV2ForSequenceClassification", "deberta-v2"),
        ("BartForSequenceClassification", "bart"),
        ("BertForTokenClassification", "bert"),
        ("BertForQuestionAnswering", "bert"),
        ("BertForMultipleChoice", "bert"),
    ],
)
def test_a_reranker_or_classifier_is_no_embedding_model(tmp_path: Path, architecture: str, model_type: str) -> None:
    """It loads as one, and its vectors would mean nothing."""
    with pytest.raises(ModelLoadError, match=architecture):
        kind_of(folder(tmp_path, architecture, model_type))


def test_a_sentence_transformers_model_says_itself_what_it_is(tmp_path: Path) -> None:
    folder(tmp_path, "BertForSequenceClassification", "bert")
    modules = [{"type": "sentence_transformers.models.Transformer"}, {"type": "sentence_transformers.models.Pooling"}]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    assert kind_of(tmp_path) is ModelKind.EMBEDDING


@pytest.mark.parametrize("name", ["InternLM2ForRewardModel", "JinaForRanking", "Qwen2ForRewardModel"])
def test_models_that_score_are_told_by_name(name: str) -> None:
    assert other_task([name]) == name
    assert other_task(["LlamaBidirectionalModel"]) is None
