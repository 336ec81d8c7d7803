"""Compiled kernels are loaded only where nobody else can have written them, and made again where they are broken."""

from __future__ import annotations

import ctypes
import logging
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from fastchat_grpc.models.embedded import CACHE_VARIABLE
from fastchat_grpc.native import library, structs
from fastchat_grpc.native.kernels import Kernels, kernels
from fastchat_grpc.native.library import CannotCompile, load_library

pytestmark = pytest.mark.skipif(library.find_compiler() is None, reason="no C compiler")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> bytes:
    """A library as this machine compiles it."""
    path = tmp_path_factory.mktemp("made") / "k.so"
    library.compile_library(library.find_compiler(), path)
    return path.read_bytes()


@pytest.fixture
def cache(tmp_path, monkeypatch, made):
    """An empty cache; compiling takes no time."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    compiled = []

    def compile_library(compiler, path, flags=library.FLAGS):
        compiled.append(path)
        path.unlink(missing_ok=True)  # a library that is loaded keeps its file: writing into it ends the process
        path.write_bytes(made)
        path.chmod(0o700)

    monkeypatch.setattr(library, "compile_library", compile_library)
    folder = tmp_path / "cache" / "kernels"
    return folder, compiled


def test_the_second_start_compiles_nothing(cache):
    folder, compiled = cache
    assert load_library(Kernels).parallel
    load_library(Kernels)
    assert len(compiled) == 1
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@pytest.mark.parametrize("content", [b"", b"no library", "short"])
def test_a_broken_file_is_made_again(cache, content, caplog):
    """An older one, or one cut off, lacks symbols or is no library; either stopped the worker or was for ever."""
    folder, compiled = cache
    folder.mkdir(parents=True)
    path = folder / f"{library._name()}.so"
    if content == "short":
        source = folder / "short.c"
        source.write_text("int int8_bytes(void) { return 1; }")
        subprocess.run([library.find_compiler(), "-shared", "-fPIC", source, "-o", path], check=True)
    else:
        path.write_bytes(content)
    path.chmod(0o700)
    assert load_library(Kernels).parallel
    assert compiled == [path]
    assert "are broken and are made again" in caplog.text
    assert [file.name for file in folder.glob("*.so")] == [path.name]


def test_a_file_that_others_may_write_is_not_loaded(cache, caplog):
    _folder, compiled = cache
    load_library(Kernels)
    compiled[0].unlink()  # the loaded library keeps its file
    compiled[0].write_bytes(b"evil")
    compiled[0].chmod(0o666)
    loaded = []
    load_library(lambda path: loaded.append(path.read_bytes()))
    assert b"evil" not in loaded
    assert len(compiled) == 2
    assert "somebody else" in caplog.text


def test_a_link_is_not_followed(cache, tmp_path):
    _folder, compiled = cache
    load_library(Kernels)
    evil = tmp_path / "evil.so"
    evil.write_bytes(b"evil")
    compiled[0].unlink()
    compiled[0].symlink_to(evil)
    loaded = []
    load_library(lambda path: loaded.append(path.read_bytes()))
    assert b"evil" not in loaded
    assert evil.read_bytes() == b"evil"


@pytest.mark.skipif(os.geteuid() != 0, reason="files of another user can be made by root alone")
@pytest.mark.parametrize("whose", ["file", "folder"])
def test_what_belongs_to_somebody_else_is_not_loaded(cache, whose):
    folder, compiled = cache
    load_library(Kernels)
    compiled[0].write_bytes(b"evil")
    os.chown(compiled[0] if whose == "file" else folder, 12345, 12345)
    loaded = []
    load_library(lambda path: loaded.append((path, path.read_bytes())))
    assert all(content != b"evil" for _, content in loaded)
    if whose == "folder":
        path = loaded[0][0]
        assert folder not in path.parents
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_a_folder_that_others_may_write_is_closed(cache):
    folder, _compiled = cache
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    load_library(Kernels)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_cache_that_cannot_be_written_does_without(cache, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "file"))
    assert load_library(Kernels).parallel


@pytest.mark.parametrize("fails", ["mkdtemp", "copy2"])
def test_a_disk_without_room_leaves_the_kernels_out(cache, fails, monkeypatch):
    """A worker did not start, for a speed-up that it can do without."""

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(library.tempfile if fails == "mkdtemp" else library.shutil, fails, full)
    if fails == "mkdtemp":
        monkeypatch.setattr(library, "_owned", lambda found: False)
    with pytest.raises(CannotCompile, match="No space left"):
        load_library(Kernels)


def fake_compiler(path: Path, script: str) -> str:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_a_warning_quotes_the_compiler(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setenv("CC", fake_compiler(tmp_path / "cc", "echo 'fatal: no such processor' >&2; exit 1"))
    kernels.cache_clear()
    try:
        with caplog.at_level(logging.INFO):
            assert kernels() is None
    finally:
        monkeypatch.undo()
        kernels.cache_clear()
    assert "fatal: no such processor" in caplog.text


@pytest.mark.parametrize("lacks", ["-fopenmp", "-march=native"])
def test_a_compiler_that_lacks_a_flag_is_asked_without_it(lacks, tmp_path):
    """Apple's has no -fopenmp, and clang for ARM had no -march=native."""
    real = library.find_compiler()
    script = f'for a in "$@"; do [ "$a" = "{lacks}" ] && echo "error: unsupported option $a" >&2 && exit 1; done\n'
    other = "" if lacks == "-fopenmp" else 'set -- $(echo "$@" | sed "s/-mcpu=native/-mtune=native/")\n'
    compiler = fake_compiler(tmp_path / "cc", f'{script}{other}exec {real} "$@"')
    library.compile_library(compiler, tmp_path / "k.so")
    assert Kernels(tmp_path / "k.so").parallel == (lacks != "-fopenmp")


def test_a_compiler_that_hangs_or_is_none_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(library, "COMPILE_TIMEOUT_S", 0.2)
    with pytest.raises(CannotCompile, match="timed out"):
        library.compile_library(fake_compiler(tmp_path / "cc", "exec sleep 5"), tmp_path / "k.so")
    with pytest.raises(CannotCompile, match="no-such-compiler"):
        library.compile_library("no-such-compiler", tmp_path / "k.so")


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        (lambda fields: [*fields, ("one_more", ctypes.c_int64)], "Heads"),
        (lambda fields: fields[:-1], "Heads"),
        (lambda fields: [fields[1], fields[0], *fields[2:]], "Heads.kv_heads"),  # of one size: only names tell
        (lambda fields: [(fields[0][0], ctypes.c_double), *fields[1:-1], (fields[-1][0], ctypes.c_double)], "Heads"),
    ],
)
def test_structs_that_c_has_otherwise_are_noticed(tmp_path, made, monkeypatch, fields, told):
    (tmp_path / "k.so").write_bytes(made)

    class Heads(ctypes.Structure):
        _fields_ = fields(structs.Heads._fields_)

    monkeypatch.setattr(structs, "STRUCTS", (Heads, *structs.STRUCTS[1:]))
    with pytest.raises(OSError, match=rf"its structs are others than those of Python: \('{told}"):
        Kernels(tmp_path / "k.so")


def test_without_linuxs_files_the_library_has_a_name(monkeypatch):
    """macOS has no /proc/cpuinfo."""
    monkeypatch.setattr(Path, "read_text", lambda self, *a, **k: (_ for _ in ()).throw(FileNotFoundError(self)))
    assert len(library._name()) == 16
    assert sys.platform == "win32" or library._owned(os.stat(__file__))
