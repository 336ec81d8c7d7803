"""The metrics server, and what bounds its labels."""

from __future__ import annotations

import gzip
import urllib.error
import urllib.request

import pytest
from prometheus_client import Counter
from prometheus_client.parser import text_string_to_metric_families

from fastchat_grpc.config import MetricsConfig
from fastchat_grpc.errors import ConfigError
from fastchat_grpc.metrics.exposition import Exposition
from fastchat_grpc.metrics.labels import OTHER, Names, escaped, token_bounds
from tests.scrape import scrape

HOSTILE = 'a"b\\c\nd{e="f"} 1\n# HELP x'


@pytest.fixture
def exposition():
    found = Exposition(MetricsConfig(port=0), "controller")
    found.start()
    yield found
    found.stop()


async def test_it_takes_a_free_port_and_tells_the_build(exposition: Exposition) -> None:
    found = await scrape(exposition.address)
    assert found.get("fastchat_grpc_build_info", component="controller") == 1
    assert found.get("process_start_time_seconds") > 0


def test_a_port_in_use_is_an_error_that_names_the_flag(exposition: Exposition) -> None:
    port = int(exposition.address.rpartition(":")[2])
    with pytest.raises(ConfigError, match=f"127.0.0.1:{port}: .*in use.*--metrics-port"):
        Exposition(MetricsConfig(port=port), "worker").start()


def test_a_host_that_is_none_is_an_error_that_names_the_flag() -> None:
    with pytest.raises(ConfigError, match="--metrics-host"):
        Exposition(MetricsConfig(port=0, host="no.such.host.invalid"), "worker").start()


@pytest.mark.parametrize("port", [-1, 65536])
def test_a_port_that_is_none_is_refused(port: int) -> None:
    with pytest.raises(ConfigError, match="--metrics-port"):
        MetricsConfig(port=port)


@pytest.mark.parametrize(("path", "body", "code"), [("/", None, 404), ("/metrics", b"x", 405)])
def test_nothing_else_is_served(exposition: Exposition, path: str, body: bytes | None, code: int) -> None:
    with pytest.raises(urllib.error.HTTPError) as failed:
        urllib.request.urlopen(f"http://{exposition.address}{path}", data=body)
    assert failed.value.code == code


async def test_hostile_label_values_stay_values(exposition: Exposition) -> None:
    Counter("x", "Text.", ["who"], registry=exposition.registry).labels(HOSTILE).inc()
    exposition.add(lambda: f'# TYPE y gauge\ny{{who="{escaped(HOSTILE)}"}} 2'.encode())
    found = await scrape(exposition.address)
    assert found.get("x_total", who=HOSTILE) == 1
    assert found.get("y", who=HOSTILE) == 2


async def test_a_part_that_fails_hides_nothing_else(exposition: Exposition) -> None:
    exposition.add(lambda: b"" + bytes(1 // 0))
    assert (await scrape(exposition.address)).has("fastchat_grpc_build_info")


def test_whoever_takes_gzip_gets_it(exposition: Exposition) -> None:
    request = urllib.request.Request(f"http://{exposition.address}/metrics", headers={"accept-encoding": "gzip"})
    with urllib.request.urlopen(request) as answer:
        assert answer.headers["content-encoding"] == "gzip"
        assert list(text_string_to_metric_families(gzip.decompress(answer.read()).decode()))


def test_a_hundred_thousand_names_make_no_more_than_a_bounded_number_of_values() -> None:
    names = Names(most=100)
    values = {names.of(f"name-{i}") for i in range(100_000)}
    assert len(values) == 101
    assert OTHER in values
    assert names.of("name-5") == "name-5"
    assert len(Names().of("x" * 100_000)) == 128


def test_buckets_of_tokens_go_up_to_the_context() -> None:
    assert list(token_bounds(100)) == [1, 2, 5, 10, 20, 50, 100]
    assert list(token_bounds(0)) == [1]
