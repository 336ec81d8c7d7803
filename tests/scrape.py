"""Metrics as a scraper sees them."""

from __future__ import annotations

import asyncio
import urllib.request
from collections.abc import Mapping

from prometheus_client.parser import text_string_to_metric_families

Series = Mapping[tuple[str, frozenset[tuple[str, str]]], float]


class Scrape:
    """The samples of one scrape."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.families = {family.name: family for family in text_string_to_metric_families(text)}
        self.samples = {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in self.families.values()
            for sample in family.samples
        }

    def get(self, name: str, **labels: str) -> float:
        """The sum of the samples of that name that have these labels; fails where there is none."""
        wanted = set(labels.items())
        found = [value for (each, has), value in self.samples.items() if each == name and wanted <= has]
        assert found, f"{name} {labels} is not exported"
        return sum(found)

    def has(self, name: str, **labels: str) -> bool:
        """Whether there is such a sample."""
        return any(each == name and set(labels.items()) <= has for each, has in self.samples)

    def names(self) -> set[str]:
        """Of all samples."""
        return {name for name, _ in self.samples}

    def labels(self, name: str) -> set[str]:
        """Labels that the samples of a name have."""
        return {label for each, has in self.samples if each == name for label, _ in has}


async def scrape(address: str, path: str = "/metrics") -> Scrape:
    """Ask as Prometheus does."""
    return Scrape((await fetch(address, path)).decode())


async def fetch(address: str, path: str = "/metrics") -> bytes:
    """The body at a path; raises HTTPError."""

    def get() -> bytes:
        with urllib.request.urlopen(f"http://{address}{path}", timeout=20) as answer:
            return bytes(answer.read())

    return await asyncio.to_thread(get)
