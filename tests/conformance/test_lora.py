"""Every backend that takes LoRA adapters applies real ones as peft does: the same greedy texts, alone and at once.

Where no backends are named, on openvino only: of the others of CI, transformers is tested so by
tests/e2e/test_model_kinds.py, with a model that loads faster.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import pytest_asyncio

pytest.importorskip("peft")

from fastchat_grpc.backends.capabilities import TRAITS, Feature
from fastchat_grpc.errors import AdapterNotFound
from tests.conformance.harness import Harness, request
from tests.conformance.lora import ADAPTERS, PROMPT, Reference, write_adapter
from tests.conformance.targets import CHOSEN_VARIABLE, Target, chosen, embedded_folder

COUNT = 12
NAMES = ("", *ADAPTERS)

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]


@dataclass(frozen=True)
class Expected:
    """Folders of the adapters, and the text of each; of the model alone by the empty name."""

    folders: dict[str, str]
    texts: dict[str, str]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Expected:
    root, base = tmp_path_factory.mktemp("adapters"), Path(embedded_folder())
    folders = {name: write_adapter(root / name, base, adapter) for name, adapter in ADAPTERS.items()}
    reference = Reference(base, folders)
    texts = {name: reference.text(name, PROMPT, COUNT) for name in NAMES}
    assert len(set(texts.values())) == len(NAMES)
    return Expected({name: str(folder) for name, folder in folders.items()}, texts)


def _targets() -> list[object]:
    taking = [t for t in chosen() if t.real and TRAITS[t.name].supports(Feature.LORA)]
    if CHOSEN_VARIABLE not in os.environ:
        taking = [target for target in taking if target.name == "openvino"]
    return [pytest.param(target, id=target.label or target.name) for target in taking]


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=_targets())
async def harness(request: pytest.FixtureRequest, expected: Expected) -> AsyncIterator[Harness]:
    """A backend with the adapters."""
    target: Target = request.param
    harness = Harness(target, lora_adapters=expected.folders, **target.exact)
    await harness.open()
    yield harness
    await harness.close()


async def test_each_adapter_says_what_it_says_in_peft(harness: Harness, expected: Expected) -> None:
    texts = {name: await _text(harness, name) for name in NAMES}
    assert texts == expected.texts


async def test_base_and_adapters_at_once_do_not_mix(harness: Harness, expected: Expected) -> None:
    names = NAMES * 3
    texts = await asyncio.gather(*(_text(harness, name) for name in names))
    assert texts == [expected.texts[name] for name in names]


async def test_an_adapter_is_a_model_of_its_own_too(harness: Harness, expected: Expected) -> None:
    assert {info.name: info.base_model for info in harness.infos} == {"tested": "", "red": "tested", "blue": "tested"}
    asked = replace(request(PROMPT, max_new_tokens=COUNT, ignore_eos=True), model="blue")
    assert (await harness.run(asked)).text == expected.texts["blue"]


async def test_an_unknown_adapter_is_refused_by_name(harness: Harness, expected: Expected) -> None:
    with pytest.raises(AdapterNotFound, match="lora_adapter: no adapter 'green' is loaded; loaded: red, blue"):
        await harness.ask(lora_adapter="green")


async def _text(harness: Harness, name: str) -> str:
    return (await harness.ask(PROMPT, lora_adapter=name, max_new_tokens=COUNT, ignore_eos=True)).text
