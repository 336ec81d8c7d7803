"""Settings from a YAML file: flags by their names, checked one by one, and each with the line where it stands.

The top of a file holds flags of `serve`, which all parts share; sections hold what concerns one part alone:

    join_token_file: /etc/fleet/token
    controller:
      dispatch_method: power_of_two
    gateway:
      port: 8000
    workers:
      - model_path: /models/qwen3-8b
        gpus: [0]
      - model_path: /models/smollm2
        replicas: 2

Names are those of the flags, with "_" or "-". Nothing is interpreted here but types: values are checked where flags
are.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from fastchat_grpc.cli.options import CommaList, KeyValue
from fastchat_grpc.errors import ConfigError

if TYPE_CHECKING:
    import yaml

REPLICAS = "replicas"
"""Setting of a worker in a file: how many of it there are."""
MAX_REPLICAS = 1024
SECTIONS = ("controller", "gateway", "worker", "workers")


@dataclass(frozen=True, slots=True)
class Section:
    """Settings of one mapping of a file: by the names of click's parameters."""

    where: str = ""
    """Such as "workers[1]"; empty: the top."""
    values: Mapping[str, Any] = field(default_factory=dict)
    lines: Mapping[str, int] = field(default_factory=dict)
    """Where each stands, from 1."""
    replicas: int = 1


@dataclass(frozen=True, slots=True)
class SettingsFile:
    """A file of settings."""

    path: Path
    shared: Section
    """Flags of `serve`."""
    controller: Section = Section()
    gateway: Section = Section()
    gateway_wanted: bool | None = None
    """True or false where the file says `gateway: true` or `false`, or describes one."""
    worker: Section = Section()
    """What all workers have unless they say otherwise."""
    workers: tuple[Section, ...] | None = None

    def of(self, part: str) -> tuple[Section, ...]:
        """What concerns a part that runs by itself: its own section before what is shared. Raises ConfigError."""
        if part != "worker":
            own = {"controller": (self.controller,), "gateway": (self.gateway,)}.get(part, ())
            return (*own, self.shared)
        if self.workers is not None and len(self.workers) != 1:
            raise ConfigError(f"{self.path} has {len(self.workers)} workers; fastchat-grpc serve starts them all")
        return (*(self.workers or ()), self.worker, self.shared)


def merged(sections: Iterable[Section], names: Iterable[str | None]) -> dict[str, Any]:
    """The values of some settings, each from the first section that has it."""
    wanted = set(names)
    found: dict[str, Any] = {}
    for section in sections:
        for name, value in section.values.items():
            if name in wanted:
                found.setdefault(name, value)
    return found


def line_of(sections: Iterable[Section], name: str) -> int | None:
    """Where the first of the sections that has a setting says it."""
    return next((section.lines[name] for section in sections if name in section.lines), None)


def read_settings(
    path: Path, shared: click.Command, parts: Mapping[str, click.Command], refused: Mapping[str, str]
) -> SettingsFile:
    """Read a file.

    Args:
        shared: the command whose flags may stand at the top.
        parts: the commands whose flags may stand in the sections "controller", "gateway" and "worker".
        refused: flags that no file may set, and why.

    Raises:
        ConfigError: it can't be read, or a setting is unknown or of a wrong type; with file, line and key.
    """
    return _Reader(path, shared, parts, refused).read()


