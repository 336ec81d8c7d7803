"""Text of others, made fit for logs and terminals."""

from __future__ import annotations

MAX_CHARACTERS = 256


def printable(text: str) -> str:
    """Text without line breaks, escape sequences and direction marks, which could forge lines or hide them.

    What is not printable is written as Python writes it (a line break as a backslash and an n); beyond
    MAX_CHARACTERS it is cut.
    """
    if len(text) > MAX_CHARACTERS:
        text = text[: MAX_CHARACTERS - 1] + "…"
    return escaped(text)


def escaped(text: str) -> str:
    """As `printable`, at any length."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
