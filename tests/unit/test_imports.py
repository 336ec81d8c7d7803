"""Who may import whom. The rules are the architecture; this test holds them."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "fastchat_grpc"
HEAVY = {"torch", "transformers", "accelerate", "numpy", "openvino_genai", "vllm", "mlx", "llama_cpp", "sglang", "peft"}

# For each part of the package the parts that it may import. What is not listed it may not.
MAY_IMPORT = {
    "errors": set(),
    "core": {"errors"},
    "config": {"errors", "core"},
    "v1": set(),
    "rpc": {"core", "errors", "config", "v1"},
    "text": {"core", "errors"},
    "native": {"models"},
    "models": {"core", "errors", "config", "text", "native"},
    "engine": {"core", "errors", "config", "text", "models", "native"},
    "backends": {"core", "errors", "config", "text", "models", "engine"},
    "openai": {"core", "errors", "config", "text", "rpc", "v1"},
    "metrics": {"core", "errors", "config"},
    "worker": {"core", "errors", "config", "rpc", "backends", "openai", "v1", "metrics"},
    "controller": {"core", "errors", "config", "rpc", "openai", "v1", "metrics"},
    "gateway": {"core", "errors", "config", "rpc", "v1", "metrics", "native"},
    "client": {"core", "errors", "config", "rpc", "v1"},
    "cli": {"core", "errors", "config", "client", "worker", "controller", "gateway", "backends", "rpc"},
}
STDLIB_ONLY = {"errors", "core", "config"}


def modules() -> list[Path]:
    return sorted(p for p in PACKAGE.rglob("*.py") if "v1" not in p.relative_to(PACKAGE).parts)


def part_of(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imports(path: Path) -> list[tuple[str, int]]:
    """Every module that a file imports, at any depth, with the line."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            if node.module in ("fastchat_grpc", "fastchat_grpc.rpc"):
                found += [(f"{node.module}.{alias.name}", node.lineno) for alias in node.names]
            else:
                found.append((node.module, node.lineno))
    return found


def top_level_imports(path: Path) -> list[str]:
    """Modules that are imported whenever the file is."""
    tree = ast.parse(path.read_text())
    names: list[str] = []
    for node in tree.body:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.append(node.module)
    return names


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_module_imports_only_what_its_part_may(path: Path) -> None:
    part = part_of(path)
    if part in ("__init__", "__main__"):
        return
    allowed = MAY_IMPORT[part] | {part, "__version__"}
    for name, line in imports(path):
        pieces = name.split(".")
        if pieces[0] == "fastchat_grpc" and len(pieces) > 1:
            assert pieces[1] in allowed, f"{path}:{line}: {part} must not import {name}"
        elif part in STDLIB_ONLY:
            assert pieces[0] in sys.stdlib_module_names, f"{path}:{line}: {part} must not import {name}"


@pytest.mark.parametrize("part", ["engine", "models", "native", "text"])
def test_the_engine_side_knows_nothing_of_grpc(part: str) -> None:
    for path in (PACKAGE / part).rglob("*.py"):
        for name, line in imports(path):
            assert name.split(".")[0] not in ("grpc", "grpc_status"), f"{path}:{line}: {part} must not import {name}"


def test_only_the_transformers_backend_sees_the_engine() -> None:
    for path in (PACKAGE / "backends").rglob("*.py"):
        if path.parent.name != "transformers":
            assert not any(name.startswith("fastchat_grpc.engine") for name, _ in imports(path)), path


def test_no_module_needs_itself() -> None:
    """No circle of imports, those inside functions and for types included."""
    names = {_dotted(path): path for path in modules()}
    needs = {}
    for name, path in names.items():
        needed = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                needed |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                inner = {f"{node.module}.{alias.name}" for alias in node.names} & set(names)
                needed |= inner or {node.module}
        needs[name] = needed & set(names) - {name}
    graphlib.TopologicalSorter(needs).prepare()  # raises CycleError, which names the circle


def _dotted(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


ENGINES = sorted(path.name for path in (PACKAGE / "backends").iterdir() if (path / "__init__.py").exists())


def test_each_engine_has_a_package() -> None:
    assert {"llama_cpp", "openvino", "transformers", "upstream", "vllm"} <= set(ENGINES)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_is_known_by_its_package_alone(engine: str) -> None:
    """No engine imports another, and nobody else what is inside of one."""
    inside = f"fastchat_grpc.backends.{engine}."
    for path in PACKAGE.rglob("*.py"):
        if path.parent != PACKAGE / "backends" / engine:
            for name, line in imports(path):
                assert not name.startswith(inside), f"{path}:{line}"


def test_workers_reach_backends_only_through_the_interface_and_the_registry() -> None:
    allowed = {"fastchat_grpc.backends", "fastchat_grpc.backends.base", "fastchat_grpc.backends.registry"}
    for path in (PACKAGE / "worker").glob("*.py"):
        for name, line in imports(path):
            assert not name.startswith("fastchat_grpc.backends") or name in allowed, f"{path}:{line}"


@pytest.mark.parametrize(
    "part", ["backends", "models", "worker", "cli", "controller", "gateway", "rpc", "openai", "text"]
)
def test_heavy_libraries_are_imported_inside_functions(part: str) -> None:
    for path in (PACKAGE / part).rglob("*.py"):
        heavy = [name for name in top_level_imports(path) if name.split(".")[0] in HEAVY]
        if part in ("models", "backends") and _is_behind_a_factory(path):
            continue
        assert not heavy, f"{path} imports {heavy} at the top"


def _is_behind_a_factory(path: Path) -> bool:
    """Modules that are only imported by a function of another, once a model is wanted."""
    return path.name in {"cpu_linear.py", "quantization.py"}


@pytest.mark.parametrize(
    "module", ["fastchat_grpc.client", "fastchat_grpc.controller.app", "fastchat_grpc.worker.app", "fastchat_grpc.cli"]
)
def test_importing_loads_no_torch(module: str) -> None:
    code = f"import sys, {module}; print([m for m in {sorted(HEAVY)} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_importing_starts_no_thread() -> None:
    code = "import threading, fastchat_grpc.client, fastchat_grpc.worker.app; print(threading.active_count())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "1"
