"""docs/security.md: each of its lines names a test, and the test exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINES = [
    line
    for line in (ROOT / "docs" / "security.md").read_text().splitlines()
    if line.startswith("|") and not re.match(r"\|(-|.* Test \|$)", line)
]


def functions(path: Path) -> set[str]:
    """Names of the tests in a file, those of classes as Class::name."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef):
            found |= {
                f"{node.name}::{n.name}" for n in node.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)
            }
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found.add(node.name)
    return found


def test_the_page_has_tables() -> None:
    assert len(LINES) > 25


@pytest.mark.parametrize("line", LINES, ids=lambda line: line[:60])
def test_each_line_names_a_test_that_exists(line: str) -> None:
    found = re.search(r"`([\w/]+\.py)::([\w:]+)` \|$", line)
    assert found, line
    assert found[2] in functions(ROOT / "tests" / found[1])
