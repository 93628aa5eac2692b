"""The integer grid, slowly and obviously: plain PyTorch in float32, one formula a line.

What kernels/quant_grid.h, kernels/fake_quantize.h and kernels/quantize.h promise, written from
their documentation and sharing no code with them. Tests compare bit for bit.
"""

import numpy as np
import torch

SMALLEST_NORMAL = {
    torch.float32: 2.0**-126,
    torch.bfloat16: 2.0**-126,
    torch.float16: 2.0**-14,
}


def philox4x32(counter: np.ndarray, key: int) -> np.ndarray:
    """Philox4x32-10 of Salmon et al. (SC 2011): counter [..., 4] to random words [..., 4]."""
    c0, c1, c2, c3 = (counter[..., i].astype(np.uint64) for i in range(4))
    key0, key1 = key & 0xFFFFFFFF, key >> 32
    mask, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    for _ in range(10):
        product0 = c0 * np.uint64(0xD2511F53)
        product1 = c2 * np.uint64(0xCD9E8D57)
        c0 = (product1 >> half) ^ c1 ^ np.uint64(key0)
        c2 = (product0 >> half) ^ c3 ^ np.uint64(key1)
        c1, c3 = product1 & mask, product0 & mask
        key0 = (key0 + 0x9E3779B9) & 0xFFFFFFFF
        key1 = (key1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


def uniforms(rows: int, cols: int, seed: int, step: int, name_hash: int) -> torch.Tensor:
    """Draws [rows, cols] of a parameter in one step: multiples of 2^-16 in [0, 1), float32."""
    blocks = np.arange((rows * cols + 7) // 8, dtype=np.uint64)
    counter = np.empty((len(blocks), 4), dtype=np.uint64)
    counter[:, 0] = blocks & np.uint64(0xFFFFFFFF)
    counter[:, 1] = blocks >> np.uint64(32)
    counter[:, 2] = step & 0xFFFFFFFF
    counter[:, 3] = name_hash
    words = philox4x32(counter, seed)
    halves = np.stack([words & np.uint32(0xFFFF), words >> np.uint32(16)], axis=-1)
    uniform = halves.reshape(-1)[: rows * cols].astype(np.float32) * np.float32(2.0**-16)
    return torch.from_numpy(uniform).view(rows, cols)


def fnv1a(name: str) -> int:
    """32-bit FNV-1a of a parameter's name."""
    value = 2166136261
    for byte in name.encode():
        value = ((value ^ byte) * 16777619) & 0xFFFFFFFF
    return value


def grid_range(num_bits: int, mode: str) -> tuple[int, int]:
    qmax = max(1, 2 ** (num_bits - 1) - 1)
    return (-qmax - 1 if mode == "asymmetric" else -qmax), qmax


def has_sign_codes(num_bits: int, mode: str) -> bool:
    return num_bits <= {"ternary": 2, "binary": 2}.get(mode, 0)


def grouped(weight: torch.Tensor, granularity: str, group_size: int) -> torch.Tensor:
    """[out, in] as [num_groups, elements of a group]."""
    if granularity == "per_tensor":
        return weight.reshape(1, -1)
    if granularity == "per_channel":
        return weight
    if granularity == "per_rows":
        return weight.reshape(-1, group_size * weight.shape[1])
    return weight.reshape(-1, group_size)


def scale_shape(rows: int, cols: int, granularity: str, group_size: int) -> tuple[int, ...]:
    if granularity == "per_tensor":
        return (1,)
    if granularity == "per_rows":
        return (rows // group_size, 1)
    return (rows, 1 if granularity == "per_channel" else cols // group_size)


def stored_scale(scale: torch.Tensor, scale_dtype: torch.dtype) -> torch.Tensor:
    """The number that is stored for a scale: rounded, and kept within the normal numbers."""
    stored = scale.to(scale_dtype).float()
    return stored.clamp(SMALLEST_NORMAL[scale_dtype], torch.finfo(scale_dtype).max)


def unit_of(groups: torch.Tensor, bits: int) -> torch.Tensor:
    """The power of two, >= 2^-126, of which each group's largest magnitude has `bits` bits."""
    _, exponent = torch.frexp(groups.abs().amax(1, keepdim=True).double())
    return torch.ldexp(torch.ones_like(groups[:, :1]).double(), (exponent - bits).clamp(-126))


def mean_magnitude(groups: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Mean magnitude [num_groups, 1] of the chosen elements, counted in integers; float32."""
    unit = unit_of(groups, 30)
    units = (groups.abs().double() / unit).round() * chosen
    count = chosen.sum(1, keepdim=True).double()
    return torch.where(count > 0, units.sum(1, keepdim=True) / count.clamp(1) * unit, 0.0).float()


def sign_codes(
    groups: torch.Tensor, num_bits: int, scale_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of ternary (2 bits) and binary (1 bit) grids."""
    finite = groups.isfinite().all(1, keepdim=True)
    groups = torch.where(finite, groups, 0.0)
    chosen = torch.ones_like(groups, dtype=torch.bool)
    mean = mean_magnitude(groups, chosen)
    threshold = torch.zeros_like(mean)
    if num_bits == 2:
        threshold = torch.tensor(0.7) * mean
        mean = mean_magnitude(groups, groups.abs() > threshold)
    codes = groups.sign() * (groups.abs() > threshold)
    return codes, torch.where(finite, stored_scale(mean, scale_dtype), torch.nan)


def mse_grid(
    groups: torch.Tensor, num_bits: int, mode: str, scale_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """The grid of the extent times 32/32 … 9/32 with the least squared error, counted in integers.

    Of equal errors the first.
    """
    qmin, qmax = grid_range(num_bits, mode)
    finite = groups.isfinite().all(1, keepdim=True)
    values = torch.where(finite, groups, 0.0)
    values = torch.nn.functional.pad(values, (0, 1))  # a zero changes no error
    unit = unit_of(values, 15)
    grids, errors = [], []
    for clipped in range(32, 8, -1):
        ratio = torch.tensor(clipped / 32.0)
        scale, zero_point = make_grid(values, num_bits, mode, scale_dtype, ratio)
        codes = ((values * (1.0 / scale)).round() + zero_point).clamp(qmin, qmax)
        error = (values - (codes - zero_point) * scale).abs()
        errors.append((error.double() / unit).round().clamp(max=2.0**15).square().sum(1))
        grids.append((scale, zero_point))
    best = torch.stack(errors).argmin(0)
    pick = torch.arange(len(best))
    scale, zero_point = (torch.stack(parts)[best, pick] for parts in zip(*grids, strict=True))
    return torch.where(finite, scale, torch.nan), torch.where(finite, zero_point, 0.0)


def make_grid(
    groups: torch.Tensor,
    num_bits: int,
    mode: str,
    scale_dtype: torch.dtype,
    ratio: torch.Tensor | float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zero points [num_groups, 1] in float32; a group with a NaN or infinity: NaN, 0."""
    qmin, qmax = grid_range(num_bits, mode)
    # One more zero changes no grid (an asymmetric one always holds 0), and gives empty groups one.
    groups = torch.nn.functional.pad(groups, (0, 1))
    if mode != "asymmetric":
        extent, levels = groups.abs().amax(1, keepdim=True) * ratio, qmax
    else:
        lo = groups.amin(1, keepdim=True) * ratio
        hi = groups.amax(1, keepdim=True) * ratio
        extent, levels = hi - lo, qmax - qmin
    scale = stored_scale(extent / levels, scale_dtype)
    if mode != "asymmetric":
        zero_point = torch.zeros_like(scale)
    else:
        zero_point = (qmin - lo * (1.0 / scale)).round().clamp(qmin, qmax)
    finite = groups.isfinite().all(1, keepdim=True)
    return torch.where(finite, scale, torch.nan), torch.where(finite, zero_point, 0.0)


def quantize(
    weight: torch.Tensor,
    num_bits: int,
    *,
    granularity: str = "per_channel",
    group_size: int = 0,
    mode: str = "symmetric",
    rounding: str = "nearest",
    seed: int = 0,
    step: int = 0,
    name_hash: int = 0,
    transposed: bool = False,
    scale_dtype: torch.dtype | None = None,
    scale_rule: str = "absmax",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes [out, in], scales and zero points of the shapes that moq::quantize documents."""
    matrix = weight.float().t() if transposed else weight.float()
    rows, cols = matrix.shape
    scale_dtype = scale_dtype or weight.dtype
    qmin, qmax = grid_range(num_bits, mode)
    groups = grouped(matrix, granularity, group_size)
    find = mse_grid if scale_rule == "mse" else make_grid
    scale, zero_point = find(groups, num_bits, mode, scale_dtype)
    position = groups * (1.0 / scale)
    if has_sign_codes(num_bits, mode):
        rounded, scale = sign_codes(groups, num_bits, scale_dtype)
    elif rounding == "nearest":
        rounded = position.round()
    else:
        draws = grouped(uniforms(rows, cols, seed, step, name_hash), granularity, group_size)
        rounded = (position.double() + draws.double()).floor().float()  # float64 holds the sum
    codes = (rounded + zero_point).clamp(qmin, qmax).nan_to_num(0.0)
    shape = scale_shape(rows, cols, granularity, group_size)
    return (
        codes.reshape(rows, cols).to(torch.int8 if num_bits <= 8 else torch.int16),
        scale.reshape(shape).to(scale_dtype),
        zero_point.reshape(shape).to(torch.int32),
    )


def dequantize(
    codes: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor | None = None,
    *,
    transposed: bool = False,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """scale * (code - zero_point) in float32, rounded once to `dtype` (default: the scales')."""
    rows, cols = codes.shape
    if scales.dim() == 2 and scales.shape[0] != rows:  # rows share scales
        scales = scales.repeat_interleave(rows // scales.shape[0], dim=0)
        if zero_points is not None:
            zero_points = zero_points.repeat_interleave(rows // zero_points.shape[0], dim=0)
    per_element = [
        values.float().reshape(-1, values.shape[-1]).expand(rows, -1)
        for values in (scales, torch.zeros_like(scales) if zero_points is None else zero_points)
    ]
    scale, zero_point = (
        values.repeat_interleave(cols // values.shape[1], dim=1) for values in per_element
    )
    output = ((codes.float() - zero_point) * scale).to(dtype or scales.dtype)
    return output.t() if transposed else output


def fake_quantize(
    weight: torch.Tensor, num_bits: int, *, blend_ratio: float = 0.0, **arguments
) -> torch.Tensor:
    """The weight on its grid: what moq::fake_quantize returns."""
    transposed = arguments.get("transposed", False)
    codes, scales, zero_points = quantize(weight, num_bits, **arguments)
    simulated = dequantize(codes, scales, zero_points, transposed=transposed, dtype=torch.float32)
    if blend_ratio != 0.0:
        r = torch.tensor(blend_ratio, dtype=torch.float32)
        blended = r * weight.float() + (1.0 - r) * simulated
        simulated = torch.where(simulated.isnan(), torch.nan, blended)
    return simulated.to(weight.dtype)


def quantize_activation(
    tokens: torch.Tensor,
    scale: torch.Tensor | None = None,
    zero_point: torch.Tensor | None = None,
    mode: str = "symmetric",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """INT8 codes of [..., features], their scales and zero points: one a token, or those given."""
    qmin, qmax = grid_range(8, mode)
    if scale is None:
        rows = tokens.float().flatten(0, -2) if tokens.dim() > 1 else tokens.float()[None]
        shape = (*tokens.shape[:-1], 1)
        scale, offset = (part.reshape(shape) for part in make_grid(rows, 8, mode, torch.float32))
    else:
        offset = torch.zeros(1) if zero_point is None else zero_point.float()
    position = tokens.float() * (1.0 / scale)
    codes = (position.round() + offset).clamp(qmin, qmax).nan_to_num(0.0)
    return codes.to(torch.int8), scale, offset.to(torch.int32)


def fake_quantize_activation(
    tokens: torch.Tensor,
    scale: torch.Tensor | None = None,
    zero_point: torch.Tensor | None = None,
    mode: str = "symmetric",
) -> torch.Tensor:
    """What the codes stand for; a NaN stays one, and no zero is negative."""
    codes, scale, offset = quantize_activation(tokens, scale, zero_point, mode)
    output = torch.where(tokens.isnan(), torch.nan, (codes.float() - offset) * scale)
    return output.to(tokens.dtype)
