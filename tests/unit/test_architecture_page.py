"""docs/architecture.md leads to files that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text()
FILES = sorted(set(re.findall(r"`([\w/]+(?:\.(?:py|lua|proto)|/))`", PAGE)))
LINKS = sorted(set(re.findall(r"\]\(([\w./-]+)(?:#[\w-]+)?\)", PAGE)))


def test_it_names_files() -> None:
    assert len(FILES) > 50


@pytest.mark.parametrize("name", FILES)
def test_each_file_and_folder_exists(name: str) -> None:
    assert (ROOT / "fastchat_grpc" / name).exists() or (ROOT / name).exists()


@pytest.mark.parametrize("target", LINKS)
def test_each_link_leads_somewhere(target: str) -> None:
    assert (ROOT / "docs" / target).exists()
