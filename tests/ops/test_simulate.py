"""torch.ops.moq.simulate: fake_quantize by control data on the device, and learned step sizes."""

import pytest
import torch
from bits import assert_same_bits
from reference import learned_scale
from reference import quantize as reference
from test_fake_quantize import DTYPES, GRANULARITIES, random_weight

import moq  # noqa: F401  (registers the operators)

simulate = torch.ops.moq.simulate
simulate_gradient = torch.ops.moq.simulate_gradient
simulate_tangent = torch.ops.moq.simulate_tangent
fake_quantize = torch.ops.moq.fake_quantize

GRIDS = [
    dict(),
    dict(mode="asymmetric", rounding="stochastic", seed=5, name_hash=3),
    dict(mode="ternary"),
    dict(mode="binary"),
    dict(scale_rule="mse"),
]


def control(device, num_bits, blend_ratio=None, step=None):
    """Tensors of one element, as the trainer holds them."""
    made = dict(num_bits=torch.tensor([num_bits], dtype=torch.int32, device=device))
    if blend_ratio is not None:
        made["blend_ratio"] = torch.tensor([blend_ratio], device=device)
    if step is not None:
        made["step"] = torch.tensor([step], device=device)
    return made


@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: "_".join(map(str, g.values())) or "plain")
@pytest.mark.parametrize(("granularity", "group_size"), GRANULARITIES)
def test_gives_what_fake_quantize_gives(device, granularity, group_size, grid, transposed):
    weight = random_weight(36, 48, transposed=transposed).to(device)
    arguments = grid | dict(granularity=granularity, group_size=group_size, transposed=transposed)
    for num_bits in (4, 2, *([1] if grid.get("mode") == "binary" else [])):
        expected = fake_quantize(weight, num_bits, step=9, blend_ratio=0.25, **arguments)
        found = simulate(weight, **control(device, num_bits, 0.25, 9), **arguments)
        assert_same_bits(found, expected)


def test_follows_the_width_without_another_call_site(device):
    weight = random_weight(8, 20).to(device)
    num_bits = torch.tensor([8], dtype=torch.int32, device=device)
    for bits in (8, 5, 2):
        num_bits.fill_(bits)
        assert_same_bits(simulate(weight, num_bits), fake_quantize(weight, bits))


def test_the_gradient_of_measured_scales_passes_straight_through(device):
    weight = random_weight(5, 9).to(device).requires_grad_()
    upstream = torch.randn(5, 9, generator=torch.Generator().manual_seed(1)).to(device)
    (simulate(weight, **control(device, 4, 0.5)) * upstream).sum().backward()
    assert_same_bits(weight.grad, upstream)


# ------------------------------------------------------------------------- learned step sizes


def number_of_scales(granularity, group_size, rows, cols):
    return {
        "per_tensor": 1,
        "per_channel": rows,
        "per_group": rows * cols // max(group_size, 1),
        "per_rows": rows // max(group_size, 1),
    }[granularity]


def learned(weight, granularity, group_size, transposed=False, factor=0.7):
    """Ranges that clip some weights of each group."""
    matrix = weight.float().t() if transposed else weight.float()
    groups = matrix.reshape(number_of_scales(granularity, group_size, *matrix.shape), -1)
    return factor * groups.abs().amax(1)


def surrogate(weight, absmax, num_bits, frozen):
    """The learned grid in which rounding adds the constants that it added at `frozen`."""
    qmax = 2 ** (num_bits - 1) - 1
    at_weight, at_absmax = frozen
    groups = [w.reshape(len(a), -1) for w, a in ((weight, absmax), frozen)]
    steps = [a.abs()[:, None] / qmax for a in (absmax, at_absmax)]
    position = groups[1] / steps[1]
    offset = position.round() - position
    inside = position.round().abs() <= qmax
    result = torch.where(inside, groups[0] + steps[0] * offset, steps[0] * qmax * position.sign())
    return result.reshape(at_weight.shape)


