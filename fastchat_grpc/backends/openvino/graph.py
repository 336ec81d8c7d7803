"""The graph of an OpenVINO model, as far as adapters need it: its linear layers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

MODEL_FILE = "openvino_model.xml"
MODULE = "__module."
"""What optimum-intel puts before a module's path to name its nodes: __module.model.layers.0.mlp.up_proj/..."""


@dataclass(frozen=True, slots=True)
class Place:
    """A linear layer: the name of its MatMul, and how many values go in and come out."""

    node: str
    inputs: int
    outputs: int


def places(folder: Path) -> dict[str, Place]:
    """The linear layers of a model, by their paths in the Hugging Face model."""
    import openvino

    found: dict[str, list[Place]] = {}
    for node in openvino.Core().read_model(folder / MODEL_FILE).get_ops():
        if is_linear(node):
            name = node.get_friendly_name()
            outputs, inputs = node.input_value(1).get_shape()
            if not node.get_attributes()["transpose_b"]:
                outputs, inputs = inputs, outputs
            found.setdefault(name.removeprefix(MODULE).split("/")[0], []).append(Place(name, inputs, outputs))
    return {module: at[0] for module, at in found.items() if len(at) == 1}


def is_linear(node: Any) -> bool:
    """Whether a node multiplies by a matrix of weights."""
    if node.get_type_name() != "MatMul":
        return False
    shape = node.input_value(1).get_partial_shape()
    return bool(shape.is_static) and len(shape) == 2
