"""torch.ops.moq.pack_linear and torch.ops.moq.linear against their definition."""

import pytest
import torch

import moq  # noqa: F401  (registers the operators)

pack_linear = torch.ops.moq.pack_linear
linear = torch.ops.moq.linear

BITS = {"int8": 8, "int4": 4, "int2": 2}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def random_codes(n, k, groups, bits, seed=0):
    """Codes [n, k], scales [n, groups] and zero points [n, groups] of one weight."""
    generator = torch.Generator().manual_seed(seed)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    codes = torch.randint(low, high, (n, k), dtype=torch.int8, generator=generator)
    scales = torch.rand(n, groups, generator=generator) * 0.01 + 0.001
    zero_points = torch.randint(low, high, (n, groups), dtype=torch.int32, generator=generator)
    return codes, scales, zero_points


def dequantized(codes, scales, zero_points=None):
    """The weight in float64."""
    size = codes.shape[1] // scales.shape[1]
    numbers = codes.double()
    if zero_points is not None:
        numbers = numbers - zero_points.double().repeat_interleave(size, dim=1)
    return numbers * scales.double().repeat_interleave(size, dim=1)


def random_input(m, k):
    return torch.randn(m, k, generator=torch.Generator().manual_seed(1))


def dynamic_int8(x):
    """Each row on the symmetric 8-bit grid of its own absmax."""
    scale = x.abs().amax(dim=1, keepdim=True) / 127
    return torch.round(x * (1 / scale)).clamp(-127, 127).double() * scale.double()


@pytest.mark.parametrize("format", BITS)
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize(
    ("m", "n", "k", "groups"), [(1, 1, 1, 1), (3, 37, 105, 3), (13, 96, 576, 1), (2, 65, 512, 16)]
)
def test_float32_input_is_multiplied_exactly(format, asymmetric, m, n, k, groups):
    codes, scales, zero_points = random_codes(n, k, groups, BITS[format])
    zero_points = zero_points if asymmetric else None
    x = random_input(m, k)
    packed = pack_linear(codes, scales, zero_points, format=format)
    output = linear(x, packed, n, format=format, group_size=k // groups, asymmetric=asymmetric)
    expected = (x.double() @ dequantized(codes, scales, zero_points).T).float()
    torch.testing.assert_close(output, expected, rtol=2e-7, atol=1e-8 * k)


@pytest.mark.parametrize("format", BITS)
def test_dynamic_int8_input_is_multiplied_as_its_codes(format):
    codes, scales, _ = random_codes(37, 105, 1, BITS[format])
    x = random_input(3, 105)
    output = linear(
        x, pack_linear(codes, scales, format=format), 37, format=format, input_mode="dynamic_int8"
    )
    expected = (dynamic_int8(x) @ dequantized(codes, scales).T).float()
    torch.testing.assert_close(output, expected, rtol=2e-7, atol=1e-9)


def test_static_int8_input_uses_the_given_scale():
    codes, scales, _ = random_codes(37, 105, 1, 8)
    x = random_input(3, 105)
    output = linear(
        x, pack_linear(codes, scales), 37, input_mode="static_int8", input_scale=0.0078125
    )
    quantized = torch.round(x / 0.0078125).clamp(-127, 127).double() * 0.0078125
    expected = (quantized @ dequantized(codes, scales).T).float()
    torch.testing.assert_close(output, expected, rtol=2e-7, atol=1e-9)


@pytest.mark.parametrize("format", DTYPES)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (5, 37, 105), (29, 96, 576)])
def test_float_weights_are_multiplied_in_float32(format, m, n, k):
    weight = random_input(n, k).to(DTYPES[format])
    x = random_input(m, k)
    exact = x.double() @ weight.double().T
    output = linear(x, pack_linear(weight, format=format), n, format=format)
    # The plain float32 sum, one product after the other, sets the size of the error.
    plain = torch.zeros(m, n)
    for column in range(k):
        plain += x[:, column : column + 1] * weight[:, column].float()
    assert (output - exact).abs().max() <= 2 * (plain - exact).abs().max() + 1e-7


def test_bias_activation_and_residual_come_in_this_order():
    codes, scales, _ = random_codes(37, 64, 1, 8)
    x, residual = random_input(3, 64), random_input(3, 37)
    bias = torch.linspace(-1, 1, 37)
    packed = pack_linear(codes, scales)
    plain = linear(x, packed, 37, bias=bias)
    output = linear(x, packed, 37, bias=bias, activation="gelu", residual=residual)
    expected = torch.nn.functional.gelu(plain.double()) + residual.double()
    torch.testing.assert_close(output, expected.float(), rtol=1e-6, atol=1e-6)


