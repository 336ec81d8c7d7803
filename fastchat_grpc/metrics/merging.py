"""Several processes' metrics as one text: each family once, and whose a line is in the label `instance`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from fastchat_grpc.metrics.labels import escaped


def merged(parts: Iterable[tuple[str, str]]) -> str:
    """The texts of several processes, by their names, as one.

    The first one that has a family says what it is; lines of a type of their own elsewhere stay beside it.
    """
    heads: dict[str, list[str]] = {}
    bodies: dict[str, list[str]] = {}
    for instance, text in parts:
        label = f'instance="{escaped(instance)}"'
        for family, line in _by_family(text):
            head, body = heads.setdefault(family, []), bodies.setdefault(family, [])
            if not line.startswith("#"):
                body.append(_labelled(line, label))
            elif not body and len(head) < 2:
                head.append(line)
    return "".join(f"{line}\n" for family in heads for line in (*heads[family], *bodies[family]))


def _by_family(text: str) -> Iterator[tuple[str, str]]:
    """Lines, each with the name of its family."""
    family = ""
    for line in text.split("\n"):  # what else ends lines elsewhere may stand in a label
        if line.startswith(("# HELP ", "# TYPE ")):
            family = line.split(" ", 3)[2]
        elif not line or line.startswith("#"):
            continue
        name = line.partition("{")[0].partition(" ")[0]
        yield (family if line.startswith("#") or name.startswith(family) else name), line


def _labelled(line: str, label: str) -> str:
    """A sample with one more label."""
    brace, space = line.find("{"), line.find(" ")
    if brace == -1 or space < brace:
        return f"{line[:space]}{{{label}}}{line[space:]}"
    comma = "" if line[brace + 1] == "}" else ","
    return f"{line[: brace + 1]}{label}{comma}{line[brace + 1 :]}"
