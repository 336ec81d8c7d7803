"""Faults on real processes, at random but by a seed: `python -m tests.chaos --help`."""
