"""torch.ops.moq.pack_linear and torch.ops.moq.linear against their definition."""

import pytest
import torch
from products import (
    BITS,
    assert_is_product,
    dequantized,
    random_codes,
    random_input,
    sum_error,
)
from torch.nn import functional as F

import moq  # noqa: F401  (registers the operators)

pack_linear = torch.ops.moq.pack_linear
linear = torch.ops.moq.linear

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def packed_int8(n, k, device="cpu"):
    """An INT8 weight, packed, and the numbers that it stands for."""
    codes, scales, _ = random_codes(n, k, 1, 8)
    return pack_linear(codes.to(device), scales.to(device)), dequantized(codes, scales)


def dynamic_int8(x, asymmetric=False):
    """Each row on the 8-bit grid of its own absmax, or of its extent with a zero point."""
    if not asymmetric:
        scale = x.abs().amax(dim=1, keepdim=True) / 127
        return torch.round(x * (1 / scale)).clamp(-127, 127).double() * scale.double()
    lowest = x.amin(dim=1, keepdim=True).clamp(max=0)
    scale = (x.amax(dim=1, keepdim=True).clamp(min=0) - lowest) / 255
    zero_point = torch.round(-128 - lowest * (1 / scale)).clamp(-128, 127)
    codes = (torch.round(x * (1 / scale)) + zero_point).clamp(-128, 127)
    return (codes - zero_point).double() * scale.double()


@pytest.mark.parametrize("format", BITS)
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize(
    ("m", "n", "k", "groups"),
    [(1, 1, 1, 1), (3, 37, 105, 3), (13, 96, 576, 1), (2, 65, 512, 16), (40, 130, 256, 2)],
)
def test_the_input_is_multiplied_as_it_is(place, format, asymmetric, m, n, k, groups):
    device = place[0]
    codes, scales, zero_points = random_codes(n, k, groups, BITS[format])
    zero_points = zero_points if asymmetric else None
    x = random_input(m, k, place)
    packed = pack_linear(
        codes.to(device),
        scales.to(device),
        zero_points.to(device) if asymmetric else None,
        format=format,
    )
    output = linear(x, packed, n, format=format, group_size=k // groups, asymmetric=asymmetric)
    assert output.dtype == x.dtype and output.device == x.device
    assert_is_product(output, x, dequantized(codes, scales, zero_points))


@pytest.mark.parametrize("format", BITS)
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("weight_asymmetric", [False, True])
@pytest.mark.parametrize(("m", "groups"), [(3, 1), (1, 3), (29, 5), (200, 1)])
def test_dynamic_int8_input_is_multiplied_as_its_codes(
    place, format, asymmetric, weight_asymmetric, m, groups
):
    codes, scales, zero_points = random_codes(37, 105, groups, BITS[format])
    zero_points = zero_points if weight_asymmetric else None
    x = random_input(m, 105, place) + 0.5
    on_device = [None if t is None else t.to(place[0]) for t in (codes, scales, zero_points)]
    packed = pack_linear(*on_device, format=format)
    output = linear(
        x,
        packed,
        37,
        format=format,
        group_size=105 // groups,
        asymmetric=weight_asymmetric,
        input_mode="dynamic_asymmetric_int8" if asymmetric else "dynamic_int8",
    )
    weight = dequantized(codes, scales, zero_points)
    assert_is_product(output, dynamic_int8(x.float().cpu(), asymmetric), weight)


@pytest.mark.parametrize("format", BITS)
@pytest.mark.parametrize("zero_point", [None, -128, -37, 127])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (3, 37, 105), (21, 96, 512), (150, 70, 64)])
def test_static_int8_input_is_multiplied_as_the_codes_that_training_sees(
    place, format, zero_point, m, n, k
):
    codes, scales, _ = random_codes(n, k, 1, BITS[format])
    x = random_input(m, k, place)  # the largest are clipped
    packed = pack_linear(codes.to(place[0]), scales.to(place[0]), format=format)
    scale = torch.tensor([0.015], device=place[0])
    mode = "static_int8" if zero_point is None else "static_asymmetric_int8"
    arguments = {"input_mode": mode, "input_scale": scale.item(), "input_zero_point": zero_point}
    output = linear(x, packed, n, format=format, **arguments)
    offset = 0 if zero_point is None else zero_point
    grid = [] if zero_point is None else [torch.tensor([zero_point], device=place[0]).int()]
    trained, _, _ = torch.ops.moq.quantize_activation(
        x, scale, *grid, mode="symmetric" if zero_point is None else "asymmetric"
    )
    assert trained.abs().max() >= 127 or m * k == 1
    shifted = (trained.double() - offset) * scale.double()
    assert_is_product(output, shifted, dequantized(codes, scales))


