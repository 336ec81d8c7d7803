"""What a model's generation_config.json asks for, read without transformers or torch."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from fastchat_grpc.core import SamplingDefaults
from fastchat_grpc.errors import InvalidArgument
from fastchat_grpc.models.resolve import read_json

log = logging.getLogger(__name__)

_FILE = "generation_config.json"
_WHOLE = frozenset({"top_k"})


def generation_config(folder: Path) -> Mapping[str, Any]:
    """The file of a model folder; empty where there is none, as beside a GGUF file. Raises ModelLoadError."""
    file = folder / _FILE
    return read_json(file) if file.is_file() else {}


def default_sampling(stated: Mapping[str, Any]) -> SamplingDefaults:
    """Sampling that a generation configuration wants where a request chooses nothing.

    The fields that vLLM takes from it (`ModelConfig.get_diff_sampling_param`), which like it does not look at
    `do_sample`. A value that no request may have is left out, with a warning.
    """
    usable: dict[str, Any] = {}
    for name in (f.name for f in fields(SamplingDefaults)):
        value = stated.get(name)
        if value is None:
            continue
        try:
            number = int(value) if name in _WHOLE else float(value)
            SamplingDefaults(**{name: number})  # type: ignore[arg-type]
        except (TypeError, ValueError, OverflowError, InvalidArgument) as error:
            log.warning("%s: %s is left out: %s", _FILE, name, error)
            continue
        usable[name] = number
    return SamplingDefaults(**usable)
