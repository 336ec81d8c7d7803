"""Settings from a file: what is read, what is refused and where, and what goes before what."""

from __future__ import annotations

import json
import os
from pathlib import Path
from textwrap import dedent

import pytest
from click.testing import CliRunner

from fastchat_grpc.cli.config_command import config
from fastchat_grpc.cli.fleet import COMMANDS, Planned
from fastchat_grpc.cli.serve import planned, serve
from fastchat_grpc.errors import ConfigError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "fleet.yaml"


def fleet(file: Path, text: str, *arguments: str) -> dict[str, Planned]:
    file.write_text(dedent(text))
    return {part.name: part for part in planned(serve.make_context("serve", ["-f", str(file), *arguments]))}


TWO_MODELS = """\
    log_level: warning
    drain-timeout: 3
    controller:
      port: 7000
      dispatch_method: power_of_two
    gateway:
      host: 0.0.0.0
      port: 7001
      allowed_origin: https://a.example
    worker:
      backend: echo
      max_queue: 9
    workers:
      - model_path: alpha
        model_names: [a, b]
        gpus: [0, 1]
        num_gpus: 2
        replicas: 2
      - model_path: beta
        port: 7100
        max_queue: 10
        label: {zone: east}
        load_8bit: true
    """


def test_a_file_describes_a_fleet(file: Path) -> None:
    found = fleet(file, TWO_MODELS)
    assert list(found) == ["controller", "worker-0", "worker-1", "worker-2", "gateway"]
    controller, gateway = found["controller"].flags, found["gateway"].flags
    assert (controller["port"], controller["dispatch_method"], controller["drain_timeout"]) == (7000, "power_of_two", 3)
    assert (gateway["host"], gateway["port"], gateway["allowed_origin"]) == ("0.0.0.0", 7001, ("https://a.example",))
    assert gateway["controller_address"] == ("127.0.0.1:7000",)
    first, second, third = (found[f"worker-{i}"].flags for i in range(3))
    assert [flags["port"] for flags in (first, second, third)] == [21002, 21003, 7100]
    assert [flags["model_path"] for flags in (first, second, third)] == ["alpha", "alpha", "beta"]
    assert [flags["max_queue"] for flags in (first, second, third)] == [9, 9, 10]
    assert (first["model_names"], first["gpus"], first["load_8bit"]) == (("a", "b"), (0, 1), False)
    assert (third["label"], third["load_8bit"], third["backend"]) == ((("zone", "east"),), True, "echo")
    assert controller["expect_workers"] == ("127.0.0.1:21002", "127.0.0.1:21003", "127.0.0.1:7100")


def test_each_process_reads_its_flags_as_they_were_planned(file: Path) -> None:
    for part in fleet(file, TWO_MODELS).values():
        command = COMMANDS[part.kind]
        kind, *arguments = part.arguments
        assert kind == part.kind
        assert command.make_context(kind, arguments).params == part.flags


def test_flags_go_before_the_environment_before_the_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = """\
        gateway: false
        seed: 1
        workers:
          - {backend: echo, max_queue: 1, stream_interval: 1, weight: 1}
        """
    monkeypatch.setenv("FASTCHAT_GRPC_MAX_QUEUE", "2")
    monkeypatch.setenv("FASTCHAT_GRPC_STREAM_INTERVAL", "2")
    worker = fleet(file, text, "--stream-interval", "3")["worker-0"]
    flags = worker.flags
    assert [flags[name] for name in ("seed", "weight", "max_queue", "stream_interval")] == [1, 1.0, 2, 3]
    # The process reads the environment itself.
    assert "--max-queue" not in worker.arguments


