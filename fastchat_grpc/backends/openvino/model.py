"""From a model path to what OpenVINO GenAI reads: an exported folder or a GGUF file.

The embedded model and GGUF files need no export (see `gguf.py`). A Hugging Face folder is exported once,
by optimum-intel, into the cache. That library needs torch and releases of transformers that the server need
not have, so it runs in another process and may live in another environment, which
`--backend-option export_python=/path/to/python` names, or which is found by itself.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from fastchat_grpc.backends.openvino import cache, convert
from fastchat_grpc.backends.openvino.gguf import ARCHITECTURES, exact_file, facts, graph_folder
from fastchat_grpc.backends.openvino.graph import MODEL_FILE
from fastchat_grpc.config import BackendConfig, ModelConfig
from fastchat_grpc.errors import ConfigError, ModelLoadError
from fastchat_grpc.models.embedded import EMBEDDED_MODEL, embedded_gguf, embedded_model
from fastchat_grpc.models.facts import ModelFacts, read_facts
from fastchat_grpc.models.resolve import check_gguf, resolve

logger = logging.getLogger(__name__)

WEIGHTS = ("fp32", "fp16", "int8", "int4")
TOKENIZER_FILE = "openvino_tokenizer.xml"
EXPORT_TIMEOUT_S = 3600
_EXPORT_VERSION = 1  # grows when convert.py changes what it writes


@dataclass(frozen=True, slots=True)
class OpenVinoModel:
    """Files to load: `model` for the engine, `folder` for tokenizer and configuration (a GGUF file holds both)."""

    model: Path
    folder: Path
    vocabulary: Path
    """Where the engine finds the model's vocabulary: its folder, or a GGUF file."""
    context_length: int | None = None
    """Where a GGUF file says it."""
    quantization: str = ""
    """Number format of the weights; empty: as the files are."""

    @property
    def grammars(self) -> bool:
        """Whether the engine has the vocabulary, which its grammars need."""
        return self.vocabulary.is_file() or (self.vocabulary / TOKENIZER_FILE).is_file()


def find(config: BackendConfig) -> OpenVinoModel:
    """The model's files, exported first where need be. Raises ModelLoadError or ConfigError."""
    settings = config.model
    path = Path(settings.path).expanduser()
    weights = wanted_weights(config)
    if (path / MODEL_FILE).is_file():
        return OpenVinoModel(path, path, path)
    named = bool(settings.lora_adapters)
    if settings.path == EMBEDDED_MODEL and weights != "fp32":
        return _gguf(embedded_gguf(), embedded_model(), weights or "fp16", named)
    source = resolve(settings.path, settings.revision)
    if source.is_file():
        if weights == "fp32":
            raise ConfigError(f"{source} is served in fp16, int8 or, as it is, int4; not in fp32")
        return _gguf(source, source, weights, named)
    exported = _exported(source, weights or "fp32", config)
    return OpenVinoModel(exported, exported, exported, quantization=_number_format(weights or "fp32"))


def wanted_weights(config: BackendConfig) -> str | None:
    """Precision of the weights that the flags ask for; None: as the model has them. Raises ConfigError."""
    model = config.model
    given = {
        "--backend-option weights": config.options.get("weights"),
        "--load-8bit": "int8" if model.load_8bit else None,
        "--quantization": model.quantization,
        "--dtype": {"float32": "fp32", "float16": "fp16", "bfloat16": "fp16"}.get(model.dtype),
    }
    asked = {flag: weights for flag, weights in given.items() if weights is not None}
    for flag, weights in asked.items():
        if weights not in WEIGHTS:
            raise ConfigError(f"{flag} must be one of {', '.join(WEIGHTS)} for the openvino backend, got {weights}")
    if len(set(asked.values())) > 1:
        raise ConfigError("these contradict each other: " + ", ".join(f"{f} ({w})" for f, w in asked.items()))
    return next(iter(asked.values()), None)


def _gguf(file: Path, folder: Path, weights: str | None, named: bool) -> OpenVinoModel:
    """A GGUF file; where its layers must have names, as a folder."""
    check_gguf(file)
    known = facts(file)
    if known.architecture not in ARCHITECTURES:
        names = ", ".join(sorted(ARCHITECTURES))
        raise ModelLoadError(f"OpenVINO reads GGUF files of {names}; {file} is {known.architecture or 'unreadable'}")
    exact = exact_file(file, known, weights)
    loaded = graph_folder(exact) if named else exact
    return OpenVinoModel(loaded, folder, exact, known.context_length, _number_format(weights))


def _number_format(weights: str | None) -> str:
    """As every engine names it; empty: as the file has it."""
    return {"fp32": "float32", "fp16": "float16", None: ""}.get(weights, weights or "")


def _exported(source: Path, weights: str, config: BackendConfig) -> Path:
    """The exported folder in the cache, made first if it is not there; once, however many processes ask."""
    name = f"{source.name}-{_fingerprint(source)}-{weights}-{_EXPORT_VERSION}"
    try:
        return cache.once(name, lambda part: _export(source, part, weights, config))
    except OSError as error:
        raise ModelLoadError(f"cannot export {source} as {name}: {error}") from error
    except ValueError as error:
        raise ModelLoadError(f"{source} cannot be exported to OpenVINO: {error}") from error


def _fingerprint(source: Path) -> str:
    """Changes when the folder's files do: by their names, sizes and times, not their content."""
    files = sorted(file for file in source.iterdir() if file.is_file())
    facts = [f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files]
    return hashlib.sha256("\n".join([str(source.resolve()), *facts]).encode()).hexdigest()[:12]


def _export(source: Path, target: Path, weights: str, config: BackendConfig) -> None:
    """Export into a folder. Raises ModelLoadError where nothing here can, and ValueError where it fails."""
    python = _exporter(config)
    if python is None:
        raise ModelLoadError(
            f"{source} must first be exported to OpenVINO, which needs optimum-intel: "
            "run pip install 'fastchat-grpc[openvino-export]' in an environment of its own and name its Python with "
            "--backend-option export_python=/path/to/python, or give --model-path an exported folder or a GGUF file"
        )
    logger.info("exporting %s to OpenVINO %s (once; about a minute per billion parameters)", source.name, weights)
    trust = ["trust"] if config.model.trust_remote_code else []
    command = [python, convert.__file__, str(source), str(target), weights, *trust]
    cache.run(command, EXPORT_TIMEOUT_S, {"HF_HUB_OFFLINE": "1"})
    if not (target / MODEL_FILE).is_file():
        raise ValueError(f"the export wrote no {MODEL_FILE}")


def _exporter(config: BackendConfig) -> str | None:
    """A Python with optimum-intel: as told, this one, or that of an environment openvino-export beside this one."""
    if told := config.options.get("export_python"):
        if not Path(told).is_file():
            raise ConfigError(f"--backend-option export_python: there is no file {told}")
        return told
    if _has_optimum_intel():
        return sys.executable
    parent = Path(sys.prefix).parent  # of .venv, or .venvs of .venvs/openvino
    places = (folder / "openvino-export" / "bin" / "python" for folder in (parent, parent / ".venvs"))
    return next((str(python) for python in places if python.is_file()), None)


def _has_optimum_intel() -> bool:
    try:
        return importlib.util.find_spec("optimum.intel") is not None
    except ModuleNotFoundError:
        return False


def folder_facts(found: OpenVinoModel, settings: ModelConfig) -> ModelFacts:
    """What the folder says of a model that is one; of its length what its GGUF file says, where the folder does not."""
    told = read_facts(found.folder, settings)
    return replace(told, context_length=told.context_length or found.context_length)