class _Reader:
    def __init__(
        self, path: Path, shared: click.Command, parts: Mapping[str, click.Command], refused: Mapping[str, str]
    ) -> None:
        self._path = path
        self._shared = shared
        self._parts = parts
        self._refused = refused

    def read(self) -> SettingsFile:
        top = self._mapping(self._root(), "")
        apart = {name: top.pop(name) for name in SECTIONS if name in top}
        shared = self._section(top, "", self._shared)
        found: dict[str, Any] = {}
        if (node := apart.get("gateway")) is not None:
            as_flag = self._bool(node)
            found["gateway_wanted"] = True if as_flag is None else as_flag
            if as_flag is None:
                found["gateway"] = self._part(node, "gateway", "gateway")
        for name in ("controller", "worker"):
            if name in apart:
                found[name] = self._part(apart[name], name, name)
        if "workers" in apart:
            found["workers"] = self._workers(apart["workers"])
        return SettingsFile(self._path, shared, **found)

    def _root(self) -> yaml.Node:
        import yaml

        try:
            node = yaml.compose(self._path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{self._path} cannot be read: {error}") from None
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            place = f":{mark.line + 1}" if mark is not None else ""
            problem = getattr(error, "problem", None) or str(error)
            raise ConfigError(f"{self._path}{place}: this is not YAML: {problem}") from None
        if node is None:
            raise ConfigError(f"{self._path} holds no settings")
        return node

    def _workers(self, node: yaml.Node) -> tuple[Section, ...]:
        import yaml

        if not isinstance(node, yaml.SequenceNode):
            self._fail(node, "workers must be a list: of each worker's settings")
        if not node.value:
            self._fail(node, "workers is empty: leave it out for one worker of the settings in worker")
        return tuple(self._part(item, f"workers[{i}]", "worker") for i, item in enumerate(node.value))

    def _part(self, node: yaml.Node, where: str, part: str) -> Section:
        settings = self._mapping(node, where)
        replicas = settings.pop(REPLICAS, None) if where.startswith("workers[") else None
        section = self._section(settings, where, self._parts[part])
        if replicas is None:
            return section
        count = self._scalar(replicas)
        if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= MAX_REPLICAS:
            self._fail(replicas, f"{where}.{REPLICAS} must be a number from 1 to {MAX_REPLICAS}, got {count!r}")
        return Section(section.where, section.values, section.lines, count)

    def _section(self, settings: Mapping[str, yaml.Node], where: str, command: click.Command) -> Section:
        known = _flags(command)
        values: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for key, node in settings.items():
            path = f"{where}.{key}" if where else key
            option = known.get(key.replace("-", "_"))
            if option is None or option.name is None:
                self._unknown(node, path, key, [*known, *([] if where else SECTIONS)])
            if option.name in self._refused:
                self._fail(node, f"{path} cannot stand in a file: {self._refused[option.name]}")
            if option.name in values:
                self._fail(node, f"{path} is set twice, on line {lines[option.name]} before")
            values[option.name] = self._value(node, path, option)
            lines[option.name] = node.start_mark.line + 1
        return Section(where, values, lines)

    def _unknown(self, node: yaml.Node, path: str, key: str, known: Iterable[str]) -> NoReturn:
        near = difflib.get_close_matches(key.replace("-", "_"), list(known), 1)
        self._fail(node, f"there is no setting {path}" + (f"; did you mean {near[0]}?" if near else ""))

    # ------------------------------------------------------------------------------- values

    def _value(self, node: yaml.Node, path: str, option: click.Option) -> Any:
        if option.is_flag:
            as_flag = self._bool(node)
            if as_flag is None:
                self._fail(node, f"{path} must be true or false")
            return as_flag
        if isinstance(option.type, KeyValue):
            return self._pairs(node, path)
        if option.multiple:
            return tuple(self._converted(item, path, option) for item in self._items(node))
        if isinstance(option.type, CommaList):
            return tuple(part for item in self._items(node) for part in self._converted(item, path, option))
        return self._converted(node, path, option)

    def _pairs(self, node: yaml.Node, path: str) -> tuple[tuple[str, str], ...]:
        import yaml

        if not isinstance(node, yaml.MappingNode):
            self._fail(node, f"{path} must be a mapping of names to values")
        # As on a command line: what a value means is for whoever knows its name.
        pairs = self._mapping(node, path).items()
        return tuple((key, self._text(item, f"{path}.{key}")) for key, item in pairs)

    def _converted(self, node: yaml.Node, path: str, option: click.Option) -> Any:
        import yaml

        if not isinstance(node, yaml.ScalarNode):
            self._fail(node, f"{path} must be a single value")
        value = self._scalar(node)
        for type_, right, meant in _TYPES:
            if isinstance(option.type, type_) and not right(value):
                self._fail(node, f"{path} must be {meant}, got {value!r}")
        try:
            return option.type.convert(node.value if isinstance(option.type, CommaList) else value, None, None)
        except click.BadParameter as error:
            self._fail(node, f"{path}: {error.message}")

    def _text(self, node: yaml.Node, path: str) -> str:
        import yaml

        if not isinstance(node, yaml.ScalarNode):
            self._fail(node, f"{path} must be a single value")
        return str(node.value)

    def _items(self, node: yaml.Node) -> list[yaml.Node]:
        import yaml

        return list(node.value) if isinstance(node, yaml.SequenceNode) else [node]

    def _scalar(self, node: yaml.Node) -> Any:
        import yaml

        if not isinstance(node, yaml.ScalarNode):
            return None
        try:
            return yaml.SafeLoader("").construct_object(node)
        except (yaml.YAMLError, ValueError, KeyError) as error:  # such as a date that looks like one and is none
            self._fail(node, f"{node.value!r} is no value of YAML: {getattr(error, 'problem', None) or error}")

    def _bool(self, node: yaml.Node) -> bool | None:
        value = self._scalar(node)
        return value if isinstance(value, bool) else None

    def _mapping(self, node: yaml.Node, where: str) -> dict[str, yaml.Node]:
        import yaml

        if not isinstance(node, yaml.MappingNode):
            self._fail(node, f"{where or 'the file'} must be a mapping of settings")
        found: dict[str, yaml.Node] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                self._fail(key, f"a name of a setting in {where or 'the file'} must be a word")
            if key.value in found:
                self._fail(key, f"{f'{where}.' if where else ''}{key.value} is set twice")
            found[key.value] = value
        return found

    def _fail(self, node: yaml.Node, problem: str) -> NoReturn:
        raise ConfigError(f"{self._path}:{node.start_mark.line + 1}: {problem}")


def _flags(command: click.Command) -> dict[str, click.Option]:
    """A command's options by the names that they may have in a file."""
    found: dict[str, click.Option] = {}
    for param in command.params:
        if isinstance(param, click.Option):
            for name in (*param.opts, *param.secondary_opts, f"--{param.name}"):
                if name.startswith("--") and name not in param.secondary_opts:
                    found[name[2:].replace("-", "_")] = param
    return found


def _is_number(value: Any) -> bool:
    if isinstance(value, str):  # YAML reads 1e9 as text
        return re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value) is not None
    return isinstance(value, int | float) and not isinstance(value, bool)


_TYPES: tuple[tuple[type[click.ParamType[Any]], Callable[[Any], bool], str], ...] = (
    (click.types.IntParamType, lambda value: isinstance(value, int) and not isinstance(value, bool), "a whole number"),
    (click.types.FloatParamType, _is_number, "a number"),
    (click.types.StringParamType, lambda value: isinstance(value, str), "text (in quotes, if it looks like a number)"),
    (click.Path, lambda value: isinstance(value, str), "a path"),
)
