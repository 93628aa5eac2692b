"""Comparison bit for bit, NaN included."""

import torch

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The elements' bit patterns, on the CPU."""
    return tensor.detach().cpu().contiguous().view(INTEGERS[tensor.element_size()])


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    different = bits(actual) != bits(expected)
    assert not different.any(), f"{int(different.sum())} of {different.numel()} elements differ"