@pytest.mark.parametrize("num_bits", [2, 3, 8])
@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize(("granularity", "group_size"), GRANULARITIES)
@pytest.mark.parametrize("blend_ratio", [None, 0.25])
def test_learned_scales_have_the_gradient_of_the_surrogate(
    device, blend_ratio, granularity, group_size, transposed, num_bits
):
    weight = random_weight(8, 32, transposed=transposed)
    absmax = learned(weight, granularity, group_size, transposed)
    upstream = torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))
    on_device = weight.to(device).requires_grad_(), absmax.to(device).requires_grad_()
    output = simulate(
        on_device[0],
        absmax=on_device[1],
        granularity=granularity,
        group_size=group_size,
        transposed=transposed,
        **control(device, num_bits, blend_ratio),
    )
    (output * upstream.to(device)).sum().backward()

    matrix = (weight.t() if transposed else weight).double().contiguous()
    frozen = matrix, absmax.double()
    weights = (upstream.t() if transposed else upstream).double()

    def loss(w, a):
        q = surrogate(w, a, num_bits, frozen)
        r = blend_ratio or 0.0
        return ((r * w + (1 - r) * q) * weights).sum()

    value = (output.detach().cpu().double() * upstream.double()).sum()
    torch.testing.assert_close(value, loss(*frozen), rtol=1e-5, atol=1e-5)
    step = 1e-6
    expected = torch.empty_like(absmax, dtype=torch.float64)
    for i in range(len(absmax)):
        shift = torch.zeros_like(expected)
        shift[i] = step
        up, down = loss(matrix, frozen[1] + shift), loss(matrix, frozen[1] - shift)
        expected[i] = (up - down) / (2 * step)
    torch.testing.assert_close(on_device[1].grad.cpu().double(), expected, rtol=1e-4, atol=1e-4)
    found = on_device[0].grad.cpu().double()
    found = found.t() if transposed else found
    for i, j in [(0, 0), (3, 5), (7, 31), (int(matrix.abs().argmax()) // 32, 1)]:
        shift = torch.zeros_like(matrix)
        shift[i, j] = step
        slope = (loss(matrix + shift, frozen[1]) - loss(matrix - shift, frozen[1])) / (2 * step)
        assert abs(float((found[i, j] - slope).detach())) < 1e-6


def learned_case(shape, granularity, group_size, transposed, dtype):
    """A weight, ranges of both signs that clip some of it, and a gradient of the output."""
    weight = random_weight(*shape, dtype, transposed)
    absmax = learned(weight, granularity, group_size, transposed)
    absmax[::2] *= -1
    incoming = torch.randn(weight.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    arguments = dict(granularity=granularity, group_size=group_size, transposed=transposed)
    return weight, absmax, incoming, arguments


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize(("granularity", "group_size"), GRANULARITIES)
@pytest.mark.parametrize("blend_ratio", [None, 0.3])
@pytest.mark.parametrize("shape", [(8, 16), (36, 1040)])
def test_gradients_are_those_of_the_composition(
    device, shape, blend_ratio, granularity, group_size, transposed, dtype
):
    weight, absmax, incoming, arguments = learned_case(
        shape, granularity, group_size, transposed, dtype
    )
    expected = learned_scale.gradients(
        incoming, weight, absmax, 3, blend_ratio or 0.0, transposed=transposed
    )
    leaf, learned_absmax = weight.to(device).requires_grad_(), absmax.to(device).requires_grad_()
    output = simulate(leaf, absmax=learned_absmax, **control(device, 3, blend_ratio), **arguments)
    output.backward(incoming.to(device))
    assert torch.equal(leaf.grad.cpu(), expected[0])
    # Float32 sums of numbers whose magnitudes add up to no more than this.
    magnitude = float(incoming.float().abs().sum()) * weight.numel() ** -0.5
    torch.testing.assert_close(
        learned_absmax.grad.cpu().double(), expected[1].double(), rtol=1e-5, atol=1e-6 * magnitude
    )


@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize(("granularity", "group_size"), GRANULARITIES)
def test_gradients_have_the_same_bits_on_a_gpu(gpu, granularity, group_size, transposed):
    weight, absmax, incoming, arguments = learned_case(
        (68, 1040), granularity, group_size, transposed, torch.bfloat16
    )
    operands = incoming, weight, torch.tensor([4], dtype=torch.int32), absmax
    found = simulate_gradient(*(t.to(gpu) for t in operands), **arguments)
    expected = simulate_gradient(*operands, **arguments)
    for actual, wanted in zip(found, expected, strict=True):
        assert_same_bits(actual, wanted)


@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize(("granularity", "group_size"), GRANULARITIES)
def test_gradients_have_the_same_bits_on_any_number_of_threads(granularity, group_size, transposed):
    weight, absmax, incoming, arguments = learned_case(
        (260, 1040), granularity, group_size, transposed, torch.bfloat16
    )
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            num_bits = torch.tensor([4], dtype=torch.int32)
            results.append(simulate_gradient(incoming, weight, num_bits, absmax, **arguments))
    finally:
        torch.set_num_threads(threads)
    for found in results[1:]:
        for actual, wanted in zip(found, results[0], strict=True):
            assert_same_bits(actual, wanted)


@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize(("granularity", "group_size"), GRANULARITIES)
@pytest.mark.parametrize("blend_ratio", [None, 0.3])
def test_gradients_are_differentiable_again(
    device, blend_ratio, granularity, group_size, transposed
):
    weight, absmax, incoming, arguments = learned_case(
        (8, 32), granularity, group_size, transposed, torch.float32
    )

    def second(gradients):
        """The gradient, of the incoming one, of a sum that weighs all gradients."""
        leaf = incoming.clone().requires_grad_()
        to_weight, to_absmax = gradients(leaf)
        loss = (to_weight**2).sum() + (to_absmax.sin() * 3).sum()
        return torch.autograd.grad(loss, leaf)[0]

    expected = second(
        lambda leaf: learned_scale.gradients(
            leaf, weight, absmax, 3, blend_ratio or 0.0, transposed=transposed
        )
    )

    def by_autograd(leaf):
        on_device = [t.to(device).requires_grad_() for t in (weight, absmax)]
        output = simulate(
            on_device[0], absmax=on_device[1], **control(device, 3, blend_ratio), **arguments
        )
        found = torch.autograd.grad(output, on_device, leaf.to(device), create_graph=True)
        return [t.cpu() for t in found]

    torch.testing.assert_close(second(by_autograd), expected, rtol=1e-4, atol=1e-5)


def test_the_tangent_is_the_adjoint_of_the_gradient(device):
    weight, absmax, incoming, _ = learned_case((6, 40), "per_channel", 0, False, torch.float32)
    point = [t.to(device) for t in (weight, torch.tensor([3], dtype=torch.int32), absmax)]
    direction = [t.to(device) for t in (torch.randn(6, 40), torch.randn(6))]
    leaf = incoming.to(device).requires_grad_()
    gradients = simulate_gradient(leaf, *point)
    tangents = [t.clone().requires_grad_() for t in direction]
    tangent = simulate_tangent(*tangents, *point)
    left = sum((g.double() * d).sum() for g, d in zip(gradients, direction, strict=True))
    right = (tangent.double() * leaf).sum()
    torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)
    # Each is differentiated by the other.
    (found,) = torch.autograd.grad(left, leaf)
    torch.testing.assert_close(found, tangent.detach(), rtol=1e-5, atol=1e-5)
    for found, wanted in zip(torch.autograd.grad(right, tangents), gradients, strict=True):
        torch.testing.assert_close(found, wanted.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("blend_ratio", [None, 0.5])
def test_a_width_of_zero_passes_the_gradient_through(device, blend_ratio):
    weight = random_weight(5, 9).to(device).requires_grad_()
    absmax = torch.ones(5, device=device, requires_grad=True)
    upstream = torch.randn(5, 9, generator=torch.Generator().manual_seed(1)).to(device)
    output = simulate(weight, absmax=absmax, **control(device, 0, blend_ratio))
    output.backward(upstream)
    assert_same_bits(output, weight)
    assert_same_bits(weight.grad, upstream)
    assert_same_bits(absmax.grad, torch.zeros(5))


def test_gradients_of_strided_weights_and_gradients(device):
    weight, absmax, incoming, _ = learned_case((8, 32), "per_channel", 0, False, torch.float32)
    wide = torch.zeros(8, 64, device=device)
    wide[:, ::2] = weight.to(device)
    leaf = wide[:, ::2].detach().requires_grad_()
    given = absmax.to(device).requires_grad_()
    output = simulate(leaf, absmax=given, **control(device, 3))
    output.backward(incoming.t().contiguous().t().to(device))
    to_weight, to_absmax = learned_scale.gradients(incoming, weight, absmax, 3)
    assert torch.equal(leaf.grad.cpu(), to_weight)
    torch.testing.assert_close(given.grad.cpu().double(), to_absmax.double(), rtol=1e-5, atol=1e-5)
    ones = torch.ones((), device=device).expand(8, 32)  # as .sum().backward() gives it
    found = simulate_gradient(
        ones, weight.to(device), control(device, 3)["num_bits"], absmax.to(device)
    )
    wanted = learned_scale.gradients(torch.ones(8, 32), weight, absmax, 3)
    assert torch.equal(found[0].cpu(), wanted[0])


def test_an_empty_weight_has_empty_gradients(device):
    for shape, scales in (((0, 4), 0), ((3, 0), 3)):
        weight = torch.zeros(shape, device=device, requires_grad=True)
        absmax = torch.ones(scales, device=device, requires_grad=True)
        simulate(weight, absmax=absmax, **control(device, 3)).sum().backward()
        assert weight.grad.shape == shape
        assert_same_bits(absmax.grad, torch.zeros(scales))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_bits", [2, 4, 8])
def test_learned_scales_take_the_place_of_absmax(device, num_bits, dtype):
    weight = random_weight(6, 40, dtype)
    absmax = learned(weight, "per_channel", 0)
    scale = reference.stored_scale(absmax / (2 ** (num_bits - 1) - 1), dtype)[:, None]
    qmax = 2 ** (num_bits - 1) - 1
    codes = (weight.float() * (1.0 / scale)).round().clamp(-qmax, qmax)
    expected = ((codes + 0.0) * scale).to(dtype)  # no zero is negative
    found = simulate(
        weight.to(device), absmax=-absmax.to(device), **control(device, num_bits)
    )  # of its magnitude
    assert_same_bits(found, expected)


@pytest.mark.parametrize("num_bits", [4, 12, 16])
def test_the_gradient_of_a_learned_scale_follows_no_default_dtype(device, num_bits):
    weight = random_weight(4, 16).to(device)
    start = learned(random_weight(4, 16), "per_channel", 0).to(device)

    def gradient():
        absmax = start.clone().requires_grad_()
        simulate(weight, absmax=absmax, **control(device, num_bits)).sum().backward()
        return absmax.grad

    expected = gradient()
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert_same_bits(gradient(), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_negative_range_learns_as_its_magnitude(device):
    weight, absmax = (
        random_weight(4, 16).to(device),
        learned(random_weight(4, 16), "per_channel", 0),
    )
    gradients = []
    for sign in (1.0, -1.0):
        given = (sign * absmax.to(device)).requires_grad_()
        simulate(weight, absmax=given, **control(device, 3)).sum().backward()
        gradients.append(given.grad)
    assert_same_bits(gradients[0], -gradients[1])


# ------------------------------------------------------------------------------------- errors

ABSMAX = torch.ones(3)
ERRORS = [
    (dict(num_bits=torch.tensor([8])), TypeError, "num_bits must be int32, got "),
    (dict(num_bits=torch.zeros(2).int()), ValueError, r"num_bits must .*\[1\], got \[2\]"),
    (dict(blend_ratio=torch.zeros(1).int()), TypeError, "blend_ratio must be float32"),
    (dict(step=torch.zeros(1)), TypeError, "step must be int64"),
    (dict(absmax=torch.ones(4)), ValueError, r"absmax must .*\[3\], got \[4\]"),
    (dict(absmax=ABSMAX, mode="asymmetric"), ValueError, "mode must be symmetric where absmax is"),
    (dict(absmax=ABSMAX, rounding="stochastic"), ValueError, "rounding must be nearest where"),
    (dict(absmax=ABSMAX, scale_rule="mse"), ValueError, "scale_rule must be absmax where absmax"),
    (dict(scale_rule="given"), ValueError, "scale_rule must be absmax or mse, got given"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), ERRORS)
def test_refuses_what_does_not_fit_together(arguments, error, message):
    call = dict(weight=torch.zeros(3, 4), num_bits=torch.tensor([8], dtype=torch.int32))
    with pytest.raises(error, match=f"^simulate: {message}"):
        simulate(**(call | arguments))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(gradient=torch.zeros(3, 5)), ValueError, r"gradient must .*\[3, 4\], got \[3, 5\]"),
        (dict(gradient=torch.zeros(3, 4).half()), TypeError, "gradient must be float32, got "),
        (dict(absmax=torch.ones(4)), ValueError, r"absmax must .*\[3\], got \[4\]"),
        (dict(num_bits=torch.tensor([8])), TypeError, "num_bits must be int32, got "),
        (dict(blend_ratio=torch.zeros(2)), ValueError, r"blend_ratio must .*\[1\], got \[2\]"),
        (dict(granularity="per_group", group_size=3), ValueError, "group_size must divide"),
    ],
)
def test_gradients_refuse_what_does_not_fit_together(change, error, message):
    call = dict(
        gradient=torch.zeros(3, 4),
        weight=torch.zeros(3, 4),
        num_bits=torch.tensor([8], dtype=torch.int32),
        absmax=torch.ones(3),
    )
    with pytest.raises(error, match=f"^simulate_gradient: {message}"):
        simulate_gradient(**(call | change))


def test_tangents_refuse_what_does_not_fit_together():
    point = torch.zeros(3, 4), torch.tensor([8], dtype=torch.int32), torch.ones(3)
    with pytest.raises(ValueError, match=r"^simulate_tangent: weight_tangent must .*\[3, 4\]"):
        simulate_tangent(torch.zeros(4, 4), torch.zeros(3), *point)
    with pytest.raises(ValueError, match=r"^simulate_tangent: absmax_tangent must .*\[3\]"):
        simulate_tangent(torch.zeros(3, 4), torch.zeros(4), *point)
