"""torch.ops.moq.quantize, dequantize and the activation quantizers against their definitions."""

import pytest
import torch
from bits import assert_same_bits
from reference import quantize as reference
from test_fake_quantize import DTYPES, GRANULARITIES, MODES, ROUNDINGS, random_weight

import moq  # noqa: F401  (registers the operators)

ops = torch.ops.moq


# ------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("granularity", "group_size"), GRANULARITIES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("num_bits", [4, 8, 13])
def test_codes_scales_and_zero_points_are_those_of_the_definition(
    device, num_bits, mode, granularity, group_size, dtype, rounding, transposed
):
    weight = random_weight(28, 48, dtype, transposed)
    arguments = dict(
        granularity=granularity,
        group_size=group_size,
        mode=mode,
        rounding=rounding,
        seed=5,
        step=2,
        transposed=transposed,
    )
    actual = ops.quantize(weight.to(device), num_bits, **arguments)
    expected = reference.quantize(weight, num_bits, **arguments)
    for result, wanted in zip(actual, expected, strict=True):
        assert_same_bits(result, wanted)


@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("granularity", "group_size"), GRANULARITIES)
@pytest.mark.parametrize("mode", MODES)
def test_dequantized_codes_are_the_simulated_weight(
    device, mode, granularity, group_size, dtype, transposed
):
    weight = random_weight(28, 48, dtype, transposed).to(device)
    arguments = dict(
        granularity=granularity, group_size=group_size, mode=mode, transposed=transposed
    )
    codes, scales, zero_points = ops.quantize(weight, 8, **arguments)
    restored = ops.dequantize(codes, scales, zero_points, transposed=transposed)
    assert_same_bits(restored, ops.fake_quantize(weight, 8, **arguments))


def test_dequantize_rounds_once_to_the_asked_dtype(device):
    codes, scales, _ = ops.quantize(random_weight(11, 23).to(device), 8)
    actual = ops.dequantize(codes, scales, dtype=torch.bfloat16)
    expected = reference.dequantize(codes.cpu(), scales.cpu(), dtype=torch.bfloat16)
    assert_same_bits(actual, expected)


def test_a_bad_group_has_scale_nan_and_codes_zero(device):
    weight = random_weight(3, 20)
    weight[1, 4] = float("nan")
    codes, scales, zero_points = ops.quantize(weight.to(device), 8, mode="asymmetric")
    assert scales.isnan().flatten().tolist() == [False, True, False]
    assert not codes[1].any() and not zero_points[1].any()


def test_codes_have_no_gradient():
    outputs = ops.quantize(random_weight(3, 4).requires_grad_(), 8)
    assert not any(output.requires_grad for output in outputs)


def test_dequantize_says_that_it_has_no_gradient():
    codes, scales, _ = ops.quantize(random_weight(3, 4), 8)
    output = ops.dequantize(codes, scales.requires_grad_())
    with pytest.raises(RuntimeError, match="not implemented"):
        output.sum().backward()


CODES = torch.zeros(4, 6, dtype=torch.int8)
DEQUANTIZE_ERRORS = [
    ((CODES.float(), torch.ones(1)), TypeError, "codes must be int8 or int16, got float32"),
    ((CODES[0], torch.ones(1)), ValueError, "codes must be a matrix"),
    ((CODES, torch.ones(4, 4)), ValueError, r"scales must be \[1\], .* or .* got \[4, 4\]"),
    ((CODES, torch.ones(3, 1)), ValueError, r"scales must be \[1\], .* or .* got \[3, 1\]"),
    ((CODES, torch.ones(1, dtype=torch.float64)), TypeError, "scales must be float32"),
    (
        (CODES, torch.ones(4, 1), torch.zeros(4, 1)),
        TypeError,
        "zero_points must be int32, got float32",
    ),
    (
        (CODES, torch.ones(4, 1), torch.zeros(1, dtype=torch.int32)),
        ValueError,
        "zero_points must have the scales' shape",
    ),
]


@pytest.mark.parametrize(("arguments", "error", "message"), DEQUANTIZE_ERRORS)
def test_dequantize_refuses_what_does_not_fit_together(arguments, error, message):
    with pytest.raises(error, match=f"^dequantize: {message}"):
        ops.dequantize(*arguments)


# ---------------------------------------------------------------------------------- activations


def random_tokens(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(4)).to(dtype)


# Grids of activations: arguments of the operators.
GRIDS = {
    "dynamic": {},
    "static": {"scale": torch.tensor([0.01])},
    "dynamic asymmetric": {"mode": "asymmetric"},
    "static asymmetric": {
        "scale": torch.tensor([0.01]),
        "zero_point": torch.tensor([-37], dtype=torch.int32),
        "mode": "asymmetric",
    },
}


