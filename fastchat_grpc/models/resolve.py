"""From what a user calls a model to files on this machine, checked before anything heavy is loaded."""

from __future__ import annotations

import json
import re
import socket
import struct
import urllib.parse
import urllib.request
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastchat_grpc.errors import ModelLoadError
from fastchat_grpc.models.embedded import EMBEDDED_MODEL, embedded_model

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
)
_SINGLE_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_WEIGHT_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_HUB_GGUF = re.compile(r"([\w.-]+/[\w.-]+)/([\w./-]+\.gguf)")
# Copies of the same weights in formats that nothing here reads.
_OTHER_FORMATS = [
    "*.msgpack",
    "*.h5",
    "*.ot",
    "*.onnx",
    "onnx/*",
    "*.tflite",
    "*.mlmodel",
    "original/*",
    "*.pth",
    "*.gguf",
]
_LFS_POINTER = b"version https://git-lfs"


def resolve(path: str, revision: str | None = None) -> Path:
    """The model folder (or GGUF file) that `path` names, fetched if it is not here.

    Args:
        path: a folder; a GGUF file; `smollm2-135m-instruct`; a hub id `owner/name`; or a GGUF file
            of a hub repository, `owner/name/file.gguf`.
        revision: branch, tag or commit of a hub repository.

    Raises:
        ModelLoadError: nothing is there, it cannot be fetched, or its files are broken.
    """
    local = Path(path).expanduser()
    if local.is_dir():
        check_folder(local)
        return local
    if local.is_file():
        check_gguf(local)
        return local
    if path == EMBEDDED_MODEL:
        return embedded_model()
    if gguf := _HUB_GGUF.fullmatch(path):
        return _fetch_file(gguf[1], gguf[2], revision)
    if _looks_local(path):
        raise ModelLoadError(f"no model at {path}: the folder or GGUF file does not exist")
    folder = _fetch_repository(path, revision)
    check_folder(folder)
    return folder


def check_folder(folder: Path) -> None:
    """Raise ModelLoadError unless the folder holds a configuration, whole weights and a tokenizer."""
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").exists():
        read_json(folder / "adapter_config.json")
        return
    if not (folder / "config.json").is_file():
        hint = "; name one of its GGUF files instead" if any(folder.glob("*.gguf")) else ""
        raise ModelLoadError(f"no model in {folder}: it has no config.json{hint}")
    read_json(folder / "config.json")
    _check_weights(folder)
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise ModelLoadError(f"no tokenizer in {folder}: expected one of {', '.join(TOKENIZER_FILES[:3])}, ...")


def check_gguf(file: Path) -> None:
    """Raise ModelLoadError unless the file starts like a GGUF file."""
    with file.open("rb") as stream:
        head = stream.read(len(_LFS_POINTER))
    if head == _LFS_POINTER:
        raise ModelLoadError(f"{file} is a Git LFS pointer, not the model; run `git lfs pull` in its folder")
    if head[:4] != b"GGUF":
        raise ModelLoadError(f"{file} is not a GGUF file; --model-path takes a model folder, a GGUF file, or a hub id")


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file of the model. Raises ModelLoadError."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{file} cannot be read: {_one_line(error)}") from error
    if not isinstance(content, dict):
        raise ModelLoadError(f"{file} must hold a JSON object, it holds a {type(content).__name__}")
    return content


def weight_files(folder: Path) -> list[Path]:
    """The files that a folder's weights are loaded from; it may hold the same weights in other files as well.

    Raises:
        ModelLoadError: some are missing.
    """
    for single, index in zip(_SINGLE_WEIGHTS, _WEIGHT_INDEXES, strict=True):  # in the order of transformers
        if (folder / single).is_file():
            return [folder / single]
        if (folder / index).is_file():
            return _shards(folder / index)
    return []


def _check_weights(folder: Path) -> None:
    files = weight_files(folder)
    if not files:
        raise ModelLoadError(f"no weights in {folder}: expected {_SINGLE_WEIGHTS[0]} or {_WEIGHT_INDEXES[0]}")
    for file in files:
        _check_weight_file(file)


