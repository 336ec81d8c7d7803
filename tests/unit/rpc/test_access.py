"""Who may call what, by the table; and the table against what the servers have."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import grpc
import pytest
from envoy.service.accesslog.v3 import als_pb2
from envoy.service.auth.v3 import external_auth_pb2
from envoy.service.endpoint.v3 import eds_pb2
from grpc_channelz.v1 import channelz_pb2
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from fastchat_grpc.config import ApiKeyConfig, ControllerConfig
from fastchat_grpc.controller.app import ControllerApp
from fastchat_grpc.errors import ConfigError, PermissionDenied, Unauthenticated
from fastchat_grpc.rpc import reflection
from fastchat_grpc.rpc.access import METHODS, Access, Level
from fastchat_grpc.rpc.api_keys import ApiKeys, key_line
from fastchat_grpc.rpc.border import Border
from fastchat_grpc.rpc.security import JoinToken
from fastchat_grpc.v1 import generation_pb2, openai_pb2, registry_pb2
from tests.conftest import echo_config, running_worker

USER, ADMIN, TOKEN = "sk-of-a-user", "sk-of-an-admin", "the-join-token"
KEYS = ApiKeyConfig(keys=(("user", USER), ("root", ADMIN)), admins=frozenset({"root"}))
SHOWN = {
    "nothing": (),
    "a wrong secret": (("authorization", "Bearer wrong"),),
    "a user's key": (("authorization", f"Bearer {USER}"),),
    "an admin's key": (("x-api-key", ADMIN),),
    "the token": (("authorization", f"Bearer {TOKEN}"),),
}


def served() -> Iterator[str]:
    """Every method of every service that a server of the suite may have, by the services' own descriptors."""
    files = (generation_pb2, registry_pb2, openai_pb2, health_pb2, reflection_pb2, channelz_pb2)
    for module in (*files, external_auth_pb2, eds_pb2, als_pb2):
        for service in module.DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                yield f"/{service.full_name}/{method.name}"
    yield f"/{reflection.V1}/ServerReflectionInfo"  # as v1alpha in all but the name


async def test_no_server_has_a_method_that_is_not_in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    added: set[str] = set()
    register = Border.add_registered_method_handlers

    def spy(border: Border, service: str, handlers: Mapping[str, Any]) -> None:
        added.update(f"/{service}/{name}" for name in handlers)
        register(border, service, handlers)

    monkeypatch.setattr(Border, "add_registered_method_handlers", spy)
    ControllerApp(ControllerConfig())
    async with running_worker(echo_config()):
        pass
    assert {"/grpc.health.v1.Health/Check", f"/{reflection.V1}/ServerReflectionInfo"} <= added
    assert added <= set(METHODS)


def test_every_method_is_in_the_table_and_nothing_else_is() -> None:
    assert set(served()) == set(METHODS)


def asked_of(method: str) -> str:
    """What callers must show, by whose it is to call the method. Not from the table: that is what is looked at."""
    _, service, name = method.split("/")
    match service:
        case (
            "grpc.health.v1.Health" | "grpc.reflection.v1.ServerReflection" | "grpc.reflection.v1alpha.ServerReflection"
        ):
            return "public"
        case "fastchat_grpc.v1.GenerationService" | "fastchat_grpc.v1.OpenAIService":
            return "key"
        case "fastchat_grpc.v1.ControllerService" if name == "ListModels":
            return "key"
        case "fastchat_grpc.v1.ControllerService" if name in {"Register", "Heartbeat", "Deregister", "ContinueStream"}:
            return "member"
        case "fastchat_grpc.v1.ControllerService" | "grpc.channelz.v1.Channelz":
            return "admin"
    return "member" if service.startswith("envoy.") else "nobody may call it"


def test_each_method_asks_for_what_its_callers_have() -> None:
    assert {method: level.value for method, level in METHODS.items()} == {
        method: asked_of(method) for method in served()
    }


def may(access: Access, level: Level, shown: str) -> bool:
    method = next(method for method, its_level in METHODS.items() if its_level is level)
    try:
        access.admit(method, SHOWN[shown])
    except (Unauthenticated, PermissionDenied):
        return False
    return True


