"""torch.ops.moq.fake_quantize against its definition, bit for bit, and its gradient."""

import pytest
import torch
from bits import assert_same_bits
from reference import quantize as reference

import moq  # noqa: F401  (registers the operators)

fake_quantize = torch.ops.moq.fake_quantize

GRANULARITIES = [("per_tensor", 0), ("per_channel", 0), ("per_group", 16), ("per_rows", 4)]
MODES = ["symmetric", "asymmetric"]
ROUNDINGS = ["nearest", "stochastic"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random_weight(out_features, in_features, dtype=torch.float32, transposed=False, seed=0):
    """A weight with an offset and some zeros, in the storage of a Linear or of a Conv1D."""
    generator = torch.Generator().manual_seed(seed)
    weight = 0.02 * torch.randn(out_features, in_features, generator=generator) + 0.003
    weight[:, ::7] = 0.0
    return (weight.t().contiguous() if transposed else weight).to(dtype)


@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("granularity", "group_size"), GRANULARITIES)
@pytest.mark.parametrize("mode", MODES)
def test_gives_the_bits_of_the_definition(
    device, mode, granularity, group_size, dtype, rounding, transposed
):
    weight = random_weight(36, 48, dtype, transposed)
    arguments = dict(
        granularity=granularity,
        group_size=group_size,
        mode=mode,
        rounding=rounding,
        seed=0x1234567890ABCDEF,
        step=11,
        name_hash=reference.fnv1a("layers.0.weight"),
        transposed=transposed,
    )
    expected = reference.fake_quantize(weight, 8, **arguments)
    assert_same_bits(fake_quantize(weight.to(device), 8, **arguments), expected)


SEARCHES = [
    dict(num_bits=2, mode="ternary"),
    dict(num_bits=3, mode="ternary"),
    dict(num_bits=1, mode="binary"),
    dict(num_bits=2, mode="binary"),
    dict(num_bits=2, scale_rule="mse"),
    dict(num_bits=4, scale_rule="mse", rounding="stochastic", seed=5, step=3, name_hash=7),
    dict(num_bits=3, scale_rule="mse", mode="asymmetric"),
]


@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("granularity", "group_size"), GRANULARITIES)
@pytest.mark.parametrize("search", SEARCHES, ids=lambda s: "_".join(map(str, s.values())))
def test_grids_that_are_searched_give_the_bits_of_the_definition(
    device, search, granularity, group_size, dtype, transposed
):
    weight = random_weight(36, 48, dtype, transposed)
    weight[4] = 0.0
    arguments = search | dict(granularity=granularity, group_size=group_size, transposed=transposed)
    expected = reference.fake_quantize(weight, **arguments)
    assert_same_bits(fake_quantize(weight.to(device), **arguments), expected)


def test_ternary_and_binary_levels_are_those_of_the_papers(device):
    weight = random_weight(8, 400)
    magnitude = weight.abs()
    above = magnitude > 0.7 * magnitude.mean(1, keepdim=True)
    alpha = (magnitude * above).sum(1, keepdim=True) / above.sum(1, keepdim=True)
    ternary = fake_quantize(weight.to(device), 2, mode="ternary").cpu()
    torch.testing.assert_close(ternary, weight.sign() * above * alpha)
    binary = fake_quantize(weight.to(device), 1, mode="binary").cpu()
    torch.testing.assert_close(binary, weight.sign() * magnitude.mean(1, keepdim=True))


def test_the_searched_scale_has_no_larger_error_than_that_of_the_extent(device):
    weight = random_weight(64, 300).to(device)
    for num_bits in (2, 3, 4, 8):
        errors = [
            (fake_quantize(weight, num_bits, scale_rule=rule) - weight).square().sum(1)
            for rule in ("mse", "absmax")
        ]
        assert (errors[0] <= errors[1] * (1 + 1e-3)).all()
        assert num_bits > 4 or errors[0].sum() < 0.9 * errors[1].sum()