def _shards(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelLoadError(f"{index} has no weight_map")
    files = [index.parent / str(name) for name in sorted(set(weight_map.values()))]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ModelLoadError(f"weights are missing in {index.parent}: {_listed(missing)}")
    return files


def _check_weight_file(file: Path) -> None:
    """A cheap check of size against the safetensors header: the common ways for a copy or download to break."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        head = stream.read(len(_LFS_POINTER))
        if head == _LFS_POINTER:
            raise ModelLoadError(f"{file} is a Git LFS pointer, not the weights; run `git lfs pull` in its folder")
        if file.suffix != ".safetensors":
            if size == 0:
                raise ModelLoadError(f"{file} is empty")
            return
        try:
            (header_size,) = struct.unpack("<Q", head[:8])
            if header_size > size:
                raise ValueError("its header does not fit in the file")
            stream.seek(8)
            header = json.loads(stream.read(header_size))
            expected = (
                8
                + header_size
                + max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
            )
        except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelLoadError(f"{file} is not a whole safetensors file: {_one_line(error)}") from error
    if size < expected:
        raise ModelLoadError(f"{file} is cut short: it has {size} of {expected} bytes; fetch it again")


def _looks_local(path: str) -> bool:
    return path.startswith(("/", "./", "../", "~")) or path in (".", "..") or _HUB_ID.fullmatch(path) is None


def _fetch_repository(repo: str, revision: str | None) -> Path:
    try:
        from huggingface_hub import HfApi, snapshot_download
    except ImportError as error:
        raise _no_hub(repo) from error
    ignore = list(_OTHER_FORMATS)
    try:
        if not _hub_answers():
            return Path(snapshot_download(repo, revision=revision, ignore_patterns=ignore, local_files_only=True))
        files = HfApi().list_repo_files(repo, revision=revision)
        if any(name.endswith(".safetensors") for name in files):
            ignore += ["*.bin", "*.pt"]
        return Path(snapshot_download(repo, revision=revision, ignore_patterns=ignore))
    except Exception as error:
        raise _fetch_error(repo, revision, error) from error


def _fetch_file(repo: str, name: str, revision: str | None) -> Path:
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise _no_hub(repo) from error
    try:
        file = Path(hf_hub_download(repo, name, revision=revision, local_files_only=not _hub_answers()))
    except Exception as error:
        raise _fetch_error(repo, revision, error) from error
    check_gguf(file)
    return file


def _hub_answers() -> bool:
    """Whether the hub can be reached; asked first, since its client retries for half a minute where it cannot."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    url = urllib.parse.urlsplit(constants.ENDPOINT)
    if not url.hostname or urllib.request.getproxies():
        return True
    try:
        with socket.create_connection((url.hostname, url.port or (443 if url.scheme == "https" else 80)), timeout=10):
            return True
    except OSError:
        return False


def _no_hub(repo: str) -> ModelLoadError:
    return ModelLoadError(
        f"no model folder {repo} here, and fetching a hub id needs the package huggingface_hub; "
        "install fastchat-grpc[transformers]"
    )


def _fetch_error(repo: str, revision: str | None, error: Exception) -> ModelLoadError:
    """One line for the many ways in which the hub says no."""
    which = repo if revision is None else f"{repo} at revision {revision}"
    name = type(error).__name__
    if name == "GatedRepoError":
        return ModelLoadError(f"{which} is gated: ask for access on its page, then set HF_TOKEN")
    if name == "RepositoryNotFoundError":
        return ModelLoadError(f"no model folder {repo} here, nor on the model hub (if it is private, set HF_TOKEN)")
    if name == "RevisionNotFoundError":
        return ModelLoadError(f"the model hub has no {which}")
    if name in ("EntryNotFoundError", "RemoteEntryNotFoundError"):
        return ModelLoadError(f"the model hub has no such file in {which}")
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        return ModelLoadError(f"cannot fetch {which}: {error.strerror}: {error.filename}")
    return ModelLoadError(
        f"no model folder {repo} here, and it cannot be fetched from the model hub; "
        f"check the path or the network, or use {EMBEDDED_MODEL}"
    )


def _listed(names: Iterable[str], limit: int = 3) -> str:
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _one_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