def placed(grid, device):
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in grid.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1,), (3, 1), (2, 5, 37), (7, 384), (0, 8), (4, 0)])
@pytest.mark.parametrize("grid", GRIDS)
def test_activations_give_the_bits_of_the_definition(device, grid, shape, dtype):
    tokens = random_tokens(*shape, dtype=dtype)
    expected = reference.quantize_activation(tokens, **GRIDS[grid])
    simulated = reference.fake_quantize_activation(tokens, **GRIDS[grid])
    on_device = placed(GRIDS[grid], device)
    actual = ops.quantize_activation(tokens.to(device), **on_device)
    for result, wanted in zip(actual, expected, strict=True):
        assert_same_bits(result, wanted)
    assert_same_bits(ops.fake_quantize_activation(tokens.to(device), **on_device), simulated)


@pytest.mark.parametrize("sign", [-1, 1])
def test_a_dynamic_grid_with_a_zero_point_covers_what_lies_on_one_side_of_0(device, sign):
    tokens = sign * (random_tokens(5, 40).abs() + 0.5)
    codes, scales, zero_points = ops.quantize_activation(tokens.to(device), mode="asymmetric")
    assert set(zero_points.flatten().tolist()) == {-128 if sign > 0 else 127}
    levels = (codes.int() - zero_points).abs()
    assert levels.amax(1).tolist() == [255] * 5
    torch.testing.assert_close(scales.cpu() * 255, tokens.abs().amax(1, keepdim=True))


@pytest.mark.parametrize("mode", ["symmetric", "asymmetric"])
def test_a_token_with_a_nan_is_nan_throughout(device, mode):
    tokens = random_tokens(3, 21)
    tokens[1, 20] = float("inf")
    codes, scales, zero_points = ops.quantize_activation(tokens.to(device), mode=mode)
    assert scales.isnan().flatten().tolist() == [False, True, False]
    assert not codes[1].any() and not zero_points[1].any()
    assert ops.fake_quantize_activation(tokens.to(device), mode=mode).isnan().sum() == 21


@pytest.mark.parametrize("scale", [0.0, -0.01, 1e-39, float("inf"), float("nan")])
def test_a_given_scale_without_a_grid_is_refused_or_gives_nan(device, scale):
    tokens = random_tokens(2, 5).to(device)
    given = torch.tensor([scale], device=device)
    if device == "cpu":
        for operator in (ops.quantize_activation, ops.fake_quantize_activation):
            with pytest.raises(
                RuntimeError, match="a given scale must be finite and >= 1.17549e-38"
            ):
                operator(tokens, given)
    else:  # where a check would have to wait for the device
        assert not ops.quantize_activation(tokens, given)[0].any()
        assert ops.fake_quantize_activation(tokens, given).isnan().all()


@pytest.mark.parametrize("zero_point", [-129, 128])
def test_a_given_zero_point_beyond_the_codes_is_refused_or_gives_nan(device, zero_point):
    tokens = random_tokens(2, 5).to(device)
    given = torch.tensor([0.1]).to(device), torch.tensor([zero_point], dtype=torch.int32).to(device)
    if device == "cpu":
        with pytest.raises(RuntimeError, match=r"zero point must lie in \[-128, 127\], got"):
            ops.fake_quantize_activation(tokens, *given, mode="asymmetric")
    else:
        assert ops.fake_quantize_activation(tokens, *given, mode="asymmetric").isnan().all()


def test_strided_tokens_give_what_their_copies_give(device):
    tokens = random_tokens(6, 40).to(device)[:, ::2]
    for actual, expected in zip(
        ops.quantize_activation(tokens), ops.quantize_activation(tokens.clone()), strict=True
    ):
        assert_same_bits(actual, expected)


@pytest.mark.parametrize("grid", GRIDS)
def test_the_int8_linear_multiplies_exactly_these_codes(grid):
    tokens, weight = random_tokens(5, 67) + 0.5, random_weight(29, 67)
    input_codes, input_scales, zero_points = ops.quantize_activation(tokens, **GRIDS[grid])
    codes, scales, _ = ops.quantize(weight, 8)
    products = (input_codes.long() - zero_points) @ codes.long().t()
    expected = products.double() * input_scales.double() * scales.double().t()
    given = {f"input_{key}": v.item() for key, v in GRIDS[grid].items() if key != "mode"}
    mode = f"{grid.replace(' ', '_')}_int8"
    actual = ops.linear(tokens, ops.pack_linear(codes, scales), 29, input_mode=mode, **given)
    # The product of the integers is exact; only the multiplications by the scales round.
    torch.testing.assert_close(actual.double(), expected, rtol=2**-22, atol=0.0)