def test_secrets_of_a_file_reach_no_command_line(file: Path) -> None:
    text = """\
        gateway: false
        join_token: shared-secret
        controller: {api_keys: "a=key-of-a"}
        worker: {backend: echo}
        """
    found = fleet(file, text)
    assert all("secret" not in word and "key-of-a" not in word for part in found.values() for word in part.arguments)
    assert found["worker-0"].secrets == {"FASTCHAT_GRPC_JOIN_TOKEN": "shared-secret"}
    assert found["controller"].secrets["FASTCHAT_GRPC_API_KEYS"] == "a=key-of-a"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("workers:\n- modelpath: x", ":2: there is no setting workers[0].modelpath; did you mean model_path?"),
        ("dispatch-metod: x", ":1: there is no setting dispatch-metod; did you mean dispatch_method?"),
        ("wrokers: []", ":1: there is no setting wrokers; did you mean workers?"),
        ("controller:\n  model_path: x", ":2: there is no setting controller.model_path"),
        ("port: seven", ":1: port must be a whole number, got 'seven'"),
        ("worker:\n  seed: true", ":2: worker.seed must be a whole number, got True"),
        ("weight: x", ":1: weight must be a number, got 'x'"),
        ("worker_id: 7", ":1: worker_id must be text (in quotes, if it looks like a number), got 7"),
        ("load_8bit: maybe", ":1: load_8bit must be true or false"),
        ("workers: {}", ":1: workers must be a list"),
        ("workers: []", ":1: workers is empty"),
        ("workers:\n- replicas: 0", ":2: workers[0].replicas must be a number from 1 to 1024, got 0"),
        ("label: x", ":1: label must be a mapping of names to values"),
        ("gpus: [a]", ":1: gpus: 'a' is not a comma-separated list of numbers"),
        ("log_level: loud", ":1: log_level: 'loud' is not one of 'debug', 'info', 'warning'."),
        ("port: 1\nport: 2", ":2: port is set twice"),
        ("tls-key: a\ntls_key: b", ":2: tls_key is set twice, on line 1 before"),
        ("config: other.yaml", ":1: config cannot stand in a file"),
        ("- a", ":1: the file must be a mapping of settings"),
        ("a: [\n", ":2: this is not YAML"),
        ("", " holds no settings"),
        ("port: {a: 1}", ":1: port must be a single value"),
        ("port: 2026-13-45", ":1: '2026-13-45' is no value of YAML: month must be in"),
        ("port: !!int abc", ":1: 'abc' is no value of YAML: "),
        ("port: !!bool abc", ":1: 'abc' is no value of YAML: "),
        ("worker_id: !!python/object:os.system a", ":1: 'a' is no value of YAML: "),
        # What each worker has by itself cannot be said for several of them at once.
        ("worker:\n  worker_id: x\nworkers: [{}, {}]", ":2: worker.worker_id is of one worker"),
        ("worker:\n  port: 7\nworkers: [{}, {}]", ":2: worker.port is of one worker"),
        # What the flags themselves refuse is found in the file, too.
        ("weight: 1e9", ":1: --weight must be"),
        ("workers:\n- weight: 0", ":2: --weight must be"),
        ("num_workers: 0", ":1: --num-workers must be at least 1, got 0"),
    ],
)
def test_what_is_wrong_is_said_with_its_line_and_its_key(file: Path, text: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        fleet(file, text, "--backend", "echo", "--no-gateway")
    assert str(caught.value).startswith(f"{file}{problem}"), caught.value


@pytest.mark.parametrize(
    ("text", "both"),
    [
        ("workers: [{port: 7100}, {port: 7100}]", "worker-0 and worker-1 .*127.0.0.1:7100"),
        ("workers: [{port: 21003}, {}, {}]", "worker-0 and worker-2 .*127.0.0.1:21003"),
        ("controller_port: 7100\nport: 7100", "controller and worker-0 .*127.0.0.1:7100"),
        ("metrics_port: 21001", "controller and metrics of controller .*127.0.0.1:21001"),
    ],
)
def test_no_two_listen_at_one_place(file: Path, text: str, both: str) -> None:
    with pytest.raises(ConfigError, match=both):
        fleet(file, text, "--backend", "echo", "--no-gateway")


def test_a_worker_that_is_the_only_one_may_have_its_place_in_either_section(file: Path) -> None:
    found = fleet(file, "gateway: false\nworker: {backend: echo, port: 7, worker_id: x}\nworkers: [{}]")
    assert (found["worker-0"].flags["port"], found["worker-0"].flags["worker_id"]) == (7, "x")
    assert found["controller"].flags["expect_workers"] == ("x",)


def test_parts_take_the_file_of_serve_from_it_alone(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else each part that finds the file's name in the environment would read it by itself, and a gateway would print
    its configuration and end, again and again."""
    file.write_text("gateway: false\nworkers: [{backend: echo}, {backend: echo, max_queue: 5}]")
    monkeypatch.setenv("FASTCHAT_GRPC_CONFIG", str(file))
    monkeypatch.setenv("FASTCHAT_GRPC_PRINT_CONFIG", "1")
    found = planned(serve.make_context("serve", []))
    assert [part.flags["max_queue"] for part in found if part.kind == "worker"] == [256, 5]
    assert not {"FASTCHAT_GRPC_CONFIG", "FASTCHAT_GRPC_PRINT_CONFIG"} & set(os.environ)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml cannot be read"):
        serve.make_context("serve", ["-f", str(tmp_path / "none.yaml")])


def test_two_ways_to_say_how_many_workers_there_are_contradict(file: Path) -> None:
    with pytest.raises(ConfigError, match="--num-workers and the workers of"):
        fleet(file, "workers: [{backend: echo}]", "--num-workers", "2", "--no-gateway")


def test_a_part_that_runs_by_itself_takes_its_section(file: Path) -> None:
    file.write_text(dedent(TWO_MODELS))
    flags = COMMANDS["controller"].make_context("controller", ["-f", str(file), "--drain-timeout", "4"]).params
    assert (flags["port"], flags["dispatch_method"], flags["log_level"], flags["drain_timeout"]) == (
        7000,
        "power_of_two",
        "warning",
        4.0,
    )
    with pytest.raises(ConfigError, match="has 2 workers; fastchat-grpc serve starts them all"):
        COMMANDS["worker"].make_context("worker", ["-f", str(file)])
    file.write_text("port: 1\nworker: {backend: echo}\nworkers: [{model_path: one, port: 2}]")
    flags = COMMANDS["worker"].make_context("worker", ["-f", str(file)]).params
    assert (flags["port"], flags["backend"], flags["model_path"]) == (2, "echo", "one")


def test_show_prints_each_setting_with_its_source_and_no_secret(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTCHAT_GRPC_MAX_QUEUE", "2")
    file.write_text("join_token: hush\ngateway: false\nworker:\n  backend: echo\n")
    arguments = ["show", "-f", str(file), "--seed", "5"]
    text = CliRunner().invoke(config, arguments).output
    assert "hush" not in text
    found = json.loads(CliRunner().invoke(config, ["show", "--json", *arguments[1:]]).output)
    worker = found["worker-0"]
    assert worker["max_queue"] == {"value": 2, "source": "FASTCHAT_GRPC_MAX_QUEUE"}
    assert worker["backend"] == {"value": "echo", "source": f"{file}:4"}
    assert worker["seed"] == {"value": 5, "source": "--seed"}
    assert worker["weight"] == {"value": 1.0, "source": "default"}
    assert worker["port"]["source"] == "set by serve"
    assert set(found["controller"]["join_token"]["value"]) == {"*"}


def test_check_says_what_it_found(file: Path) -> None:
    file.write_text("gateway: false\nworkers: [{backend: echo}, {backend: echo, replicas: 2}]")
    result = CliRunner().invoke(config, ["check", "-f", str(file)])
    assert (result.exit_code, result.output) == (0, "ok: a controller, 3 workers\n")