def test_a_transposed_weight_packs_to_the_same_bytes():
    codes, scales, _ = random_codes(37, 64, 1, 8)
    assert torch.equal(pack_linear(codes.T.contiguous().T, scales), pack_linear(codes, scales))


def test_a_strided_input_is_read_right():
    codes, scales, _ = random_codes(37, 64, 1, 8)
    x = random_input(64, 6)
    packed = pack_linear(codes, scales)
    assert torch.equal(linear(x.T, packed, 37), linear(x.T.contiguous(), packed, 37))


def test_a_row_of_a_batch_equals_the_row_alone_bit_for_bit():
    codes, scales, _ = random_codes(97, 300, 1, 8)
    x = random_input(50, 300)
    packed = pack_linear(codes, scales)
    together = linear(x, packed, 97)
    for i in (0, 1, 2, 3, 48, 49):
        assert torch.equal(linear(x[i : i + 1], packed, 97)[0], together[i])


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
    codes, scales, _ = random_codes(300, 1000, 1, 8)
    packed, x = pack_linear(codes, scales), random_input(4, 1000)
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


def test_says_that_it_has_no_gradient():
    codes, scales, _ = random_codes(37, 64, 1, 8)
    x = random_input(3, 64).requires_grad_()
    with pytest.raises(RuntimeError, match="moq::linear.* not implemented"):
        linear(x, pack_linear(codes, scales), 37).sum().backward()


def test_opcheck():
    codes, scales, zero_points = random_codes(37, 64, 4, 8)
    torch.library.opcheck(pack_linear.default, (codes, scales, zero_points))
    packed = pack_linear(codes, scales, zero_points)
    arguments = {
        "group_size": 16,
        "asymmetric": True,
        "bias": torch.zeros(37),
        "activation": "relu",
        "residual": torch.zeros(3, 37),
    }
    torch.library.opcheck(linear.default, (random_input(3, 64), packed, 37), arguments)


class TestRefusals:
    """Every documented error, with what it names."""

    def test_pack_linear(self):
        codes, scales, zero_points = random_codes(4, 8, 2, 8)
        with pytest.raises(ValueError, match="format must be one of int8, int4"):
            pack_linear(codes, scales, format="int3")
        with pytest.raises(TypeError, match="weight must be Char for format int8"):
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
            pack_linear(codes, torch.ones(4, 3))
        with pytest.raises(TypeError, match="scales must be float32"):
            pack_linear(codes, scales.double())
        with pytest.raises(ValueError, match="zero_points must have the shape of scales"):
            pack_linear(codes, scales, zero_points[:, :1])
        with pytest.raises(RuntimeError, match="codes must be in \\[-8, 7\\] for int4"):
            pack_linear(torch.full_like(codes, 8), scales, format="int4")

    def test_linear(self):
        codes, scales, _ = random_codes(4, 8, 1, 8)
        packed, x = pack_linear(codes, scales), random_input(2, 8)
        with pytest.raises(TypeError, match="input must be float32, got Double"):
            linear(x.double(), packed, 4)
        with pytest.raises(ValueError, match="input must be \\[m, k\\]"):
            linear(x[0], packed, 4)
        with pytest.raises(ValueError, match="a packed weight of 400 x 8 in int8 has"):
            linear(x, packed, 400)
        with pytest.raises(TypeError, match="packed must be what pack_linear returned"):
            linear(x, codes, 4)
        with pytest.raises(ValueError, match="packed must be contiguous, .* got strides \\[0\\]"):
            linear(x, packed[:1].expand(packed.shape), 4)
        with pytest.raises(ValueError, match="bias must be \\[4\\]"):
            linear(x, packed, 4, bias=torch.zeros(5))
        with pytest.raises(ValueError, match="residual must be \\[2, 4\\]"):
            linear(x, packed, 4, residual=torch.zeros(1, 4))
        with pytest.raises(ValueError, match="activation must be one of none, relu"):
            linear(x, packed, 4, activation="swish")
        with pytest.raises(ValueError, match="input_mode must be one of float32, dynamic_int8"):
            linear(x, packed, 4, input_mode="int8")
        with pytest.raises(
            RuntimeError, match="input_scale must be finite and >= 1.17549e-38, got 0"
        ):
            linear(x, packed, 4, input_mode="static_int8")