def test_the_gradient_of_a_dynamic_token_passes_straight_through():
    tokens = random_tokens(3, 5).requires_grad_()
    upstream = random_tokens(3, 5) + 1
    (ops.fake_quantize_activation(tokens) * upstream).sum().backward()
    assert_same_bits(tokens.grad, upstream)


def test_the_gradient_is_zero_where_a_given_scale_clamps():
    tokens = torch.tensor([[-2.0, -1.27, 0.5, 1.27, 1.2801]], requires_grad=True)
    ops.fake_quantize_activation(tokens, torch.tensor([0.01])).sum().backward()
    assert tokens.grad.tolist() == [[0.0, 1.0, 1.0, 1.0, 0.0]]


def test_the_gradient_is_zero_where_a_given_grid_with_a_zero_point_clamps():
    tokens = torch.tensor([[-0.29, -0.28, 0.0, 2.27, 2.28]], requires_grad=True)
    grid = torch.tensor([0.01]), torch.tensor([-100], dtype=torch.int32)
    ops.fake_quantize_activation(tokens, *grid, mode="asymmetric").sum().backward()
    assert tokens.grad.tolist() == [[0.0, 1.0, 1.0, 1.0, 0.0]]


@pytest.mark.parametrize("grid", GRIDS)
def test_activations_are_twice_differentiable(grid):
    tokens = random_tokens(2, 6).clamp(-0.3, 0.5).requires_grad_()
    given = GRIDS[grid]
    (gradient,) = torch.autograd.grad(
        (ops.fake_quantize_activation(tokens, **given) ** 3).sum(), tokens, create_graph=True
    )
    (second,) = torch.autograd.grad(gradient.sum(), tokens)
    torch.testing.assert_close(second, 6 * ops.fake_quantize_activation(tokens, **given).detach())


INT32 = torch.zeros(1, dtype=torch.int32)
ACTIVATION_ERRORS = [
    ((torch.zeros(2, 3, dtype=torch.int8),), TypeError, "input must be float32, .* got int8"),
    ((torch.tensor(1.0),), ValueError, "input must be .* got a scalar"),
    ((torch.zeros(2, 3), torch.ones(2)), ValueError, r"scale must have shape \[1\], got \[2\]"),
    ((torch.zeros(2, 3), torch.ones(1).half()), TypeError, "scale must be float32, got float16"),
    ((torch.zeros(2, 3), torch.ones(1), INT32), ValueError, "zero_point must come with .* got one"),
    ((torch.zeros(2, 3), None, INT32), ValueError, "zero_point must come with .* got one"),
]
ASYMMETRIC_ERRORS = [
    ((torch.zeros(2, 3), torch.ones(1)), ValueError, "zero_point must come with .* got none"),
    ((torch.zeros(2, 3), None, INT32), ValueError, "zero_point must come with .* got one"),
    ((torch.zeros(2, 3), torch.ones(1), torch.ones(1)), TypeError, "zero_point must be int32, got"),
    (
        (torch.zeros(2, 3), torch.ones(1), INT32.repeat(2)),
        ValueError,
        r"zero_point must have shape \[1\], got \[2\]",
    ),
]


@pytest.mark.parametrize("where", ["quantize_activation", "fake_quantize_activation"])
@pytest.mark.parametrize(("arguments", "error", "message"), ACTIVATION_ERRORS)
def test_refuses_activations_and_scales_that_do_not_fit(where, arguments, error, message):
    with pytest.raises(error, match=f"^{where}: {message}"):
        getattr(ops, where)(*arguments)


@pytest.mark.parametrize("where", ["quantize_activation", "fake_quantize_activation"])
@pytest.mark.parametrize(("arguments", "error", "message"), ASYMMETRIC_ERRORS)
def test_refuses_zero_points_that_do_not_fit(where, arguments, error, message):
    with pytest.raises(error, match=f"^{where}: {message}"):
        getattr(ops, where)(*arguments, mode="asymmetric")


@pytest.mark.parametrize("where", ["quantize_activation", "fake_quantize_activation"])
def test_refuses_grids_that_activations_have_not(where):
    with pytest.raises(ValueError, match="mode must be symmetric or asymmetric, got ternary"):
        getattr(ops, where)(torch.zeros(2, 3), mode="ternary")
