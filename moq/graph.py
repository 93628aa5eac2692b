"""What the graph of a loss reaches, without changing it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def reached_by(loss: Tensor) -> tuple[list[Tensor], set[torch.dtype]]:
    """Looks at the graph of a loss.

    What lies behind a reentrant checkpoint is not seen: its graph is made in the backward pass.

    Args:
        loss: With a graph.

    Returns:
        (the tensors into which ``loss.backward()`` accumulates gradients, the dtypes of all that
        it computes gradients of)
    """
    if loss.grad_fn is None:
        return [loss], {loss.dtype}
    leaves: list[Tensor] = []
    dtypes: set[torch.dtype] = set()
    seen: set[Any] = set()
    ahead: list[Any] = [loss.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (leaf := getattr(node, "variable", None)) is not None:
            leaves.append(leaf)
        dtypes.update(output.dtype for output in getattr(node, "_input_metadata", ()))
        ahead += [function for function, _ in node.next_functions]
    return leaves, dtypes