ALLOWED = {
    # keys, token: who may what
    (False, False): {level: set(SHOWN) for level in Level},
    (True, False): {
        Level.PUBLIC: set(SHOWN),
        Level.KEY: {"a user's key", "an admin's key"},
        Level.MEMBER: set(SHOWN),
        Level.ADMIN: {"an admin's key"},
    },
    (False, True): {
        Level.PUBLIC: set(SHOWN),
        Level.KEY: set(SHOWN),
        Level.MEMBER: {"the token"},
        Level.ADMIN: {"the token"},
    },
    (True, True): {
        Level.PUBLIC: set(SHOWN),
        Level.KEY: {"a user's key", "an admin's key"},
        Level.MEMBER: {"the token"},
        Level.ADMIN: {"the token", "an admin's key"},
    },
}


@pytest.mark.parametrize(("keys", "token"), list(itertools.product([False, True], repeat=2)))
@pytest.mark.parametrize("level", list(Level))
def test_who_may_call_what(keys: bool, token: bool, level: Level) -> None:
    access = Access(ApiKeys(KEYS if keys else ApiKeyConfig()), JoinToken(TOKEN if token else None))
    assert {shown for shown in SHOWN if may(access, level, shown)} == ALLOWED[keys, token][level]


def test_a_user_learns_that_it_is_no_admin() -> None:
    with pytest.raises(PermissionDenied, match="admin"):
        Access(ApiKeys(KEYS)).admit("/fastchat_grpc.v1.ControllerService/ListWorkers", SHOWN["a user's key"])


def test_a_method_that_is_not_in_the_table_is_refused() -> None:
    with pytest.raises(PermissionDenied):
        Access().admit("/fastchat_grpc.v1.ControllerService/Forgotten", ())


def test_the_border_asks_before_a_method_runs() -> None:
    async def method(request: object, context: object) -> object:
        raise AssertionError("must not run")

    border = Border(Access(ApiKeys(KEYS)).admit)
    handler = grpc.unary_unary_rpc_method_handler(method)
    border.add_registered_method_handlers("fastchat_grpc.v1.ControllerService", {"ListWorkers": handler})

    class Details:
        method = "/fastchat_grpc.v1.ControllerService/ListWorkers"
        invocation_metadata = SHOWN["a user's key"]

    found = border.service(Details())  # type: ignore[arg-type]
    assert found is not None
    assert found.stream_unary.__name__ == "refuse", "it waits for no message of a caller who is not let in"


def test_several_tokens_are_accepted_while_one_is_changed() -> None:
    token = JoinToken("old", "new")
    for shown in ("old", "new"):
        token.check((("authorization", f"Bearer {shown}"),))
    for shown in ("", "ol", "older", "oldnew"):
        with pytest.raises(Unauthenticated):
            token.check((("authorization", f"Bearer {shown}"),))


def test_keys_without_a_token_do_not_start() -> None:
    with pytest.raises(ConfigError, match="--insecure-join"):
        ControllerConfig(api_keys=KEYS)
    ControllerConfig(api_keys=KEYS, insecure_join=True)
    ControllerConfig(api_keys=KEYS, join_token=TOKEN)


def test_roles_stand_in_the_key_file_and_on_the_flag(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(f"{key_line('user', USER)}\n{key_line('root', ADMIN, admin=True)}  # on duty\n")
    access = Access(ApiKeys(ApiKeyConfig(file=path)))
    assert may(access, Level.ADMIN, "an admin's key")
    assert not may(access, Level.ADMIN, "a user's key")
    parsed = ApiKeyConfig.parse(f"user={USER},root:admin={ADMIN}")
    assert (parsed.keys, parsed.admins) == (KEYS.keys, KEYS.admins)


def test_no_key_becomes_an_admins_by_its_name(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(key_line("user", "sk-of-another", admin=True))
    with pytest.raises(ConfigError, match="both an admin and a user"):
        ApiKeys(ApiKeyConfig(keys=(("user", USER),), file=path))
