"""8-bit products against the same numbers computed with exact integers."""

from __future__ import annotations

import copy
import platform
from typing import Any

import pytest
import torch

from fastchat_grpc.models.detect import ModelKind
from fastchat_grpc.models.quantization import Int8Linear, WrongProducts, quantize_int8
from fastchat_grpc.models.quantization_plan import fast_instructions
from fastchat_grpc.native import kernels as native
from fastchat_grpc.native.kernels import INT8_INPUTS, Kernels
from fastchat_grpc.native.library import FLAGS, compile_library, find_compiler

FLAGS_OF = {"avx2": ["-mavx2", "-mfma"], "portable": []}


@pytest.fixture(scope="module", params=["native", *FLAGS_OF])
def kernels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    """The kernels as this machine has them, and as processors with less have them."""
    if request.param == "native":
        found = native.kernels()
        if found is None:
            pytest.skip("no C compiler")
        return found
    if platform.machine() != "x86_64":
        pytest.skip("elsewhere the portable code is the native one")
    if request.param == "avx2" and not fast_instructions():
        pytest.skip("the processor has no AVX2")
    compiler = find_compiler()
    if compiler is None:
        pytest.skip("no C compiler")
    path = tmp_path_factory.mktemp("kernels") / f"{request.param}.so"
    compile_library(compiler, path, [flag for flag in FLAGS if flag != "-march=native"] + FLAGS_OF[request.param])
    return Kernels(path)


def grouped(x: torch.Tensor, size: int) -> torch.Tensor:
    padded = torch.nn.functional.pad(x, (0, -x.shape[1] % INT8_INPUTS))
    return padded.view(len(x), -1, size).double()


def quantized(x: torch.Tensor) -> torch.Tensor:
    """What is left of x (rows, inputs) in 8 bits: levels of -127 to 127 of the largest number among 64."""
    groups = grouped(x, 64)
    scale = groups.abs().amax(-1, keepdim=True) / 127
    levels = torch.where(scale > 0, groups / scale, 0.0).round()
    return (levels * scale).flatten(1)[:, : x.shape[1]]


def quantized_for_avx2(weight: torch.Tensor) -> torch.Tensor:
    """Levels of -32 to 32 for each 8 inputs, in multiples of 1 to 255 of a scale for each output."""
    groups = grouped(weight, 8)
    top = groups.abs().amax(-1, keepdim=True)
    unit = top.amax(1, keepdim=True) / (32 * 255)
    scale = (top / (32 * unit) - 1e-3).ceil().clamp(1, 255) * unit
    return ((groups / scale).round().clamp(-32, 32) * scale).flatten(1)[:, : weight.shape[1]]


def weights_of(layer: Int8Linear) -> torch.Tensor:
    """The weights that a layer multiplies by, (outputs, inputs); a row of one number has no rounding."""
    return layer(torch.eye(layer.in_features)).t().double()


@pytest.mark.parametrize(("out", "inputs"), [(32, 64), (96, 192), (7, 64), (50, 100), (1, 1)])
@pytest.mark.parametrize("rows", [1, 2, 5, 6, 7, 8, 9, 13, 32])
def test_products_are_those_of_the_integers(kernels: Kernels, rows: int, out: int, inputs: int) -> None:
    generator = torch.Generator().manual_seed(rows * 1000 + out)
    x = torch.randn(rows, inputs, generator=generator) * torch.logspace(-2, 2, rows)[:, None]
    weight, bias = torch.randn(out, inputs, generator=generator), torch.randn(out, generator=generator)
    expected = quantized(x) @ weights_of(Int8Linear(weight, None, kernels)).t() + bias
    torch.testing.assert_close(Int8Linear(weight, bias, kernels)(x).double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("out", "inputs"), [(32, 64), (50, 100), (96, 640)])
def test_weights_are_rounded_to_their_levels(kernels: Kernels, out: int, inputs: int) -> None:
    weight = torch.randn(out, inputs, generator=torch.Generator().manual_seed(out))
    kept = weights_of(Int8Linear(weight, None, kernels))
    assert any(torch.allclose(kept, f(weight), rtol=1e-5, atol=1e-6) for f in (quantized, quantized_for_avx2))


