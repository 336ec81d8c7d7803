"""The limit of open descriptors, in processes of their own."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("resource")

RAISED = """
import resource
from fastchat_grpc.rpc.descriptors import raise_limit
_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard if hard != resource.RLIM_INFINITY else 4096))
_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
assert raise_limit() == resource.getrlimit(resource.RLIMIT_NOFILE)[0] == hard, hard
"""


def test_the_soft_limit_becomes_the_hard_one() -> None:
    subprocess.run([sys.executable, "-c", RAISED], check=True, timeout=60)
