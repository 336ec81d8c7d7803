"""Fixtures of the backends over foreign engines."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.backends.folders import write_model_folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with a byte tokenizer."""
    pytest.importorskip("transformers")
    return write_model_folder(tmp_path_factory.mktemp("models") / "bytes")
