"""Derivatives of learned step sizes, composed of torch's operators: slow, and differentiable."""

import torch


def gradients(
    incoming, weight, absmax, num_bits, blend_ratio=0.0, transposed=False, scale_dtype=None
):
    """Gradients of weight and absmax under that of the output, as kernels/learned_scale.h has them.

    The groups of a weight follow from their number: each is a run of the row-major matrix. Sums
    are float64.
    """
    matrix, grad = (t.t() if transposed else t for t in (weight, incoming))
    groups, grad = (t.reshape(len(absmax), -1).float() for t in (matrix, grad))
    qmax = 2.0 ** (num_bits - 1) - 1
    scale_dtype = scale_dtype or weight.dtype
    limits = torch.finfo(scale_dtype)
    stored = (absmax.abs() / qmax).to(scale_dtype).float()
    scale = stored.clamp(limits.tiny, limits.max)[:, None]
    position = groups * scale.reciprocal()
    rounded = position.round()
    inside = rounded.abs() <= qmax
    slope = torch.where(inside, rounded - position, position.sign() * qmax)
    to_weight = grad * inside
    to_absmax = (grad.double() * slope).sum(1) / qmax * torch.where(absmax < 0, -1.0, 1.0)
    if blend_ratio:
        # In float32, as the kernels have it.
        ratio = torch.tensor(blend_ratio, device=weight.device)
        to_weight = grad * ratio + to_weight * (1 - ratio)
        to_absmax = to_absmax * (1 - ratio)
    to_weight = to_weight.to(weight.dtype).reshape(matrix.shape)
    return to_weight.t() if transposed else to_weight, to_absmax
