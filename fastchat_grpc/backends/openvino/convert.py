"""Converts a Hugging Face folder to an OpenVINO folder: `python convert.py SOURCE TARGET WEIGHTS`.

Runs as a script in an environment that has optimum-intel, which need not be the server's: it imports
nothing of this package. WEIGHTS is fp32, fp16, int8 or int4. Prints one line on failure.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any


def convert(source: Path, target: Path, weights: str, trust_remote_code: bool) -> None:
    """Write model, tokenizer and detokenizer to `target`."""
    from optimum.intel import OVModelForCausalLM

    model = OVModelForCausalLM.from_pretrained(
        str(source),
        export=True,
        compile=False,
        use_cache=True,
        trust_remote_code=trust_remote_code,
        load_in_8bit=False,  # the library quantizes large models by itself otherwise
        quantization_config=_quantization(weights),
    )
    if weights == "fp16":
        model.half()
    model.save_pretrained(str(target))
    _convert_tokenizer(source, target, trust_remote_code)


def _quantization(weights: str) -> Any:
    if weights in ("fp32", "fp16"):
        return None
    from optimum.intel import OVWeightQuantizationConfig

    if weights == "int8":
        return OVWeightQuantizationConfig(bits=8, sym=False)
    return OVWeightQuantizationConfig(bits=4, sym=False, group_size=64, ratio=1.0)


def _convert_tokenizer(source: Path, target: Path, trust_remote_code: bool) -> None:
    """The grammar compiler reads the vocabulary from here; prompts are tokenized by the server itself."""
    import openvino
    from openvino_tokenizers import convert_tokenizer
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(source), trust_remote_code=trust_remote_code)
    tokenizer.save_pretrained(str(target))
    encoder, decoder = convert_tokenizer(tokenizer, with_detokenizer=True)
    openvino.save_model(encoder, str(target / "openvino_tokenizer.xml"))
    openvino.save_model(decoder, str(target / "openvino_detokenizer.xml"))


def main(arguments: list[str]) -> int:
    """Run from the command line; a fourth argument `trust` allows the model's own code."""
    # Python puts a script's folder first on its path, where transformers.py would hide the library of that name.
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # as openvino_quiet does
    source, target, weights, *rest = arguments
    try:
        convert(Path(source), Path(target), weights, "trust" in rest)
    except Exception as error:
        lines = str(error).strip().splitlines()
        print(f"error: {type(error).__name__}: {lines[0] if lines else ''}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
