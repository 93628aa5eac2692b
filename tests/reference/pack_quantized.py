"""The stored layout read back with nothing but the words of docs/FORMAT.md: slow and obvious."""

import numpy as np
import torch


def unpack_row(words, num_bits: int, count: int) -> list[int]:
    """Codes of one packed row of unsigned 32-bit words: offset binary, lowest bits first."""
    row = sum(int(word) << (32 * index) for index, word in enumerate(words))
    mask = (1 << num_bits) - 1
    return [((row >> (index * num_bits)) & mask) - (1 << (num_bits - 1)) for index in range(count)]


def unpack(words: torch.Tensor, num_bits: int, columns: int) -> torch.Tensor:
    """Codes [rows, columns] of int32 words [rows, ceil(columns * num_bits / 32)]."""
    unsigned = words.numpy().view(np.uint32)
    return torch.tensor([unpack_row(row, num_bits, columns) for row in unsigned])


def dequantize(tensors: dict[str, torch.Tensor], num_bits: int, dtype: torch.dtype) -> torch.Tensor:
    """The weight [out, in] that the tensors of one module stand for.

    `tensors` has the module's names without its prefix: weight_packed and weight_shape, or weight;
    weight_scale; weight_zero_point if asymmetric.
    """
    scales = tensors["weight_scale"].double()
    zero_points = torch.zeros_like(scales)
    if "weight_packed" in tensors:
        rows, columns = tensors["weight_shape"].tolist()
        codes = unpack(tensors["weight_packed"], num_bits, columns)
        if "weight_zero_point" in tensors:  # packed down the rows
            transposed = tensors["weight_zero_point"].t().contiguous()
            zero_points = unpack(transposed, num_bits, rows).t()
    else:
        codes = tensors["weight"]
        zero_points = tensors.get("weight_zero_point", zero_points)
    group_size = codes.shape[1] // scales.shape[1]
    spread = [values.repeat_interleave(group_size, dim=1) for values in (zero_points, scales)]
    # The product of a code below 2^9 and a float32 is exact in double: rounded once, by the cast.
    return ((codes.double() - spread[0]) * spread[1]).to(dtype)