@pytest.mark.parametrize("num_bits", range(2, 17))
@pytest.mark.parametrize("mode", MODES)
def test_every_width_gives_the_bits_of_the_definition(device, mode, num_bits):
    weight = random_weight(5, 131)
    expected = reference.fake_quantize(weight, num_bits, mode=mode)
    assert_same_bits(fake_quantize(weight.to(device), num_bits, mode=mode), expected)


@pytest.mark.parametrize("shape", [(1, 1), (0, 5), (7, 1), (1, 1031), (576, 1536)])
def test_every_shape_gives_the_bits_of_the_definition(device, shape):
    weight = random_weight(*shape)
    assert_same_bits(fake_quantize(weight.to(device), 4), reference.fake_quantize(weight, 4))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blends_the_weight_and_its_simulated_value(device, dtype):
    weight = random_weight(19, 35, dtype)
    expected = reference.fake_quantize(weight, 3, blend_ratio=0.7)
    assert_same_bits(fake_quantize(weight.to(device), 3, blend_ratio=0.7), expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("granularity", "group_size"), GRANULARITIES)
def test_a_group_with_a_bad_number_is_nan_throughout(device, granularity, group_size, bad):
    weight = random_weight(4, 32)
    weight[2, 17] = bad
    arguments = dict(granularity=granularity, group_size=group_size)
    expected = reference.fake_quantize(weight, 8, **arguments)
    assert (
        expected.isnan().sum()
        == {"per_tensor": 128, "per_channel": 32, "per_group": 16, "per_rows": 128}[granularity]
    )
    assert_same_bits(fake_quantize(weight.to(device), 8, **arguments), expected)


def test_scales_are_rounded_to_the_asked_dtype_first(device):
    weight = random_weight(8, 40)
    expected = reference.fake_quantize(weight, 8, scale_dtype=torch.bfloat16)
    assert not torch.equal(expected, reference.fake_quantize(weight, 8))
    actual = fake_quantize(weight.to(device), 8, scale_dtype=torch.bfloat16)
    assert_same_bits(actual, expected)


@pytest.mark.parametrize("view", ["slice", "every_second", "expanded"])
def test_views_give_what_their_copies_give(device, view):
    whole = random_weight(24, 60).to(device)
    weight = {
        "slice": whole[3:19, 5:38],
        "every_second": whole[::2, ::2],
        "expanded": whole[:1].expand(6, 60),
    }[view]
    assert_same_bits(fake_quantize(weight, 8), fake_quantize(weight.clone(), 8))


def test_keeps_the_strides_of_a_transposed_weight():
    weight = random_weight(6, 10).t()
    assert fake_quantize(weight, 8).stride() == weight.stride()


@pytest.mark.parametrize("threads", [1, 3])
def test_any_number_of_threads_gives_the_same_bits(threads):
    weight = random_weight(700, 301)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        actual = fake_quantize(weight, 8, rounding="stochastic", seed=3)
    finally:
        torch.set_num_threads(before)
    assert_same_bits(actual, reference.fake_quantize(weight, 8, rounding="stochastic", seed=3))


def test_the_gradient_passes_straight_through(device):
    weight = random_weight(5, 9).to(device).requires_grad_()
    upstream = torch.randn(5, 9, generator=torch.Generator().manual_seed(1)).to(device)
    (fake_quantize(weight, 4) * upstream).sum().backward()
    assert_same_bits(weight.grad, upstream)


def test_the_second_derivative_is_that_of_the_identity_at_the_simulated_weight():
    weight = random_weight(3, 4).requires_grad_()
    loss = (fake_quantize(weight, 8) ** 3).sum()
    (gradient,) = torch.autograd.grad(loss, weight, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), weight)
    torch.testing.assert_close(second, 6 * fake_quantize(weight, 8).detach())


# ------------------------------------------------------------------------------ many weights


