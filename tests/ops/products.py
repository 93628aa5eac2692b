"""Weights and inputs of linear layers, their exact product, and how far from it one may be."""

import torch

BITS = {"int8": 8, "int4": 4, "int2": 2}


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
    codes, scales = codes.cpu(), scales.cpu()
    size = codes.shape[1] // scales.shape[1]
    numbers = codes.double()
    if zero_points is not None:
        numbers = numbers - zero_points.cpu().double().repeat_interleave(size, dim=1)
    return numbers * scales.double().repeat_interleave(size, dim=1)


def random_input(m, k, place=("cpu", torch.float32), seed=1):
    """Standard normal numbers of a dtype on a device."""
    device, dtype = place
    numbers = torch.randn(m, k, generator=torch.Generator().manual_seed(seed))
    return numbers.to(device, dtype)


def sum_error(x, weight, bias=None):
    """What float32 sums of x @ weight.T + bias may be off by: as many roundings as terms."""
    magnitude = x.detach().cpu().double().abs() @ weight.abs().T
    if bias is not None:
        magnitude = magnitude + bias.cpu().double().abs()
    return (weight.shape[1] + 2) * 2.0**-24 * magnitude


def assert_is_product(output, x, weight, bias=None):
    """`output` is x @ weight.T + bias (all as they were given to the operator; weight in float64).

    Rounded to its dtype once. On the CPU integer weights are summed exactly, a GPU sums in float32.
    """
    exact = x.detach().cpu().double() @ weight.T
    if bias is not None:
        exact = exact + bias.cpu().double()
    bound = torch.finfo(output.dtype).eps / 2 * exact.abs() + 1e-30
    terms = weight.shape[1] + 2
    bound += sum_error(x, weight, bias) * (2 / terms if output.device.type == "cpu" else 1)
    error = (output.cpu().double() - exact).abs()
    worst = (error / bound).max().item() if error.numel() else 0.0
    assert worst <= 1.01, f"error of {worst:.3g} times the bound"
