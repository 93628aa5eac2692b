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


def block_ranges(blocks: Sequence[Sequence[Tensor]]) -> list[slice]:
    """Returns the rows of each block in the dense Hessian of all blocks' parameters."""
    ranges, begin = [], 0
    for block in blocks:
        end = begin + sum(parameter.numel() for parameter in block)
        ranges.append(slice(begin, end))
        begin = end
    return ranges