def test_many_weights_in_one_call_equal_each_alone(device):
    weights = [random_weight(5 + i, 32, seed=i).to(device) for i in range(9)]
    num_bits = torch.tensor([8, 4, 0, 2, 16, 3, 8, 8, 5], dtype=torch.int32, device=device)
    out = [torch.empty_like(weight, dtype=torch.bfloat16) for weight in weights]
    torch.ops.moq.foreach_fake_quantize(
        weights,
        num_bits,
        rounding="stochastic",
        seed=9,
        step=torch.tensor([4], device=device),
        name_hashes=list(range(9)),
        out=out,
    )
    for i, (weight, bits, actual) in enumerate(zip(weights, num_bits.tolist(), out, strict=True)):
        arguments = dict(rounding="stochastic", seed=9, step=4, name_hash=i)
        alone = fake_quantize(weight, bits, **arguments) if bits else weight
        assert_same_bits(actual, alone.bfloat16())


@pytest.mark.parametrize("view", ["linear", "conv1d", "every_second"])
@pytest.mark.parametrize(("granularity", "group_size"), GRANULARITIES)
def test_weights_can_be_their_own_output(device, granularity, group_size, view):
    whole = random_weight(48, 64).to(device)
    weight = {"linear": whole, "conv1d": whole.t(), "every_second": whole[::2, ::2]}[view]
    arguments = dict(granularity=granularity, group_size=group_size)
    expected = fake_quantize(weight.clone(), 8, **arguments)
    num_bits = torch.tensor([8], dtype=torch.int32, device=device)
    torch.ops.moq.foreach_fake_quantize([weight], num_bits, **arguments, out=[weight])
    assert_same_bits(weight, expected)


def test_autograd_refuses_a_saved_weight_that_foreach_has_overwritten(device):
    weight = random_weight(3, 4).to(device).requires_grad_()
    loss = (weight**2).sum()
    num_bits = torch.tensor([4], dtype=torch.int32, device=device)
    with torch.no_grad():
        torch.ops.moq.foreach_fake_quantize([weight], num_bits, out=[weight])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_foreach_refuses_to_write_over_what_requires_a_gradient():
    weight = random_weight(3, 4).requires_grad_()
    num_bits = torch.tensor([4], dtype=torch.int32)
    with pytest.raises(ValueError, match="out must not require a gradient, got tensor 0 that does"):
        torch.ops.moq.foreach_fake_quantize([weight], num_bits, out=[weight])


def test_a_captured_graph_follows_the_bit_widths(device):
    if device == "cpu":
        pytest.skip("the CPU has no graphs")
    weight = random_weight(40, 70).to(device)
    num_bits = torch.tensor([8], dtype=torch.int32, device=device)
    out = torch.empty_like(weight)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.ops.moq.foreach_fake_quantize([weight], num_bits, granularity="per_tensor", out=[out])
    for bits in (8, 5):
        num_bits.fill_(bits)
        graph.replay()
        assert_same_bits(out, fake_quantize(weight, bits, granularity="per_tensor"))


WEIGHT = torch.zeros(3, 4)
FOREACH_ERRORS = [
    (dict(out=[]), ValueError, "out must have one tensor a weight, got 0 for 1"),
    (dict(out=[torch.zeros(4, 3).t()]), ValueError, "out must have its weight's shape and strides"),
    (dict(out=[WEIGHT.int()]), TypeError, "out must be float32, .* got int32"),
    (dict(num_bits=torch.tensor([8])), TypeError, "num_bits must be int32, got int64"),
    (dict(num_bits=torch.zeros(2).int()), ValueError, r"num_bits must have shape \[1\], got \[2\]"),
    (dict(step=torch.zeros(1)), TypeError, "step must be int64, got float32"),
    (dict(step=torch.zeros(2).long()), ValueError, r"step must have one element, got \[2\]"),
    (dict(name_hashes=[1, 2]), ValueError, "name_hashes must have one hash a weight, got 2 for 1"),
    (dict(weights=[WEIGHT[0]], out=[WEIGHT[0]]), ValueError, "weight must be a matrix"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), FOREACH_ERRORS)
