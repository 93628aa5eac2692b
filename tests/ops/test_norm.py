"""torch.ops.moq.norm and torch.ops.moq.norm_linear against their definitions."""

import pytest
import torch
from products import assert_is_product, dequantized, random_codes, random_input
from torch.nn import functional as F

import moq  # noqa: F401  (registers the operators)

norm = torch.ops.moq.norm
norm_linear = torch.ops.moq.norm_linear
pack_linear = torch.ops.moq.pack_linear

NORMS = ["layer_norm", "rms_norm"]


def random_norm(hidden_size, kind, device):
    """Weight and bias (of a layer norm) that are not trivial."""
    generator = torch.Generator().manual_seed(3)
    weight = 1 + 0.2 * torch.randn(hidden_size, generator=generator)
    bias = 0.2 * torch.randn(hidden_size, generator=generator) if kind == "layer_norm" else None
    return weight.to(device), None if bias is None else bias.to(device)


def exact_norm(x, weight, bias, kind, epsilon):
    """The definition in float64."""
    x, weight = x.detach().cpu().double(), weight.cpu().double()
    if kind == "layer_norm":
        return F.layer_norm(x, x.shape[1:], weight, bias.cpu().double(), epsilon)
    return F.rms_norm(x, x.shape[1:], weight, epsilon)


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 96), (2, 1000), (17, 4256)])
def test_rows_are_normalised(place, kind, shape):
    x = random_input(*shape, place) * 3 + 1
    weight, bias = random_norm(shape[1], kind, place[0])
    output = norm(x, weight, bias, norm=kind, epsilon=1e-5)
    assert output.dtype == x.dtype and output.shape == x.shape
    expected = exact_norm(x, weight, bias, kind, 1e-5)
    unit = torch.finfo(x.dtype).eps
    torch.testing.assert_close(output.cpu().double(), expected, rtol=unit, atol=5e-6)


def test_a_strided_input_is_read_right(place):
    wide = random_input(5, 100, place)
    weight, bias = random_norm(64, "layer_norm", place[0])
    part = wide[:, 20:84]
    close = {"rtol": torch.finfo(wide.dtype).eps, "atol": 1e-6}  # sums may take another order
    torch.testing.assert_close(
        norm(part, weight, bias), norm(part.contiguous(), weight, bias), **close
    )


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("m", [1, 2, 8, 9, 33])
@pytest.mark.parametrize(("n", "k"), [(37, 105), (96, 512)])
def test_norm_linear_multiplies_the_normalised_rows(place, kind, m, n, k):
    x = random_input(m, k, place) * 2 + 0.5
    codes, scales, _ = random_codes(n, k, 1, 8)
    weight, bias = random_norm(k, kind, place[0])
    packed = pack_linear(codes.to(place[0]), scales.to(place[0]))
    added = torch.linspace(-1, 1, n).to(x)
    output = norm_linear(x, weight, bias, packed, n, norm=kind, epsilon=1e-5, bias=added)
    rows = norm(x, weight, bias, norm=kind, epsilon=1e-5)
    if place[0] == "cpu":
        assert_is_product(output, rows, dequantized(codes, scales), added)
        return
    # A GPU's kernel may round a row otherwise than the norm alone, by one unit in a few places.
    exact = exact_norm(x, weight, bias, kind, 1e-5) @ dequantized(codes, scales).T
    exact += added.cpu().double()
    naive = F.linear(rows.double().cpu(), dequantized(codes, scales), added.double().cpu())
    error = (output.double().cpu() - exact).abs().max()
    rounding = torch.finfo(x.dtype).eps / 2 * exact.abs().max()
    assert error <= 2 * (naive - exact).abs().max() + rounding + 1e-6 * k**0.5


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("m", [1, 8, 9])
@pytest.mark.parametrize(
    "grid",
    [
        {"input_mode": "static_int8", "input_scale": 0.0125},
        {"input_mode": "dynamic_int8"},
        {"input_mode": "static_asymmetric_int8", "input_scale": 0.0125, "input_zero_point": -60},
        {"input_mode": "dynamic_asymmetric_int8"},
    ],
    ids=lambda grid: grid["input_mode"],
)
def test_norm_linear_rounds_what_it_normalised_to_a_grid(place, kind, m, grid):
    x = random_input(m, 105, place) * 2 + 0.5
    codes, scales, _ = random_codes(37, 105, 1, 8)
    weight, bias = random_norm(105, kind, place[0])
    packed = pack_linear(codes.to(place[0]), scales.to(place[0]))
    rows = norm(x, weight, bias, norm=kind)
    output = norm_linear(x, weight, bias, packed, 37, norm=kind, **grid)
    assert torch.equal(output, torch.ops.moq.linear(rows, packed, 37, **grid))


