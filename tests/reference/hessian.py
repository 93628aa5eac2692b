"""The Hessian, one row at a time: what the products are measured against."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def dense_hessian(loss_fn: Callable[[], Tensor], parameters: Sequence[Tensor]) -> Tensor:
    """Returns d²loss / dw² [n, n], with w all parameters flattened one after the other."""
    gradients = torch.autograd.grad(loss_fn(), parameters, create_graph=True)
    gradient = torch.cat([g.reshape(-1) for g in gradients])
    rows = []
    for element in gradient:
        row = torch.autograd.grad(element, parameters, retain_graph=True, materialize_grads=True)
        rows.append(torch.cat([r.reshape(-1) for r in row]))
    return torch.stack(rows)


def jacobian(outputs: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """Returns d outputs / dw [outputs, n], one row at a time."""
    rows = [
        torch.autograd.grad(o, parameters, retain_graph=True, materialize_grads=True)
        for o in outputs.flatten()
    ]
    return torch.stack([torch.cat([r.reshape(-1) for r in row]) for row in rows])


def gauss_newton(
    loss_of_outputs: Callable[[Tensor], Tensor], outputs: Tensor, parameters: Sequence[Tensor]
) -> Tensor:
    """Returns J' (d²loss / d outputs²) J [n, n]."""
    j = jacobian(outputs, parameters)
    flat = outputs.detach().flatten()
    inner = torch.autograd.functional.hessian(
        lambda z: loss_of_outputs(z.view_as(outputs)), flat, strict=False
    )
    return j.T @ inner @ j


def empirical_fisher(losses: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """Returns the mean outer product of the gradients of the losses [n, n]."""
    j = jacobian(losses, parameters)
    return j.T @ j / len(j)


def block_ranges(blocks: Sequence[Sequence[Tensor]]) -> list[slice]:
    """Returns the rows of each block in the dense Hessian of all blocks' parameters."""
    ranges, begin = [], 0
    for block in blocks:
        end = begin + sum(parameter.numel() for parameter in block)
        ranges.append(slice(begin, end))
        begin = end
    return ranges
