"""Every line of docs/promises.md names tests that hold it, and those tests exist."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "promises.md").read_text()
NODE = re.compile(r"`(tests/[\w/]+\.py)::([\w:]+)`")


def rows() -> list[str]:
    """The rows of all tables, without their headings and rulers."""
    lines = PAGE.splitlines()
    heads = {i for i, line in enumerate(lines) if i + 1 < len(lines) and lines[i + 1].startswith("|---")}
    return [
        line for i, line in enumerate(lines) if line.startswith("|") and not line.startswith("|---") and i not in heads
    ]


@cache
def named_in(path: str) -> frozenset[str]:
    """Names of the tests in a file, as pytest spells them: `test_x`, or `TestClass::test_x`."""
    found = set()
    for node in ast.parse((ROOT / path).read_text()).body:
        for test in node.body if isinstance(node, ast.ClassDef) else [node]:
            if isinstance(test, ast.FunctionDef | ast.AsyncFunctionDef) and test.name.startswith("test_"):
                found.add(f"{node.name}::{test.name}" if isinstance(node, ast.ClassDef) else test.name)
    return frozenset(found)


def test_there_are_promises() -> None:
    assert len(rows()) > 40


@pytest.mark.parametrize("row", rows(), ids=lambda row: row.split("|")[1].strip()[:60])
def test_every_promise_names_its_tests(row: str) -> None:
    last = row.strip().strip("|").split("|")[-1]
    assert NODE.search(last), f"no test is named in: {row}"
    assert NODE.sub("", last).strip(" ,") == "", f"what is not the name of a test: {NODE.sub('', last)}"


@pytest.mark.parametrize(("path", "name"), sorted(set(NODE.findall(PAGE))))
def test_every_test_that_is_named_exists(path: str, name: str) -> None:
    assert (ROOT / path).is_file(), f"{path} is not there"
    assert name in named_in(path), f"{path} has no {name}"
