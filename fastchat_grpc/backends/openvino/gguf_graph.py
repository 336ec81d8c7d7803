"""Turns a GGUF file into an OpenVINO folder: `python -m fastchat_grpc.backends.openvino.gguf_graph SOURCE TARGET`.

OpenVINO GenAI makes a graph of a GGUF file whose nodes have no names, so that adapters find no place in it.
Here the linear layers get the names that an exported model has, by where they stand: around the attention and
the activation of each layer. Runs as a program of its own, since GenAI writes a graph down only when it loads
it. Prints one line on failure.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from fastchat_grpc.backends.openvino.graph import MODEL_FILE, MODULE, is_linear
from fastchat_grpc.backends.openvino.quiet import forbid_telemetry


def convert(source: Path, target: Path) -> None:
    """Write the model of a file to `target`, with named layers. Raises ValueError, or what OpenVINO raises."""
    import openvino
    import openvino_genai

    scheduler = openvino_genai.SchedulerConfig()
    scheduler.num_kv_blocks = 8
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        link = Path(folder) / source.name  # GenAI writes beside the file
        link.symlink_to(source.resolve())
        openvino_genai.ContinuousBatchingPipeline(str(link), scheduler, "CPU", {"enable_save_ov_model": True})
        model = openvino.Core().read_model(link.with_name(MODEL_FILE))
        for module, node in linear_layers(model).items():
            node.set_friendly_name(f"{MODULE}{module}/MatMul")
        openvino.save_model(model, target / MODEL_FILE, compress_to_fp16=False)


def linear_layers(model: Any) -> dict[str, Any]:
    """The linear layers of a decoder of Llama's kind by their Hugging Face names. Raises ValueError if it is none."""
    nodes = model.get_ordered_ops()
    attentions = [node for node in nodes if node.get_type_name() == "ScaledDotProductAttention"]
    activations = [node for node in nodes if node.get_type_name() == "Swish"]
    if len(attentions) != len(activations) or not attentions:
        raise ValueError(f"its graph has {len(attentions)} attentions and {len(activations)} activations")
    layers: dict[str, Any] = {}
    for i, (attention, activation) in enumerate(zip(attentions, activations, strict=True)):
        (product,) = _users(activation)
        layers |= {f"model.layers.{i}.self_attn.{x}_proj": _above(attention, at) for at, x in enumerate("qkv")}
        layers[f"model.layers.{i}.self_attn.o_proj"] = _below(attention)
        layers[f"model.layers.{i}.mlp.gate_proj"] = _above(activation, 0)
        layers[f"model.layers.{i}.mlp.up_proj"] = _above(product, _other_input(product, activation))
        layers[f"model.layers.{i}.mlp.down_proj"] = _below(product)
    layers["lm_head"] = _above(model.output("logits").get_node(), 0)
    named = {node.get_friendly_name() for node in layers.values()}
    if named != {node.get_friendly_name() for node in nodes if is_linear(node)} or len(named) != len(layers):
        raise ValueError("the linear layers of its graph are not where Llama's are")
    return layers


def _above(node: Any, at: int) -> Any:
    """The linear layer that input `at` comes from."""
    return _nearest([node.input_value(at).get_node()], lambda node: [i.get_node() for i in node.input_values()])


def _below(node: Any) -> Any:
    """The linear layer that the output goes to."""
    return _nearest(_users(node), _users)


def _nearest(nodes: Iterable[Any], further: Callable[[Any], list[Any]]) -> Any:
    """The only linear layer in a direction, with no other between. Shapes and past tokens lead elsewhere."""
    waiting, seen, found = list(nodes), set(), []
    while waiting:
        node = waiting.pop()
        if (name := node.get_friendly_name()) in seen or node.get_type_name() in ("ShapeOf", "ReadValue"):
            continue
        seen.add(name)
        if is_linear(node):
            found.append(node)
        else:
            waiting += further(node)
    if len(found) != 1:
        raise ValueError(f"its graph has {len(found)} linear layers where one was expected")
    return found[0]


def _users(node: Any) -> list[Any]:
    return [use.get_node() for use in node.output(0).get_target_inputs()]


def _other_input(product: Any, one: Any) -> int:
    (other,) = [i for i in (0, 1) if product.input_value(i).get_node().get_friendly_name() != one.get_friendly_name()]
    return other


def main(arguments: list[str]) -> int:
    """Run from the command line."""
    forbid_telemetry()
    source, target = map(Path, arguments)
    try:
        convert(source, target)
    except Exception as error:
        lines = str(error).strip().splitlines()
        print(f"error: {lines[-1] if lines else type(error).__name__}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