@pytest.mark.parametrize("m", [1, 12])
def test_norm_linear_takes_every_epilogue(place, m):
    x = random_input(m, 64, place)
    codes, scales, _ = random_codes(38, 64, 1, 8)
    packed = pack_linear(codes.to(place[0]), scales.to(place[0]))
    weight, bias = random_norm(64, "layer_norm", place[0])
    residual = random_input(m, 38, place, seed=2)
    rows = exact_norm(x, weight, bias, "layer_norm", 1e-5)
    sums = rows @ dequantized(codes, scales).T
    unit = torch.finfo(x.dtype).eps
    largest = sums.abs().max().item()
    close = {"rtol": 4 * unit, "atol": 4 * unit * largest**2}
    output = (
        norm_linear(x, weight, bias, packed, 38, activation="gelu", residual=residual)
        .cpu()
        .double()
    )
    torch.testing.assert_close(output, F.gelu(sums) + residual.cpu().double(), **close)
    output = norm_linear(x, weight, bias, packed, 38, activation="silu", gated=True)
    expected = F.silu(sums[:, 0::2]) * sums[:, 1::2]
    torch.testing.assert_close(output.cpu().double(), expected, **close)
    output = norm_linear(x, weight, bias, packed, 38, input_mode="dynamic_int8")
    torch.testing.assert_close(output.cpu().double(), sums, rtol=0.05, atol=0.03 * largest)


class TestRefusals:
    def test_norm(self, place):
        x, weight = random_input(2, 8, place), torch.ones(8, device=place[0])
        with pytest.raises(TypeError, match="norm: input must be float32.*, got"):
            norm(x.double(), weight)
        with pytest.raises(ValueError, match="norm: input must be \\[num_tokens, hidden_size\\]"):
            norm(x[0], weight)
        with pytest.raises(ValueError, match="norm must be one of layer_norm, rms_norm, got batch"):
            norm(x, weight, norm="batch")
        with pytest.raises(ValueError, match="norm: weight must be \\[8\\], got \\[7\\]"):
            norm(x, weight[:7])
        with pytest.raises(TypeError, match="norm: weight must be float32, got float64"):
            norm(x, weight.double())
        with pytest.raises(ValueError, match="bias must not come with rms_norm"):
            norm(x, weight, weight, norm="rms_norm")

    def test_norm_linear(self, place):
        x, weight = random_input(2, 8, place), torch.ones(8, device=place[0])
        codes, scales, _ = random_codes(4, 8, 1, 8)
        packed = pack_linear(codes.to(place[0]), scales.to(place[0]))
        with pytest.raises(ValueError, match="norm_linear: norm_weight must be \\[8\\]"):
            norm_linear(x, weight[:7], None, packed, 4)
        with pytest.raises(ValueError, match="norm_linear: norm_bias must not come with rms_norm"):
            norm_linear(x, weight, weight, packed, 4, norm="rms_norm")
        with pytest.raises(ValueError, match="norm_linear: a packed weight of 500 x 8"):
            norm_linear(x, weight, None, packed, 500)

    def test_devices(self, gpu):
        x, weight = random_input(2, 8, (gpu, torch.float16)), torch.ones(8)
        with pytest.raises(ValueError, match="norm: weight must be on cuda:0 .*, got cpu"):
            norm(x, weight)