@pytest.mark.parametrize("m", [1, 12])
@pytest.mark.parametrize("zero_point", [None, 31])
def test_a_static_grid_limits_infinities_and_a_nan_spoils_its_row_alone(place, m, zero_point):
    packed, weight = packed_int8(37, 64, place[0])
    x = random_input(m, 64, place)
    x[0, 3], x[0, 5] = torch.inf, -torch.inf
    mode = "static_int8" if zero_point is None else "static_asymmetric_int8"
    static = {"input_mode": mode, "input_scale": 0.03125, "input_zero_point": zero_point}
    output = linear(x, packed, 37, **static)
    lowest, highest = (-127, 127) if zero_point is None else (-128 - zero_point, 127 - zero_point)
    limited = (x.double() / 0.03125).round().clamp(lowest, highest) * 0.03125
    assert_is_product(output, limited, weight)
    x[0, 7] = torch.nan
    spoilt = linear(x, packed, 37, **static)
    assert spoilt[0].isnan().all()
    assert torch.equal(spoilt[1:], output[1:])


@pytest.mark.parametrize("mode", ["dynamic_asymmetric_int8", "static_asymmetric_int8"])
def test_a_row_of_an_int8_input_with_a_zero_point_does_not_depend_on_the_others(device, mode):
    packed, _ = packed_int8(70, 200, device)
    x = (random_input(40, 200) + 0.5).to(device)
    static = {"input_scale": 0.02, "input_zero_point": 9} if mode.startswith("static") else {}
    whole = linear(x, packed, 70, input_mode=mode, **static)
    for rows in (1, 2, 3, 5, 11, 12, 23):
        part = linear(x[:rows], packed, 70, input_mode=mode, **static)
        if device == "cpu":
            assert torch.equal(part, whole[:rows])
        else:  # kernels of few and of many rows sum in orders of their own
            torch.testing.assert_close(part, whole[:rows], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("format", DTYPES)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (5, 37, 105), (29, 96, 576)])
def test_float_weights_are_multiplied_in_float32(place, format, m, n, k):
    weight = random_input(n, k).to(place[0], DTYPES[format])
    x = random_input(m, k, place)
    output = linear(x, pack_linear(weight, format=format), n, format=format)
    exact = x.double().cpu() @ weight.double().cpu().T
    # The plain float32 sum, one product after the other, sets the size of the error.
    plain = torch.zeros(m, n)
    for column in range(k):
        plain += x[:, column : column + 1].float().cpu() * weight[:, column].float().cpu()
    rounding = torch.finfo(x.dtype).eps / 2 * exact.abs().max()
    error = (output.double().cpu() - exact).abs().max()
    assert error <= 2 * (plain - exact).abs().max() + rounding + 1e-7


def test_bias_activation_and_residual_come_in_this_order(place):
    x, residual = random_input(3, 64, place), random_input(3, 37, place, seed=2)
    packed, weight = packed_int8(37, 64, place[0])
    bias = torch.linspace(-1, 1, 37).to(x)
    sums = x.double().cpu() @ weight.T + bias.double().cpu()
    output = linear(x, packed, 37, bias=bias, activation="gelu", residual=residual)
    expected = F.gelu(sums) + residual.double().cpu()
    unit = torch.finfo(x.dtype).eps
    off = 2 * sum_error(x, weight, bias).max().item()
    torch.testing.assert_close(output.double().cpu(), expected, rtol=unit, atol=1e-6 + off)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("m", [1, 3, 21])