def test_portable_weights_have_8_bits(kernels: Kernels, request: pytest.FixtureRequest) -> None:
    if request.node.callspec.params["kernels"] != "portable":
        pytest.skip("the processor decides")
    weight = torch.randn(64, 192)
    kept = weights_of(Int8Linear(weight, None, kernels))
    torch.testing.assert_close(kept, quantized(weight), rtol=1e-5, atol=1e-6)


def test_weights_that_do_not_stand_row_by_row_are_packed(kernels: Kernels) -> None:
    weight, x = torch.randn(64, 32), torch.randn(3, 64)
    packed = kernels.pack_int8(weight.t())
    assert torch.equal(kernels.multiply_int8(x, packed), Int8Linear(weight.t().contiguous(), None, kernels)(x))


def test_weights_stay_within_two_hundredths(kernels: Kernels) -> None:
    weight = torch.randn(96, 640) * torch.logspace(-3, 3, 96)[:, None]
    kept = weights_of(Int8Linear(weight, None, kernels))
    assert ((kept - weight).norm(dim=1) / weight.norm(dim=1)).max() < 0.02
    assert ((kept - weight).abs().amax(1) / weight.abs().amax(1)).max() < 1 / 60


def test_the_largest_products_do_not_overflow(kernels: Kernels) -> None:
    for x, weight in ((1.0, 1.0), (1.0, -1.0), (-1.0, 1.0), (-1.0, -1.0)):
        layer = Int8Linear(torch.full((32, 1024), weight), None, kernels)
        torch.testing.assert_close(layer(torch.full((9, 1024), x)), torch.full((9, 32), 1024 * x * weight))


def test_a_row_gives_the_same_bits_whatever_stands_beside_it(kernels: Kernels) -> None:
    layer = Int8Linear(torch.randn(64, 128), None, kernels)
    x = torch.randn(40, 128)
    together = layer(x)
    for i in range(len(x)):
        assert torch.equal(layer(x[i : i + 1])[0], together[i])


def test_an_outlier_spoils_its_own_group_only(kernels: Kernels) -> None:
    weight, x = torch.randn(32, 128), torch.randn(4, 128)
    x[:, 3] = 10_000.0
    weight[:, :64] = 0.0
    error = (Int8Linear(weight, None, kernels)(x) - x @ weight.t()).norm() / (x @ weight.t()).norm()
    assert error < 0.02


def test_shapes_beyond_a_matrix_and_strided_inputs_are_taken(kernels: Kernels) -> None:
    layer = Int8Linear(torch.randn(32, 64), None, kernels)
    x = torch.randn(2, 3, 128)
    assert torch.equal(layer(x[..., :64]), layer(x[..., :64].contiguous()))
    assert layer(x[..., ::2]).shape == (2, 3, 32)
    assert layer(torch.zeros(2, 64)).eq(0).all()


def test_a_matrix_of_zeros_stays_one(kernels: Kernels) -> None:
    assert Int8Linear(torch.zeros(32, 64), None, kernels)(torch.randn(3, 64)).eq(0).all()


def test_a_layer_that_computes_something_else_is_no_layer_to_serve(kernels: Kernels, monkeypatch: Any) -> None:
    """A compiler or processor that nobody tried may get it wrong: float32 says what is right."""
    multiply = Kernels.multiply_int8
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(128, 96))
    for wrong in (
        lambda self, x, weights: multiply(self, x, weights).flip(1),
        lambda self, x, weights: torch.full_like(multiply(self, x, weights), float("nan")),
        # Right for a single row, and not from the fifth on.
        lambda self, x, weights: multiply(self, x, weights) * (torch.arange(len(x)) < 4)[:, None],
    ):
        monkeypatch.setattr(Kernels, "multiply_int8", wrong)
        with pytest.raises(WrongProducts, match=r"\(96, 128\) in 8 bits is off by"):
            quantize_int8(copy.deepcopy(model), kernels)
    monkeypatch.setattr(Kernels, "multiply_int8", multiply)
    quantize_int8(model, kernels)


def test_wrong_products_are_an_error_of_loading(kernels: Kernels, monkeypatch: Any) -> None:
    from fastchat_grpc.models.cpu import Unsuitable, speed_up
    from tests.unit.engine.tiny import tiny

    monkeypatch.setattr(Kernels, "multiply_int8", lambda self, x, weights: torch.zeros(len(x), weights.outputs))
    with pytest.raises(Unsuitable, match="off by 1"):
        speed_up(tiny("llama"), ModelKind.DECODER, int8=True, avoid=frozenset())
