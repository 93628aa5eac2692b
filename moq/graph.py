"""What the graph of a loss reaches, without changing it."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def leaves_of(loss: Tensor) -> list[Tensor]:
    """Returns the tensors into which ``loss.backward()`` accumulates gradients.

    But for those behind a reentrant checkpoint, whose graph is made in the backward pass.

    Args:
        loss: With a graph.
    """
    if loss.grad_fn is None:
        return [loss]
    leaves: list[Tensor] = []
    seen: set[Any] = set()
    ahead: list[Any] = [loss.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (leaf := getattr(node, "variable", None)) is not None:
            leaves.append(leaf)
        ahead += [function for function, _ in node.next_functions]
    return leaves