def test_gated_multiplies_the_activated_gate_by_up(place, m, activation):
    x = random_input(m, 64, place)
    packed, weight = packed_int8(74, 64, place[0])
    bias = torch.linspace(-1, 1, 74).to(x)
    sums = x.double().cpu() @ weight.T + bias.double().cpu()
    gate, up = sums[:, 0::2], sums[:, 1::2]
    expected = (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * up
    output = linear(x, packed, 74, bias=bias, activation=activation, gated=True)
    unit = torch.finfo(x.dtype).eps
    off = 2 * sum_error(x, weight, bias).max().item() * sums.abs().max().item()
    torch.testing.assert_close(output.double().cpu(), expected, rtol=unit, atol=2e-6 + off)


def test_the_output_may_be_float32(place):
    x = random_input(3, 64, place)
    packed, weight = packed_int8(37, 64, place[0])
    output = linear(x, packed, 37, dtype=torch.float32)
    assert output.dtype == torch.float32
    assert_is_product(output, x, weight)


def test_a_transposed_weight_packs_to_the_same_bytes(device):
    codes, scales, _ = (t.to(device) for t in random_codes(37, 64, 1, 8))
    assert torch.equal(pack_linear(codes.T.contiguous().T, scales), pack_linear(codes, scales))


def test_a_strided_input_is_read_right(place):
    packed, _ = packed_int8(37, 64, place[0])
    x = random_input(64, 6, place)
    assert torch.equal(linear(x.T, packed, 37), linear(x.T.contiguous(), packed, 37))
    wide = random_input(5, 100, place)
    part = wide[:, 20:84]
    unit = torch.finfo(x.dtype).eps
    torch.testing.assert_close(
        linear(part, packed, 37), linear(part.contiguous(), packed, 37), rtol=unit, atol=1e-5
    )


def test_a_row_of_a_batch_equals_the_row_alone_bit_for_bit():
    packed, _ = packed_int8(97, 300)
    x = random_input(50, 300)
    together = linear(x, packed, 97)
    for i in (0, 1, 2, 3, 48, 49):
        assert torch.equal(linear(x[i : i + 1], packed, 97)[0], together[i])


def test_one_graph_serves_other_numbers(gpu):
    packed, weight = packed_int8(96, 64, gpu)
    x = torch.zeros(2, 64, dtype=torch.float16, device=gpu)
    linear(x, packed, 96)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = linear(x, packed, 96, weight_is_ready=True)
    x.copy_(random_input(2, 64))
    graph.replay()
    assert_is_product(output, x, weight)


class ProductDataset(torch.utils.data.Dataset):
    """Multiplies by a packed weight in the process that loads an element."""

    def __init__(self, packed, x):
        self.packed, self.x = packed, x

    def __len__(self):
        return 4

    def __getitem__(self, index):
        torch.set_num_threads(2)
        return linear(self.x, self.packed, 300)


def test_forked_data_loader_workers_can_multiply():
    packed, _ = packed_int8(300, 1000)
    x = random_input(4, 1000)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    expected = linear(x, packed, 300)  # the parent's pool exists before the fork
    torch.set_num_threads(threads)
    loader = torch.utils.data.DataLoader(
        ProductDataset(packed, x),
        batch_size=None,
        num_workers=2,
        timeout=60,
        multiprocessing_context="fork",
    )
    for product in loader:
        assert torch.equal(product, expected)


def test_says_that_it_has_no_gradient(place):
    packed, _ = packed_int8(37, 64, place[0])
    x = random_input(3, 64, place).requires_grad_()
    with pytest.raises(RuntimeError, match="moq::linear.* not implemented"):
        linear(x, packed, 37).sum().backward()


class TestWrongOrder:
    """A weight that was packed on another device is refused, wherever it lies now."""

    def test_packed_on_the_cpu(self, gpu):
        packed, _ = packed_int8(37, 64)
        x = random_input(3, 64, (gpu, torch.float16))
        with pytest.raises(ValueError, match="packed on cuda, got a weight packed on the CPU; .*"):
            linear(x, packed.to(gpu), 37)

    def test_packed_on_a_gpu(self, gpu):
        packed, _ = packed_int8(37, 64, gpu)
        with pytest.raises(ValueError, match="packed on cpu, got a weight packed on a GPU; .*"):
            linear(random_input(3, 64), packed.cpu(), 37)

    def test_lies_elsewhere(self, gpu):
        packed, _ = packed_int8(37, 64)
        x = random_input(3, 64, (gpu, torch.float16))
        with pytest.raises(ValueError, match="linear: packed must be on cuda:0 .*, got cpu"):
            linear(x, packed, 37)

    def test_is_known_while_tracing(self):
        """A traced tensor's packed size is that of the device it stands for."""
        from torch._subclasses.fake_tensor import FakeTensorMode

        packed, _ = packed_int8(37, 64)
        with FakeTensorMode():
            codes = torch.empty(37, 64, dtype=torch.int8)
            assert pack_linear(codes, torch.empty(37, 1)).shape == packed.shape
            if moq._C.build_info()["cuda_architectures"] is not None:
                on_gpu = torch.empty(37, 64, dtype=torch.int8, device="cuda")
                lines = pack_linear(on_gpu, torch.empty(37, 1, device="cuda"))
                assert lines.dim() == 2 and lines.device.type == "cuda"
                x = torch.empty(3, 64, dtype=torch.float16, device="cuda")
                assert linear(x, lines, 37).dtype == torch.float16
                assert linear(x, lines, 37, dtype=torch.float32).dtype == torch.float32


class TestRefusals:
    """Every documented error, with what it names."""

    def test_pack_linear(self, device):
        codes, scales, zero_points = (t.to(device) for t in random_codes(4, 8, 2, 8))
        with pytest.raises(ValueError, match="format must be one of int8, int4"):
            pack_linear(codes, scales, format="int3")
        with pytest.raises(TypeError, match="weight must be int8 for format int8, got float32"):
            pack_linear(codes.float(), scales)
        with pytest.raises(ValueError, match="integer formats need scales"):
            pack_linear(codes)
        with pytest.raises(ValueError, match="float formats have none"):
            pack_linear(codes.float(), scales, format="float32")
        with pytest.raises(ValueError, match="only integer formats have zero points"):
            pack_linear(codes.float(), None, zero_points, format="float32")
        with pytest.raises(ValueError, match="scales must be \\[4, groups\\]"):
            pack_linear(codes, scales[:3])
        with pytest.raises(ValueError, match="must divide the columns, got 3 and 8"):
            pack_linear(codes, torch.ones(4, 3, device=device))
        with pytest.raises(TypeError, match="scales must be float32, got float64"):
            pack_linear(codes, scales.double())
        with pytest.raises(ValueError, match="zero_points must have the shape of scales"):
            pack_linear(codes, scales, zero_points[:, :1])

    def test_pack_linear_looks_at_codes_on_the_cpu(self):
        codes, scales, _ = random_codes(4, 8, 2, 8)
        with pytest.raises(RuntimeError, match="codes must be in \\[-8, 7\\] for int4"):
            pack_linear(torch.full_like(codes, 8), scales, format="int4")

    def test_linear(self, place):
        packed, _ = packed_int8(4, 8, place[0])
        x = random_input(2, 8, place)
        with pytest.raises(TypeError, match="input must be float32.*, got"):
            linear(x.double(), packed, 4)
        with pytest.raises(ValueError, match="input must be \\[m, k\\]"):
            linear(x[0], packed, 4)
        with pytest.raises(ValueError, match="a packed weight of 400 x 8 in int8 has"):
            linear(x, packed, 400)
        with pytest.raises(TypeError, match="packed must be what pack_linear returned"):
            linear(x, packed.to(torch.int8), 4)
        with pytest.raises(ValueError, match="packed must be contiguous, got strides"):
            linear(x, packed[:1].expand(packed.shape), 4)
        with pytest.raises(ValueError, match="bias must be \\[4\\]"):
            linear(x, packed, 4, bias=torch.zeros(5).to(x))
        with pytest.raises(TypeError, match="bias must be .*, got float64"):
            linear(x, packed, 4, bias=torch.zeros(4).to(x).double())
        with pytest.raises(ValueError, match="residual must be \\[2, 4\\]"):
            linear(x, packed, 4, residual=torch.zeros(1, 4).to(x))
        with pytest.raises(ValueError, match="activation must be one of none, relu"):
            linear(x, packed, 4, activation="swish")
        with pytest.raises(ValueError, match="input_mode must be one of float32, dynamic_int8"):
            linear(x, packed, 4, input_mode="int8")
        with pytest.raises(ValueError, match="residual must not come with gated"):
            linear(x, packed, 4, gated=True, residual=torch.zeros(2, 4).to(x))
        with pytest.raises(TypeError, match="dtype must be float32 or the input's .*, got float64"):
            linear(x, packed, 4, dtype=torch.float64)
        with pytest.raises(ValueError, match="input_mode must be float32 with a float weight"):
            floats = pack_linear(torch.zeros(4, 8).to(place[0]), format="float32")
            linear(x, floats, 4, format="float32", input_mode="dynamic_int8")

    def test_linear_gated(self, device):
        packed, _ = packed_int8(3, 8, device)
        with pytest.raises(ValueError, match="out_features must be even to be gated, got 3"):
            linear(random_input(2, 8).to(device), packed, 3, gated=True)

    def test_static_grids(self, device):
        packed, _ = packed_int8(4, 8, device)
        x = random_input(2, 8).to(device)
        message = "linear: input_scale must be finite and >= 1.17549e-38 for static_int8, got "
        with pytest.raises(ValueError, match=message + "0"):
            linear(x, packed, 4, input_mode="static_int8")
        for scale in (-1.0, 1e-39, torch.inf, torch.nan):
            with pytest.raises(ValueError, match=message):
                linear(x, packed, 4, input_mode="static_int8", input_scale=scale)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (
                {"input_mode": "static_asymmetric_int8", "input_scale": 0.5},
                "input_zero_point must come with static_asymmetric_int8, and only then, got none",
            ),
            (
                {"input_mode": "static_int8", "input_scale": 0.5, "input_zero_point": 3},
                "and only then, got one with static_int8",
            ),
            (
                {"input_mode": "dynamic_asymmetric_int8", "input_zero_point": 3},
                "and only then, got one with dynamic_asymmetric_int8",
            ),
            (
                {
                    "input_mode": "static_asymmetric_int8",
                    "input_scale": 0.5,
                    "input_zero_point": 128,
                },
                r"input_zero_point must lie in \[-128, 127\], got 128",
            ),
        ],
    )
    def test_zero_points(self, device, arguments, message):
        packed, _ = packed_int8(4, 8, device)
        with pytest.raises(ValueError, match=f"^linear: .*{message}"):
            linear(random_input(2, 8).to(device), packed, 4, **arguments)

    @pytest.mark.parametrize("input_mode", ["float32", "dynamic_int8", "dynamic_asymmetric_int8"])
    def test_a_static_scale_in_another_mode(self, device, input_mode):
        packed, _ = packed_int8(4, 8, device)
        x = random_input(2, 8).to(device)
        arguments = {"input_mode": input_mode, "input_scale": 0.5}
        message = (
            "linear: input_scale must come with static_int8 or static_asymmetric_int8, got 0.5 "
            f"with {input_mode}"
        )
        with pytest.raises(ValueError, match="^" + message):
            linear(x, packed, 4, **arguments)
        with pytest.raises(ValueError, match="^norm_" + message):
            torch.ops.moq.norm_linear(x, torch.ones(8, device=device), None, packed, 4, **arguments)

    def test_float16_on_the_cpu(self):
        packed, _ = packed_int8(4, 8)
        with pytest.raises(TypeError, match="input must be float32 on the CPU, got float16"):
            linear(random_input(2, 8).half(), packed, 4)
