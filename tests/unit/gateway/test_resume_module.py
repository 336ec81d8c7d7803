"""The module that resumes streams is had where it can be, and left out with one line where it cannot."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastchat_grpc.config import GatewayConfig, GatewayMode
from fastchat_grpc.gateway import resume_module as module
from fastchat_grpc.gateway.render import bootstrap, render_config
from fastchat_grpc.gateway.resume_module import envoy_version, resume_module, settings
from fastchat_grpc.models.embedded import CACHE_VARIABLE
from fastchat_grpc.native import library

DIRECT = GatewayConfig(node_id="n")
needs_compiler = pytest.mark.skipif(library.find_compiler() is None, reason="no C compiler")


def envoy_that_says(text: str, tmp_path: Path) -> Path:
    path = tmp_path / "envoy"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def of_version(version: str, tmp_path: Path) -> Path:
    return envoy_that_says(f"echo; echo 'envoy  version: 0a1b2c/{version}/Clean/RELEASE/BoringSSL'", tmp_path)


@needs_compiler
async def test_a_verified_envoy_gets_a_module_that_is_made_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    made = await resume_module(DIRECT, of_version("1.40.3", tmp_path))
    assert made is not None
    assert made.stat().st_mode & 0o777 == 0o700
    written = made.stat().st_mtime_ns
    assert await resume_module(DIRECT, of_version("1.40.0", tmp_path)) == made
    assert made.stat().st_mtime_ns == written
    assert not caplog.records


@pytest.mark.parametrize(
    ("says", "reason"),
    [
        ("echo 'envoy  version: 0a1b2c/1.39.2/Clean/RELEASE/BoringSSL'", "Envoy 1.39.2 is none of them"),
        ("echo 'envoy  version: 0a1b2c/1.41.0/Clean/RELEASE/BoringSSL'", "Envoy 1.41.0 is none of them"),
        ("echo 'something else'", "does not say its version"),
        ("exit 3", "does not say its version"),
        ("exec sleep 30", "does not say its version"),
    ],
)
async def test_another_envoy_gets_none_and_one_line_says_so(
    says: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "VERSION_TIMEOUT_S", 0.5)
    assert await resume_module(DIRECT, envoy_that_says(says, tmp_path)) is None
    assert [reason in record.getMessage() for record in caplog.records] == [True]


async def test_an_envoy_that_cannot_be_run_says_no_version(tmp_path: Path) -> None:
    assert await envoy_version(tmp_path / "none") == ""


@pytest.mark.parametrize("compiler", ["", "exit 1"])
async def test_what_cannot_be_compiled_is_left_out(
    compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    found = None
    if compiler:
        (tmp_path / "cc").write_text(f"#!/bin/sh\n{compiler}\n")
        (tmp_path / "cc").chmod(0o755)
        found = str(tmp_path / "cc")
    monkeypatch.setattr(library, "find_compiler", lambda: found)
    assert await resume_module(DIRECT, of_version("1.40.0", tmp_path)) is None
    assert ["it cannot be compiled" in record.getMessage() for record in caplog.records] == [True]


@pytest.mark.parametrize(
    "config", [GatewayConfig(resume=False), GatewayConfig(mode=GatewayMode.RELAY)], ids=["--no-resume", "relay"]
)
async def test_who_does_without_asks_for_no_version(config: GatewayConfig, tmp_path: Path) -> None:
    asked = tmp_path / "asked"
    assert await resume_module(config, envoy_that_says(f"touch {asked}", tmp_path)) is None
    assert not asked.exists()


def test_the_module_stands_before_the_router_and_in_no_printed_configuration() -> None:
    def filters(made: Path | None) -> list[str]:
        listener = bootstrap(DIRECT, module=made)["static_resources"]["listeners"][0]
        chain = listener["filter_chains"][0]["filters"][0]["typed_config"]["http_filters"]
        return [each["name"] for each in chain]

    assert filters(Path("/m.so")) == [*filters(None)[:-1], "fastchat_grpc.resume", "envoy.filters.http.router"]
    assert "dynamic_modules" not in render_config(DIRECT)


def test_the_module_shows_the_join_token_to_controllers_alone() -> None:
    config = GatewayConfig(controller_addresses=("a:1", "b:2"), join_token="secret")
    lines = settings(config).splitlines()
    assert lines[:3] == [
        "controller workers_0 controller_0",
        "controller workers_1 controller_1",
        "authorization Bearer secret",
    ]
