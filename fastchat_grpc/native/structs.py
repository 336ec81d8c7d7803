"""The structs of kernels.h, and the check that C lays them out as they are here."""

from __future__ import annotations

import ctypes
from typing import Any

_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


def _fields(kind: Any, names: str) -> list[tuple[str, Any]]:
    return [(name, kind) for name in names.split()]


class Heads(ctypes.Structure):
    """Of one layer's attention."""

    _fields_ = [*_fields(_INT, "kv_heads group size value_size query_stride window"), ("scale", _FLOAT)]


class Pool(ctypes.Structure):
    """One layer's keys and values."""

    _fields_ = _fields(_POINTER, "keys values")


class NewTokens(ctypes.Structure):
    """Keys and values on their way into a pool."""

    _fields_ = _fields(_POINTER, "keys values slot_mapping") + _fields(_INT, "count key_stride value_stride")


class Decode(ctypes.Structure):
    """One token of each of some sequences."""

    _fields_ = _fields(_POINTER, "slot_mapping contexts lengths") + _fields(_INT, "count longest")


class Chunk(ctypes.Structure):
    """Successive tokens of one sequence."""

    _fields_ = _fields(_POINTER, "context") + _fields(_INT, "count length")


class Rotary(ctypes.Structure):
    """What a step's queries and keys are rotated by."""

    _fields_ = _fields(_POINTER, "cosine sine") + _fields(_INT, "count size")


class Qkv(ctypes.Structure):
    """The heads in a row of queries, keys and values."""

    _fields_ = [*_fields(_INT, "heads kv_heads"), *_fields(_POINTER, "query_norm key_norm"), ("epsilon", _FLOAT)]


class Product(ctypes.Structure):
    """A linear layer in 8 bits."""

    _fields_ = _fields(_POINTER, "packed bias") + _fields(_INT, "outputs inputs")


class Layer(ctypes.Structure):
    """A decoder layer in 8 bits."""

    _fields_ = [
        *_fields(_INT, "hidden inner size window"),
        *_fields(_FLOAT, "epsilon scale"),
        *_fields(_POINTER, "attention_norm mlp_norm"),
        ("heads", Qkv),
        *_fields(Product, "qkv o gate_up down"),
    ]


class Stack(ctypes.Structure):
    """All layers, and the pool of each."""

    _fields_ = _fields(_POINTER, "layers pools") + _fields(_INT, "count")


STRUCTS = (Heads, Pool, NewTokens, Decode, Chunk, Rotary, Qkv, Product, Layer, Stack)


class _Field(ctypes.Structure):
    _fields_ = [("name", ctypes.c_char_p), *_fields(_INT, "offset size")]


def compare_layout(library: ctypes.CDLL) -> None:
    """Raise OSError where C has other fields than the structs here, or has them elsewhere."""
    library.layout.restype = _INT
    told = ctypes.POINTER(_Field)()
    count = library.layout(ctypes.byref(told))
    theirs = [(told[i].name.decode(), told[i].offset, told[i].size) for i in range(count)]
    ours = [entry for struct in STRUCTS for entry in _layout(struct)]
    if theirs != ours:
        differing = next((pair for pair in zip(theirs, ours, strict=False) if pair[0] != pair[1]), (count, len(ours)))
        raise OSError(f"its structs are others than those of Python: {differing[0]}, not {differing[1]}")


def _layout(struct: type[ctypes.Structure]) -> list[tuple[str, int, int]]:
    """Name, offset and size of a struct, and of its fields."""
    name = struct.__name__
    parts = [(f"{name}.{field[0]}", getattr(struct, field[0])) for field in struct._fields_]
    return [(name, 0, ctypes.sizeof(struct)), *((path, part.offset, part.size) for path, part in parts)]