def test_foreach_refuses_what_does_not_fit_together(arguments, error, message):
    call = dict(
        weights=[WEIGHT], num_bits=torch.tensor([8], dtype=torch.int32), out=[WEIGHT.clone()]
    )
    with pytest.raises(error, match=f"^foreach_fake_quantize: {message}"):
        torch.ops.moq.foreach_fake_quantize(**(call | arguments))


def test_foreach_refuses_a_bit_width_without_a_grid():
    with pytest.raises(
        RuntimeError, match=r"num_bits of tensor 0 must be 0 or in \[2, 16\], got 1"
    ):
        torch.ops.moq.foreach_fake_quantize(
            [WEIGHT], torch.tensor([1], dtype=torch.int32), out=[WEIGHT.clone()]
        )


# ------------------------------------------------------------------------------------- errors

ERRORS = [
    (dict(num_bits=1), ValueError, r"num_bits must be in \[2, 16\], got 1"),
    (dict(num_bits=17), ValueError, r"num_bits must be in \[2, 16\], got 17"),
    (dict(granularity="per_row"), ValueError, "granularity must be .* got per_row"),
    (dict(num_bits=1, mode="ternary"), ValueError, r"num_bits must be in \[2, 16\], got 1"),
    (dict(num_bits=0, mode="binary"), ValueError, r"num_bits must be in \[1, 16\], got 0"),
    (dict(mode="quaternary"), ValueError, "mode must be .* or binary, got quaternary"),
    (
        dict(mode="ternary", rounding="stochastic"),
        ValueError,
        "rounding must be nearest for ternary and binary codes, which are signs, got stochastic",
    ),
    (dict(scale_rule="max"), ValueError, "scale_rule must be absmax, mse or given, got max"),
    (dict(scale_rule="given"), ValueError, "scale_rule must be absmax or mse, got given"),
    (
        dict(granularity="per_rows", group_size=4),
        ValueError,
        "group_size must divide the output features, got 4 and 6",
    ),
    (dict(rounding="up"), ValueError, "rounding must be nearest or stochastic, got up"),
    (
        dict(granularity="per_group", group_size=5),
        ValueError,
        "group_size must divide the input features, got 5 and 12",
    ),
    (
        dict(granularity="per_group"),
        ValueError,
        "group_size must divide the input features, got 0 and 12",
    ),
    (
        dict(group_size=4),
        ValueError,
        "group_size belongs to granularity per_group and per_rows, got 4",
    ),
    (dict(blend_ratio=1.5), ValueError, r"blend_ratio must be in \[0, 1\], got 1.5"),
    (dict(name_hash=1 << 32), ValueError, "name_hash must be a 32-bit hash"),
    (dict(scale_dtype=torch.float64), TypeError, "scale_dtype must be float32, .* got float64"),
]


@pytest.mark.parametrize("where", ["fake_quantize", "quantize"])
@pytest.mark.parametrize(("arguments", "error", "message"), ERRORS)
def test_refuses_arguments_out_of_range(where, arguments, error, message):
    if where == "quantize" and "blend_ratio" in arguments:
        pytest.skip("quantize has no blend_ratio")
    operator = getattr(torch.ops.moq, where)
    with pytest.raises(error, match=f"^{where}: {message}"):
        operator(random_weight(6, 12), **({"num_bits": 8} | arguments))


def test_refuses_what_is_no_matrix():
    with pytest.raises(ValueError, match="weight must be a matrix .* got 3 dimensions"):
        fake_quantize(torch.zeros(2, 3, 4), 8)


def test_refuses_integers():
    with pytest.raises(TypeError, match="weight must be float32, float16 or bfloat16, got int32"):
        fake_quantize(torch.zeros(2, 3, dtype=torch.int32), 8)
