"""The parts of a fleet on one machine: from the flags and the file of `serve` to the arguments of each process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import click
from click.core import ParameterSource

from fastchat_grpc.cli import options
from fastchat_grpc.cli.serving import controller, gateway, worker
from fastchat_grpc.cli.settings import SET_HERE, located, use
from fastchat_grpc.cli.settings_file import Section, SettingsFile
from fastchat_grpc.config import dial_host, join_address, split_address
from fastchat_grpc.errors import ConfigError

COMMANDS: Mapping[str, click.Command] = {"controller": controller, "worker": worker, "gateway": gateway}
NOT_OFFERED: Mapping[str, str] = {
    "parent_address": "a controller of a larger fleet is run by itself, with the address that its parents are told",
    "parent_ca": "as parent_address",
    "parent_join_token": "as parent_address",
    "parent_join_token_file": "as parent_address",
    "mode": "a sidecar has no controller; for relay mode run a gateway by itself, with --no-gateway here",
    "print_config": "prints and ends",
}
"""Flags of a part that `serve` does not have, and why. It has all others, and passes them on."""
SECRETS = ("join_token", "api_keys", "parent_join_token")
"""Flags whose values reach the parts by the environment: command lines can be read by everybody on the machine."""
PLACE = ("port", "worker_address", "worker_id")
"""What no two workers have in common."""
AUTHORITIES: Mapping[str, str] = {
    "controller": "worker_ca",
    "worker": "controller_ca",
    "gateway": "upstream_ca",
}
"""Which flag of a part says whose certificates it trusts."""


@dataclass(frozen=True, slots=True)
class Planned:
    """A process to start."""

    name: str
    kind: str
    """controller, worker or gateway."""
    ctx: click.Context = field(repr=False)
    """Its flags as it will read them."""

    @property
    def flags(self) -> dict[str, Any]:
        return self.ctx.params

    @property
    def arguments(self) -> list[str]:
        """Its command line."""
        return [self.kind, *given_flags(self.ctx, _FROM_HERE, {p.name for p in self.ctx.command.params})]

    @property
    def secrets(self) -> dict[str, str]:
        """What of its flags reaches it by the environment."""
        return secrets(self.ctx)


_FROM_HERE = frozenset({ParameterSource.COMMANDLINE, ParameterSource.DEFAULT_MAP})
_ALONE = frozenset({ParameterSource.COMMANDLINE})


class Plan:
    """The parts that `serve` starts.

    Args:
        ctx: of `serve`: its flags, and what the environment and the top of the file say instead.
        file: its file of settings.
    """

    def __init__(self, ctx: click.Context, file: SettingsFile | None) -> None:
        self._ctx = ctx
        self._file = file
        flags = ctx.params
        self.host: str = flags["host"].strip("[]")
        self._refuse_two_counts()
        self.controller_port: int = self._port("controller")
        self.gateway_port: int = self._port("gateway")
        if not self.controller_port:
            raise ConfigError("--controller-port must not be 0: the other parts are told it before it listens")
        self.gateway_host: str = (self._section("gateway").values.get("host") or self.host).strip("[]")
        self.places = self._worker_places()

    @property
    def controller_address(self) -> str:
        return join_address(dial_host(self.host), self.controller_port)

    @property
    def expected(self) -> str:
        """With whom the fleet is whole: its own workers by their ids, since others may join; where those are not known
        before the workers listen, how many."""
        ids = []
        for place in self.places:
            here = join_address(dial_host(self.host), place.port)
            ids.append(place.worker_id or place.address or (here if place.port else ""))
        return ",".join(ids) if all(ids) else str(len(ids))

    def parts(self, *, with_gateway: bool) -> list[Planned]:
        """The processes: the controller, the workers, and the gateway if it is wanted. Raises ConfigError."""
        names = [
            "controller",
            *(f"worker-{i}" for i in range(len(self.places))),
            *(["gateway"] if with_gateway else []),
        ]
        metrics = self._metrics(names)
        own = ["--port", str(self.controller_port)]
        if not self._sets("controller", "expect_workers"):
            own += ["--expect-workers", self.expected]
        found = [self._part("controller", "controller", own + metrics["controller"], self._section("controller"))]
        at_controller = ["--controller-address", self.controller_address]
        for i, place in enumerate(self.places):
            own = [*at_controller, *place.arguments, *metrics[f"worker-{i}"]]
            found.append(self._part(f"worker-{i}", "worker", own, *place.sections))
        if with_gateway:
            own = ["--mode", "direct", "--host", self.gateway_host, "--port", str(self.gateway_port), *at_controller]
            found.append(self._part("gateway", "gateway", own + metrics["gateway"], self._section("gateway")))
        _refuse_shared_ports(found)
        return found

    def _part(self, name: str, part: str, own: Sequence[str], *sections: Section) -> Planned:
        """One process. Its flags stand on the command line of `serve`, are set here, or stand in the file."""
        command = COMMANDS[part]
        theirs: Set[str | None] = {param.name for param in command.params} - SET_HERE[part]
        given = given_flags(self._ctx, _ALONE, theirs, secret=True)
        ctx = click.Context(command, info_name=part, **_settings_of(command))
        if self._file is not None:
            use(ctx, self._file, [*sections, self._file.shared], part)
        with ctx.scope(cleanup=False):
            command.parse_args(ctx, [*given, *self._trust(part, sections), *own])
        with located(ctx):
            _check(part, ctx.params)
        return Planned(name, part, ctx)

    def _trust(self, part: str, sections: Sequence[Section]) -> list[str]:
        """Where the parts speak TLS: whose certificates a part trusts, unless that is said.

        That is the authority that callers need, or else the certificate itself, which may be its own authority.
        """
        flags, flag = self._ctx.params, AUTHORITIES[part]
        if flags["tls_cert"] is None or flags[flag] is not None or any(flag in s.values for s in sections):
            return []
        return [f"--{flag}".replace("_", "-"), str(flags["tls_ca"] or flags["tls_cert"])]

    # --------------------------------------------------------------------------------- places

    def _section(self, part: str) -> Section:
        return Section() if self._file is None else {"controller": self._file.controller}.get(part, self._file.gateway)

    def _sets(self, part: str, name: str) -> bool:
        return bool(self._ctx.params[name]) or name in self._section(part).values

    def _refuse_two_counts(self) -> None:
        if self._file is None or self._file.workers is None:
            return
        if self._ctx.get_parameter_source("num_workers") is not ParameterSource.DEFAULT:
            raise ConfigError(f"--num-workers and the workers of {self._file.path} both say how many there are")

    def _port(self, part: str) -> int:
        """The port of a part: that of its section, unless it stands on the command line."""
        name = f"{part}_port"
        told = self._ctx.get_parameter_source(name)
        here: int = self._ctx.params[name]
        return (
            here
            if told in (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT)
            else (self._section(part).values.get("port", here))
        )

    def _worker_places(self) -> list[Place]:
        """Port, address and id of each worker: no two are told the same. Raises ConfigError."""
        flags = self._ctx.params
        if flags["num_workers"] < 1:
            raise ConfigError(f"--num-workers must be at least 1, got {flags['num_workers']}")
        shared = Section() if self._file is None else self._file.worker
        named = self._file.workers if self._file is not None else None
        entries = named or (Section(shared.where, shared.values, shared.lines, flags["num_workers"]),)
        count = sum(entry.replicas for entry in entries)
        if named and count > 1:
            self._refuse_shared_places(shared)
        if flags["worker_address"] and count > 1 and not flags["port"]:
            raise ConfigError("several workers with one --worker-address need a --port, from which theirs are counted")
        places = list(_places(flags, entries, shared, count))
        ids = [place.worker_id for place in places if place.worker_id]
        if double := next((name for name in ids if ids.count(name) > 1), None):
            raise ConfigError(f"two workers have the --worker-id {double}")
        return places

    def _refuse_shared_places(self, shared: Section) -> None:
        """Several workers cannot have one place, and from where theirs are counted is said at the top."""
        assert self._file is not None
        if name := next((name for name in PLACE if name in shared.values), None):
            raise ConfigError(
                f"{self._file.path}:{shared.lines[name]}: worker.{name} is of one worker, and there are several; "
                "say it in an entry of workers, or at the top, from where those of all are counted"
            )

    def _metrics(self, names: Sequence[str]) -> dict[str, list[str]]:
        """The flags of each part's metrics: the gateway, or else the controller, has the port that was asked for, and
        the others have free ones, which they keep when they are started again."""
        from fastchat_grpc.gateway.machine import free_ports

        flags = self._ctx.params
        if flags["metrics_port"] is None:
            return {name: [] for name in names}
        first = "gateway" if "gateway" in names else "controller"
        others = [name for name in names if name != first]
        ports = dict(zip(others, free_ports(flags["metrics_host"], len(others)), strict=True))
        ports[first] = flags["metrics_port"]
        found = {name: ["--metrics-port", str(port)] for name, port in ports.items()}
        if first == "gateway":  # what all of them tell is there at once
            host = dial_host(flags["metrics_host"].strip("[]"))
            for name in others:
                found[first] += ["--metrics-target", f"{name}={join_address(host, ports[name])}"]
        return found


@dataclass(frozen=True, slots=True)
class Place:
    """Where one worker is, and what the file says of it."""

    port: int
    address: str
    worker_id: str
    sections: tuple[Section, ...] = ()

    @property
    def arguments(self) -> list[str]:
        found = ["--port", str(self.port)]
        if self.address:
            found += ["--worker-address", self.address]
        if self.worker_id:
            found += ["--worker-id", self.worker_id]
        return found


def _places(flags: Mapping[str, Any], entries: Sequence[Section], shared: Section, count: int) -> Iterator[Place]:
    """The places of the workers, counted from the first port, address and id; a worker may have its own."""
    following, total = flags["port"], 0
    for entry in entries:
        said = {**shared.values, **entry.values}
        own_port, own_address = said.get("port"), said.get("worker_address")
        for i in range(entry.replicas):
            port = following if own_port is None else own_port and own_port + i
            if own_port is None and following:
                following += 1
            address = _counted(own_address, i) if own_address else _counted(flags["worker_address"], total)
            name = said.get("worker_id") or ""
            if name:
                name = name if entry.replicas == 1 else f"{name}-{i}"
            elif flags["worker_id"]:
                name = flags["worker_id"] if count == 1 else f"{flags['worker_id']}-{total}"
            total += 1
            yield Place(port, address, name, (entry, shared))


def _refuse_shared_ports(parts: Sequence[Planned]) -> None:
    """Raise ConfigError where two are to listen at one place, which the second would say after models are loaded."""
    holders: dict[str, str] = {}
    for part in parts:
        flags = part.flags
        for name, host, port in (
            (part.name, flags["host"], flags["port"]),
            (f"metrics of {part.name}", flags["metrics_host"], flags["metrics_port"]),
        ):
            if not port:
                continue
            place = join_address(dial_host(host.strip("[]")), port)
            if place in holders:
                raise ConfigError(f"{holders[place]} and {name} are both to listen on {place}")
            holders[place] = name


def _counted(address: str | None, i: int) -> str:
    if not address:
        return ""
    host, first = split_address(options.bare_address(address))
    return join_address(host, first + i)


def _settings_of(command: click.Command) -> dict[str, Any]:
    return dict(command.context_settings)


def _check(part: str, flags: dict[str, Any]) -> None:
    """Say a wrong flag here, once, rather than by a child. Raises ConfigError."""
    {
        "controller": options.controller_config,
        "worker": options.worker_config,
        "gateway": options.gateway_config,
    }[part](flags)


def secrets(ctx: click.Context) -> dict[str, str]:
    """The secrets among a command's flags, by the variables that carry them."""
    return {
        str(param.envvar): ctx.params[param.name]
        for param in ctx.command.params
        if param.name in SECRETS and ctx.params[param.name]
    }


def given_flags(
    ctx: click.Context, sources: frozenset[ParameterSource], names: Set[str | None], *, secret: bool = False
) -> list[str]:
    """Those of the flags that come from some sources, again as arguments. What the environment says the parts read
    there.

    Args:
        names: which of them.
        secret: secrets, too: for parsing in this process.
    """
    arguments: list[str] = []
    for param in ctx.command.params:
        name = param.name or ""
        if name not in names or name == "config" or ctx.get_parameter_source(name) not in sources:
            continue
        if name not in SECRETS or secret:
            arguments += _arguments(param, ctx.params[name])
    return arguments


def _arguments(param: click.Parameter, value: Any) -> list[str]:
    flag = param.opts[0]
    if isinstance(param, click.Option) and param.is_flag:
        return [flag] if value else list(param.secondary_opts[:1])
    if param.multiple if isinstance(param, click.Option) else False:
        return [part for item in value for part in (flag, "=".join(item) if isinstance(item, tuple) else str(item))]
    if isinstance(value, tuple):
        return [flag, ",".join(map(str, value))]
    return [] if value is None else [flag, str(value)]
