"""torch.ops.moq.simulate: fake_quantize by control data on the device, and learned step sizes."""

import pytest
import torch
from bits import assert_same_bits
from reference import quantize as reference
from test_fake_quantize import DTYPES, GRANULARITIES, random_weight

import moq  # noqa: F401  (registers the operators)

simulate = torch.ops.moq.simulate
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
